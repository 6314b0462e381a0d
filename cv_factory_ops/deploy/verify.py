"""Stage ``verify``: a deployment is done when the live endpoint itself says so.

A service can answer "updated" and go on serving the old model; what counts is the configuration that the endpoint names and
the bundle digest in its answer to a real request.
"""

from __future__ import annotations

import json
import uuid
from typing import Any, NamedTuple

from cv_factory_ops import captures
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.deploy.sagemaker import describe, explained, session
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import DeployRecord, VerifyRecord
from cv_factory_ops.stage import Stage


def run(stage: Stage) -> VerifyRecord:
    """Compare the live endpoint with what was asked.

    Raises:
        DataError: it serves another configuration or another bundle.
        Unavailable: it is not in service.
    """
    asked = stage.read(DeployRecord)
    found = live(stage.config)
    _require(asked, "endpoint config", found.endpoint_config_name, asked.endpoint_config_name)
    _require(asked, "bundle", found.bundle_digest, asked.bundle_digest)
    return VerifyRecord(
        summary=f"endpoint {found.endpoint_name} answers with bundle {found.bundle_digest[:12]}",
        endpoint_name=found.endpoint_name,
        endpoint_config_name=found.endpoint_config_name,
        status=found.status,
        bundle_digest=found.bundle_digest,
    )


class Live(NamedTuple):
    """What the live endpoint says of itself."""

    endpoint_name: str
    status: str
    endpoint_config_name: str
    bundle_digest: str


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
        digest = _answered_digest(aws.client("sagemaker-runtime"), name)
    return Live(name, status, endpoint["EndpointConfigName"], digest)


def _answered_digest(runtime: Any, endpoint_name: str) -> str:
    """The bundle digest in the answer to one synthetic image, which drift checks leave out by its inference id."""
    ramp = [0.45 + column / 160 for column in range(16)]  # inside of any range that a bundle may declare
    response = runtime.invoke_endpoint(
        EndpointName=endpoint_name,
        ContentType="application/json",
        InferenceId=f"{captures.PROBE}{uuid.uuid4()}",
        Body=json.dumps({"instances": [[ramp] * 16], "spacing": [1, 1]}).encode(),
    )
    try:
        return str(json.loads(response["Body"].read())["bundle_digest"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"endpoint {endpoint_name}: its answer names no bundle digest; it is not a server of ours") from None


def _require(deployed: DeployRecord, what: str, found: str, asked: str) -> None:
    if found != asked:
        raise DataError(f"silent rollback: endpoint {deployed.endpoint_name} serves {what} {found}, not {asked} as deployed")
