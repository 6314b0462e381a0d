"""The local endpoint as a real process, seen through unmodified boto3 clients."""

import functools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from botocore.validate import ParamValidator
from prometheus_client.parser import text_string_to_metric_families

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import pack
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy.local import ensure_running, stop
from cv_factory_ops.deploy.spool import Spool
from cv_factory_ops.errors import CvFactoryError, Unavailable
from tests.bundles import IMAGE, free_port, npy, png, start_cvf, wait_until, write_bundle

KEYS = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
ROLE = "arn:aws:iam::000000000000:role/local"


class Server:
    """A ``cvf endpoint`` process over one state directory, with its clients."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.state, self.port = folder, folder / "state", free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        once = Config(retries={"max_attempts": 0})
        self.control: Any = boto3.client("sagemaker", endpoint_url=self.url, config=once, **KEYS)
        self.runtime: Any = boto3.client("sagemaker-runtime", endpoint_url=self.url, config=once, **KEYS)
        self.start()

    def start(self) -> None:
        where = ("--state", str(self.state), "--port", str(self.port), "--files", str(self.folder.parents[1]))
        self.process = start_cvf("endpoint", *where, folder=self.folder)
        wait_until(lambda: self.process.poll() is not None or answers(self.url))
        assert self.process.poll() is None, (self.folder / "endpoint.log").read_text()

    def stop(self, how: int = signal.SIGTERM) -> None:
        self.process.send_signal(how)
        self.process.wait(30)

    def status(self, name: str) -> str:
        status: str = self.control.describe_endpoint(EndpointName=name)["EndpointStatus"]
        return status

    def wait(self, name: str, status: str = "InService") -> None:
        wait_until(lambda: self.status(name) not in {"Creating", "Updating", "SystemUpdating", "RollingBack"})
        assert self.status(name) == status, self.control.describe_endpoint(EndpointName=name)

    def serving_processes(self) -> list[int]:
        return serving_processes(self.state)

    def model(self, name: str, archive: Path | str, **container: Any) -> None:
        url = archive.as_uri() if isinstance(archive, Path) else archive
        primary = {"Image": "cv-factory", "ModelDataUrl": url, **container}
        self.control.create_model(ModelName=name, PrimaryContainer=primary, ExecutionRoleArn=ROLE)

    def invoke(self, name: str, body: bytes | None = None, content_type: str = "application/x-npy", **more: str) -> Any:
        return self.runtime.invoke_endpoint(
            EndpointName=name, Body=npy() if body is None else body, ContentType=content_type, **more
        )

    def digest(self, name: str) -> str:
        digest: str = json.loads(self.invoke(name)["Body"].read())["bundle_digest"]
        return digest


def variant(model: str, name: str = "AllTraffic", **more: Any) -> dict[str, Any]:
    return {"VariantName": name, "ModelName": model, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large", **more}


def answers(url: str) -> bool:
    try:
        return "endpoints" in httpx.get(f"{url}/ping", trust_env=False).json()
    except httpx.TransportError:
        return False


def serving_processes(state: Path) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if b"\0serve\0" in arguments and str(state).encode() in arguments:
            found.append(int(folder.name))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Archives of two good bundles and of a broken one, and the digests."""
    folder = tmp_path_factory.mktemp("models")
    found: dict[str, Any] = {}
    for seed, name in enumerate(("one", "two")):
        found[f"{name}_digest"] = write_bundle(folder / name, seed).digest
        found[name] = folder / f"{name}.tar.gz"
        pack(folder / name, found[name])
    found["broken"] = folder / "broken.tar.gz"
    found["broken"].write_bytes(found["one"].read_bytes()[:200])
    (folder / "one" / "model.safetensors").write_bytes(b"no weights")
    found["weightless"] = folder / "weightless.tar.gz"
    pack(folder / "one", found["weightless"])
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Any]) -> Iterator[Server]:
    """A server with the models ``one``, ``two`` and ``broken``, and the endpoint ``steady`` of the first."""
    running = Server(tmp_path_factory.mktemp("endpoint"))
    for name in ("one", "two", "broken", "weightless"):
        running.model(name, models[name])
        running.control.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant(name)])
    running.control.create_endpoint(EndpointName="steady", EndpointConfigName="one")
    running.wait("steady")
    yield running
    running.stop()
    wait_until(lambda: not running.serving_processes())


