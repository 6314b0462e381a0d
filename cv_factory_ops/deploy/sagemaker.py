"""One model, one endpoint configuration and one endpoint a bundle, on Amazon SageMaker or on this machine.

The same calls go to both; only the address, the role, the image and the credentials differ. Model and endpoint config are
both named ``<endpoint>-<bundle digest, 12 digits>-<settings digest, 8 digits>`` (63 characters at most, SageMaker's limit):
a retry after a crash between any two calls finds what is there and goes on, and changed settings make new ones.

An update is told to be taken back on CloudWatch alarms, and leaves the names of the new and of the old endpoint config as the
endpoint's tags first: so a retry knows, too, what served before.

Plain boto3: the typed ``Endpoint`` of sagemaker 3 cannot read what the service answers for an endpoint that captures without
a KMS key (aws/sagemaker-python-sdk issue 5738), and its import takes five to eight times as long as boto3's.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import pack
from cv_factory_ops.config import ProjectConfig, home
from cv_factory_ops.config.deploy import AsynchronousInference, LocalDeploy, SageMakerDeploy, ServerlessInference
from cv_factory_ops.deploy import shapes
from cv_factory_ops.deploy.rollout import BEFORE, IN_SERVICE, SERVES, Busy, Release, RolledOut, Serving, settled
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable

log = logging.getLogger("cvf")

IN_PROGRESS = {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}
LOCAL_REGION = "us-east-1"
SCALES = "autoscaling"
"""Tag of an endpoint: whether its instances are scaled."""
ASYNC_SECONDS = 300
"""For which an answer of an asynchronous endpoint is waited for; its instances may have to start first."""
Tags = list[dict[str, str]]


class SageMaker:
    """See :class:`cv_factory_ops.deploy.rollout.Deployer`."""

    def __init__(self, config: ProjectConfig) -> None:
        self._config, self._name = config, config.endpoint_name

    def roll_out(self, release: Release) -> RolledOut:
        config, digest = self._config, release.bundle.digest
        with self._explained() as aws:
            client = aws.client("sagemaker")
            name = f"{self._name}-{release.bundle.packed_digest[:12]}-{shapes.settings_digest(config)}"
            more = config.deploy.tags if isinstance(config.deploy, SageMakerDeploy) else {}
            tags = {**more, "project": config.project, "run": release.run, "bundle-digest": digest}
            _create_model(client, config, name, _model_data(config, release), tags)
            _create_endpoint_config(client, config, name, tags)
            _put_alarms(aws, config)
            previous = _roll_out(aws, config, name, tags)
            _scale(aws, config)
            _forget_alarms(aws, config)
        return RolledOut(name, name, previous)

    def serving(self) -> Serving | None:
        with self._explained() as aws:
            endpoint = describe(aws.client("sagemaker"), self._name)
        if endpoint is None:
            return None
        reason = " ".join(endpoint.get("FailureReason", "").split())
        return Serving(endpoint["EndpointStatus"], endpoint["EndpointConfigName"], reason)

    def invoke(self, body: bytes, content_type: str) -> bytes:
        """Drift checks leave it out by its inference id."""
        request_id = f"{captures.PROBE}{uuid.uuid4()}"
        request = {"EndpointName": self._name, "ContentType": content_type, "InferenceId": request_id}
        with self._explained() as aws:
            runtime = aws.client("sagemaker-runtime")
            if not isinstance(shapes.inference(self._config), AsynchronousInference):
                answer: bytes = runtime.invoke_endpoint(**request, Body=body)["Body"].read()
                return answer
            location = f"{self._config.root}/async/in/{request_id}"
            storage.write_bytes(location, body)
            try:
                return _awaited(self._name, runtime.invoke_endpoint_async(**request, InputLocation=location))
            finally:
                storage.delete_tree(location)

    def put_back(self, config_name: str) -> None:
        served = self.serving()
        if served and (served.status, served.config_name) == (IN_SERVICE, config_name):
            return
        log.warning("deploy: endpoint %s goes back to %s", self._name, config_name)
        with self._explained() as aws:
            client, deadline = aws.client("sagemaker"), time.monotonic() + self._config.deploy.timeout
            with _changing_instances(aws, self._config, config_name):
                client.update_endpoint(EndpointName=self._name, EndpointConfigName=config_name, **_retained(self._config))
                _require_rolled_out(_settled(client, self._name, deadline), self._name, config_name, "")

    @functools.cached_property
    def _session(self) -> Any:
        return session(self._config)

    @contextmanager
    def _explained(self) -> Iterator[Any]:
        """The session; what its clients raise is turned into one line of ours."""
        try:
            yield self._session
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in {"botocore", "boto3"}:
                raise
            raise _explained(error, f"endpoint {self._name}") from None


def session(config: ProjectConfig) -> Any:
    """The boto3 session for the project's endpoint; the local endpoint is started when nothing answers at its address.

    Raises:
        ConfigError: no region is set (SageMaker), or another service serves.
        Unavailable: the local endpoint cannot be started.
    """
    import boto3

    deploy = shapes.settings(config)
    if not isinstance(deploy, LocalDeploy):
        aws = boto3.Session()
        if aws.region_name is None:
            raise ConfigError("deploy: no AWS region; set AWS_DEFAULT_REGION or a profile")
        aws.client = functools.cache(aws.client)  # each takes a tenth of a second
        return aws
    from cv_factory_ops.deploy.local import ensure_running

    url = (os.environ.get("AWS_ENDPOINT_URL_SAGEMAKER") or deploy.url).rstrip("/")
    ensure_running(url, home() / "var" / "endpoint", storage.path_of(config.storage_uri))
    aws = boto3.Session(aws_access_key_id="local", aws_secret_access_key="local", region_name=LOCAL_REGION)  # noqa: S106
    # Every client of this session, those that sagemaker.core creates included, goes to the local endpoint.
    aws.client = functools.cache(functools.partial(aws.client, endpoint_url=url))
    return aws


def describe(client: Any, endpoint_name: str) -> dict[str, Any] | None:
    """The answer of DescribeEndpoint; None where there is no such endpoint."""
    return _found(client.describe_endpoint, EndpointName=endpoint_name)


def _model_data(config: ProjectConfig, release: Release) -> str:
    """URI of the bundle's ``model.tar.gz``, packed where it is not there yet."""
    uri = f"{config.root}/models/{release.bundle.packed_digest}/model.tar.gz"
    if not isinstance(config.deploy, LocalDeploy) and not uri.startswith("s3://"):
        raise ConfigError(f"storage: {config.storage!r} given; allowed: s3://bucket/prefix, where SageMaker can read it")
    if not storage.exists(uri):
        with tempfile.TemporaryDirectory(dir=release.scratch) as folder:
            archive = Path(folder, "model.tar.gz")
            pack(release.bundle.path, archive)
            storage.upload_file(archive, uri)
    return uri


