"""Stage ``verify``: a deployment is done when the live endpoint itself says so.

A service can answer "updated" and go on serving the old model; what counts is the configuration that the endpoint names, the
bundle digest in its answer to a real request, and that it answers golden studies as the evaluation did. Where this stage or one
after it fails for good, the endpoint is put back to what the alias names: alias and endpoint stay together.
"""

from __future__ import annotations

import functools
import json
from datetime import UTC, datetime
from typing import NamedTuple

from tenacity import retry, retry_if_exception_type, stop_after_delay, wait_random_exponential

from cv_factory_ops import audit, promotion, registry, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.deploy import golden
from cv_factory_ops.deploy.rollout import IN_SERVICE, Busy, Deployer, open_deployer
from cv_factory_ops.errors import CvFactoryError, DataError, Unavailable
from cv_factory_ops.records import DeployRecord, PromoteRecord, RegisterRecord, VerifyRecord
from cv_factory_ops.stage import Stage, read_result

BUSY_SECONDS = 30
"""For which a container that is busy is asked again."""
WHY_BACK = "put_back.txt"
"""File of a run: why its rollout was taken back, written before it is."""


def run(stage: Stage) -> VerifyRecord:
    """Compare the live endpoint with what was asked.

    Raises:
        DataError: it serves another configuration, or another bundle, or answers golden studies otherwise than the evaluation.
        Unavailable: it is not in service, or does not answer for now.
    """
    asked = stage.read(DeployRecord)
    found = live(stage.config)
    if found.endpoint_config_name != asked.endpoint_config_name:
        error = _silent(asked, "endpoint config", found.endpoint_config_name, asked.endpoint_config_name)
        known = "; ".join(filter(None, (found.failure_reason, _why_back(stage))))
        raise DataError(f"{error}: {known}") if known else error
    if found.bundle_digest != asked.bundle_digest:
        raise _silent(asked, "bundle", found.bundle_digest, asked.bundle_digest)
    differences = _golden_differences(stage, asked.bundle_digest)
    return VerifyRecord(
        summary=f"endpoint {found.endpoint_name} answers with bundle {found.bundle_digest[:12]}{_told(differences)}",
        endpoint_name=found.endpoint_name,
        endpoint_config_name=found.endpoint_config_name,
        status=found.status,
        bundle_digest=found.bundle_digest,
        golden_studies=len(differences),
        largest_difference=max(differences, default=None),
    )


def promote(stage: Stage) -> PromoteRecord:
    """Stage ``promote``, see :func:`cv_factory_ops.promotion.promote`; the endpoint is asked right before the move.

    Raises:
        DataError: it does not serve any more what was verified.
    """
    return promotion.promote(stage, functools.partial(_require_verified, stage))


def put_back(stage: Stage, error: CvFactoryError) -> str:
    """End a rollout that has failed for good: the endpoint serves what the alias names again. Says what came of it.

    The endpoint is left alone where the alias names this very version, and where it serves another one's config; but where this
    run has put it back to that one, what a kill may have cut off is done.
    """
    if not storage.exists(f"{stage.run}/deploy/result.json"):
        return ""
    try:
        return _put_back(stage, stage.read(DeployRecord), error)
    except CvFactoryError as problem:
        return f"endpoint {stage.config.endpoint_name} could not be put back: {problem}"


class Live(NamedTuple):
    """What the live endpoint says of itself."""

    endpoint_name: str
    status: str
    endpoint_config_name: str
    bundle_digest: str
    failure_reason: str
    """Of its last rollout; empty where that did not fail, or the service does not say."""


def live(config: ProjectConfig) -> Live:
    """Ask the project's endpoint, by one description and one request.

    Raises:
        DataError: its answer names no bundle.
        Unavailable: it is not in service.
    """
    name, deployer = config.endpoint_name, open_deployer(config)
    serving = deployer.serving()
    if serving is None or serving.status != IN_SERVICE:
        raise Unavailable(f"endpoint {name}: is {serving.status if serving else 'missing'}, not {IN_SERVICE}")
    digest = _answered_digest(deployer, name)
    return Live(name, serving.status, serving.config_name, digest, serving.failure_reason)


