"""Vectors in Chroma: embedded, in a folder, or on a Chroma server. https://docs.trychroma.com"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import ChromaStore
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.engine import Engine, Record, login, writable
from cv_factory_ops.features.fields import Clause, fields, metadata_of, plain
from cv_factory_ops.features.stores import Item

GRAPH = {"max_neighbors": 32, "ef_construction": 200, "ef_search": 200}
KEPT: Any = ["metadatas", "embeddings"]


class ChromaVectors(Engine):
    """A collection; its own metadata tell dimensions and metric."""

    def __init__(self, client: Any, place: str, config: ChromaStore, name: str, dimensions: int) -> None:
        super().__init__(place, config.metric, dimensions)
        self.client = client
        told = {"dimensions": dimensions, "metric": config.metric}
        with self._explained():
            self.collection = client.get_or_create_collection(
                f"cvf_{plain(name)}",
                metadata=told,
                configuration={"hnsw": {"space": config.metric, **GRAPH}},
                embedding_function=None,
            )
        if (there := dict(self.collection.metadata or {})) != told:
            raise DataError(f"{place}: holds {there}; {told} is asked for")

    @classmethod
    def open(cls, config: ChromaStore, folder: Path, name: str, dimensions: int) -> Self:
        """See :func:`cv_factory_ops.features.stores.open_store`."""
        from chromadb import HttpClient, PersistentClient
        from chromadb.config import Settings
        from chromadb.errors import ChromaError

        place = config.url or str(folder)
        token = login(config.token_env)
        settings = Settings(anonymized_telemetry=False)
        with ExitStack() as held:
            where = folder if config.url else writable(folder, held)
            try:
                if config.url:
                    url = urlsplit(config.url)
                    client = HttpClient(
                        url.hostname or "",
                        url.port or (443 if url.scheme == "https" else 80),
                        ssl=url.scheme == "https",
                        headers={"Authorization": f"Bearer {token}"} if token else None,
                        settings=settings,
                    )
                else:
                    client = PersistentClient(where, settings=settings)
            except (ValueError, ChromaError) as error:  # of any failure to connect, HttpClient makes the first
                if config.url:
                    raise Unavailable(f"{place}: Chroma does not answer") from None
                raise DataError(f"{place}: Chroma cannot open it ({type(error).__name__})") from None
            held.callback(client.close)
            store = cls(client, place, config, name, dimensions)
            store.is_copy, store.held = where != folder, held.pop_all()
        return store

    def read(self, ids: Sequence[str]) -> Mapping[str, Record]:
        with self._explained():
            return {record.item.id: record for record in _records(self.collection.get(list(ids), include=KEPT))}

    def write(self, records: Sequence[Record]) -> None:
        ids = [record.item.id for record in records]
        with self._explained():
            there = self.collection.get(ids, include=["metadatas"])
            # What an upsert does not name stays as it was; None removes it.
            old = {
                each: dict.fromkeys(values or {}) for each, values in zip(there["ids"], there["metadatas"] or [], strict=True)
            }
            self.collection.upsert(
                ids,
                embeddings=[record.vector for record in records],
                metadatas=[
                    {**old.get(item.id, {}), **fields(item.metadata), "text": item.text}
                    for item in (record.item for record in records)
                ],
            )

    def remove(self, ids: Sequence[str]) -> None:
        with self._explained():
            self.collection.delete(list(ids))

    def nearest(self, vector: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> Sequence[Record]:
        where = _where(wanted)
        with self._explained():
            found = self.collection.query(query_embeddings=[vector], n_results=k, where=where, include=KEPT)
            answer: dict[str, Any] = {name: (found[name] or [[]])[0] for name in ("ids", "metadatas", "embeddings")}
            if len(answer["ids"]) < k and len(answer["ids"]) < self._admitted(where):
                # The graph's walk ended before it had met all that the filter admits.
                return _records(self.collection.get(where=where, include=KEPT))
        return _records(answer)

    def items(self) -> Iterator[Item]:
        for start in range(0, self.count(), self.batch):
            with self._explained():
                page = self.collection.get(limit=self.batch, offset=start, include=KEPT)
            yield from (record.item for record in _records(page))

    def count(self) -> int:
        with self._explained():
            return int(self.collection.count())

    def _admitted(self, where: Any) -> int:
        return len(self.collection.get(where=where, include=[])["ids"]) if where else self.collection.count()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from chromadb.errors import AuthorizationError, ChromaAuthError, ChromaError, InternalError, RateLimitError

        try:
            yield
        except (AuthorizationError, ChromaAuthError):
            raise ConfigError(f"{self.place}: Chroma refuses the login of store.token_env") from None
        except (httpx.HTTPError, InternalError, RateLimitError) as error:
            raise Unavailable(f"{self.place}: Chroma does not answer ({type(error).__name__})") from None
        except ChromaError as error:
            raise DataError(f"{self.place}: Chroma refuses: {type(error).__name__}") from None


def _records(answer: Mapping[str, Any]) -> list[Record]:
    return [
        Record(Item(each, metadata_of(values), values["text"]), np.asarray(vector, np.float32))
        for each, values, vector in zip(answer["ids"], answer["metadatas"], answer["embeddings"], strict=True)
    ]


def _where(wanted: Sequence[Clause]) -> Any:
    names = {"in": "$in", "==": "$eq", ">=": "$gte", "<=": "$lte"}
    terms = [
        {clause.field: {names[clause.operator]: list(each) if isinstance(each := clause.operand, tuple) else each}}
        for clause in wanted
    ]
    return {"$and": terms} if len(terms) > 1 else next(iter(terms), None)
