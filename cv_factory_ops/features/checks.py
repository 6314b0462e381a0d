"""What stores check before they keep or compare anything, and how near is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.errors import DataError
from cv_factory_ops.features.stores import Item

Metric = Literal["cosine", "l2"]
TIED = 10_000
"""Neighbours up to which more are asked for, to see all that are as near as the last. Of a larger tie any may come."""


def checked(items: Sequence[Item], vectors: NDArray[np.float32], metric: Metric, dimensions: int) -> NDArray[np.float32]:
    """The vectors of new items (N, dimensions) as they are compared: under ``cosine`` of length 1.

    Raises:
        DataError: as :meth:`cv_factory_ops.features.stores.VectorStore.add`, but for ids that are there already; or a value in
            the metadata is neither a word nor a finite number; or what should be text is none of Unicode.
    """
    if len({item.id for item in items}) < len(items):
        raise DataError(f"{len(items)} items have {len({item.id for item in items})} different ids; each needs its own")
    for item in items:
        for name, value in item.metadata.items():
            if not is_value(value):
                raise DataError(f"metadata {ascii(name)[1:-1]}: must be a word or a finite number, not {_kind(value)}")
        if not all(map(is_value, (item.id, item.text, *item.metadata))):
            raise DataError(f"item {ascii(item.id)[1:-1]}: its id, its text or a name in its metadata is no text of Unicode")
    if np.shape(vectors) != (len(items), dimensions):
        raise DataError(f"vectors of shape {np.shape(vectors)}: {len(items)} items need ({len(items)}, {dimensions})")
    return compared(np.asarray(vectors, np.float32), metric, [item.id for item in items])


def checked_query(vector: NDArray[np.float32], metric: Metric, dimensions: int) -> NDArray[np.float32]:
    """A vector (dimensions,) as it is compared.

    Raises:
        DataError: it is of another shape, not finite, or of length 0 under ``cosine``.
    """
    if np.shape(vector) != (dimensions,):
        raise DataError(f"a vector of shape {np.shape(vector)}: the store's have ({dimensions},)")
    return np.asarray(compared(np.asarray(vector, np.float32)[None], metric)[0])


def is_value(value: object) -> bool:
    """Whether it may stand in the metadata: text that UTF-8 can write (no lone surrogate), or a finite number."""
    if isinstance(value, str):
        return value.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _kind(value: object) -> str:
    return ascii(value) if isinstance(value, (str, float)) else type(value).__name__


def compared(vectors: NDArray[np.float32], metric: Metric, ids: Sequence[str] = ()) -> NDArray[np.float32]:
    """(N, dimensions) as given, or under ``cosine`` of length 1.

    Raises:
        DataError: not finite, or of length 0 under ``cosine``; with the ``ids`` (N), it names the first of these.
    """
    finite = np.asarray(np.isfinite(vectors).all(axis=1))
    if not finite.all():
        raise DataError(f"{_whose(finite, ids)} holds a number that is not finite")
    if metric == "l2":
        return vectors
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    if not lengths.all():
        raise DataError(f"{_whose(lengths > 0, ids)} has length 0: it has no direction that cosine could compare")
    return np.asarray(vectors / lengths[:, None], np.float32)


def _whose(fit: NDArray[np.bool_], ids: Sequence[str]) -> str:
    return f"the vector of {ids[int(np.argmin(fit))]}" if ids else "a vector"


def distances(query: NDArray[np.float32], vectors: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
    """(N,) from a query (dimensions,) to vectors (N, dimensions), in float64: ``cosine`` 1 - cosine of the angle, 0..2; ``l2``
    Euclidean. The same vector has the same distance, wherever it stands."""
    given, others = query.astype(np.float64), vectors.astype(np.float64)
    if metric == "l2":
        return np.asarray(np.sqrt(((others - given) ** 2).sum(axis=1)))
    lengths = np.sqrt((given**2).sum() * (others**2).sum(axis=1))
    return np.asarray(np.clip(1 - (others * given).sum(axis=1) / lengths, 0, 2))
