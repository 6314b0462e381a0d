"""The trainer's image: built and run by a real Docker engine and, where there is one, as a pod of a real cluster.

A build takes minutes and gigabytes, so only `make test-images` asks for these tests.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import cv_factory_ops
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import KubernetesRuntime, PodSettings, load
from tests.conftest import TINY
from tests.kubernetes.conftest import until

ROOT = Path(__file__).parents[1]
IMAGE = os.environ.get("CVF_TRAINER_IMAGE", "")
LOAD_IMAGE = os.environ.get("CVF_LOAD_IMAGE", "")
RESTRICTED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]  # noqa: S108
USER = os.getuid() or 1000
"""Numeric user of containers that write to a folder of this machine."""
SCALE = {"training": TINY["training"] | {"processes_per_node": 2}}

pytestmark = pytest.mark.skipif(not IMAGE, reason="building images takes minutes; `make test-images` asks for it")


def docker(*arguments: str) -> str:
    """Standard output of a Docker command that must succeed."""
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True)
    assert result.returncode == 0, f"docker {shlex.join(arguments)}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
    return result.stdout


def build(checkout: Path, tag: str) -> str:
    make = ["make", "--no-print-directory", "-C", str(checkout), "trainer-image", f"TRAINER_IMAGE={tag}"]
    result = subprocess.run(make, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return tag


@pytest.fixture(scope="module")
def image() -> str:
    """Name of the image, freshly built from this checkout; without a Docker engine the test skips."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers")
    return build(ROOT, IMAGE)


def inspect(image: str) -> dict[str, Any]:
    return json.loads(docker("image", "inspect", image))[0]


def python(image: str, code: str, *options: str) -> Any:
    """What a script prints as JSON in a container."""
    return json.loads(docker("run", "--rm", *RESTRICTED, *options, image, "python", "-c", code))


def test_cvf_runs_as_a_user_without_rights_on_a_read_only_root(image: str) -> None:
    assert docker("run", "--rm", *RESTRICTED, image, "cvf", "--version") == f"cvf {cv_factory_ops.__version__}\n"
    assert docker("run", "--rm", *RESTRICTED, image, "id", "-u").strip() == "1000"
    writable = "import json, os; print(json.dumps([p for p in os.environ['PATH'].split(':') if os.access(p, os.W_OK)]))"
    assert json.loads(docker("run", "--rm", image, "python", "-c", writable)) == []


def test_a_container_tells_its_health(image: str) -> None:
    container = docker("run", "--rm", "--detach", *RESTRICTED, "--health-interval", "1s", image, "sleep", "600").strip()
    try:
        until(lambda: docker("inspect", "--format", "{{.State.Health.Status}}", container).strip() == "healthy")
    finally:
        docker("rm", "--force", container)
    assert inspect(image)["Config"]["Healthcheck"]["Test"] == ["CMD", "cvf", "--version"]


def test_the_image_says_what_it_is(image: str) -> None:
    config = inspect(image)["Config"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["title"], labels["version"]) == ("cv-factory-trainer", cv_factory_ops.__version__)
    assert f"CVF_GIT_SHA={labels['revision']}" in config["Env"]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == ("1000:1000", None, ["cvf", "--help"])


def test_nothing_is_left_of_the_build(image: str) -> None:
    code = """
import json, shutil
from importlib.util import find_spec
from pathlib import Path
print(json.dumps({
    "programs": [name for name in ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ld", "make", "git") if shutil.which(name)],
    "compilers": [str(path) for root in ("/usr", "/opt") for name in ("cc1", "cc1plus") for path in Path(root).rglob(name)],
    "caches": [str(path) for path in map(Path, ("/root/.cache", "/tmp/.cache", "/build", "/project")) if path.exists()],
    "repositories": [str(path) for path in Path("/opt").rglob(".git")],
    "modules": [name for name in ("airflow", "pip", "tests", "pytest", "moto") if find_spec(name)],
}))
"""
    found = python(image, code, "--user", "0", "--cap-add", "DAC_READ_SEARCH")
    assert found == {"programs": [], "compilers": [], "caches": [], "repositories": [], "modules": []}


