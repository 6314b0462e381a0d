"""Rollouts on the local endpoint: shifting, alarms, weights, asynchronous requests; through unmodified boto3 clients.

The containers are those of ``tests/container``, which start at once and fail on demand; the endpoint is the real process.
"""

import asyncio
import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import pack
from cv_factory_ops.config import load
from cv_factory_ops.deploy.alarms import CloudWatch
from cv_factory_ops.deploy.control_plane import ControlPlane
from cv_factory_ops.deploy.shelf import ServiceError
from cv_factory_ops.deploy.traffic import Policy
from cv_factory_ops.deploy.variants import Fleet
from tests.bundles import npy, wait_until, write_bundle
from tests.test_local_endpoint import KEYS, Server, capturing, check_answer, error_of, remove, variant

CONTAINER = Path(__file__).with_name("container")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with endpoint configs ``one`` and ``two`` of good models, ``faulty`` of one that answers 500, ``slow`` and
    ``late`` of ones that answer, and come up, after two seconds."""
    folder = tmp_path_factory.mktemp("rollout")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CONTAINER))
        running = Server(folder / "server")
        environments = {"one": {}, "two": {}, "faulty": {"CVF_STUB_STATUS": "500"}, "slow": {"CVF_STUB_DELAY": "2"}}
        for seed, (name, environment) in enumerate((environments | {"late": {"CVF_STUB_PING_DELAY": "2"}}).items()):
            write_bundle(folder / name, seed)
            pack(folder / name, folder / f"{name}.tar.gz")
            running.model(name, folder / f"{name}.tar.gz", Environment=environment)
            running.control.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant(name)])
        yield running
        running.stop()
        wait_until(lambda: not running.serving_processes())


@pytest.fixture
def endpoint(server: Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of an endpoint of ``one`` that a test has for itself."""
    name = f"e{abs(hash(request.node.nodeid)) % 10**9}"
    server.control.create_endpoint(EndpointName=name, EndpointConfigName="one")
    server.wait(name)
    yield name
    server.wait(name)
    server.control.delete_endpoint(EndpointName=name)


@pytest.fixture(scope="module")
def cloudwatch(server: Server) -> Any:
    return client(server, "cloudwatch")


def client(server: Server, service: str) -> Any:
    """A client that leaves checking to the server: seconds may be fractions, and shorter than AWS allows."""
    config = Config(retries={"max_attempts": 0}, parameter_validation=False)
    return boto3.client(service, endpoint_url=server.url, config=config, **KEYS)


def blue_green(kind: str = "ALL_AT_ONCE", wait: float = 0, bake: float = 0, *alarms: str, **more: Any) -> dict[str, Any]:
    sizes = {"CANARY": "CanarySize", "LINEAR": "LinearStepSize"}
    routing = {"Type": kind, "WaitIntervalInSeconds": wait}
    routing |= {sizes[kind]: {"Type": "CAPACITY_PERCENT", "Value": 50}} if kind in sizes else {}
    deployment: dict[str, Any] = {
        "BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing, "TerminationWaitInSeconds": bake, **more}
    }
    if alarms:
        deployment["AutoRollbackConfiguration"] = {"Alarms": [{"AlarmName": name} for name in alarms]}
    return deployment


def put_alarm(cloudwatch: Any, name: str, endpoint: str, metric: str = "Invocation5XXErrors", **more: Any) -> None:
    settings = {
        "Namespace": "AWS/SageMaker",
        "MetricName": metric,
        "Dimensions": [{"Name": "EndpointName", "Value": endpoint}, {"Name": "VariantName", "Value": "AllTraffic"}],
        "Statistic": "Sum",
        "Period": 60,
        "EvaluationPeriods": 1,
        "Threshold": 0,
        "ComparisonOperator": "GreaterThanThreshold",
        "TreatMissingData": "notBreaching",
    }
    cloudwatch.put_metric_alarm(AlarmName=name, **(settings | more))


def phase(server: Server, name: str) -> str:
    pending = server.control.describe_endpoint(EndpointName=name).get("PendingDeploymentSummary")
    return pending["ProductionVariants"][0]["VariantStatus"][0]["Status"] if pending else ""


def config_of(server: Server, name: str) -> str:
    config: str = server.control.describe_endpoint(EndpointName=name)["EndpointConfigName"]
    return config


def state_of(cloudwatch: Any, name: str) -> str:
    state: str = cloudwatch.describe_alarms(AlarmNames=[name])["MetricAlarms"][0]["StateValue"]
    return state


