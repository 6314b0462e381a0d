"""The contract of :class:`cv_factory_ops.features.stores.VectorStore` over an engine that keeps records by id.

An engine reads, writes and removes records and proposes near ones; what the contract says beyond that is here, once. Distances
are calculated here as well, from the vectors that the engine gives back: so they mean the same whatever the engine's own scores
are, and equally near items are seen to be so.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.errors import ConfigError, DataError
from cv_factory_ops.features.checks import TIED, Metric, checked, checked_query, distances, is_value
from cv_factory_ops.features.fields import Clause, clauses, fields
from cv_factory_ops.features.stores import Filter, Item, Match

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Record:
    """What an engine keeps under an id."""

    item: Item
    vector: NDArray[np.float32]
    """(dimensions,), as compared"""


class Engine(ABC):
    """A vector store, but for where its records lie."""

    batch = 1000
    """Records that one request may carry."""
    largest = 2**20
    """Bytes of JSON that an item's metadata and text may take."""

    def __init__(self, place: str, metric: Metric, dimensions: int) -> None:
        self.place = place
        self.metric = metric
        self.dimensions = dimensions
        self.held = ExitStack()
        """What is freed when it is closed."""
        self.is_copy = False
        """Of a folder that cannot be written: changes are refused, as they would be lost."""

    @abstractmethod
    def read(self, ids: Sequence[str]) -> Mapping[str, Record]:
        """Those of at most ``batch`` ids that are there."""

    @abstractmethod
    def write(self, records: Sequence[Record]) -> None:
        """Keep at most ``batch`` records in place of what was under their ids."""

    @abstractmethod
    def remove(self, ids: Sequence[str]) -> None:
        """Forget at most ``batch`` ids, which are there."""

    @abstractmethod
    def nearest(self, vector: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> Sequence[Record]:
        """The nearest ``k`` of those that all clauses admit, or all of these, in any order."""

    @abstractmethod
    def items(self) -> Iterator[Item]:
        """As of :class:`cv_factory_ops.features.stores.VectorStore`."""

    @abstractmethod
    def count(self) -> int:
        """How many there are."""

    def close(self) -> None:
        self.held.close()

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        prepared = self._checked(items, vectors)
        if present := self._records([item.id for item in items]):
            raise DataError(f"{self.place}: {len(present)} of {len(items)} ids are there already, such as {min(present)}")
        self._write(items, prepared)

    def update(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        prepared = self._checked(items, vectors)
        self._known([item.id for item in items])
        self._write(items, prepared)

    def delete(self, ids: Sequence[str]) -> int:
        self._require_writable()
        present = list(self._records(ids))
        for part in parts(present, self.batch):
            self.remove(part)
        return len(present)

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        records = self._records(ids)
        return [records[each].item if each in records else None for each in ids]

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        records = self._known(ids)
        return np.array([records[each].vector for each in ids], np.float32).reshape(len(ids), self.dimensions)

    def search(self, vector: NDArray[np.float32], k: int, where: Filter | None = None) -> list[Match]:
        query = checked_query(vector, self.metric, self.dimensions)
        wanted = clauses(where or {})
        if k < 1 or any(clause.operand == () for clause in wanted):
            return []
        asked = k + 1
        while True:
            matches = self._ranked(query, self.nearest(query, asked, wanted))
            # The engine chooses among equally near ones as it likes: all of them have to be seen for the first by id.
            if len(matches) < asked or matches[-1].distance > matches[k - 1].distance or asked >= TIED:
                return matches[:k]
            asked = min(2 * asked, TIED)

    def persist(self) -> None:  # noqa: B027 - of an engine that keeps at once
        """Nothing is left to do: each change was kept when it was made."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _require_writable(self) -> None:
        if self.is_copy:
            raise storage.explained_os_error(OSError(errno.EROFS, os.strerror(errno.EROFS)), self.place)

    def _checked(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        self._require_writable()
        prepared = checked(items, vectors, self.metric, self.dimensions)
        if any((size := len(json.dumps([fields(item.metadata), item.text]))) > self.largest for item in items):
            raise DataError(f"{self.place}: an item takes {size} bytes; at most {self.largest} can be kept here")
        return prepared

    def _ranked(self, query: NDArray[np.float32], records: Sequence[Record]) -> list[Match]:
        found = np.array([record.vector for record in records], np.float32).reshape(len(records), self.dimensions)
        far = distances(query, found, self.metric)
        matches = [Match(record.item, float(distance)) for record, distance in zip(records, far, strict=True)]
        return sorted(matches, key=lambda match: (match.distance, match.item.id))

    def _write(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        records = [Record(item, vector) for item, vector in zip(items, vectors, strict=True)]
        for part in parts(records, self.batch):
            self.write(part)

    def _records(self, ids: Sequence[str]) -> dict[str, Record]:
        found: dict[str, Record] = {}
        for part in parts(list(filter(is_value, dict.fromkeys(ids))), self.batch):
            found |= self.read(part)
        return found

    def _known(self, ids: Sequence[str]) -> dict[str, Record]:
        records = self._records(ids)
        if absent := set(ids) - set(records):
            raise DataError(f"{self.place}: {len(absent)} of {len(ids)} ids are not there, such as {min(absent)}")
        return records


def parts(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """The values, ``size`` at a time."""
    return (values[start : start + size] for start in range(0, len(values), size))


def writable(folder: Path, held: ExitStack) -> Path:
    """A folder, which is made where there is none; where it cannot be written, a copy of it in a temporary one that goes with
    ``held``: for engines that write even to read.

    Raises:
        DataError, Unavailable: it cannot be made, read or copied.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        inside = list(folder.rglob("*"))
        if all(os.access(path, os.W_OK) for path in (folder, *inside)):
            return folder
        copy = Path(held.enter_context(TemporaryDirectory(prefix="cvf-store-")))
        for path in inside:  # without modes, which would keep the copy from being written
            there = copy / path.relative_to(folder)
            there.mkdir() if path.is_dir() else shutil.copyfile(path, there)
        return copy
    except OSError as error:
        raise storage.explained_os_error(error, str(folder)) from None


def login(variable: str) -> str:
    """What an environment variable holds; without a variable nothing.

    Raises:
        ConfigError: it is not set.
    """
    if variable and not os.environ.get(variable):
        raise ConfigError(f"{variable}: is not set in the environment; it holds the store's key")
    return os.environ.get(variable, "") if variable else ""