def error_of(call: Any, **arguments: Any) -> tuple[str, str]:
    with pytest.raises(ClientError) as caught:
        call(**arguments)
    return caught.value.response["Error"]["Code"], caught.value.response["Error"]["Message"]


def test_every_answer_has_the_shape_of_botocores_model(server: Server) -> None:
    """botocore parses leniently, so each parsed answer is validated against the output shape as well."""
    client = server.control
    capture = {
        "InitialSamplingPercentage": 50,
        "DestinationS3Uri": "s3://bucket/captures",
        "CaptureOptions": [{"CaptureMode": "Input"}],
    }
    calls: list[tuple[str, dict[str, Any]]] = [
        ("DescribeModel", {"ModelName": "one"}),
        (
            "CreateEndpointConfig",
            {"EndpointConfigName": "shape", "ProductionVariants": [variant("one")], "DataCaptureConfig": capture},
        ),
        ("DescribeEndpointConfig", {"EndpointConfigName": "shape"}),
        (
            "CreateEndpoint",
            {"EndpointName": "shape", "EndpointConfigName": "shape", "Tags": [{"Key": "project", "Value": "tiny"}]},
        ),
        ("DescribeEndpoint", {"EndpointName": "shape"}),
        ("ListEndpoints", {"MaxResults": 1, "SortBy": "Name"}),
    ]
    for operation, arguments in calls:
        check_answer(client, operation, arguments)
    server.wait("shape")
    described = check_answer(client, "DescribeEndpoint", {"EndpointName": "shape"})
    assert described["EndpointConfigName"] == "shape"
    assert described["DataCaptureConfig"]["CurrentSamplingPercentage"] == 50
    assert described["ProductionVariants"][0]["VariantName"] == "AllTraffic"
    arn = described["EndpointArn"]
    check_answer(client, "AddTags", {"ResourceArn": arn, "Tags": [{"Key": "run", "Value": "7"}]})
    tags = check_answer(client, "ListTags", {"ResourceArn": arn})["Tags"]
    assert tags == [{"Key": "project", "Value": "tiny"}, {"Key": "run", "Value": "7"}]
    check_answer(client, "UpdateEndpoint", {"EndpointName": "shape", "EndpointConfigName": "two"})
    pending = check_answer(client, "DescribeEndpoint", {"EndpointName": "shape"})["PendingDeploymentSummary"]
    assert pending["EndpointConfigName"] == "two"
    server.wait("shape")
    check_answer(client, "DeleteEndpoint", {"EndpointName": "shape"})
    wait_until(lambda: "shape" not in names(client))
    client.delete_endpoint_config(EndpointConfigName="shape")


def test_the_typed_resources_of_sagemaker_read_every_answer(server: Server, project: Callable[..., Path]) -> None:
    from sagemaker.core.resources import Endpoint, EndpointConfig, Model

    capturing(server, "typed", load(project()))
    session: Any = boto3.Session(**KEYS)
    session.client = functools.partial(session.client, endpoint_url=server.url)
    where = {"session": session, "region": "us-east-1"}
    endpoint = Endpoint.get(endpoint_name="typed", **where)
    assert endpoint.endpoint_status == "InService"
    config = EndpointConfig.get(endpoint_config_name=endpoint.endpoint_config_name, **where)
    assert Model.get(model_name=config.production_variants[0].model_name, **where).primary_container.image == "cv-factory"
    endpoint.delete()
    endpoint.wait_for_delete(poll=1, timeout=30)
    config.delete()


def check_answer(client: Any, operation: str, arguments: dict[str, Any]) -> dict[str, Any]:
    shape = client.meta.service_model.operation_model(operation)
    method = next(python for python, name in client.meta.method_to_api_mapping.items() if name == operation)
    answer: dict[str, Any] = getattr(client, method)(**arguments)
    metadata = answer.pop("ResponseMetadata")
    assert metadata["HTTPStatusCode"] == 200
    if shape.output_shape:
        report = ParamValidator().validate(answer, shape.output_shape)
        assert not report.has_errors(), report.generate_report()
        assert set(answer) <= set(shape.output_shape.members)
    return answer


def names(client: Any) -> list[str]:
    pages = client.get_paginator("list_endpoints").paginate(PaginationConfig={"PageSize": 1})
    return [item["EndpointName"] for page in pages for item in page["Endpoints"]]