def test_a_canary_has_its_share_of_the_traffic_then_all_of_it(server: Server, endpoint: str) -> None:
    old, control = server.digest(endpoint), client(server, "sagemaker")
    deployment = blue_green("CANARY", 8, 1.5)
    control.update_endpoint(EndpointName=endpoint, EndpointConfigName="two", DeploymentConfig=deployment)
    wait_until(lambda: phase(server, endpoint) == "ActivatingTraffic")
    described = server.control.describe_endpoint(EndpointName=endpoint)
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("Updating", "one")
    seen = [server.digest(endpoint) for _ in range(100)]
    assert phase(server, endpoint) == "ActivatingTraffic", "all of them during the canary"
    assert 20 < seen.count(old) < 80, "half of 100: outside with a probability below 1e-9"
    wait_until(lambda: phase(server, endpoint) == "Baking")
    assert {server.digest(endpoint) for _ in range(10)} == set(seen) - {old}
    assert config_of(server, endpoint) == "one", "the update is not done before the bake is"
    server.wait(endpoint)
    assert config_of(server, endpoint) == "two"
    assert server.control.describe_endpoint(EndpointName=endpoint)["LastDeploymentConfig"] == deployment
    wait_until(lambda: server.status(endpoint) == "InService")


def test_an_alarm_during_the_canary_brings_the_old_fleet_back(server: Server, endpoint: str, cloudwatch: Any) -> None:
    old, name = server.digest(endpoint), f"errors-{endpoint}"
    put_alarm(cloudwatch, name, endpoint)
    assert state_of(cloudwatch, name) == "OK"
    deployment = blue_green("CANARY", 30, 0, name)
    server.control.update_endpoint(EndpointName=endpoint, EndpointConfigName="faulty", DeploymentConfig=deployment)
    wait_until(lambda: phase(server, endpoint) == "ActivatingTraffic")
    refused: dict[str, Any] = {}
    while not refused:
        try:
            server.digest(endpoint)
        except ClientError as error:
            refused = error.response
    assert (refused["Error"]["Code"], refused["OriginalStatusCode"]) == ("ModelError", 500)
    assert refused["LogStreamArn"].endswith(f":log-group:/aws/sagemaker/Endpoints/{endpoint}")
    server.wait(endpoint)
    described = check_answer(server.control, "DescribeEndpoint", {"EndpointName": endpoint})
    assert (described["EndpointStatus"], described["EndpointConfigName"]) == ("InService", "one")
    assert f"{name}: Invocation5XXErrors 1 against the threshold 0" in described["FailureReason"]
    assert state_of(cloudwatch, name) == "ALARM"
    assert {server.digest(endpoint) for _ in range(10)} == {old}


def test_an_alarm_during_the_bake_brings_the_old_fleet_back(server: Server, endpoint: str, cloudwatch: Any) -> None:
    name = f"latency-{endpoint}"
    put_alarm(cloudwatch, name, endpoint, "ModelLatency", Statistic="Average", Threshold=3e6)
    deployment = blue_green("ALL_AT_ONCE", 0, 30, name)
    server.control.update_endpoint(EndpointName=endpoint, EndpointConfigName="two", DeploymentConfig=deployment)
    wait_until(lambda: phase(server, endpoint) == "Baking")
    for state in ("OK", "ALARM"):
        cloudwatch.set_alarm_state(AlarmName=name, StateValue=state, StateReason="rehearsal")
    server.wait(endpoint)
    assert config_of(server, endpoint) == "one"
    assert "rehearsal" in server.control.describe_endpoint(EndpointName=endpoint)["FailureReason"]


