"""The container contract: what is answered, what is refused and how, and how a serving process starts and ends."""

import asyncio
import io
import json
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pydicom
import pytest
import torch
from highdicom.sr import srread
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from pydicom.data import get_testdata_file
from pydicom.sr.codedict import codes
from pydicom.uid import ComprehensiveSRStorage, UltrasoundMultiFrameImageStorage
from torch import nn

from cv_factory_ops.answers import SegmentedPrediction
from cv_factory_ops.bundle import Bundle, Pca, pack
from cv_factory_ops.config.models import EfficientNet, EnsembleModel, Member, Model, ResNet, SmallCnn, Unet, Vit
from cv_factory_ops.domain import Decoded, DeidentificationConfig, open_domain, to_uint16
from cv_factory_ops.engine import OpenVino, open_engine
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.models import Classifier, build, join
from cv_factory_ops.predictor import Answer, Predictor
from cv_factory_ops.segmentation import mask_of
from cv_factory_ops.serving.app import create_app
from cv_factory_ops.serving.batching import Batcher
from cv_factory_ops.serving.settings import ServingSettings
from domain_medical.structured_report import structured_report
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
    (expected,) = Predictor(bundle).answer([Decoded(to_uint16(IMAGE))]).predictions
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


def test_a_server_of_another_user_reads_a_bundle_and_its_archive(bundle: Bundle, tmp_path: Path) -> None:
    pack(bundle.path, tmp_path / "model.tar.gz")
    assert {file.stat().st_mode for file in bundle.path.iterdir()} == {(bundle.path / "bundle.json").stat().st_mode}
    with tarfile.open(tmp_path / "model.tar.gz") as archive:
        assert {member.mode for member in archive} == {0o644}


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


def deidentified(**changes: str) -> bytes:
    return open_domain("medical").deidentify(dicom(**changes), DeidentificationConfig(pixels="trust")).content


def sent(app: Any, requests: Sequence[tuple[bytes, dict[str, str]]]) -> list[httpx.Response]:
    """Answers of an application to requests that are sent at once."""

    async def send() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://container", timeout=60) as client:
            return list(await asyncio.gather(*[client.post("/invocations", content=body, headers=h) for body, h in requests]))

    return asyncio.run(send())


def read_metrics(text: str) -> dict[tuple[str, str], float]:
    """Values by name and by all labels as one text."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, " ".join(sample.labels.values())): sample.value for sample in samples}


class Recorder:
    """Work that tells which batches it was given; while :attr:`gate` is closed it does not end."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.batches.append(list(items))
        assert self.gate.wait(30)
        if -1 in items:
            raise ArithmeticError("a bad batch")
        return [item * item for item in items]


def test_what_comes_while_a_batch_is_worked_on_is_the_next_one() -> None:
    work = Recorder()
    work.gate.clear()

    async def main() -> list[list[int]]:
        batcher = Batcher(work, size=4, wait=60)
        first = asyncio.create_task(batcher.answer([1]))
        await asyncio.sleep(0)
        others = [asyncio.create_task(batcher.answer([item])) for item in range(2, 9)]
        await asyncio.sleep(0)
        work.gate.set()
        return [await task for task in (first, *others)]

    assert asyncio.run(main()) == [[item * item] for item in range(1, 9)]
    assert work.batches == [[1], [2, 3, 4, 5], [6, 7, 8]]


def test_what_comes_alone_does_not_wait() -> None:
    work = Recorder()

    async def main() -> list[int]:
        batcher = Batcher(work, size=4, wait=3600)
        with batcher.coming():
            await asyncio.sleep(0)
        return [*await asyncio.wait_for(batcher.answer([2]), 30), *await asyncio.wait_for(batcher.answer([3]), 30)]

    assert asyncio.run(main()) == [4, 9]
    assert work.batches == [[2], [3]]


