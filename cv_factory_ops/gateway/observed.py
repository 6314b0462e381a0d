"""Around every request: its id, its line in the log, its place in the metrics, and one answer whatever happens."""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cv_factory_ops.errors import without_values
from cv_factory_ops.gateway.metrics import Metrics
from cv_factory_ops.server import Refused

log = logging.getLogger("cvf.gateway")

REQUEST_ID = re.compile(r"[0-9a-fA-F-]{16,64}")
"""UUIDs and trace ids: hardly anything that could name a person. Any other id is replaced."""
HUNG_UP = 499
"""nginx's status of a request whose sender left before it was answered: nobody reads it but the log and the metrics."""
ALWAYS = {"/healthz", "/readyz", "/metrics"}
"""Answered also when there is no room for more requests, and logged only when they fail."""


def refusal(error: Refused) -> Response:
    """The answer that a refusal becomes."""
    body = json.dumps({"error": str(error), "code": error.code})
    headers = ({"Retry-After": "1"} if error.status == 503 else {}) | error.headers | {"X-Error-Code": error.code}
    return Response(body, error.status, headers, media_type="application/json")


class Observed:
    """ASGI middleware; not Starlette's class, which costs a task and a queue for each request."""

    def __init__(self, app: ASGIApp, metrics: Metrics, most: int) -> None:
        self._app, self._metrics, self._most, self._in_hand = app, metrics, most, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request = _Request(given if REQUEST_ID.fullmatch(given) else str(uuid.uuid4()), send)
        self._in_hand += 1
        self._metrics.in_flight.set(self._in_hand)
        try:
            if self._in_hand > self._most and scope["path"] not in ALWAYS:
                busy = Refused(503, "busy", f"{self._most} requests are in hand; try again later")
                await refusal(busy)(scope, receive, request.send)
            else:
                await self._app(scope, receive, request.send)
        except ClientDisconnect:
            request.status, request.code = HUNG_UP, "hung_up"
        except Exception as error:
            log.error("request %s: unexpected %s", request.id, type(error).__name__, exc_info=without_values(error))
            if not request.status:
                failed = Refused(500, "internal", f"unexpected {type(error).__name__}")
                await refusal(failed)(scope, receive, request.send)
        finally:
            self._in_hand -= 1
            self._metrics.in_flight.set(self._in_hand)
            self._tell(scope, request)

    def _tell(self, scope: Scope, request: _Request) -> None:
        """By route, not by address: what a sender writes into an address is its own."""
        seconds = time.perf_counter() - request.started
        route: Any = scope.get("route")
        path = getattr(route, "path", "other")
        self._metrics.requests.labels(path, str(request.status)).observe(seconds)
        if request.code:
            self._metrics.errors.labels(request.code).inc()
        if path in ALWAYS and request.status < 400:
            return
        caller, code = scope.get("cvf.caller", "-"), request.code or "-"
        log.info("%s %s %d %s %.1f ms %s", request.id, path, request.status, code, 1000 * seconds, caller)


class _Request:
    """What is told of a request, while its answer goes out."""

    def __init__(self, id: str, send: Send) -> None:
        self.id, self.started, self.status, self.code = id, time.perf_counter(), 0, ""
        self._send = send

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.id
            self.status, self.code = message["status"], headers.get("X-Error-Code", "")
        await self._send(message)
