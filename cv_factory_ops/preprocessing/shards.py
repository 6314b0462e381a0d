"""Prepared images on disk: each split as memory-mappable files that any number of DDP workers read without copying.

<split>-00000.npy ...   (n, size, size) or (n, size, size, 3) uint16, 0..65535 being 0..1; at most SHARD_BYTES each
masks-<split>-00000.npy ...  (n, size, size) uint8, the class of each pixel, where there are masks: as many in a file
<split>.parquet         the rows of the manifest, in the order of the images; where there are boxes, also those of the model's
                        input (prepared_boxes)
shards.json             the index: how many images in which file, sizes and SHA-256 of all files
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cv_factory_ops import storage
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.splits import refuse_leakage
from cv_factory_ops.records import Frozen

if TYPE_CHECKING:
    import pandas as pd

SHARD_BYTES = 256 << 20
"""Most bytes of images in one file."""
INDEX = "shards.json"
CURE = "run `cvf preprocess --force`"


class File(Frozen):
    """A file as it was written."""

    name: str
    images: int
    """0 for a table of rows."""
    bytes: int
    sha256: str


class Index(Frozen):
    """``shards.json``."""

    image: list[int]
    """Shape of one image."""
    splits: dict[str, list[File]]
    """The files of each split, in the order of their images; the table of rows comes last."""
    masks: dict[str, list[File]] = {}
    """The files of each split's masks, where it has some."""


