"""The stage contract: ``cvf <stage> --config FILE --run URI``.

A stage reads the records of earlier stages under the run, works in a private folder, and publishes that folder together
with its own record in one atomic step. The same inputs give the stored result without working again; a killed stage leaves
nothing half done in sight; a second start of a running stage waits for the first and returns its result.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ValidationError

import cv_factory_ops
from cv_factory_ops import refusals, storage
from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.domain import Domain, open_domain
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, GateRefused
from cv_factory_ops.records import Record, Result

log = logging.getLogger("cvf")
R = TypeVar("R", bound=Record)


INPUTS = ".inputs"
"""The digest of what a private folder is made from, while it is in work."""


@dataclass(frozen=True)
class Spec:
    """Which function does a stage's work, and what its result depends on."""

    work: str
    """``module:function`` below this package, taking the :class:`Stage` and returning its record; imported when it runs."""
    help: str
    reads: tuple[str, ...]
    """Earlier stages whose records it reads."""
    sections: tuple[str, ...]
    """Fields of the project's configuration that it depends on."""
    fingerprint: str = ""
    """``module:function`` that digests what it reads from outside the run, taking the :class:`Stage`."""
    cleanup: str = ""
    """``module:function`` that is called with the :class:`Stage` once its result is published."""
    undo: str = ""
    """``module:function`` that is called with the :class:`Stage` and the error where the stage fails for good, so that a retry
    would change nothing; it returns what it did, for the message."""
    final: tuple[type[CvFactoryError], ...] = ()
    """Errors of its that end a run for good: no schedule takes it up again, see :mod:`cv_factory_ops.refusals`. Others only
    tell what is missing: an approval, or a comparison with the present champion."""
    resumes: bool = False
    """Whether the private folder of an interrupted try is kept, for a next one with the same inputs to go on from."""
    grace_seconds: float = 0
    """Time that it takes to tidy up after SIGTERM, where that is more than moments."""
    assist: str = ""
    """``module:function`` that further nodes run instead of ``work``, taking the :class:`Stage` and a function that says
    whether the result is there already."""


STAGES = {
    "ingest": Spec(
        "ingestion.ingest:run",
        "read, check and split the images",
        (),
        ("project", "domain", "task", "labels", "data", "decoding", "splits"),
        "ingestion.ingest:fingerprint",
    ),
    "preprocess": Spec(
        "preprocessing.preprocess:run",
        "write the training shards",
        ("ingest",),
        ("task", "decoding", "preprocessing"),
        resumes=True,
    ),
    "train": Spec(
        "training.train:run",
        "train with DDP, write the model bundle",
        ("ingest", "preprocess"),
        (
            "project",
            "domain",
            "task",
            "labels",
            "decoding",
            "preprocessing",
            "model",
            "training",
            "search",
            "embedding",
            "calibration",
            "mlflow",
        ),
        "training.train:fingerprint",
        cleanup="training.train:forget_checkpoint",
        final=(GateRefused,),
        grace_seconds=20,
        assist="training.train:assist",
    ),
    "index": Spec(
        "indexing:run",
        "embed the images and index them, for similar studies",
        ("ingest", "preprocess", "train"),
        ("labels", "retrieval"),
    ),
    "evaluate": Spec(
        "evaluation.evaluate:run",
        "measure challenger and champion, write the model card",
        ("ingest", "preprocess", "train"),
        ("project", "evaluation", "calibration", "explanations", "mlflow"),
    ),
    "gate": Spec(
        "evaluation.gate:run",
        "decide whether the challenger may be registered",
        ("ingest", "preprocess", "train", "evaluate"),
        ("domain", "evaluation", "gate", "mlflow"),
        final=(GateRefused,),
    ),
    "register": Spec(
        "registry:register", "register the model version in MLflow", ("ingest", "train", "evaluate", "gate"), ("mlflow",)
    ),
    "approve": Spec(
        "promotion:approve",
        "keep what a person answers who is asked before the rollout",
        ("gate", "register"),
        (),
        "stage:now",
        final=(GateRefused,),
    ),
    "deploy": Spec(
        "deploy.rollout:run",
        "roll the version out to the endpoint",
        ("register",),
        ("deploy",),
        "stage:now",
        final=(DataError,),
    ),
    "verify": Spec(
        "deploy.verify:run",
        "compare the live endpoint with what was asked",
        ("register", "deploy"),
        ("deploy",),
        "stage:now",
        undo="deploy.verify:put_back",
        final=(ConfigError, DataError),
    ),
    "evidence": Spec(
        "evaluation.evidence:run",
        "collect what the version rests on, as a folder and an archive",
        ("ingest", "preprocess", "train", "evaluate", "gate", "register", "verify"),
        tuple(ProjectConfig.model_fields),
        "evaluation.evidence:fingerprint",
        undo="deploy.verify:put_back",
        final=(ConfigError, DataError),
    ),
    "promote": Spec(
        "deploy.verify:promote",
        "move the alias champion",
        ("ingest", "evaluate", "gate", "register", "verify", "evidence"),
        ("deploy", "mlflow"),
        "stage:now",
        undo="deploy.verify:put_back",
        final=(ConfigError, DataError),
    ),
    "drift": Spec(
        "drift.report:run", "compare captured requests with the reference", (), ("drift", "mlflow"), "drift.window:fingerprint"
    ),
    "decide": Spec(
        "drift.decide:run", "decide whether to retrain, and store why", ("drift",), ("decision",), cleanup="exporter:push"
    ),
    "predict": Spec(
        "batch:run",
        "run the champion over a batch of studies",
        (),
        ("project", "batch", "data", "mlflow"),
        "batch:fingerprint",
        resumes=True,
    ),
}

