"""The FAISS store beside raw FAISS with the same index: recall, queries per second, memory, filters, and kills during persist.

    python -m benchmarks.vector_search [--vectors 1000000] [--index hnsw ivf_pq flat] [--queries 500] [--rounds 10]
        [--folder DIR] [--build-breadth 200]
    python -m benchmarks.vector_search --kills 200

Vectors are generated: ``--clusters`` normal clusters, compared by cosine. The index is built once, by the store; raw FAISS
reads the same index from one file into memory, as one would use it without a store. Both answer the same queries, one at a
time on one thread, in turn, a round each, in one process; seconds are the thread's processor time, and what counts is the
ratio within a round. Of an index that compresses, raw FAISS's candidates are re-scored by their full vectors as ours are. Ours
also checks and normalises the query and answers with ids, metadata and texts. Memory is what a
fresh process has resident after it has opened the index and answered all queries, less what it had before; ours is mapped
files for the most part, which the machine may take back. A hundredth of the vectors, and a third, carries a word that a
filter asks for. The files stay in ``--folder``, where a second run finds them again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import psutil
import pyarrow
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import FaissIndex, FaissStore, FlatIndex, HnswIndex, IvfPqIndex
from cv_factory_ops.features.faiss_store import FaissVectors
from cv_factory_ops.features.stores import Filter, Item

DIMENSIONS, K, BATCH, SEED = 128, 10, 50_000, 0
CANDIDATES = 100
"""That are asked of an index that compresses; the ten nearest of them by their full vectors are the answer."""
FILTERS: dict[str, tuple[Filter, int]] = {"1 %": ({"hundredth": "yes"}, 100), "33 %": ({"third": "yes"}, 3)}
"""Filters, and of how many rows each the first is admitted."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Data:
    """Generated vectors in a file, and queries that are not among them."""

    folder: Path
    vectors: int
    clusters: int
    queries: int

    def generated(self) -> NDArray[np.float32]:
        """(vectors, 128) of length 1, mapped."""
        path = self.folder / "vectors.f32"
        if not path.exists():
            draft = path.with_suffix(".draft")
            with draft.open("wb") as file:
                for start in range(0, self.vectors, BATCH):
                    self._drawn(min(BATCH, self.vectors - start), 1 + start).tofile(file)
            draft.rename(path)
        return np.memmap(path, np.float32, "r").reshape(-1, DIMENSIONS)

    def asked(self) -> NDArray[np.float32]:
        return self._drawn(self.queries, -1)

    def nearest(self, every: int = 1) -> Rows:
        """True nearest rows (queries, 10) among every so manieth vector."""
        admitted = np.ascontiguousarray(self.generated()[::every])
        _, rows = faiss.knn(self.asked(), admitted, K, metric=faiss.METRIC_INNER_PRODUCT)
        return np.asarray(rows * every)

    def _drawn(self, count: int, seed: int) -> NDArray[np.float32]:
        centres = np.random.default_rng(SEED).normal(size=(self.clusters, DIMENSIONS))
        rng = np.random.default_rng([SEED, abs(seed), seed < 0])
        drawn = centres[rng.integers(0, self.clusters, count)] + rng.normal(size=(count, DIMENSIONS))
        return np.asarray(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), np.float32)


@dataclass(frozen=True)
class Subject:
    """An index under test."""

    data: Data
    index: FaissIndex

    @property
    def store(self) -> Path:
        return self.data.folder / self.index.kind

    @property
    def raw(self) -> Path:
        return self.data.folder / f"{self.index.kind}.faiss"

    def opened(self) -> FaissVectors:
        return FaissVectors.open(FaissStore(index=self.index), self.store, DIMENSIONS)

    def read_raw(self) -> Any:
        index = faiss.read_index(str(self.raw))
        match self.index:
            case HnswIndex(search_breadth=breadth):
                index.hnsw.efSearch = breadth
            case IvfPqIndex(probes=probes):
                index.nprobe = probes
        return index

    def parameters(self, selector: Any) -> Any:
        """Of raw FAISS, to look only at some rows."""
        match self.index:
            case HnswIndex(search_breadth=breadth):
                return faiss.SearchParametersHNSW(efSearch=breadth, sel=selector)
            case IvfPqIndex(probes=probes):
                return faiss.SearchParametersIVF(nprobe=probes, sel=selector)
            case FlatIndex():
                return faiss.SearchParameters(sel=selector)


