"""Vectors in an index of Pinecone, a namespace for each name. https://docs.pinecone.io/reference/api"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import PineconeStore
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.engine import Engine, Record, login, parts
from cv_factory_ops.features.fields import Clause, fields, metadata_of, original, plain
from cv_factory_ops.features.stores import Item

if TYPE_CHECKING:
    from pinecone import Index

MOST = 10_000
"""Neighbours that Pinecone answers with."""
PATIENCE = 60.0
"""Seconds in which what was written should be found."""
PAUSE = 0.2
"""Seconds between two looks."""


class PineconeVectors(Engine):
    """Ids are ASCII there, so they are kept as :func:`cv_factory_ops.features.fields.plain` makes them.

    Pinecone shows what was written only some time later. :meth:`persist` waits for that. Until then what was written is held
    here as well, so that ids and counts are of now; searches and :meth:`items` may be of before.
    """

    batch = 100
    largest = 40_000

    def __init__(self, index: Index, config: PineconeStore, name: str, dimensions: int) -> None:
        super().__init__(config.url, config.metric, dimensions)
        self.index = index
        self.name = plain(name)
        self._written: int | None = None
        self._pending: dict[str, Record | None] = {}
        """What was written under an id, or None where it was removed, and has not been seen there."""
        with self._explained():
            there = index.describe_index_stats()
        self._count = _count(there, self.name)
        if there.dimension != dimensions or there.metric not in {None, METRICS[config.metric]}:
            asked = f"{dimensions}, {METRICS[config.metric]}"
            raise DataError(f"{self.place}: is of {there.dimension} dimensions, {there.metric}; {asked} is asked for")

    @classmethod
    def open(cls, config: PineconeStore, name: str, dimensions: int) -> Self:
        """See :func:`cv_factory_ops.features.stores.open_store`."""
        from pinecone import Index

        with ExitStack() as held:
            index = Index(host=config.url, api_key=login(config.api_key_env))
            held.callback(index.close)
            store = cls(index, config, name, dimensions)
            store.held = held.pop_all()
        return store

    def read(self, ids: Sequence[str]) -> Mapping[str, Record]:
        pending = {each: record for each in ids if (record := self._pending.get(each))}
        return pending | self._fetched([each for each in ids if each not in self._pending])

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        super().add(items, vectors)
        self._count += len(items)

    def delete(self, ids: Sequence[str]) -> int:
        deleted = super().delete(ids)
        self._count -= deleted
        return deleted

    def write(self, records: Sequence[Record]) -> None:
        with self._explained():
            answer = self.index.upsert(vectors=[_kept(record) for record in records], namespace=self.name)
        if answer.response_info and answer.response_info.lsn_committed is not None:
            self._written = answer.response_info.lsn_committed
        self._pending |= {record.item.id: record for record in records}

    def remove(self, ids: Sequence[str]) -> None:
        with self._explained():
            self.index.delete(ids=[plain(each) for each in ids], namespace=self.name)
        self._pending |= dict.fromkeys(ids)

    def nearest(self, vector: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> Sequence[Record]:
        with self._explained():
            found = self.index.query(
                vector=vector.tolist(), top_k=min(k, MOST), namespace=self.name, filter=_filter(wanted) if wanted else None
            )
        ids = [original(match.id) for match in found.matches]
        return [record for part in parts(ids, self.batch) for record in self.read(part).values()]

    def items(self) -> Iterator[Item]:
        with self._explained():
            for page in self.index.list(namespace=self.name, limit=self.batch):
                found = self.read([original(listed.id) for listed in page.vectors])
                yield from (record.item for record in found.values())

    def count(self) -> int:
        return self._count

    def persist(self) -> None:
        """Wait until all that was written is there by its id and counted, and until searches have caught up, as far as Pinecone
        tells.

        Raises:
            Unavailable: that is not so within a minute.
        """
        if not self._pending and self._written is None:
            return
        self._see()
        deadline = time.monotonic() + PATIENCE
        while self._pending or not (self._is_counted() and self._is_searched()):
            if time.monotonic() > deadline:
                raise Unavailable(f"{self.place}: what was written is not found after {PATIENCE:.0f} s")
            time.sleep(PAUSE)
            self._see()
        self._written = None

    def _see(self) -> None:
        """Forget of what is pending that which is there."""
        for part in parts(list(self._pending), self.batch):
            found = self._fetched(part)
            for each in part:
                if _is_same(found.get(each), self._pending[each]):
                    del self._pending[each]

    def _is_counted(self) -> bool:
        with self._explained():
            return _count(self.index.describe_index_stats(), self.name) == self._count

    def _is_searched(self) -> bool:
        if self._written is None:
            return True
        with self._explained():
            seen = self.index.query(vector=[1.0] * self.dimensions, top_k=1, namespace=self.name).response_info
        return not seen or seen.lsn_reconciled is None or seen.is_reconciled(self._written)

    def _fetched(self, ids: Sequence[str]) -> dict[str, Record]:
        if not ids:
            return {}
        with self._explained():
            found = self.index.fetch(ids=[plain(each) for each in ids], namespace=self.name).vectors
        return {original(each): _record(each, kept) for each, kept in found.items()}

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from pinecone.errors.exceptions import (
            ApiError,
            ForbiddenError,
            PineconeError,
            PineconeValueError,
            RateLimitError,
            ServiceError,
            UnauthorizedError,
        )

        try:
            yield
        except (UnauthorizedError, ForbiddenError):
            raise ConfigError(f"{self.place}: Pinecone refuses the key of store.api_key_env") from None
        except (RateLimitError, ServiceError) as error:
            raise Unavailable(f"{self.place}: Pinecone answers {error.status_code}") from None
        except (ApiError, PineconeValueError) as error:
            raise DataError(f"{self.place}: Pinecone refuses: {type(error).__name__}") from None
        except PineconeError as error:
            raise Unavailable(f"{self.place}: Pinecone does not answer ({type(error).__name__})") from None


METRICS = {"cosine": "cosine", "l2": "euclidean"}


def _count(stats: Any, name: str) -> int:
    here = stats.namespaces.get(name)
    return int(here.vector_count) if here else 0


def _is_same(found: Record | None, written: Record | None) -> bool:
    """Whether it is what was written, but for what decimal digits leave of a number."""
    if found is None or written is None:
        return found is written
    return found.item == written.item and np.allclose(found.vector, written.vector, rtol=1e-5, atol=1e-6)


def _kept(record: Record) -> dict[str, Any]:
    metadata = {**fields(record.item.metadata), "text": record.item.text}
    return {"id": plain(record.item.id), "values": record.vector.tolist(), "metadata": metadata}


def _record(each: str, kept: Any) -> Record:
    return Record(Item(original(each), metadata_of(kept.metadata), kept.metadata["text"]), np.array(kept.values, np.float32))


def _filter(wanted: Sequence[Clause]) -> dict[str, Any]:
    """In Pinecone's terms, which are MongoDB's."""
    names = {"in": "$in", "==": "$eq", ">=": "$gte", "<=": "$lte"}
    return {"$and": [{clause.field: {names[clause.operator]: clause.operand}} for clause in wanted]}
