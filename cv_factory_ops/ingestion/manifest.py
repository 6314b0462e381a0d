"""What ingestion hands on: ``manifest.parquet`` (a row an accepted image) and ``images-*.parquet`` (the pixels).

Pixels are written while they stream in, before duplicates and splits are known; the manifest then says which of them count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import Kind, Metadata

if TYPE_CHECKING:
    import pandas as pd

FILE_BYTES = 64 << 20
"""Raw bytes of pixels in one file of images."""
GROUP_BYTES = 8 << 20
"""Raw bytes of pixels in one row group: what reading and writing hold in memory."""


@dataclass(frozen=True)
class Row:
    """An accepted image."""

    id: str
    patient: str
    """Pseudonym; empty where the source has none."""
    study: str
    label: int
    """Index into the project's labels."""
    split: str
    """As the source fixes it, and empty where it does not, until :func:`cv_factory_ops.ingestion.splits.assign`."""
    source: str
    """``base`` or ``capture``."""
    digest: str
    """SHA-256 of the pixels, see :func:`pixel_digest`."""
    rows: int
    columns: int
    metadata: Metadata
    """Of the domain's names; a column ``meta_<name>`` each."""


@dataclass(frozen=True)
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
    return hashlib.sha256(f"{pixels.shape}".encode() + pixels.astype("<u2").tobytes()).hexdigest()


class ImageWriter:
    """Appends images to ``images-00000.parquet`` and so on, in flat memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._group: dict[str, list[Any]] = _empty_group()
        self._files = self._in_file = self._in_group = 0

    def __enter__(self) -> ImageWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._flush()
        self._close()

    def append(self, id: str, pixels: NDArray[np.uint16]) -> None:
        """Write one image of shape (rows, columns)."""
        values = (id, *pixels.shape, pixels.tobytes())
        for column, value in zip(self._group.values(), values, strict=True):
            column.append(value)
        self._in_group += pixels.nbytes
        if self._in_group >= GROUP_BYTES:
            self._flush()
        if self._in_file >= FILE_BYTES:
            self._close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self._group["id"]:
            return
        types = {"id": pa.string(), "rows": pa.int32(), "columns": pa.int32(), "pixels": pa.binary()}
        table = pa.table(self._group, schema=pa.schema(types))
        if self._writer is None:
            path = self._folder / f"images-{self._files:05d}.parquet"
            self._writer = pq.ParquetWriter(path, table.schema, compression="zstd", use_dictionary=False)
        self._writer.write_table(table)
        self._in_file += self._in_group
        self._group, self._in_group = _empty_group(), 0

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer, self._files, self._in_file = None, self._files + 1, 0


def _empty_group() -> dict[str, list[Any]]:
    return {"id": [], "rows": [], "columns": [], "pixels": []}


def write_manifest(folder: Path, rows: Iterable[Row], metadata: Mapping[str, Kind]) -> None:
    """Write ``manifest.parquet``; ``metadata`` are the domain's names with their kinds."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts, integers = ("id", "patient", "study", "split", "source", "digest"), ("label", "rows", "columns")
    fields = [pa.field(name, pa.string()) for name in texts] + [pa.field(name, pa.int32()) for name in integers]
    fields += [pa.field(f"meta_{name}", pa.float64() if kind == "number" else pa.string()) for name, kind in metadata.items()]
    table = [asdict(row) | {f"meta_{name}": row.metadata.get(name) for name in metadata} for row in rows]
    pq.write_table(pa.Table.from_pylist(table, pa.schema(fields)), folder / "manifest.parquet")


def write_quarantine(path: Path, refusals: Iterable[Refusal]) -> None:
    """Write JSON Lines of item, code and reason."""
    path.write_text("".join(json.dumps(asdict(refusal)) + "\n" for refusal in refusals), encoding="utf-8")


def read_manifest(folder: Path) -> pd.DataFrame:
    """The rows of an ingest stage's folder, in the order of :func:`read_images`."""
    import pandas as pd

    return pd.read_parquet(folder / "manifest.parquet")


def read_images(folder: Path) -> Iterator[tuple[str, NDArray[np.uint16]]]:
    """Id and pixels, (rows, columns) uint16 with 0..65535 being 0..1, of each row of the manifest, in its order."""
    import pyarrow.parquet as pq

    accepted = set(pq.read_table(folder / "manifest.parquet", columns=["id"]).column("id").to_pylist())
    for path in sorted(folder.glob("images-*.parquet")):
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=64):
                for id, rows, columns, pixels in zip(*(column.to_pylist() for column in batch.columns), strict=True):
                    if id in accepted:
                        yield id, np.frombuffer(pixels, "<u2").reshape(rows, columns)