def test_every_package_is_the_locks(image: str) -> None:
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    code = "import json, importlib.metadata as m; print(json.dumps({d.name: d.version for d in m.distributions(path=PATH)}))"
    site = python(image, "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))")
    installed = python(image, code.replace("PATH", f"[{site!r}]"))
    assert installed.pop("cv-factory") == cv_factory_ops.__version__
    locked = {_normal(name): version for name, version in lock.items()}
    # The build of PyTorch (+cpu, +cu130) and what only a GPU build brings along are the user's choice by PIP_ARGS.
    differing = {name: version for name, version in installed.items() if locked.get(_normal(name)) != version.partition("+")[0]}
    assert [name for name in differing if not name.startswith(("nvidia-", "cuda-", "triton"))] == []


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_a_change_of_code_replaces_one_small_layer(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    rows = [
        line.split("\t")
        for line in docker("history", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines()
    ]
    layers = [(int(size), " ".join(command.split())[:90]) for size, command in rows if size != "0"]
    with capsys.disabled():
        print(f"\n{image}: {sum(size for size, _ in layers) / 1e6:.0f} MB")
        print("\n".join(f"  {size / 1e6:8.1f} MB  {command}" for size, command in layers))
    assert layers[0][0] < 5e6

    for name in ("cv_factory_ops", "domain_medical", "plugins", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "requirements.lock", "README.md", ".dockerignore", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "cv_factory_ops" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    changed = build(tmp_path, f"cv-factory-trainer:test-{uuid.uuid4().hex[:8]}")
    request.addfinalizer(lambda: docker("image", "rm", changed))
    before, after = inspect(image)["RootFS"]["Layers"], inspect(changed)["RootFS"]["Layers"]
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_phantoms_become_a_bundle(image: str, project: Callable[..., Path], home: Path) -> None:
    file = project(**SCALE)
    os.chown(home, USER, USER)
    for stage in ("ingest", "preprocess", "train"):
        folder = ["--volume", f"{home}:/data", "--env", "CVF_HOME=/data", "--user", str(USER)]
        command = ["cvf", stage, "--config", f"/data/{file.name}", "--run", "/data/run"]
        result = json.loads(docker("run", "--rm", *RESTRICTED, *folder, image, *command))
    assert "2 processes" in result["record"]["summary"]
    assert Bundle.load(home / "run" / "train" / "bundle").digest == result["record"]["bundle_digest"]


@pytest.fixture
def restricted_namespace(image: str) -> Iterator[tuple[Any, str]]:
    """The cluster's API and a namespace that refuses pods which the policy ``restricted`` forbids (from 1.23 on)."""
    if not LOAD_IMAGE:
        pytest.skip("set KUBECONFIG to a cluster and CVF_LOAD_IMAGE to the command that copies an image to it")
    from kubernetes import client, config

    config.load_kube_config()
    subprocess.run([*shlex.split(LOAD_IMAGE), image], check=True, capture_output=True)
    core, name = client.CoreV1Api(), f"cvf-images-{uuid.uuid4().hex[:8]}"
    core.create_namespace({"metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    until(lambda: any(account.metadata.name == "default" for account in core.list_namespaced_service_account(name).items))
    yield core, name
    core.delete_namespace(name)


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_a_pod_trains_under_the_restricted_policy(
    image: str, restricted_namespace: tuple[Any, str], project: Callable[..., Path]
) -> None:
    from cv_factory_airflow.manifest import PROJECT_FILE, manifest

    (core, namespace), file = restricted_namespace, project(**SCALE)
    pod = PodSettings(image=image, requests={"cpu": "100m", "memory": "256Mi"})
    runtime = KubernetesRuntime(pod=pod, namespace=namespace)
    stages = (f"cvf {stage} --config {PROJECT_FILE} --run /tmp/run" for stage in ("ingest", "preprocess", "train"))
    command = ["sh", "-c", " && ".join(stages)]
    owner = {"dag": "tiny_training", "run": "manual__1"}
    body = manifest(load(file), runtime, "train", "trainer", command, file.read_text(), owner)
    core.create_namespaced_pod(namespace, body)
    phase = until(lambda: _ended(core.read_namespaced_pod_status("trainer", namespace)), seconds=300)
    # Read raw: the client decodes a log to the text of a bytes literal.
    log = core.read_namespaced_pod_log("trainer", namespace, _preload_content=False).data.decode()
    assert phase == "Succeeded", log
    record = json.loads(next(line for line in log.splitlines() if line.startswith('{"stage":"train"')))["record"]
    assert "2 processes" in record["summary"]


def _ended(pod: Any) -> str | None:
    return pod.status.phase if pod.status.phase in {"Succeeded", "Failed"} else None
