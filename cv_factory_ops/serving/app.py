"""SageMaker's container contract for one bundle: ``GET /ping`` and ``POST /invocations`` on one port.

A request holds one study (the domain's content type, ``image/png``, ``image/jpeg`` or ``application/x-npy``) or a batch
(``application/json``, see :func:`cv_factory_ops.ingestion.decode.instances`); the body of the answer is
:class:`cv_factory_ops.predictor.Answer`. With the header ``X-Amzn-SageMaker-Custom-Attributes: explain=<method>`` it is
:class:`cv_factory_ops.explainer.ExplainedAnswer` or, where ``Accept`` asks for the domain's content type, a study with the
overlay in it. A refusal is ``{"error": one line, "code": reason}``. Nothing of a request is logged.
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from threading import BoundedSemaphore

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import EXPLANATIONS, ExplanationMethod
from cv_factory_ops.domain import Decoded, Decoding, Domain, open_domain
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Rejected
from cv_factory_ops.explainer import Explainer, as_study
from cv_factory_ops.ingestion.decode import PICTURES, decode_one, instances
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.server import LARGEST_BODY, listen, read_body, run

log = logging.getLogger("cvf")

IMAGES = (*PICTURES, "application/x-npy")
CUSTOM_ATTRIBUTES = {f"explain={name}": method for name, method in EXPLANATIONS.items()}
MOST_EXPLAINED = 4
"""Images of a request that are explained, so that an answer comes within SageMaker's minute."""
MOST_WAITING = 4
"""Requests for explanations that may be in hand at a time: more would wait for longer than that minute."""


def serve(model: Path, host: str, port: int) -> None:
    """Serve a bundle until SIGTERM, then finish what is in hand and return.

    With ``CVF_EXIT_WITH_STDIN=1`` the end of standard input stops it too: so it never outlives the process that started
    it, however that one ends.

    Raises:
        DataError: it is not a bundle, or its weights cannot be loaded.
        Unavailable: the port is taken.
    """
    if os.environ.get("CVF_EXIT_WITH_STDIN") == "1":
        threading.Thread(target=_stop_at_end_of_stdin, daemon=True).start()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    app = create_app(model)
    with listen(host, port) as listener:
        run(app, listener)


def create_app(bundle_dir: Path) -> Starlette:
    """The application around a loaded bundle, which has answered once.

    Raises:
        DataError: it is not a bundle, or its weights cannot be loaded.
    """
    predictor = load(bundle_dir)
    domain = open_domain(predictor.manifest.domain)
    threads = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="predict")
    slow = ThreadPoolExecutor(1, thread_name_prefix="explain")  # who asks for reasons must not hold up the others
    places = BoundedSemaphore(MOST_WAITING)

    @cache
    def explainer() -> Explainer:
        return Explainer(predictor)

    async def ping(_: Request) -> Response:
        return Response()

    async def invocations(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (domain.content_type, *IMAGES, "application/json"):
            allowed = ", ".join((domain.content_type, *IMAGES, "application/json"))
            return _refusal(415, "content_type", f"content type {content_type[:80]!r} given; allowed: {allowed}")
        asked = request.headers.get("x-amzn-sagemaker-custom-attributes", "")
        if asked and asked not in CUSTOM_ATTRIBUTES:
            allowed = ", ".join(CUSTOM_ATTRIBUTES)
            return _refusal(400, "custom_attributes", f"custom attributes {asked[:80]!r} given; allowed: {allowed}")
        is_study_wanted = bool(asked) and domain.content_type in request.headers.get("accept", "").lower()
        if is_study_wanted and content_type != domain.content_type:
            return _refusal(406, "accept", f"an explanation comes as {domain.content_type} where a study of that type is sent")
        if (body := await read_body(request)) is None:
            return _refusal(413, "too_large", f"the body is larger than {LARGEST_BODY} bytes")
        read = partial(_studies, domain, predictor.manifest.decoding, body, content_type)
        work, pool = partial(_answer, predictor, read), threads
        if asked:
            if not places.acquire(blocking=False):
                return _refusal(503, "busy", f"{MOST_WAITING} requests for explanations are waiting; try again later")
            into = (domain, body) if is_study_wanted else None
            work, pool = partial(_explain, explainer, read, CUSTOM_ATTRIBUTES[asked], into), slow
            work = partial(_releasing, places, work)
        return await asyncio.get_running_loop().run_in_executor(pool, _guarded, work)

    return Starlette(routes=[Route("/ping", ping), Route("/invocations", invocations, methods=["POST"])])


def load(bundle_dir: Path) -> Predictor:
    """A predictor that has answered once, so that the first request is as fast as the others.

    Raises:
        DataError: it is not a bundle, or its weights cannot be loaded.
    """
    try:
        predictor = Predictor(Bundle.load(bundle_dir))
        predictor.warm_up()
    except CvFactoryError:
        raise
    except Exception as error:  # safetensors, torch and numpy each have errors of their own
        raise DataError(f"{bundle_dir}: cannot be loaded as a model bundle ({type(error).__name__})") from error
    return predictor


def _releasing(places: BoundedSemaphore, work: Callable[[], Response]) -> Response:
    try:
        return work()
    finally:
        places.release()


def _guarded(work: Callable[[], Response]) -> Response:
    try:
        return work()
    except Rejected as error:
        return _refusal(400, error.code, str(error))
    except ConfigError as error:
        return _refusal(400, "custom_attributes", str(error))
    except Exception as error:  # the sender learns no more than the kind, the log no more than where
        log.exception("invocations: unexpected %s", type(error).__name__, exc_info=_without_values(error))
        return _refusal(500, "internal", f"unexpected {type(error).__name__}")


def _answer(predictor: Predictor, read: Callable[[], list[Decoded]]) -> Response:
    return Response(predictor.answer(read()).model_dump_json(), media_type="application/json")


def _explain(
    explainer: Callable[[], Explainer],
    read: Callable[[], list[Decoded]],
    method: ExplanationMethod,
    into: tuple[Domain, bytes] | None,
) -> Response:
    """``into``: the domain and the study that the answer becomes a picture of; otherwise it is JSON."""
    if len(studies := read()) > MOST_EXPLAINED:
        raise Rejected("too_many", f"{len(studies)} images given; at most {MOST_EXPLAINED} of a request are explained")
    answer, overlays = explainer().answer(studies, method)
    if into is None:
        return Response(answer.model_dump_json(), media_type="application/json")
    return Response(as_study(*into, answer, overlays[0]), media_type=into[0].content_type)


def _studies(domain: Domain, decoding: Decoding, body: bytes, content_type: str) -> list[Decoded]:
    if content_type == "application/json":
        return instances(body, decoding)
    if content_type == domain.content_type or domain.recognises(body):
        domain.require_deidentified(body)
    return [decode_one(body, content_type, domain, decoding)]


def _refusal(status: int, code: str, message: str) -> Response:
    return Response(json.dumps({"error": message, "code": code}), status, media_type="application/json")


def _without_values(error: Exception) -> BaseException:
    """The same place in the code with a message that quotes nothing of the request."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)


def _stop_at_end_of_stdin() -> None:
    while os.read(0, 1024):  # not sys.stdin: a thread that waits in it breaks the interpreter's own end
        pass
    os.kill(os.getpid(), signal.SIGTERM)
