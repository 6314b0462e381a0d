"""SageMaker's container contract for one bundle: ``GET /ping`` and ``POST /invocations`` on one port.

A request holds one study (the domain's content type, ``image/png``, ``image/jpeg`` or ``application/x-npy``) or a batch
(``application/json``, see :func:`cv_factory_ops.ingestion.decode.instances`); the body of the answer is
:class:`cv_factory_ops.predictor.Answer`. A refusal is ``{"error": one line, "code": reason}``. Nothing of a request is logged.
https://docs.aws.amazon.com/sagemaker/latest/dg/your-algorithms-inference-code.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import Decoded, Decoding, Domain, open_domain
from cv_factory_ops.errors import CvFactoryError, DataError, Rejected
from cv_factory_ops.ingestion.decode import PICTURES, decode_one, instances
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.server import LARGEST_BODY, listen, read_body, run

log = logging.getLogger("cvf")

IMAGES = (*PICTURES, "application/x-npy")


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

    async def ping(_: Request) -> Response:
        return Response()

    async def invocations(request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if content_type not in (domain.content_type, *IMAGES, "application/json"):
            allowed = ", ".join((domain.content_type, *IMAGES, "application/json"))
            return _refusal(415, "content_type", f"content type {content_type[:80]!r} given; allowed: {allowed}")
        if (body := await read_body(request)) is None:
            return _refusal(413, "too_large", f"the body is larger than {LARGEST_BODY} bytes")
        return await asyncio.get_running_loop().run_in_executor(threads, _answer, predictor, domain, body, content_type)

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


def _answer(predictor: Predictor, domain: Domain, body: bytes, content_type: str) -> Response:
    try:
        answer = predictor.answer(_studies(domain, predictor.manifest.decoding, body, content_type))
    except Rejected as error:
        return _refusal(400, error.code, str(error))
    except Exception as error:  # the sender learns no more than the kind, the log no more than where
        log.exception("invocations: unexpected %s", type(error).__name__, exc_info=_without_values(error))
        return _refusal(500, "internal", f"unexpected {type(error).__name__}")
    return Response(answer.model_dump_json(), media_type="application/json")


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