def build(subject: Subject) -> tuple[float, float]:
    """Minutes, and GiB resident at most."""
    started, vectors = time.perf_counter(), subject.data.generated()
    with subject.opened() as store:
        for start in range(0, len(vectors), BATCH):
            rows = range(start, min(start + BATCH, len(vectors)))
            store.add([known(row) for row in rows], vectors[rows.start : rows.stop])
        store.persist()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return (time.perf_counter() - started) / 60, int(peak.split()[1]) / 2**20


def known(row: int) -> Item:
    said = {"hundredth": "yes" if row % 100 == 0 else "no", "third": "yes" if row % 3 == 0 else "no", "age": row % 90}
    return Item(f"study-{row:07}", said)


def write_raw(subject: Subject) -> None:
    """The same index, as FAISS itself would write it."""
    generation = next(subject.store.glob("vectors-*")).name.removeprefix("vectors-")
    exact = faiss.read_index(str(subject.store / f"vectors-{generation}"))
    index = exact if subject.index.kind == "flat" else faiss.read_index(str(subject.store / f"index-{generation}"))
    if subject.index.kind == "hnsw":
        index.storage, index.own_fields = exact, False
    faiss.write_index(index, str(subject.raw))


def resident(subject: Subject, raw: bool) -> tuple[float, float]:
    """MiB that a process has resident for an index that it has opened and searched, and how many are not mapped files."""
    faiss.omp_set_num_threads(1)
    queries = subject.data.asked()
    before = psutil.Process().memory_info()
    opened = subject.read_raw() if raw else subject.opened()
    for query in queries:
        opened.search(query[None], K) if raw else opened.search(query, K)
    after = psutil.Process().memory_info()
    return (after.rss - before.rss) / 2**20, (after.rss - after.shared - before.rss + before.shared) / 2**20


def in_turn(rounds: int, queries: NDArray[np.float32], *searches: Callable[[NDArray[np.float32]], object]) -> list[list[float]]:
    """Of each search, queries per second in each round."""
    rates: list[list[float]] = [[] for _ in searches]
    for turn in range(rounds + 1):
        part = queries[turn % 2 :: 2]
        for search, its_rates in zip(searches, rates, strict=True):
            started = time.thread_time()
            for query in part:
                search(query)
            its_rates.append(len(part) / (time.thread_time() - started))
    return [its_rates[1:] for its_rates in rates]  # the first warms up


def raw_search(
    index: Any, query: NDArray[np.float32], asked: int, vectors: NDArray[np.float32], parameters: Any = None
) -> Rows:
    """The ten nearest by raw FAISS; of more candidates, by their full vectors."""
    rows = index.search(query[None], asked, params=parameters)[1][0]
    rows = rows[rows >= 0]
    return np.asarray(rows if asked == K else rows[np.argsort(-(vectors[rows] @ query))][:K])


def recall(found: Iterator[Sequence[int]], true: Rows) -> float:
    return statistics.mean(len(set(each) & set(rows.tolist())) / K for each, rows in zip(found, true, strict=True))


def ids(store: FaissVectors, query: NDArray[np.float32], k: int, where: Filter | None = None) -> list[int]:
    return [int(match.item.id[6:]) for match in store.search(query, k, where)][:K]


