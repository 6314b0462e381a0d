"""Rollouts to Vertex AI: the SDK's own clients against a server that answers by the published REST API.

https://cloud.google.com/vertex-ai/docs/reference/rest/v1/projects.locations.endpoints, .../models, .../operations, and Cloud
Storage's https://cloud.google.com/storage/docs/json_api/v1/objects. What comes in is checked against Google's own messages:
an unknown field, or one of another type, is refused as the service does it.
"""

import base64
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy.rollout import open_deployer
from cv_factory_ops.deploy.sagemaker import session
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.serving.mounted import bundle_folder
from cv_factory_ops.stage import run_stage
from tests.bundles import write_bundle
from tests.https_server import Answer, HttpsServer, is_killed, private_key
from tests.test_deploy import deploy, registered, verify

pytest.importorskip("google.cloud.aiplatform_v1", reason="needs the extra vertex", exc_type=ImportError)
pytestmark = pytest.mark.filterwarnings("ignore:.*grpcio:FutureWarning")

PARENT = "projects/lab/locations/europe-west4"
ENDPOINT = f"{PARENT}/endpoints/tiny"
Project = Callable[..., ProjectConfig]


class VertexAi(HttpsServer):
    """Models, one region's endpoints, operations that are done when they were asked for twice, and a bucket."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.objects: dict[str, bytes] = {}
        self.models: dict[str, dict[str, Any]] = {}
        self.endpoints: dict[str, dict[str, Any]] = {}
        self.operations: dict[str, dict[str, Any]] = {}
        self.failing: dict[str, tuple[int, str]] = {}
        """Code and message with which deploying a model ends, by a part of its name."""
        self.refusing: dict[str, tuple[int, str]] = {}
        """Status and text of a model's answers, by a part of its name."""
        self.shifts: list[dict[str, int]] = []
        """Every traffic split, by model."""
        self.bodies: list[tuple[str, bytes]] = []

    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if path == "/token":
            return 200, {}, {"access_token": "t", "expires_in": 3600, "token_type": "Bearer"}
        if "/storage/" in path:
            return self._storage(path, query, headers, body)
        if headers.get("authorization") is None:
            return _error(401, "UNAUTHENTICATED", "Request is missing required authentication credential.")
        assert path.startswith("/v1/"), path
        name = path.removeprefix("/v1/")
        if match := re.fullmatch(r"(.+)/operations(?:/([^/]+))?", name):
            return self._operation(match[1], match[2])
        name, _, verb = name.partition(":")
        given = json.loads(body or b"{}") if verb != "rawPredict" else {}
        if name == f"{PARENT}/models" and verb == "upload":
            return self._upload(given)
        if "/models/" in name:
            return _found(self.models, name)
        if name == f"{PARENT}/endpoints":
            return self._create(query, given)
        if name not in self.endpoints:
            return _error(404, "NOT_FOUND", f"Endpoint {name} is not found.")
        work = {"deployModel": self._deploy, "undeployModel": self._undeploy}
        if verb == "rawPredict":
            return self._predict(name, headers, body)
        if verb:
            return work[verb](name, given)
        return self._update(name, query, given) if method == "PATCH" else (200, {}, self.endpoints[name])

    def _storage(self, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        import google_crc32c

        if path == "/upload/storage/v1/b/bundles/o":
            boundary = headers["content-type"].partition("boundary=")[2].strip('"').strip("'").encode()
            _, metadata, content, _ = body.split(b"--" + boundary)
            name = json.loads(metadata.partition(b"\r\n\r\n")[2])["name"]
            self.objects[name] = content.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
            checksum = base64.b64encode(google_crc32c.Checksum(self.objects[name]).digest()).decode()
            return 200, {}, {"name": name, "bucket": "bundles", "crc32c": checksum}
        if path == "/storage/v1/b/bundles":
            return 200, {}, {"kind": "storage#bucket", "name": "bundles", "location": "EUROPE-WEST4"}
        if path == "/storage/v1/b/bundles/o":
            found = [{"name": name, "bucket": "bundles"} for name in self.objects if name.startswith(query["prefix"])]
            return 200, {}, {"kind": "storage#objects", "items": found}
        return 200, {"content-type": "application/octet-stream"}, self.objects[path.rpartition("/b/bundles/o/")[2]]

    def _operation(self, resource: str, number: str | None) -> Answer:
        names = [f"{resource}/operations/{number}"] if number else [n for n in self.operations if n.startswith(f"{resource}/")]
        for name in names:
            operation = self.operations[name]
            operation["polls"] += 1
            if operation["polls"] == 3:
                operation["done"] = True
                operation |= operation["finish"]()
        shown = [
            {key: self.operations[name][key] for key in ("name", "done", "error", "response") if key in self.operations[name]}
            for name in names
        ]
        return 200, {}, shown[0] if number else {"operations": shown}

    def _begin(self, resource: str, finish: Callable[[], dict[str, Any]]) -> Answer:
        name = f"{resource}/operations/{len(self.operations) + 1}"
        self.operations[name] = {"name": name, "done": False, "polls": 0, "finish": finish}
        return 200, {}, {"name": name, "done": False}

    def _busy(self, resource: str) -> bool:
        return any(not found["done"] for name, found in self.operations.items() if name.startswith(f"{resource}/"))

    def _upload(self, given: dict[str, Any]) -> Answer:
        from google.cloud.aiplatform_v1 import UploadModelRequest

        _checked(UploadModelRequest, given)
        name = f"{PARENT}/models/{given['modelId']}"
        if name in self.models or self._busy(name):
            return _error(409, "ALREADY_EXISTS", f"Model {name} already exists.")
        folder = given["model"]["artifactUri"].removeprefix("gs://bundles/")
        assert f"{folder}/bundle.json" in self.objects, "the files come before the model"

        def finish() -> dict[str, Any]:
            self.models[name] = {**given["model"], "name": name}
            return _done({"model": name})

        return self._begin(name, finish)

    def _create(self, query: dict[str, str], given: dict[str, Any]) -> Answer:
        from google.cloud.aiplatform_v1 import Endpoint

        _checked(Endpoint, given)
        name = f"{PARENT}/endpoints/{query['endpointId']}"
        if name in self.endpoints or self._busy(name):
            return _error(409, "ALREADY_EXISTS", f"Endpoint {name} already exists.")

        def finish() -> dict[str, Any]:
            dns = {"dedicatedEndpointDns": f"127.0.0.1:{self.port}"} if given.get("dedicatedEndpointEnabled") else {}
            self.endpoints[name] = {**given, **dns, "name": name, "deployedModels": [], "trafficSplit": {}}
            return _done({"name": name})

        return self._begin(name, finish)

    def _update(self, name: str, query: dict[str, str], given: dict[str, Any]) -> Answer:
        from google.cloud.aiplatform_v1 import Endpoint

        _checked(Endpoint, given)
        mask = query["updateMask"].split(",")
        assert set(mask) <= {"labels", "trafficSplit", "predictRequestResponseLoggingConfig"}, mask
        endpoint = self.endpoints[name]
        if "trafficSplit" in mask:
            ids = {model["id"]: model["displayName"] for model in endpoint["deployedModels"]}
            split = given["trafficSplit"]
            if sum(split.values()) != 100 or not set(split) <= set(ids):
                return _error(400, "INVALID_ARGUMENT", "traffic_split must add up to 100 over deployed models.")
            self.shifts.append({ids[key]: share for key, share in split.items()})
        endpoint |= {key: given.get(key, {}) for key in mask}
        return 200, {}, endpoint

    def _deploy(self, name: str, given: dict[str, Any]) -> Answer:
        from google.cloud.aiplatform_v1 import DeployModelRequest

        _checked(DeployModelRequest, given)
        deployed = given["deployedModel"]
        assert re.fullmatch(r"[0-9]{1,10}", deployed["id"])
        if deployed["model"] not in self.models:
            return _error(404, "NOT_FOUND", f"Model {deployed['model']} is not found.")
        if self._busy(name):
            return _error(400, "FAILED_PRECONDITION", "There is another operation in progress on the endpoint.")
        assert deployed["displayName"] not in self.serving(), "deployed twice"

        def finish() -> dict[str, Any]:
            for part, (code, message) in self.failing.items():
                if part in deployed["displayName"]:  # JSON of a message is without what is empty
                    return {"error": {"code": code} | ({"message": message} if message else {})}
            self.endpoints[name]["deployedModels"].append(deployed)
            return _done({"deployedModel": deployed}, "DeployModelResponse")

        return self._begin(name, finish)

    def _undeploy(self, name: str, given: dict[str, Any]) -> Answer:
        endpoint, number = self.endpoints[name], given["deployedModelId"]
        if endpoint["trafficSplit"].get(number):
            return _error(400, "INVALID_ARGUMENT", "The deployed model still has traffic.")
        if self._busy(name):
            return _error(400, "FAILED_PRECONDITION", "There is another operation in progress on the endpoint.")

        def finish() -> dict[str, Any]:
            endpoint["deployedModels"] = [model for model in endpoint["deployedModels"] if model["id"] != number]
            endpoint["trafficSplit"].pop(number, None)
            return _done({}, "UndeployModelResponse")

        return self._begin(name, finish)

    def _predict(self, name: str, headers: dict[str, str], body: bytes) -> Answer:
        endpoint = self.endpoints[name]
        [(number, _)] = [item for item in endpoint["trafficSplit"].items() if item[1] == 100]
        [serving] = [model["displayName"] for model in endpoint["deployedModels"] if model["id"] == number]
        self.bodies.append((headers["content-type"], body))
        for part, (status, text) in self.refusing.items():
            if part in serving:
                return status, {}, text.encode()
        folder = self.models[f"{PARENT}/models/{serving}"]["artifactUri"].rpartition("/")[2]
        return 200, {}, {"bundle_digest": folder, "predictions": []}

    def serving(self) -> dict[str, int]:
        """Percent of the traffic of each deployed model."""
        endpoint = self.endpoints.get(ENDPOINT, {"deployedModels": []})
        return {model["displayName"]: endpoint["trafficSplit"].get(model["id"], 0) for model in endpoint["deployedModels"]}


def _error(code: int, status: str, message: str) -> Answer:
    """https://cloud.google.com/apis/design/errors#http_mapping"""
    return code, {}, {"error": {"code": code, "status": status, "message": message}}


def _found(known: dict[str, dict[str, Any]], name: str) -> Answer:
    return (200, {}, known[name]) if name in known else _error(404, "NOT_FOUND", f"{name} is not found.")


def _done(response: dict[str, Any], kind: str = "UploadModelResponse") -> dict[str, Any]:
    return {"response": {"@type": f"type.googleapis.com/google.cloud.aiplatform.v1.{kind}", **response}}


def _checked(kind: Any, given: dict[str, Any]) -> None:
    """Google's own definition of the message: an unknown field raises."""
    kind.from_json(json.dumps(given))


@pytest.fixture
def vertex(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VertexAi]:
    server = VertexAi(home)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.certificate))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
    account = {"type": "service_account", "client_email": "cvf@lab.iam", "token_uri": f"{server.url}/token"}
    # Of another universe than Google's own, so that no address of Google's is asked about it.
    account |= {"universe_domain": "tests.invalid", "project_id": "lab", "private_key_id": "1", "private_key": private_key()}
    (home / "account.json").write_text(json.dumps(account))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(home / "account.json"))
    yield server
    server.stop()


