"""How similar studies are found: by vectors, or by vectors and words; re-scored, or read again by a model.

    with Retriever(store, config) as retriever:
        retriever.retrieve(Query(vector, text="opacity left", where={"view": "PA"}), k=5)

A filter narrows what is looked at, by vectors and by words: it takes nothing away from ``k``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, assert_never

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import (
    CrossEncoderReranker,
    DenseRetriever,
    ExactReranker,
    HybridRetriever,
    NoReranker,
    RetrievalConfig,
)
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.features.checks import checked_query, distances
from cv_factory_ops.features.stores import Filter, Item, Match, VectorStore
from cv_factory_ops.features.words import Words, words_of

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


@dataclass(frozen=True, slots=True)
class Query:
    """What similar studies are wanted to."""

    vector: NDArray[np.float32]
    """(dimensions,)"""
    text: str = ""
    """Words to find and, for a cross-encoder, to compare with; without any, the vector decides alone."""
    where: Filter | None = None


class Retriever:
    """A store as a configuration wants it asked. It sees words as they were when it was made. Threads may share it."""

    def __init__(self, store: VectorStore, config: RetrievalConfig) -> None:
        """
        Raises:
            ConfigError: the cross-encoder's package or folder is not there, or cannot be loaded.
        """
        self.store = store
        self.config = config
        reranker = config.reranker
        self._encoder = load_encoder(reranker.path) if isinstance(reranker, CrossEncoderReranker) else None
        self._words = Words(store.items()) if isinstance(config.retriever, HybridRetriever) else None

    @property
    def reads_words(self) -> bool:
        """Whether the text of a query has a say."""
        return bool(self._words or self._encoder)

    def retrieve(self, query: Query, k: int) -> list[Match]:
        """The ``k`` most similar or, where the filter admits fewer, all; most similar first."""
        match self.config.reranker:
            case NoReranker() | ExactReranker():
                return self._found(query, k)[:k]
            case CrossEncoderReranker(candidates=candidates):
                return self._read_again(query, self._found(query, max(k, candidates)))[:k]
            case _:
                assert_never(self.config.reranker)

    def close(self) -> None:
        """Free the words; the store stays open."""
        if self._words:
            self._words.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _found(self, query: Query, k: int) -> list[Match]:
        match self.config.retriever:
            case DenseRetriever():
                return self._nearest(query, k)
            case HybridRetriever(candidates=candidates, rank_constant=constant):
                return self._joined(query, max(k, candidates), constant)
            case _:
                assert_never(self.config.retriever)

    def _nearest(self, query: Query, k: int) -> list[Match]:
        """By vectors; re-scored here, not after they are joined with words, whose part in the order would else be lost."""
        if not isinstance(self.config.reranker, ExactReranker):
            return self.store.search(query.vector, k, query.where)
        found = self.store.search(query.vector, max(k, self.config.reranker.candidates), query.where)
        return sorted(
            self._measured(query, [match.item for match in found]), key=lambda match: (match.distance, match.item.id)
        )[:k]

    def _joined(self, query: Query, candidates: int, constant: float) -> list[Match]:
        nearest = self._nearest(query, candidates)
        near = {match.item.id: rank for rank, match in enumerate(nearest, 1)}
        worded = self._words.ranks(query.text, candidates, query.where, list(near)) if self._words else {}
        others = self.store.get([each for each in worded if each not in near])
        found = [*nearest, *self._measured(query, [item for item in others if item])]
        scores = fused([near, worded], constant)
        return sorted(found, key=lambda match: (-scores[match.item.id], match.distance, match.item.id))

    def _measured(self, query: Query, items: Sequence[Item]) -> list[Match]:
        metric = self.config.store.metric
        vector = checked_query(query.vector, metric, self.store.dimensions)
        exact = distances(vector, self.store.vectors([item.id for item in items]), metric)
        return [Match(item, float(distance)) for item, distance in zip(items, exact, strict=True)]

    def _read_again(self, query: Query, found: list[Match]) -> list[Match]:
        if not (self._encoder and query.text and found):
            return found
        pairs = [(query.text, words_of(match.item)) for match in found]
        scores = self._encoder.predict(pairs, show_progress_bar=False)
        order = sorted(range(len(found)), key=lambda place: (-scores[place], found[place].item.id))
        return [found[place] for place in order]


def fused(rankings: Sequence[Mapping[str, int]], constant: float) -> dict[str, float]:
    """Of each id the sum over the rankings, ids with ranks from 1, of 1 / (constant + rank): reciprocal rank fusion (Cormack,
    Clarke and Buettcher 2009)."""
    scores: defaultdict[str, float] = defaultdict(float)
    for ranking in rankings:
        for each, rank in ranking.items():
            scores[each] += 1 / (constant + rank)
    return dict(scores)


def load_encoder(path: str) -> CrossEncoder:
    """A cross-encoder from a folder; nothing is downloaded, no pickle is read.

    Raises:
        ConfigError: its package is missing, or there is no model in the folder.
    """
    if not Path(path).is_dir():
        raise ConfigError(
            f"retrieval.reranker.path: {path} is not a folder; it holds a model for sentence-transformers' CrossEncoder"
        )
    try:
        from sentence_transformers import CrossEncoder
    except ModuleNotFoundError as error:
        raise ConfigError(f"retrieval.reranker: needs {error.name}: pip install 'cv-factory[rerank]'") from None
    try:
        return CrossEncoder(path, local_files_only=True, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError) as error:
        raise ConfigError(f"retrieval.reranker.path: {path} holds no usable cross-encoder ({type(error).__name__})") from None
