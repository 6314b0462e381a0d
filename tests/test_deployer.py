"""What a rollout does when something fails on its way: alarms, throttling, time limits, kill -9 between any two calls.

Against the local endpoint with the containers of ``tests/container``; AWS's settings against moto's server.
"""

import json
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from botocore.httpsession import URLLib3Session

from cv_factory_ops import storage
from cv_factory_ops.bundle import Bundle, pack
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy import shapes
from cv_factory_ops.deploy.sagemaker import session
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.stage import run_stage
from tests.bundles import wait_until, write_bundle
from tests.test_deploy import deploy, registered, verify
from tests.test_local_endpoint import Server

CONTAINER = Path(__file__).with_name("container")
ALARM = {"metric": "Invocation5XXErrors"}
Project = Callable[..., ProjectConfig]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CONTAINER))
        running = Server(tmp_path_factory.mktemp("deployer"))
    yield running
    running.stop()
    wait_until(lambda: not running.serving_processes())


@pytest.fixture
def local(server: Server, project: Callable[..., Path], request: pytest.FixtureRequest) -> Project:
    """The configuration of a project with an endpoint of its own; ``deploy`` settings by keyword."""
    name = f"p{abs(hash(request.node.nodeid)) % 10**9}"

    def configured(**settings: Any) -> ProjectConfig:
        return load(project(project=name, deploy={"kind": "local", "url": server.url, "timeout": 60} | settings))

    return configured


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return write_bundle(folder / "one", 1), write_bundle(folder / "two", 2)


def status(config: ProjectConfig) -> str:
    found: str = session(config).client("sagemaker").describe_endpoint(EndpointName=config.endpoint_name)["EndpointStatus"]
    return found


def test_an_alarm_takes_the_rollout_back_and_is_named(local: Project, home: Path, pair: tuple[Bundle, Bundle]) -> None:
    config = local(rollout={"kind": "canary", "percent": 50, "wait_seconds": 1, "bake_seconds": 20, "alarms": [ALARM]})
    one, two = (registered(home, name, bundle) for name, bundle in zip(("one", "two"), pair, strict=True))
    record, cloudwatch = deploy(config, one), session(config).client("cloudwatch")
    (alarm,) = cloudwatch.describe_alarms(AlarmNamePrefix=shapes.alarm_prefix(config))["MetricAlarms"]
    assert alarm["Dimensions"][0] == {"Name": "EndpointName", "Value": config.endpoint_name}

    def go_off() -> None:
        wait_until(lambda: status(config) == "Updating")
        cloudwatch.set_alarm_state(AlarmName=alarm["AlarmName"], StateValue="ALARM", StateReason="rehearsal")

    watcher = threading.Thread(target=go_off)
    watcher.start()
    with pytest.raises(DataError, match=rf"rolled back to {record.endpoint_config_name}: .*{alarm['AlarmName']}: rehearsal"):
        deploy(config, two)
    watcher.join()
    assert verify(config, one).bundle_digest == pair[0].digest, "endpoint and alias agree"

    other = local(rollout={"kind": "all_at_once", "alarms": [ALARM | {"threshold": 7}]})
    assert deploy(other, two).previous_config_name == record.endpoint_config_name
    (renewed,) = cloudwatch.describe_alarms(AlarmNamePrefix=shapes.alarm_prefix(config))["MetricAlarms"]
    assert (renewed["Threshold"], renewed["AlarmName"] == alarm["AlarmName"]) == (7, False), "alarms of old settings are gone"


def test_a_rollback_after_the_deploy_stage_is_found_with_its_reason(
    server: Server, local: Project, home: Path, pair: tuple[Bundle, Bundle]
) -> None:
    """The stage was done, then an operator, or a service, put the endpoint back."""
    config = local()
    one, two = (registered(home, name, bundle) for name, bundle in zip(("one", "two"), pair, strict=True))
    first, second = deploy(config, one), deploy(config, two)
    server.control.update_endpoint(EndpointName=config.endpoint_name, EndpointConfigName=first.endpoint_config_name)
    server.wait(config.endpoint_name)
    with pytest.raises(
        DataError, match=rf"silent rollback: .* {first.endpoint_config_name}, not {second.endpoint_config_name}"
    ):
        verify(config, two)
    assert verify(config, one).bundle_digest == pair[0].digest, "what the alias names is what serves"


