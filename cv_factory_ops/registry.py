"""MLflow: runs that a retry rejoins, model versions, and the aliases ``champion``, ``challenger`` and ``previous``.

What the aliases are is decided by the project's history (:mod:`cv_factory_ops.audit`), MLflow's are a copy of it: a move is
first an entry there, then a change here. Were it the other way round, a crash in between would leave a move that nobody has
written down, and of two writers the later one would win without knowing of the other. As it is, a crash leaves an entry that
whoever reads or moves an alias next brings to MLflow, see :func:`align`.

A registered version carries everything that later stages look up as tags: bundle URI and digest, data and test digest,
git sha, run URI.
"""

from __future__ import annotations

import json
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_factory_ops import audit
from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.errors import ConfigError, DataError, GateRefused, Unavailable
from cv_factory_ops.records import (
    EvaluateRecord,
    GateRecord,
    IngestRecord,
    RegisterRecord,
    TrainRecord,
)
from cv_factory_ops.stage import record_digest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

RUN_TAG = "cvf.run"
"""Tag of an MLflow run that names the run directory it belongs to: what a retry finds its run by."""
DENIED = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
"""What MLflow answers where login or rights are missing: no retry changes that."""


@dataclass(frozen=True)
class Champion:
    """The model version that the alias ``champion`` points at."""

    version: int
    bundle: str
    """URI of its bundle directory."""
    bundle_digest: str
    test_digest: str
    run_id: str


def connect(config: ProjectConfig) -> MlflowClient:
    """A client of the project's tracking store.

    Raises:
        ConfigError: it denies access.
        Unavailable: the store does not answer.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    # The sagemaker package's plugin expects an ARN as address and complains at every request where there is none.
    logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
    uri = tracking_uri(config)
    try:
        client = mlflow.MlflowClient(uri)
        client.search_experiments(max_results=1)
    except ImportError as error:
        raise ConfigError(f"MLflow at {uri.split('@')[-1]}: this Python lacks {error.name or error}") from None
    except Exception as error:
        raise _not_connected(error, uri.split("@")[-1]) from None
    return client


def _not_connected(error: Exception, place: str) -> ConfigError | Unavailable:
    if getattr(error, "error_code", "") in DENIED:
        cure = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, of an account that may"
        return ConfigError(f"MLflow at {place}: denies access; {cure}")
    return Unavailable(f"MLflow at {place}: does not answer ({type(error).__name__})")


def tracking_uri(config: ProjectConfig) -> str:
    """``MLFLOW_TRACKING_URI`` or the project's setting; a relative SQLite file lies below the home directory."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or config.mlflow.tracking_uri
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        path = home() / uri.removeprefix("sqlite:///")
        path.parent.mkdir(parents=True, exist_ok=True)
        return f"sqlite:///{path}"
    return uri


def open_run(client: MlflowClient, config: ProjectConfig, run: str, parent: str = "") -> str:
    """Id of the MLflow run of a run directory, or of a trial below one: that of an earlier try, or a new one; ``parent`` is the
    id of the run that it is shown below."""
    found_in = experiment(client, config)
    query = f"tags.`{RUN_TAG}` = '{run}'"
    found = client.search_runs([found_in], query, max_results=1)
    if found:
        run_id: str = found[0].info.run_id
        client.update_run(run_id, status="RUNNING")
        return run_id
    tags = {RUN_TAG: run, "cvf.project": config.project} | ({"mlflow.parentRunId": parent} if parent else {})
    return str(client.create_run(found_in, run_name=run.rsplit("/", 1)[1], tags=tags).info.run_id)


def log_params(client: MlflowClient, run_id: str, params: Mapping[str, Any]) -> None:
    """A retry keeps the params that an earlier try has logged: MLflow's are written once."""
    from mlflow.entities import Param

    known = client.get_run(run_id).data.params
    client.log_batch(run_id, params=[Param(name, str(value)) for name, value in params.items() if name not in known])


def settings(config: ProjectConfig) -> dict[str, Any]:
    """What a training depends on, as ``section.field``."""
    sections = {"data", "decoding", "splits", "preprocessing", "model", "training", "embedding"}
    return flat(config.model_dump(mode="json", include=sections))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names."""
    items: dict[str, Any] = {}
    for name, value in tree.items():
        items |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return items


def run_page(client: MlflowClient, run_id: str) -> str:
    """Address of a run's page; empty where the store has no web server."""
    uri = re.sub("://[^/]*@", "://", client.tracking_uri)  # a login is not for everybody who is shown the link
    experiment = client.get_run(run_id).info.experiment_id
    return f"{uri}/#/experiments/{experiment}/runs/{run_id}" if uri.startswith("http") else ""


def champion(config: ProjectConfig) -> Champion | None:
    """The current champion of a project, None before the first promotion.

    Raises:
        DataError: MLflow has lost it, or its history is broken.
    """
    client = connect(config)
    with explained(f"model {config.project}"):
        number = align(client, config).get("champion")
    if number is None:
        return None
    version = _require_version(client, config, number)
    tags = version.tags
    return Champion(number, tags["bundle"], tags["bundle_digest"], tags["test_digest"], version.run_id)