@pytest.fixture
def configured(vertex: VertexAi, project: Callable[..., Path]) -> Project:
    """The configuration of a project on Vertex AI; ``deploy`` settings by keyword."""
    settings = {"kind": "vertex", "google_project": "lab", "location": "europe-west4", "staging": "gs://bundles/cvf"}
    settings |= {"image": "europe-west4-docker.pkg.dev/lab/cvf/serving:1", "api": vertex.url, "timeout": 60}
    return lambda **more: load(project(deploy=settings | more))


@pytest.fixture
def pair(home: Path) -> tuple[Bundle, Bundle]:
    return write_bundle(home / "bundles" / "one", 1), write_bundle(home / "bundles" / "two", 2)


@pytest.fixture
def runs(home: Path, pair: tuple[Bundle, Bundle]) -> list[str]:
    return [registered(home, name, bundle) for name, bundle in zip(("first", "second"), pair, strict=True)]


CANARY = {"kind": "canary", "percent": 10, "wait_seconds": 0}


def test_the_first_rollout(vertex: VertexAi, configured: Project, pair: tuple[Bundle, Bundle], runs: list[str]) -> None:
    config = configured(log_table="bq://lab.logs.requests", capture_percent=25, labels={"team": "radiology"}, most=3)
    record = deploy(config, runs[0])
    assert re.fullmatch(f"tiny-{pair[0].digest[:12]}-[0-9a-f]{{8}}", record.endpoint_config_name)
    assert record.previous_config_name is None
    assert vertex.serving() == {record.endpoint_config_name: 100}
    [model] = vertex.models.values()
    assert model["containerSpec"]["command"] == ["cvf", "serve"]
    assert model["containerSpec"]["healthRoute"] == "/ping"
    assert model["containerSpec"]["predictRoute"] == "/invocations"
    endpoint = vertex.endpoints[ENDPOINT]
    logging = endpoint["predictRequestResponseLoggingConfig"]
    assert (logging["enabled"], logging["samplingRate"]) == (True, 0.25)
    assert (endpoint["labels"]["team"], endpoint["labels"]["endpoint-config"]) == ("radiology", record.endpoint_config_name)
    assert endpoint["deployedModels"][0]["dedicatedResources"]["maxReplicaCount"] == 3
    assert verify(config, runs[0]).bundle_digest == pair[0].digest
    assert vertex.bodies[0][0] == "application/json"
    assert "instances" in json.loads(vertex.bodies[0][1]), "the container's own request, as it is"
    before = len(vertex.operations)
    assert deploy(config, runs[0], force=True) == record
    assert len(vertex.operations) == before, "a repetition finds everything there"