@pytest.mark.parametrize("comes", [True, False])
def test_an_image_waits_for_those_on_their_way_until_they_come_or_are_refused(comes: bool) -> None:
    work = Recorder()

    async def main() -> None:
        batcher = Batcher(work, size=4, wait=3600)
        with batcher.coming():
            early = asyncio.create_task(batcher.answer([2]))
            await asyncio.sleep(0.05)
            assert work.batches == []
        assert not comes or await batcher.answer([3]) == [9]
        assert await asyncio.wait_for(early, 30) == [4]

    asyncio.run(main())
    assert work.batches == ([[2, 3]] if comes else [[2]])


def test_the_wait_for_those_on_their_way_is_bounded() -> None:
    work = Recorder()

    async def main() -> None:
        batcher = Batcher(work, size=4, wait=0.01)
        with batcher.coming():
            assert await asyncio.wait_for(batcher.answer([2]), 30) == [4]

    asyncio.run(main())
    assert work.batches == [[2]]


def test_as_many_batches_as_lanes_are_worked_on_at_a_time() -> None:
    work = Recorder()
    work.gate.clear()

    async def main() -> list[list[int]]:
        batcher = Batcher(work, size=2, wait=60, lanes=2)
        tasks = [asyncio.create_task(batcher.answer([item, item + 1])) for item in (1, 3, 5)]
        async with asyncio.timeout(30):
            while len(work.batches) < 2:
                await asyncio.sleep(0.01)
        assert sorted(work.batches) == [[1, 2], [3, 4]]
        work.gate.set()
        return [await task for task in tasks]

    assert asyncio.run(main()) == [[1, 4], [9, 16], [25, 36]]
    assert work.batches[2] == [5, 6]


def test_a_failing_batch_fails_its_own_requests_alone() -> None:
    async def main() -> list[Any]:
        batcher = Batcher(Recorder(), size=2, wait=0)
        tasks = [asyncio.create_task(batcher.answer([item])) for item in (3, -1, 5, 6)]
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, bad, beside, last = asyncio.run(main())
    assert (first, last) == ([9], [36])
    assert isinstance(bad, ArithmeticError)
    assert isinstance(beside, ArithmeticError)


def test_concurrent_requests_are_answered_as_single_ones(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    images = [npy(generator.random((20 + i, 24), dtype=np.float32)) for i in range(24)]
    requests = [(image, {"content-type": "application/x-npy"}) for image in images]
    app = create_app(bundle.path, ServingSettings(batch_size=8, batch_wait_ms=1000))
    together = [response.json() for response in sent(app, requests)]
    alone = [sent(app, [request])[0].json() for request in requests]
    for ours, theirs in zip(together, alone, strict=True):
        (one,), (other,) = ours["predictions"], theirs["predictions"]
        assert one["label"] == other["label"]
        assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)
        assert one["features"] == pytest.approx(other["features"], abs=1e-5)
    assert len({answer["predictions"][0]["features"]["image_mean"] for answer in together}) == len(images)
    counted = read_metrics(asyncio.run(get(app, "/metrics")).text)
    assert counted["cvf_serving_batch_images_sum", ""] == 48
    assert counted["cvf_serving_batch_images_count", ""] < 48


