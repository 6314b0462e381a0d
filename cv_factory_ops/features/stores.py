"""What vector stores promise in common, and which one a configuration means.

    store = open_store(config, folder, "chest_xray", dimensions=128)
    store.add([Item("a", {"label": "opacity", "age": 61})], vectors)
    store.persist()
    store.search(vector, 5, {"label": "opacity", "age": Between(40, None)})

One contract, ``tests/test_stores.py``, is held against every store that can run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, assert_never

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import (
    ChromaStore,
    FaissStore,
    MilvusStore,
    PineconeStore,
    VectorStoreConfig,
    WeaviateStore,
)
from cv_factory_ops.errors import ConfigError

Value = str | float
"""Of a name in the metadata: a word, or a finite number. What is missing is left out."""


@dataclass(frozen=True, slots=True)
class Between:
    """Numbers from ``low`` to ``high``, both included; None is no bound."""

    low: float | None = None
    high: float | None = None


Filter = Mapping[str, Value | Sequence[str] | Between]
"""What metadata must be, name by name, all of them: this value, one of these words, or a number between two."""


@dataclass(frozen=True, slots=True)
class Item:
    """What is known of a vector."""

    id: str
    metadata: Mapping[str, Value] = field(default_factory=dict)
    text: str = ""
    """Words about it, as of a report; may be empty."""


@dataclass(frozen=True, slots=True)
class Match:
    """An item that was found."""

    item: Item
    distance: float
    """``cosine``: 1 - cosine of the angle, 0..2; ``l2``: Euclidean. Of an index that compresses, an estimate."""


class VectorStore(Protocol):
    """Vectors (dimensions,) of float32, finite, each with an item, found by id and by nearness.

    What :meth:`persist` has returned from survives any end of the process; later changes may be lost, but never by halves.
    Closing persists nothing. One process writes at a time; one that only reads sees the state that it has opened.
    """

    dimensions: int

    def add(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        """Keep new items with their vectors (N, dimensions).

        Raises:
            DataError: an id is there already, or twice; vectors of another shape, not finite, or of length 0 under ``cosine``.
                Nothing has been added then.
        """

    def update(self, items: Sequence[Item], vectors: NDArray[np.float32]) -> None:
        """Replace items, and their vectors, by those with the same ids.

        Raises:
            DataError: an id is not there, or as :meth:`add`. Nothing has been changed then.
        """

    def delete(self, ids: Sequence[str]) -> int:
        """Forget these; returns how many of them were there."""

    def get(self, ids: Sequence[str]) -> list[Item | None]:
        """Items in the order of the ids; None where there is none."""

    def vectors(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Their vectors (N, dimensions), as they are compared: under ``cosine`` of length 1.

        Raises:
            DataError: an id is not there.
        """

    def search(self, vector: NDArray[np.float32], k: int, where: Filter | None = None) -> list[Match]:
        """The nearest to a vector (dimensions,) of those that the filter admits: ``k`` of them or, where there are fewer, all;
        nearest first, equally near ones by id."""

    def items(self) -> Iterator[Item]:
        """All of them, in any order; nothing may change meanwhile. What an index of their words is made from."""

    def count(self) -> int:
        """How many there are."""

    def persist(self) -> None:
        """Return when everything so far survives the end of the process."""

    def close(self) -> None:
        """Free what is held."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def open_store(config: VectorStoreConfig, folder: Path, name: str, dimensions: int) -> VectorStore:
    """The store that is configured: what lies in ``folder``, or on its server under ``name``; empty where there is nothing yet.

    Raises:
        ConfigError: its package is not installed, or a login is missing from the environment.
        DataError: what lies there is of other dimensions or another metric, or damaged.
        Unavailable: its server does not answer.
    """
    try:
        match config:
            case FaissStore():
                from cv_factory_ops.features.faiss_store import FaissVectors

                return FaissVectors.open(config, folder, dimensions)
            case ChromaStore():
                from cv_factory_ops.features.chroma_store import ChromaVectors

                return ChromaVectors.open(config, folder, name, dimensions)
            case MilvusStore():
                from cv_factory_ops.features.milvus_store import MilvusVectors

                return MilvusVectors.open(config, folder, name, dimensions)
            case PineconeStore():
                from cv_factory_ops.features.pinecone_store import PineconeVectors

                return PineconeVectors.open(config, name, dimensions)
            case WeaviateStore():
                from cv_factory_ops.features.weaviate_store import WeaviateVectors

                return WeaviateVectors.open(config, name, dimensions)
            case _:
                assert_never(config)
    except ModuleNotFoundError as error:
        raise ConfigError(f"needs {error.name}: pip install 'cv-factory[vectors]'") from None