def test_errors_read_like_those_of_aws(server: Server) -> None:
    control = server.control
    assert error_of(control.describe_model, ModelName="none") == (
        "ValidationException",
        'Could not find model "arn:aws:sagemaker:us-east-1:000000000000:model/none".',
    )
    assert "Could not find endpoint configuration" in error_of(control.describe_endpoint_config, EndpointConfigName="x")[1]
    assert "Could not find endpoint " in error_of(control.delete_endpoint, EndpointName="none")[1]
    code, message = error_of(server.model, name="one", archive="s3://bucket/model.tar.gz")
    assert (code, message.partition(" model ")[0]) == ("ValidationException", "Cannot create already existing")
    code, message = error_of(control.create_endpoint, EndpointName="steady", EndpointConfigName="one")
    assert message.startswith("Cannot create already existing endpoint ")
    assert "null at 'ModelDataUrl'" in error_of(control.create_model, ModelName="empty", PrimaryContainer={})[1]
    outside = error_of(control.create_model, ModelName="../../outside", PrimaryContainer={"ModelDataUrl": "s3://b/k"})
    assert "must satisfy regular expression" in outside[1]
    assert error_of(control.list_clusters)[0] == "UnknownOperationException"
    for body in (b"{", b"[]"):
        answer = httpx.post(f"{server.url}/", content=body, headers={"x-amz-target": "SageMaker.DescribeModel"})
        assert (answer.status_code, answer.json()["__type"]) == (400, "SerializationException")


def test_a_caller_cannot_choose_what_the_server_runs_reads_or_writes(server: Server, models: dict[str, Any]) -> None:
    control = server.control
    for name in ("LD_PRELOAD", "PYTHONPATH", "PATH", "CVF_X\n"):
        container = {"ModelDataUrl": models["one"].as_uri(), "Environment": {name: "theirs"}}
        assert "Environment: " in error_of(control.create_model, ModelName="theirs", PrimaryContainer=container)[1]
    outside, up = "file:///etc/passwd", f"{server.state.as_uri()}/{'../' * 20}etc"
    for place in (outside, up, "http://elsewhere/model.tar.gz"):
        refused = error_of(control.create_model, ModelName="theirs", PrimaryContainer={"ModelDataUrl": place})[1]
        assert refused.startswith("ModelDataUrl"), refused
    assert "Could not find model" in error_of(control.describe_model, ModelName="theirs")[1]

    capture = {"InitialSamplingPercentage": 1, "DestinationS3Uri": up, "CaptureOptions": [{"CaptureMode": "Input"}]}
    failures = {"S3OutputPath": server.state.as_uri(), "S3FailurePath": outside}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"ProductionVariants": [variant("one", "../../outside")]}, "must satisfy regular expression"),
        ({"ProductionVariants": [variant("one")], "DataCaptureConfig": capture}, "DestinationS3Uri: file://"),
        (
            {"ProductionVariants": [variant("one")], "AsyncInferenceConfig": {"OutputConfig": {"S3OutputPath": outside}}},
            "S3OutputPath: file:///etc/passwd given; allowed on this machine: below ",
        ),
        ({"ProductionVariants": [variant("one")], "AsyncInferenceConfig": {"OutputConfig": failures}}, "S3FailurePath: "),
    ]
    for given, reason in wrong:
        assert reason in error_of(control.create_endpoint_config, EndpointConfigName="theirs", **given)[1]
    assert "Could not find" in error_of(control.describe_endpoint_config, EndpointConfigName="theirs")[1]


def test_requests_for_another_host_are_refused_unless_the_server_is_for_others(server: Server, tmp_path: Path) -> None:
    """A page whose name leads to this machine (DNS rebinding) comes with that name."""
    foreign = {"host": "pages.example:80"}
    assert httpx.get(f"{server.url}/ping", headers=foreign, trust_env=False).status_code == 400
    assert httpx.post(server.url, headers=foreign | {"x-amz-target": "SageMaker.ListEndpoints"}).status_code == 400
    assert answers(server.url.replace("127.0.0.1", "localhost"))
    port = free_port()
    where = ("--state", str(tmp_path / "state"), "--host", "127.0.0.2", "--port", str(port))
    other = start_cvf("endpoint", *where, folder=tmp_path)
    try:
        wait_until(lambda: answers(f"http://127.0.0.2:{port}"))
        assert httpx.get(f"http://127.0.0.2:{port}/ping", headers=foreign, trust_env=False).status_code == 200
    finally:
        other.terminate()
        other.wait(30)


