"""The gateway's routes. Nothing of a request, not even a file's name, is logged, counted or told in an error.

A refusal is ``{"error": one line, "code": reason}``, as the container's; ``inference_id`` joins an answer with its capture and
its late label.
"""

from __future__ import annotations

import asyncio
import os
import urllib.parse
import uuid
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

import cv_factory_ops
from cv_factory_ops import captures
from cv_factory_ops.answers import Answer, ExplainedAnswer, SimilarAnswer
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import CvFactoryError, Rejected
from cv_factory_ops.features.index import MOST, TEXT, filters
from cv_factory_ops.features.words import report_words
from cv_factory_ops.gateway.access import Gate, scheme
from cv_factory_ops.gateway.endpoint import SERVING, Endpoint, Reply
from cv_factory_ops.gateway.metrics import CONTENT_TYPE_LATEST, Metrics
from cv_factory_ops.gateway.observed import Observed, refusal
from cv_factory_ops.gateway.schema import (
    Explained,
    Feedback,
    Health,
    Predicted,
    PredictedBatch,
    Refusal,
    SimilarStudies,
    Stored,
)
from cv_factory_ops.gateway.studies import Batches, Intake, Study, read_study, require_type
from cv_factory_ops.server import Refused, listen, run

TOGETHER = 8
"""Studies of a batch that are under way at a time: one caller's batch leaves room for others."""
LONGEST_ATTRIBUTES = 1024
"""Characters of custom attributes that SageMaker takes."""
LABELS_BYTES = 1 << 20
"""Of a body of late labels: a thousand of them, several times over."""
Body = TypeVar("Body", Answer, ExplainedAnswer, SimilarAnswer)
Method = Literal["grad_cam", "integrated_gradients", "lime", "shap"]
REASONS = {
    400: "It cannot be used; `identified`: it is not de-identified",
    401: "No valid key or token",
    406: "An explanation comes in the domain's format where a study of the domain is sent",
    413: "Too many bytes, pixels or studies",
    415: "Another content type",
    422: "A parameter or the body is not as described",
    429: "Too many studies; see `Retry-After`",
    500: "An error of the gateway",
    502: "The model has failed, or the gateway may not ask it",
    503: "The endpoint is not there, or busy; see `Retry-After`",
    504: "The endpoint took too long",
}


def serve(config: ProjectConfig, host: str, port: int) -> None:
    """Serve until SIGTERM; requests in hand are answered first.

    Raises:
        ConfigError: keys, limits or region are not set as they must be.
        Unavailable: the port is taken, or the local endpoint cannot be started.
    """
    app = create_app(config)
    with listen(host, port) as listener:
        run(app, listener)


def create_app(config: ProjectConfig) -> FastAPI:
    """The application of a project.

    Raises:
        ConfigError, Unavailable: as :func:`serve`.
    """
    metrics = Metrics()
    gateway = _Gateway(config, metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gateway.close()

    app = FastAPI(
        title=f"CV Factory: {config.project}",
        version=cv_factory_ops.__version__,
        description="Answers of the project's model. Studies must be de-identified"
        + (" or are de-identified here." if config.gateway.deidentify else " by their sender."),
        lifespan=lifespan,
        redoc_url=None,
        responses={status: {"model": Refusal, "description": REASONS[status]} for status in (422, 500)},
    )
    _add_routes(app, gateway, config)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    if config.gateway.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.gateway.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id"],
            expose_headers=["X-Request-Id", "X-Inference-Id", "Retry-After"],
        )
    app.add_middleware(Observed, metrics=metrics, most=config.gateway.in_flight)
    return app


