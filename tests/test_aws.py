"""The life of an endpoint, told once, for the local endpoint and for AWS itself.

On AWS it creates an endpoint of two ``ml.m5.large`` for about an hour, which costs money, and runs where these are set::

    CVF_TEST_AWS_IMAGE   inference image in ECR
    CVF_TEST_AWS_ROLE    execution role of SageMaker, which may read and write the bucket
    CVF_TEST_AWS_BUCKET  bucket in the region of AWS_DEFAULT_REGION
"""

import os
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy import shapes
from cv_factory_ops.deploy.sagemaker import session
from cv_factory_ops.errors import DataError
from tests.bundles import wait_until, write_bundle
from tests.test_deploy import deploy, registered, verify
from tests.test_local_endpoint import Server, check_answer

CONTAINER = Path(__file__).with_name("container")
NEEDED = ("CVF_TEST_AWS_IMAGE", "CVF_TEST_AWS_ROLE", "CVF_TEST_AWS_BUCKET", "AWS_DEFAULT_REGION")
on_aws = pytest.mark.skipif(not all(os.environ.get(name) for name in NEEDED), reason=f"needs {', '.join(NEEDED)}")


@pytest.fixture(params=["local", pytest.param("aws", marks=on_aws)])
def config(request: pytest.FixtureRequest, project: Callable[..., Path], home: Path) -> Iterator[ProjectConfig]:
    """A canary of a few seconds or minutes with an alarm on errors."""
    alarms = [{"metric": "Invocation5XXErrors"}]
    rollout = {"kind": "canary", "percent": 50, "wait_seconds": 1, "bake_seconds": 2, "alarms": alarms}
    if request.param == "aws":
        place = {"image": os.environ["CVF_TEST_AWS_IMAGE"], "role_arn": os.environ["CVF_TEST_AWS_ROLE"]}
        settings = {"kind": "sagemaker", **place, "rollout": rollout | {"wait_seconds": 120, "bake_seconds": 180}}
        settings |= {"inference": {"kind": "realtime", "instance_count": 2}, "timeout": 3600}
        name = f"cvf_test_{uuid.uuid4().hex[:8]}"
        yield load(project(project=name, deploy=settings, storage=f"s3://{os.environ['CVF_TEST_AWS_BUCKET']}/{name}"))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(CONTAINER))
        server = Server(home / "server")
    yield load(project(deploy={"kind": "local", "url": server.url, "rollout": rollout}))
    server.stop()


def test_the_life_of_an_endpoint(config: ProjectConfig, home: Path) -> None:
    one, two = (write_bundle(home / name, seed) for seed, name in enumerate(("one", "two")))
    first, second = registered(home, "first", one), registered(home, "second", two)
    aws, name = session(config), config.endpoint_name
    client = aws.client("sagemaker")
    created: list[Any] = []
    try:
        created.append(deploy(config, first))
        assert verify(config, first).bundle_digest == one.digest
        created.append(deploy(config, second))
        assert created[1].previous_config_name == created[0].endpoint_config_name
        assert deploy(config, second, force=True) == created[1], "a repetition finds everything there"
        assert verify(config, second).bundle_digest == two.digest
        described = check_answer(client, "DescribeEndpoint", {"EndpointName": name})
        assert described["LastDeploymentConfig"]["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["Type"] == "CANARY"

        watcher = threading.Thread(target=lambda: go_off(aws, config))
        watcher.start()
        with pytest.raises(DataError, match=rf"it rolled back to {created[1].endpoint_config_name}: "):
            deploy(config, first, force=True)
        watcher.join()
        assert verify(config, second).bundle_digest == two.digest

        weights = [{"VariantName": shapes.VARIANT, "DesiredWeight": 3.0}]
        change = {"EndpointName": name, "DesiredWeightsAndCapacities": weights}
        check_answer(client, "UpdateEndpointWeightsAndCapacities", change)
        wait_until(lambda: status(client, name) == "InService", seconds=900)
        variants = check_answer(client, "DescribeEndpoint", {"EndpointName": name})["ProductionVariants"]
        assert variants[0]["CurrentWeight"] == 3.0
    finally:
        remove(aws, config, created)


def go_off(aws: Any, config: ProjectConfig) -> None:
    """Set the alarm off by hand as soon as the endpoint is being updated, and until it goes back."""
    client, cloudwatch, name = aws.client("sagemaker"), aws.client("cloudwatch"), config.endpoint_name
    alarm = shapes.alarm_name(config, config.deploy.rollout.alarms[0])
    wait_until(lambda: status(client, name) == "Updating", seconds=900)
    while status(client, name) == "Updating":
        cloudwatch.set_alarm_state(AlarmName=alarm, StateValue="ALARM", StateReason="rehearsal")


def status(client: Any, name: str) -> str:
    found: str = client.describe_endpoint(EndpointName=name)["EndpointStatus"]
    return found


def remove(aws: Any, config: ProjectConfig, created: list[Any]) -> None:
    """Everything that was made, but what lies in the storage."""
    client = aws.client("sagemaker")
    if not created:
        return
    wait_until(lambda: status(client, config.endpoint_name) in {"InService", "Failed"}, seconds=1800)
    client.delete_endpoint(EndpointName=config.endpoint_name)
    for record in created:
        client.delete_endpoint_config(EndpointConfigName=record.endpoint_config_name)
        client.delete_model(ModelName=record.model_name)
    aws.client("cloudwatch").delete_alarms(
        AlarmNames=[shapes.alarm_name(config, alarm) for alarm in config.deploy.rollout.alarms]
    )
