"""Rollouts to Azure Machine Learning: azure-identity, azure-core and azure-storage-blob against a server that answers by the
published REST API.

https://learn.microsoft.com/en-us/rest/api/azureml/online-endpoints, .../online-deployments, .../model-versions; asynchronous
operations and errors by https://learn.microsoft.com/en-us/azure/azure-resource-manager/management/async-operations; tokens by
the managed identity endpoint of App Service; Put Blob by https://learn.microsoft.com/en-us/rest/api/storageservices/put-blob.
"""

import json
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy.rollout import Busy, open_deployer
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.serving.mounted import bundle_folder
from cv_factory_ops.stage import run_stage
from tests.bundles import write_bundle
from tests.https_server import Answer, HttpsServer, is_killed
from tests.test_deploy import deploy, registered, verify

pytest.importorskip("azure.identity", reason="needs the extra azure")
pytest.importorskip("azure.storage.blob", reason="needs the extra azure")

WORKSPACE = "/subscriptions/s1/resourceGroups/lab/providers/Microsoft.MachineLearningServices/workspaces/imaging"
ENDPOINT = f"{WORKSPACE}/onlineEndpoints/tiny"
Project = Callable[..., ProjectConfig]

DEPLOYMENT = {
    *("endpointComputeType", "instanceType", "model", "environmentId", "environmentVariables", "requestSettings"),
    *("scaleSettings", "dataCollector"),
}
"""Properties of OnlineDeployment that are sent, by the API's reference; any other is refused here."""


