"""A local endpoint that serves a tiny bundle, for tests of who asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import boto3
import httpx

from cv_factory_ops import captures
from cv_factory_ops.bundle import pack
from cv_factory_ops.config import ProjectConfig
from tests.bundles import free_port, start_cvf, wait_until, with_index, write_bundle
from tests.conftest import TINY

OPEN = {"kind": "open"}


class Served:
    """A running local endpoint of the project ``tiny`` with a bundle behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, f"http://127.0.0.1:{free_port()}"
        self.bundle = with_index(write_bundle(folder / "bundle", seed=1), folder / "release")
        where = ("--state", str(folder / "state"), "--port", self.url[17:], "--files", str(folder))
        self.process = start_cvf("endpoint", *where, folder=folder)
        wait_until(lambda: self.process.poll() is not None or is_up(f"{self.url}/ping"))
        pack(self.bundle.path, folder / "model.tar.gz")
        keys = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
        control = boto3.client("sagemaker", endpoint_url=self.url, **keys)
        role, image = "arn:aws:iam::000000000000:role/local", {"Image": "cv-factory"}
        container = {**image, "ModelDataUrl": (folder / "model.tar.gz").as_uri()}
        control.create_model(ModelName="m", PrimaryContainer=container, ExecutionRoleArn=role)
        variant = {"VariantName": "AllTraffic", "ModelName": "m", "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
        capture = {
            "EnableCapture": True,
            "InitialSamplingPercentage": 100,
            "DestinationS3Uri": captures.folder(self.config()),
            "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
            "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
        }
        control.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant], DataCaptureConfig=capture)
        control.create_endpoint(EndpointName="tiny", EndpointConfigName="c")
        wait_until(lambda: control.describe_endpoint(EndpointName="tiny")["EndpointStatus"] != "Creating")
        assert control.describe_endpoint(EndpointName="tiny")["EndpointStatus"] == "InService"

    def tree(self, **gateway: Any) -> dict[str, Any]:
        """The project's YAML with the gateway's settings."""
        where = {"deploy": {"kind": "local", "url": self.url}, "storage": str(self.folder / "storage")}
        return TINY | where | {"gateway": {"access": OPEN, "rate": "100000/second"} | gateway}

    def config(self, **gateway: Any) -> ProjectConfig:
        return ProjectConfig.model_validate(self.tree(**gateway))


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
