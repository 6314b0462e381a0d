"""Vectors by row, and what finds the nearest of them: the exact index of FAISS, and where it pays a faster one.

Both lie in files of their own and are mapped, not read: ``IO_FLAG_MMAP_IFC``. An HNSW graph is written without the vectors that
FAISS would write with it, as the exact index has them.
"""

from __future__ import annotations

import errno
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, assert_never

import faiss
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import FaissIndex, FlatIndex, HnswIndex, IvfPqIndex
from cv_factory_ops.features.checks import Metric, distances

FEW = 10_000
"""Rows that are compared one by one in less time than most graphs take."""
EXACT_SHARE = 0.1
"""Up to which share of admitted rows one by one is the faster way: a graph or cells would be searched ten times as broadly."""
GRAPH_ROWS = 2000
"""From which on a graph is built."""
CODE_BITS, CENTROIDS = 8, 256
"""Of each of the ``codes`` of a compressed vector, and how many centroids they tell apart."""
TRAINING_POINTS = 39
"""For each centroid, below which FAISS warns of a bad clustering."""


@dataclass(frozen=True)
class Admitted:
    """Which rows may be found, as FAISS takes it."""

    mask: NDArray[np.bool_]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        return np.flatnonzero(self.mask)

    @cached_property
    def share(self) -> float:
        return len(self.rows) / len(self.mask)

    @cached_property
    def bitmap(self) -> Any:
        return faiss.IDSelectorBitmap(np.packbits(self.mask, bitorder="little"))

    @cached_property
    def one_by_one(self) -> Any:
        """Parameters with which the exact index looks at these rows alone: an array of rows is what it does not scan past."""
        return faiss.SearchParameters(sel=faiss.IDSelectorArray(self.rows))


