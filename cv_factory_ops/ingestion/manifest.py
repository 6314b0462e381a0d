"""What ingestion hands on: ``manifest.parquet`` (a row an accepted image) and ``pixels-*.bin`` (their pixels).

Pixels are written while they stream in, before duplicates and splits are known, by as many processes as decode; the manifest
then says which of them count and where they lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import Kind, Metadata

if TYPE_CHECKING:
    import pandas as pd

GROUP = 64
"""Images that are read at a time."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image's pixels lie."""

    file: str
    offset: int
    bytes: int
    """One or two for each value."""


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
    """Index into the project's labels; -1 until it is known."""
    split: str
    """As the source fixes it, and empty where it does not, until :func:`cv_factory_ops.ingestion.splits.assign`."""
    source: str
    """``base`` or ``capture``."""
    review: str
    """Why a person should look at it, by commas; empty where there is no reason to."""
    digest: str
    """SHA-256 of the pixels, see :func:`pixel_digest`."""
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


@dataclass(frozen=True, slots=True)
class Refusal:
    """An item that is not used, and why."""

    item: str
    code: str
    reason: str


def to_uint16(image: NDArray[np.float32]) -> NDArray[np.uint16]:
    """0..1 -> 0..65535, as stored and as digested."""
    pixels: NDArray[np.uint16] = np.rint(image * np.float32(65535.0)).astype("<u2")
    return pixels


def pixel_digest(pixels: NDArray[np.uint16]) -> str:
    """SHA-256 of the shape and the little-endian pixels."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels, "<u2").data)
    return digest.hexdigest()


class PixelWriter:
    """Appends images to one file; each process has its own. What a killed one leaves behind its last image is never read."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._name = path.name
        self._offset = 0

    def __enter__(self) -> PixelWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def append(self, pixels: NDArray[np.uint16]) -> Place:
        """Write one image of shape (rows, columns) or (rows, columns, 3)."""
        content = _smallest(pixels).data.cast("B")
        written = 0
        while written < len(content):
            written += self._file.write(content[written:])
        place = Place(self._name, self._offset, len(content))
        self._offset += len(content)
        return place


def _smallest(pixels: NDArray[np.uint16]) -> NDArray[np.unsignedinteger]:
    """Images of 8 bits, scaled to 16, as 8 bits again; nothing else is packed: that would cost more time than decoding."""
    if _has_8_bits(pixels[:1]) and _has_8_bits(pixels):
        return (pixels & 255).astype(np.uint8)
    return np.ascontiguousarray(pixels, "<u2")


def _has_8_bits(pixels: NDArray[np.uint16]) -> bool:
    return bool(np.array_equal((pixels & 255) * np.uint16(257), pixels))


def _unpacked(content: bytes, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    if len(content) == np.prod(shape):
        return np.frombuffer(content, np.uint8).reshape(shape) * np.uint16(257)
    return np.frombuffer(content, "<u2").reshape(shape)


def write_manifest(folder: Path, rows: Iterable[Row], metadata: Mapping[str, Kind]) -> None:
    """Write ``manifest.parquet``; ``metadata`` are the domain's names with their kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"str": pa.string(), "int": pa.int32(), "float | None": pa.float64()}
    plain = {field.name: kinds[str(field.type)] for field in fields(Row) if str(field.type) in kinds}
    schema = [pa.field(name, kind) for name, kind in plain.items()]
    schema += [pa.field("file", pa.string()), pa.field("offset", pa.int64()), pa.field("bytes", pa.int64())]
    schema += [pa.field(f"meta_{name}", pa.float64() if kind == "number" else pa.string()) for name, kind in metadata.items()]
    table = [
        {name: getattr(row, name) for name in plain}
        | {"file": row.place.file, "offset": row.place.offset, "bytes": row.place.bytes}
        | {f"meta_{name}": row.metadata.get(name) for name in metadata}
        for row in sorted(rows, key=lambda row: (row.place.file, row.place.offset))
    ]
    pq.write_table(pa.Table.from_pylist(table, pa.schema(schema)), folder / "manifest.parquet")


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
    columns = ["id", "rows", "columns", "channels", "file", "offset", "bytes"]
    manifest = read_manifest(folder)[columns]
    return [manifest[start : start + GROUP] for start in range(0, len(manifest), GROUP)]


def read_group(folder: Path, group: pd.DataFrame) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Id and pixels of each row of a piece of the manifest; different pieces may be read by different threads."""
    for name, rows in group.groupby("file", sort=False):
        with (folder / str(name)).open("rb") as file:
            for row in rows.itertuples():
                file.seek(row.offset)
                shape = (row.rows, row.columns) if row.channels == 1 else (row.rows, row.columns, row.channels)
                yield row.id, _unpacked(file.read(row.bytes), shape)