def test_alarms_follow_the_metric(server: Server, endpoint: str, cloudwatch: Any) -> None:
    """ModelLatency is in microseconds; a period without requests is what TreatMissingData says."""
    control = client(server, "sagemaker")
    control.update_endpoint(EndpointName=endpoint, EndpointConfigName="slow")
    for treatment, empty in (("missing", "INSUFFICIENT_DATA"), ("notBreaching", "OK"), ("breaching", "ALARM")):
        put_alarm(cloudwatch, f"{treatment}-{endpoint}", endpoint, "ModelLatency", TreatMissingData=treatment)
        assert state_of(cloudwatch, f"{treatment}-{endpoint}") == empty
    server.wait(endpoint)
    server.digest(endpoint)
    limits = {"Average": (1.9e6, 10e6), "Maximum": (1.9e6, 10e6), "SampleCount": (0.5, 1.5)}
    for statistic, thresholds in limits.items():
        for threshold, state in zip(thresholds, ("ALARM", "OK"), strict=True):
            put_alarm(cloudwatch, f"any-{endpoint}", endpoint, "ModelLatency", Statistic=statistic, Threshold=threshold)
            assert state_of(cloudwatch, f"any-{endpoint}") == state, (statistic, threshold)
    put_alarm(cloudwatch, f"any-{endpoint}", endpoint, "ModelLatency", Threshold=1e6, Period=1, EvaluationPeriods=1)
    wait_until(lambda: state_of(cloudwatch, f"any-{endpoint}") == "OK")
    for operation, given in (("DescribeAlarms", {"AlarmNames": [f"any-{endpoint}"]}), ("DescribeAlarms", {"StateValue": "OK"})):
        assert check_answer(boto3.client("cloudwatch", endpoint_url=server.url, **KEYS), operation, given)["MetricAlarms"]
    cloudwatch.delete_alarms(AlarmNames=[f"any-{endpoint}"])
    assert cloudwatch.describe_alarms(AlarmNames=[f"any-{endpoint}"])["MetricAlarms"] == []
    with pytest.raises(ClientError, match="must be one of Invocations"):
        put_alarm(cloudwatch, "wrong", endpoint, "CPUUtilization")


def test_an_error_that_nobody_foresaw_ends_a_rollout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def breaks(_: Any) -> None:
        raise RuntimeError("nobody foresaw it")

    async def described() -> dict[str, Any]:
        plane = ControlPlane(tmp_path, CloudWatch(tmp_path), lambda *_: None)
        ask = plane.operations
        await ask["CreateModel"]({"ModelName": "m", "PrimaryContainer": {"ModelDataUrl": "file:///m.tar.gz"}})
        await ask["CreateEndpointConfig"]({"EndpointConfigName": "c", "ProductionVariants": [variant("m")]})
        await ask["CreateEndpoint"]({"EndpointName": "e", "EndpointConfigName": "c"})
        await asyncio.gather(*plane._tasks.values(), return_exceptions=True)
        answer = await ask["DescribeEndpoint"]({"EndpointName": "e"})
        await plane.close()
        return answer

    monkeypatch.setattr(Fleet, "start", breaks)
    answer = asyncio.run(described())
    assert answer["EndpointStatus"] == "Failed"
    assert answer["FailureReason"].startswith("unexpected RuntimeError; details in ")


def test_a_deployment_has_a_time_limit(server: Server, endpoint: str) -> None:
    deployment = blue_green(MaximumExecutionTimeoutInSeconds=1)
    control = client(server, "sagemaker")
    control.update_endpoint(EndpointName=endpoint, EndpointConfigName="late", DeploymentConfig=deployment)
    server.wait(endpoint)
    described = server.control.describe_endpoint(EndpointName=endpoint)
    assert described["EndpointConfigName"] == "one"
    assert "MaximumExecutionTimeoutInSeconds" in described["FailureReason"]


