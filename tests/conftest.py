"""What many tests share: a tiny project in a folder of its own, and a real S3 by moto's server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml
from hypothesis import HealthCheck, settings

from cv_factory_ops import storage
from tests.mock_kafka import MockCluster

if TYPE_CHECKING:
    from tests.pinecone_server import PineconeServer

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")  # a busy machine is no failure

TINY: dict[str, Any] = {
    "project": "tiny",
    "labels": ["normal", "opacity"],
    "data": {"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}, "workers": 1},
    "splits": {"val": 0.25, "test": 0.25},
    "preprocessing": {"size": 32},
    "model": {"kind": "small_cnn", "width": 4},
    "training": {"epochs": 2, "batch_size": 8, "processes_per_node": 1, "learning_rate": 0.003},
    "gate": {"minimum": 0.0, "margin": 1.0, "bootstrap": 100},
}


@pytest.fixture(scope="module", autouse=True)
def no_settings() -> Iterator[None]:
    """No setting from outside, nor from what another module's fixtures ran in this process."""
    with pytest.MonkeyPatch.context() as patch:
        clear(patch)
        yield


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own for every test: storage, MLflow and key below ``tmp_path``."""
    monkeypatch.setenv("CVF_HOME", str(tmp_path))
    monkeypatch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
    clear(monkeypatch)
    return tmp_path


def clear(patch: pytest.MonkeyPatch) -> None:
    for name in ("CVF_STORAGE", "MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL_SAGEMAKER", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"):
        patch.setenv(name, "")  # so that what libraries set (MLflow does) is undone
        patch.delenv(name)


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An MLflow that the tests of a module share."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def project(home: Path) -> Callable[..., Path]:
    """Write a project's YAML: the tiny one with sections replaced by keyword."""

    def write(**sections: Any) -> Path:
        path = home / "project.yaml"
        path.write_text(yaml.safe_dump({**TINY, **sections}))
        return path

    return write


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """See :func:`prepare`."""
    home = tmp_path_factory.mktemp("prepared")
    prepare(home)
    return home


def prepare(home: Path) -> None:
    """The tiny project's run with ``ingest`` and ``preprocess`` done, in the folder ``run`` of a home with an empty MLflow."""
    (home / "project.yaml").write_text(yaml.safe_dump(TINY))
    environment = {**os.environ, "CVF_HOME": str(home), "CVF_PSEUDONYM_KEY": "a key for tests"}
    for stage in ("ingest", "preprocess"):
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", home / "project.yaml", "--run", home / "run"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    code = f"from cv_factory_ops import config, registry; registry.connect(config.load({str(home / 'project.yaml')!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)


@pytest.fixture
def run(prepared: Path, home: Path) -> str:
    """A copy of the prepared run for one test."""
    return copy_run(prepared, home)


def copy_run(prepared: Path, home: Path) -> str:
    """Copy a run with its MLflow to another home; returns its URI there."""
    shutil.copytree(prepared / "run", home / "run")
    shutil.copytree(prepared / "var" / "mlflow", home / "var" / "mlflow")
    retell_place(home / "run", prepared, home)
    return (home / "run").as_uri()


def retell_place(run: Path, before: Path, now: Path) -> None:
    """Results of a run that was copied name the home where it lies now."""
    for path in run.glob("*/result.json"):
        path.write_text(path.read_text().replace(str(before), str(now)))


@pytest.fixture(scope="session")
def brokers() -> Iterator[str]:
    """Addresses of a mock Kafka cluster."""
    with MockCluster() as cluster:
        yield cluster.bootstrap_servers


@pytest.fixture
def topic(request: pytest.FixtureRequest) -> str:
    """A topic of the test's own."""
    return f"topic-{abs(hash(request.node.nodeid)) % 10**10}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a file system of a given size (``64k``, ``2m``); a test that may not mount one skips."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small disk needs root")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a moto server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of an empty bucket; boto3 is pointed at the moto server by environment, as a deployment would be."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    storage._s3.cache_clear()
    name = f"bucket-{abs(hash(request.node.nodeid)) % 10**10}"
    boto3.client("s3").create_bucket(Bucket=name)
    yield name
    storage._s3.cache_clear()


@pytest.fixture(scope="module")
def chroma_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Chroma server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("chroma"), "run", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, "--path", tmp_path_factory.mktemp("chroma")], stdout=subprocess.DEVNULL)
    try:
        while server.poll() is None and not _answers(f"http://127.0.0.1:{port}/api/v2/heartbeat"):
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def pinecone_servers() -> Iterator[dict[str, PineconeServer]]:
    """By metric, servers that answer as an index of Pinecone of 8 dimensions does."""
    from tests.pinecone_server import pinecone

    with pinecone(8, "cosine") as cosine, pinecone(8, "euclidean") as l2:
        yield {"cosine": cosine, "l2": l2}


@pytest.fixture(scope="module")
def weaviate_server() -> Iterator[tuple[str, int]]:
    """Address and gRPC port of a server that answers as Weaviate does."""
    from tests.weaviate_server import weaviate

    with weaviate() as address:
        yield address