def _create_model(client: Any, config: ProjectConfig, name: str, model_data: str, tags: dict[str, str]) -> None:
    if not _found(client.describe_model, ModelName=name):
        client.create_model(**shapes.model(config, name, model_data), Tags=_tags(tags))
        log.info("deploy: created model %s", name)


def _create_endpoint_config(client: Any, config: ProjectConfig, name: str, tags: dict[str, str]) -> None:
    if not _found(client.describe_endpoint_config, EndpointConfigName=name):
        client.create_endpoint_config(**shapes.endpoint_config(config, name), Tags=_tags(tags))
        log.info("deploy: created endpoint config %s", name)


def _put_alarms(aws: Any, config: ProjectConfig) -> None:
    for alarm in config.deploy.rollout.alarms:
        aws.client("cloudwatch").put_metric_alarm(**shapes.metric_alarm(config, alarm))


def _forget_alarms(aws: Any, config: ProjectConfig) -> None:
    """Remove the endpoint's alarms of earlier settings, which nothing refers to any more."""
    if wanted := {shapes.alarm_name(config, alarm) for alarm in config.deploy.rollout.alarms}:
        cloudwatch = aws.client("cloudwatch")
        pages = cloudwatch.get_paginator("describe_alarms").paginate(AlarmNamePrefix=shapes.alarm_prefix(config))
        if stale := [
            alarm["AlarmName"] for page in pages for alarm in page["MetricAlarms"] if alarm["AlarmName"] not in wanted
        ]:
            cloudwatch.delete_alarms(AlarmNames=stale)