class _Gateway:
    """What the routes work with."""

    def __init__(self, config: ProjectConfig, metrics: Metrics) -> None:
        self.config, self.metrics = config, metrics
        self.gate = Gate(config.gateway)
        self.intake, self.batches = Intake(config), Batches(config.gateway)
        self.endpoint = Endpoint(config, metrics)
        self._threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="intake")

    async def ask(self, study: Study, accept: str = "application/json", more: str = "") -> tuple[str, Reply]:
        """Inference id and answer."""
        ready = await asyncio.get_running_loop().run_in_executor(self._threads, self.intake.ready, study)
        inference_id = str(uuid.uuid4())
        return inference_id, await self.endpoint.invoke(ready.content, ready.content_type, inference_id, accept, more)

    async def predicted(self, study: Study) -> Predicted:
        """The answer for one study."""
        inference_id, reply = await self.ask(study)
        answer = _understood(Answer, reply)
        return Predicted(inference_id=inference_id, prediction=answer.predictions[0], bundle_digest=answer.bundle_digest)

    async def predicted_batch(self, studies: list[Study]) -> PredictedBatch:
        """The answers for several; where not even one could be asked for, the reason of the first."""
        room = asyncio.Semaphore(TOGETHER)

        async def one(study: Study) -> Predicted | Refused:
            async with room:
                try:
                    return await self.predicted(study)
                except Refused as error:
                    return error

        answers = await asyncio.gather(*map(one, studies))
        failures = [answer for answer in answers if isinstance(answer, Refused) and answer.status >= 500]
        if len(failures) == len(answers):
            raise failures[0]
        told = [Refusal(error=str(a), code=a.code) if isinstance(a, Refused) else a for a in answers]
        return PredictedBatch(answers=told)

    async def explained(self, study: Study, method: str, wants_study: bool) -> Explained | Response:
        """The answer with its reason; as a study of the domain, where that is wanted."""
        accept = self.intake.domain.content_type if wants_study else "application/json"
        inference_id, reply = await self.ask(study, accept, f"explain={method}")
        if wants_study:
            return Response(reply.body, media_type=accept, headers={"X-Inference-Id": inference_id})
        answer = _understood(ExplainedAnswer, reply)
        return Explained(inference_id=inference_id, prediction=answer.predictions[0], bundle_digest=answer.bundle_digest)

    async def similar(self, study: Study, k: int | None, where: list[str], text: str) -> SimilarStudies:
        """The answer with similar studies; of the text nothing but words goes on, as captures keep what a request asks for."""
        words = [(TEXT, words)] if (words := report_words(text)) else []
        try:
            asked = urllib.parse.urlencode([("similar", str(k or "")), *words, *filters(where)])
        except Rejected as error:
            raise Refused(400, error.code, str(error)) from None
        if len(asked) > LONGEST_ATTRIBUTES:
            raise Refused(400, "filter", f"filters and text take {len(asked)} characters; allowed are {LONGEST_ATTRIBUTES}")
        inference_id, reply = await self.ask(study, more=asked)
        answer = _understood(SimilarAnswer, reply)
        return SimilarStudies(
            inference_id=inference_id,
            prediction=answer.predictions[0],
            similar=answer.similar[0],
            finding=answer.findings[0],
            bundle_digest=answer.bundle_digest,
        )

    async def store(self, labels: dict[str, str]) -> int:
        """Keep late labels; returns how many."""
        if not set(labels.values()) <= set(self.config.labels):
            raise Refused(400, "unknown_label", f"a label is none of: {', '.join(self.config.labels)}")
        if any(name.startswith(captures.PROBE) for name in labels):
            raise Refused(400, "unknown_id", f"ids that begin with {captures.PROBE} are the platform's own")
        try:
            await asyncio.to_thread(captures.add_labels, self.config, labels)
        except CvFactoryError:  # its line names places
            raise Refused(503, "storage", "the labels could not be stored; send them again") from None
        self.metrics.labels.inc(len(labels))
        return len(labels)

    async def ready(self) -> None:
        """
        Raises:
            Refused: ``not_ready``.
        """
        if self.endpoint.breaker.state == "open":
            raise Refused(503, "not_ready", "the endpoint has not answered for a while")
        if (status := await self.endpoint.status()) not in SERVING:
            raise Refused(503, "not_ready", f"the endpoint is {status}")

    def close(self) -> None:
        """Let what is under way end."""
        self.endpoint.close()
        self._threads.shutdown()


