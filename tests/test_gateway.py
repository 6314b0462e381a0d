"""The gateway before a real local endpoint with a tiny bundle behind it: who is let in, what is answered, what is not told."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import jwt
import numpy as np
import pydicom
import pytest
import schemathesis
import yaml
from cryptography.hazmat.primitives.asymmetric import rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)
from starlette.testclient import TestClient

from cv_factory_ops import captures
from cv_factory_ops.answers import ExplainedPrediction, Prediction
from cv_factory_ops.cli import main
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.serving import ApiKeys
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.gateway.app import create_app
from cv_factory_ops.gateway.endpoint import Breaker, Endpoint, NoAnswer, RetryBudget
from cv_factory_ops.gateway.keys import KEY, make_key
from cv_factory_ops.gateway.metrics import Metrics
from cv_factory_ops.ingestion.manifest import read_manifest
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.server import Refused
from cv_factory_ops.stage import run_stage
from domain_medical import DOMAIN
from domain_medical.synthetic import studies
from local import smoke
from tests.bundles import IMAGE, free_port, npy, png, start_cvf, wait_until
from tests.conftest import TINY
from tests.served import Served, is_up

LOG = "cvf.gateway"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = Served(tmp_path_factory.mktemp("served"))
    yield found
    found.process.terminate()
    found.process.wait(30)


@pytest.fixture(scope="module")
def gateway(served: Served) -> Iterator[Callable[..., TestClient]]:
    """A gateway in this process with the given settings; the same one for the same settings."""
    made: dict[str, TestClient] = {}
    with ExitStack() as stack:

        def make(**options: Any) -> TestClient:
            name = json.dumps(options, sort_keys=True)
            if name not in made:
                made[name] = stack.enter_context(TestClient(create_app(served.config(**options))))
            return made[name]

        yield make


@pytest.fixture(scope="module")
def client(gateway: Callable[..., TestClient]) -> TestClient:
    """A gateway that anybody may ask."""
    return gateway()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[ApiKeys, str]:
    """A file of keys, and the only key in it."""
    access = ApiKeys(file=str(tmp_path_factory.mktemp("keys") / "keys"))
    return access, make_key(access, "one")


def dicom(**changes: str) -> bytes:
    """A phantom with an identity."""
    [(study, _)] = list(studies(1, image_size=32, seed=1, labels=["normal", "opacity"]))[:1]
    told = pydicom.dcmread(io.BytesIO(study))
    told.PatientName, told.PatientID, told.PatientIdentityRemoved = "Curie^Marie", "MRN4711", "NO"
    for name, value in changes.items():
        setattr(told, name, value)
    file = io.BytesIO()
    told.save_as(file)
    return file.getvalue()


def clean(study: bytes) -> bytes:
    from cv_factory_ops.config.data import DeidentificationConfig

    return DOMAIN.deidentify(study, DeidentificationConfig(pixels="trust")).content


def picture(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.rint(IMAGE * 255).astype(np.uint8)).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A picture of more pixels than Pillow itself takes."""
    file = io.BytesIO()
    Image.new("1", (14_000, 14_000)).save(file, "PNG")
    return file.getvalue()


def post(client: TestClient, content: bytes, kind: str, path: str = "/predict", **headers: str) -> httpx.Response:
    return client.post(path, content=content, headers={"content-type": kind, **headers})


