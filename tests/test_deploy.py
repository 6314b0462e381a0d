"""The stages ``deploy`` and ``verify`` against the local endpoint, and against moto's server as far as that goes."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy.sagemaker import session
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.records import DeployRecord, RegisterRecord, Result, VerifyRecord
from cv_factory_ops.stage import run_stage
from tests.bundles import SIZE, free_port, npy, start_cvf, wait_until, write_bundle
from tests.records import put_what_evidence_needs

Registered = Callable[[str, Bundle], str]


@pytest.fixture
def config(project: Callable[..., Path], home: Path) -> Iterator[ProjectConfig]:
    """A project with a local endpoint of its own, which the first deployment starts."""
    url = f"http://127.0.0.1:{free_port()}"
    yield load(project(deploy={"kind": "local", "url": url, "timeout": 90}, preprocessing={"size": SIZE}))
    lock = home / "var" / "endpoint" / "lock"
    if lock.exists():
        pid = int(lock.read_text())
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text())


def registered(home: Path, name: str, bundle: Bundle, **changes: Any) -> str:
    """URI of a run whose model version is registered: the record is written as ``cvf register`` would."""
    record = RegisterRecord(
        summary="version 1",
        model_name="tiny",
        model_version=1,
        mlflow_run_id="0",
        bundle=bundle.path.as_uri(),
        bundle_digest=bundle.digest,
    )
    run = (home / "runs" / name).as_uri()
    result = Result(stage="register", run=run, inputs_digest="", seconds=0, record=record.model_dump() | changes)
    put_what_evidence_needs(run, bundle.path.as_uri(), bundle.digest)
    storage.write_bytes(f"{run}/register/result.json", result.model_dump_json().encode())
    return run


def deploy(config: ProjectConfig, run: str, **options: bool) -> DeployRecord:
    return DeployRecord.model_validate(run_stage("deploy", config, run, **options).record)


def verify(config: ProjectConfig, run: str) -> VerifyRecord:
    return VerifyRecord.model_validate(run_stage("verify", config, run, force=True).record)


def counts(client: Any) -> tuple[int, ...]:
    """Models, endpoint configs and endpoints that exist (the local server lists endpoints only: its files are counted)."""
    state = Path(os.environ["CVF_HOME"]) / "var" / "endpoint"
    return tuple(len(list((state / kind).glob("*.json"))) for kind in ("model", "endpoint-config", "endpoint"))


def test_deploy_and_verify_and_deploy_again(config: ProjectConfig, home: Path) -> None:
    one, two = (write_bundle(home / name, seed) for seed, name in enumerate(("one", "two")))
    run = registered(home, "first", one)
    record = deploy(config, run)
    assert record.endpoint_name == "tiny"
    assert record.model_name == record.endpoint_config_name
    assert re.fullmatch(f"tiny-{one.digest[:12]}-[0-9a-f]{{8}}", record.model_name)
    assert record.previous_config_name is None
    assert verify(config, run).bundle_digest == one.digest

    assert deploy(config, run, force=True) == record, "a repetition finds everything there"
    assert counts(session(config)) == (1, 1, 1)

    second = registered(home, "second", two)
    for force in (False, True):
        assert deploy(config, second, force=force).previous_config_name == record.endpoint_config_name, "also told again"
    assert verify(config, second).bundle_digest == two.digest
    assert counts(session(config)) == (2, 2, 1)
    with pytest.raises(DataError, match=r"silent rollback: endpoint tiny serves endpoint config"):
        verify(config, run)


def test_a_version_whose_evidence_would_fail_is_not_rolled_out(config: ProjectConfig, home: Path) -> None:
    run = registered(home, "first", write_bundle(home / "one", 1))
    for missing, told in [
        ("evaluate/model_card.html", r"evaluate/model_card\.html: is not there, .* evidence .* run `cvf evaluate --force`"),
        ("evaluate/roc.png", r"evaluate/roc\.png: is not there, .* run `cvf evaluate --force`"),
        ("gate/criteria.png", r"gate/criteria\.png: is not there, .* run `cvf gate --force`"),
        ("preprocess/result.json", r"preprocess/result\.json: is not there; run `cvf preprocess`"),
    ]:
        content = storage.read_bytes(f"{run}/{missing}")
        storage.delete_tree(f"{run}/{missing}")
        refused = start_cvf("deploy", "--config", str(home / "project.yaml"), "--run", run, folder=home)
        assert refused.wait(60) == 3
        with pytest.raises(DataError, match=told):
            deploy(config, run)
        assert not (home / "var" / "endpoint").exists(), "nothing was asked of the endpoint, not even to start"
        storage.write_bytes(f"{run}/{missing}", content)
    assert deploy(config, run).previous_config_name is None


def test_requests_are_captured_but_not_the_probe_of_verify(config: ProjectConfig, home: Path) -> None:
    bundle = write_bundle(home / "one", 1)
    run = registered(home, "first", bundle)
    deploy(config, run)
    verify(config, run)
    runtime = session(config).client("sagemaker-runtime")
    runtime.invoke_endpoint(EndpointName="tiny", ContentType="application/x-npy", InferenceId="mine", Body=npy())
    wait_until(lambda: list(captures.read(config)))
    assert [capture.inference_id for capture in captures.read(config)] == ["mine"]
    folder = storage.path_of(captures.folder(config))
    assert folder is not None
    lines = [json.loads(line) for file in folder.rglob("*.jsonl") for line in file.read_text().splitlines()]
    assert len(lines) == 2, "the probe is captured, as it would be on AWS, and left out by the reader"


def test_a_silent_change_of_the_model_is_found(config: ProjectConfig, home: Path) -> None:
    """Somebody replaces the model under the same endpoint config: the name agrees, the answer does not."""
    one, two = (write_bundle(home / name, seed) for seed, name in enumerate(("one", "two")))
    run, other = registered(home, "first", one), registered(home, "second", two)
    record, changed = deploy(config, run), deploy(config, other)
    client = session(config).client("sagemaker")
    variants = client.describe_endpoint_config(EndpointConfigName=changed.endpoint_config_name)["ProductionVariants"]
    client.delete_endpoint_config(EndpointConfigName=record.endpoint_config_name)
    client.create_endpoint_config(EndpointConfigName=record.endpoint_config_name, ProductionVariants=variants)
    client.update_endpoint(EndpointName="tiny", EndpointConfigName=record.endpoint_config_name)
    status = functools.partial(client.describe_endpoint, EndpointName="tiny")
    wait_until(lambda: status()["EndpointStatus"] == "InService")
    with pytest.raises(DataError, match=f"silent rollback: endpoint tiny serves bundle {two.digest}, not {one.digest}"):
        verify(config, run)
    client.delete_endpoint(EndpointName="tiny")
    with pytest.raises(Unavailable, match=r"is (Deleting|missing), not InService"):
        verify(config, run)


def test_a_rollout_that_fails_names_the_reason(config: ProjectConfig, home: Path) -> None:
    good, bad = write_bundle(home / "good", 1), write_bundle(home / "bad", 2)
    (bad.path / "model.safetensors").write_bytes(b"no weights")
    broken = registered(home, "broken", Bundle.load(bad.path))
    reason = r"cannot be loaded as a model bundle"
    with pytest.raises(DataError, match=rf"it is Failed: .*{reason}"):
        deploy(config, broken)
    run = registered(home, "good", good)
    record = deploy(config, run)
    with pytest.raises(DataError, match=rf"it rolled back to {record.endpoint_config_name}: .*{reason}"):
        deploy(config, broken)
    assert verify(config, run).bundle_digest == good.digest


def test_a_killed_deployment_is_joined(config: ProjectConfig, home: Path) -> None:
    """kill -9 as soon as the endpoint is being created, updated: the retry waits for that rollout, and makes no other."""
    (home / "project.yaml").write_text(config.model_dump_json())
    runs = [registered(home, name, write_bundle(home / name, seed)) for seed, name in enumerate(("one", "two"))]
    client = session(config).client("sagemaker")
    for number, (run, status) in enumerate(zip(runs, ("Creating", "Updating"), strict=True)):
        process = start_cvf("deploy", "--config", str(home / "project.yaml"), "--run", run, folder=home)
        wait_until(lambda status=status: {item["EndpointStatus"] for item in endpoints(client)} == {status})
        process.kill()
        process.wait()
        record = deploy(config, run)
        assert verify(config, run).endpoint_config_name == record.endpoint_config_name
        assert counts(client) == (number + 1, number + 1, 1)


def endpoints(client: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = client.list_endpoints()["Endpoints"]
    return found


def test_what_was_registered_must_be_what_is_there(config: ProjectConfig, home: Path) -> None:
    bundle = write_bundle(home / "one", 1)
    with pytest.raises(DataError, match=r"has digest .* as registered; it was changed afterwards"):
        deploy(config, registered(home, "first", bundle, bundle_digest="0" * 64))


def test_the_task_log_has_plain_lines(config: ProjectConfig, home: Path) -> None:
    (home / "project.yaml").write_text(config.model_dump_json())
    run = registered(home, "first", write_bundle(home / "one", 1))
    arguments = ["deploy", "--config", str(home / "project.yaml"), "--run", run]
    done = subprocess.run(
        [sys.executable, "-m", "cv_factory_ops.cli", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["stage"] == "deploy"
    assert "deploy: created model tiny-" in done.stderr
    assert "\x1b" not in done.stderr
    assert all(line[2:3] == ":" for line in done.stderr.splitlines()), done.stderr


def test_the_same_calls_go_to_aws(
    project: Callable[..., Path], home: Path, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against moto's server, where an endpoint is InService at once."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER", s3_server)
    role, image = "arn:aws:iam::123456789012:role/sagemaker", "123456789012.dkr.ecr.us-east-1.amazonaws.com/cv-factory:1"
    aws = {"kind": "sagemaker", "image": image, "role_arn": role, "inference": {"kind": "realtime"}}
    aws["inference"] |= {"instance_type": "ml.c5.large", "instance_count": 2}
    config = load(project(deploy=aws, storage=f"s3://{bucket}/root"))
    bundle = write_bundle(home / "one", 1)
    client: Any = boto3.client("sagemaker")
    run = registered(home, "first", bundle)
    record = deploy(config, run)
    model = client.describe_model(ModelName=record.model_name)
    assert (model["PrimaryContainer"]["Image"], model["ExecutionRoleArn"]) == (image, role)
    assert model["PrimaryContainer"]["ModelDataUrl"] == f"{config.root}/models/{bundle.digest}/model.tar.gz"
    described = client.describe_endpoint_config(EndpointConfigName=record.endpoint_config_name)
    (variant,) = described["ProductionVariants"]
    assert (variant["InstanceType"], variant["InitialInstanceCount"]) == ("ml.c5.large", 2)
    assert described["DataCaptureConfig"]["DestinationS3Uri"] == captures.folder(config)
    endpoint = client.describe_endpoint(EndpointName="tiny")
    assert endpoint["EndpointConfigName"] == record.endpoint_config_name
    tags = {tag["Key"]: tag["Value"] for tag in client.list_tags(ResourceArn=endpoint["EndpointArn"])["Tags"]}
    served = {"endpoint-config": record.endpoint_config_name, "previous-config": ""}
    assert tags == {"project": "tiny", "run": run, "bundle-digest": bundle.digest} | served
    assert storage.exists(f"{config.root}/models/{bundle.digest}/model.tar.gz")
    assert deploy(config, run, force=True) == record

    changed = load(project(deploy=aws | {"image": f"{image}.1"}, storage=f"s3://{bucket}/root"))
    client.delete_endpoint(EndpointName="tiny")  # moto has no UpdateEndpoint
    again = deploy(changed, run, force=True)
    assert again.bundle_digest == record.bundle_digest
    assert client.describe_model(ModelName=again.model_name)["PrimaryContainer"]["Image"] == f"{image}.1"
    (variant,) = client.describe_endpoint_config(EndpointConfigName=again.endpoint_config_name)["ProductionVariants"]
    assert variant["ModelName"] == again.model_name
    longest = load(project(project="p" * 41, deploy=aws, storage=f"s3://{bucket}/root"))
    assert len(deploy(longest, run, force=True).model_name) == 63, "SageMaker's limit"


def test_a_wrong_setting_is_explained(
    project: Callable[..., Path], home: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = registered(home, "first", write_bundle(home / "one", 1))
    config = load(project(deploy={"kind": "sagemaker", "image": "i", "role_arn": "r"}))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "none"))
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"no AWS region"):
        deploy(config, run)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(ConfigError, match=r"allowed: s3://bucket/prefix"):
        deploy(config, run)
    taken = load(project(deploy={"kind": "local", "url": s3_server}))
    with pytest.raises(Unavailable, match=r"another program answers there"):
        deploy(taken, run)