def test_the_runtime_answers_and_refuses(server: Server, models: dict[str, Any]) -> None:
    answer = server.invoke("steady", Accept="application/json")
    assert answer["InvokedProductionVariant"] == "AllTraffic"
    assert answer["ContentType"] == "application/json"
    assert json.loads(answer["Body"].read())["bundle_digest"] == models["one_digest"]
    code, message = error_of(server.invoke, name="none")
    assert (code, message) == ("ValidationError", "Endpoint none of account 000000000000 not found.")
    assert error_of(server.invoke, name="steady", TargetVariant="none")[0] == "ValidationError"
    assert error_of(server.invoke, name="steady", body=b"0" * (6 * 1024 * 1024 + 1))[0] == "ValidationError"
    with pytest.raises(ClientError) as refused:
        server.invoke("steady", b"a,b", "text/csv")
    assert refused.value.response["Error"]["Code"] == "ModelError"
    assert refused.value.response["OriginalStatusCode"] == 415
    assert json.loads(refused.value.response["OriginalMessage"])["code"] == "content_type"


def test_an_endpoint_of_a_broken_model_fails_and_can_only_be_deleted(server: Server) -> None:
    for name, reason in (("broken", "is not a usable model.tar.gz"), ("weightless", "cannot be loaded as a model bundle")):
        server.control.create_endpoint(EndpointName=name, EndpointConfigName=name)
        server.wait(name, "Failed")
        described = check_answer(server.control, "DescribeEndpoint", {"EndpointName": name})
        assert reason in described["FailureReason"]
        assert error_of(server.invoke, name=name)[0] == "ValidationError"
        assert "failed endpoint" in error_of(server.control.update_endpoint, EndpointName=name, EndpointConfigName="one")[1]
        server.control.delete_endpoint(EndpointName=name)
        wait_until(lambda name=name: name not in names(server.control))


def test_an_unhealthy_update_goes_back_to_the_old_model(server: Server, models: dict[str, Any]) -> None:
    server.control.update_endpoint(EndpointName="steady", EndpointConfigName="weightless")
    code, message = error_of(server.control.update_endpoint, EndpointName="steady", EndpointConfigName="two")
    assert (code, message.partition(" endpoint ")[0]) == ("ValidationException", "Cannot update in-progress")
    server.wait("steady")
    described = server.control.describe_endpoint(EndpointName="steady")
    assert described["EndpointConfigName"] == "one"
    assert "cannot be loaded as a model bundle" in described["FailureReason"]
    assert server.digest("steady") == models["one_digest"]


def test_no_request_fails_while_the_traffic_shifts(server: Server, models: dict[str, Any]) -> None:
    digests: list[str] = []
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            digests.append(server.digest("steady"))

    with ThreadPoolExecutor(3) as pool:
        senders = [pool.submit(send) for _ in range(3)]
        try:
            for target in ("two", "one"):
                server.control.update_endpoint(EndpointName="steady", EndpointConfigName=target)
                server.wait("steady")
                assert server.digest("steady") == models[f"{target}_digest"]
        finally:
            stop.set()
        for sender in senders:
            sender.result()
    assert set(digests) == {models["one_digest"], models["two_digest"]}
    wait_until(lambda: len(server.serving_processes()) == 1)


def test_a_serving_process_that_dies_is_started_again(server: Server, models: dict[str, Any]) -> None:
    server.digest("steady")
    (before,) = server.serving_processes()
    os.kill(before, signal.SIGKILL)
    wait_until(lambda: server.serving_processes() not in ([], [before]))
    assert server.digest("steady") == models["one_digest"]


def answered(server: Server, endpoint: str) -> dict[str, float]:
    """Requests that each variant has answered, as Prometheus is told; each family stands there once."""
    families = list(text_string_to_metric_families(httpx.get(f"{server.url}/metrics", trust_env=False).text))
    assert len({family.name for family in families}) == len(families)
    counts = [sample for family in families for sample in family.samples if sample.name == "cvf_serving_request_seconds_count"]
    return {count.labels["variant"]: count.value for count in counts if count.labels["endpoint"] == endpoint}


