"""Vectors in files that FAISS searches where they lie, mapped into the process that asks.

    store.json       the pointer: what the store is, and which files it consists of, with sizes and digests
    vectors-7 ...    files of the base: vectors, items, perhaps a faster index and the rows that are alive; never changed

What was added since the base was built is the tail, which is compared one by one and persisted in files of its own. A tail that
has grown is added to a new base; what is deleted or replaced in the base stays there, unseen, until its share is worth building
the base anew. The pointer is replaced when all new files are written and synchronised, so a process that is killed leaves the
last complete state; a reader keeps the files that it has mapped.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain, islice, pairwise
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cv_factory_ops import storage
from cv_factory_ops.config.retrieval import FaissIndex, FaissStore, FlatIndex, IvfPqIndex
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.checks import TIED, Metric, checked, checked_query
from cv_factory_ops.features.faiss_index import Admitted, Vectors, worthwhile
from cv_factory_ops.features.faiss_rows import Rows
from cv_factory_ops.features.fields import Clause, clauses
from cv_factory_ops.features.stores import Filter, Item, Match
from cv_factory_ops.records import Frozen

POINTER = "store.json"
TAIL = 2000
"""Items that are compared one by one beside a base; with more of them, the base is extended."""
DEAD = 0.25
"""Share of rows in the base, deleted or replaced, above which it is built anew."""
BATCH = 50_000
"""Vectors that are moved at a time."""
FILTERS = 4
"""Latest ones of which the admitted rows are remembered."""
SAME = 1e-6
"""What equal distances may differ by when FAISS calculates them."""
OURS = re.compile(r"(tail_)?(vectors|items|index|alive)-\d+|\.store\.json\..+")
"""Names of files that a persist may leave."""


class StoredFile(Frozen):
    name: str
    size: int
    sha256: str


class Pointer(Frozen):
    """``store.json``."""

    format: Literal[1] = 1
    generation: int
    dimensions: int
    metric: Metric
    index: FaissIndex
    files: dict[str, StoredFile]
    """By role: ``vectors``, ``items``, ``index`` and ``alive`` of the base, ``tail_vectors`` and ``tail_items``."""


class Part:
    """Items and their vectors, row by row, and which of them count."""

    def __init__(self, rows: Rows, vectors: Vectors, alive: NDArray[np.bool_] | None = None) -> None:
        self.rows, self.vectors = rows, vectors
        self.alive = alive
        self._alive = None if alive is None else Admitted(alive)
        self._admitted = lru_cache(FILTERS)(partial(_admitted, rows, alive))

    def count(self) -> int:
        return len(self.rows) if self._alive is None else len(self._alive.rows)

    def without(self, rows: Sequence[int]) -> Part:
        alive = np.ones(len(self.rows), np.bool_) if self.alive is None else self.alive.copy()
        alive[list(rows)] = False
        return Part(self.rows, self.vectors, alive)

    def find(self, ids: Sequence[str]) -> dict[str, int]:
        return self.rows.find(ids, self.alive)

    def search(self, query: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> list[Match]:
        """All that may be among the nearest k: those, and any that are as near as the last of them."""
        admitted, asked = self._admitted(tuple(wanted)) if wanted else self._alive, k + 1
        far, rows = self.vectors.nearest(query, asked, admitted)
        while len(rows) == asked < TIED and far[-1] <= far[k - 1] * (1 + SAME) + SAME:
            asked = min(2 * asked, TIED)
            far, rows = self.vectors.nearest(query, asked, admitted)
        if any(later - earlier <= SAME * (1 + later) for earlier, later in pairwise(far)):
            far = self.vectors.distances(query, rows).tolist()
        else:
            far, rows = far[:k], rows[:k]
        return [Match(item, distance) for item, distance in zip(self.rows.items(rows), far, strict=True)]

    def kept_rows(self) -> list[Rows]:
        """Of those that count, if there are any."""
        return [self.rows if self.alive is None else self.rows.kept(self.alive)] if self.count() else []

    def batches(self) -> Iterator[NDArray[np.float32]]:
        """Vectors of the rows that count."""
        return (self.vectors.take(rows) for rows in self._batches())

    def items(self) -> Iterator[Item]:
        return chain.from_iterable(self.rows.items(rows) for rows in self._batches())

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        rows = np.arange(len(self.rows)) if self._alive is None else self._alive.rows
        return (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))


class FaissVectors:
    """A :class:`cv_factory_ops.features.stores.VectorStore` in a folder. Threads may search at the same time, not change it."""

    def __init__(self, config: FaissStore, folder: Path, dimensions: int) -> None:
        self.dimensions = dimensions
        self._config, self._folder = config, folder
        self._pointer: Pointer | None = None
        self._base: Part | None = None
        self._tail: dict[str, tuple[Item, NDArray[np.float32]]] = {}
        self._tail_part: Part | None = None
        self._changed = True
        self._lock: int | None = None

    @classmethod
    def open(cls, config: FaissStore, folder: Path, dimensions: int) -> Self:
        """See :func:`cv_factory_ops.features.stores.open_store`."""
        if isinstance(config.index, IvfPqIndex) and dimensions % config.index.codes:
            raise ConfigError(f"index.codes: {config.index.codes} given; allowed: divisors of the {dimensions} dimensions")
        store = cls(config, folder, dimensions)
        while pointer := _read_pointer(folder):
            store._require_same(pointer)
            try:
                _verify(folder, pointer)
                store._load(pointer)
                break
            except (OSError, RuntimeError, ValueError) as error:
                if _read_pointer(folder) == pointer:  # else a writer has replaced its files meanwhile
                    raise DataError(f"{folder}: damaged: {error}") from None
        return store

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        prepared = checked(items, vectors, self._config.metric, self.dimensions)
        self._begin()
        if present := self._present([item.id for item in items]):
            raise DataError(f"{self._folder}: {len(present)} of {len(items)} ids are there already, such as {min(present)}")
        self._put(items, prepared)

    def update(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        prepared = checked(items, vectors, self._config.metric, self.dimensions)
        self._begin()
        ids = [item.id for item in items]
        self._require(ids)
        self._forget(ids)
        self._put(items, prepared)

    def delete(self, ids: Sequence[str]) -> int:
        self._begin()
        present = self._present(ids)
        self._forget(present)
        return len(present)

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        rows = self._base.find(ids) if self._base else {}
        items = dict(zip(rows, self._base.rows.items(list(rows.values())), strict=True)) if self._base else {}
        return [self._tail[id][0] if id in self._tail else items.get(id) for id in ids]

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        self._require(ids)
        found = {id: self._tail[id][1] for id in ids if id in self._tail}
        if self._base and (rows := self._base.find(ids)):
            found |= dict(zip(rows, self._base.vectors.take(list(rows.values())), strict=True))
        return np.array([found[id] for id in ids], np.float32).reshape(len(ids), self.dimensions)

    def search(self, vector: NDArray[np.float32], k: int, where: Filter | None = None) -> list[Match]:
        query = checked_query(vector, self._config.metric, self.dimensions)
        wanted = clauses(where) if where else []
        if k < 1:
            return []
        parts = (self._base, self._tail_as_part())
        found = [match for part in parts if part for match in part.search(query, k, wanted)]
        return sorted(found, key=lambda match: (match.distance, match.item.id))[:k]

    def items(self) -> Iterator[Item]:
        return chain(self._base.items() if self._base else (), (item for item, _ in self._tail.values()))

    def count(self) -> int:
        return len(self._tail) + (self._base.count() if self._base else 0)

    def persist(self) -> None:
        if not self._changed:
            return
        self._begin()
        with _explained(self._folder):
            self._require_current()
            try:
                pointer = self._write((self._pointer.generation if self._pointer else 0) + 1)
                storage.write_bytes((self._folder / POINTER).as_uri(), pointer.model_dump_json(indent=1).encode())
                _synchronise(self._folder)
                self._load(pointer)
            finally:
                self._remove_leftovers()

    def close(self) -> None:
        self._base = self._tail_part = None
        self._tail = {}
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _begin(self) -> None:
        """Before a change: be the one that writes, and to what was opened."""
        if self._lock is not None:
            return
        with _explained(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._require_current()
        except BlockingIOError:
            os.close(lock)
            raise Unavailable(f"{self._folder}: another process writes to it; one does at a time") from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def _require_current(self) -> None:
        if _read_pointer(self._folder) != self._pointer:
            raise Unavailable(f"{self._folder}: was changed since it was opened; open it again")

    def _present(self, ids: Sequence[str]) -> set[str]:
        return {id for id in ids if id in self._tail}.union(self._base.find(ids) if self._base else ())

    def _require(self, ids: Sequence[str]) -> None:
        if absent := set(ids) - self._present(ids):
            raise DataError(f"{self._folder}: {len(absent)} of {len(ids)} ids are not there, such as {min(absent)}")

    def _put(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        self._tail.update({item.id: (item, vector) for item, vector in zip(items, vectors.copy(), strict=True)})
        self._change(len(items))

    def _forget(self, ids: Collection[str]) -> None:
        """Of ids that are there."""
        if self._base and (rows := self._base.find([id for id in ids if id not in self._tail])):
            self._base = self._base.without(list(rows.values()))
        for id in ids:
            self._tail.pop(id, None)
        self._change(len(ids))

    def _change(self, count: int) -> None:
        if count:
            self._changed, self._tail_part = True, None

    def _tail_as_part(self) -> Part | None:
        if self._tail_part is None and self._tail:
            self._tail_part = Part(self._tail_rows(), self._built(FlatIndex(), len(self._tail), self._tail_batches()))
        return self._tail_part

    def _tail_rows(self) -> Rows:
        return Rows.of([item for item, _ in self._tail.values()])

    def _tail_batches(self) -> Iterator[NDArray[np.float32]]:
        vectors = iter([vector for _, vector in self._tail.values()])
        while batch := list(islice(vectors, BATCH)):
            yield np.stack(batch)

    def _built(self, index: FaissIndex, count: int, batches: Iterable[NDArray[np.float32]]) -> Vectors:
        return Vectors.build(index, self._config.metric, self.dimensions, count, batches)

    def _write(self, generation: int) -> Pointer:
        """The files of a new generation; those of the base stay where it has not grown or shrunk much."""
        base, tail, files = self._base, None, dict[str, StoredFile]()
        if len(self._tail) > TAIL or (base and base.count() < (1 - DEAD) * len(base.rows)):
            base = self._merged()
            files |= self._write_part(base, "", generation) if base else {}
        elif self._pointer:
            files |= {role: file for role, file in self._pointer.files.items() if role in {"vectors", "items", "index"}}
        if base and base.alive is not None:
            path = self._folder / f"alive-{generation}"
            np.packbits(base.alive).tofile(path)
            files["alive"] = _stored(path)
        if base is self._base and (tail := self._tail_as_part()):
            files |= self._write_part(tail, "tail_", generation)
        _synchronise(self._folder)
        settings = self._config
        return Pointer(
            generation=generation, dimensions=self.dimensions, metric=settings.metric, index=settings.index, files=files
        )

    def _write_part(self, part: Part, prefix: str, generation: int) -> dict[str, StoredFile]:
        paths = {role: self._folder / f"{prefix}{role}-{generation}" for role in ("vectors", "index", "items")}
        part.vectors.write(paths["vectors"], paths["index"])
        part.rows.write(paths["items"])
        roles = ["vectors", "items"] if part.vectors.is_exact else list(paths)
        return {f"{prefix}{role}": _stored(paths[role]) for role in roles}

    def _merged(self) -> Part | None:
        """Base and tail as one: the base extended, or built anew where much of it is dead or a faster index now pays."""
        base, count = self._base, self.count()
        if not count:
            return None
        tail = [self._tail_rows()] if self._tail else []
        if base is None or self._pointer is None:
            return Part(tail[0], self._built(self._config.index, count, self._tail_batches()))
        outgrown = base.vectors.is_exact and count >= worthwhile(self._config.index)
        if outgrown or base.count() < (1 - DEAD) * len(base.rows):
            rows = Rows.joined([*base.kept_rows(), *tail])
            return Part(rows, self._built(self._config.index, count, chain(base.batches(), self._tail_batches())))
        vectors = self._read_vectors(self._pointer, "", mapped=False)
        for batch in self._tail_batches():
            vectors.add(batch)
        alive = None if base.alive is None else np.append(base.alive, np.ones(len(self._tail), np.bool_))
        return Part(Rows.joined([base.rows, *tail]), vectors, alive)

    def _load(self, pointer: Pointer) -> None:
        """Become what the pointer says, with the files mapped."""
        base = self._read_part(pointer, "")
        tail = self._read_part(pointer, "tail_")
        if base and (file := pointer.files.get("alive")):
            bits = np.fromfile(self._folder / file.name, np.uint8)
            base = Part(base.rows, base.vectors, np.unpackbits(bits, count=len(base.rows)).astype(np.bool_))
        self._tail = {}
        if tail:
            every = range(len(tail.rows))
            kept = zip(tail.rows.items(every), tail.vectors.take(every), strict=True)
            self._tail = {item.id: (item, vector) for item, vector in kept}
        self._pointer, self._base, self._tail_part, self._changed = pointer, base, tail, False

    def _read_part(self, pointer: Pointer, prefix: str) -> Part | None:
        if f"{prefix}vectors" not in pointer.files:
            return None
        rows = Rows.read(self._folder / pointer.files[f"{prefix}items"].name)
        return Part(rows, self._read_vectors(pointer, prefix, mapped=True))

    def _read_vectors(self, pointer: Pointer, prefix: str, mapped: bool) -> Vectors:
        paths = {role: self._folder / file.name for role, file in pointer.files.items()}
        return Vectors.read(self._config.index, paths[f"{prefix}vectors"], paths.get(f"{prefix}index"), mapped)

    def _require_same(self, pointer: Pointer) -> None:
        if pointer.dimensions != self.dimensions:
            raise DataError(f"{self._folder}: has vectors of {pointer.dimensions} dimensions, not of {self.dimensions}")
        if pointer.metric != self._config.metric:
            raise DataError(f"{self._folder}: compares by {pointer.metric}, not by {self._config.metric}")
        there, asked = (index.model_dump(exclude={"search_breadth", "probes"}) for index in (pointer.index, self._config.index))
        if there != asked:
            raise DataError(f"{self._folder}: was built as {there}, not as {asked}; build it anew")

    def _remove_leftovers(self) -> None:
        """Files of earlier generations, and of persists that did not come to their end."""
        pointer = _read_pointer(self._folder)
        used = {file.name for file in pointer.files.values()} if pointer else set()
        for path in self._folder.iterdir():
            if OURS.fullmatch(path.name) and path.name not in used:
                path.unlink()


def _admitted(rows: Rows, alive: NDArray[np.bool_] | None, wanted: tuple[Clause, ...]) -> Admitted:
    mask = rows.admitted(wanted)
    return Admitted(mask if alive is None else mask & alive)


def _read_pointer(folder: Path) -> Pointer | None:
    try:
        return Pointer.model_validate_json((folder / POINTER).read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        raise DataError(f"{folder / POINTER}: damaged, or written by another version") from None
    except OSError as error:
        raise storage.explained_os_error(error, str(folder)) from None


def _verify(folder: Path, pointer: Pointer) -> None:
    """Raises :class:`OSError` or :class:`ValueError` where a file is not what was written."""
    for file in pointer.files.values():
        size = (folder / file.name).stat().st_size
        if size != file.size:
            raise ValueError(f"{file.name} has {size} bytes, not {file.size}")
        if storage.sha256(folder / file.name) != file.sha256:
            raise ValueError(f"{file.name} has another digest than was written")


def _stored(path: Path) -> StoredFile:
    _synchronise(path)
    return StoredFile(name=path.name, size=path.stat().st_size, sha256=storage.sha256(path))


def _synchronise(path: Path) -> None:
    """Return when a file's content, or a folder's names, would outlive a loss of power."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage.explained_os_error(error, str(folder)) from None