def evaluation_of(config: ProjectConfig, run_id: str) -> dict[str, float]:
    """What the stage ``evaluate`` has logged of a version's run: its metrics on the locked test set with the ends of their
    intervals, ``<metric>_low`` and ``<metric>_high``; empty where the version names no run."""
    if not run_id:
        return {}
    with explained(f"MLflow run {run_id}"):
        metrics = connect(config).get_run(run_id).data.metrics
    return {name.removeprefix("test_"): value for name, value in metrics.items() if name.startswith("test_")}


def keep_files(config: ProjectConfig, run_id: str, folder: Path, names: Sequence[str], place: str) -> None:
    """Copy those of the named files that there are to the artifacts of a version's run; nothing where it names none."""
    if not run_id:
        return
    with explained(f"MLflow run {run_id}"):
        client = connect(config)
        for path in (folder / name for name in names):
            if path.exists():
                client.log_artifact(run_id, str(path), place)


def run_of(config: ProjectConfig, version: int) -> str:
    """URI of the run that made a version, by the history; by a tag of MLflow's where the version is older than that.

    Raises:
        DataError: there is no such version.
    """
    tag: str | None = _require_version(connect(config), config, version).tags.get(RUN_TAG)
    known = {entry.change.version: entry.change.run for entry in audit.entries(config)}
    if run := known.get(version, tag):
        return run
    raise DataError(f"version {version} of model {config.project}: its tag {RUN_TAG} names no run")


def align(client: MlflowClient, config: ProjectConfig) -> audit.Aliases:
    """Make MLflow's aliases those of the project's history; returns them. Without a history they are left as they are.

    Raises:
        DataError: they differ, and the history is broken or lacks what MLflow has noted of it: it cannot be what is right.
    """
    name, found = config.project, _aliases(client, config.project)
    entry = audit.head(config)
    if entry is None or entry.change.aliases != found:
        _require_whole_history(client, config, found)
    while entry:
        wanted = entry.change.aliases
        for alias in audit.ALIASES:
            if found.get(alias) != wanted.get(alias):
                _set_alias(client, name, alias, wanted.get(alias))
        if (newest := audit.head(config)) == entry:  # else another one has moved on, and this may have undone its work
            return wanted
        entry, found = newest, _aliases(client, name)
    return found


def move(config: ProjectConfig, propose: Callable[[audit.Aliases], audit.Change | None]) -> audit.Entry | None:
    """Write a change of aliases down, then make it in MLflow; returns the newest entry of the history.

    ``propose``: see :func:`cv_factory_ops.audit.append`.

    Raises:
        DataError: the history is broken, or lacks what MLflow has noted of it.
    """
    client = connect(config)
    with explained(f"model {config.project}"):
        found = _aliases(client, config.project)
        _require_whole_history(client, config, found)
        audit.append(config, found, propose)
        align(client, config)
    return audit.head(config)


def _set_alias(client: MlflowClient, name: str, alias: str, version: int | None) -> None:
    """A version that was deleted in MLflow stops nobody but who asks for just that one."""
    from mlflow.exceptions import MlflowException

    if version is None:
        client.delete_registered_model_alias(name, alias)
    else:
        try:
            client.set_registered_model_alias(name, alias, str(version))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            log.warning("alias %s of %s: version %d is not in MLflow any more", alias, name, version)
            return
    log.info("alias %s of %s is now %s", alias, name, version or "none")


def _require_whole_history(client: MlflowClient, config: ProjectConfig, found: audit.Aliases) -> None:
    """Unbroken, and with the entry by which MLflow's champion came to be: without it, ``audit/`` or ``storage`` is another."""
    champion = found.get("champion")
    tags = client.get_model_version(config.project, str(champion)).tags if champion else {}
    audit.verify(config, tags.get("audit", ""))


def _require_version(client: MlflowClient, config: ProjectConfig, version: int) -> ModelVersion:
    try:
        with explained(f"model {config.project}"):
            return client.get_model_version(config.project, str(version))
    except DataError:
        raise DataError(
            f"version {version} of model {config.project}: is not in MLflow any more; "
            "`cvf rollback --to` or `cvf promote --to` puts another in its place, `cvf audit log` lists them"
        ) from None