def _answered_digest(deployer: Deployer, name: str) -> str:
    """The bundle digest in the answer to one synthetic image."""
    ramp = [0.45 + column / 160 for column in range(16)]  # inside of any range that a bundle may declare
    body = json.dumps({"instances": [[ramp] * 16], "spacing": [1, 1]}).encode()
    try:
        return str(json.loads(_answer(deployer, body, "application/json"))["bundle_digest"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"endpoint {name}: its answer names no bundle digest; it is not a server of ours") from None


def _golden_differences(stage: Stage, bundle_digest: str) -> list[float]:
    """Of each golden study, the largest difference of a probability."""
    config, tolerance, deployer = stage.config, stage.config.deploy.golden.tolerance, open_deployer(stage.config)
    return [
        golden.require_answer(study, number, _answer(deployer, study.body, study.content_type), config.labels, tolerance)
        for number, study in enumerate(golden.studies(stage, bundle_digest), start=1)
    ]


@retry(
    retry=retry_if_exception_type(Busy), stop=stop_after_delay(BUSY_SECONDS), wait=wait_random_exponential(max=2), reraise=True
)
def _answer(deployer: Deployer, body: bytes, content_type: str) -> bytes:
    return deployer.invoke(body, content_type)


def _put_back(stage: Stage, asked: DeployRecord, error: CvFactoryError) -> str:
    entry = audit.head(stage.config)
    champion = entry.change.aliases.get("champion") if entry else None
    deployer = open_deployer(stage.config)
    serving, is_begun = deployer.serving(), storage.exists(f"{stage.run}/{WHY_BACK}")
    if serving is None or (serving.config_name != asked.endpoint_config_name and not is_begun):
        return ""
    if champion == stage.read(RegisterRecord).model_version:
        return ""
    before = asked.previous_config_name if champion is None else _config_of(stage.config, champion)
    if before is None:
        return f"endpoint {asked.endpoint_name} served nothing before, so it was left as it is"
    if serving.config_name not in {asked.endpoint_config_name, before}:
        return ""
    why = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {stage.name}: {error}"
    if serving.config_name == asked.endpoint_config_name:
        storage.write_bytes(f"{stage.run}/{WHY_BACK}", why.encode())
    deployer.put_back(before)
    return f"the endpoint was put back to {before}"


def _config_of(config: ProjectConfig, version: int) -> str:
    """The endpoint config that a version was last rolled out with."""
    deployed = DeployRecord.model_validate(read_result(registry.run_of(config, version), DeployRecord.stage).record)
    return deployed.endpoint_config_name


def _why_back(stage: Stage) -> str:
    uri = f"{stage.run}/{WHY_BACK}"
    return f"it was put back: {storage.read_bytes(uri).decode()}" if storage.exists(uri) else ""


def _require_verified(stage: Stage) -> None:
    verified, found = stage.read(VerifyRecord), live(stage.config)
    if (found.endpoint_config_name, found.bundle_digest) != (verified.endpoint_config_name, verified.bundle_digest):
        raise DataError(
            f"endpoint {found.endpoint_name} serves {found.endpoint_config_name} (bundle {found.bundle_digest[:12]}) now, "
            f"not {verified.endpoint_config_name} (bundle {verified.bundle_digest[:12]}) as verified; "
            "the alias stays where it is"
        )


def _told(differences: list[float]) -> str:
    if not differences:
        return ""
    return f", and {len(differences)} golden studies as the evaluation did (largest difference {max(differences):.1g})"


def _silent(deployed: DeployRecord, what: str, found: str, asked: str) -> DataError:
    return DataError(f"silent rollback: endpoint {deployed.endpoint_name} serves {what} {found}, not {asked} as deployed")
