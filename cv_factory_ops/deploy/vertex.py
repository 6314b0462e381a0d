"""Vertex AI: a Model a bundle and its settings, an Endpoint, a DeployedModel for what it serves, all with names from content.

Model and deployment are named ``<endpoint>-<bundle digest, 12 digits>-<settings digest, 8 digits>``. Requests go by
``rawPredict``, which passes any body to the container as it is (``predict`` would want ``{"instances": ...}``), to the
endpoint's dedicated address, where a request may have 10 MB (1.5 MB elsewhere).

The generated clients of google-cloud-aiplatform with their REST transport.
https://cloud.google.com/vertex-ai/docs/reference/rest, https://cloud.google.com/vertex-ai/docs/predictions/using-dedicated-endpoints,
https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
"""

from __future__ import annotations

import functools
import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from requests import RequestException

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import VertexDeploy
from cv_factory_ops.deploy.rollout import Release, settled
from cv_factory_ops.deploy.shifting import Seen, refusal
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # of the age of grpcio, which REST does without
    import google.auth
    import google.cloud.storage
    from google.api_core import exceptions
    from google.api_core.retry import Retry, if_exception_type
    from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
    from google.auth.transport.requests import AuthorizedSession
    from google.cloud import aiplatform_v1 as api

log = logging.getLogger("cvf")

PORT = 8080
SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
ELSEWHERE = {"rollout", "golden", "timeout", "capture_percent", "log_table", "labels", "api", "staging"}
"""Settings that are not of a deployment."""
BUSY = {"FAILED_PRECONDITION", "ABORTED"}
"""Status with which a change is refused while another operation of the endpoint runs, as one that ``RETRY`` asks for again."""
PASSING = {8, 14}
"""``google.rpc.Code`` of an operation that another try may do: no capacity or quota for now, not available."""
INVOKE_SECONDS = 60
RETRY = Retry(if_exception_type(exceptions.TooManyRequests, exceptions.ServiceUnavailable), initial=0.5, maximum=10, timeout=60)
"""Of every call, as the clients themselves try none again."""