def _add_routes(app: FastAPI, gateway: _Gateway, config: ProjectConfig) -> None:
    limits = config.gateway
    domain_type = gateway.intake.domain.content_type

    shown_key = Depends(scheme(limits.access))

    async def admit(request: Request, shown: Any = shown_key) -> str:
        return await gateway.gate.admit(request, shown)

    caller = Depends(admit)
    study_body = _binary(*gateway.intake.content_types)
    asking = _refusals(400, 401, 413, 415, 429, 502, 503, 504)

    @app.post("/predict", response_model=Predicted, responses=asking, openapi_extra=study_body, dependencies=[caller])
    async def predict(request: Request) -> Predicted:
        """The answer for one study, picture or array."""
        return await gateway.predicted(await read_study(request, limits.max_bytes))

    @app.post("/predict/batch", response_model=PredictedBatch, responses=asking, openapi_extra=_files(limits.max_files))
    async def predict_batch(request: Request, asked_by: str = caller) -> PredictedBatch:
        """The answers for several, each refused or answered by itself."""
        async with gateway.batches.read(request) as studies:
            await gateway.gate.count_others(asked_by, len(studies))
            return await gateway.predicted_batch(studies)

    @app.post(
        "/explain",
        response_model=Explained,
        responses={**_explained(domain_type), **_refusals(400, 401, 406, 413, 415, 429, 502, 503, 504)},
        openapi_extra=study_body,
        dependencies=[caller],
    )
    async def explain(request: Request, method: Method = "grad_cam") -> Any:
        """The answer with what it rests on; as a study with the picture in it, where `Accept` asks for the domain's type."""
        wants_study = domain_type in request.headers.get("accept", "").lower()
        return await gateway.explained(await read_study(request, limits.max_bytes), method, wants_study)

    @app.post("/similar", response_model=SimilarStudies, responses=asking, openapi_extra=study_body, dependencies=[caller])
    async def similar(
        request: Request,
        k: Annotated[int | None, Query(ge=1, le=MOST)] = None,
        where: Annotated[list[str] | None, Query(max_length=10)] = None,
        text: Annotated[str, Query(max_length=500)] = "",
    ) -> SimilarStudies:
        """The answer with the studies that are most like this one, one of each patient; `where=label:normal` and the like
        narrow them down; a hybrid search looks for the words of `text` as well, which must identify nobody."""
        return await gateway.similar(await read_study(request, limits.max_bytes), k, where or [], text)

    @app.post(
        "/feedback",
        response_model=Stored,
        responses=_refusals(400, 401, 413, 415, 429, 503),
        openapi_extra=_body({"application/json": Feedback.model_json_schema()}),
        dependencies=[caller],
    )
    async def feedback(request: Request) -> Stored:  # not a body of FastAPI's, which reads all of it before it asks for a key
        """Labels that have become known: drift checks and retraining join them to the captured requests."""
        require_type(request, "application/json")
        body = await read_study(request, LABELS_BYTES)
        return Stored(stored=await gateway.store(_feedback(body.content).labels))

    @app.get("/healthz", response_model=Health)
    async def healthz() -> Health:
        """Whether the gateway works; says nothing of the endpoint."""
        return Health(status="ok")

    @app.get("/readyz", response_model=Health, responses=_refusals(503))
    async def readyz() -> Health:
        """Whether the endpoint answers."""
        await gateway.ready()
        return Health(status="ok")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Refusal, "description": REASONS[status]} for status in statuses}


def _binary(*types: str) -> dict[str, Any]:
    return _body({kind: {"type": "string", "format": "binary"} for kind in types})


def _files(most: int) -> dict[str, Any]:
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1, "maxItems": most}
    form = {"type": "object", "required": ["files"], "properties": {"files": files}, "additionalProperties": False}
    return _body({"multipart/form-data": form})


def _body(schemas: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {kind: {"schema": schema} for kind, schema in schemas.items()}}}


def _explained(domain_type: str) -> dict[int | str, dict[str, Any]]:
    return {200: {"content": {domain_type: {"schema": {"type": "string", "format": "binary"}}}}}


def _feedback(body: bytes) -> Feedback:
    try:
        return Feedback.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError([{**found, "loc": ("body", *found["loc"])} for found in error.errors()]) from None


def _understood(kind: type[Body], reply: Reply) -> Body:
    """The body of an answer for one study."""
    try:
        answer = kind.model_validate_json(reply.body)
        [_] = answer.predictions
    except ValueError:  # pydantic's as well
        raise Refused(502, "model_error", "the endpoint's answer is not as this gateway knows it") from None
    return answer


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 - what it is registered for
    return refusal(error)


async def _invalid(_: Request, error: Exception) -> Response:
    """Which kind of mistake, and where; pydantic's own words, and names of the sender's, may quote values."""
    assert isinstance(error, RequestValidationError)  # noqa: S101 - what it is registered for
    first = error.errors()[0]
    place = ".".join(
        str(part) for part in first["loc"][:2] if part in {"body", "query", "header", "labels", "method", "k", "where", "text"}
    )
    return refusal(Refused(422, "invalid", f"{place}: {first['type'].replace('_', ' ')}"))


async def _http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - what it is registered for
    codes = {404: "not_found", 405: "method_not_allowed"}
    return refusal(Refused(error.status_code, codes.get(error.status_code, "http"), str(error.detail), headers=error.headers))