def _roll_out(aws: Any, config: ProjectConfig, config_name: str, tags: dict[str, str]) -> str | None:
    """Create or update the endpoint, or join a rollout in progress; returns the endpoint config that served before."""
    client, name, deadline = aws.client("sagemaker"), config.endpoint_name, time.monotonic() + config.deploy.timeout
    endpoint = _settled(client, name, deadline)
    if endpoint and endpoint["EndpointStatus"] == "Failed":  # what never served can only be deleted
        log.info("deploy: endpoint %s failed before (%s); creating it anew", name, endpoint.get("FailureReason"))
        client.delete_endpoint(EndpointName=name)
        endpoint = _settled(client, name, deadline)
    if endpoint is None:
        log.info("deploy: creating endpoint %s with %s", name, config_name)
        created = _tags({**tags, SERVES: config_name, BEFORE: ""})
        client.create_endpoint(EndpointName=name, EndpointConfigName=config_name, Tags=created)
        previous = None
    elif (serves := endpoint["EndpointConfigName"]) != config_name:
        log.info("deploy: updating endpoint %s from %s to %s", name, serves, config_name)
        client.add_tags(ResourceArn=endpoint["EndpointArn"], Tags=_tags({**tags, SERVES: config_name, BEFORE: serves}))
        with _changing_instances(aws, config, config_name):
            client.update_endpoint(EndpointName=name, EndpointConfigName=config_name, **_how(config))
            _settled(client, name, deadline)
        previous = serves
    else:
        told = _tags_of(client, endpoint)
        previous = told.get(BEFORE) or None if told.get(SERVES) == config_name else None
    endpoint = _settled(client, name, deadline)
    _require_rolled_out(endpoint, name, config_name, _raised_alarms(aws, config, endpoint, config_name))
    return previous


def _how(config: ProjectConfig) -> dict[str, Any]:
    """What an UpdateEndpoint is told besides the names; serverless endpoints have no instances to shift traffic between."""
    if isinstance(shapes.inference(config), ServerlessInference):
        return {}
    return {"DeploymentConfig": shapes.deployment(config), **_retained(config)}


def _retained(config: ProjectConfig) -> dict[str, Any]:
    """Where instances are scaled, their number is that of now, not that of the endpoint config."""
    chosen = shapes.inference(config)
    if isinstance(chosen, ServerlessInference) or not chosen.autoscaling:
        return {}
    excluded = [{"VariantPropertyType": kind} for kind in ("DesiredWeight", "DataCaptureConfig")]
    return {"RetainAllVariantProperties": True, "ExcludeRetainedVariantProperties": excluded}


def _scale(aws: Any, config: ProjectConfig) -> None:
    """Have the endpoint's instances scaled or, where they were and should not be any more, not.

    Application Auto Scaling knows endpoints that are there; both calls say what should be, so repeating them is harmless.
    """
    chosen, client = shapes.inference(config), aws.client("sagemaker")
    scaling = None if isinstance(chosen, ServerlessInference) else chosen.autoscaling
    endpoint = describe(client, config.endpoint_name)
    told = _tags_of(client, endpoint) if endpoint else {}
    if endpoint is None or (scaling is None and not told.get(SCALES)):
        return
    scaler, target = aws.client("application-autoscaling"), shapes.scalable_target(config)
    if scaling:
        client.add_tags(ResourceArn=endpoint["EndpointArn"], Tags=_tags({SCALES: "yes"}))
        scaler.register_scalable_target(**target, MinCapacity=scaling.least, MaxCapacity=scaling.most)
        scaler.put_scaling_policy(**shapes.scaling_policy(config, scaling))
        return
    _unscale(aws, config)
    client.add_tags(ResourceArn=endpoint["EndpointArn"], Tags=_tags({SCALES: ""}))


def _unscale(aws: Any, config: ProjectConfig) -> None:
    scaler, target = aws.client("application-autoscaling"), shapes.scalable_target(config)
    if scaler.describe_scalable_targets(ServiceNamespace="sagemaker", ResourceIds=[target["ResourceId"]])["ScalableTargets"]:
        scaler.deregister_scalable_target(**target)