def test_a_model_that_refuses_every_request_does_not_stay(
    server: Server, local: Project, home: Path, pair: tuple[Bundle, Bundle]
) -> None:
    """It is healthy, so the rollout itself succeeds."""
    config = local()
    one, two = (registered(home, name, bundle) for name, bundle in zip(("one", "two"), pair, strict=True))
    first = deploy(config, one)
    archive = storage.path_of(f"{config.root}/models/{pair[1].digest}/model.tar.gz")
    assert archive is not None
    archive.parent.mkdir(parents=True)
    pack(pair[1].path, archive)
    name = first.model_name.replace(pair[0].digest[:12], pair[1].digest[:12])
    server.model(name, archive, Environment={"CVF_STUB_STATUS": "500"})
    assert deploy(config, two).model_name == name
    with pytest.raises(DataError, match=rf"the model refused: .*; the endpoint was put back to {first.endpoint_config_name}"):
        verify(config, two)
    assert verify(config, one).bundle_digest == pair[0].digest, "what the alias names is what serves"
    put_back = server.control.describe_endpoint(EndpointName=config.endpoint_name)
    with pytest.raises(DataError, match=r"silent rollback: .*: it was put back: .* UTC, verify: .*the model refused"):
        verify(config, two)
    again = server.control.describe_endpoint(EndpointName=config.endpoint_name)
    assert again["LastModifiedTime"] == put_back["LastModifiedTime"], "there is nothing left to do"


def test_a_rollout_that_takes_too_long_is_joined_by_a_retry(
    server: Server, local: Project, home: Path, pair: tuple[Bundle, Bundle]
) -> None:
    one, two = (registered(home, name, bundle) for name, bundle in zip(("one", "two"), pair, strict=True))
    config, hurried = local(), local(timeout=1)
    first = deploy(config, one)
    bake = {"TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE", "WaitIntervalInSeconds": 0}, "TerminationWaitInSeconds": 12}
    server.control.update_endpoint(
        EndpointName=config.endpoint_name,
        EndpointConfigName=first.endpoint_config_name,
        DeploymentConfig={"BlueGreenUpdatePolicy": bake},
    )
    with pytest.raises(Unavailable, match=r"is still Updating after deploy.timeout; a retry goes on waiting"):
        deploy(hurried, two)
    assert deploy(config, two).bundle_digest == pair[1].digest
    assert verify(config, two).bundle_digest == pair[1].digest


def test_a_kill_between_any_two_calls_leaves_one_of_each(
    server: Server, local: Project, home: Path, pair: tuple[Bundle, Bundle]
) -> None:
    """kill -9 as soon as the service has done the first request, the second, and so on; then a retry. Requests that only
    read are not counted: between two of them nothing is different."""
    runs = [registered(home, name, bundle) for name, bundle in zip(("one", "two"), pair, strict=True)]
    rollout = {"kind": "canary", "percent": 50, "wait_seconds": 0, "alarms": [ALARM]}
    before = deploy(local(rollout=rollout), runs[0]).endpoint_config_name
    for number in range(1, 10):
        config = local(rollout=rollout, capture_percent=number)  # other settings: a model and an endpoint config of its own
        run = runs[number % 2]
        if not is_killed(config, run, number):
            break
        record = deploy(config, run)
        assert record.previous_config_name == before, number
        before = record.endpoint_config_name
        for kind in ("model", "endpoint-config"):
            found = [path.stem for path in (server.state / kind).glob(f"{config.endpoint_name}-*.json")]
            assert Counter(found)[record.model_name] == 1
            assert len(found) == number + 1, "one a rollout"
        serves = server.control.describe_endpoint(EndpointName=config.endpoint_name)
        assert (serves["EndpointStatus"], serves["EndpointConfigName"]) == ("InService", before)
    assert verify(config, run).bundle_digest == pair[number % 2].digest
    assert number == 6, "a model, an endpoint config, an alarm, tags and the update; then there was nothing left to kill"