TRAINING = ("ingest", "preprocess", "train", "evaluate", "gate", "register", "deploy", "verify", "evidence", "promote")
"""The stages of a training, in order; of a project with ``retrieval``, see :func:`training_of`."""


def training_of(config: ProjectConfig) -> tuple[str, ...]:
    """The stages of a project's training, in order."""
    after = TRAINING.index("gate") + 1
    return (*TRAINING[:after], "index", *TRAINING[after:]) if config.retrieval else TRAINING


@dataclass(frozen=True)
class Order:
    """What a person asked for by `cvf promote`, `cvf rollback`, `cvf approve` or `cvf decide --why`."""

    action: Literal["promotion", "rollback", "approval", "rejection", "retraining"]
    who: str
    why: str
    override: str = ""
    """Why the version shall pass though the gate refused it."""
    time: datetime | None = None
    """Of an answer that was given earlier, UTC."""


@dataclass(frozen=True)
class Stage:
    """What a stage's code is given."""

    name: str
    config: ProjectConfig
    run: str
    """URI of the run directory."""
    workspace: Path
    """Local folder of this run that survives a crash; only this machine sees it when the run lies on S3."""
    order: Order | None = None
    """What a person asked for, where it is a person who runs the stage, by name and with a reason."""
    force: bool = False
    """Whether it works again even if nothing has changed."""

    @property
    def out(self) -> Path:
        """Private folder that becomes ``<run>/<stage>/`` when the stage is done."""
        return self.workspace / f".{self.name}.work"

    def uri(self, *names: str) -> str:
        """Where a file of :attr:`out` will be found once it is published."""
        return "/".join((self.run, self.name, *names))

    def read(self, record: type[R]) -> R:
        """The record of an earlier stage of this run.

        Raises:
            DataError: that stage has not run yet, or its record is of another version.
        """
        try:
            return record.model_validate(read_result(self.run, record.stage).record)
        except ValidationError:
            raise _other_version(self.run, record.stage) from None

    def local(self, uri: str) -> Path:
        """A local path with the content of a file or tree of the storage."""
        return storage.local(uri, self.workspace / ".downloads")

    @cached_property
    def domain(self) -> Domain:
        return open_domain(self.config.domain)


def read_result(run: str, name: str) -> Result:
    """The published result of a stage.

    Raises:
        DataError: there is none, or it is of another version.
    """
    uri = f"{run}/{name}/result.json"
    if not storage.exists(uri):
        raise DataError(f"{uri}: is not there; run `cvf {name}` with the same --config and --run first")
    try:
        return Result.model_validate_json(storage.read_bytes(uri))
    except ValidationError:
        raise _other_version(run, name) from None


def record_digest(run: str, name: str) -> str:
    """SHA-256 of a stage's record as JSON, keys sorted: what the history calls it by.

    Raises:
        DataError: as :func:`read_result`.
    """
    return storage.text_digest(json.dumps(read_result(run, name).record, sort_keys=True))


def _other_version(run: str, name: str) -> DataError:
    return DataError(f"{run}/{name}/result.json: was written by another version; run `cvf {name} --force`")


def run_stage(name: str, config: ProjectConfig, run: str, *, force: bool = False, order: Order | None = None) -> Result:
    """Run a stage, or return its stored result where nothing that it depends on has changed.

    Raises:
        CvFactoryError: with the exit code that says what a retry would do. The result of a gate that refused is stored before.
    """
    final = STAGES[name].final
    try:
        result = _result(name, config, run, force, order)
        if result.refusal:
            raise GateRefused(result.refusal)
    except final as error:
        refusals.keep(run, name, str(error))
        raise
    if final:
        refusals.take_back(run, name)
    return result