@contextmanager
def _changing_instances(aws: Any, config: ProjectConfig, config_name: str) -> Iterator[None]:
    """Scale instances whose type is about to change no longer, and, whatever serves afterwards, again.

    AWS refuses to change the type of instances that are scaled:
    https://docs.aws.amazon.com/sagemaker/latest/dg/endpoint-auto-scaling-delete.html
    """
    client = aws.client("sagemaker")
    endpoint = describe(client, config.endpoint_name)
    if endpoint is None or not _tags_of(client, endpoint).get(SCALES):
        yield
        return
    if _instance_type(client, endpoint["EndpointConfigName"]) == _instance_type(client, config_name):
        yield
        return
    _unscale(aws, config)
    try:
        yield
    finally:
        if (now := describe(client, config.endpoint_name)) and now["EndpointStatus"] == IN_SERVICE:
            _scale(aws, config)


def _instance_type(client: Any, config_name: str) -> str | None:
    """Of an endpoint config; None where it has no instances, or is not there any more."""
    found = _found(client.describe_endpoint_config, EndpointConfigName=config_name)
    return found["ProductionVariants"][0].get("InstanceType") if found else None


def _raised_alarms(aws: Any, config: ProjectConfig, endpoint: dict[str, Any] | None, config_name: str) -> str:
    """The alarms that may have taken a rollout back, where one was and AWS itself does not say why."""
    names = [shapes.alarm_name(config, alarm) for alarm in config.deploy.rollout.alarms]
    if not names or endpoint is None or endpoint["EndpointConfigName"] == config_name or endpoint.get("FailureReason"):
        return ""
    found = aws.client("cloudwatch").describe_alarms(AlarmNames=names, StateValue="ALARM")["MetricAlarms"]
    return "; ".join(f"alarm {alarm['AlarmName']}: {alarm['StateReason']}" for alarm in found)


def _settled(client: Any, name: str, deadline: float) -> dict[str, Any] | None:
    """The endpoint once nothing is in progress; None where there is none."""
    return settled(lambda: describe(client, name), _in_progress, f"endpoint {name}", deadline)


def _in_progress(endpoint: dict[str, Any] | None) -> str:
    status = endpoint["EndpointStatus"] if endpoint else ""
    return status if status in IN_PROGRESS else ""


def _awaited(name: str, asked: dict[str, Any]) -> bytes:
    deadline = time.monotonic() + ASYNC_SECONDS
    while time.monotonic() < deadline:
        if storage.exists(asked["OutputLocation"]):
            return storage.read_bytes(asked["OutputLocation"])
        if (failure := asked.get("FailureLocation")) and storage.exists(failure):
            raise DataError(f"endpoint {name}: the model refused a request; its reason lies at {failure}")
        time.sleep(0.5)
    raise Unavailable(f"endpoint {name}: gave no answer within {ASYNC_SECONDS} s")


def _require_rolled_out(endpoint: dict[str, Any] | None, name: str, config_name: str, alarms: str) -> None:
    if endpoint is None:
        raise Unavailable(f"endpoint {name}: was deleted during its rollout")
    status, serves = endpoint["EndpointStatus"], endpoint["EndpointConfigName"]
    if status == "InService" and serves == config_name:
        return
    reason = " ".join((endpoint.get("FailureReason") or alarms or "no reason given").split())
    outcome = f"rolled back to {serves}" if status == "InService" else f"is {status}"
    problem: type[CvFactoryError] = Unavailable if "capacity" in reason.lower() else DataError
    raise problem(f"endpoint {name}: the rollout of {config_name} failed, it {outcome}: {reason}")


def _tags(tags: dict[str, str]) -> Tags:
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def _tags_of(client: Any, endpoint: dict[str, Any]) -> dict[str, str]:
    pages = client.get_paginator("list_tags").paginate(ResourceArn=endpoint["EndpointArn"])
    return {tag["Key"]: tag["Value"] for page in pages for tag in page["Tags"]}


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
            problem = Busy if response.get("OriginalStatusCode") == 503 else DataError
            return problem(f"{subject}: the model refused: {' '.join(message.split())}")
    if type(error).__name__ in {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}:
        return ConfigError(f"{subject}: {error}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile")
    return Unavailable(f"{subject}: {code or type(error).__name__}: {' '.join((message or str(error)).split())}")