def is_killed(config: ProjectConfig, run: str, number: int) -> bool:
    """Deploy in a process of its own that is killed after its change of that number; False where it makes fewer."""
    child = os.fork()
    if child == 0:
        try:
            send, count = URLLib3Session.send, 0

            def counting(self: Any, request: Any) -> Any:
                nonlocal count
                answer, operation = send(self, request), str(request.headers["X-Amz-Target"])
                count += not any(reading in operation for reading in (".Describe", ".List"))
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer

            URLLib3Session.send = counting
            run_stage("deploy", config, run)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.fixture
def throttled(server: Server) -> Iterator[tuple[str, dict[str, int]]]:
    """A server in front that throttles: address, and how many requests for each operation it still refuses."""
    left: dict[str, int] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            operation = self.headers.get("x-amz-target", "").rpartition(".")[2]
            if left.get(operation, 0) > 0:
                left[operation] -= 1
                self.reply(400, json.dumps({"__type": "ThrottlingException", "message": "Rate exceeded"}).encode())
                return
            kept = {name: value for name, value in self.headers.items() if name.lower() not in {"host", "content-length"}}
            answer = httpx.post(f"{server.url}{self.path}", content=body, headers=kept, trust_env=False, timeout=60)
            self.reply(answer.status_code, answer.content)

        def do_GET(self) -> None:
            self.reply(200, httpx.get(f"{server.url}{self.path}", trust_env=False).content)

        def reply(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=proxy.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{proxy.server_port}", left
    proxy.shutdown()
    thread.join()
    proxy.server_close()


def test_throttling_is_waited_out_or_tried_again(
    local: Project,
    home: Path,
    pair: tuple[Bundle, Bundle],
    throttled: tuple[str, dict[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, left = throttled
    config, run = local(url=url), registered(home, "one", pair[0])
    left |= {"CreateModel": 1, "CreateEndpointConfig": 1, "DescribeEndpoint": 1, "CreateEndpoint": 1}
    record = deploy(config, run)
    assert not any(left.values()), "each was refused once"
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    other = registered(home, "two", pair[1])
    for operation in ("DescribeModel", "CreateEndpointConfig", "AddTags", "UpdateEndpoint"):
        left[operation] = 1
        with pytest.raises(Unavailable, match="ThrottlingException: Rate exceeded"):
            deploy(config, other)
        assert left[operation] == 0
    assert deploy(config, other).previous_config_name == record.endpoint_config_name


AWS = {
    "kind": "sagemaker",
    "image": "123456789012.dkr.ecr.us-east-1.amazonaws.com/cv-factory:1",
    "role_arn": "arn:aws:iam::123456789012:role/sagemaker",
}


@pytest.fixture
def aws(project: Callable[..., Path], bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The configuration of a project on moto's SageMaker; ``deploy`` settings by keyword."""
    for service in ("SAGEMAKER", "CLOUDWATCH", "APPLICATION_AUTO_SCALING"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", s3_server)

    def configured(**settings: Any) -> ProjectConfig:
        return load(project(project=bucket.replace("-", "_"), deploy=AWS | settings, storage=f"s3://{bucket}/root"))

    return configured


def test_settings_reach_aws(aws: Project, home: Path, pair: tuple[Bundle, Bundle]) -> None:
    vpc = {"subnets": ["subnet-1", "subnet-2"], "security_groups": ["sg-1"]}
    settings = {"kms_key": "alias/cv", "vpc": vpc, "network_isolation": True, "tags": {"team": "radiology"}}
    alarms = [ALARM, {"metric": "ModelLatency", "statistic": "p99", "threshold": 2e6, "periods": 3}]
    config = aws(**settings, capture_percent=20, rollout={"kind": "all_at_once", "alarms": alarms})
    record, client = deploy(config, registered(home, "one", pair[0])), boto3.client("sagemaker")
    model = client.describe_model(ModelName=record.model_name)
    assert model["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    described = client.describe_endpoint_config(EndpointConfigName=record.endpoint_config_name)
    assert described["KmsKeyId"] == "alias/cv"
    capture = described["DataCaptureConfig"]
    assert (capture["InitialSamplingPercentage"], capture["KmsKeyId"]) == (20, "alias/cv")
    tags = client.list_tags(ResourceArn=model["ModelArn"])["Tags"]
    assert {"Key": "team", "Value": "radiology"} in tags
    cloudwatch = boto3.client("cloudwatch", endpoint_url=os.environ["AWS_ENDPOINT_URL_CLOUDWATCH"])
    found = {alarm["MetricName"]: alarm for alarm in cloudwatch.describe_alarms()["MetricAlarms"]}
    assert (found["ModelLatency"]["ExtendedStatistic"], found["ModelLatency"]["EvaluationPeriods"]) == ("p99", 3)
    assert found["Invocation5XXErrors"]["TreatMissingData"] == "notBreaching"
    with pytest.raises(ConfigError, match=r"aws:|allowed|timeout"):
        aws(rollout={"kind": "linear", "wait_seconds": 600}, inference={"kind": "realtime", "instance_count": 2}, timeout=600)


def test_instances_are_scaled_and_no_longer(aws: Project, home: Path, pair: tuple[Bundle, Bundle]) -> None:
    scaling = {"least": 2, "most": 5, "target": 60}
    config, run = (
        aws(inference={"kind": "realtime", "instance_count": 2, "autoscaling": scaling}),
        registered(home, "one", pair[0]),
    )
    record = deploy(config, run)
    assert deploy(config, run, force=True) == record
    scaler = boto3.client("application-autoscaling")
    (target,) = scaler.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert (target["ResourceId"], target["MinCapacity"], target["MaxCapacity"]) == (
        f"endpoint/{config.endpoint_name}/variant/AllTraffic",
        2,
        5,
    )
    (policy,) = scaler.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
    tracked = policy["TargetTrackingScalingPolicyConfiguration"]
    assert tracked["PredefinedMetricSpecification"]["PredefinedMetricType"] == "SageMakerVariantInvocationsPerInstance"
    assert tracked["TargetValue"] == 60
    fixed = aws(inference={"kind": "realtime", "instance_count": 2})
    assert deploy(fixed, run, force=True).endpoint_config_name == record.endpoint_config_name, "it is the same config"
    assert scaler.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"] == []


def test_instances_that_are_scaled_change_their_type(
    aws: Project, home: Path, pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """AWS refuses to change the type of instances that are scaled; moto, which has no UpdateEndpoint, is given one here."""
    make, scaler = BaseClient._make_api_call, boto3.client("application-autoscaling")
    updated: dict[str, Any] = {}

    def targets() -> list[str]:
        found = scaler.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
        return [target["ResourceId"] for target in found]

    def as_aws(client: Any, operation: str, given: dict[str, Any]) -> Any:
        if operation == "UpdateEndpoint":
            if targets():
                refusal = {"Code": "ValidationException", "Message": "you must first delete the autoscaling configuration"}
                raise ClientError({"Error": refusal}, operation)
            updated.update(EndpointConfigName=given["EndpointConfigName"])
            return {}
        answer = make(client, operation, given)
        return answer | updated if operation == "DescribeEndpoint" else answer

    def inference(instance_type: str) -> dict[str, Any]:
        scaling = {"least": 2, "most": 5, "target": 60}
        return {"kind": "realtime", "instance_type": instance_type, "instance_count": 2, "autoscaling": scaling}

    run = registered(home, "one", pair[0])
    before = deploy(aws(inference=inference("ml.m5.large")), run)
    assert len(targets()) == 1
    monkeypatch.setattr(BaseClient, "_make_api_call", as_aws)
    config = aws(inference=inference("ml.c5.xlarge"))
    assert deploy(config, run, force=True).previous_config_name == before.endpoint_config_name
    assert targets() == [f"endpoint/{config.endpoint_name}/variant/AllTraffic"], "they are scaled again"


@pytest.mark.parametrize("family", ["m5", "c7i", "c7gn", "p3", "inf2"])
def test_disks_that_are_attached_are_encrypted_with_the_key(aws: Project, family: str) -> None:
    assert _keys(aws, f"ml.{family}.xlarge") == (True, True)


@pytest.mark.parametrize("family", ["g4dn", "g5", "g6e", "m5d", "r5dn", "c6gd", "p3dn", "p4d", "p5"])
def test_disks_of_the_instances_own_take_no_key(aws: Project, family: str) -> None:
    assert _keys(aws, f"ml.{family}.xlarge") == (False, True), "CreateEndpointConfig would be refused; captures have it"


def _keys(aws: Project, instance_type: str) -> tuple[bool, bool]:
    """Whether the volumes, and whether the captures, are encrypted with the project's key."""
    inference = {"kind": "realtime", "instance_type": instance_type, "instance_count": 2}
    shape = shapes.endpoint_config(aws(inference=inference, kms_key="alias/cv", capture_percent=10), "one")
    return "KmsKeyId" in shape, "KmsKeyId" in shape["DataCaptureConfig"]


def test_every_kind_of_inference_has_requests_that_aws_takes(aws: Project) -> None:
    """Against botocore's own model, which AWS generates its clients from."""
    kinds: list[dict[str, Any]] = [
        {
            "inference": {"kind": "realtime", "instance_count": 2},
            "rollout": {"kind": "linear", "percent": 25, "wait_seconds": 60},
        },
        {
            "inference": {
                "kind": "asynchronous",
                "instance_count": 2,
                "autoscaling": {"least": 2, "target": 3},
            },
            "rollout": {"kind": "canary", "bake_seconds": 60, "alarms": [ALARM]},
            "kms_key": "alias/cv",
        },
        {"inference": {"kind": "serverless"}, "capture_percent": 0},
    ]
    client = boto3.client("sagemaker")
    for settings in kinds:
        config = aws(**settings)
        requests = {
            "CreateModel": shapes.model(config, "name", "s3://bucket/model.tar.gz"),
            "CreateEndpointConfig": shapes.endpoint_config(config, "name"),
            "UpdateEndpoint": {
                "EndpointName": "name",
                "EndpointConfigName": "name",
                "DeploymentConfig": shapes.deployment(config),
            },
        }
        for operation, request in requests.items():
            shape = client.meta.service_model.operation_model(operation).input_shape
            client._serializer.serialize_to_request(request, client.meta.service_model.operation_model(operation))
            assert set(request) <= set(shape.members)
            assert is_valid(request, shape)


def is_valid(request: dict[str, Any], shape: Any) -> bool:
    from botocore.validate import ParamValidator

    report = ParamValidator().validate(request, shape)
    assert not report.has_errors(), report.generate_report()
    return True


def test_settings_that_aws_would_refuse_are_refused_at_once(aws: Project) -> None:
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rollout": {"kind": "canary"}}, "needs two instances"),
        ({"inference": {"kind": "serverless"}}, "serverless goes only with"),
        ({"inference": {"kind": "realtime", "autoscaling": {"least": 0, "target": 1}}}, "at least 1"),
        ({"inference": {"kind": "realtime", "autoscaling": {"least": 9, "most": 2, "target": 1}}}, "least 9"),
        ({"rollout": {"kind": "all_at_once", "bake_seconds": 1800}}, "more than the 1800 seconds"),
        ({"rollout": {"kind": "rolling"}}, "all_at_once"),
    ]
    for settings, message in wrong:
        with pytest.raises(ConfigError) as caught:
            aws(**settings)
        assert message in str(caught.value), str(caught.value)


def test_an_asynchronous_endpoint_is_rolled_out_and_verified(
    server: Server, aws: Project, home: Path, pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    """The settings of AWS at the local endpoint's address: input and answer lie on S3."""
    for service in ("SAGEMAKER", "SAGEMAKER_RUNTIME", "CLOUDWATCH"):
        monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", server.url)
    config = aws(inference={"kind": "asynchronous"})
    run = registered(home, "one", pair[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CONTAINER))
        own = Server(home / "own")  # one that knows where S3 is
    try:
        for service in ("SAGEMAKER", "SAGEMAKER_RUNTIME", "CLOUDWATCH"):
            monkeypatch.setenv(f"AWS_ENDPOINT_URL_{service}", own.url)
        deploy(config, run)
        assert verify(config, run).bundle_digest == pair[0].digest
        assert list(storage.listing(f"{config.root}/async/in")) == [], "the request is tidied away"
    finally:
        own.stop()
