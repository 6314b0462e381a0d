"""Stage ``deploy``: the registered bundle onto the project's endpoint, by whatever service serves it.

A :class:`Deployer` is all that the stages ``deploy``, ``verify`` and ``promote`` know of a service. What it makes is named by
content, so a retry after a crash between any two calls finds what is there, waits for what is in progress, and goes on.
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar, assert_never

from cv_factory_ops import storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import AzureDeploy, LocalDeploy, SageMakerDeploy, VertexDeploy
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.index import require_made_for
from cv_factory_ops.promotion import require_may_roll_out
from cv_factory_ops.records import DeployRecord, IndexRecord, RegisterRecord
from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

IN_SERVICE = "InService"
SERVES, BEFORE = "endpoint-config", "previous-config"
"""Tags of an endpoint: the config that it was last told to serve, and the one that served before that."""
LONGEST_PAUSE = 10
"""Seconds between two questions whether something is done."""
Found = TypeVar("Found")


class Release(NamedTuple):
    """What is to be served."""

    bundle: Bundle
    run: str
    """URI of the run that it comes from."""
    scratch: Path
    """A folder that may be written to."""


class RolledOut(NamedTuple):
    """What serves now, by the service's names."""

    config_name: str
    model_name: str
    previous_config_name: str | None
    """What served before; None where nothing did."""


class Serving(NamedTuple):
    """What a service says of the endpoint."""

    status: str
    """``InService``, or the service's word for what else it is."""
    config_name: str
    """What it serves; empty where it does not yet."""
    failure_reason: str = ""
    """Of its last rollout; empty where that did not fail, or the service does not say."""


class Busy(DataError):
    """The container has refused a request because of what others ask of it, which says nothing of the model."""


class Deployer(Protocol):
    """The project's endpoint on one service; its methods raise errors of ours only."""

    def roll_out(self, release: Release) -> RolledOut:
        """Serve a bundle and wait until that is done; join the same rollout where it is in progress.

        Raises:
            DataError: it failed; what served before serves again, and the message names the cause.
            Unavailable: the service throttles, or the rollout takes longer than ``deploy.timeout``.
        """

    def serving(self) -> Serving | None:
        """What is live; None where there is no endpoint."""

    def invoke(self, body: bytes, content_type: str) -> bytes:
        """The live model's answer, to a request that is none of a user's.

        Raises:
            DataError: the model refuses; of class :class:`Busy` where it has too much to do.
            Unavailable: there is no answer for now.
        """

    def put_back(self, config_name: str) -> None:
        """Serve an earlier config again, at once, and wait until it does; where it does already, only clear away what is left.

        Raises:
            DataError: it cannot be served any more.
            Unavailable: that takes longer than ``deploy.timeout``.
        """


def open_deployer(config: ProjectConfig) -> Deployer:
    """The deployer of a project.

    Raises:
        ConfigError: the extra that it needs is not installed.
    """
    try:
        return _opened(config)
    except ImportError as error:
        kind = config.deploy.kind
        raise ConfigError(f"deploy.kind: {kind}: needs {error.name}: pip install 'cv-factory[{kind}]'") from None


def run(stage: Stage) -> DeployRecord:
    """Roll the registered bundle out to the project's endpoint, with its index where the run has one, and wait until it serves.

    Raises:
        DataError: the bundle is not the registered one, or what its evidence is made of is missing: the endpoint was not asked;
            its container failed, or an alarm went off: the endpoint went back.
        Unavailable: the service throttles, or the rollout takes longer than ``deploy.timeout``.
    """
    from cv_factory_ops.evaluation.evidence import require_inputs  # the gateway, which has no pandas, imports this module

    require_may_roll_out(stage)
    require_inputs(stage)
    registered, name = stage.read(RegisterRecord), stage.config.endpoint_name
    with tempfile.TemporaryDirectory(dir=stage.out) as scratch:
        bundle = _with_index(stage, _registered_bundle(stage, registered), Path(scratch))
        rolled_out = open_deployer(stage.config).roll_out(Release(bundle, stage.run, Path(scratch)))
    version, digest = registered.model_version, registered.bundle_digest
    return DeployRecord(
        summary=f"endpoint {name} serves model version {version} (bundle {digest[:12]})",
        endpoint_name=name,
        endpoint_config_name=rolled_out.config_name,
        model_name=rolled_out.model_name,
        bundle_digest=digest,
        previous_config_name=rolled_out.previous_config_name,
    )


def settled(look: Callable[[], Found], in_progress: Callable[[Found], str], subject: str, deadline: float) -> Found:
    """What is found once nothing is in progress.

    Raises:
        Unavailable: that is not so by the deadline, in seconds of :func:`time.monotonic`.
    """
    pause, told = 0.1, ""
    while doing := in_progress(found := look()):
        if doing != told:
            told = doing
            log.info("deploy: %s is %s", subject, doing)
        if time.monotonic() > deadline:
            raise Unavailable(f"{subject}: is still {doing} after deploy.timeout; a retry goes on waiting")
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
    return found


def _registered_bundle(stage: Stage, registered: RegisterRecord) -> Bundle:
    bundle = Bundle.load(stage.local(registered.bundle))
    if bundle.digest != registered.bundle_digest:
        raise DataError(
            f"{registered.bundle}: has digest {bundle.digest[:12]}, not {registered.bundle_digest[:12]} as registered; "
            "it was changed afterwards"
        )
    return bundle


def _with_index(stage: Stage, bundle: Bundle, scratch: Path) -> Bundle:
    """With the run's index, where it has one.

    Raises:
        ConfigError: the containers would have to log in to its store.
        DataError: it was made for another bundle.
    """
    if not storage.exists(f"{stage.run}/{IndexRecord.stage}/result.json"):
        return bundle
    index = stage.local(stage.read(IndexRecord).index)
    store = require_made_for(index, bundle.digest).retrieval.store
    login = getattr(store, "api_key_env", "") or getattr(store, "token_env", "")
    if login and not isinstance(stage.config.deploy, LocalDeploy):
        raise ConfigError(
            f"retrieval.store: {store.kind} given, which wants {login}; deploy.kind {stage.config.deploy.kind} hands its "
            "containers no secrets; allowed: faiss, or a server without a login in their network"
        )
    return bundle.with_index(index, scratch / "release")


def _opened(config: ProjectConfig) -> Deployer:
    match config.deploy:
        case LocalDeploy() | SageMakerDeploy():
            from cv_factory_ops.deploy.sagemaker import SageMaker

            return SageMaker(config)
        case VertexDeploy() as settings:
            from cv_factory_ops.deploy.shifting import ShiftingDeployer
            from cv_factory_ops.deploy.vertex import VertexEndpoint

            return ShiftingDeployer(config, VertexEndpoint(config, settings))
        case AzureDeploy() as settings:
            from cv_factory_ops.deploy.azure import AzureEndpoint
            from cv_factory_ops.deploy.shifting import ShiftingDeployer

            return ShiftingDeployer(config, AzureEndpoint(config, settings))
        case _ as unknown:
            assert_never(unknown)
