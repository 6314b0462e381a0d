"""Tiny real bundles for the tests of serving and deployment."""

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle, BundleManifest, Pca
from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.config.retrieval import FaissStore, RetrievalConfig
from cv_factory_ops.features.index import MANIFEST, STORE, IndexManifest
from cv_factory_ops.features.stores import Item, open_store
from cv_factory_ops.models import build
from cv_factory_ops.predictor import Predictor

SIZE = 16
IMAGE = np.tile(np.linspace(0, 1, 24, dtype=np.float32), (20, 1))
"""(20, 24), a horizontal ramp."""


def write_bundle(path: Path, seed: int) -> Bundle:
    """A bundle with random weights; another seed gives another digest."""
    torch.manual_seed(seed)
    model = SmallCnn(width=4)
    manifest = BundleManifest(
        project="tiny",
        domain="medical",
        labels=["normal", "opacity"],
        model=model,
        preprocessing=PreprocessingConfig(size=SIZE),
        mean=0.5,
        std=0.25,
        threshold=0.5,
        features={"score": "number", "metadata_view_position": "category"},
        data_digest="d",
        test_digest="t",
        code_version="0",
        git_sha="",
    )
    pca = Pca(mean=np.zeros(16), components=np.eye(2, 16))
    reference = pd.DataFrame({"score": [0.4, 0.6], "metadata_view_position": ["PA", "AP"]})
    return Bundle.write(path, manifest, build(model, 2, 0.5, 0.25), pca, reference)


def with_index(bundle: Bundle, folder: Path) -> Bundle:
    """The bundle with an index of eight images, each of a patient of its own."""
    images = np.random.default_rng(0).integers(0, 65536, (8, SIZE, SIZE), np.uint16)
    vectors = Predictor(bundle).forward(images)[1]
    items = [Item(f"image-{i}", {"label": bundle.manifest.labels[i % 2], "patient": f"patient-{i}"}) for i in range(8)]
    index = folder.with_name(f"{folder.name}-index")
    (index / STORE).mkdir(parents=True)
    with open_store(FaissStore(), index / STORE, "tiny", vectors.shape[1]) as store:
        store.add(items, vectors)
        store.persist()
    manifest = IndexManifest(
        bundle_digest=bundle.digest,
        retrieval=RetrievalConfig(),
        name="tiny",
        dimensions=vectors.shape[1],
        count=8,
        metadata={"label": "category", "patient": "category"},
    )
    (index / MANIFEST).write_text(manifest.model_dump_json())
    return bundle.with_index(index, folder)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def start_cvf(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    """A ``cvf`` process at home in a folder, its standard error in ``<folder>/<command>.log``, its standard input a pipe."""
    with (folder / f"{arguments[0]}.log").open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "cv_factory_ops.cli", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"CVF_HOME": str(folder), "CVF_PSEUDONYM_KEY": "a key for tests", "OMP_NUM_THREADS": "1"},
        )


def wait_until(done: Callable[[], object], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def npy(image: NDArray[Any] = IMAGE) -> bytes:
    file = io.BytesIO()
    np.save(file, image)
    return file.getvalue()


def png() -> bytes:
    found, content = cv2.imencode(".png", np.rint(IMAGE * 255).astype(np.uint8))
    assert found
    return bytes(content)