def value(client: TestClient, name: str, **labels: str) -> float:
    """A sample of the metrics; 0 where there is none."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return sum(s.value for family in families for s in family.samples if s.name == name and labels.items() <= s.labels.items())


class TestPredict:
    @pytest.mark.parametrize(
        ("content", "kind"),
        [
            (npy(), "application/x-npy"),
            (png(), "image/png"),
            (picture("TIFF"), "image/tiff"),
            (npy(), "application/octet-stream"),
            (png(), "application/octet-stream"),
        ],
    )
    def test_an_image_is_answered_as_the_predictor_does(
        self, client: TestClient, served: Served, content: bytes, kind: str
    ) -> None:
        response = post(client, content, kind)
        assert response.status_code == 200, response.text
        (expected,) = Predictor(served.bundle).answer([Decoded(IMAGE)]).predictions
        found = Prediction.model_validate(response.json()["prediction"])
        assert found.label == expected.label
        assert found.score == pytest.approx(expected.score, abs=0.01)
        assert response.json()["bundle_digest"] == served.bundle.digest

    def test_a_jpeg_and_a_deidentified_study_are_answered(self, client: TestClient) -> None:
        for content, kind in ((picture("JPEG"), "image/jpeg"), (clean(dicom()), "application/dicom")):
            assert post(client, content, kind).status_code == 200

    def test_a_batch_is_answered_or_refused_study_by_study_in_its_order(self, client: TestClient, served: Served) -> None:
        contents = [(npy(), "application/x-npy"), (b"broken", "image/png"), (dicom(), "application/dicom"), (png(), "")]
        files = [("files", (f"Curie{i}.x", content, kind)) for i, (content, kind) in enumerate(contents)]
        response = client.post("/predict/batch", files=files)
        assert response.status_code == 200, response.text
        codes = [answer.get("code") for answer in response.json()["answers"]]
        assert codes == [None, "undecodable", "identified", None]
        assert "Curie" not in response.text
        alone = post(client, npy(), "application/x-npy").json()["prediction"]
        assert response.json()["answers"][0]["prediction"] == alone

    def test_an_explanation_comes_as_json_or_beside_the_study(self, client: TestClient) -> None:
        answered = post(client, npy(), "application/x-npy", "/explain?method=integrated_gradients")
        assert answered.status_code == 200, answered.text
        reason = ExplainedPrediction.model_validate(answered.json()["prediction"]).explanation
        assert reason.method == "integrated_gradients"
        study = clean(dicom())
        drawn = post(client, study, "application/dicom", "/explain", accept="application/dicom")
        assert drawn.headers["content-type"] == "application/dicom"
        beside, about = pydicom.dcmread(io.BytesIO(drawn.content)), pydicom.dcmread(io.BytesIO(study))
        assert beside.StudyInstanceUID == about.StudyInstanceUID
        assert post(client, npy(), "application/x-npy", "/explain", accept="application/dicom").status_code == 406
        assert post(client, npy(), "application/x-npy", "/explain?method=magic").status_code == 422

    def test_the_inference_id_is_that_of_the_capture(self, client: TestClient, served: Served) -> None:
        given = post(client, npy(), "application/x-npy").json()["inference_id"]
        wait_until(lambda: any(item.inference_id == given for item in captures.read(served.config())))


class TestRefusals:
    def test_an_identified_study_does_not_reach_the_endpoint(self, client: TestClient) -> None:
        before = value(client, "cvf_gateway_endpoint_seconds_count")
        for kind in ("application/dicom", "image/png", "application/octet-stream"):
            response = post(client, dicom(), kind)
            assert (response.status_code, response.json()["code"]) == (400, "identified")
        assert value(client, "cvf_gateway_endpoint_seconds_count") == before

    def test_a_study_is_deidentified_here_where_that_is_asked_for(
        self, gateway: Callable[..., TestClient], served: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tree = served.tree(deidentify=True) | {"deidentification": {"pixels": "trust"}}
        with TestClient(create_app(ProjectConfig.model_validate(tree))) as client:
            response = post(client, dicom(), "application/dicom")
            assert response.status_code == 200, response.text
            text = Image.new("L", (24, 20))
            file = io.BytesIO()
            text.save(file, "TIFF", description="Curie^Marie")
            picture_id = post(client, file.getvalue(), "image/tiff").json()["inference_id"]
        wait_until(lambda: picture_id in {item.inference_id for item in captures.read(served.config())})
        kept = {item.inference_id: item.request for item in captures.read(served.config())}
        assert b"Curie" not in kept[response.json()["inference_id"]] + kept[picture_id]
        assert b"MRN4711" not in kept[response.json()["inference_id"]]

    @pytest.mark.parametrize(
        ("options", "content", "kind", "status", "code"),
        [
            ({"max_bytes": 100}, npy(), "application/x-npy", 413, "too_large"),
            ({"max_pixels": 479}, npy(), "application/x-npy", 413, "too_large"),
            ({"max_pixels": 479}, png(), "image/png", 413, "too_large"),
            ({}, bomb(), "image/png", 413, "too_large"),
            ({}, b"1,2", "text/csv", 415, "content_type"),
            ({}, b"", "image/png", 400, "undecodable"),
            ({}, png()[:60], "image/png", 400, "truncated"),
        ],
    )
    def test_what_is_too_much_or_no_image_is_refused(
        self, gateway: Callable[..., TestClient], options: dict[str, int], content: bytes, kind: str, status: int, code: str
    ) -> None:
        response = post(gateway(**options), content, kind)
        assert (response.status_code, response.json()["code"]) == (status, code)

    def test_the_largest_study_and_picture_pass_the_limits(self, gateway: Callable[..., TestClient]) -> None:
        client = gateway(max_bytes=len(npy()), max_pixels=480)
        assert post(client, npy(), "application/x-npy").status_code == 200

    def test_a_batch_has_limits_of_its_own(self, gateway: Callable[..., TestClient]) -> None:
        client = gateway(max_files=2, max_batch_bytes=10_000)
        files = [("files", ("x", png(), "image/png"))] * 3
        assert client.post("/predict/batch", files=files).status_code == 400
        assert client.post("/predict/batch", files=[("files", ("x", bytes(10_000), "image/png"))]).status_code == 413
        assert client.post("/predict/batch", files=[("other", ("x", png(), "image/png"))]).status_code == 400
        assert client.post("/predict/batch", content=b"x").status_code == 415
        assert client.post("/predict/batch", files=files[:2]).status_code == 200

    def test_browsers_of_other_pages_are_not_let_in_unless_named(self, gateway: Callable[..., TestClient]) -> None:
        origin = {"origin": "https://viewer.example"}
        assert "access-control-allow-origin" not in gateway().get("/healthz", headers=origin).headers
        named = gateway(cors_origins=["https://viewer.example"])
        assert named.get("/healthz", headers=origin).headers["access-control-allow-origin"] == origin["origin"]
        assert "access-control-allow-origin" not in named.get("/healthz", headers={"origin": "https://x.example"}).headers


class TestKeys:
    def test_a_key_lets_in_and_its_line_can_be_taken_away(self, gateway: Callable[..., TestClient], home: Path) -> None:
        keys = ApiKeys(file=str(home / "keys"))
        one = make_key(keys, "one")
        (home / "keys").write_text((home / "keys").read_text().rstrip("\n"))  # as some editors leave it
        two = make_key(keys, "two")
        client = gateway(access=keys.model_dump())
        for key in (one, two, one):
            assert post(client, npy(), "application/x-npy", **{"X-API-Key": key}).status_code == 200
        assert one.removeprefix("cvf_one_") not in (home / "keys").read_text()
        kept = json.loads((home / "keys").read_text().splitlines()[0])
        assert kept["digest"] == hashlib.sha256(bytes.fromhex(kept["salt"]) + one.encode()).hexdigest()
        assert (home / "keys").stat().st_mode & 0o077 == 0
        _, second = (home / "keys").read_text().splitlines()
        (home / "keys").write_text(second + "\n")
        assert post(client, npy(), "application/x-npy", **{"X-API-Key": one}).status_code == 401
        assert post(client, npy(), "application/x-npy", **{"X-API-Key": two}).status_code == 200
        (home / "keys").unlink()
        assert post(client, npy(), "application/x-npy", **{"X-API-Key": two}).status_code == 401

    @pytest.mark.parametrize("path", ["/predict", "/predict/batch", "/explain", "/feedback"])
    def test_without_a_right_key_nobody_is_let_in_whatever_the_body(
        self, gateway: Callable[..., TestClient], keys: tuple[ApiKeys, str], path: str
    ) -> None:
        access, right = keys
        client = gateway(access=access.model_dump())
        other = right[:-1] + ("A" if right[-1] != "A" else "B")
        for shown in ("", other, right.replace("cvf_one", "cvf_two"), right + "x", "\u00e9"):
            headers = {"X-API-Key": shown.encode(), "content-type": b"application/json"}
            response = client.post(path, content=b"{", headers=headers)
            assert (response.status_code, response.json()["code"]) == (401, "unauthorised"), shown
        assert client.get("/healthz").status_code == 200

    def test_keys_in_the_environment_let_in(self, gateway: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> None:
        keys = ApiKeys(env="GATEWAY_KEYS")
        key, line = make_key(keys, "one").splitlines()
        monkeypatch.setenv("GATEWAY_KEYS", line)
        assert post(gateway(access=keys.model_dump()), npy(), "application/x-npy", **{"X-API-Key": key}).status_code == 200

    def test_what_is_wrong_with_keys_is_told(self, home: Path, served: Served) -> None:
        make_key(ApiKeys(), "one")
        with pytest.raises(ConfigError, match="has a key of the name one"):
            make_key(ApiKeys(), "one")
        with pytest.raises(ConfigError, match="small letters"):
            make_key(ApiKeys(), "One")
        with pytest.raises(ConfigError, match=r"cannot be read; `cvf gateway-key` makes keys"):
            create_app(served.config(access={"kind": "api_keys", "file": "none"}))
        (home / "empty").write_text("")
        with pytest.raises(ConfigError, match="holds no keys"):
            create_app(served.config(access={"kind": "api_keys", "file": "empty"}))
        (home / "odd").write_text("no keys")
        with pytest.raises(ConfigError, match="is not as `cvf gateway-key` writes it"):
            create_app(served.config(access={"kind": "api_keys", "file": "odd"}))


SECRET = "a shared secret of at least thirty-two bytes"  # noqa: S105 - of the tests alone


def token(key: Any = SECRET, algorithm: str = "HS256", **changes: Any) -> str:
    claims = {"iss": "https://id.example", "aud": "cvf", "sub": "marie@example", "exp": time.time() + 60} | changes
    kid = {"kid": "k"}
    return jwt.encode({name: value for name, value in claims.items() if value is not None}, key, algorithm, headers=kid)


class TestTokens:
    ACCESS: dict[str, Any] = {"kind": "jwt", "issuer": "https://id.example", "audience": "cvf"}

    def status(self, client: TestClient, shown: str) -> int:
        return post(client, npy(), "application/x-npy", authorization=f"Bearer {shown}").status_code

    def test_a_token_must_be_signed_of_time_and_for_us(
        self, gateway: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("JWT_KEY", SECRET)
        client = gateway(access=self.ACCESS | {"key_env": "JWT_KEY", "algorithms": ["HS256"]})
        with caplog.at_level(logging.INFO, LOG):
            assert self.status(client, token()) == 200
        assert "jwt-" in caplog.text
        assert "marie@example" not in caplog.text
        wrong = [
            token("another secret of at least thirty-two bytes"),
            token(exp=time.time() - 60),
            token(aud="other"),
            token(iss="https://other.example"),
            token(sub=None),
            token(exp=None),
            token("", "none"),
            "no token",
            "",
        ]
        assert [self.status(client, shown) for shown in wrong] == [401] * len(wrong)
        assert post(client, npy(), "application/x-npy", authorization=f"Basic {token()}").status_code == 401

    def test_published_keys_are_fetched(self, gateway: Callable[..., TestClient]) -> None:
        private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        published = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(private.public_key())) | {"kid": "k", "use": "sig"}
        with answering(lambda _: (200, {}, json.dumps({"keys": [published]}).encode())) as url:
            client = gateway(access=self.ACCESS | {"jwks_url": f"{url}/jwks"})
            assert self.status(client, token(private, "RS256")) == 200
            other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            assert self.status(client, token(other, "RS256")) == 401
            assert self.status(client, token()) == 401  # signed with a secret, where only public keys are trusted
        gone = gateway(access=self.ACCESS | {"jwks_url": "http://127.0.0.1:1/jwks"})
        assert self.status(gone, token(private, "RS256")) == 503

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"jwks_url": "u", "key_env": "E"},
            {"jwks_url": "u", "algorithms": ["HS256"]},
            {"key_env": "E", "algorithms": ["RS256", "HS256"]},
        ],
    )
    def test_settings_that_would_let_anybody_in_are_refused(self, served: Served, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"one of jwks_url and key_env|algorithms of one kind"):
            served.config(access=self.ACCESS | options)


class TestLimits:
    def test_each_caller_has_a_rate_of_its_own(self, gateway: Callable[..., TestClient], home: Path) -> None:
        keys = ApiKeys(file=str(home / "keys"))
        one, two = ({"X-API-Key": make_key(keys, name)} for name in ("one", "two"))
        client = gateway(access=keys.model_dump(), rate="3/hour")
        assert [post(client, npy(), "application/x-npy", **one).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = post(client, npy(), "application/x-npy", **one)
        assert refused.json()["code"] == "rate"
        assert 3500 < int(refused.headers["retry-after"]) <= 3600
        files = [("files", ("x", png(), "image/png"))] * 4
        never = client.post("/predict/batch", files=files, headers=two)
        assert (never.status_code, never.json()["code"]) == (413, "too_many")
        assert client.post("/predict/batch", files=files[:3], headers=two).status_code == 429
        assert client.post("/predict/batch", files=files[:1], headers=two).status_code == 200
        assert client.get("/healthz").status_code == 200

    def test_addresses_of_storages_hold_no_password(self, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match="without a password"):
            served.config(rate_storage="redis://:s3cret@127.0.0.1:6379")
        for kind in ("mongodb", "s3cret"):
            monkeypatch.setenv("CVF_GATEWAY_RATE_STORAGE", f"{kind}://:s3cret@127.0.0.1")
            with pytest.raises(ConfigError, match=r"rate_storage: another kind given; allowed: memory, redis") as failure:
                create_app(served.config())
            assert "s3cret" not in str(failure.value)

    def test_there_is_room_for_so_many_requests(self, served: Served) -> None:
        with slow_endpoint() as (url, entered, gate), asked_at(url, served, in_flight=1) as client:
            waiting = threading.Thread(target=post, args=(client, npy(), "application/x-npy"))
            waiting.start()
            assert entered.wait(30)
            busy = post(client, npy(), "application/x-npy")
            assert (busy.status_code, busy.json()["code"]) == (503, "busy")
            for path in ("/healthz", "/readyz"):
                assert client.get(path).status_code == 200
            assert waiting.is_alive(), "neither waits behind the model"
            gate.set()
            waiting.join()

    def test_there_is_room_for_so_many_bytes_of_batches(self, served: Served) -> None:
        files = [("files", ("x", npy(), "application/x-npy"))] * 3
        room: dict[str, Any] = {"max_batch_bytes": 4 * len(npy()), "batches_bytes": 4 * len(npy())}
        with slow_endpoint() as (url, entered, gate), asked_at(url, served, **room) as client:
            waiting = threading.Thread(target=client.post, args=("/predict/batch",), kwargs={"files": files})
            waiting.start()
            assert entered.wait(30)
            busy = client.post("/predict/batch", files=files)
            assert (busy.status_code, busy.json()["code"], busy.headers["retry-after"]) == (503, "busy", "1")
            gate.set()
            waiting.join()
            assert client.post("/predict/batch", files=files).status_code == 200
        with pytest.raises(ValueError, match="batches_bytes of at least max_batch_bytes"):
            served.config(batches_bytes=1)

    def test_tries_wait_for_room_before_they_look_at_the_circuit(self, served: Served) -> None:
        files = [("files", ("x", npy(), "application/x-npy"))] * 4
        endpoint = answering(lambda _: failing("InternalFailure", 500))
        with endpoint as url, asked_at(url, served, in_flight=1, attempts=1, failures=1) as client:
            assert client.post("/predict/batch", files=files).json()["code"] == "unavailable"
        assert endpoint.asked == 1

    def test_a_try_that_finds_no_room_in_time_is_refused(self, served: Served) -> None:
        endpoint = Endpoint(served.config(in_flight=1, timeout=0.05), Metrics())

        async def ask() -> None:
            async with endpoint._places:
                await endpoint.invoke(npy(), "application/x-npy", "id", "application/json")

        with pytest.raises(Refused, match="keep the endpoint busy") as refused:
            asyncio.run(ask())
        endpoint.close()
        assert (refused.value.status, refused.value.code) == (503, "busy")


class answering:
    """An HTTP server that gives the answers of a function of the body: status, headers, body; ``asked`` counts requests."""

    def __init__(self, answer: Callable[[bytes], tuple[int, dict[str, str], bytes]]) -> None:
        outer = self
        self.answer, self.asked = answer, 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                if self.path == "/ping" or self.headers.get("x-amz-target"):
                    status, headers, body = 200, {}, b'{"endpoints": {}, "EndpointStatus": "InService"}'
                else:
                    outer.asked += 1
                    status, headers, body = outer.answer(self.rfile.read(int(self.headers.get("content-length", 0))))
                self.send_response(status)
                for name, told in headers.items():
                    self.send_header(name, told)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.do_POST()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._server.server_port}"

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def slow_endpoint() -> Iterator[tuple[str, threading.Event, threading.Event]]:
    """Its address, an event that a request sets that has reached it, and one on which its answers wait."""
    entered, gate = threading.Event(), threading.Event()

    def slow(_: bytes) -> tuple[int, dict[str, str], bytes]:
        entered.set()
        gate.wait(30)
        return GOOD

    with answering(slow) as url:
        yield url, entered, gate


def asked_at(url: str, served: Served, **options: Any) -> TestClient:
    """A gateway before another server than the local endpoint."""
    tree = served.tree(**options) | {"deploy": {"kind": "local", "url": url}}
    return TestClient(create_app(ProjectConfig.model_validate(tree)))


def failing(code: str, status: int, **details: Any) -> tuple[int, dict[str, str], bytes]:
    """An error as InvokeEndpoint tells it."""
    headers = {"x-amzn-ErrorType": code, "Content-Type": "application/json"}
    return status, headers, json.dumps({"Message": "Curie^Marie", **details}).encode()


ANSWER = json.dumps(
    {
        "predictions": [{"label": "normal", "score": 0.1, "scores": {"normal": 0.9, "opacity": 0.1}, "features": {}}],
        "bundle_digest": "d",
    }
).encode()
GOOD = (200, {"Content-Type": "application/json"}, ANSWER)


@pytest.fixture(scope="module")
def troubled(served: Served) -> Iterator[tuple[answering, TestClient]]:
    """An endpoint whose answers a test gives, and a gateway before it, which gives up on nothing for long."""
    endpoint = answering(lambda _: GOOD)
    with endpoint as url, asked_at(url, served, failures=1000, retry_share=1) as client:
        yield endpoint, client


class TestEndpointInTrouble:
    @pytest.mark.parametrize(
        ("trouble", "status", "code", "tries"),
        [
            (failing("ServiceUnavailable", 503), 503, "unavailable", 3),
            (failing("InternalFailure", 500), 503, "unavailable", 3),
            (failing("ThrottlingException", 429), 503, "throttled", 3),
            (failing("ModelError", 424, OriginalStatusCode=500, OriginalMessage="Curie"), 502, "model_error", 1),
            (failing("ModelError", 424, OriginalStatusCode=0, OriginalMessage=""), 504, "timeout", 1),
            (
                failing("ModelError", 424, OriginalStatusCode=503, OriginalMessage='{"error": "r", "code": "busy"}'),
                503,
                "busy",
                1,
            ),
            (failing("ValidationError", 400), 502, "misconfigured", 1),
            (failing("AccessDeniedException", 403), 502, "misconfigured", 1),
            ((200, {"Content-Type": "application/json"}, b"Curie"), 502, "model_error", 1),
        ],
    )
    def test_each_trouble_has_its_answer(
        self,
        troubled: tuple[answering, TestClient],
        caplog: pytest.LogCaptureFixture,
        trouble: tuple[Any, ...],
        status: int,
        code: str,
        tries: int,
    ) -> None:
        endpoint, client = troubled
        endpoint.answer, before = lambda _: trouble, endpoint.asked
        with caplog.at_level(logging.DEBUG, "cvf"):
            response = post(client, npy(), "application/x-npy")
            told = response.text + caplog.text + client.get("/metrics").text
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers.get("retry-after") == ("1" if status == 503 else None)
        assert endpoint.asked == before + tries
        assert "Curie" not in told

    def test_a_passing_trouble_is_not_noticed(self, troubled: tuple[answering, TestClient]) -> None:
        endpoint, client = troubled
        answers = iter([failing("ServiceUnavailable", 503), failing("ThrottlingException", 429), GOOD])
        endpoint.answer, before = lambda _: next(answers), value(client, "cvf_gateway_retries_total")
        assert post(client, npy(), "application/x-npy").status_code == 200
        assert value(client, "cvf_gateway_retries_total") == before + 2

    def test_retries_have_a_budget(self, served: Served) -> None:
        endpoint = answering(lambda _: failing("ThrottlingException", 429))
        with endpoint as url, asked_at(url, served, retry_share=0.1) as client:
            for _ in range(15):
                post(client, npy(), "application/x-npy")
        assert endpoint.asked <= 15 + RetryBudget.MOST + 15 * 0.1

    def test_an_endpoint_that_is_not_there_is_left_alone_and_found_again(self, served: Served) -> None:
        good = threading.Event()
        endpoint = answering(lambda _: GOOD if good.is_set() else failing("InternalFailure", 500))
        with endpoint as url, asked_at(url, served, failures=3, open_seconds=0.5, attempts=1) as client:
            codes = [post(client, npy(), "application/x-npy").json()["code"] for _ in range(6)]
            assert codes == ["unavailable"] * 3 + ["circuit_open"] * 3
            assert post(client, npy(), "application/x-npy").headers["retry-after"] == "1"
            assert endpoint.asked == 3
            assert value(client, "cvf_gateway_circuit_state") == 2
            assert client.get("/readyz").status_code == 503
            good.set()
            wait_until(lambda: post(client, npy(), "application/x-npy").status_code == 200)
            assert value(client, "cvf_gateway_circuit_state") == 0


class TestBreaker:
    def fail(self, breaker: Breaker, error: Refused) -> None:
        with pytest.raises(Refused), breaker.watching():
            raise error

    def test_it_opens_after_failures_in_a_row_and_tries_one_request(self) -> None:
        now = [0.0]
        breaker = Breaker(2, 10, clock=lambda: now[0])
        outage = NoAnswer(503, "unavailable", "", retriable=True, outage=True)
        self.fail(breaker, outage)
        self.fail(breaker, Refused(400, "identified", ""))  # an answer: the endpoint is there
        self.fail(breaker, outage)
        assert breaker.state == "closed"
        self.fail(breaker, outage)
        assert breaker.state == "open"
        now[0] = 10
        assert breaker.state == "half_open"
        with breaker.watching(), pytest.raises(NoAnswer, match="has not answered"), breaker.watching():
            pass
        assert breaker.state == "closed"

    def test_a_probe_that_fails_opens_it_anew_and_one_that_says_nothing_leaves_room_for_the_next(self) -> None:
        now = [0.0]
        breaker = Breaker(1, 10, clock=lambda: now[0])
        self.fail(breaker, NoAnswer(503, "unavailable", "", retriable=True, outage=True))
        now[0] = 10
        self.fail(breaker, NoAnswer(503, "unavailable", "", retriable=True, outage=True))
        assert breaker.state == "open"
        now[0] = 20
        with pytest.raises(KeyboardInterrupt), breaker.watching():
            raise KeyboardInterrupt
        with breaker.watching():
            pass
        assert breaker.state == "closed"


class TestFeedback:
    def test_a_label_that_arrives_later_joins_its_capture_in_the_next_training(
        self, client: TestClient, served: Served, home: Path
    ) -> None:
        rows = list(studies(3, image_size=48, seed=77, labels=["normal", "opacity"]))[:2]
        ids = [post(client, clean(study), "application/dicom").json()["inference_id"] for study, _ in rows]
        assert client.post("/feedback", json={"labels": dict.fromkeys(ids, "normal")}).json() == {"stored": 2}
        assert client.post("/feedback", json={"labels": {ids[0]: "opacity"}}).json() == {"stored": 1}
        wait_until(lambda: set(ids) <= {item.inference_id for item in captures.read(served.config())})
        source = TINY["data"]["source"] | {"patients": 12}
        tree = served.tree() | {"data": {"source": source, "workers": 1, "include_captures": True}}
        run_stage("ingest", ProjectConfig.model_validate(tree), (home / "run").as_uri())
        manifest = read_manifest(home / "run" / "ingest").set_index("id")
        found = {name: manifest.loc[f"capture-{name}", "label"] for name in ids}
        assert found == {ids[0]: 1, ids[1]: 0}

    @pytest.mark.parametrize(
        ("body", "status", "code"),
        [
            ({"labels": {"a": "tumour"}}, 400, "unknown_label"),
            ({"labels": {"verify-1": "normal"}}, 400, "unknown_id"),
            ({"labels": {}}, 422, "invalid"),
            ({"labels": {"Curie Marie": "normal"}}, 422, "invalid"),
            ({"labels": {"a": ["Curie"]}}, 422, "invalid"),
            ({"Curie": 1}, 422, "invalid"),
        ],
    )
    def test_what_is_no_label_is_refused_without_being_quoted(
        self, client: TestClient, body: dict[str, Any], status: int, code: str
    ) -> None:
        response = client.post("/feedback", json=body)
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert "Curie" not in response.text
        assert "tumour" not in response.text

    def test_a_body_of_another_kind_or_without_end_is_refused(self, client: TestClient) -> None:
        assert post(client, b" " * ((1 << 20) + 1), "application/json", "/feedback").status_code == 413
        assert post(client, b'{"labels": {"a": "normal"}}', "text/plain", "/feedback").status_code == 415

    def test_a_storage_that_does_not_take_it_is_told_without_its_place(self, served: Served, home: Path) -> None:
        (home / "file").write_text("no folder")
        tree = served.tree() | {"storage": str(home / "file")}
        with TestClient(create_app(ProjectConfig.model_validate(tree))) as client:
            response = client.post("/feedback", json={"labels": {"a": "normal"}})
        assert (response.status_code, response.json()["code"]) == (503, "storage")
        assert str(home) not in response.text


class TestTelling:
    def test_nothing_of_a_request_is_logged_counted_or_told(self, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
        told = ""
        with caplog.at_level(logging.DEBUG):
            for response in (
                post(client, dicom(), "application/dicom", **{"X-Request-Id": "Curie-4711"}),
                post(client, dicom(), "Curie/MRN4711"),
                post(client, b"Curie^Marie", "image/png", "/explain?method=Curie"),
                client.post("/predict/batch", files=[("files", ("Curie.dcm", dicom(), "application/dicom"))]),
                client.post(
                    "/predict/batch", content=b"--Curie", headers={"content-type": "multipart/form-data; boundary=Curie"}
                ),
                client.get("/studies/Curie?patient=MRN4711"),
                client.post("/feedback", content=b'{"labels": "Curie'),
            ):
                assert response.status_code >= 400 or response.json()["answers"][0]["code"] == "identified"
                told += response.text + str(response.headers)
        ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # the test's own client
        told += "\n".join(ours) + client.get("/metrics").text
        assert ours
        for secret in ("Curie", "Marie", "MRN4711", "4711"):
            assert secret not in told

    def test_an_error_that_nobody_foresaw_is_one_answer_and_quotes_nothing(
        self, gateway: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        client = gateway()

        def broken(*_: Any) -> bool:
            raise ValueError("Curie"[:3])

        monkeypatch.setattr(type(DOMAIN), "recognises", broken)
        response = post(client, npy(), "application/x-npy")
        assert (response.status_code, response.json()["code"]) == (500, "internal")
        assert "ValueError" in caplog.text
        assert "ValueError: Cur" not in caplog.text
        assert "Cur" not in response.text

    def test_a_sender_that_hangs_up_is_no_error_of_ours(self, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
        messages = iter([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        async def send(_: Any) -> None:
            pytest.fail("nobody is there to read an answer")

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
        with caplog.at_level(logging.INFO, LOG):
            asyncio.run(client.app(scope, receive, send))  # type: ignore[arg-type]
        [line] = [record for record in caplog.records if record.name == LOG]
        assert line.levelno == logging.INFO
        assert "/predict 499 hung_up" in line.getMessage()

    def test_who_asks_without_a_key_is_logged_by_a_pseudonym(
        self, client: TestClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.INFO, LOG):
            post(client, b"", "image/png")
        assert "open-" in caplog.text
        assert "testclient" not in caplog.text, "the address that it comes from"

    def test_a_request_has_an_id_which_the_sender_may_give(self, client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
        given = "4bf92f35-77b3-4da6-a3ce-929d0e0e4736"
        with caplog.at_level(logging.INFO, LOG):
            response = post(client, npy(), "application/x-npy", **{"X-Request-Id": given})
        assert response.headers["x-request-id"] == given
        assert f"{given} /predict 200" in caplog.text
        made = {client.get("/healthz", headers={"X-Request-Id": "x y"}).headers["x-request-id"] for _ in range(2)}
        assert len(made) == 2

    def test_metrics_tell_latencies_errors_and_who_is_in_hand(self, gateway: Callable[..., TestClient]) -> None:
        client = gateway(rate="1000/second")  # its own
        for content in (npy(), npy(), b"x"):
            post(client, content, "application/x-npy")
        assert value(client, "cvf_gateway_request_seconds_count", route="/predict", status="200") == 2
        assert value(client, "cvf_gateway_errors_total", code="undecodable") == 1
        assert value(client, "cvf_gateway_endpoint_seconds_count", outcome="answered") == 2
        assert value(client, "cvf_gateway_in_flight") == 1, "the one that asks"

    def test_it_is_ready_where_the_endpoint_is(self, client: TestClient, served: Served) -> None:
        assert client.get("/readyz").status_code == 200
        tree = served.tree() | {"project": "other"}
        with TestClient(create_app(ProjectConfig.model_validate(tree))) as other:
            assert other.get("/readyz").json()["error"] == "the endpoint is missing"
            assert post(other, npy(), "application/x-npy").json()["code"] == "no_endpoint"


IMAGES = {
    "application/x-npy": npy(),
    "image/png": png(),
    "image/jpeg": picture("JPEG"),
    "image/tiff": picture("TIFF"),
    "application/dicom": clean(dicom()),
}
for kind, content in IMAGES.items():
    schemathesis.openapi.media_type(kind, st.one_of(st.just(content), st.binary(max_size=200)))


@pytest.fixture
def api(served: Served, keys: tuple[ApiKeys, str]) -> Any:
    access, key = keys
    found = schemathesis.openapi.from_asgi("/openapi.json", create_app(served.config(access=access.model_dump())))
    found.config.update(headers={"X-API-Key": key})
    return found


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    ignored_auth,
    unsupported_method,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
def test_every_answer_is_as_the_openapi_document_says(api: Any, mode: GenerationMode) -> None:
    answered: dict[str, set[int]] = {}
    for found in api.get_all_operations():
        operation = found.ok()

        @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            response = case.call_and_validate(checks=CHECKS)
            answered.setdefault(case.path, set()).add(response.status_code)

        with suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parameters
            check()
    if mode is GenerationMode.POSITIVE:
        assert all(200 in statuses for statuses in answered.values()), answered
        told = {"/predict", "/predict/batch", "/explain", "/similar", "/feedback", "/healthz", "/readyz", "/metrics"}
        assert answered.keys() == told


def test_the_commands_make_a_key_and_serve_until_sigterm(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(served.tree(access={"kind": "api_keys"})))
    assert main(["gateway-key", "--config", str(tmp_path / "project.yaml"), "one"]) == 0
    key = capsys.readouterr().out.strip()
    assert KEY.fullmatch(key)
    port = free_port()
    process = start_cvf("gateway", "--config", str(tmp_path / "project.yaml"), "--port", str(port), folder=tmp_path)
    try:
        wait_until(lambda: process.poll() is not None or is_up(f"http://127.0.0.1:{port}/readyz"))
        refused = httpx.post(f"http://127.0.0.1:{port}/predict?patient=Curie", content=dicom(), trust_env=False)
        assert refused.status_code == 401
        assert f" by model {served.bundle.digest[:12]} in " in smoke.ask(f"http://127.0.0.1:{port}", key)
        with pytest.raises(SystemExit, match="/predict: 401 unauthorised"):
            smoke.ask(f"http://127.0.0.1:{port}", "another key")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in {0, -signal.SIGTERM}
    with pytest.raises(SystemExit, match="does not answer as a gateway"):
        smoke.ask(f"http://127.0.0.1:{port}")
    log = (tmp_path / "gateway.log").read_text()
    assert "/predict 401 unauthorised" in log
    assert "Curie" not in log
    assert "Traceback" not in log