def test_two_variants_share_the_traffic_and_can_be_chosen(server: Server, models: dict[str, Any]) -> None:
    variants = [variant("one", "A", InitialVariantWeight=1.0), variant("two", "B", InitialVariantWeight=0.0)]
    server.control.create_endpoint_config(EndpointConfigName="pair", ProductionVariants=variants)
    server.control.create_endpoint(EndpointName="pair", EndpointConfigName="pair")
    server.wait("pair")
    assert {server.invoke("pair")["InvokedProductionVariant"] for _ in range(5)} == {"A"}
    chosen = server.invoke("pair", TargetVariant="B")
    assert json.loads(chosen["Body"].read())["bundle_digest"] == models["two_digest"]
    assert answered(server, "pair") == {"A": 5, "B": 1}
    server.control.delete_endpoint(EndpointName="pair")
    wait_until(lambda: len(server.serving_processes()) == 1)


def capturing(server: Server, name: str, config: ProjectConfig, **capture: Any) -> None:
    """An endpoint of the model ``one`` that captures into a project's folder."""
    default = {
        "InitialSamplingPercentage": 100,
        "DestinationS3Uri": captures.folder(config),
        "CaptureOptions": [{"CaptureMode": "Input"}, {"CaptureMode": "Output"}],
    }
    server.control.create_endpoint_config(
        EndpointConfigName=f"{name}-config", ProductionVariants=[variant("one")], DataCaptureConfig=default | capture
    )
    server.control.create_endpoint(EndpointName=name, EndpointConfigName=f"{name}-config")
    server.wait(name)


def remove(server: Server, name: str) -> None:
    server.control.delete_endpoint(EndpointName=name)
    server.control.delete_endpoint_config(EndpointConfigName=f"{name}-config")
    wait_until(lambda: name not in names(server.control))


def test_captures_can_be_read_again(server: Server, models: dict[str, Any], project: Callable[..., Path]) -> None:
    config = load(project())
    capturing(server, "tiny", config)
    batch = json.dumps({"instances": [IMAGE.tolist()]}).encode()
    sent = [(npy(), "application/x-npy"), (png(), "image/png"), (batch, "application/json")]
    for number, (body, content_type) in enumerate(sent):
        server.invoke("tiny", body, content_type, InferenceId=f"case-{number}")
    server.invoke("tiny", InferenceId=f"{captures.PROBE}1")
    with pytest.raises(ClientError):
        server.invoke("tiny", b"broken", "image/png", InferenceId="refused")
    server.invoke("tiny")
    wait_until(lambda: len(list(captures.read(config))) == 4)
    read = list(captures.read(config))
    assert [(capture.request, capture.content_type) for capture in read[:3]] == sent
    assert [capture.inference_id for capture in read[:3]] == ["case-0", "case-1", "case-2"]
    assert read[3].inference_id, "a request without an id goes by its event's"
    assert {json.loads(capture.answer)["bundle_digest"] for capture in read} == {models["one_digest"]}
    assert [captures.at(config, capture.position) for capture in read] == read
    remove(server, "tiny")


def test_capture_follows_its_settings(server: Server, project: Callable[..., Path]) -> None:
    config = load(project())
    capturing(server, "silent", config, EnableCapture=False)
    capturing(server, "none", config, InitialSamplingPercentage=0)
    capturing(server, "half", config, CaptureOptions=[{"CaptureMode": "Output"}])
    for name in ("silent", "none", "half"):
        server.invoke(name)
        remove(server, name)
    folder = storage.path_of(captures.folder(config))
    assert folder is not None
    wait_until(lambda: list(folder.rglob("*.jsonl")))
    (file,) = folder.rglob("*.jsonl")
    assert file.relative_to(folder).parts[:2] == ("half", "AllTraffic")
    assert set(json.loads(file.read_text())["captureData"]) == {"endpointOutput"}


def test_models_and_captures_may_lie_on_s3(
    server: Server, models: dict[str, Any], project: Callable[..., Path], bucket: str, tmp_path: Path
) -> None:
    config = load(project(storage=f"s3://{bucket}/root"))
    storage.upload_file(models["one"], f"s3://{bucket}/models/one.tar.gz")
    other = Server(tmp_path / "s3")
    try:
        other.model("one", f"s3://{bucket}/models/one.tar.gz")
        capturing(other, "tiny", config)
        other.invoke("tiny", InferenceId="on-s3")
        wait_until(lambda: list(captures.read(config)))
        assert next(captures.read(config)).inference_id == "on-s3"
    finally:
        other.stop()