class Vectors:
    """Vectors (rows, dimensions) in an exact index, and perhaps in a faster one."""

    def __init__(self, config: FaissIndex, exact: Any, faster: Any | None) -> None:
        self._config, self._exact, self._faster = config, exact, faster
        self._metric: Metric = "l2" if exact.metric_type == faiss.METRIC_L2 else "cosine"
        self._estimates = isinstance(faster, faiss.IndexIVFPQ)
        match config:
            case _ if faster is None:
                pass
            case HnswIndex():
                faster.hnsw.efSearch = config.search_breadth
            case IvfPqIndex():
                faster.nprobe = config.probes

    @classmethod
    def build(
        cls, config: FaissIndex, metric: Metric, dimensions: int, count: int, batches: Iterable[NDArray[np.float32]]
    ) -> Self:
        """Of batches (N, dimensions) with ``count`` vectors in all; below :func:`worthwhile` the exact index serves alone."""
        measure = faiss.METRIC_INNER_PRODUCT if metric == "cosine" else faiss.METRIC_L2
        if isinstance(config, HnswIndex) and count >= worthwhile(config):
            graph = faiss.IndexHNSWFlat(dimensions, config.neighbours, measure)
            graph.hnsw.efConstruction = config.build_breadth
            vectors = cls(config, faiss.downcast_index(graph.storage), graph)
        else:
            vectors = cls(config, faiss.IndexFlat(dimensions, measure), None)
        for batch in batches:
            vectors.add(batch)
        if isinstance(config, IvfPqIndex) and count >= worthwhile(config):
            cells = faiss.IndexFlat(dimensions, measure)
            compressed = faiss.IndexIVFPQ(cells, dimensions, config.cells, config.codes, CODE_BITS, measure)
            every = faiss.rev_swig_ptr(vectors._exact.get_xb(), count * dimensions).reshape(count, dimensions)
            compressed.train(every)
            compressed.add(every)
            vectors = cls(config, vectors._exact, compressed)
        return vectors

    @classmethod
    def read(cls, config: FaissIndex, exact: Path, faster: Path | None, mapped: bool) -> Self:
        """From the files; mapped, or in memory so that more can be added."""
        flags = faiss.IO_FLAG_MMAP_IFC if mapped else 0
        found = faiss.read_index(str(exact), flags)
        index = faiss.read_index(str(faster), flags) if faster else None
        if isinstance(index, faiss.IndexHNSW):
            index.storage, index.own_fields = found, False
        return cls(config, found, index)

    def write(self, exact: Path, faster: Path) -> None:
        """To files; ``faster`` is written where there is such an index.

        Raises:
            OSError: they cannot be written.
        """
        try:
            faiss.write_index(self._exact, str(exact))
            if self._faster is not None:
                faiss.write_index(self._faster, str(faster), faiss.IO_FLAG_SKIP_STORAGE if self._is_graph else 0)
        except RuntimeError as error:  # FAISS knows no other
            raise OSError(errno.ENOSPC if "No space" in str(error) else errno.EIO, "cannot be written") from None

    def add(self, batch: NDArray[np.float32]) -> None:
        """Rows after the last one, (N, dimensions)."""
        if not self._is_graph:
            self._exact.add(batch)
        if self._faster is not None:
            self._faster.add(batch)

    def __len__(self) -> int:
        return int(self._exact.ntotal)

    @property
    def is_exact(self) -> bool:
        return self._faster is None

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors (N, dimensions) of these rows."""
        found: NDArray[np.float32] = self._exact.reconstruct_batch(np.asarray(rows, np.int64))
        return found

    def nearest(self, query: NDArray[np.float32], k: int, admitted: Admitted | None) -> tuple[list[float], list[int]]:
        """Distances to a query (dimensions,), and rows: the nearest k or, where fewer are admitted, all of those; in order."""
        most = min(k, len(self) if admitted is None else len(admitted.rows))
        if most == 0:
            return [], []
        scores, rows = self._search(query[None], most, admitted)
        if self._estimates:
            far = self.distances(query, rows)
            order = np.argsort(far, kind="stable")
            return far[order].tolist(), rows[order].tolist()
        if self._metric == "l2":
            return [math.sqrt(score) for score in scores.tolist()], rows.tolist()
        return [min(max(1 - score, 0.0), 2.0) for score in scores.tolist()], rows.tolist()

    def distances(self, query: NDArray[np.float32], rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float64]:
        """(N,) of these rows, the same for the same vectors; see :func:`cv_factory_ops.features.checks.distances`."""
        return distances(query, self.take(rows), self._metric)

    def _search(
        self, queries: NDArray[np.float32], k: int, admitted: Admitted | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        if self._faster is not None and (admitted is None or self._pays(admitted)):
            scores, rows = self._faster.search(queries, k, params=None if admitted is None else self._parameters(admitted))
            if rows[0, -1] >= 0:  # else the graph, or the cells that were looked into, ended before
                return scores[0], rows[0]
        scores, rows = self._exact.search(queries, k, params=None if admitted is None else admitted.one_by_one)
        return scores[0], rows[0]

    def _pays(self, admitted: Admitted) -> bool:
        return len(admitted.rows) > FEW and admitted.share > EXACT_SHARE

    def _parameters(self, admitted: Admitted) -> Any:
        """The fewer are admitted, the more broadly they are searched for."""
        match self._config:
            case HnswIndex():
                return faiss.SearchParametersHNSW(
                    efSearch=int(self._config.search_breadth / admitted.share), sel=admitted.bitmap
                )
            case IvfPqIndex():
                probes = min(self._config.cells, int(self._config.probes / admitted.share))
                return faiss.SearchParametersIVF(nprobe=probes, sel=admitted.bitmap)
            case FlatIndex():
                raise AssertionError("a flat index has no faster one")
            case _:
                assert_never(self._config)

    @property
    def _is_graph(self) -> bool:
        return isinstance(self._faster, faiss.IndexHNSW)


def worthwhile(config: FaissIndex) -> int:
    """Vectors from which on more than the exact index is built: enough to train it, or for a graph to be faster."""
    match config:
        case FlatIndex():
            return sys.maxsize
        case HnswIndex():
            return GRAPH_ROWS
        case IvfPqIndex():
            return TRAINING_POINTS * max(config.cells, CENTROIDS)
        case _:
            assert_never(config)