class VertexEndpoint:
    """See :class:`cv_factory_ops.deploy.shifting.SplittingEndpoint`."""

    def __init__(self, config: ProjectConfig, settings: VertexDeploy) -> None:
        self._settings, self._id, self._project = settings, config.endpoint_name, config.project
        self._subject = f"endpoint {config.endpoint_name}"
        self._parent = f"projects/{settings.google_project}/locations/{settings.location}"
        self._endpoint = f"{self._parent}/endpoints/{self._id}"

    @contextmanager
    def explained(self) -> Iterator[None]:
        try:
            yield
        except (exceptions.GoogleAPIError, GoogleAuthError, RequestException) as error:
            raise self._explained(error) from None

    def config_name(self, packed_digest: str) -> str:
        held = self._settings.model_dump(mode="json", exclude=ELSEWHERE)
        return f"{self._id}-{packed_digest[:12]}-{storage.text_digest(str(sorted(held.items())))[:8]}"

    def look(self) -> Seen | None:
        is_changing = any(self._running(self._endpoint))  # asked first: what is done by now is in the description
        found = self._get()
        if found is None:
            return Seen({}, set(), "Creating", {}) if is_changing else None
        shares = {model.display_name: found.traffic_split.get(model.id, 0) for model in found.deployed_models}
        return Seen(shares, set(), "Updating" if is_changing else "", dict(found.labels))

    def create(self, tags: Mapping[str, str], deadline: float) -> None:
        endpoint = api.Endpoint(
            display_name=self._id,
            labels=self._labels(tags),
            dedicated_endpoint_enabled=True,
            predict_request_response_logging_config=self._logging(),
        )
        made = self._endpoints.create_endpoint(parent=self._parent, endpoint=endpoint, endpoint_id=self._id, retry=RETRY)
        self._finish(made.operation.name, deadline)

    def tag(self, tags: Mapping[str, str], deadline: float) -> None:
        found = self._described()
        labels = {**found.labels, **self._labels(tags)}
        if labels != dict(found.labels):
            self._update({"labels": labels})
        if found.predict_request_response_logging_config != self._logging():
            self._log_otherwise()

    def upload(self, name: str, release: Release, deadline: float) -> None:
        path = f"{self._parent}/models/{name}"
        for operation in self._running(path):  # of an earlier try
            self._finish(operation, deadline)
        try:
            self._models.get_model(name=path, retry=RETRY)
            return
        except exceptions.NotFound:
            pass
        artifacts = f"{self._settings.staging}/{release.bundle.packed_digest}"
        self._copy(release, artifacts)
        container = api.ModelContainerSpec(
            image_uri=self._settings.image,
            command=["cvf", "serve"],
            env=[api.EnvVar(name="OMP_NUM_THREADS", value="1")],
            ports=[api.Port(container_port=PORT)],
            health_route="/ping",
            predict_route="/invocations",
        )
        model = api.Model(
            display_name=name,
            description=f"bundle {release.bundle.digest}, run {release.run}",
            labels=self._labels({"bundle-digest": release.bundle.digest[:63]}),
            artifact_uri=artifacts,
            container_spec=container,
        )
        made = self._models.upload_model(
            request=api.UploadModelRequest(parent=self._parent, model=model, model_id=name), retry=RETRY
        )
        self._finish(made.operation.name, deadline)
        log.info("deploy: created model %s", name)

    def add(self, name: str, deadline: float) -> None:
        settings = self._settings
        machines = api.DedicatedResources(
            machine_spec=api.MachineSpec(machine_type=settings.machine_type),
            min_replica_count=settings.least,
            max_replica_count=settings.most,
        )
        deployed = api.DeployedModel(
            id=_number(name),
            display_name=name,
            model=f"{self._parent}/models/{name}",
            dedicated_resources=machines,
            service_account=settings.service_account,
        )
        try:
            made = self._endpoints.deploy_model(endpoint=self._endpoint, deployed_model=deployed, retry=RETRY)
        except exceptions.NotFound:
            raise DataError(f"model {name} is gone") from None
        self._finish(made.operation.name, deadline)

    def remove(self, name: str, deadline: float) -> None:
        found = self._get()
        for deployed in found.deployed_models if found else ():
            if deployed.display_name == name:
                made = self._endpoints.undeploy_model(endpoint=self._endpoint, deployed_model_id=deployed.id, retry=RETRY)
                self._finish(made.operation.name, deadline)

    def split(self, shares: Mapping[str, int], tags: Mapping[str, str], deadline: float) -> None:
        found = self._described()
        ids = {model.display_name: model.id for model in found.deployed_models}
        if gone := sorted(set(shares) - set(ids)):
            raise DataError(f"deployment {', '.join(gone)} is gone")
        split = {ids[name]: share for name, share in shares.items()}
        self._update({"labels": {**found.labels, **self._labels(tags)}, "traffic_split": split})

    def invoke(self, body: bytes, content_type: str) -> bytes:
        found = self._described()
        host = f"https://{found.dedicated_endpoint_dns}" if found.dedicated_endpoint_dns else self._api
        headers = {"content-type": content_type}
        answer = self._ask("POST", f"{host}/v1/{self._endpoint}:rawPredict", data=body, headers=headers)
        if not answer.ok:
            raise refusal(self._subject, answer.status_code, answer.text)
        content: bytes = answer.content
        return content

    @functools.cached_property
    def _credentials(self) -> Any:
        credentials, _ = google.auth.default(scopes=SCOPES)
        return credentials

    @functools.cached_property
    def _http(self) -> Any:
        return AuthorizedSession(self._credentials)

    @functools.cached_property
    def _endpoints(self) -> Any:
        return self._client(api.EndpointServiceClient)

    @functools.cached_property
    def _models(self) -> Any:
        return self._client(api.ModelServiceClient)

    @property
    def _api(self) -> str:
        return self._settings.api or f"https://{self._settings.location}-aiplatform.googleapis.com"

    def _client(self, kind: Any) -> Any:
        options = {"api_endpoint": self._api, "universe_domain": self._credentials.universe_domain}
        return kind(credentials=self._credentials, transport="rest", client_options=options)

    def _get(self) -> Any:
        try:
            return self._endpoints.get_endpoint(name=self._endpoint, retry=RETRY)
        except exceptions.NotFound:
            return None

    def _described(self) -> Any:
        found = self._get()
        if found is None:
            raise Unavailable(f"{self._subject}: is missing")
        return found

    def _log_otherwise(self) -> None:
        """The endpoint is of use also where the service takes these settings only when it makes one."""
        try:
            self._update({"predict_request_response_logging_config": self._logging()})
        except exceptions.BadRequest as error:
            told = self._explained(error)
            if isinstance(told, Unavailable):
                raise
            log.warning("deploy: requests are logged as before, not as capture_percent and log_table say: %s", told)

    def _update(self, fields: dict[str, Any]) -> None:
        endpoint = api.Endpoint(name=self._endpoint, **fields)
        self._endpoints.update_endpoint(endpoint=endpoint, update_mask={"paths": list(fields)}, retry=RETRY)

    def _running(self, resource: str) -> Iterator[str]:
        """Names of a resource's operations that are in progress; none where there is no such resource."""
        page = ""
        while True:
            found = self._ask("GET", f"{self._api}/v1/{resource}/operations", params={"pageToken": page} if page else None)
            if found.status_code == 404:
                return
            listed = _checked(found).json()
            yield from (item["name"] for item in listed.get("operations", ()) if not item.get("done"))
            if not (page := listed.get("nextPageToken", "")):
                return

    def _finish(self, operation: str, deadline: float) -> None:
        """
        Raises:
            DataError: it has failed, with its cause.
            Unavailable: it lacks capacity or quota for now, or takes longer.
        """
        done = settled(
            lambda: _checked(self._ask("GET", f"{self._api}/v1/{operation}")).json(),
            lambda found: "" if found.get("done") else "Updating",
            self._subject,
            deadline,
        )
        if error := done.get("error"):
            problem: type[CvFactoryError] = Unavailable if error.get("code") in PASSING else DataError
            raise problem(f"Vertex AI says: {' '.join(error.get('message', 'no reason').split())}")

    def _ask(self, method: str, url: str, **settings: Any) -> Any:
        """An HTTP answer by hand: the generated clients ask for operations below ``/ui/``, where the public API has none, and
        wrap a raw body in JSON.

        Raises:
            TooManyRequests: also after some tries.
        """

        def ask() -> Any:
            answer = self._http.request(method, url, timeout=INVOKE_SECONDS, **settings)
            if answer.status_code == 429:
                raise exceptions.from_http_response(answer)
            return answer

        return RETRY(ask)()

    def _copy(self, release: Release, artifacts: str) -> None:
        """The bundle's files to where the containers read them."""
        bucket, _, prefix = artifacts.removeprefix("gs://").partition("/")
        options, credentials = {"universe_domain": self._credentials.universe_domain}, self._credentials
        client = google.cloud.storage.Client(self._settings.google_project, credentials, client_options=options)
        for path in sorted(path for path in release.bundle.path.rglob("*") if path.is_file()):
            blob = client.bucket(bucket).blob(f"{prefix}/{path.relative_to(release.bundle.path).as_posix()}")
            blob.upload_from_filename(str(path), retry=RETRY)

    def _labels(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {**self._settings.labels, "project": self._project, **tags}

    def _logging(self) -> Any:
        settings = self._settings
        if not (settings.log_table and settings.capture_percent):
            return api.PredictRequestResponseLoggingConfig()
        return api.PredictRequestResponseLoggingConfig(
            enabled=True,
            sampling_rate=settings.capture_percent / 100,
            bigquery_destination=api.BigQueryDestination(output_uri=settings.log_table),
        )

    def _explained(self, error: Exception) -> CvFactoryError:
        told = " ".join(str(getattr(error, "message", error)).split())
        match error:
            case DefaultCredentialsError():
                return ConfigError(f"{self._subject}: no credentials of Google Cloud; set GOOGLE_APPLICATION_CREDENTIALS")
            case exceptions.TooManyRequests() | exceptions.Conflict() | exceptions.RetryError():
                return Unavailable(f"{self._subject}: Vertex AI is busy: {told}")
            case exceptions.ClientError() if _status(error) in BUSY:
                return Unavailable(f"{self._subject}: Vertex AI is busy: {told}")
            case exceptions.ClientError():
                return ConfigError(f"{self._subject}: Vertex AI refused: {told}")
            case _:
                return Unavailable(f"{self._subject}: {type(error).__name__}: {told}")


def _number(name: str) -> str:
    """The id of a deployment, of which Vertex AI allows ten digits."""
    return str(int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10**10)


def _status(error: exceptions.GoogleAPICallError) -> str:
    """Google's own word of an answer, which says more than HTTP's number."""
    try:
        return str(error.response.json()["error"]["status"])
    except (AttributeError, ValueError, KeyError, TypeError):
        return ""


def _checked(answer: Any) -> Any:
    if not answer.ok:
        raise exceptions.from_http_response(answer)
    return answer
