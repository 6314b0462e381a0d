"""Stage ``deploy``: one model, one endpoint configuration and one endpoint a bundle, on Amazon SageMaker or on this machine.

The same calls go to both; only the address, the role, the image and the credentials differ. Model and endpoint config are
both named ``<endpoint>-<bundle digest, 12 digits>-<settings digest, 8 digits>`` (63 characters at most, SageMaker's limit):
a retry after a crash between any two calls finds what is there and goes on, and changed settings make new ones.

Plain boto3: the typed ``Endpoint`` of sagemaker 3 cannot read what the service answers for an endpoint that captures without
a KMS key (aws/sagemaker-python-sdk issue 5738), and takes two seconds to import.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import Bundle, pack
from cv_factory_ops.config import Deploy, LocalDeploy, ProjectConfig, home
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable
from cv_factory_ops.records import DeployRecord, RegisterRecord
from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

IN_PROGRESS = {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}
LOCAL_REGION = "us-east-1"
VARIANT = "AllTraffic"
Tags = list[dict[str, str]]


def run(stage: Stage) -> DeployRecord:
    """Roll the registered bundle out to the project's endpoint, and wait until it serves.

    Raises:
        DataError: the bundle is not the registered one, or its container failed; the endpoint went back.
        Unavailable: the service throttles, or the rollout takes longer than ``deploy.timeout``.
    """
    registered = stage.read(RegisterRecord)
    config, digest = stage.config, registered.bundle_digest
    with explained(config):
        client = session(config).client("sagemaker")
        name = f"{config.endpoint_name}-{digest[:12]}-{_settings_digest(config)}"
        tags = _tags({"project": config.project, "run": stage.run, "bundle-digest": digest})
        _create_model(client, config, name, _model_data(stage, registered), tags)
        _create_endpoint_config(client, config, name, tags)
        previous = _roll_out(client, config, name, tags)
    return DeployRecord(
        summary=f"endpoint {config.endpoint_name} serves model version {registered.model_version} (bundle {digest[:12]})",
        endpoint_name=config.endpoint_name,
        endpoint_config_name=name,
        model_name=name,
        bundle_digest=digest,
        previous_config_name=previous,
    )


def session(config: ProjectConfig) -> Any:
    """The boto3 session for the project's endpoint; the local endpoint is started when nothing answers at its address.

    Raises:
        ConfigError: no region is set (SageMaker).
        Unavailable: the local endpoint cannot be started.
    """
    import boto3

    if not isinstance(config.deploy, LocalDeploy):
        aws = boto3.Session()
        if aws.region_name is None:
            raise ConfigError("deploy: no AWS region; set AWS_DEFAULT_REGION or a profile")
        return aws
    from cv_factory_ops.deploy.local import ensure_running

    url = (os.environ.get("AWS_ENDPOINT_URL_SAGEMAKER") or config.deploy.url).rstrip("/")
    ensure_running(url, home() / "var" / "endpoint")
    aws = boto3.Session(aws_access_key_id="local", aws_secret_access_key="local", region_name=LOCAL_REGION)  # noqa: S106
    # Every client of this session, those that sagemaker.core creates included, goes to the local endpoint.
    aws.client = functools.partial(aws.client, endpoint_url=url)
    return aws


@contextmanager
def explained(config: ProjectConfig) -> Iterator[None]:
    """Turn what AWS clients raise into one line of ours."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in {"botocore", "boto3"}:
            raise
        raise _explained(error, f"endpoint {config.endpoint_name}") from None


def describe(client: Any, endpoint_name: str) -> dict[str, Any] | None:
    """The answer of DescribeEndpoint; None where there is no such endpoint."""
    return _found(client.describe_endpoint, EndpointName=endpoint_name)


def _model_data(stage: Stage, registered: RegisterRecord) -> str:
    """URI of the bundle's ``model.tar.gz``, packed where it is not there yet."""
    uri = f"{stage.config.root}/models/{registered.bundle_digest}/model.tar.gz"
    if not isinstance(stage.config.deploy, LocalDeploy) and not uri.startswith("s3://"):
        raise ConfigError(f"storage: {stage.config.storage!r} given; allowed: s3://bucket/prefix, where SageMaker can read it")
    bundle = Bundle.load(stage.local(registered.bundle))
    if bundle.digest != registered.bundle_digest:
        raise DataError(
            f"{registered.bundle}: has digest {bundle.digest[:12]}, not {registered.bundle_digest[:12]} as registered; "
            "it was changed afterwards"
        )
    if not storage.exists(uri):
        with tempfile.TemporaryDirectory(dir=stage.out) as folder:
            archive = Path(folder, "model.tar.gz")
            pack(bundle.path, archive)
            storage.upload_file(archive, uri)
    return uri


def _settings_digest(config: ProjectConfig) -> str:
    """What the model and the endpoint config hold besides the bundle: image, role, instances, storage, captures."""
    settings = config.deploy.model_dump_json(exclude={"url", "timeout"})
    return storage.text_digest(f"{settings} {captures.folder(config)}")[:8]


def _create_model(client: Any, config: ProjectConfig, name: str, model_data: str, tags: Tags) -> None:
    if _found(client.describe_model, ModelName=name):
        return
    image, role = _image_and_role(config.deploy)
    container = {"Image": image, "ModelDataUrl": model_data, "Environment": {"OMP_NUM_THREADS": "1"}}
    client.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn=role, Tags=tags)
    log.info("deploy: created model %s", name)


