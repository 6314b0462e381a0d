"""SageMaker's container contract for one bundle: ``GET /ping`` and ``POST /invocations`` on one port, and ``GET /metrics``.

A request holds one study (the domain's content type, ``image/png``, ``image/jpeg``, ``image/tiff`` or ``application/x-npy``) or
several (``application/json``, see :func:`cv_factory_ops.ingestion.decode.instances`; ``multipart/form-data``, a file each); the
body of the answer is :class:`cv_factory_ops.answers.Answer`. With the header
``X-Amzn-SageMaker-Custom-Attributes: explain=<method>`` it is :class:`cv_factory_ops.answers.ExplainedAnswer`, with
``similar=<number>`` and an index in the bundle :class:`cv_factory_ops.answers.SimilarAnswer`. Where ``Accept``
asks for the domain's content type, the answer is a study beside the one that was sent: a report, a segmentation, or a picture
of the explanation.
A refusal is ``{"error": one line, "code": reason}``. Nothing of a request is logged.
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import cv_factory_ops
from cv_factory_ops.answers import Answer, Neighbour, Prediction, SegmentedPrediction, SimilarAnswer
from cv_factory_ops.bundle import INDEX, Bundle
from cv_factory_ops.config.explanations import ExplanationMethod
from cv_factory_ops.domain import Decoded, open_domain
from cv_factory_ops.engine import Engine, open_engine
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Rejected, Unavailable, without_values
from cv_factory_ops.explainer import Explainer, as_study
from cv_factory_ops.features.index import Index
from cv_factory_ops.predictor import Input, Predictor
from cv_factory_ops.segmentation import mask_of
from cv_factory_ops.server import Refused, listen, run
from cv_factory_ops.serving.batching import Batcher
from cv_factory_ops.serving.metrics import CONTENT_TYPE_LATEST, Metrics
from cv_factory_ops.serving.requests import Asked, Part, Similar, decoded, decoded_of_several, read
from cv_factory_ops.serving.settings import ServingSettings

log = logging.getLogger("cvf")

MOST_EXPLAINED = 4
"""Images of a request that are explained, so that an answer comes within SageMaker's minute."""
MOST_LANES = 4
"""Batches that the network answers at a time at most: each takes memory for what it calculates."""
MOST_WAITING = 4
"""Requests for explanations that may be in hand at a time: more would wait for longer than that minute."""