class AzureMl(HttpsServer):
    """A workspace with its blobs; an operation is done when it was asked for twice."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.blobs: dict[str, bytes] = {}
        self.assets: dict[str, dict[str, Any]] = {}
        self.endpoint: dict[str, Any] = {}
        self.deployments: dict[str, dict[str, Any]] = {}
        self.operations: list[dict[str, Any]] = []
        self.failing: dict[str, tuple[str, str]] = {}
        """Code and message with which a deployment, or the creation of the endpoint, ends, by a part of its name."""
        self.undeletable = ""
        """Part of the name of deployments that cannot be deleted."""
        self.refusing: dict[str, Answer] = {}
        """A deployment's answers, by a part of its name."""
        self.shifts: list[dict[str, int]] = []
        self.bodies: list[tuple[str, bytes]] = []

    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer:
        if path == "/msi/token":
            assert headers["x-identity-header"] == "secret"
            return 200, {}, {"access_token": f"for {query['resource']}", "expires_on": "4102444800", "token_type": "Bearer"}
        audience = headers.get("authorization", "").removeprefix("Bearer for ")
        if headers["host"].partition(".")[2].startswith("blob."):
            assert (audience, headers["x-ms-blob-type"]) == ("https://storage.azure.com", "BlockBlob")
            self.blobs[path] = body
            return 201, {"etag": '"1"', "last-modified": "Sun, 01 Nov 2026 00:00:00 GMT"}, b""
        if path == "/score":
            assert audience == "https://ml.azure.com"
            return self._score(headers, body)
        if audience != self.url:
            return _error(401, "InvalidAuthenticationTokenAudience", "The access token has been obtained for wrong audience.")
        assert query == {"api-version": "2024-10-01"}, query
        if match := re.fullmatch(r"/subscriptions/s1/operations/(\d+)", path):
            return self._operation(int(match[1]))
        if match := re.fullmatch(r"/subscriptions/s1/results/(\d+)", path):
            return self._result(int(match[1]))
        given = json.loads(body or b"{}")
        if path == f"{WORKSPACE}/datastores/workspaceblobstore":
            place = {"accountName": "lab", "containerName": "azureml-1", "endpoint": f"tests.invalid:{self.port}"}
            return 200, {}, {"properties": {**place, "protocol": "https", "datastoreType": "AzureBlob"}}
        if re.fullmatch(rf"{WORKSPACE}/(models|environments)/tiny/versions/[a-z0-9-]+", path):
            return self._asset(method, path, given)
        if path == ENDPOINT:
            return self._endpoint(method, given)
        if path == f"{ENDPOINT}/deployments":
            return 200, {}, {"value": list(self.deployments.values()), "nextLink": None}
        assert path.startswith(f"{ENDPOINT}/deployments/"), path
        return self._deployment(method, path.rpartition("/")[2], given)

    def _begin(self, status: int, shown: Any, finish: Callable[[], dict[str, Any]]) -> Answer:
        self.operations.append({"status": "InProgress", "polls": 0, "finish": finish})
        number = len(self.operations) - 1
        place = f"{self.url}/subscriptions/s1/operations/{number}?api-version=2024-10-01"
        return status, {"Azure-AsyncOperation": place}, shown

    def _begin_delete(self, finish: Callable[[], dict[str, Any]]) -> Answer:
        """A deletion tells how it goes by the status of its ``Location`` alone."""
        _, headers, _ = self._begin(202, b"", finish)
        place = headers["Azure-AsyncOperation"].replace("/operations/", "/results/")
        return 202, {"Location": place, "Retry-After": "0", "x-ms-async-operation-timeout": "PT1H"}, b""

    def _result(self, number: int) -> Answer:
        operation = self.operations[number]
        self._step(operation)
        if operation["status"] == "Failed":
            return 400, {}, {"error": operation["error"]}
        return (202 if operation["status"] == "InProgress" else 204), {}, b""

    def _operation(self, number: int) -> Answer:
        operation = self.operations[number]
        self._step(operation)
        return 200, {}, {key: operation[key] for key in ("status", "error") if key in operation}

    def _step(self, operation: dict[str, Any]) -> None:
        operation["polls"] += 1
        if operation["polls"] == 3:
            operation |= {"status": "Succeeded"} | operation["finish"]()

    def _asset(self, method: str, path: str, given: dict[str, Any]) -> Answer:
        if method == "PUT":
            assert path not in self.assets, "a version is immutable"
            self.assets[path] = given
            return 201, {}, {**given, "id": path}
        return (200, {}, self.assets[path]) if path in self.assets else _error(404, "NotFound", f"{path} was not found.")

    def _endpoint(self, method: str, given: dict[str, Any]) -> Answer:
        if method == "GET":
            for operation in self.operations:  # what nobody waits for goes on as well
                if operation["status"] == "InProgress":
                    self._step(operation)
            return (200, {}, self.endpoint) if self.endpoint else _error(404, "UserError", "Endpoint tiny was not found.")
        if any(operation["status"] == "InProgress" for operation in self.operations):
            return _error(409, "Conflict", "Another operation on this endpoint is in progress.")
        if method == "DELETE":
            return self._begin_delete(lambda: self.endpoint.clear() or {})
        assert {"location", "properties"} <= set(given)
        assert given["properties"]["authMode"] == "AADToken"
        traffic = given["properties"].get("traffic") or {}
        ready = {name for name, found in self.deployments.items() if found["properties"]["provisioningState"] == "Succeeded"}
        ready |= set(self.endpoint.get("properties", {}).get("traffic") or {})
        if sum(traffic.values()) not in {0, 100} or not set(traffic) <= ready:
            return _error(400, "BadArgument", "Traffic must add up to 0 or 100 over deployments that have succeeded.")
        if traffic != (self.endpoint.get("properties", {}).get("traffic") or {}):
            self.shifts.append(traffic)
        is_created = not self.endpoint
        assert is_created or self.endpoint["properties"]["provisioningState"] == "Succeeded", "it can only be deleted"
        status = 201 if is_created else 200
        self.endpoint = {**given, "id": ENDPOINT, "name": "tiny"}
        properties = self.endpoint["properties"] | {"scoringUri": f"{self.url}/score"}
        self.endpoint["properties"] = properties | {"provisioningState": "Updating" if status == 200 else "Creating"}

        def finish() -> dict[str, Any]:
            failure = self.failing.get("endpoint") if is_created else None
            self.endpoint["properties"]["provisioningState"] = "Failed" if failure else "Succeeded"
            return {"status": "Failed", "error": dict(zip(("code", "message"), failure, strict=True))} if failure else {}

        return self._begin(status, self.endpoint, finish)

    def _deployment(self, method: str, name: str, given: dict[str, Any]) -> Answer:
        if method == "DELETE":
            return self._delete(name)
        if method == "GET":
            found = self.deployments.get(name)
            return (200, {}, found) if found else _error(404, "UserError", f"Deployment {name} was not found.")
        assert re.fullmatch(r"[a-z][a-z0-9-]{2,31}", name)
        assert name not in self.deployments, "deployed twice"
        properties = given["properties"]
        assert set(properties) <= DEPLOYMENT
        assert {properties["model"], properties["environmentId"]} <= set(self.assets)
        self.deployments[name] = {**given, "name": name}
        self.deployments[name]["properties"] = {**properties, "provisioningState": "Creating"}

        def finish() -> dict[str, Any]:
            failures = [failure for part, failure in self.failing.items() if part in name]
            self.deployments[name]["properties"]["provisioningState"] = "Failed" if failures else "Succeeded"
            return {"status": "Failed", "error": dict(zip(("code", "message"), failures[0], strict=True))} if failures else {}

        return self._begin(201, self.deployments[name], finish)

    def _delete(self, name: str) -> Answer:
        if name not in self.deployments:
            return 204, {}, b""
        if (self.endpoint["properties"].get("traffic") or {}).get(name):
            return _error(400, "BadRequest", "A deployment with traffic cannot be deleted.")
        self.deployments[name]["properties"]["provisioningState"] = "Deleting"

        def finish() -> dict[str, Any]:
            if self.undeletable and self.undeletable in name:
                self.deployments[name]["properties"]["provisioningState"] = "Succeeded"
                return {"status": "Failed", "error": {"code": "ScopeLocked", "message": "The resource is locked."}}
            del self.deployments[name]
            return {}

        return self._begin_delete(finish)

    def _score(self, headers: dict[str, str], body: bytes) -> Answer:
        [name] = [name for name, share in self.endpoint["properties"]["traffic"].items() if share == 100]
        self.bodies.append((headers["content-type"], body))
        for part, refusal in self.refusing.items():
            if part in name:
                return refusal
        model = self.assets[self.deployments[name]["properties"]["model"]]["properties"]["modelUri"]
        return 200, {}, {"bundle_digest": model.rpartition("/")[2], "predictions": []}

    def serving(self) -> dict[str, int]:
        """Percent of the traffic of each deployment."""
        return {name: self.endpoint["properties"]["traffic"].get(name, 0) for name in self.deployments}


