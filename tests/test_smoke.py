"""What a deployment asks a gateway, from outside: one route, with a key or a token."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from local import smoke


@dataclass
class Inlet:
    """An Ingress that lets ``/predict`` in alone, and what it was asked."""

    url: str = ""
    status: int = 200
    answer: Any = field(default_factory=lambda: {"prediction": {"label": "normal"}, "bundle_digest": "5f2b" * 16})
    headers: list[Any] = field(default_factory=list)


@pytest.fixture
def inlet() -> Iterator[Inlet]:
    found = Inlet()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            found.headers.append(self.headers)
            self.send_response(found.status if self.path == "/predict" else 404)
            self.end_headers()
            self.wfile.write(json.dumps(found.answer).encode())

        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found.url = f"http://127.0.0.1:{server.server_address[1]}"
        yield found
        server.shutdown()


def test_one_route_is_enough(inlet: Inlet) -> None:
    """Ingress and firewall keep health and metrics inside."""
    assert smoke.ask(inlet.url, "k").startswith(f"{inlet.url}: normal by model 5f2b5f2b5f2b in ")
    assert inlet.headers[0]["x-api-key"] == "k"
    assert "authorization" not in inlet.headers[0]


def test_a_token_opens_a_gateway_behind_an_identity_provider(inlet: Inlet) -> None:
    smoke.ask(inlet.url, "", "t")
    assert inlet.headers[0]["authorization"] == "Bearer t"


@pytest.mark.parametrize("answer", [{}, {"prediction": {}, "bundle_digest": "5f"}, {"prediction": None}, []])
def test_another_answer_than_a_gateways_is_one_line(inlet: Inlet, answer: Any) -> None:
    inlet.answer = answer
    with pytest.raises(SystemExit, match="does not answer as a gateway"):
        smoke.ask(inlet.url)


def test_an_endpoint_that_is_away_is_told_by_the_gateways_own_code(inlet: Inlet) -> None:
    inlet.status, inlet.answer = 503, {"error": "x", "code": "circuit_open"}
    with pytest.raises(SystemExit, match="/predict: 503 circuit_open"):
        smoke.ask(inlet.url)