def measure(subject: Subject, rounds: int) -> None:
    """Print what one index does."""
    data, asked = subject.data, CANDIDATES if subject.index.kind == "ivf_pq" else K
    queries, true, vectors = data.asked(), data.nearest(), data.generated()
    index, store = subject.read_raw(), subject.opened()
    faiss.omp_set_num_threads(1)
    print(f"  recall@10, raw FAISS  {recall((raw_search(index, query, asked, vectors) for query in queries), true):.3f}")
    print(
        f"  recall@10, ours       {recall((ids(store, query, asked) for query in queries), true):.3f}  (of {asked} candidates)"
    )
    raw, ours = in_turn(
        rounds, queries, lambda query: raw_search(index, query, asked, vectors), lambda query: store.search(query, asked)
    )
    show("  queries/s", raw, ours)
    for name, (where, every) in FILTERS.items():
        true = data.nearest(every)
        admitted = np.arange(0, data.vectors, every)
        bitmap = np.packbits(np.arange(data.vectors) % every == 0, bitorder="little")
        raw_parameters = subject.parameters(faiss.IDSelectorBitmap(bitmap))
        raw_recall = recall((raw_search(index, query, asked, vectors, raw_parameters) for query in queries), true)
        print(f"  filter that admits {name} ({len(admitted)}): recall@10 raw FAISS {raw_recall:.3f}", end=", ")
        print(f"ours {recall((ids(store, query, asked, where) for query in queries), true):.3f}")
        raw, ours = in_turn(
            max(2, rounds // 3),
            queries[:100],
            lambda query: raw_search(index, query, asked, vectors, raw_parameters),  # noqa: B023
            lambda query: store.search(query, asked, where),  # noqa: B023
        )
        show("    queries/s", raw, ours)


def show(name: str, raw: list[float], ours: list[float]) -> None:
    ratios = [one / other for one, other in zip(ours, raw, strict=True)]
    print(
        f"{name}: raw {statistics.median(raw):.0f}, ours {statistics.median(ours):.0f}, ratio {statistics.median(ratios):.2f}",
        end=" ",
    )
    print(f"({min(ratios):.2f} .. {max(ratios):.2f}, {len(ratios)} rounds)")


def alone(task: Callable[..., Any], *arguments: object) -> Any:
    """What a task answers in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *arguments).result()


def kills(count: int, seed: int) -> None:
    from tests.test_faiss_store import kill_writers

    with tempfile.TemporaryDirectory() as folder:
        later = Counter(kill_writers(Path(folder), count, seed))
    print(f"{count} kills: found the last acknowledged state {later[0]} times, the next one {later[1]} times, both complete;")
    print(f"anything else {count - later[0] - later[1]} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--clusters", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--index", nargs="+", choices=["hnsw", "ivf_pq", "flat"], default=["hnsw", "ivf_pq", "flat"])
    parser.add_argument("--build-breadth", type=int, default=HnswIndex().build_breadth)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kills", type=int)
    options = parser.parse_args()
    versions = (
        f"faiss {faiss.__version__}, numpy {np.__version__}, pyarrow {pyarrow.__version__}, Python {platform.python_version()}"
    )
    print(f"{versions}; {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, seed {SEED}")
    if options.kills:
        return kills(options.kills, SEED)
    indexes = {"hnsw": HnswIndex(build_breadth=options.build_breadth), "ivf_pq": IvfPqIndex(), "flat": FlatIndex()}
    with tempfile.TemporaryDirectory() as temporary:
        data = Data(options.folder or Path(temporary), options.vectors, options.clusters, options.queries)
        data.folder.mkdir(parents=True, exist_ok=True)
        data.generated()
        for kind in options.index:
            run(Subject(data, indexes[kind]), options.rounds)


def run(subject: Subject, rounds: int) -> None:
    """Print all figures of an index."""
    print(f"{subject.index!r}: {subject.data.vectors} vectors of {DIMENSIONS}", flush=True)
    if not subject.raw.exists():
        minutes, peak = alone(build, subject)
        size = sum(path.stat().st_size for path in subject.store.iterdir()) / 2**20
        print(f"  built in {minutes:.1f} min, at most {peak:.2f} GiB resident; files {size:.0f} MiB", flush=True)
        alone(write_raw, subject)
    (raw, _), (ours, unmapped) = (alone(resident, subject, which) for which in (True, False))
    print(
        f"  resident: raw {raw:.0f} MiB, ours {ours:.0f} MiB, ratio {ours / raw:.2f}; not mapped {unmapped:.0f} MiB", flush=True
    )
    alone(measure, subject, rounds)


if __name__ == "__main__":
    main()
