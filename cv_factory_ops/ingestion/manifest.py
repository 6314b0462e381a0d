"""What ingestion hands on: ``manifest.parquet`` (a row an accepted image) and ``pixels-*.bin`` (their pixels).

Pixels are written while they stream in, before duplicates and splits are known, by as many processes as decode; the manifest
then says which of them count and where they lie.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.domain import Kind, Metadata
from cv_factory_ops.ingestion.pixels import Place, read_pixels

if TYPE_CHECKING:
    import pandas as pd

GROUP = 64
"""Images that are read at a time."""
TOGETHER = 2048
"""Rows that are written at a time."""
REPORTS = "reports.parquet"


Boxes = NDArray[np.float64]
"""(K, 5) class, then left, top, right, bottom in pixels from the upper left corner; further columns may follow."""


@dataclass(frozen=True, slots=True)
class StoredMask:
    """The classes of an image's pixels."""

    place: Place
    """In the file of the image; as its pixels, a class being a level of 8 bits."""
    digest: str
    """SHA-256 of shape and classes."""
    classes: tuple[int, ...]
    """Those that it shows, ascending."""


@dataclass(frozen=True, slots=True)
class Row:
    """An accepted image."""

    id: str
    patient: str
    """Pseudonym; empty where the source has none."""
    study: str
    """Pseudonym; empty where the source has none."""
    instance: str
    """Pseudonym of the file's own identifier; empty where it has none."""
    label: int
    """Index into the project's labels; -1 until it is known. With a mask, the class of the largest region, with boxes that of
    the largest box, or 0."""
    split: str
    """As the source fixes it, and empty where it does not, until :func:`cv_factory_ops.ingestion.splits.assign`."""
    source: str
    """``base`` or ``capture``."""
    review: str
    """Why a person should look at it, by commas; empty where there is no reason to."""
    digest: str
    """SHA-256 of the pixels, see :func:`cv_factory_ops.ingestion.pixels.pixel_digest`."""
    rows: int
    columns: int
    channels: int
    """1 grey, 3 red, green, blue."""
    row_spacing: float | None
    """Distance of neighbouring rows in mm."""
    column_spacing: float | None
    place: Place
    metadata: Metadata
    """Of the domain's names; a column ``meta_<name>`` each."""
    pseudo: int = -1
    """Index of the label that is the champion's answer and nobody else's; -1 everywhere else. Such images only train."""
    mask: StoredMask | None = None
    """Of a segmentation."""
    report: str = ""
    """Words of its report; kept apart from the manifest, see :func:`write_reports`."""
    boxes: tuple[tuple[float, ...], ...] | None = None
    """Of a detection: rows of :data:`Boxes`, sorted."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Those that it shows: of masks and boxes also the first, which is nothing."""
        if self.mask:
            return self.mask.classes
        return (self.label,) if self.boxes is None else (0, *sorted({int(box[0]) for box in self.boxes}))

    @property
    def places(self) -> str:
        """Digest of its mask, or of its boxes; empty where it has neither."""
        if self.mask:
            return self.mask.digest
        return "" if self.boxes is None else storage.text_digest(repr(self.boxes))


@dataclass(frozen=True, slots=True)
class Refusal:
    """An item that is not used, and why."""

    item: str
    code: str
    reason: str