Output = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Of one image: probabilities and embedding."""


def serve(model: Path, host: str, port: int) -> None:
    """Serve a bundle until SIGTERM, then finish what is in hand and return.

    With ``CVF_EXIT_WITH_STDIN=1`` the end of standard input stops it too: so it never outlives the process that started
    it, however that one ends. Other settings: :class:`cv_factory_ops.serving.settings.ServingSettings`.

    Raises:
        ConfigError: a setting is not allowed.
        DataError: it is not a bundle, or its weights cannot be loaded.
        Unavailable: the port is taken.
    """
    if os.environ.get("CVF_EXIT_WITH_STDIN") == "1":
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()
    app = create_app(model, ServingSettings.from_environment())
    with listen(host, port) as listener:
        run(app, listener)


def create_app(bundle_dir: Path, settings: ServingSettings | None = None) -> Starlette:
    """The application around a loaded bundle, which has answered once.

    Raises:
        DataError: it is not a bundle, or its weights cannot be loaded.
    """
    container = Container(bundle_dir, settings or ServingSettings())
    routes = [
        Route("/ping", container.ping),
        Route("/metrics", container.exposition),
        Route("/invocations", container.invocations, methods=["POST"]),
    ]
    return Starlette(routes=routes)


class Container:
    """What one serving process holds: the bundle, and threads for reading, for the network and for explanations.

    A request is read on the threads, its images wait for a batch of the network, and the answer is put together on the
    threads again.
    """

    def __init__(self, bundle_dir: Path, settings: ServingSettings) -> None:
        self.settings = settings
        self.predictor, self._engine, self.metrics = _load(bundle_dir, settings)
        self.domain = open_domain(self.predictor.manifest.domain)
        self._index: Index | None = None
        self._opening = threading.Lock()
        self._has_index = (self.predictor.bundle.path / INDEX).is_dir()
        if self._has_index:
            self._open_index_or_later()
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="read")
        self._slow = ThreadPoolExecutor(1, thread_name_prefix="explain")  # who asks for reasons must not hold up the others
        self._places = threading.BoundedSemaphore(MOST_WAITING)
        self._batcher = Batcher(self._forward, settings.batch_size, settings.batch_wait_ms / 1000, self._engine.lanes)
        self._in_flight = 0

    async def ping(self, _: Request) -> Response:
        return Response()

    async def exposition(self, _: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def invocations(self, request: Request) -> Response:
        started = time.perf_counter()
        asks_more = request.headers.get("x-amzn-sagemaker-custom-attributes", "")
        kind = asks_more.partition("=")[0] if asks_more.startswith(("explain=", "similar=")) else "predict"
        with self._counted():
            response = await self._guarded(request)
        self.metrics.seconds.labels(kind, str(response.status_code)).observe(time.perf_counter() - started)
        return response

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._in_flight += 1
        self.metrics.in_flight.set(self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self.metrics.in_flight.set(self._in_flight)

    async def _guarded(self, request: Request) -> Response:
        try:
            if self._in_flight > self.settings.most_in_flight:
                raise Refused(503, "busy", f"{self.settings.most_in_flight} requests are in hand; try again later")
            asked = await read(request, self.domain, self.settings.most_images)
            return await (self._explained(asked, asked.method) if asked.method else self._answered(asked))
        except Refused as error:
            return self._refusal(error.status, error.code, str(error))
        except Rejected as error:
            return self._refusal(400, error.code, str(error))
        except ConfigError as error:
            return self._refusal(400, "custom_attributes", str(error))
        except Exception as error:  # the sender learns no more than the kind, the log no more than where
            log.exception("invocations: unexpected %s", type(error).__name__, exc_info=without_values(error))
            return self._refusal(500, "internal", f"unexpected {type(error).__name__}")

    async def _answered(self, asked: Asked) -> Response:
        loop = asyncio.get_running_loop()
        with self._batcher.coming():
            reading = [
                loop.run_in_executor(self._threads, self._inputs, part, number if len(asked.parts) > 1 else None)
                for number, part in enumerate(asked.parts, 1)
            ]
            inputs = [given for of_part in await asyncio.gather(*reading) for given in of_part]
        outputs = await self._batcher.answer(inputs)
        return await loop.run_in_executor(self._threads, self._told, asked, inputs, outputs)

    def _inputs(self, part: Part, number: int | None) -> list[Input]:
        """One by one, so that of a large image no more than the model's input is kept."""
        return [self.predictor.input_of(study) for study in self._studies(part, number)]

    def _studies(self, part: Part, number: int | None) -> list[Decoded]:
        decoding, most = self.predictor.manifest.decoding, self.settings.most_images
        if number is not None:
            return decoded_of_several(part, number, self.domain, decoding)
        if len(studies := decoded(part, self.domain, decoding)) > most:
            raise Rejected("too_many", f"{len(studies)} images given; allowed are {most} a request")
        return studies

    def _forward(self, inputs: Sequence[Input]) -> list[Output]:
        """A request that is alone has all threads."""
        self.metrics.batches.observe(len(inputs))
        network = self._engine.network if self._in_flight == 1 else self._engine.beside
        return list(zip(*self.predictor.forward(np.stack([given.image for given in inputs]), network), strict=True))

    def _told(self, asked: Asked, inputs: Sequence[Input], outputs: Sequence[Output]) -> Response:
        probabilities, embedding = (np.stack(values) for values in zip(*outputs, strict=True))
        answer = self.predictor.conclude(inputs, probabilities, embedding)
        self.metrics.count(answer.predictions)
        if asked.wants_study and self.predictor.manifest.task == "detection":
            raise Refused(406, "accept", "boxes are told in JSON, not as a study; ask for JSON")
        if asked.similar and asked.wants_study and self.predictor.manifest.task == "segmentation":
            raise Refused(406, "accept", "a segmentation says nothing of similar studies; ask for JSON")
        told = self._with_similar(answer, inputs, embedding, asked.similar) if asked.similar else answer
        if asked.wants_study:
            comment = told.findings[0] if isinstance(told, SimilarAnswer) else ""
            return Response(self._report(asked.parts[0].content, answer, comment), media_type=self.domain.content_type)
        return Response(told.model_dump_json(), media_type="application/json")

    def _with_similar(
        self, answer: Answer, inputs: Sequence[Input], embedding: NDArray[np.float32], wanted: Similar
    ) -> SimilarAnswer:
        if not self._has_index:
            raise Rejected("no_index", "this bundle is served without an index of similar studies")
        try:
            index = self._opened_index()
            where, vectors = index.where(wanted.filters), self.predictor.vectors(embedding, index.manifest.retrieval.vector)
            similar = [
                index.similar(vector, wanted.k, where, given.metadata, given.patient, wanted.text)
                for vector, given in zip(vectors, inputs, strict=True)
            ]
        except (Unavailable, ConfigError) as error:  # its line names places
            log.warning("similar studies cannot be found for now: %s", error)
            raise Refused(503, "index_unavailable", "similar studies cannot be found for now; try again later") from None
        except Rejected:
            raise
        except DataError:
            raise Rejected("not_comparable", "what the model sees of the image cannot be compared with others") from None
        findings = [self._finding(given, found) for given, found in zip(answer.predictions, similar, strict=True)]
        return SimilarAnswer(**dict(answer), similar=similar, findings=findings, index=index.manifest.name)

    def _open_index_or_later(self) -> None:
        """Answers without similar studies do not wait for the store of the index, which may be a server."""
        try:
            self._opened_index()
        except Unavailable as error:
            log.warning("similar studies cannot be found for now: %s", error)

    def _opened_index(self) -> Index:
        with self._opening:
            if self._index is None:
                bundle = self.predictor.bundle
                self._index = Index.open(bundle.path / INDEX, bundle.digest)
            return self._index

    def _finding(self, given: Prediction, similar: Sequence[Neighbour]) -> str:
        """Of a segmentation, ``scores`` are shares of its pixels."""
        probability = given.score if isinstance(given, SegmentedPrediction) else given.scores[given.label]
        return self.domain.finding(given.label, probability, given.abstained, [each.label for each in similar])

    def _report(self, study: bytes, answer: Answer, comment: str) -> bytes:
        """The first prediction as a study beside the one that it is about."""
        given, manifest = answer.predictions[0], self.predictor.manifest
        software = (f"cv-factory {cv_factory_ops.__version__}", answer.bundle_digest)
        if isinstance(given, SegmentedPrediction):
            return self.domain.segmentation(study, mask_of(given), manifest.labels[1:], software)
        return self.domain.report(study, given.label, given.scores, given.abstained, manifest.project, software, comment)

    async def _explained(self, asked: Asked, method: ExplanationMethod) -> Response:
        if not self._places.acquire(blocking=False):
            raise Refused(503, "busy", f"{MOST_WAITING} requests for explanations are waiting; try again later")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._slow, self._explain, asked, method)
        finally:
            self._places.release()

    def _explain(self, asked: Asked, method: ExplanationMethod) -> Response:
        studies = [study for part in asked.parts for study in self._studies(part, None)]
        if len(studies) > MOST_EXPLAINED:
            raise Rejected("too_many", f"{len(studies)} images given; at most {MOST_EXPLAINED} of a request are explained")
        answer, overlays = self._explainer.answer(studies, method)
        self.metrics.count(answer.predictions)
        if asked.wants_study:
            study = as_study(self.domain, asked.parts[0].content, answer, overlays[0])
            return Response(study, media_type=self.domain.content_type)
        return Response(answer.model_dump_json(), media_type="application/json")

    @cached_property
    def _explainer(self) -> Explainer:
        return Explainer(self.predictor)

    def _refusal(self, status: int, code: str, message: str) -> Response:
        self.metrics.errors.labels(code).inc()
        return Response(json.dumps({"error": message, "code": code}), status, media_type="application/json")


def _load(bundle_dir: Path, settings: ServingSettings) -> tuple[Predictor, Engine, Metrics]:
    """A predictor that has answered once, so that the first request is as fast as the others, and its metrics."""
    try:
        bundle = Bundle.load(bundle_dir)
        engine = open_engine(bundle, settings.engine, settings.threads, min(settings.threads, MOST_LANES))
        predictor = Predictor(bundle, engine.network)
        predictor.warm_up()
        return predictor, engine, Metrics(bundle, engine.name)
    except CvFactoryError:
        raise
    except Exception as error:  # safetensors, torch and numpy each have errors of their own
        raise DataError(f"{bundle_dir}: cannot be loaded as a model bundle ({type(error).__name__})") from error


def _stop_at_end_of_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread that waits in it breaks the interpreter's own end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
