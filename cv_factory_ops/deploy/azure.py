"""Azure Machine Learning: a managed online endpoint, and a deployment of it for each bundle and its settings.

Model and environment (which image, which routes) are versions named like the deployment,
``b<bundle digest, 12 digits>-<settings digest, 8 digits>``: Azure allows 32 characters. A rollout puts ``traffic`` on the
endpoint, ``{"b1...": 90, "b2...": 10}``.

Azure Resource Manager's REST API by azure-core's pipeline, not azure-ai-ml: that cannot be imported beside marshmallow 4, which
Airflow's Amazon provider brings.
https://learn.microsoft.com/en-us/rest/api/azureml/online-deployments, https://learn.microsoft.com/en-us/azure/azure-resource-manager/management/async-operations
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from azure.core import PipelineClient
from azure.core.exceptions import AzureError, ClientAuthenticationError, HttpResponseError
from azure.core.pipeline.policies import BearerTokenCredentialPolicy, RetryPolicy
from azure.core.rest import HttpRequest
from azure.identity import DefaultAzureCredential
from azure.storage.blob import ContainerClient

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import AzureDeploy
from cv_factory_ops.deploy.rollout import Release, settled
from cv_factory_ops.deploy.shifting import Seen, refusal
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable

log = logging.getLogger("cvf")

VERSION = "2024-10-01"
"""Of the API."""
PORT = 8080
SCORING_SCOPE = "https://ml.azure.com/.default"
ELSEWHERE = {"rollout", "golden", "timeout", "tags", "api"}
"""Settings that are not of a deployment."""
IN_PROGRESS = {"Creating", "Updating", "Scaling", "Deleting"}
FAILED = {"Failed", "Canceled"}
PASSING = {"OutOfCapacity", "OutOfQuota", "InternalServerError"}
"""Error codes of an operation that another try may do."""
INVOKE_SECONDS = 60
ASK_SECONDS = 60
"""Of a request to the manager, with all its repetitions."""
MODEL_STATUS = "ms-azureml-model-error-statuscode"
"""Header of an answer 424: what the container answered."""


class AzureEndpoint:
    """See :class:`cv_factory_ops.deploy.shifting.SplittingEndpoint`."""

    def __init__(self, config: ProjectConfig, settings: AzureDeploy) -> None:
        self._settings, self._name, self._project = settings, config.endpoint_name, config.project
        self._subject = f"endpoint {config.endpoint_name}"
        self._workspace = (
            f"/subscriptions/{settings.subscription}/resourceGroups/{settings.resource_group}"
            f"/providers/Microsoft.MachineLearningServices/workspaces/{settings.workspace}"
        )
        self._endpoint = f"{self._workspace}/onlineEndpoints/{self._name}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except AzureError as error:
            raise self._explained(error) from None

    def config_name(self, packed_digest: str) -> str:
        held = self._settings.model_dump(mode="json", exclude=ELSEWHERE)
        return f"b{packed_digest[:12]}-{storage.text_digest(str(sorted(held.items())))[:8]}"

    def look(self) -> Seen | None:
        endpoint = self._get(self._endpoint)
        if endpoint is None:
            return None
        states = {item["name"]: item["properties"]["provisioningState"] for item in self._deployments()}
        own, traffic = endpoint["properties"]["provisioningState"], endpoint["properties"].get("traffic") or {}
        if own in FAILED and not states:
            return None
        changing = {own, *states.values()} & IN_PROGRESS
        # A deployment serves on where only a later change of it has failed.
        shares = {name: traffic.get(name, 0) for name, state in states.items() if state == "Succeeded" or traffic.get(name)}
        return Seen(shares, set(states) - set(shares), min(changing, default=""), endpoint.get("tags") or {})

    def create(self, tags: Mapping[str, str], deadline: float) -> None:
        if self._get(self._endpoint):  # its creation has failed
            self._change("DELETE", self._endpoint, None, deadline)
        body = {
            "location": self._settings.location,
            "identity": {"type": "SystemAssigned"},
            "tags": self._tags(tags),
            "properties": {"authMode": "AADToken", "publicNetworkAccess": self._access},
        }
        self._change("PUT", self._endpoint, body, deadline)

    def tag(self, tags: Mapping[str, str], deadline: float) -> None:
        self._update({}, tags, deadline)

    def upload(self, name: str, release: Release, deadline: float) -> None:
        if self._get(self._asset("models", name)) is None:
            model = {"modelType": "custom_model", "modelUri": self._copy(release)}
            model |= {"description": f"bundle {release.bundle.digest}, run {release.run}"}
            digest = self._tags({"bundle-digest": release.bundle.digest})
            self._change("PUT", self._asset("models", name), {"properties": {**model, "tags": digest}}, deadline)
            log.info("deploy: created model %s", name)
        routes = {"livenessRoute": "/ping", "readinessRoute": "/ping", "scoringRoute": "/invocations"}
        config = {route: {"path": path, "port": PORT} for route, path in routes.items()}
        environment = {"image": self._settings.image, "osType": "Linux", "inferenceConfig": config}
        if self._get(self._asset("environments", name)) is None:
            self._change("PUT", self._asset("environments", name), {"properties": environment}, deadline)

    def add(self, name: str, deadline: float) -> None:
        settings, path = self._settings, f"{self._endpoint}/deployments/{name}"
        if self._get(path):  # it has failed, and can only be deleted
            self.remove(name, deadline)
        if self._get(self._asset("models", name)) is None:
            raise DataError(f"model version {name} is gone")
        limits = {"requestTimeout": f"PT{INVOKE_SECONDS}S", "maxConcurrentRequestsPerInstance": settings.concurrent}
        properties = {
            "endpointComputeType": "Managed",
            "instanceType": settings.instance_type,
            "model": self._asset("models", name),
            "environmentId": self._asset("environments", name),
            "environmentVariables": {"OMP_NUM_THREADS": "1"},
            "requestSettings": limits,
            "scaleSettings": {"scaleType": "Default"},
        }
        if settings.capture_percent:
            collected = {"dataCollectionMode": "Enabled", "samplingRate": settings.capture_percent / 100}
            properties["dataCollector"] = {
                "collections": {"request": collected, "response": collected},
                "rollingRate": "Hour",
            }
        sku = {"name": "Default", "tier": "Standard", "capacity": settings.instance_count}
        body = {"location": settings.location, "tags": self._tags({}), "sku": sku, "properties": properties}
        self._change("PUT", path, body, deadline)

    def remove(self, name: str, deadline: float) -> None:
        self._change("DELETE", f"{self._endpoint}/deployments/{name}", None, deadline)

    def split(self, shares: Mapping[str, int], tags: Mapping[str, str], deadline: float) -> None:
        self._update({"traffic": dict(shares)}, tags, deadline)

    def invoke(self, body: bytes, content_type: str) -> bytes:
        uri = self._described()["properties"].get("scoringUri")
        if not uri:
            raise Unavailable(f"{self._subject}: has no address yet")
        headers = {"content-type": content_type}
        answer = self._scoring.send_request(
            HttpRequest("POST", uri, content=body, headers=headers), read_timeout=INVOKE_SECONDS
        )
        if answer.status_code != 200:
            raise refusal(self._subject, int(answer.headers.get(MODEL_STATUS, answer.status_code)), answer.text())
        content: bytes = answer.content
        return content

    @functools.cached_property
    def _credential(self) -> DefaultAzureCredential:
        return DefaultAzureCredential()

    @functools.cached_property
    def _manager(self) -> Any:
        return self._client(self._settings.api, f"{self._settings.api}/.default", 3, ASK_SECONDS)

    @functools.cached_property
    def _scoring(self) -> Any:
        return self._client("", SCORING_SCOPE, 1, INVOKE_SECONDS)  # who asks knows what to do where it is busy

    def _client(self, url: str, scope: str, tries: int, seconds: int) -> Any:
        """Of so many repetitions of a request, within so many seconds together."""
        again = RetryPolicy(retry_total=tries, retry_backoff_max=10, timeout=seconds)
        return PipelineClient(url, policies=[again, BearerTokenCredentialPolicy(self._credential, scope)])

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        """The HTTP answer; None where there is no such resource."""
        url = path if path.startswith("https://") else f"{self._settings.api}{path}?api-version={VERSION}"
        answer = self._manager.send_request(HttpRequest(method, url, json=body))
        if answer.status_code == 404:
            return None
        answer.raise_for_status()
        return answer

    def _get(self, path: str) -> dict[str, Any] | None:
        answer = self._ask("GET", path)
        return None if answer is None else answer.json()

    def _described(self) -> dict[str, Any]:
        """The endpoint as it may be sent back."""
        found = self._get(self._endpoint)
        if found is None:
            raise Unavailable(f"{self._subject}: is missing")
        return found

    @property
    def _access(self) -> str:
        return "Enabled" if self._settings.public_access else "Disabled"

    def _update(self, properties: Mapping[str, Any], tags: Mapping[str, str], deadline: float) -> None:
        """The endpoint with other properties and tags; nothing is asked for where it has them."""
        found = self._described()
        properties = {**found["properties"], "publicNetworkAccess": self._access, **properties}
        wanted = {**found, "properties": properties, "tags": {**(found.get("tags") or {}), **self._tags(tags)}}
        if wanted != found:
            self._change("PUT", self._endpoint, wanted, deadline)

    def _deployments(self) -> Iterator[dict[str, Any]]:
        page = self._get(f"{self._endpoint}/deployments")
        while page:
            yield from page["value"]
            page = self._get(page["nextLink"]) if page.get("nextLink") else None

    def _change(self, method: str, path: str, body: Any, deadline: float) -> None:
        """Ask for a change and wait until it is done; to delete what is not there is fine.

        Raises:
            DataError: it has failed, with its cause.
            Unavailable: it lacks capacity for now, or takes longer.
        """
        answer = self._ask(method, path, body)
        if answer is None and method != "DELETE":
            raise ConfigError(f"{self._subject}: {path.rpartition('/')[0]} is not there")
        if answer is None:
            return
        place = answer.headers.get("azure-asyncoperation")
        if place is None and answer.status_code == 202:  # a deletion
            place = answer.headers["location"]
        if place is None:
            return
        done = settled(lambda: self._progress(place), _in_progress, self._subject, deadline)
        if done.get("status") != "Succeeded":
            error = done.get("error") or {}
            problem: type[CvFactoryError] = Unavailable if error.get("code") in PASSING else DataError
            raise problem(f"Azure says: {error.get('code', done.get('status'))}: {' '.join(str(error.get('message')).split())}")

    def _progress(self, place: str) -> Mapping[str, Any]:
        """Of an operation: its own words, or, for a deletion, which has none, what the HTTP status says."""
        answer = self._ask("GET", place)
        if answer is None or answer.status_code == 202:
            return {"status": "InProgress"}
        found = answer.json() if answer.content else {}
        return found if "status" in found else {"status": "Succeeded"}

    def _copy(self, release: Release) -> str:
        """The bundle's files to the workspace's blob storage; returns their folder, as Azure ML names it."""
        settings, prefix = self._settings, f"cv-factory/{self._project}/{release.bundle.packed_digest}"
        place = self._get(f"{self._workspace}/datastores/{settings.datastore}")
        if place is None or place["properties"].get("datastoreType") != "AzureBlob":
            raise ConfigError(f"deploy.datastore: {settings.datastore!r} given; allowed: a blob datastore of the workspace")
        found = place["properties"]
        account = f"{found['protocol']}://{found['accountName']}.blob.{found['endpoint']}"
        with ContainerClient(account, found["containerName"], credential=self._credential) as container:
            for path in sorted(path for path in release.bundle.path.rglob("*") if path.is_file()):
                name = f"{prefix}/{path.relative_to(release.bundle.path).as_posix()}"
                container.upload_blob(name, path.read_bytes(), overwrite=True)
        workspace = (
            f"subscriptions/{settings.subscription}/resourcegroups/{settings.resource_group}/workspaces/{settings.workspace}"
        )
        return f"azureml://{workspace}/datastores/{settings.datastore}/paths/{prefix}"

    def _asset(self, kind: str, name: str) -> str:
        return f"{self._workspace}/{kind}/{self._name}/versions/{name}"

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {**self._settings.tags, "project": self._project, **tags}

    def _explained(self, error: AzureError) -> CvFactoryError:
        told = " ".join(str(error.message).split())
        match error:
            case ClientAuthenticationError():
                return ConfigError(f"{self._subject}: no credentials of Azure, or wrong ones: {told}")
            case HttpResponseError(status_code=400 | 401 | 403 | 404 | 405 | 422):
                return ConfigError(f"{self._subject}: Azure refused: {told}")
            case _:
                return Unavailable(f"{self._subject}: {type(error).__name__}: {told}")


def _in_progress(operation: Mapping[str, Any]) -> str:
    return "" if operation.get("status") in {"Succeeded", "Failed", "Canceled"} else "Updating"
