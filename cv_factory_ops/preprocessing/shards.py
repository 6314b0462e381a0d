"""Stage ``preprocess``: each split as one memory-mappable array that any number of DDP workers read without copying."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.config import PreprocessingConfig
from cv_factory_ops.ingestion.manifest import read_images, read_manifest
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.records import PreprocessRecord

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.stage import Stage

CHUNK = 256
"""Images that are prepared at a time: bounds memory, keeps the threads busy."""


def run(stage: Stage) -> PreprocessRecord:
    """Prepare every image of the manifest."""
    folder = stage.local(f"{stage.run}/ingest")
    manifest = read_manifest(folder)
    counts = write_shards(stage.out, manifest, folder, stage.config.preprocessing)
    mean, std = _moments(np.load(stage.out / "train.npy", mmap_mode="r"))
    size = stage.config.preprocessing.size
    return PreprocessRecord(
        summary=f"{sum(counts.values())} images at {size} x {size} (" + ", ".join(f"{k} {v}" for k, v in counts.items()) + ")",
        counts=counts,
        mean=mean,
        std=std,
        shards_digest=storage.tree_digest(stage.out),
    )


def write_shards(out: Path, manifest: pd.DataFrame, folder: Path, config: PreprocessingConfig) -> dict[str, int]:
    """Write ``<split>.npy`` and ``<split>.parquet`` for the rows of a manifest; returns the number of images of each split."""
    # Sorted: the order in which captures arrived must not change what is trained.
    by_id = manifest.sort_values("id")
    splits = {split: rows.reset_index(drop=True) for split, rows in by_id.groupby("split", sort=True)}
    shape = (config.size, config.size)
    arrays = {}
    for split, rows in splits.items():
        rows.to_parquet(out / f"{split}.parquet", index=False)
        arrays[split] = np.lib.format.open_memmap(out / f"{split}.npy", "w+", np.uint16, (len(rows), *shape))
        _reserve(out / f"{split}.npy")
    places = {row_id: (split, i) for split, rows in splits.items() for i, row_id in enumerate(rows["id"])}
    for row_id, image in _prepared(folder, places, config):
        split, i = places[row_id]
        arrays[split][i] = image
    for array in arrays.values():
        array.flush()
    return {split: len(rows) for split, rows in splits.items()}


def _reserve(path: Path) -> None:
    """Take the file's space now: writing into a hole of a memory map on a full disk would kill the process."""
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _prepared(
    folder: Path, wanted: dict[str, tuple[str, int]], config: PreprocessingConfig
) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    cv2.setNumThreads(1)  # the pool is the parallelism
    images = (item for item in read_images(folder) if item[0] in wanted)
    with ThreadPoolExecutor() as pool:
        while chunk := list(islice(images, CHUNK)):
            yield from pool.map(lambda item: (item[0], prepare(item[1].astype(np.float32) / 65535.0, config)), chunk)


def _moments(images: NDArray[np.uint16]) -> tuple[float, float]:
    """Mean and standard deviation over all pixels, in 0..1; in chunks, so that memory stays flat."""
    total = squares = 0.0
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].astype(np.float64) / 65535.0
        total += float(chunk.sum())
        squares += float(np.square(chunk).sum())
    mean = total / images.size
    return mean, max(float(np.sqrt(max(squares / images.size - mean**2, 0.0))), 1e-6)
