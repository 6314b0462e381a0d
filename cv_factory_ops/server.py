"""What every HTTP server of this project does alike: listen, read a body with a limit, stop without dropping a request."""

from __future__ import annotations

import socket
from collections.abc import Mapping

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request

from cv_factory_ops.errors import Unavailable

LARGEST_BODY = 6 * 1024 * 1024
"""Bytes of a request that SageMaker lets through to a container."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep an idle connection: the client closes it, so no request meets a closed one."""
LATENCY_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
"""Upper bounds, in seconds, of the latency histograms of all servers, so that they can be laid over each other."""


class Refused(Exception):
    """An HTTP status with a code for programs and a line for people, which quotes nothing of the request."""

    def __init__(self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is known before anything else starts.

    Raises:
        Unavailable: the address cannot be bound.
    """
    try:
        return socket.create_server((host, port), backlog=512)
    except OSError as error:
        raise Unavailable(f"{host}:{port}: cannot listen here ({error.strerror})") from None


def run(app: Starlette, listener: socket.socket) -> None:
    """Serve until SIGTERM or SIGINT; requests in hand are answered first, for up to a minute."""
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=60
    )
    uvicorn.Server(settings).run(sockets=[listener])


async def read_body(request: Request) -> bytes | None:
    """The body of a request; None where it is larger than :data:`LARGEST_BODY`."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            return None
    return bytes(body)
