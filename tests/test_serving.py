"""The container contract: what is answered, what is refused and how, and how a serving process starts and ends."""

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.data import get_testdata_file

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import Decoded, DeidentificationConfig, open_domain
from cv_factory_ops.errors import DataError
from cv_factory_ops.predictor import Answer, Predictor
from cv_factory_ops.serving.app import create_app
from tests.bundles import IMAGE, free_port, npy, png, start_cvf, wait_until, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("serving") / "bundle", seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("process")


@pytest.fixture(scope="module")
def client(bundle: Bundle, folder: Path) -> Iterator[httpx.Client]:
    """A client of a real ``cvf serve``, which logs to ``<folder>/serve.log``."""
    port = free_port()
    process = start_cvf("serve", "--model", str(bundle.path), "--host", "127.0.0.1", "--port", str(port), folder=folder)
    wait_until(lambda: process.poll() is not None or is_served(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as connected:
        yield connected
    process.terminate()
    process.wait(30)


def post(client: httpx.Client, body: bytes, content_type: str) -> httpx.Response:
    return client.post("/invocations", content=body, headers={"content-type": content_type})


def dicom(**changes: str) -> bytes:
    """A real MR slice of pydicom's test data, its identity replaced."""
    path = get_testdata_file("MR_small.dcm")
    assert isinstance(path, str)
    data = pydicom.dcmread(path)
    data.PatientName, data.PatientID = "Curie^Marie", "PATIENT-7"
    for name, value in changes.items():
        setattr(data, name, value)
    file = io.BytesIO()
    data.save_as(file)
    return file.getvalue()


def test_ping_says_that_the_model_is_loaded(client: httpx.Client) -> None:
    assert client.get("/ping").status_code == 200


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (npy(), "application/x-npy"),
        (png(), "image/png"),
        (png(), "IMAGE/PNG; charset=binary"),
        (json.dumps({"instances": [IMAGE.tolist()]}).encode(), "application/json"),
    ],
)
def test_an_image_is_answered_as_the_predictor_does(
    client: httpx.Client, bundle: Bundle, body: bytes, content_type: str
) -> None:
    response = post(client, body, content_type)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    answer = Answer.model_validate_json(response.content)
    (expected,) = Predictor(bundle).answer([Decoded(IMAGE)]).predictions
    assert answer.bundle_digest == bundle.digest
    assert answer.predictions[0].label == expected.label
    assert answer.predictions[0].score == pytest.approx(expected.score, abs=0.01)


def test_a_batch_is_answered_in_its_order(client: httpx.Client) -> None:
    images = [IMAGE.tolist(), np.zeros((5, 9)).tolist(), IMAGE.T.tolist()]
    batch = post(client, json.dumps({"instances": images}).encode(), "application/json").json()["predictions"]
    alone = [
        post(client, json.dumps({"instances": [image]}).encode(), "application/json").json()["predictions"][0]
        for image in images
    ]
    assert [item["score"] for item in batch] == pytest.approx([item["score"] for item in alone], abs=1e-5)
    assert len({item["features"]["image_mean"] for item in batch}) > 1


def test_a_deidentified_study_is_answered(client: httpx.Client) -> None:
    study = open_domain("medical").deidentify(dicom(), DeidentificationConfig(pixels="trust")).content
    response = post(client, study, "application/dicom")
    assert response.status_code == 200
    assert response.json()["predictions"][0]["features"]["metadata_modality"] == "MR"
    assert "Curie" not in response.text


@pytest.mark.parametrize("content_type", ["application/dicom", "image/png"])
def test_an_identified_study_is_never_answered(client: httpx.Client, folder: Path, content_type: str) -> None:
    response = post(client, dicom(), content_type)
    assert response.status_code == 400
    assert response.json()["code"] == "identified"
    assert "\n" not in response.json()["error"]
    for secret in ("Curie", "PATIENT-7"):
        assert secret not in response.text + (folder / "serve.log").read_text()


def bad_instances(image: NDArray[np.float32] | list[object]) -> bytes:
    return json.dumps({"instances": [image if isinstance(image, list) else image.tolist()]}).encode()


@pytest.mark.parametrize(
    ("body", "content_type", "status", "code"),
    [
        (b"1,2", "text/csv", 415, "content_type"),
        (b"x", "", 415, "content_type"),
        (b"0" * (6 * 1024 * 1024 + 1), "image/png", 413, "too_large"),
        (b"", "application/json", 400, "undecodable"),
        (b"\xff{", "application/json", 400, "undecodable"),
        (b"[" * 100_000, "application/json", 400, "undecodable"),
        (b'{"images": []}', "application/json", 400, "undecodable"),
        (b'{"instances": 7}', "application/json", 400, "undecodable"),
        (b'{"instances": []}', "application/json", 400, "undecodable"),
        (bad_instances([[0.5], [0.5, 0.5]]), "application/json", 400, "undecodable"),
        (bad_instances(np.zeros((2, 2, 4), np.float32)), "application/json", 400, "undecodable"),
        (bad_instances([[]]), "application/json", 400, "undecodable"),
        (bad_instances(2 * IMAGE), "application/json", 400, "undecodable"),
        (b'{"instances": [[[NaN]]]}', "application/json", 400, "undecodable"),
    ],
)
def test_a_refusal_says_why_in_one_line(client: httpx.Client, body: bytes, content_type: str, status: int, code: str) -> None:
    response = post(client, body, content_type)
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert 0 < len(response.json()["error"].splitlines()[0]) < 400


@pytest.mark.parametrize("content_type", ["application/x-npy", "image/png", "image/jpeg", "application/dicom"])
@pytest.mark.parametrize("body", [b"", b"\x00\x01", npy()[:60], png()[:40]])
def test_an_unreadable_body_is_the_senders_mistake(client: httpx.Client, body: bytes, content_type: str) -> None:
    response = post(client, body, content_type)
    assert response.status_code == 400
    assert set(response.json()) == {"error", "code"}


def test_pickles_are_not_loaded(client: httpx.Client) -> None:
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert post(client, file.getvalue(), "application/x-npy").status_code == 400


def test_a_bundle_without_weights_is_explained(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", seed=1)
    (bundle.path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match=r"cannot be loaded as a model bundle"):
        create_app(bundle.path)


def test_a_serving_process_ends_by_sigterm_or_with_its_parent(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CVF_EXIT_WITH_STDIN", "1")
    for how in ("signal", "stdin"):
        port = free_port()
        process = start_cvf("serve", "--model", str(bundle.path), "--host", "127.0.0.1", "--port", str(port), folder=tmp_path)
        try:
            wait_until(lambda port=port, process=process: process.poll() is not None or is_served(port))
            assert is_served(port), (tmp_path / "serve.log").read_text()
            if how == "signal":
                process.send_signal(signal.SIGTERM)
            else:
                assert process.stdin is not None
                process.stdin.close()
            process.wait(30)
        finally:
            process.kill()
    assert "Traceback" not in (tmp_path / "serve.log").read_text()


def test_a_serving_process_explains_why_it_cannot_start(tmp_path: Path) -> None:
    process = start_cvf("serve", "--model", str(tmp_path / "none"), folder=tmp_path)
    assert process.wait(60) == 3
    assert "is not a model bundle" in (tmp_path / "serve.log").read_text()


def is_served(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/ping", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False