def write_manifest(folder: Path, rows: Sequence[Row], metadata: Mapping[str, Kind]) -> None:
    """Write ``manifest.parquet``; ``metadata`` are the domain's names with their kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"str": pa.string(), "int": pa.int32(), "float | None": pa.float64()}
    plain = {field.name: kinds[str(field.type)] for field in fields(Row) if str(field.type) in kinds and field.name != "report"}
    schema = [pa.field(name, kind) for name, kind in plain.items()]
    schema += [pa.field("file", pa.string()), pa.field("offset", pa.int64()), pa.field("bytes", pa.int64())]
    if any(row.mask for row in rows):
        schema += [pa.field("mask_offset", pa.int64()), pa.field("mask_bytes", pa.int64())]
        schema += [pa.field("mask_digest", pa.string())]
    if any(row.boxes is not None for row in rows):
        schema += [pa.field("boxes", pa.list_(pa.float64()))]
    schema += [pa.field(f"meta_{name}", pa.float64() if kind == "number" else pa.string()) for name, kind in metadata.items()]
    ordered = sorted(rows, key=lambda row: (row.place.file, row.place.offset))
    with pq.ParquetWriter(folder / "manifest.parquet", pa.schema(schema)) as writer:
        for start in range(0, max(len(ordered), 1), TOGETHER):
            table = [_columns(row, plain, metadata) for row in ordered[start : start + TOGETHER]]
            writer.write_table(pa.Table.from_pylist(table, pa.schema(schema)))


def _columns(row: Row, plain: Iterable[str], metadata: Iterable[str]) -> dict[str, Any]:
    return (
        {name: getattr(row, name) for name in plain}
        | {"file": row.place.file, "offset": row.place.offset, "bytes": row.place.bytes}
        | _mask_columns(row.mask)
        | ({} if row.boxes is None else {"boxes": [value for box in row.boxes for value in box]})
        | {f"meta_{name}": row.metadata.get(name) for name in metadata}
    )


def _mask_columns(mask: StoredMask | None) -> dict[str, Any]:
    """The image's ``file`` is the mask's as well."""
    if mask is None:
        return {}
    return {"mask_offset": mask.place.offset, "mask_bytes": mask.place.bytes, "mask_digest": mask.digest}


def write_reports(folder: Path, rows: Iterable[Row]) -> str:
    """Write ``reports.parquet``, ids and words of the images that have a report; returns its SHA-256.

    A file of its own, which only the index reads: nothing that trains or measures is given what people wrote.
    """
    import pandas as pd

    said = sorted((row.id, row.report) for row in rows if row.report)
    pd.DataFrame(said, columns=["id", "words"], dtype="string").to_parquet(folder / REPORTS, index=False)
    return storage.sha256(folder / REPORTS)


def read_reports(path: Path) -> dict[str, str]:
    """By id: the words of the reports."""
    import pandas as pd

    table = pd.read_parquet(path)
    return dict(zip(table["id"], table["words"], strict=True))


def write_quarantine(path: Path, refusals: Iterable[Refusal]) -> None:
    """Write JSON Lines of item, code and reason."""
    path.write_text("".join(json.dumps(asdict(refusal)) + "\n" for refusal in refusals), encoding="utf-8")


def read_manifest(folder: Path) -> pd.DataFrame:
    """The rows of an ingest stage's folder, in the order of :func:`read_images`."""
    import pandas as pd

    return pd.read_parquet(folder / "manifest.parquet")


def read_images(folder: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Id and pixels of each row of the manifest, in its order: (rows, columns) or (rows, columns, 3), 0..65535 being 0..1."""
    for group in image_groups(folder):
        yield from read_group(folder, group)


def image_groups(folder: Path) -> list[pd.DataFrame]:
    """The manifest in pieces of neighbouring images, as :func:`read_group` takes them."""
    columns = ["id", "rows", "columns", "channels", "file", "offset", "bytes", "mask_offset", "mask_bytes"]
    manifest = read_manifest(folder).filter(columns)
    return [manifest[start : start + GROUP] for start in range(0, len(manifest), GROUP)]


def read_group(folder: Path, group: pd.DataFrame) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Id and pixels of each row of a piece of the manifest; different pieces may be read by different threads."""
    for name, rows in groupby(group.itertuples(), attrgetter("file")):
        of_file = list(rows)
        shapes = [(row.rows, row.columns, row.channels)[: 2 if row.channels == 1 else 3] for row in of_file]
        places = [(row.offset, row.bytes, shape) for row, shape in zip(of_file, shapes, strict=True)]
        yield from zip((row.id for row in of_file), read_pixels(folder / name, places), strict=True)


def read_masks(folder: Path, rows: pd.DataFrame) -> Iterator[NDArray[np.uint8]]:
    """The mask of each of these rows of the manifest, in their order: (rows, columns), the class of each pixel."""
    for name, of_file in groupby(rows.itertuples(), attrgetter("file")):
        places = [(row.mask_offset, row.mask_bytes, (row.rows, row.columns)) for row in of_file]
        yield from map(as_classes, read_pixels(folder / name, places))


def as_classes(pixels: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """A mask from an image of 8 bits, which takes a byte a pixel where pixels are stored."""
    return (pixels & 255).astype(np.uint8)


def as_boxes(cells: Iterable[Sequence[float]], width: int = 5) -> list[Boxes]:
    """The boxes of each cell of a column, which holds their rows one after the other."""
    return [np.asarray(cell, np.float64).reshape(-1, width) for cell in cells]
