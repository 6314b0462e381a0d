"""Stage ``preprocess``: every image of the manifest through the declared steps, written once, by all cores."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

from cv_factory_ops import storage
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion.manifest import Boxes, as_boxes, image_groups, read_group, read_manifest, read_masks
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.preprocessing import shards
from cv_factory_ops.preprocessing.geometry import Geometry
from cv_factory_ops.preprocessing.pipeline import Spacing, prepare
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.records import PreprocessRecord

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

JOURNAL = ".done"
"""A line a group of images that is safely on disk, by the digest of its ids; what an interrupted run goes on from."""
JOURNAL_SECONDS = 5.0
"""Time between two entries: each waits until the disk has all that was written."""
PREPARED = "prepared_boxes"
"""Column of the shards' rows: boxes in pixels of the model's input, as ``boxes`` has them in those of the image."""
CHUNK = 16
"""Images that moments are computed from at a time: few enough that the sums stay in the processor's cache."""


def run(stage: Stage) -> PreprocessRecord:
    """Write the shards of all splits.

    Raises:
        DataError: images cannot be prepared as declared.
    """
    folder = stage.local(f"{stage.run}/ingest")
    settings = stage.config.preprocessing
    image = [settings.size, settings.size] + ([3] if stage.config.decoding.channels == 3 else [])
    masks = stage.config.task == "segmentation"
    counts = write_shards(stage.out, folder, settings, image)
    index = shards.write_index(stage.out, counts, image, masks)
    (stage.out / JOURNAL).unlink()
    mean, std = moments(shards.open_split(stage.out, "train"))
    splits = ", ".join(f"{split} {count}" for split, count in counts.items())
    files = sum(len(files) - 1 for files in index.splits.values())
    return PreprocessRecord(
        summary=f"{sum(counts.values())} images at {' x '.join(map(str, image))} ({splits}) in {files} files",
        counts=counts,
        mean=mean,
        std=std,
        shards_digest=storage.text_digest(index.model_dump_json(exclude_defaults=True)),
    )


def write_shards(out: Path, folder: Path, config: PreprocessingConfig, image: Sequence[int]) -> dict[str, int]:
    """Prepare what an earlier try has not, masks with their images; returns the number of images of each split.

    Raises:
        DataError: images cannot be prepared as declared.
    """
    # Sorted: the order in which captures arrived must not change what is trained.
    by_id = read_manifest(folder).sort_values("id")
    splits = {str(split): rows.reset_index(drop=True) for split, rows in by_id.groupby("split", sort=True)}
    arrays, places = list[Images](), dict[str, _Place]()
    for split, rows in splits.items():
        if "boxes" in rows:
            rows[PREPARED] = [boxes.ravel() for boxes in prepared_boxes(rows, config)]
        rows.to_parquet(out / f"{split}.parquet", index=False)
        kinds = (False, True) if "mask_offset" in rows else (False,)
        of_split = [shards.create(out, split, len(rows), image, masks) for masks in kinds]
        arrays += of_split
        places |= {row_id: _Place(i, *of_split) for i, row_id in enumerate(rows["id"])}
    work = partial(_prepare_group, folder, config, places, spacings(by_id), tuple(image))
    groups = {storage.text_digest("\n".join(group["id"])): group for group in image_groups(folder)}
    with _journal(out / JOURNAL, arrays) as journal:
        todo = {key: group for key, group in groups.items() if key not in journal.done}
        if len(todo) < len(groups):
            log.info("preprocess: going on, %d of %d groups of images are done", len(groups) - len(todo), len(groups))
        for _ in with_progress(_in_threads(work, todo, journal), sum(map(len, todo.values())), "preprocess"):
            pass
    return {split: len(rows) for split, rows in splits.items()}


class _Place(NamedTuple):
    """Where a prepared image goes, and its mask."""

    number: int
    images: Images
    masks: Images | None = None


class Journal:
    """Which groups of images are safely on disk."""

    def __init__(self, path: Path, arrays: Sequence[Images]) -> None:
        self.done = set(path.read_text().splitlines()) if path.exists() else set()
        self._path, self._arrays = path, arrays
        self._waiting: list[str] = []
        self._written = time.monotonic()

    def add(self, key: str) -> None:
        """Note a group that is written; the entry is made with the next ones."""
        self._waiting.append(key)
        if time.monotonic() - self._written >= JOURNAL_SECONDS:
            self.write()

    def write(self) -> None:
        """Make the entries, once the disk has the images."""
        for array in self._arrays:
            array.flush()
        with self._path.open("a") as file:
            file.writelines(f"{key}\n" for key in self._waiting)
        self._waiting, self._written = [], time.monotonic()