async def get(app: Any, path: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://container") as client:
        return await client.get(path)


def network_of(config: Model | EnsembleModel, channels: int, size: int) -> Classifier:
    torch.manual_seed(5)
    if isinstance(config, EnsembleModel):
        return join(config, [build(member.model, 3, 0.4, 0.2, channels, size) for member in config.members]).eval()
    return build(config, 3, 0.4, 0.2, channels, size).eval()


@pytest.mark.parametrize(
    ("config", "channels", "size"),
    [
        (SmallCnn(width=4), 3, 16),
        (ResNet(depth=10, small_input=False), 1, 32),
        (EfficientNet(), 3, 32),
        (Vit(width=32, layers=2, heads=2), 1, 32),
        (Unet(width=4, levels=3), 1, 16),
        (
            EnsembleModel(
                members=[
                    Member(model=SmallCnn(width=4), weight=0.3, temperature=2.0, bias=[0.1, 0.0, -0.1]),
                    Member(model=SmallCnn(width=8), weight=0.7, temperature=0.5, bias=[0.0, 0.0, 0.0]),
                ]
            ),
            1,
            16,
        ),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_openvino_answers_as_pytorch_does_whatever_is_in_the_batch(
    config: Model | EnsembleModel, channels: int, size: int
) -> None:
    network = network_of(config, channels, size)
    images = torch.rand(5, channels, size, size)
    with torch.inference_mode():
        expected = network(images)
    both = OpenVino(network, (channels, size, size), threads=2, lanes=2)
    for engine in (OpenVino(network, (channels, size, size), threads=1), both.beside):
        for ours, theirs in zip(engine(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        for batched, single in zip(engine(images), engine(images[3:4]), strict=True):
            torch.testing.assert_close(batched[3:4], single, rtol=0, atol=1e-6)
    for beside, alone, single in zip(both.beside(images), both(images), both(images[3:4]), strict=True):
        torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[3:4], single, rtol=1e-6, atol=1e-6)


def test_openvino_answers_from_several_threads_at_a_time_are_their_own() -> None:
    engine = OpenVino(network_of(ResNet(depth=10, small_input=False), 1, 32), (1, 32, 32), threads=2, lanes=2)
    batches = [torch.rand(1 + i % 5, 1, 32, 32) for i in range(40)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(engine.beside, batches))
    for batch, found in zip(batches, together, strict=True):
        for ours, alone in zip(found, engine(batch), strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


class Untraceable(nn.Module):
    """Leaves PyTorch, so that a tracer takes its result for a constant."""

    def __init__(self, network: Classifier) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(torch.from_numpy(images.detach().numpy() * 1.0))  # type: ignore[no-any-return]


def test_an_engine_that_cannot_run_the_network_is_replaced_and_says_so(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network = bundle.network()
    monkeypatch.setattr(Bundle, "network", lambda _: Untraceable(network))
    with caplog.at_level(logging.WARNING, logger="cvf"):
        engine = open_engine(bundle, "openvino", 1)
    assert engine.name == "torch"
    (record,) = caplog.records
    assert "OpenVINO cannot run this network, PyTorch does" in record.getMessage()
    images = torch.rand(2, 1, 16, 16)
    assert torch.equal(engine.network(images)[0], network(images)[0])


def test_nothing_of_the_engine_reports_its_use(bundle: Bundle) -> None:
    code = (
        "import sys; from pathlib import Path; from cv_factory_ops.serving.app import create_app;"
        "create_app(Path(sys.argv[1]));"
        "assert 'openvino' in sys.modules; assert not sys.modules['openvino_telemetry'];"
        "assert not any(name.startswith('openvino_telemetry.') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, bundle.path], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


FORGOTTEN = """
import faulthandler, signal, sys, threading
from pathlib import Path
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.engine import open_engine

faulthandler.enable()  # a signal stack of its own, as Python's handlers then use
engines = [open_engine(Bundle.load(Path(sys.argv[1])), "openvino", 1)]
other = threading.Thread(target=engines.clear)
other.start()
other.join()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
signal.raise_signal(signal.SIGTERM)
"""


def test_an_engine_that_another_thread_forgets_leaves_signals_alone(bundle: Bundle) -> None:
    ended = subprocess.run([sys.executable, "-c", FORGOTTEN, bundle.path], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == 7


def test_settings_come_from_the_environment_and_wrong_ones_are_named() -> None:
    settings = ServingSettings.from_environment(
        {"CVF_BATCH_SIZE": "3", "OMP_NUM_THREADS": "2", "CVF_ENGINE": "torch", "HOME": "/"}
    )
    assert (settings.batch_size, settings.threads, settings.engine) == (3, 2, "torch")
    assert ServingSettings.from_environment({"CVF_BATCH_SIZE": ""}) == ServingSettings()
    for name, value in {
        "CVF_ENGINE": "tensorrt",
        "CVF_BATCH_SIZE": "0",
        "CVF_BATCH_WAIT_MS": "-1",
        "OMP_NUM_THREADS": "x",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(f"{name}: {value!r} given; ")):
            ServingSettings.from_environment({name: value})


def test_each_engine_answers_the_same(bundle: Bundle) -> None:
    request = (npy(), {"content-type": "application/x-npy"})
    ours, theirs = (
        sent(create_app(bundle.path, ServingSettings(engine=engine, threads=1)), [request])[0].json()["predictions"][0]  # type: ignore[arg-type]
        for engine in ("openvino", "torch")
    )
    assert ours["scores"] == pytest.approx(theirs["scores"], abs=1e-5)


def files(*contents: tuple[bytes, str]) -> list[tuple[str, tuple[str, bytes, str]]]:
    return [("files", (f"{i}.bin", content, kind)) for i, (content, kind) in enumerate(contents)]


def test_files_of_a_multipart_request_are_answered_in_their_order(client: httpx.Client) -> None:
    studies = [
        (npy(), "application/x-npy"),
        (png(), "image/png"),
        (npy(IMAGE.T.copy()), "application/x-npy"),
        (deidentified(), "application/dicom"),
    ]
    response = client.post("/invocations", files=files(*studies))
    assert response.status_code == 200
    alone = [post(client, *study).json()["predictions"][0] for study in studies]
    assert [given["features"] for given in response.json()["predictions"]] == [given["features"] for given in alone]


@pytest.mark.parametrize(
    ("studies", "status", "code", "part"),
    [
        ([(npy(), "application/x-npy"), (npy()[:50], "application/x-npy")], 400, "undecodable", "part 2: "),
        ([(npy(), "application/x-npy"), (dicom(), "application/dicom")], 400, "identified", "part 2: "),
        ([(dicom(), "image/png"), (npy(), "application/x-npy")], 400, "identified", "part 1: "),
        ([(b"1,2", "text/csv")], 415, "content_type", "part 1: "),
        ([(b"{}", "application/json")], 415, "content_type", "part 1: "),
        ([(npy(), "application/x-npy")] * 257, 400, "multipart", "at most 256 files"),
    ],
)
def test_a_refused_part_is_named(
    client: httpx.Client, studies: list[tuple[bytes, str]], status: int, code: str, part: str
) -> None:
    response = client.post("/invocations", files=files(*studies))
    assert (response.status_code, response.json()["code"]) == (status, code)
    assert part in response.json()["error"]
    assert "Curie" not in response.text


@pytest.mark.parametrize(
    "body", [b"", b"--x--\r\n", b"--x\r\nbroken", b'--x\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n--x--\r\n']
)
def test_a_multipart_body_without_files_is_refused(client: httpx.Client, body: bytes) -> None:
    for content_type in ("multipart/form-data; boundary=x", "multipart/form-data"):
        response = post(client, body, content_type)
        assert (response.status_code, response.json()["code"]) == (400, "multipart")


def test_more_than_the_allowed_images_and_pixels_are_refused(client: httpx.Client) -> None:
    many = json.dumps({"instances": [[[0.5]]] * 257}).encode()
    assert post(client, many, "application/json").json()["code"] == "too_many"
    _, bomb = cv2.imencode(".png", np.zeros((20_000, 5_000), np.uint8))
    response = post(client, bytes(bomb), "image/png")
    assert (response.status_code, response.json()["code"]) == (400, "too_large")


def test_more_than_the_allowed_requests_in_hand_are_told_to_come_again(bundle: Bundle) -> None:
    app = create_app(bundle.path, ServingSettings(most_in_flight=2, threads=1))
    responses = sent(app, [(npy(), {"content-type": "application/x-npy"})] * 6)
    assert sorted(response.status_code for response in responses) == [200, 200, 503, 503, 503, 503]
    assert {response.json()["code"] for response in responses if response.status_code == 503} == {"busy"}
    assert sent(app, [(npy(), {"content-type": "application/x-npy"})])[0].status_code == 200


def test_a_report_says_what_was_found_where_and_by_which_model(client: httpx.Client, bundle: Bundle, tmp_path: Path) -> None:
    study = deidentified()
    headers = {"content-type": "application/dicom", "accept": "application/dicom"}
    response = client.post("/invocations", content=study, headers=headers)
    assert (response.status_code, response.headers["content-type"]) == (200, "application/dicom")
    prediction = post(client, study, "application/dicom").json()["predictions"][0]
    source = pydicom.dcmread(io.BytesIO(study))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = srread(io.BytesIO(response.content))
        (group,) = report.content.get_image_measurement_groups()
        assert report.SOPClassUID == ComprehensiveSRStorage
        assert group.finding_type.meaning == prediction["label"]
        values = {measurement.name.meaning: float(measurement.value) for measurement in group.get_measurements()}
        (other,) = {"normal", "opacity"} - {prediction["label"]}
        expected = {
            "Probability": prediction["scores"][prediction["label"]],
            f"Probability of {other}": prediction["scores"][other],
        }
        assert values == pytest.approx(expected, abs=1e-6)
        assert bundle.digest in str(report)
        assert group.source_images[0].referenced_sop_instance_uid == source.SOPInstanceUID
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "PatientIdentityRemoved"):
            assert report[keyword].value == source[keyword].value
        assert (report.VerificationFlag, report.PreliminaryFlag) == ("UNVERIFIED", "PRELIMINARY")
    assert b"Curie" not in response.content
    again = client.post("/invocations", content=study, headers=headers)
    assert again.content == response.content
    (tmp_path / "report.dcm").write_bytes(response.content)
    require_valid(tmp_path / "report.dcm")


def require_valid(path: Path) -> None:
    """By dciodvfy of dicom3tools, where it is installed; a private coding scheme is unknown to it."""
    if shutil.which("dciodvfy"):
        told = subprocess.run(["dciodvfy", path], capture_output=True, text=True).stderr
        assert "ComprehensiveSR" in told
        assert not [line for line in told.splitlines() if line.startswith("Error")]


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(npy(), "application/x-npy"), (json.dumps({"instances": [[[0.5]]]}).encode(), "application/json")],
)
def test_no_report_is_made_of_what_is_no_study(client: httpx.Client, body: bytes, content_type: str) -> None:
    response = client.post("/invocations", content=body, headers={"content-type": content_type, "accept": "application/dicom"})
    assert (response.status_code, response.json()["code"]) == (406, "accept")


def changed(study: bytes, change: Callable[[pydicom.Dataset], None]) -> bytes:
    data = pydicom.dcmread(io.BytesIO(study))
    change(data)
    file = io.BytesIO()
    data.save_as(file)
    return file.getvalue()


def test_a_report_of_long_labels_frames_and_doubts_is_valid(tmp_path: Path) -> None:
    def of_frames(data: pydicom.Dataset) -> None:
        data.NumberOfFrames, data.PixelData = 3, data.PixelData * 3
        data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = UltrasoundMultiFrameImageStorage

    study = changed(deidentified(), of_frames)
    scores = {"Verschattung des rechten Unterlappens": 0.4, "Überblähung": 0.3, "a\\b": 0.3}
    label = next(iter(scores))
    content = structured_report(study, label, scores, True, "p", ("cv-factory 1", "d" * 64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = srread(io.BytesIO(content)).content.get_image_measurement_groups()
        assert group.finding_type.meaning == label
        assert len(group.finding_type.value) <= 16
        assert [measurement.value for measurement in group.get_measurements()] == [0.4, 0.3, 0.3]
        assert group.source_images[0].referenced_frame_numbers == [2]
        (doubt,) = group.get_qualitative_evaluations(name=codes.DCM.CertaintyOfFinding)
        assert doubt.value.meaning.endswith("a person should decide")
    (tmp_path / "report.dcm").write_bytes(content)
    require_valid(tmp_path / "report.dcm")


@pytest.mark.parametrize(
    ("keyword", "value", "code"), [("SOPInstanceUID", "", "no_uid"), ("SOPClassUID", "1.2.3.4", "sop_class")]
)
def test_a_study_that_no_report_can_refer_to_is_refused(keyword: str, value: str, code: str) -> None:
    study = changed(deidentified(), lambda data: setattr(data, keyword, value))
    with pytest.raises(Rejected) as refused:
        structured_report(study, "a", {"a": 1.0}, False, "p", ("v",))
    assert refused.value.code == code
    with pytest.raises(Rejected, match="de-identify"):
        structured_report(dicom(), "a", {"a": 1.0}, False, "p", ("v",))


def test_a_segmentation_bundle_answers_with_a_mask_as_a_study(bundle: Bundle, tmp_path: Path) -> None:
    model = Unet(width=4, levels=3)
    torch.manual_seed(2)
    network = build(model, 2, 0.5, 0.25, 1, 16)
    pca = Pca(np.zeros(network.features), np.eye(2, network.features))
    manifest = bundle.manifest.model_copy(update={"model": model})
    segmenter = Bundle.write(tmp_path / "bundle", manifest, network, pca, bundle.reference())
    app = create_app(segmenter.path, ServingSettings(threads=1))
    headers = {"content-type": "application/dicom"}
    told, drawn = sent(app, [(deidentified(), headers), (deidentified(), headers | {"accept": "application/dicom"})])
    prediction = Answer.model_validate_json(told.content).predictions[0]
    assert isinstance(prediction, SegmentedPrediction)
    mask = open_domain("medical").read_mask(drawn.content, manifest.labels, "")
    assert mask.shape == (64, 64)
    np.testing.assert_array_equal(mask, mask_of(prediction))


def test_metrics_count_requests_errors_and_scores_and_name_the_model(bundle: Bundle) -> None:
    app = create_app(bundle.path, ServingSettings(threads=1))
    good, bad = (npy(), {"content-type": "application/x-npy"}), (b"x", {"content-type": "text/Curie"})
    answers = sent(
        app,
        [
            good,
            good,
            bad,
            (npy()[:50], {"content-type": "application/x-npy"}),
            (dicom(), {"content-type": "application/dicom"}),
        ],
    )
    text = asyncio.run(get(app, "/metrics")).text
    counted = read_metrics(text)
    assert counted["cvf_serving_request_seconds_count", "predict 200"] == 2
    assert counted["cvf_serving_request_seconds_count", "predict 400"] == 2
    assert counted["cvf_serving_request_seconds_count", "predict 415"] == 1
    assert {code: counted["cvf_serving_errors_total", code] for code in ("content_type", "undecodable", "identified")} == {
        **{"content_type": 1, "undecodable": 1, "identified": 1}
    }
    assert counted["cvf_serving_in_flight", ""] == 0
    label = answers[0].json()["predictions"][0]["label"]
    assert counted["cvf_serving_score_count", label] == 2
    assert counted["cvf_serving_score_sum", label] == pytest.approx(2 * answers[0].json()["predictions"][0]["score"])
    assert counted["cvf_serving_model_info", f"{bundle.digest} openvino tiny"] == 1
    for secret in ("Curie", "PATIENT-7"):
        assert secret not in text


def test_a_request_in_hand_is_answered_after_sigterm_and_new_ones_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    port = free_port()
    process = start_cvf("serve", "--model", str(bundle.path), "--host", "127.0.0.1", "--port", str(port), folder=tmp_path)
    try:
        wait_until(lambda: process.poll() is not None or is_served(port))
        body = npy()
        head = (
            f"POST /invocations HTTP/1.1\r\nHost: c\r\nContent-Type: application/x-npy\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(head.encode() + body[:100])
            wait_until(
                lambda: "cvf_serving_in_flight 1.0" in httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).text
            )
            process.terminate()
            wait_until(lambda: not is_served(port))
            assert process.poll() is None
            connection.sendall(body[100:])
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        assert answer.startswith(b"HTTP/1.1 200")
        assert bundle.digest.encode() in answer
        process.wait(30)
    finally:
        process.kill()
        process.wait(30)


def test_many_clients_of_a_process_are_all_answered(client: httpx.Client) -> None:
    studies = [(npy(), "application/x-npy"), (deidentified(), "application/dicom"), (png(), "image/png")] * 8
    with ThreadPoolExecutor(8) as threads:
        responses = list(threads.map(lambda study: post(client, *study), studies))
    assert {response.status_code for response in responses} == {200}