def register(stage: Stage) -> RegisterRecord:
    """Stage ``register``: log the bundle as a pyfunc, make the model version, point ``challenger`` at it.

    Raises:
        DataError: the run was trained anew after its version was registered.
        GateRefused: the gate has refused it, or compared it with another champion than the present one.
    """
    train, ingest, gate = stage.read(TrainRecord), stage.read(IngestRecord), stage.read(GateRecord)
    if gate.refusal and not (stage.order and stage.order.override):
        raise GateRefused(f"the gate has refused it: {gate.refusal}")
    name, run_id, bundle = stage.config.project, train.mlflow_run_id, stage.local(train.bundle)
    tags = {
        "bundle": train.bundle,
        "bundle_digest": train.bundle_digest,
        "data_digest": ingest.data_digest,
        "test_digest": ingest.test_digest,
        "git_sha": json.loads((bundle / "bundle.json").read_text())["git_sha"],
        RUN_TAG: stage.run,
        "gate": gate.verdict,
        "gate_digest": record_digest(stage.run, "gate"),
    }
    client = connect(stage.config)
    with explained(f"model {name}"):
        known = _version_of_run(client, name, stage.run, train.bundle_digest)
        require_same_rival(stage, align(client, stage.config), known)
        version = known or _new_version(client, name, run_id, bundle, tags)

    def propose(aliases: audit.Aliases) -> audit.Change | None:
        require_same_rival(stage, aliases, version)
        if version in (aliases.get("challenger"), aliases.get("champion")):
            return None
        return audit.Change(
            action="registration",
            who=acting(stage),
            why=f"the gate: {gate.summary}",
            run=stage.run,
            version=version,
            bundle_digest=train.bundle_digest,
            gate_digest=tags["gate_digest"],
            override=stage.order.override if stage.order else "",
            approval_required=stage.config.approval.enabled,
            aliases={**aliases, "challenger": version},
        )

    move(stage.config, propose)
    return RegisterRecord(
        summary=f"version {version} of {name}, bundle {train.bundle_digest[:12]}",
        links=train.links,
        model_name=name,
        model_version=version,
        mlflow_run_id=run_id,
        bundle=train.bundle,
        bundle_digest=train.bundle_digest,
    )


def require_same_rival(stage: Stage, aliases: audit.Aliases, own: int | None) -> None:
    """The champion is still the one that the gate compared with, or already this run's ``own`` version, or a person decides.

    Raises:
        GateRefused: another training has been promoted meanwhile.
    """
    judged, current = stage.read(EvaluateRecord).champion_version, aliases.get("champion")
    if stage.order or current in (None, judged, own):
        return
    raise GateRefused(
        f"champion is now version {current}, the gate compared with {judged or 'none'}; "
        "compare again with `cvf evaluate --force`, then go on from the gate"
    )


def acting(stage: Stage) -> str:
    """Who the history names: the person, or the run, whose name holds those of the DAG and its run."""
    return stage.order.who if stage.order else f"run {stage.run.rsplit('/', 1)[1]}"


def _aliases(client: MlflowClient, name: str) -> audit.Aliases:
    """As MLflow has them."""
    found = {alias: _by_alias(client, name, alias) for alias in audit.ALIASES}
    return {alias: int(version.version) for alias, version in found.items() if version}


def experiment(client: MlflowClient, config: ProjectConfig) -> str:
    """Id of the project's experiment, which is made where there is none."""
    found = client.get_experiment_by_name(config.project)
    if found:
        return str(found.experiment_id)
    place = (home() / "var" / "mlflow" / "artifacts").as_uri() if client.tracking_uri.startswith("sqlite") else None
    return str(client.create_experiment(config.project, artifact_location=place))


@contextmanager
def explained(subject: str) -> Iterator[None]:
    """Turn what MLflow raises into one line of ours."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kinds = {"RESOURCE_DOES_NOT_EXIST": DataError, **dict.fromkeys(DENIED, ConfigError)}
        kind = kinds.get(error.error_code, Unavailable)
        raise kind(f"{subject}: MLflow answered {error.error_code}: {' '.join(error.message.split())[:200]}") from None


def _by_alias(client: MlflowClient, name: str, alias: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        unknown = error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}
        if unknown or (error.error_code == "PERMISSION_DENIED" and not client.search_registered_models(f"name = '{name}'")):
            return None  # with basic-auth, MLflow denies what it says of a model that is not there
        raise


def _version_of_run(client: MlflowClient, name: str, run: str, bundle_digest: str) -> int | None:
    """A version is one bundle: approval, evidence and history are about that one."""
    versions = client.search_model_versions(f"name = '{name}' and tags.`{RUN_TAG}` = '{run}'")
    if not versions:
        return None
    number, digest = int(versions[0].version), versions[0].tags["bundle_digest"]
    if digest != bundle_digest:
        raise DataError(
            f"{run}: its bundle is now {bundle_digest[:12]}, version {number} was registered with {digest[:12]}; "
            "train in a new run"
        )
    return number


def _new_version(client: MlflowClient, name: str, run_id: str, bundle: Path, tags: dict[str, str]) -> int:
    from mlflow.exceptions import MlflowException

    model = _log_pyfunc(client, run_id, bundle)
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    return int(client.create_model_version(name, model.model_uri, run_id, tags, model_id=model.model_id).version)


def _log_pyfunc(client: MlflowClient, run_id: str, bundle: Path) -> Any:
    """The bundle as a pyfunc ("models from code", no pickle), so that ``mlflow models serve`` can serve it."""
    import mlflow
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    import cv_factory_ops

    mlflow.set_tracking_uri(client.tracking_uri)
    with mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow wants a signature from type hints or examples; ours is given
        return mlflow.pyfunc.log_model(
            name="bundle",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"bundle": str(bundle)},
            signature=ModelSignature(inputs=Schema([TensorSpec(np.dtype("float32"), (-1, -1, -1))])),
            pip_requirements=[f"cv-factory=={cv_factory_ops.__version__}"],
        )
