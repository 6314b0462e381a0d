"""Stage ``verify``: a deployment is done when the live endpoint itself says so.

A service can answer "updated" and go on serving the old model; what counts is the configuration that the endpoint names and
the bundle digest in its answer to a real request.
"""

from __future__ import annotations

import io
import json
import uuid
from typing import Any

import numpy as np

from cv_factory_ops import captures
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
    deployed, config = stage.read(DeployRecord), stage.config
    with explained(config):
        aws = session(config)
        endpoint = describe(aws, deployed.endpoint_name)
        if endpoint is None or endpoint.endpoint_status != "InService":
            status = endpoint.endpoint_status if endpoint else "missing"
            raise Unavailable(f"endpoint {deployed.endpoint_name}: is {status}, not InService")
        _require(deployed, "endpoint config", endpoint.endpoint_config_name, deployed.endpoint_config_name)
        digest = _live_digest(aws.client("sagemaker-runtime"), deployed.endpoint_name, config.preprocessing.size)
        _require(deployed, "bundle", digest, deployed.bundle_digest)
    return VerifyRecord(
        summary=f"endpoint {deployed.endpoint_name} answers with bundle {digest[:12]}",
        endpoint_name=deployed.endpoint_name,
        endpoint_config_name=deployed.endpoint_config_name,
        status=endpoint.endpoint_status,
        bundle_digest=digest,
    )


def _live_digest(runtime: Any, endpoint_name: str, size: int) -> str:
    """The bundle digest in the answer to one synthetic image, which drift checks leave out by its inference id."""
    file = io.BytesIO()
    np.save(file, np.tile(np.linspace(0.25, 0.75, size, dtype=np.float32), (size, 1)))
    response = runtime.invoke_endpoint(
        EndpointName=endpoint_name,
        ContentType="application/x-npy",
        InferenceId=f"{captures.PROBE}{uuid.uuid4()}",
        Body=file.getvalue(),
    )
    try:
        return str(json.loads(response["Body"].read())["bundle_digest"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"endpoint {endpoint_name}: its answer names no bundle digest; it is not a server of ours") from None


def _require(deployed: DeployRecord, what: str, found: str, asked: str) -> None:
    if found != asked:
        raise DataError(f"silent rollback: endpoint {deployed.endpoint_name} serves {what} {found}, not {asked} as deployed")
