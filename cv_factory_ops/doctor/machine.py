"""This machine: the project's domain, the installed packages, processors, memory, disk, and what the environment must hold."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from pydantic import BaseModel

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.config.runtime import KubernetesRuntime, PodSettings
from cv_factory_ops.doctor.findings import CannotTell, Finding, fail, ok, warn
from cv_factory_ops.domain import open_domain
from cv_factory_ops.reach import PSEUDONYMIZING

GIB = 1 << 30
TRAINING_MEMORY = GIB
"""Bytes of a process that trains a small network: 0.6 GiB were measured (docs/benchmarks.md); larger ones take more."""
SHARED_MEMORY = 64 << 20
"""Bytes of ``/dev/shm`` for each of several processes: what NCCL exchanges on a machine goes through it."""
LEAST_DISK, SPARE_DISK = GIB, 10 * GIB
"""Bytes below which a run stops, or may stop, before its end."""
FETCHED = {"dicomweb", "dimse", "received", "http", "kafka"}
"""Sources that de-identify what they bring."""
BY_HAND = ("gateway.", "stream.")
"""Settings of services that no run starts."""


def domain(config: ProjectConfig) -> Iterator[Finding]:
    """The package that reads the project's studies."""
    found = open_domain(config.domain)
    yield ok("domain", f"{config.domain} is installed ({type(found).__module__})")


def software(config: ProjectConfig) -> Iterator[Finding]:
    """Every package that this project's settings need, in the versions that ``pyproject.toml`` asks for."""
    if isinstance(config.runtime, KubernetesRuntime):
        raise CannotTell("the stages run in the pods' image; `cvf doctor` in one of them looks at it")
    base = list(_lacking(""))
    if base:
        yield fail("software", "; ".join(base), "make install")
    else:
        yield ok("software", f"cv-factory {version('cv-factory')} and all that it needs")
    for extra in extras(config):
        name, cure = f"software.{extra}", f"pip install 'cv-factory[{extra}]'"
        if lacking := list(_lacking(extra)):
            needed = warn if extra == "deidentify" else fail  # without it studies with text in the image are refused
            yield needed(name, "; ".join(lacking), cure)
        else:
            yield ok(name, "is installed")


def extras(config: ProjectConfig) -> list[str]:
    """The extras of ``pyproject.toml`` that a run of this project needs."""
    weights = [config.model.weights or "", getattr(config.embedding, "weights", "")]
    needed = {
        config.deploy.kind: config.deploy.kind in {"vertex", "azure"},
        "vectors": config.retrieval is not None and config.retrieval.store.kind != "faiss",
        "rerank": config.retrieval is not None and config.retrieval.reranker.kind == "cross_encoder",
        "hub": any(place.startswith("hf://") for place in weights),
        "deidentify": config.data.source.kind in FETCHED and config.deidentification.pixels != "trust",
    }
    return [extra for extra, is_needed in needed.items() if is_needed]


def _lacking(extra: str) -> Iterator[str]:
    """What an extra, or with an empty name the project itself, asks for and is not there."""
    from packaging.requirements import Requirement

    try:
        asked = [Requirement(line) for line in requires("cv-factory") or []]
    except PackageNotFoundError:
        raise CannotTell("cv-factory itself is not installed as a package here") from None
    always = {one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}
    with_extra = {one for one in asked if one.marker and one.marker.evaluate({"extra": extra})} - always
    for one in sorted(with_extra if extra else always, key=str):
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            yield f"{one.name} is not installed"
            continue
        if not one.specifier.contains(installed, prereleases=True):
            yield f"{one.name} {installed} is installed, needed is {one.specifier}"


def processors(config: ProjectConfig) -> Iterator[Finding]:
    """GPUs or cores for the processes of a training; where each stage is a process, this machine plays all nodes."""
    if isinstance(config.runtime, KubernetesRuntime):
        return
    import torch

    training = config.training
    each, count = training.processes_per_node, torch.cuda.device_count() if torch.cuda.is_available() else 0
    asked = f"{training.nodes * each} processes of {training.threads} threads"
    if count:
        enough = each <= count
        told = f"PyTorch {torch.__version__} sees {count} GPUs for training.processes_per_node: {each}"
        yield ok("processors", told) if enough else fail("processors", told, "at most one process a GPU")
        return
    cores = len(os.sched_getaffinity(0))
    told = f"PyTorch {torch.__version__} sees no GPU; {cores} cores for {asked}"
    if training.nodes * each * training.threads <= cores:
        yield ok("processors", told)
    else:
        yield warn("processors", told, "fewer processes or threads: they would wait for one another")