class Images:
    """Images, or masks, of one or more arrays as one (N, size, size[, 3]): numbers, slices and arrays of numbers index it.

    A slice within one array is a view of it; everything else copies what is asked for and no more.
    """

    def __init__(self, parts: Sequence[NDArray[Any]]) -> None:
        self._parts = parts
        self._ends = np.array(list(accumulate(len(part) for part in parts)))
        self.shape: tuple[int, ...] = (int(self._ends[-1]), *parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | np.integer | slice | NDArray[np.integer]) -> NDArray[Any]:
        if len(self._parts) == 1:
            return self._parts[0][key]
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            part = int(np.searchsorted(self._ends, start, side="right"))
            if step == 1 and start < stop <= self._ends[part]:
                offset = int(self._ends[part]) - len(self._parts[part])
                return self._parts[part][start - offset : stop - offset]
            key = np.arange(start, stop, step)
        wanted = np.atleast_1d(key)
        wanted = np.where(wanted < 0, wanted + len(self), wanted)
        found = np.empty((len(wanted), *self.shape[1:]), self._parts[0].dtype)
        owner = np.searchsorted(self._ends, wanted, side="right")
        for part in np.unique(owner):
            rows = owner == part
            found[rows] = self._parts[part][wanted[rows] - (self._ends[part] - len(self._parts[part]))]
        return found if isinstance(key, np.ndarray) else found[0]

    def put(self, index: int, image: NDArray[Any]) -> None:
        """Write one image into its file, in one piece: a memory map would take it page by page, at six times the cost."""
        array, offset = self._in_file(index)
        with open(str(array.filename), "r+b") as file:
            file.seek(offset)
            file.write(np.ascontiguousarray(image, array.dtype).data)

    def chunks(self, count: int) -> list[slice]:
        """All images in slices of at most ``count``, each within one file."""
        ends = self._ends.tolist()
        files = zip([0, *ends[:-1]], ends, strict=True)
        return [slice(i, min(i + count, end)) for start, end in files for i in range(start, end, count)]

    def read(self, chunk: slice) -> NDArray[Any]:
        """A copy of one of :meth:`chunks`, read from the file: what a memory map shows counts as memory of the process."""
        array, offset = self._in_file(chunk.start)
        shape = (chunk.stop - chunk.start, *self.shape[1:])
        return np.fromfile(str(array.filename), array.dtype, int(np.prod(shape)), offset=offset).reshape(shape)

    def _in_file(self, index: int) -> tuple[np.memmap[Any, Any], int]:
        """The memory-mapped file that holds an image, and the byte that it starts at."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        array = self._parts[part]
        if not isinstance(array, np.memmap):
            raise TypeError("these images do not lie in files")
        first = index - int(self._ends[part]) + len(array)
        return array, array.offset + first * int(np.prod(self.shape[1:])) * array.itemsize

    def flush(self) -> None:
        """Wait until the disk has what was written."""
        for part in self._parts:
            if isinstance(part, np.memmap):
                part.flush()

    def every(self, step: int) -> Images:
        """Each ``step``-th image, without copying."""
        starts = (-(end - len(part)) % step for end, part in zip(self._ends, self._parts, strict=True))
        views = [part[start::step] for start, part in zip(starts, self._parts, strict=True)]
        return Images([view for view in views if len(view)])


def plan(split: str, count: int, image: Sequence[int]) -> dict[str, int]:
    """Names of a split's files, and how many images each holds."""
    most = max(SHARD_BYTES // (2 * int(np.prod(image))), 1)
    return {f"{split}-{i:05d}.npy": min(most, count - start) for i, start in enumerate(range(0, count, most))}


def create(folder: Path, split: str, count: int, image: Sequence[int], masks: bool = False) -> Images:
    """The memory-mapped arrays of a split's images or masks, to be written; those that an interrupted try has left are opened
    again."""
    parts = []
    for name, images in (plan_masks if masks else plan)(split, count, image).items():
        shape = (images, *image)
        if (folder / name).exists():
            parts.append(np.load(folder / name, mmap_mode="r+"))
            continue
        draft = folder / f".{name}"
        np.lib.format.open_memmap(draft, "w+", np.uint8 if masks else np.uint16, shape[:3] if masks else shape)
        with draft.open("r+b") as file:  # writing into a hole of a memory map on a full disk would kill the process
            os.posix_fallocate(file.fileno(), 0, draft.stat().st_size)
        draft.rename(folder / name)
        parts.append(np.load(folder / name, mmap_mode="r+"))
    return Images(parts)


def plan_masks(split: str, count: int, image: Sequence[int]) -> dict[str, int]:
    """As :func:`plan`, beside it: the masks of a file of images are a file."""
    return {f"masks-{name}": images for name, images in plan(split, count, image).items()}


def write_index(folder: Path, counts: dict[str, int], image: Sequence[int], masks: bool = False) -> Index:
    """Digest what was written, and write ``shards.json``."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:

        def files(held: dict[str, int]) -> list[File]:
            digests = pool.map(lambda name: storage.sha256(folder / name), held)
            return [
                File(name=name, images=images, bytes=(folder / name).stat().st_size, sha256=digest)
                for (name, images), digest in zip(held.items(), digests, strict=True)
            ]

        index = Index(
            image=list(image),
            splits={split: files(plan(split, count, image) | {f"{split}.parquet": 0}) for split, count in counts.items()},
            masks={split: files(plan_masks(split, count, image)) for split, count in counts.items()} if masks else {},
        )
    (folder / INDEX).write_text(index.model_dump_json(indent=1, exclude_defaults=True), encoding="utf-8")
    return index


def open_split(folder: Path, split: str) -> Images:
    """The images of a split, memory-mapped.

    Raises:
        DataError: the index or a file is missing, or a file is not as large as it was.
    """
    if parts := _open(folder, read_index(folder).splits.get(split, [])):
        return Images(parts)
    raise DataError(f"{folder}: holds no split {split!r}")


def open_masks(folder: Path, split: str) -> Images | None:
    """The masks of a split's images, memory-mapped; None where there are none.

    Raises:
        DataError: as :func:`open_split`.
    """
    parts = _open(folder, read_index(folder).masks.get(split, []))
    return Images(parts) if parts else None


def _open(folder: Path, files: Iterable[File]) -> list[NDArray[Any]]:
    parts = []
    for file in files:
        _require_size(folder / file.name, file)
        if file.images:
            parts.append(np.load(folder / file.name, mmap_mode="r", allow_pickle=False))
    return parts


def read_rows(folder: Path, split: str) -> pd.DataFrame:
    """The rows of the manifest, in the order of the images."""
    import pandas as pd

    return pd.read_parquet(folder / f"{split}.parquet")


def read_image(uri: str, split: str, place: int) -> NDArray[np.uint16]:
    """An image of a split by its number, and nothing else: all of them may be gigabytes.

    Raises:
        DataError: the index is missing or of another version, or there are not so many images.
    """
    index = _index_of(f"{uri}/{INDEX}", storage.read_bytes(f"{uri}/{INDEX}"))
    size = 2 * math.prod(index.image)
    for file in index.splits.get(split, ()):
        if place < file.images:
            start = file.bytes - (file.images - place) * size
            return np.frombuffer(storage.read_part(f"{uri}/{file.name}", start, size), "<u2").reshape(index.image)
        place -= file.images
    raise DataError(f"{uri}/{INDEX}: has fewer images of {split} than rows")


def one_a_patient(rows: pd.DataFrame) -> NDArray[np.intp]:
    """Places of the first image of each patient, and of all images whose patient is not known."""
    return np.flatnonzero((rows["patient"] == "") | ~rows["patient"].duplicated())


def read_index(folder: Path) -> Index:
    """The index of a folder of shards.

    Raises:
        DataError: there is none, or it is of another version.
    """
    try:
        content = (folder / INDEX).read_bytes()
    except OSError:
        content = b""
    return _index_of(str(folder / INDEX), content)


def _index_of(name: str, content: bytes) -> Index:
    try:
        return Index.model_validate_json(content)
    except ValidationError:
        raise DataError(f"{name}: is not an index of shards; {CURE}") from None


def verify(folder: Path) -> None:
    """Read all files and compare them with their checksums.

    Raises:
        DataError: naming the first file that is not as it was written.
    """
    index = read_index(folder)
    files = [file for split in (*index.splits.values(), *index.masks.values()) for file in split]
    for file in files:
        _require_size(folder / file.name, file)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for file, digest in zip(files, pool.map(lambda file: storage.sha256(folder / file.name), files), strict=True):
            if digest != file.sha256:
                raise DataError(f"{folder / file.name}: is not what was written, its SHA-256 is another; {CURE}")


class _Placed(NamedTuple):
    id: str
    patient: str
    study: str
    digest: str
    split: str


def require_no_leakage(folder: Path) -> None:
    """Refuse shards in which a patient or a pixel-identical image stands in two splits, whatever ingestion has said.

    Raises:
        DataError: naming at most three pseudonyms or ids.
    """
    refuse_leakage(_placed(folder, read_index(folder).splits))


def _placed(folder: Path, splits: Iterable[str]) -> Iterable[_Placed]:
    import pyarrow.parquet as pq

    for split in splits:
        table = pq.read_table(folder / f"{split}.parquet", columns=["id", "patient", "study", "digest"])
        for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
            yield _Placed(row[0], row[1], row[2], row[3], split)


def _require_size(path: Path, file: File) -> None:
    size = path.stat().st_size if path.exists() else None
    if size != file.bytes:
        found = "is missing" if size is None else f"has {size} bytes, not {file.bytes}"
        raise DataError(f"{path}: {found}; {CURE}")