def _error(status: int, code: str, message: str, **headers: str) -> Answer:
    return status, headers, {"error": {"code": code, "message": message}}


@pytest.fixture
def azure(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AzureMl]:
    server, resolve = AzureMl(home), socket.getaddrinfo

    def resolved(host: Any, *rest: Any, **more: Any) -> Any:
        return resolve("127.0.0.1" if str(host).endswith(".blob.tests.invalid") else host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(server.certificate))
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{server.url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "secret")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
    yield server
    server.stop()


@pytest.fixture
def configured(azure: AzureMl, project: Callable[..., Path]) -> Project:
    """The configuration of a project on Azure ML; ``deploy`` settings by keyword."""
    settings = {"kind": "azure", "subscription": "s1", "resource_group": "lab", "workspace": "imaging"}
    settings |= {"location": "westeurope", "image": "lab.azurecr.io/cvf/serving:1", "api": azure.url, "timeout": 60}
    return lambda **more: load(project(deploy=settings | more))


@pytest.fixture
def pair(home: Path) -> tuple[Bundle, Bundle]:
    return write_bundle(home / "bundles" / "one", 1), write_bundle(home / "bundles" / "two", 2)


@pytest.fixture
def runs(home: Path, pair: tuple[Bundle, Bundle]) -> list[str]:
    return [registered(home, name, bundle) for name, bundle in zip(("first", "second"), pair, strict=True)]


CANARY = {"kind": "canary", "percent": 10, "wait_seconds": 0}