def test_an_update_by_canary(vertex: VertexAi, configured: Project, runs: list[str]) -> None:
    first = deploy(configured(), runs[0])
    second = deploy(configured(rollout=CANARY), runs[1])
    old, new = first.endpoint_config_name, second.endpoint_config_name
    assert vertex.shifts == [{old: 100}, {new: 10, old: 90}, {new: 100}]
    assert vertex.serving() == {new: 100}, "the old one is gone"
    assert second.previous_config_name == old
    assert deploy(configured(rollout=CANARY), runs[1], force=True).previous_config_name == old
    open_deployer(configured()).put_back(old)
    assert vertex.serving() == {old: 100}


def test_a_kill_between_any_two_calls_leaves_one_of_each(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    """kill -9 right after the service has taken a change, then again after the next one, until there is none left."""
    config, previous = configured(rollout=CANARY), None
    for turn, bundle in enumerate(pair):
        killed = 0
        while is_killed(lambda turn=turn: run_stage("deploy", config, runs[turn]), 1, _is_change):
            killed += 1
        assert killed == (4, 6)[turn], "model, endpoint, deployment, traffic; model, labels, deployment, traffic twice, the old"
        record = deploy(config, runs[turn])
        assert record.previous_config_name == previous
        previous = record.endpoint_config_name
        assert vertex.serving() == {previous: 100}
        assert len(vertex.models) == turn + 1
        assert verify(config, runs[turn]).bundle_digest == bundle.digest


def _is_change(method: str, url: str) -> bool:
    """Requests that only read, of tokens and of bundles' files are not counted."""
    return method != "GET" and "/token" not in url and "/storage/" not in url


def test_a_rollout_in_progress_is_joined(vertex: VertexAi, configured: Project, runs: list[str]) -> None:
    deploy(configured(), runs[0])
    hurried = configured(timeout=1)
    finish = {name: found["polls"] for name, found in vertex.operations.items()}
    slow = VertexAi._begin

    def begin(server: VertexAi, resource: str, done: Callable[[], dict[str, Any]]) -> Answer:
        answer = slow(server, resource, done)
        server.operations[answer[2]["name"]]["polls"] = -30
        return answer

    vertex._begin = begin.__get__(vertex)  # type: ignore[method-assign]
    with pytest.raises(Unavailable, match=r"is still Updating after deploy.timeout; a retry goes on waiting"):
        deploy(hurried, runs[1])
    started = len(vertex.operations)
    assert started == len(finish) + 1
    del vertex._begin  # type: ignore[method-assign]
    vertex.operations[list(vertex.operations)[-1]]["polls"] = 0
    record = deploy(configured(), runs[1])
    assert sum("upload" in path for _, path in vertex.asked if path.endswith(":upload")) == 2, "one a bundle"
    assert vertex.serving() == {record.endpoint_config_name: 100}


def test_a_failed_operation_puts_the_old_one_back_and_is_named(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured(rollout=CANARY)
    record = deploy(config, runs[0])
    vertex.failing[pair[1].digest[:12]] = (9, "Model server terminated: model server container terminated: exit_code: 3.")
    with pytest.raises(DataError, match=rf"it went back to {record.endpoint_config_name}: .*exit_code: 3"):
        deploy(config, runs[1])
    assert vertex.serving() == {record.endpoint_config_name: 100}
    assert verify(config, runs[0]).bundle_digest == pair[0].digest
    vertex.failing[pair[1].digest[:12]] = (8, "The following quotas are exceeded: CustomModelServingCPUsPerProjectPerRegion")
    with pytest.raises(Unavailable, match="quotas are exceeded"):
        deploy(config, runs[1])
    vertex.failing.clear()
    vertex.failing[pair[1].digest[:12]] = (13, "")
    with pytest.raises(DataError, match="Vertex AI says: no reason"):
        deploy(config, runs[1])
    vertex.failing.clear()
    assert deploy(config, runs[1]).previous_config_name == record.endpoint_config_name


def test_another_operation_of_the_endpoint_is_no_failure(vertex: VertexAi, configured: Project, runs: list[str]) -> None:
    first = deploy(configured(), runs[0]).endpoint_config_name
    busy = _error(400, "FAILED_PRECONDITION", "There are other operations running on the Endpoint.")
    vertex.refused = {":undeployModel": [busy]}
    with pytest.raises(Unavailable, match=r"Vertex AI is busy: .*other operations running"):
        deploy(configured(), runs[1])
    assert sorted(vertex.serving().values()) == [0, 100], "nothing is taken back"
    assert vertex.serving()[first] == 0
    record = deploy(configured(), runs[1])
    assert (vertex.serving(), record.previous_config_name) == ({record.endpoint_config_name: 100}, first)


def test_a_deployment_that_somebody_removes_meanwhile(
    vertex: VertexAi, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = deploy(configured(), runs[0]).endpoint_config_name
    finish = vertex._operation

    def removed(resource: str, number: str | None) -> Answer:
        answer = finish(resource, number)
        if len(vertex.serving()) == 2:
            vertex.endpoints[ENDPOINT]["deployedModels"].pop()
        return answer

    monkeypatch.setattr(vertex, "_operation", removed)
    with pytest.raises(DataError, match=rf"it went back to {first}: deployment tiny-.* is gone"):
        deploy(configured(), runs[1])
    assert vertex.serving() == {first: 100}


def test_traffic_taken_away_takes_the_rollout_back(
    vertex: VertexAi, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What somebody who watches, or an alert, does; at a time when ``deploy.timeout`` is over."""
    monkeypatch.setattr("cv_factory_ops.deploy.shifting.WATCH_SECONDS", 0.2)
    first = deploy(configured(), runs[0])
    update, clock = vertex._update, time.monotonic

    def alert(name: str, query: dict[str, str], given: dict[str, Any]) -> Answer:
        answer = update(name, query, given)
        if 10 in given.get("trafficSplit", {}).values():
            endpoint = vertex.endpoints[name]
            endpoint["trafficSplit"] = {endpoint["deployedModels"][0]["id"]: 100}
            monkeypatch.setattr(time, "monotonic", lambda: clock() + 3600)
        return answer

    vertex._update = alert  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"it went back to .*: its traffic was taken away: 0 percent instead of 10"):
        deploy(configured(rollout=CANARY | {"wait_seconds": 20}), runs[1])
    assert vertex.serving() == {first.endpoint_config_name: 100}


def test_traffic_taken_away_while_the_stage_is_dead_takes_the_rollout_back(
    vertex: VertexAi, configured: Project, runs: list[str]
) -> None:
    config = configured(rollout=CANARY)
    first = deploy(config, runs[0]).endpoint_config_name
    assert is_killed(lambda: run_stage("deploy", config, runs[1]), 4, _is_change), "right after the canary has its share"
    assert vertex.serving()[first] == 90
    endpoint = vertex.endpoints[ENDPOINT]
    endpoint["trafficSplit"] = {endpoint["deployedModels"][0]["id"]: 100}
    for _ in ("traffic", "deployment"):
        assert is_killed(lambda: run_stage("deploy", config, runs[1]), 1, _is_change), "while it takes back"
    with pytest.raises(DataError, match=rf"it went back to {first}: its traffic was taken away: 0 percent instead of 10"):
        deploy(config, runs[1])
    assert vertex.serving() == {first: 100}
    assert {10, 100}.isdisjoint({share for shift in vertex.shifts[2:] for name, share in shift.items() if name != first})
    assert deploy(config, runs[1]).previous_config_name == first, "asked for again, it begins anew"


def test_a_kill_does_not_end_the_bake(
    vertex: VertexAi, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_factory_ops.deploy.shifting.WATCH_SECONDS", 0.2)
    first, config = deploy(configured(), runs[0]).endpoint_config_name, configured(rollout=CANARY | {"bake_seconds": 20})
    assert is_killed(lambda: run_stage("deploy", config, runs[1]), 5, _is_change), "right after it has all of the traffic"
    assert (vertex.serving()[first], len(vertex.serving())) == (0, 2)
    looked, answer = 0, vertex.answer

    def alert(method: str, path: str, *rest: Any) -> Answer:
        nonlocal looked
        looked += path == f"/v1/{ENDPOINT}"
        if looked == 3:  # the first of the watch
            endpoint = vertex.endpoints[ENDPOINT]
            endpoint["trafficSplit"] = {endpoint["deployedModels"][0]["id"]: 100}
        return answer(method, path, *rest)

    monkeypatch.setattr(vertex, "answer", alert)
    with pytest.raises(DataError, match=rf"it went back to {first}: its traffic was taken away: 0 percent instead of 100"):
        deploy(config, runs[1])
    assert vertex.serving() == {first: 100}


def test_labels_and_logging_reach_an_endpoint_that_is_there(
    vertex: VertexAi, configured: Project, runs: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    deploy(configured(labels={"team": "radiology"}, capture_percent=0), runs[0])
    vertex.endpoints[ENDPOINT]["labels"]["of"] = "others"
    logged = configured(labels={"team": "oncology"}, log_table="bq://lab.logs.requests", capture_percent=25)
    deploy(logged, runs[0], force=True)
    endpoint = vertex.endpoints[ENDPOINT]
    assert (endpoint["labels"]["team"], endpoint["labels"]["of"]) == ("oncology", "others")
    assert endpoint["predictRequestResponseLoggingConfig"]["samplingRate"] == 0.25
    changes = vertex.asked.count(("PATCH", f"/v1/{ENDPOINT}"))
    deploy(logged, runs[0], force=True)
    assert vertex.asked.count(("PATCH", f"/v1/{ENDPOINT}")) == changes, "it has all of that already"
    vertex.refused = {"PATCH": [_error(400, "INVALID_ARGUMENT", "Update mask is not supported.")]}
    deploy(configured(labels={"team": "oncology"}, capture_percent=0), runs[0], force=True)
    assert "requests are logged as before" in caplog.text


def test_throttling_is_waited_out_or_tried_again(vertex: VertexAi, configured: Project, runs: list[str]) -> None:
    throttled = _error(429, "RESOURCE_EXHAUSTED", "Quota exceeded for quota metric 'Resource management requests'.")
    vertex.refused = {
        text: [throttled] for text in (":upload", "POST /v1/projects/lab/locations/europe-west4/endpoints", ":rawPredict")
    }
    vertex.refused["PATCH"] = [_error(503, "UNAVAILABLE", "The service is currently unavailable.")]
    config = configured()
    deploy(config, runs[0])
    verify(config, runs[0])
    assert not any(vertex.refused.values()), "each was refused once"


def test_verify_sees_what_really_serves(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured()
    first, second = deploy(config, runs[0]), deploy(config, runs[1])
    model = f"{PARENT}/models/{second.model_name}"
    vertex.models[model]["artifactUri"] = f"gs://bundles/cvf/{pair[0].digest}"
    with pytest.raises(DataError, match=rf"silent rollback: .* serves bundle {pair[0].digest}, not {pair[1].digest}.*"):
        verify(config, runs[1])
    assert vertex.serving() == {first.endpoint_config_name: 100}, "and it was put back"
    with pytest.raises(DataError, match=r"silent rollback: .* endpoint config"):
        verify(config, runs[1])


def test_a_model_that_refuses_does_not_stay(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured()
    first = deploy(config, runs[0])
    deploy(config, runs[1])
    vertex.refusing[pair[1].digest[:12]] = (500, "no weights")
    with pytest.raises(DataError, match=rf"the model refused \(500\): no weights; .*put back to {first.endpoint_config_name}"):
        verify(config, runs[1])
    assert vertex.serving() == {first.endpoint_config_name: 100}


def test_a_kill_while_it_is_put_back_leaves_nothing_behind(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured()
    first = deploy(config, runs[0]).endpoint_config_name
    second = deploy(config, runs[1]).endpoint_config_name
    vertex.refusing[pair[1].digest[:12]] = (500, "no weights")
    assert is_killed(lambda: verify(config, runs[1]), 4, _is_change), "a request, labels, deployment, traffic"
    assert vertex.serving() == {first: 100, second: 0}
    labels = vertex.endpoints[ENDPOINT]["labels"]
    labels["endpoint-config"] = "tiny-next"
    with pytest.raises(DataError, match=r"silent rollback: .*it was put back: .*no weights"):
        verify(config, runs[1])
    assert second in vertex.serving(), "what another rollout has brought is its own"
    labels["endpoint-config"] = first
    with pytest.raises(DataError, match=r"silent rollback: .*it was put back: .*no weights"):
        verify(config, runs[1])
    assert vertex.serving() == {first: 100}


def test_a_model_that_was_deleted_cannot_be_put_back(vertex: VertexAi, configured: Project, runs: list[str]) -> None:
    first, second = (deploy(configured(), run).endpoint_config_name for run in runs)
    del vertex.models[f"{PARENT}/models/{first}"]
    with pytest.raises(DataError, match=rf"it went back to {second}: model {first} is gone"):
        open_deployer(configured()).put_back(first)
    assert vertex.serving() == {second: 100}


def test_what_is_missing_is_told(
    vertex: VertexAi, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    with pytest.raises(ConfigError, match="CloudWatch's alarms are of sagemaker and local only"):
        configured(rollout=CANARY | {"alarms": [{"metric": "ModelLatency"}]})
    with pytest.raises(
        ConfigError, match=r"deploy\.kind: vertex given; allowed where SageMaker's API is asked: local, sagemaker"
    ):
        session(configured())  # what the gateway begins with
    vertex.refused = {"/models": [_error(403, "PERMISSION_DENIED", "Permission 'aiplatform.models.get' denied")]}
    with pytest.raises(ConfigError, match=r"Vertex AI refused: .*aiplatform\.models\.get"):
        deploy(configured(), runs[0])
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(home / "none.json"))
    with pytest.raises(ConfigError, match="no credentials of Google Cloud"):
        deploy(configured(), runs[0])


def test_a_missing_extra_names_its_cure(configured: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured()
    monkeypatch.delitem(sys.modules, "cv_factory_ops.deploy.vertex", raising=False)
    monkeypatch.setitem(sys.modules, "google.cloud.aiplatform_v1", None)
    monkeypatch.delattr("google.cloud.aiplatform_v1")
    with pytest.raises(ConfigError, match=r"deploy\.kind: vertex: needs .*: pip install 'cv-factory\[vertex\]'"):
        open_deployer(config)


def test_the_container_finds_the_bundle_in_cloud_storage(
    vertex: VertexAi, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy(configured(), runs[0])
    [model] = vertex.models.values()
    monkeypatch.setenv("AIP_STORAGE_URI", model["artifactUri"])
    assert Bundle.load(bundle_folder()).digest == pair[0].digest
    vertex.objects[f"cvf/{pair[0].digest}/"] = b""  # what a console leaves as a folder
    assert Bundle.load(bundle_folder()).digest == pair[0].digest
    vertex.refused = {"/storage/v1/b/bundles/o": [_error(403, "PERMISSION_DENIED", "cvf@lab.iam may not storage.objects.list")]}
    with pytest.raises(ConfigError, match=r"gs://bundles/cvf/.*: may not be read: .*storage\.objects\.list"):
        bundle_folder()
    not_repeated = _error(501, "UNIMPLEMENTED", "Not now")
    vertex.refused = {"/storage/v1/b/bundles/o": [not_repeated]}
    with pytest.raises(Unavailable, match=r"gs://bundles/cvf/.*: cannot be read for now: .*Not now"):
        bundle_folder()
    monkeypatch.setenv("AIP_STORAGE_URI", "gs://bundles/nothing")
    with pytest.raises(DataError, match=r"gs://bundles/nothing: holds no bundle\.json"):
        bundle_folder()