def test_a_killed_server_comes_back_with_everything(
    models: dict[str, Any], project: Callable[..., Path], tmp_path: Path
) -> None:
    config = load(project())
    server = Server(tmp_path / "killed")
    try:
        for name in ("one", "two"):
            server.model(name, models[name])
        server.control.create_endpoint_config(EndpointConfigName="two", ProductionVariants=[variant("two")])
        capturing(server, "tiny", config)
        for number in range(5):
            server.invoke("tiny", InferenceId=str(number))
        server.control.update_endpoint(EndpointName="tiny", EndpointConfigName="two")
        server.stop(signal.SIGKILL)
        wait_until(lambda: not server.serving_processes())
        server.start()
        assert server.digest("tiny") == models["one_digest"], "requests wait for the restart"
        server.wait("tiny")
        assert server.control.describe_endpoint(EndpointName="tiny")["EndpointConfigName"] == "two", "the update goes on"
        assert server.digest("tiny") == models["two_digest"]
        wait_until(lambda: [capture.inference_id for capture in captures.read(config)][:5] == list("01234"))
    finally:
        server.stop()
    wait_until(lambda: not server.serving_processes())
    assert json.loads((server.state / "endpoint" / "tiny.json").read_text())["EndpointStatus"] == "InService"


def test_one_server_a_state_directory_and_port(server: Server, tmp_path: Path) -> None:
    second = start_cvf("endpoint", "--state", str(server.state), "--port", str(free_port()), folder=tmp_path)
    assert second.wait(30) == 75
    assert f"another endpoint server works here (process {server.process.pid})" in (tmp_path / "endpoint.log").read_text()
    third = start_cvf("endpoint", "--state", str(tmp_path / "other"), "--port", str(server.port), folder=tmp_path)
    assert third.wait(30) == 75
    assert f"127.0.0.1:{server.port}: cannot listen here" in (tmp_path / "endpoint.log").read_text()


def test_ensure_running_starts_a_server_once(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: ensure_running(url, tmp_path / "state"), range(2)))
    pid = int((tmp_path / "state" / "lock").read_text())
    ensure_running(url, tmp_path / "state")
    assert int((tmp_path / "state" / "lock").read_text()) == pid
    assert httpx.get(f"{url}/ping").json() == {"endpoints": {}}
    stop(tmp_path / "state")
    assert not answers(url)
    stop(tmp_path / "state")
    stop(tmp_path / "never")


def test_ensure_running_says_what_is_in_the_way(s3_server: str, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"another program answers there"):
        ensure_running(s3_server, tmp_path)
    with pytest.raises(Unavailable, match=r"is not this machine"):
        ensure_running("http://endpoint.invalid:1", tmp_path)


def test_the_spool_keeps_what_its_destination_refuses(tmp_path: Path) -> None:
    wall = tmp_path / "target"
    wall.write_text("a file where a folder should be")
    spool = Spool(tmp_path / "spool")
    for line in ("1", "2"):
        spool.write(f"{wall.as_uri()}/tiny/AllTraffic", line)
    spool.close()
    assert list((tmp_path / "spool").rglob("*.jsonl"))
    wall.unlink()
    Spool(tmp_path / "spool").close()
    assert not list((tmp_path / "spool").rglob("*.jsonl"))
    assert "".join(file.read_text() for file in sorted(wall.rglob("*.jsonl"))) == "1\n2\n"


def test_a_full_disk_costs_captures_only_until_there_is_space(tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("128k")
    target = tmp_path / "target"
    spool = Spool(disk / "spool")
    destination = f"{target.as_uri()}/tiny/AllTraffic"
    spool.write(destination, "before")
    with pytest.raises(OSError, match="No space left"):
        spool.write(destination, "x" * 1_000_000)
    wait_until(lambda: not list(disk.rglob("*.jsonl")))  # the mover has closed the file whose write failed
    (disk / "filler").write_bytes(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize))
    with pytest.raises((OSError, CvFactoryError)):
        spool.write(f"{target.as_uri()}/other/AllTraffic", "lost")
    (disk / "filler").unlink()
    spool.write(destination, "after")
    wait_until(lambda: delivered(target) == "before\nafter\n")
    spool.close()
    assert delivered(target) == "before\nafter\n", "whole lines only"


def delivered(target: Path) -> str:
    return "".join(file.read_text() for file in sorted(target.rglob("[!.]*.jsonl")))