def _create_endpoint_config(client: Any, config: ProjectConfig, name: str, tags: Tags) -> None:
    """The endpoint config of the model of the same name."""
    if _found(client.describe_endpoint_config, EndpointConfigName=name):
        return
    instance_type, count = _instances(config.deploy)
    variant = {
        "VariantName": VARIANT,
        "ModelName": name,
        "InstanceType": instance_type,
        "InitialInstanceCount": count,
        "InitialVariantWeight": 1.0,
    }
    capture = {
        "EnableCapture": True,
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": captures.folder(config),
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
        "CaptureContentTypeHeader": {"JsonContentTypes": ["application/json"]},
    }
    client.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant], DataCaptureConfig=capture, Tags=tags)
    log.info("deploy: created endpoint config %s", name)


def _roll_out(client: Any, config: ProjectConfig, config_name: str, tags: Tags) -> str | None:
    """Create or update the endpoint, or join a rollout in progress; returns the endpoint config that served before."""
    name, deadline = config.endpoint_name, time.monotonic() + config.deploy.timeout
    endpoint = _settled(client, name, deadline)
    if endpoint and endpoint["EndpointStatus"] == "Failed":  # what never served can only be deleted
        log.info("deploy: endpoint %s failed before (%s); creating it anew", name, endpoint.get("FailureReason"))
        client.delete_endpoint(EndpointName=name)
        endpoint = _settled(client, name, deadline)
    previous: str | None = endpoint["EndpointConfigName"] if endpoint else None
    if endpoint is None:
        log.info("deploy: creating endpoint %s with %s", name, config_name)
        client.create_endpoint(EndpointName=name, EndpointConfigName=config_name, Tags=tags)
    elif previous != config_name:
        log.info("deploy: updating endpoint %s from %s to %s", name, previous, config_name)
        client.update_endpoint(EndpointName=name, EndpointConfigName=config_name)
    _require_rolled_out(_settled(client, name, deadline), name, config_name)
    return previous if previous != config_name else None


def _settled(client: Any, name: str, deadline: float) -> dict[str, Any] | None:
    """The endpoint once nothing is in progress; None where there is none."""
    pause, seen = 0.1, ""
    while (endpoint := describe(client, name)) and endpoint["EndpointStatus"] in IN_PROGRESS:
        if endpoint["EndpointStatus"] != seen:
            seen = endpoint["EndpointStatus"]
            log.info("deploy: endpoint %s is %s", name, seen)
        if time.monotonic() > deadline:
            raise Unavailable(f"endpoint {name}: is still {seen} after deploy.timeout; a retry goes on waiting")
        time.sleep(pause)
        pause = min(1.5 * pause, 10)
    return endpoint


def _require_rolled_out(endpoint: dict[str, Any] | None, name: str, config_name: str) -> None:
    if endpoint is None:
        raise Unavailable(f"endpoint {name}: was deleted during its rollout")
    status, serves = endpoint["EndpointStatus"], endpoint["EndpointConfigName"]
    if status == "InService" and serves == config_name:
        return
    reason = " ".join(endpoint.get("FailureReason", "no reason given").split())
    outcome = f"rolled back to {serves}" if status == "InService" else f"is {status}"
    problem: type[CvFactoryError] = Unavailable if "capacity" in reason.lower() else DataError
    raise problem(f"endpoint {name}: the rollout of {config_name} failed, it {outcome}: {reason}")


def _image_and_role(deploy: Deploy) -> tuple[str, str]:
    if isinstance(deploy, LocalDeploy):
        return "cv-factory", "arn:aws:iam::000000000000:role/local"
    return deploy.image, deploy.role_arn


def _instances(deploy: Deploy) -> tuple[str, int]:
    if isinstance(deploy, LocalDeploy):
        return "ml.m5.large", 1  # a name that the API asks for; it is this machine
    return deploy.instance_type, deploy.instance_count


def _tags(tags: dict[str, str]) -> Tags:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _found(describe: Callable[..., dict[str, Any]], **names: str) -> dict[str, Any] | None:
    """A description, or None where the service could not find the resource."""
    from botocore.exceptions import ClientError

    try:
        return describe(**names)
    except ClientError as error:
        if "could not find" in str(error).lower():
            return None
        raise


def _explained(error: Exception, subject: str) -> CvFactoryError:
    response: dict[str, Any] = getattr(error, "response", {})
    code, message = (str(response.get("Error", {}).get(part, "")) for part in ("Code", "Message"))
    if "in-progress" in message:
        return Unavailable(f"{subject}: another rollout is in progress")
    match code:
        case "ValidationException" | "ValidationError" | "AccessDeniedException" | "UnrecognizedClientException":
            return ConfigError(f"{subject}: SageMaker refused: {' '.join(message.split())}")
        case "ExpiredTokenException" | "InvalidSignatureException" | "ResourceLimitExceeded":
            return ConfigError(f"{subject}: SageMaker refused ({code}): {' '.join(message.split())}")
        case "ModelError":
            return DataError(f"{subject}: the model refused: {' '.join(message.split())}")
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return ConfigError(f"{subject}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    return Unavailable(f"{subject}: {code or type(error).__name__}: {' '.join((message or str(error)).split())}")