def memory(config: ProjectConfig) -> Iterator[Finding]:
    """Free memory, by the kernel and by the limit of this container."""
    if isinstance(config.runtime, KubernetesRuntime):
        return
    processes = config.training.nodes * config.training.processes_per_node
    free, needed = free_memory(), processes * TRAINING_MEMORY
    told = f"{free / GIB:.1f} GiB are free, {processes} training processes take {needed / GIB:.0f} GiB or more"
    cure = "fewer training.processes_per_node, or a larger machine"
    yield ok("memory", told) if free >= needed else warn("memory", told, cure)
    shared = shutil.disk_usage("/dev/shm").free  # noqa: S108 - not a file, but its size
    told = f"the shared memory (/dev/shm) has {shared / GIB:.2f} GiB free for {processes} processes"
    enough = processes == 1 or shared >= processes * SHARED_MEMORY
    yield ok("memory.shared", told) if enough else warn("memory.shared", told, "docker run --shm-size, or one process")


def free_memory(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that may still be taken: the kernel's estimate, or what the control group leaves where that is less."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    cached = int(counted.get("inactive_file", 0))  # what files were read, which the kernel drops when it is short
    return free if limit == "max" else min(free, int(limit) - int(used) + cached)


def disk(config: ProjectConfig) -> Iterator[Finding]:
    """Room for the storage, where it is a folder, and for what stages keep while they work."""
    places = {"disk.scratch": Path(tempfile.gettempdir())}
    if path := storage.path_of(config.storage_uri):
        places["disk.storage"] = path
    for name, place in places.items():
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        told = f"{free / GIB:.1f} GiB are free at {place}"
        kind = fail if free < LEAST_DISK else warn
        yield (
            ok(name, told)
            if free >= SPARE_DISK
            else kind(name, told, f"make room: {SPARE_DISK // GIB} GiB and what your studies take")
        )


def environment(config: ProjectConfig) -> Iterator[Finding]:
    """Variables that the project's settings name, and the key of the pseudonyms; their values are not looked at."""
    yield _pseudonym_key(config)
    for path, name in sorted(named_variables(config)):
        place = f"environment.{name}"
        if _is_given(config, name):
            yield ok(place, f"is set, for {path}")
        elif hidden := _hidden_in(config):
            yield warn(place, f"may be in the Secret {hidden}; {path} takes it", _where_to_set(config, name))
        else:
            kind = warn if path.startswith(BY_HAND) else fail
            yield kind(place, f"is not set; {path} takes it", _where_to_set(config, name))


def named_variables(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Path and value of every setting that names an environment variable."""
    for field, value in section:
        path = f"{prefix}{field}"
        if isinstance(value, BaseModel):
            yield from named_variables(value, f"{path}.")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if isinstance(item, BaseModel):
                    yield from named_variables(item, f"{path}.{number}.")
        elif isinstance(value, str) and value and (field.endswith("_env") or path == "gateway.access.env"):
            yield path, value


def _is_given(config: ProjectConfig, name: str, stages: Collection[str] = ()) -> bool:
    """Whether this process has a variable; where stages are pods, those of these stages, or of any."""
    if not isinstance(config.runtime, KubernetesRuntime):
        return bool(os.environ.get(name))
    given = [name in {*pod.env, *pod.secret_env} for pod in _pods(config.runtime, stages)]
    return all(given) if stages else any(given)


def _hidden_in(config: ProjectConfig, stages: Collection[str] = ()) -> str:
    """Secrets whose keys are variables of pods as they are; which keys they have is not looked at."""
    if not isinstance(config.runtime, KubernetesRuntime):
        return ""
    return " or ".join(sorted({name for pod in _pods(config.runtime, stages) for name in pod.env_from_secrets}))


def _pods(runtime: KubernetesRuntime, stages: Collection[str]) -> list[PodSettings]:
    return [runtime.pod_of(stage) for stage in stages] or [runtime.pod, *map(runtime.pod_of, runtime.stages)]


def _where_to_set(config: ProjectConfig, name: str) -> str:
    if isinstance(config.runtime, KubernetesRuntime):
        return f"runtime.pod.secret_env: {{{name}: {{secret: ..., key: ...}}}}"
    return f"set {name} where Airflow's workers run"


def _pseudonym_key(config: ProjectConfig) -> Finding:
    name, file = "environment.CVF_PSEUDONYM_KEY", home() / "var" / "pseudonym.key"
    if _is_given(config, "CVF_PSEUDONYM_KEY", PSEUDONYMIZING):
        return ok(name, "is set")
    if hidden := _hidden_in(config, PSEUDONYMIZING):
        return warn(name, f"may be in the Secret {hidden}", _where_to_set(config, "CVF_PSEUDONYM_KEY"))
    if isinstance(config.runtime, KubernetesRuntime):
        return fail(name, "is not given to the pods; all need the same key", _where_to_set(config, "CVF_PSEUDONYM_KEY"))
    told = f"is not set; the key of {file} is taken" if file.exists() else f"is not set; one will be made in {file}"
    shared = storage.path_of(config.storage_uri) is None
    cure = "set it: another machine of this storage would make another key, and a patient be two"
    return warn(name, told, cure) if shared else ok(name, told)
