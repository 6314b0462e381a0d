"""Stage ``verify``: a deployment is done when the live endpoint itself says so.

A service can answer "updated" and go on serving the old model; what counts is the configuration that the endpoint names, the
bundle digest in its answer to a real request, and that it answers golden studies as the evaluation did. Where this stage or one
after it fails for good, the endpoint is put back to what the alias names: alias and endpoint stay together.
"""

from __future__ import annotations

import functools
import json
import time
import uuid
from datetime import UTC, datetime
from typing import Any, NamedTuple

from tenacity import retry, retry_if_exception, stop_after_delay, wait_random_exponential

from cv_factory_ops import audit, captures, promotion, registry, storage
from cv_factory_ops.config import AsynchronousInference, ProjectConfig
from cv_factory_ops.deploy import golden, shapes
from cv_factory_ops.deploy.sagemaker import describe, explained, go_back, session
from cv_factory_ops.errors import CvFactoryError, DataError, Unavailable
from cv_factory_ops.records import DeployRecord, PromoteRecord, RegisterRecord, VerifyRecord
from cv_factory_ops.stage import Stage, read_result

ASYNC_SECONDS = 300
"""For which an answer of an asynchronous endpoint is waited for; its instances may have to start first."""
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

    The endpoint is left alone where the alias names this very version, and where it serves another one's config.
    """
    if not storage.exists(f"{stage.run}/deploy/result.json"):
        return ""
    try:
        with explained(stage.config):
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
    name = config.endpoint_name
    with explained(config):
        aws = session(config)
        endpoint = describe(aws.client("sagemaker"), name)
        status = endpoint["EndpointStatus"] if endpoint else "missing"
        if endpoint is None or status != "InService":
            raise Unavailable(f"endpoint {name}: is {status}, not InService")
        digest = _answered_digest(aws, config)
    reason = " ".join(endpoint.get("FailureReason", "").split())
    return Live(name, status, endpoint["EndpointConfigName"], digest, reason)


def _answered_digest(aws: Any, config: ProjectConfig) -> str:
    """The bundle digest in the answer to one synthetic image."""
    ramp = [0.45 + column / 160 for column in range(16)]  # inside of any range that a bundle may declare
    body = json.dumps({"instances": [[ramp] * 16], "spacing": [1, 1]}).encode()
    try:
        return str(json.loads(_answer(aws, config, body, "application/json"))["bundle_digest"])
    except (ValueError, KeyError, TypeError):
        name = config.endpoint_name
        raise DataError(f"endpoint {name}: its answer names no bundle digest; it is not a server of ours") from None


def _golden_differences(stage: Stage, bundle_digest: str) -> list[float]:
    """Of each golden study, the largest difference of a probability."""
    config, tolerance = stage.config, stage.config.deploy.golden.tolerance
    found = golden.studies(stage, bundle_digest)
    with explained(config):
        aws = session(config)
        return [
            golden.require_answer(study, number, _answer(aws, config, study.body, study.content_type), config.labels, tolerance)
            for number, study in enumerate(found, start=1)
        ]


def _is_busy(error: BaseException) -> bool:
    """Whether a container has refused because of what others ask of it: that says nothing of the model."""
    return getattr(error, "response", {}).get("OriginalStatusCode") == 503


@retry(
    retry=retry_if_exception(_is_busy), stop=stop_after_delay(BUSY_SECONDS), wait=wait_random_exponential(max=2), reraise=True
)
def _answer(aws: Any, config: ProjectConfig, body: bytes, content_type: str) -> bytes:
    """The endpoint's answer to a request that drift checks leave out by its inference id."""
    runtime, request_id = aws.client("sagemaker-runtime"), f"{captures.PROBE}{uuid.uuid4()}"
    request = {"EndpointName": config.endpoint_name, "ContentType": content_type, "InferenceId": request_id}
    if not isinstance(shapes.inference(config), AsynchronousInference):
        answer: bytes = runtime.invoke_endpoint(**request, Body=body)["Body"].read()
        return answer
    location = f"{config.root}/async/in/{request_id}"
    storage.write_bytes(location, body)
    try:
        return _awaited(config, runtime.invoke_endpoint_async(**request, InputLocation=location))
    finally:
        storage.delete_tree(location)


def _awaited(config: ProjectConfig, asked: dict[str, Any]) -> bytes:
    deadline = time.monotonic() + ASYNC_SECONDS
    while time.monotonic() < deadline:
        if storage.exists(asked["OutputLocation"]):
            return storage.read_bytes(asked["OutputLocation"])
        if (failure := asked.get("FailureLocation")) and storage.exists(failure):
            raise DataError(f"endpoint {config.endpoint_name}: the model refused a request; its reason lies at {failure}")
        time.sleep(0.5)
    raise Unavailable(f"endpoint {config.endpoint_name}: gave no answer within {ASYNC_SECONDS} s")


def _put_back(stage: Stage, asked: DeployRecord, error: CvFactoryError) -> str:
    entry = audit.head(stage.config)
    champion = entry.change.aliases.get("champion") if entry else None
    endpoint = describe(session(stage.config).client("sagemaker"), asked.endpoint_name)
    if endpoint is None or endpoint["EndpointConfigName"] != asked.endpoint_config_name:
        return ""
    if champion == stage.read(RegisterRecord).model_version:
        return ""
    before = asked.previous_config_name if champion is None else _config_of(stage.config, champion)
    if before is None:
        return f"endpoint {asked.endpoint_name} served nothing before, so it was left as it is"
    why = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC, {stage.name}: {error}"
    storage.write_bytes(f"{stage.run}/{WHY_BACK}", why.encode())
    go_back(stage.config, before)
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
