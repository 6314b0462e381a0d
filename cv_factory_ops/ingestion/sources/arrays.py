"""Arrays in the MedMNIST layout (https://medmnist.com): one ``.npz`` file with images and labels of each split."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from cv_factory_ops.config import as_uri
from cv_factory_ops.config.sources import NpzSource
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, Opened

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

SPLITS = ("test", "val", "train")
"""Test and validation first: an image that they share with train is theirs (the official PneumoniaMNIST has 8)."""


@dataclass(frozen=True)
class _Part:
    """One split: its labels, and how its images are laid out in the archive."""

    split: str
    labels: NDArray[np.integer]
    shape: tuple[int, ...]


def open_npz(source: NpzSource, stage: Stage) -> Opened:
    """The images one after the other, never all at once.

    Raises:
        DataError: it is not there, or not of that layout.
    """
    uri, allowed = as_uri(source.path), stage.config.labels
    path = stage.local(uri)
    try:
        with zipfile.ZipFile(path) as archive:
            parts = [_Part(split, _labels(archive, split), _layout(archive, split)) for split in SPLITS]
    except KeyError as error:
        missing = str(error.args[0]).removeprefix("There is no item named '").partition(".npy")[0]
        raise DataError(
            f"{uri}: {missing} is missing; expected: <split>_images and <split>_labels of train, val, test"
        ) from None
    except DataError as error:
        raise DataError(f"{uri}: {error}") from None
    except Exception as error:
        raise DataError(f"{uri}: is not a usable .npz file ({type(error).__name__})") from None
    for part in parts:
        if wrong := set(part.labels.tolist()) - set(range(len(allowed))):
            names = f"0..{len(allowed) - 1} ({', '.join(allowed)})"
            raise DataError(f"{uri}: {part.split}_labels holds {min(wrong)}; allowed: {names}")
    return Opened(sum(len(part.labels) for part in parts), _items(uri, path, parts, allowed))


def _labels(archive: zipfile.ZipFile, split: str) -> NDArray[np.integer]:
    with archive.open(f"{split}_labels.npy") as file:
        labels: NDArray[np.integer] = npy.read_array(file, allow_pickle=False)
    if labels.dtype.kind not in "iu" or labels.ndim not in {1, 2} or labels.size != len(labels):
        raise DataError(f"{split}_labels is {labels.dtype} {labels.shape}; allowed: integers, N x 1")
    count = _layout(archive, split)[0]
    if len(labels) != count:
        raise DataError(f"{split}_labels is {labels.dtype} {labels.shape}; allowed: integers, {count} x 1")
    return labels.ravel()


def _layout(archive: zipfile.ZipFile, split: str) -> tuple[int, ...]:
    with archive.open(f"{split}_images.npy") as file:
        shape, in_columns, dtype = _header(file)
    if dtype != np.uint8 or in_columns or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise DataError(f"{split}_images is {dtype} {shape}; allowed: uint8, N x rows x columns, or N x rows x columns x 3")
    return shape


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, in_columns, dtype = read(file)
    return shape, in_columns, dtype


def _items(uri: str, path: Path, parts: list[_Part], allowed: list[str]) -> Iterator[Item | Refusal]:
    with zipfile.ZipFile(path) as archive:
        for part in parts:
            size = int(np.prod(part.shape[1:]))
            with archive.open(f"{part.split}_images.npy") as file:
                _header(file)
                for i, label in enumerate(part.labels):
                    try:
                        content = file.read(size)
                    except (zipfile.BadZipFile, EOFError, OSError):
                        content = b""
                    if len(content) != size:
                        raise DataError(f"{uri}: {part.split}_images ends or breaks at image {i} of {len(part.labels)}")
                    image = np.frombuffer(content, np.uint8).reshape(part.shape[1:])
                    yield Item(f"{part.split}-{i:06d}", image, allowed[label], split=part.split)
