"""A SageMaker-compatible endpoint on this machine: control plane, runtime and alarms on one port, for unmodified AWS clients.

``cvf endpoint`` runs it; :func:`ensure_running` starts it where nothing answers yet. Its state directory holds the
resources (JSON), the unpacked models with their logs, and captures on their way to their destination.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import time
import urllib.parse
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from cv_factory_ops import captures, storage
from cv_factory_ops.config import as_uri
from cv_factory_ops.deploy.alarms import CloudWatch
from cv_factory_ops.deploy.asynchronous import AsyncRequests
from cv_factory_ops.deploy.control_plane import ControlPlane
from cv_factory_ops.deploy.exposition import CONTENT_TYPE_LATEST, exposition
from cv_factory_ops.deploy.shelf import ACCOUNT, REGION, ServiceError, places
from cv_factory_ops.deploy.spool import Spool
from cv_factory_ops.deploy.variants import Fleet, NotHealthy, TooSlow, Variant
from cv_factory_ops.errors import CvFactoryError, Unavailable
from cv_factory_ops.server import LARGEST_BODY, listen, read_body, run

log = logging.getLogger("cvf")

START_SECONDS = 60
LOOPBACK = ("127.0.0.1", "localhost")
FORWARDED = ("content-type", "accept", "x-amzn-sagemaker-custom-attributes")


def serve(state: Path, host: str, port: int, files: Sequence[Path] = ()) -> None:
    """Serve until SIGTERM or SIGINT; endpoints of an earlier run come back.

    On this machine, requests may name files below the state, the storage root and ``files``.

    Raises:
        Unavailable: another server works on this state directory, or the port is taken.
    """
    state = state.resolve()
    with _alone(state), listen(host, port) as listener:
        log.info("endpoint: SageMaker's control plane and runtime at http://%s:%d, state in %s", host, port, state)
        # A page in a browser of this machine may send requests here, too, but under the name of its own server.
        hosts = LOOPBACK if host in LOOPBACK else ("*",)
        storage_root = storage.path_of(as_uri(os.environ.get("CVF_STORAGE") or "var/storage"))
        folders = [path.resolve() for path in (state, storage_root, *files) if path]
        run(create_app(state, folders, hosts), listener)


def ensure_running(url: str, state: Path, files: Path | None = None) -> None:
    """Start ``cvf endpoint`` in the background where nothing answers at the URL, and wait until it does.

    ``files``: a folder that its requests may name files below, see :func:`serve`.

    Raises:
        Unavailable: another program answers there, the address is not this machine's, or the server does not come up.
    """
    if answers(url):
        return
    parts = urllib.parse.urlsplit(url)
    if parts.hostname not in LOOPBACK:
        raise Unavailable(f"{url}: nothing answers there, and it is not this machine; start `cvf endpoint` on it")
    state.mkdir(parents=True, exist_ok=True)
    with (state / "starting").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not answers(url):  # somebody else may have started it meanwhile
            _start(url, parts.hostname, parts.port or 80, state, files)


def stop(state: Path) -> None:
    """Stop the server that works on a state directory, and wait until it has; none there is fine."""
    path = state / "lock"
    if not path.exists():
        return
    with path.open("r", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it is held, so the process id in it is that of a living server
            os.kill(int(lock.read()), signal.SIGTERM)
            fcntl.flock(lock, fcntl.LOCK_SH)


def _start(url: str, host: str, port: int, state: Path, files: Path | None) -> None:
    with (state / "server.log").open("ab") as output:
        process = subprocess.Popen(
            (
                *(sys.executable, "-m", "cv_factory_ops.cli", "endpoint", "--state", str(state)),
                "--host",
                host,
                "--port",
                str(port),
                *(("--files", str(files)) if files else ()),
            ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not answers(url):
        if process.poll() is not None:
            raise Unavailable(f"{url}: the local endpoint did not start: {_last_line(state / 'server.log')}")
        if time.monotonic() > deadline:
            raise Unavailable(f"{url}: the local endpoint did not answer within {START_SECONDS} s; see {state / 'server.log'}")
        time.sleep(0.1)


def create_app(state: Path, folders: Sequence[Path], hosts: Sequence[str]) -> Starlette:
    """The application over a state directory: ``POST /``, ``POST /endpoints/<name>/[async-]invocations``, ``GET /ping`` and, of
    all containers, ``GET /metrics``.

    Requests are answered that come to one of the ``hosts`` and name files below one of the ``folders`` only.
    """
    require_place = places(folders)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.cloudwatch, app.state.spool = CloudWatch(state), Spool(state / "captures")
        app.state.plane = ControlPlane(state, app.state.cloudwatch, require_place)
        app.state.asynchronous = AsyncRequests(state / "async", partial(_answer_later, app), require_place)
        app.state.plane.restore()
        app.state.asynchronous.resume()
        yield
        await app.state.asynchronous.close()
        await app.state.plane.close()
        await asyncio.to_thread(app.state.spool.close)

    routes = [
        Route("/", _control, methods=["POST"]),
        Route("/endpoints/{name}/invocations", _invoke, methods=["POST"]),
        Route("/endpoints/{name}/async-invocations", _invoke_async, methods=["POST"]),
        Route("/ping", _ping),
        Route("/metrics", _metrics),
    ]
    return Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


async def _ping(request: Request) -> Response:
    plane: ControlPlane = request.app.state.plane
    return JSONResponse({"endpoints": {item["EndpointName"]: item["EndpointStatus"] for item in plane.endpoints}})


async def _metrics(request: Request) -> Response:
    plane: ControlPlane = request.app.state.plane
    return Response(await exposition(plane.traffic), media_type=CONTENT_TYPE_LATEST)


async def _control(request: Request) -> Response:
    """One operation of the control plane or of CloudWatch: JSON, named by the header ``X-Amz-Target``."""
    service, _, name = request.headers.get("x-amz-target", "").partition(".")
    services = {"SageMaker": request.app.state.plane, "GraniteServiceVersion20100801": request.app.state.cloudwatch}
    try:
        if service not in services or name not in services[service].operations:
            raise ServiceError(f"The requested operation {name[:80]!r} is not recognized", "UnknownOperationException")
        try:
            given = json.loads(await request.body() or b"{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            raise ServiceError("The request is not a JSON object", "SerializationException")
        answer, status = await services[service].operations[name](given), 200
    except ServiceError as error:
        answer, status = {"__type": error.code, "message": str(error)}, error.status
    except CvFactoryError as error:  # the state directory cannot be written
        answer, status = {"__type": "InternalFailure", "message": str(error)}, 500
    return Response(json.dumps(answer), status, _request_id(), media_type="application/x-amz-json-1.1")


async def _invoke(request: Request) -> Response:
    """InvokeEndpoint: choose a variant, pass the request on, capture what succeeded."""
    name = request.path_params["name"]
    try:
        body = await read_body(request)
        if body is None:
            raise ServiceError(f"The request body is larger than {LARGEST_BODY} bytes", "ValidationError", 413)
        fleet = await _fleet(request.app, name)
        if fleet.asynchronous:
            raise ServiceError(f"Endpoint {name} is asynchronous; use InvokeEndpointAsync.", "ValidationError")
        variant = _chosen(fleet, name, request.headers.get("x-amzn-sagemaker-target-variant"))
        forwarded = {header: request.headers[header] for header in FORWARDED if header in request.headers}
        answer = await _container_answer(request.app, name, variant, body, forwarded)
    except ServiceError as error:
        return _refusal(error)
    capture = fleet.capture
    if capture and capture.get("EnableCapture", True) and secrets.randbelow(100) < capture["InitialSamplingPercentage"]:
        await asyncio.to_thread(_capture, request, capture, variant.name, body, answer)
    headers = {**_request_id(), "x-Amzn-Invoked-Production-Variant": variant.name}
    return Response(answer.content, 200, headers, answer.headers.get("content-type"))


async def _invoke_async(request: Request) -> Response:
    """InvokeEndpointAsync: keep the request; its answer will lie where this one says."""
    name = request.path_params["name"]
    try:
        fleet = await _fleet(request.app, name)
        if not fleet.asynchronous:
            raise ServiceError(f"Endpoint {name} is not asynchronous; use InvokeEndpoint.", "ValidationError")
        kept = await asyncio.to_thread(request.app.state.asynchronous.keep, name, fleet.asynchronous, dict(request.headers))
    except ServiceError as error:
        return _refusal(error)
    except CvFactoryError as error:  # the state directory cannot be written
        return _refusal(ServiceError(str(error), "InternalFailure", 500))
    request.app.state.asynchronous.start(kept)
    headers = _request_id() | {"x-amzn-sagemaker-outputlocation": kept["OutputLocation"]}
    headers |= {"x-amzn-sagemaker-failurelocation": kept["FailureLocation"]} if "FailureLocation" in kept else {}
    return JSONResponse({"InferenceId": kept["InferenceId"]}, 202, headers)


async def _answer_later(app: Starlette, name: str, body: bytes, headers: dict[str, str], seconds: float) -> bytes:
    """The answer to a request of :class:`AsyncRequests`."""
    variant = _chosen(await _fleet(app, name), name, None)
    return (await _container_answer(app, name, variant, body, headers, seconds)).content


async def _fleet(app: Starlette, name: str) -> Fleet:
    fleet: Fleet | None = await app.state.plane.fleet(name)
    if fleet is None:
        raise ServiceError(f"Endpoint {name} of account {ACCOUNT} not found.", "ValidationError")
    return fleet


def _chosen(fleet: Fleet, name: str, wanted: str | None) -> Variant:
    if (variant := fleet.choose(wanted)) is None:
        raise ServiceError(f"Variant {wanted} of endpoint {name} not found.", "ValidationError")
    return variant


async def _container_answer(
    app: Starlette, name: str, variant: Variant, body: bytes, headers: dict[str, str], seconds: float | None = None
) -> httpx.Response:
    """What the container says, counted by CloudWatch whatever it is."""
    started, status = time.monotonic(), None
    try:
        answer = await variant.invoke(body, headers, seconds)
        status = answer.status_code
    except TooSlow:
        what = f"Your invocation timed out while waiting for a response from container {variant.name}"
        raise _model_error(name, variant, 0, what) from None
    except (NotHealthy, httpx.TransportError):  # AWS clients try again by themselves
        raise ServiceError(f"Variant {variant.name} is not ready", "ServiceUnavailable", 503) from None
    finally:
        app.state.cloudwatch.record(name, variant.name, status, time.monotonic() - started)
    if not answer.is_success:
        raise _model_error(name, variant, answer.status_code, answer.text)
    return answer


def _model_error(name: str, variant: Variant, status: int, text: str) -> ServiceError:
    side = "client" if 400 <= status < 500 else "server"
    message = f'Received {side} error ({status}) from {variant.name} with message "{text}".'
    logs = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/{name}"
    details = {"OriginalStatusCode": status, "OriginalMessage": text, "LogStreamArn": logs}
    return ServiceError(message, "ModelError", 424, details)


def _refusal(error: ServiceError) -> Response:
    headers = {**_request_id(), "x-amzn-ErrorType": error.code}
    return JSONResponse({"Message": str(error), **error.details}, error.status, headers)


def _capture(request: Request, config: Mapping[str, Any], variant: str, body: bytes, answer: httpx.Response) -> None:
    line = captures.encode(
        event_id=str(uuid.uuid4()),
        inference_id=request.headers.get("x-amzn-sagemaker-inference-id", ""),
        time=datetime.now(UTC),
        request=body,
        content_type=request.headers.get("content-type", ""),
        answer=answer.content,
        answer_type=answer.headers.get("content-type", ""),
    )
    modes = {option["CaptureMode"] for option in config["CaptureOptions"]}
    if "InputAndOutput" not in modes and modes != {"Input", "Output"}:
        content = json.loads(line)
        content["captureData"].pop("endpointOutput" if "Input" in modes else "endpointInput")
        line = json.dumps(content)
    try:
        request.app.state.spool.write(f"{config['DestinationS3Uri'].rstrip('/')}/{request.path_params['name']}/{variant}", line)
    except (OSError, CvFactoryError) as error:  # the answer matters more
        log.warning("captures: one was lost: %s", error)


def _request_id() -> dict[str, str]:
    return {"x-amzn-RequestId": str(uuid.uuid4())}


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """One server at a time works on a state directory; its file ``lock`` holds the process id."""
    state.mkdir(parents=True, exist_ok=True)
    with open(os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o644), "r+", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Unavailable(f"{state}: another endpoint server works here (process {lock.read().strip()})") from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def answers(url: str) -> bool:
    """Whether our server answers there.

    Raises:
        Unavailable: another program does.
    """
    try:
        answer = httpx.get(f"{url}/ping", timeout=5, trust_env=False)
        if "endpoints" in answer.json():
            return True
    except httpx.ConnectError:
        return False
    except httpx.TimeoutException:
        raise Unavailable(f"{url}: what listens there does not answer; try again") from None
    except (httpx.HTTPError, ValueError, TypeError):
        pass
    raise Unavailable(f"{url}: another program answers there; stop it or choose another deploy.url")


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it wrote no reason"