def test_a_wrong_deployment_config_is_refused_before_anything_happens(server: Server, endpoint: str) -> None:
    control = client(server, "sagemaker")
    linear = blue_green("LINEAR")
    linear["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["LinearStepSize"]["Value"] = 60
    wrong: list[tuple[dict[str, Any], str]] = [
        (blue_green("ALL_AT_ONCE", 0, 0, "no-such-alarm"), "Could not find alarm no-such-alarm"),
        (linear, "10 to 50 percent"),
        (blue_green(bake=4000), "between 0 and 3600"),
        (blue_green(bake=700, MaximumExecutionTimeoutInSeconds=600), "larger than the waits"),
        ({"RollingUpdatePolicy": {"WaitIntervalInSeconds": 1}}, "BlueGreenUpdatePolicy only"),
    ]
    for deployment, message in wrong:
        given = {"EndpointName": endpoint, "EndpointConfigName": "two", "DeploymentConfig": deployment}
        code, told = error_of(control.update_endpoint, **given)
        assert (code, message in told) == ("ValidationException", True), told
    assert server.status(endpoint) == "InService"


def test_the_steps_of_a_policy() -> None:
    """A last step that would leave less than a thousandth over is the last one."""

    def shares(kind: str, unit: str, value: int, instances: int = 1) -> list[float]:
        field = {"LINEAR": "LinearStepSize", "CANARY": "CanarySize"}[kind]
        routing = {"Type": kind, "WaitIntervalInSeconds": 0, field: {"Type": unit, "Value": value}}
        policy = Policy.of({"BlueGreenUpdatePolicy": {"TrafficRoutingConfiguration": routing}}, instances)
        return [round(share, 3) for share in policy.shares]

    assert shares("LINEAR", "CAPACITY_PERCENT", 25) == [0.25, 0.5, 0.75, 1]
    assert shares("LINEAR", "CAPACITY_PERCENT", 33) == [0.33, 0.66, 0.99, 1]
    assert shares("LINEAR", "CAPACITY_PERCENT", 10) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    assert shares("LINEAR", "INSTANCE_COUNT", 1, instances=3) == [0.333, 0.667, 1]
    assert shares("CANARY", "CAPACITY_PERCENT", 5) == [0.05, 1]
    with pytest.raises(ServiceError, match="1 to 50 percent of the fleet, 100 given"):
        shares("CANARY", "INSTANCE_COUNT", 1)


def test_weights_shift_at_once_and_survive_a_kill(server: Server) -> None:
    pair = [variant("one", "A", InitialVariantWeight=1.0), variant("two", "B", InitialVariantWeight=0.0)]
    server.control.create_endpoint_config(EndpointConfigName="pair", ProductionVariants=pair)
    server.control.create_endpoint(EndpointName="pair", EndpointConfigName="pair")
    server.wait("pair")
    change = [{"VariantName": "A", "DesiredWeight": 0.0}, {"VariantName": "B", "DesiredWeight": 2.0, "DesiredInstanceCount": 2}]
    arguments = {"EndpointName": "pair", "DesiredWeightsAndCapacities": change}
    check_answer(server.control, "UpdateEndpointWeightsAndCapacities", arguments)
    server.wait("pair")
    server.stop(signal.SIGKILL)
    server.start()
    assert {server.invoke("pair")["InvokedProductionVariant"] for _ in range(10)} == {"B"}
    server.wait("pair")
    summary = {
        each["VariantName"]: each for each in server.control.describe_endpoint(EndpointName="pair")["ProductionVariants"]
    }
    assert (summary["A"]["CurrentWeight"], summary["B"]["CurrentWeight"], summary["B"]["CurrentInstanceCount"]) == (0, 2, 2)
    wrong = [{"VariantName": "C", "DesiredWeight": 1.0}]
    call = server.control.update_endpoint_weights_and_capacities
    assert "Variant C" in error_of(call, EndpointName="pair", DesiredWeightsAndCapacities=wrong)[1]
    retained = {"EndpointName": "pair", "EndpointConfigName": "pair", "RetainAllVariantProperties": True}
    server.control.update_endpoint(**retained)
    server.wait("pair")
    assert {server.invoke("pair")["InvokedProductionVariant"] for _ in range(10)} == {"B"}, "weights are retained"
    server.control.delete_endpoint(EndpointName="pair")


def test_a_server_killed_during_the_bake_goes_on_with_the_update(server: Server, endpoint: str, cloudwatch: Any) -> None:
    name, control = f"kept-{endpoint}", client(server, "sagemaker")
    put_alarm(cloudwatch, name, endpoint)
    deployment = blue_green("CANARY", 0.2, 2, name)
    control.update_endpoint(EndpointName=endpoint, EndpointConfigName="two", DeploymentConfig=deployment)
    wait_until(lambda: phase(server, endpoint) == "Baking")
    server.stop(signal.SIGKILL)
    server.start()
    assert server.status(endpoint) in {"SystemUpdating", "Updating"}
    server.wait(endpoint)
    assert config_of(server, endpoint) == "two"
    assert state_of(cloudwatch, name) == "OK", "alarms survive as well"


def async_endpoint(server: Server, name: str, config: str, folder: str) -> None:
    settings = {
        "OutputConfig": {"S3OutputPath": f"{folder}/out", "S3FailurePath": f"{folder}/failed"},
        "ClientConfig": {"MaxConcurrentInvocationsPerInstance": 2},
    }
    server.control.create_endpoint_config(
        EndpointConfigName=f"{name}-config", ProductionVariants=[variant(config)], AsyncInferenceConfig=settings
    )
    server.control.create_endpoint(EndpointName=name, EndpointConfigName=f"{name}-config")
    server.wait(name)


def ask(server: Server, name: str, location: str, **more: Any) -> dict[str, Any]:
    given = {"EndpointName": name, "InputLocation": location, "ContentType": "application/x-npy", **more}
    answer: dict[str, Any] = server.runtime.invoke_endpoint_async(**given)
    assert answer["ResponseMetadata"]["HTTPStatusCode"] == 202
    return answer


def test_asynchronous_answers_and_failures_lie_on_storage(server: Server, tmp_path: Path) -> None:
    folder = tmp_path.as_uri()
    storage.write_bytes(f"{folder}/in/one.npy", npy())
    async_endpoint(server, "later", "one", folder)
    answer = ask(server, "later", f"{folder}/in/one.npy", InferenceId="mine")
    assert answer["InferenceId"] == "mine"
    wait_until(lambda: storage.exists(answer["OutputLocation"]))
    assert len(json.loads(storage.read_bytes(answer["OutputLocation"]))["predictions"]) == 1
    assert not storage.exists(answer["FailureLocation"])
    missing = ask(server, "later", f"{folder}/in/none.npy")
    wait_until(lambda: storage.exists(missing["FailureLocation"]))
    assert not storage.exists(missing["OutputLocation"])
    described = check_answer(server.control, "DescribeEndpoint", {"EndpointName": "later"})
    assert described["AsyncInferenceConfig"]["ClientConfig"]["MaxConcurrentInvocationsPerInstance"] == 2
    code, message = error_of(server.invoke, name="later")
    assert (code, "use InvokeEndpointAsync" in message) == ("ValidationError", True)
    code, message = error_of(server.runtime.invoke_endpoint_async, EndpointName="later", InputLocation="https://elsewhere/x")
    assert (code, message.partition(" ")[0]) == ("ValidationError", "InputLocation")
    code, message = error_of(server.runtime.invoke_endpoint_async, EndpointName="later", InputLocation="file:///etc/passwd")
    assert (code, message.partition(" given")[0]) == ("ValidationError", "InputLocation: file:///etc/passwd")
    remove(server, "later")


def test_asynchronous_requests_have_limits_and_survive_a_kill(server: Server, tmp_path: Path) -> None:
    folder = tmp_path.as_uri()
    storage.write_bytes(f"{folder}/in/one.npy", npy())
    async_endpoint(server, "patient", "slow", folder)
    asked = [ask(server, "patient", f"{folder}/in/one.npy") for _ in range(3)]
    hurried = ask(server, "patient", f"{folder}/in/one.npy", InvocationTimeoutSeconds=1)
    server.stop(signal.SIGKILL)
    server.start()
    wait_until(lambda: all(storage.exists(one["OutputLocation"]) for one in asked))
    wait_until(lambda: storage.exists(hurried["FailureLocation"]))
    assert b"timed out" in storage.read_bytes(hurried["FailureLocation"])
    wait_until(lambda: not list((server.state / "async").iterdir()))
    code, message = error_of(server.runtime.invoke_endpoint_async, EndpointName="none", InputLocation="s3://b/k")
    assert (code, message.partition(" of ")[0]) == ("ValidationError", "Endpoint none")
    remove(server, "patient")


def test_captures_are_sampled(server: Server, project: Callable[..., Path]) -> None:
    config = load(project())
    capturing(server, "sampled", config, InitialSamplingPercentage=50)
    for number in range(100):
        server.invoke("sampled", InferenceId=f"case-{number}")
    remove(server, "sampled")
    folder = storage.path_of(captures.folder(config))
    assert folder is not None
    time.sleep(1.5)  # a capture is at its destination half a second later
    lines = [line for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert 20 < len(lines) < 80, "half of 100: outside with a probability below 1e-9"


def test_serverless_variants_are_described_as_such(server: Server) -> None:
    serverless = {"MemorySizeInMB": 2048, "MaxConcurrency": 3}
    one = {"VariantName": "AllTraffic", "ModelName": "one", "ServerlessConfig": serverless}
    server.control.create_endpoint_config(EndpointConfigName="serverless", ProductionVariants=[one])
    server.control.create_endpoint(EndpointName="serverless", EndpointConfigName="serverless")
    server.wait("serverless")
    (summary,) = check_answer(server.control, "DescribeEndpoint", {"EndpointName": "serverless"})["ProductionVariants"]
    assert (summary["CurrentServerlessConfig"], "CurrentInstanceCount" in summary) == (serverless, False)
    server.control.delete_endpoint(EndpointName="serverless")
    capture = {"InitialSamplingPercentage": 1, "DestinationS3Uri": "s3://b/c", "CaptureOptions": [{"CaptureMode": "Input"}]}
    given = {"EndpointConfigName": "wrong", "ProductionVariants": [one], "DataCaptureConfig": capture}
    assert "not supported for serverless" in error_of(server.control.create_endpoint_config, **given)[1]