def test_the_first_rollout(azure: AzureMl, configured: Project, pair: tuple[Bundle, Bundle], runs: list[str]) -> None:
    config = configured(capture_percent=25, instance_count=2, tags={"team": "radiology"})
    record = deploy(config, runs[0])
    name = record.endpoint_config_name
    assert re.fullmatch(f"b{pair[0].digest[:12]}-[0-9a-f]{{8}}", name)
    assert record.previous_config_name is None
    assert azure.serving() == {name: 100}
    deployment = azure.deployments[name]
    assert deployment["sku"]["capacity"] == 2
    collected = {"dataCollectionMode": "Enabled", "samplingRate": 0.25}
    assert deployment["properties"]["dataCollector"]["collections"] == {"request": collected, "response": collected}
    environment = azure.assets[f"{WORKSPACE}/environments/tiny/versions/{name}"]["properties"]
    assert environment["inferenceConfig"]["scoringRoute"] == {"path": "/invocations", "port": 8080}
    uri = azure.assets[f"{WORKSPACE}/models/tiny/versions/{name}"]["properties"]["modelUri"]
    folder = f"cv-factory/tiny/{pair[0].digest}"
    prefix = "azureml://subscriptions/s1/resourcegroups/lab/workspaces/imaging/datastores/workspaceblobstore/paths"
    assert uri == f"{prefix}/{folder}"
    assert azure.blobs[f"/azureml-1/{folder}/bundle.json"] == (pair[0].path / "bundle.json").read_bytes()
    assert azure.endpoint["tags"] == {
        "team": "radiology",
        "project": "tiny",
        "endpoint-config": name,
        "previous-config": "",
        "given-share": "100",
    }
    assert verify(config, runs[0]).bundle_digest == pair[0].digest
    before = len(azure.operations)
    assert deploy(config, runs[0], force=True) == record
    assert len(azure.operations) == before, "a repetition finds everything there"