@contextmanager
def _journal(path: Path, arrays: Sequence[Images]) -> Iterator[Journal]:
    """A journal that is up to date when it is left, also by an interruption."""
    journal = Journal(path, arrays)
    try:
        yield journal
    finally:
        journal.write()


def _in_threads(work: Callable[[pd.DataFrame], None], todo: dict[str, pd.DataFrame], journal: Journal) -> Iterator[str]:
    """Do all groups, one a core at a time; yields the ids of the images that are done."""
    cv2.setNumThreads(1)  # the pool is the parallelism
    pool = ThreadPoolExecutor(2 * len(os.sched_getaffinity(0)))  # half of them wait for the disk
    try:
        running = {pool.submit(work, group): key for key, group in todo.items()}
        for future in as_completed(running):
            future.result()
            journal.add(running[future])
            yield from todo[running[future]]["id"]
    finally:
        pool.shutdown(cancel_futures=True)


def _prepare_group(
    folder: Path,
    config: PreprocessingConfig,
    places: Mapping[str, _Place],
    known: Mapping[str, Spacing],
    shape: tuple[int, ...],
    group: pd.DataFrame,
) -> None:
    refused: list[tuple[str, Rejected]] = []
    masks = read_masks(folder, group) if "mask_offset" in group else repeat(None)
    for (row_id, pixels), mask in zip(read_group(folder, group), masks, strict=False):
        place = places[row_id]
        try:
            prepared = prepare(pixels, config, known[row_id])
        except Rejected as error:
            refused.append((row_id, error))
            continue
        if prepared.shape != shape:
            raise DataError(f"{row_id}: becomes {prepared.shape}, expected was {shape}; run `cvf ingest --force`")
        place.images.put(place.number, prepared)
        if mask is not None and place.masks:
            place.masks.put(place.number, Geometry.of((mask.shape[0], mask.shape[1]), config, known[row_id]).prepare(mask))
    if refused:
        ids, first = ", ".join(row_id for row_id, _ in refused[:3]), refused[0][1]
        cure = "; data.validation.required: [spacing] keeps such images out" if first.code == "no_spacing" else ""
        raise DataError(f"{len(refused)} images cannot be prepared ({first.code}): {ids}: the first {first}{cure}")


def spacings(rows: pd.DataFrame) -> dict[str, Spacing]:
    """By id: row and column spacing in mm, None where one is not known."""
    found = zip(rows["id"], rows["row_spacing"], rows["column_spacing"], strict=True)
    return {row_id: (row, column) if row > 0 and column > 0 else None for row_id, row, column in found}


def geometries(rows: pd.DataFrame, config: PreprocessingConfig) -> Iterator[Geometry]:
    """Of each of these rows of the manifest, in their order."""
    known = spacings(rows)
    for row_id, height, width in zip(rows["id"], rows["rows"], rows["columns"], strict=True):
        yield Geometry.of((height, width), config, known[row_id])


def prepared_boxes(rows: pd.DataFrame, config: PreprocessingConfig) -> Iterator[Boxes]:
    """The boxes of each of these rows of the manifest, in pixels of the model's input."""
    for boxes, geometry in zip(as_boxes(rows["boxes"]), geometries(rows, config), strict=True):
        yield geometry.prepare_boxes(boxes)


def moments(images: Images) -> tuple[float, float]:
    """Mean and standard deviation over all values, in 0..1; added up as whole numbers, so that no order changes them."""

    def sums(chunk: slice) -> tuple[int, int]:
        values = images.read(chunk).astype(np.uint32)
        return int(values.sum(dtype=np.uint64)), int(np.square(values).sum(dtype=np.uint64))

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        totals, squares = zip(*pool.map(sums, images.chunks(CHUNK)), strict=True)
    count = math.prod(images.shape)
    mean, square = sum(totals) / count / 65535, sum(squares) / count / 65535**2
    return mean, max(math.sqrt(max(square - mean**2, 0.0)), 1e-6)
