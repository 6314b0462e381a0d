"""An HTTPS server that a test runs on this machine and that answers as a cloud's API is published to."""

from __future__ import annotations

import json
import os
import signal
import ssl
import threading
import traceback
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import requests
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.certificates import Certificate

Answer = tuple[int, dict[str, str], Any]
"""Status, headers, and a body: bytes, or what becomes JSON."""


class HttpsServer(ABC):
    """``answer`` tells what a service would, given method, path, query and body."""

    def __init__(self, folder: Path) -> None:
        own = Certificate(folder, "tests")
        self.certificate = own.path
        self.asked: list[tuple[str, str]] = []
        """Method and path of all requests."""
        self.refused: dict[str, list[Answer]] = {}
        """What is answered instead, once each, to requests whose method and path hold the text."""
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(own.path, own.key)
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_port
        self.url = f"https://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @abstractmethod
    def answer(self, method: str, path: str, query: dict[str, str], headers: dict[str, str], body: bytes) -> Answer: ...

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1

            def do_GET(self) -> None:
                content = self.rfile.read(int(self.headers.get("content-length") or 0))
                parts = urllib.parse.urlsplit(self.path)
                path, query = (
                    urllib.parse.unquote(parts.path),
                    dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True)),
                )
                headers = {name.lower(): value for name, value in self.headers.items()}
                with server._lock:
                    server.asked.append((self.command, path))
                    refusals = [found for text, found in server.refused.items() if found and text in f"{self.command} {path}"]
                    try:
                        given = (self.command, path, query, headers, content)
                        status, more, body = refusals[0].pop(0) if refusals else server.answer(*given)
                    except Exception as error:  # a request that the service would not know
                        traceback.print_exc()
                        status, more, body = 400, {}, {"error": {"code": 400, "message": f"{type(error).__name__}: {error}"}}
                written = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                for name, value in ({"content-type": "application/json"} | more).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(written)))
                self.end_headers()
                self.wfile.write(written)

            do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


def is_killed(work: Callable[[], object], number: int, is_change: Callable[[str, str], bool]) -> bool:
    """Do it in a process of its own that is killed after its change of that number; False where it makes fewer.

    ``is_change`` is given the method and the address of a request.
    """
    child = os.fork()
    if child == 0:
        try:
            send, count = requests.Session.send, 0

            def counting(self: Any, request: Any, **settings: Any) -> Any:
                nonlocal count
                answer = send(self, request, **settings)
                count += is_change(request.method, request.url)
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return answer

            requests.Session.send = counting
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def private_key() -> str:
    """A key to sign requests for tokens with, PEM."""
    key = rsa.generate_private_key(65537, 2048)
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption()).decode()