def test_an_update_by_steps(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    first = deploy(configured(capture_percent=0), runs[0])
    assert "dataCollector" not in azure.deployments[first.endpoint_config_name]["properties"]
    linear = {"kind": "linear", "percent": 40, "wait_seconds": 0}
    second = deploy(configured(capture_percent=0, rollout=linear), runs[1])
    old, new = first.endpoint_config_name, second.endpoint_config_name
    assert azure.shifts == [{old: 100}, {new: 40, old: 60}, {new: 80, old: 20}, {new: 100}]
    assert (azure.serving(), second.previous_config_name) == ({new: 100}, old)
    open_deployer(configured(capture_percent=0)).put_back(old)
    assert azure.serving() == {old: 100}


def test_a_kill_between_any_two_calls_leaves_one_of_each(
    azure: AzureMl, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    """kill -9 right after the service has taken a change, then again after the next one, until there is none left."""
    config, previous = configured(rollout=CANARY), None
    for turn, bundle in enumerate(pair):
        killed = 0
        while is_killed(lambda turn=turn: run_stage("deploy", config, runs[turn]), 1, _is_change):
            killed += 1
        assert killed == (5, 7)[turn], "model, environment, endpoint or its tags, deployment, traffic (twice), the old one"
        record = deploy(config, runs[turn])
        assert record.previous_config_name == previous
        previous = record.endpoint_config_name
        assert azure.serving() == {previous: 100}
        assert len(azure.assets) == 2 * (turn + 1)
        assert verify(config, runs[turn]).bundle_digest == bundle.digest


def _is_change(method: str, url: str) -> bool:
    """Bundles' files are not counted."""
    return method in {"PUT", "DELETE"} and ".blob." not in url


def test_a_failed_operation_puts_the_old_one_back_and_is_named(
    azure: AzureMl, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured(rollout=CANARY)
    record = deploy(config, runs[0])
    broken = pair[1].digest[:12]
    azure.failing[broken] = ("BadRequest", "User container has crashed or terminated: exit code 3.")
    with pytest.raises(DataError, match=rf"it went back to {record.endpoint_config_name}: .*BadRequest: .*exit code 3"):
        deploy(config, runs[1])
    assert azure.serving() == {record.endpoint_config_name: 100}, "the failed deployment is removed"
    assert verify(config, runs[0]).bundle_digest == pair[0].digest
    azure.failing[broken] = ("OutOfCapacity", "The specified Azure ML Compute Instance or Compute Cluster has no capacity.")
    with pytest.raises(Unavailable, match=r"no capacity"):
        deploy(config, runs[1])
    azure.failing.clear()
    assert deploy(config, runs[1]).previous_config_name == record.endpoint_config_name, "what is left of it is replaced"


def test_a_deletion_that_fails_is_told(
    azure: AzureMl, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    first = deploy(configured(), runs[0]).endpoint_config_name
    azure.undeletable = first
    with pytest.raises(ConfigError, match=rf"it went back to {first}: .*The resource is locked"):
        deploy(configured(), runs[1])
    assert azure.serving() == {first: 100}


def test_deployments_that_have_failed_are_removed_unless_they_serve(
    azure: AzureMl, configured: Project, runs: list[str]
) -> None:
    first = deploy(configured(), runs[0]).endpoint_config_name
    left = {"name": "b0-left", "properties": {"provisioningState": "Canceled"}}
    azure.deployments["b0-left"] = left
    azure.deployments[first]["properties"]["provisioningState"] = "Failed"  # to scale it
    assert verify(configured(), runs[0]).endpoint_config_name == first
    record = deploy(configured(rollout=CANARY), runs[1])
    assert {record.endpoint_config_name: 10, first: 90} in azure.shifts
    assert (azure.serving(), record.previous_config_name) == ({record.endpoint_config_name: 100}, first)


def test_an_endpoint_whose_creation_has_failed_is_made_anew(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    azure.failing["endpoint"] = ("BadRequest", "The workspace's key vault is not accessible.")
    with pytest.raises(DataError, match=r"key vault is not accessible"):
        deploy(configured(), runs[0])
    azure.failing.clear()
    record = deploy(configured(), runs[0])
    assert azure.serving() == {record.endpoint_config_name: 100}


def test_settings_reach_an_endpoint_that_is_there(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    deploy(configured(tags={"team": "radiology"}), runs[0])
    deploy(configured(tags={"team": "oncology"}), runs[0], force=True)
    assert azure.endpoint["tags"]["team"] == "oncology"
    deploy(configured(public_access=False), runs[0], force=True)
    assert azure.endpoint["properties"]["publicNetworkAccess"] == "Disabled"


def test_a_request_is_repeated_once(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    deploy(configured(), runs[0])
    azure.refused["POST /score"] = [_error(503, "Busy", "Too many requests.", **{"retry-after": "0"})] * 20
    with pytest.raises(Busy):
        open_deployer(configured()).invoke(b"{}", "application/json")
    assert azure.asked.count(("POST", "/score")) == 2
    del azure.endpoint["properties"]["scoringUri"]
    with pytest.raises(Unavailable, match=r"has no address yet"):
        open_deployer(configured()).invoke(b"{}", "application/json")


def test_a_model_that_was_deleted_cannot_be_put_back(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    first, second = (deploy(configured(), run).endpoint_config_name for run in runs)
    del azure.assets[f"{WORKSPACE}/models/tiny/versions/{first}"]
    with pytest.raises(DataError, match=rf"it went back to {second}: model version {first} is gone"):
        open_deployer(configured()).put_back(first)
    assert azure.serving() == {second: 100}


def test_traffic_taken_away_takes_the_rollout_back(
    azure: AzureMl, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cv_factory_ops.deploy.shifting.WATCH_SECONDS", 0.2)
    first = deploy(configured(), runs[0]).endpoint_config_name
    update = azure._endpoint

    def alert(method: str, given: dict[str, Any]) -> Answer:
        answer = update(method, given)
        properties = azure.endpoint["properties"]
        traffic = properties.get("traffic", {})
        if method == "GET" and 10 in traffic.values() and properties["provisioningState"] == "Succeeded":
            properties["traffic"] = {name: 100 for name, share in traffic.items() if share == 90}
        return answer

    azure._endpoint = alert  # type: ignore[method-assign]
    with pytest.raises(DataError, match=r"it went back to .*: its traffic was taken away: 0 percent instead of 10"):
        deploy(configured(rollout=CANARY | {"wait_seconds": 20}), runs[1])
    assert azure.serving() == {first: 100}


def test_throttling_is_waited_out_or_tried_again(azure: AzureMl, configured: Project, runs: list[str]) -> None:
    throttled = _error(429, "TooManyRequests", "The request is being throttled.", **{"retry-after": "0"})
    changes = (f"PUT {WORKSPACE}/models", f"PUT {ENDPOINT}", f"GET {ENDPOINT}/deployments", "GET /subscriptions/s1/operations")
    azure.refused = {text: [throttled] for text in (*changes, "POST /score")}
    config = configured()
    deploy(config, runs[0])
    verify(config, runs[0])
    assert not any(azure.refused.values()), "each was refused once"
    azure.refused[f"GET {ENDPOINT}"] = [throttled] * 20
    with pytest.raises(Unavailable, match=r"throttled"):
        deploy(config, runs[1])
    azure.refused.clear()
    assert deploy(config, runs[1]).previous_config_name


def test_verify_sees_what_really_serves(
    azure: AzureMl, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle]
) -> None:
    config = configured()
    first, second = deploy(config, runs[0]), deploy(config, runs[1])
    model = azure.assets[f"{WORKSPACE}/models/tiny/versions/{second.model_name}"]["properties"]
    model["modelUri"] = model["modelUri"].replace(pair[1].digest, pair[0].digest)
    with pytest.raises(DataError, match=rf"silent rollback: .* serves bundle {pair[0].digest}, not {pair[1].digest}.*"):
        verify(config, runs[1])
    assert azure.serving() == {first.endpoint_config_name: 100}, "and it was put back"
    with pytest.raises(DataError, match=r"silent rollback: .* endpoint config"):
        verify(config, runs[1])


def test_a_model_that_refuses_does_not_stay(
    azure: AzureMl, configured: Project, runs: list[str], pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Azure answers 424 and tells the container's own status in a header."""
    config = configured()
    first = deploy(config, runs[0])
    deploy(config, runs[1])
    refused = {"ms-azureml-model-error-statuscode": "500", "ms-azureml-model-error-reason": "model_error"}
    azure.refusing[pair[1].digest[:12]] = (424, refused, b"no weights")
    with pytest.raises(DataError, match=rf"the model refused \(500\): no weights; .*put back to {first.endpoint_config_name}"):
        verify(config, runs[1])
    assert azure.serving() == {first.endpoint_config_name: 100}


def test_what_is_missing_is_told(
    azure: AzureMl, configured: Project, runs: list[str], monkeypatch: pytest.MonkeyPatch, project: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"3 to 32 characters"):
        load(project(project="p" * 33, deploy=configured().deploy.model_dump()))
    azure.refused = {"/models/": [_error(403, "AuthorizationFailed", "The client has no permission to models/versions/read")]}
    with pytest.raises(ConfigError, match=r"Azure refused: .*models/versions/read"):
        deploy(configured(), runs[0])
    azure.refused = {"/datastores/none": [_error(404, "UserError", "Not found")]}
    with pytest.raises(ConfigError, match=r"deploy\.datastore: 'none' given"):
        deploy(configured(datastore="none"), runs[0])
    monkeypatch.delenv("IDENTITY_ENDPOINT")
    monkeypatch.delenv("IDENTITY_HEADER")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "EnvironmentCredential")
    with pytest.raises(ConfigError, match=r"no credentials of Azure"):
        deploy(configured(), runs[0])


def test_the_container_finds_the_mounted_bundle(
    home: Path, pair: tuple[Bundle, Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(home / "bundles" / "one"))
    assert Bundle.load(bundle_folder()).digest == pair[0].digest
    monkeypatch.setenv("AZUREML_MODEL_DIR", str(home / "bundles"))
    with pytest.raises(DataError, match=r"holds 2 model bundles; allowed is one"):
        bundle_folder()