def _result(name: str, config: ProjectConfig, run: str, force: bool, order: Order | None) -> Result:
    spec = STAGES[name]
    stage = Stage(name, config, run, _workspace(run), order, force)
    with _alone(stage), _undone(stage, spec):
        digest = _inputs_digest(stage, spec)
        if not force and (stored := _stored(stage, digest)):
            log.info("%s: nothing has changed: %s", name, stored.record["summary"])
            return stored
        try:
            if not (spec.resumes and not force and _left_by_same_inputs(stage, digest)):
                _start_clean(stage, digest)
            started = time.monotonic()
            record: Record = _function(spec.work)(stage)
            result = Result(
                stage=name,
                run=run,
                inputs_digest=digest,
                seconds=round(time.monotonic() - started, 3),
                record=record.model_dump(mode="json"),
                refusal=record.refusal,
            )
            (stage.out / INPUTS).unlink()
            _publish(stage, result)
        except BaseException as error:
            if isinstance(error, Exception) or not spec.resumes:
                shutil.rmtree(stage.out, ignore_errors=True)
            if isinstance(error, OSError):
                raise storage.explained_os_error(error, str(error.filename or stage.out)) from error
            raise
        shutil.rmtree(stage.out, ignore_errors=True)
        if spec.cleanup:
            _function(spec.cleanup)(stage)
    log.info("%s: %s (%.1f s)", name, record.summary, result.seconds)
    if config.notifications:
        from cv_factory_ops import notify

        notify.tell(config, run, record, rolled_back=order is not None and order.action == "rollback")
    return result


def assist_stage(name: str, config: ProjectConfig, run: str, *, force: bool = False) -> None:
    """Help node 0 with a stage that spans several nodes: node 0 alone holds the lock and publishes the result.

    Raises:
        CvFactoryError: as :func:`run_stage`.
    """
    spec = STAGES[name]
    stage = Stage(name, config, run, _workspace(run))
    digest = _inputs_digest(stage, spec)
    work: Callable[[Stage, Callable[[], bool]], None] = _function(spec.assist)
    work(stage, lambda: not force and _stored(stage, digest) is not None)


def node_rank() -> int:
    """Which node of a stage that spans several this process is, by torchrun's own variable; node 0 where it is not set.

    Raises:
        ConfigError: it is not a number.
    """
    given = os.environ.get("PET_NODE_RANK", "0")
    if not given.isdecimal():
        raise ConfigError(f"PET_NODE_RANK: {given!r} given; allowed: the number of a node, from 0")
    return int(given)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    work: Callable[..., Any] = getattr(importlib.import_module(f"cv_factory_ops.{module}"), function)
    return work


def now(stage: Stage) -> str:
    """Fingerprint of stages that change or ask the world outside: repeating them is cheap, and an old answer says nothing."""
    return str(time.time_ns())


def _workspace(run: str) -> Path:
    path = storage.path_of(run) or home() / "var" / "work" / storage.text_digest(run)[:16]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage.explained_os_error(error, f"{path} (below CVF_HOME where the run lies on S3)") from None
    return path


def _left_by_same_inputs(stage: Stage, digest: str) -> bool:
    inputs = stage.out / INPUTS
    return inputs.exists() and inputs.read_text() == digest


def _start_clean(stage: Stage, digest: str) -> None:
    shutil.rmtree(stage.out, ignore_errors=True)
    stage.out.mkdir(parents=True)
    (stage.out / INPUTS).write_text(digest)


@contextmanager
def _alone(stage: Stage) -> Iterator[None]:
    """One process at a time works on a stage of a run; the kernel frees the lock however the process ends."""
    with (stage.workspace / f".{stage.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: already running for this run; waiting for it", stage.name)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _undone(stage: Stage, spec: Spec) -> Iterator[None]:
    """Undo what the stage's failure would leave half done, and say so."""
    try:
        yield
    except (ConfigError, DataError, GateRefused) as error:
        if spec.undo and (told := _function(spec.undo)(stage, error)):
            error.args = (f"{error}; {told}",)
        raise


def _inputs_digest(stage: Stage, spec: Spec) -> str:
    settings = stage.config.model_dump(mode="json", include=set(spec.sections))
    records = {name: read_result(stage.run, name).record for name in spec.reads}
    outside = _function(spec.fingerprint)(stage) if spec.fingerprint else ""
    text = json.dumps([cv_factory_ops.__version__, stage.name, settings, records, outside], sort_keys=True)
    return storage.text_digest(text)


def _stored(stage: Stage, digest: str) -> Result | None:
    if not storage.exists(f"{stage.run}/{stage.name}/result.json"):
        return None
    try:
        result = read_result(stage.run, stage.name)
    except DataError:
        return None
    return result if result.inputs_digest == digest else None


def _publish(stage: Stage, result: Result) -> None:
    (stage.out / "result.json").write_text(result.model_dump_json(indent=2), encoding="utf-8")
    target = storage.path_of(stage.uri())
    if target is None:
        storage.delete_tree(stage.uri("result.json"))
        storage.delete_tree(stage.uri())
        storage.upload_tree(stage.out, stage.uri(), last="result.json")
        return
    if target.exists():
        old = stage.workspace / f".{stage.name}.old"
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(stage.out, target)
    shutil.rmtree(stage.workspace / f".{stage.name}.old", ignore_errors=True)
