"""What FAISS stores promise beyond the contract: recall of each index, files that are mapped, whole and never half-written."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import FaissStore, FlatIndex, HnswIndex, IvfPqIndex
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features import faiss_index, faiss_store
from cv_factory_ops.features.faiss_store import FaissVectors
from cv_factory_ops.features.stores import Between, Item
from tests.vector_stores import noise

DIMENSIONS, ROWS = 32, 10_500
INDEXES = {
    "flat": FlatIndex(),
    "hnsw": HnswIndex(neighbours=16, build_breadth=64),
    "ivf_pq": IvfPqIndex(cells=32, codes=8, probes=16),
}
ASKED = {"flat": 10, "hnsw": 10, "ivf_pq": 100}
"""Candidates among which the ten nearest are sought: of an index that compresses, more."""
KINDS = pytest.mark.parametrize("kind", INDEXES)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(threads)


def clustered(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Vectors (count, 32) around 100 centres, the same ones for every seed."""
    centres = np.random.default_rng(100).normal(size=(100, DIMENSIONS))
    rng = np.random.default_rng(seed)
    return (centres[rng.integers(0, 100, count)] + 0.6 * rng.normal(size=(count, DIMENSIONS))).astype(np.float32)


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


CORNER = np.sort(np.argsort(clustered(ROWS)[:, 0])[: ROWS // 5])
"""Rows that lie on one side, so that what is nearest to most queries is not among them."""
CORNERED = frozenset(CORNER.tolist())


def known(row: int) -> Item:
    corner = "yes" if row in CORNERED else "no"
    return Item(str(row), {"hundredth": "yes" if row % 100 == 0 else "no", "half": str(row % 2), "corner": corner})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the same vectors under each kind of index."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in INDEXES}
    for kind, folder in folders.items():
        with opened(kind, folder) as store:
            store.add([known(row) for row in range(ROWS)], clustered(ROWS))
            store.persist()
    return folders


@pytest.fixture
def folder_of(built: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy, for a test that changes it."""
    return lambda kind: Path(shutil.copytree(built[kind], tmp_path / kind))


def opened(kind: str, folder: Path, dimensions: int = DIMENSIONS) -> FaissVectors:
    return FaissVectors.open(FaissStore(index=INDEXES[kind]), folder, dimensions)


def nearest(query: NDArray[np.float32], vectors: NDArray[np.float32], rows: NDArray[np.int64], k: int = 10) -> set[str]:
    similar = unit(vectors)[rows] @ query
    return {str(row) for row in rows[np.argsort(-similar)[:k]]}


def recall(
    store: FaissVectors,
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    where: dict[str, str | Between] | None = None,
    asked: int = 10,
) -> float:
    """Of the true ten nearest among these rows, the share within as many as are asked for; over 50 queries."""
    shares = []
    for query in unit(clustered(50, seed=7)):
        found = {match.item.id for match in store.search(query, asked, where)}
        shares.append(len(found & nearest(query, vectors, rows)) / 10)
    return float(np.mean(shares))


@KINDS
def test_the_nearest_are_found(built: dict[str, Path], kind: str) -> None:
    with opened(kind, built[kind]) as store:
        found = recall(store, clustered(ROWS), np.arange(ROWS))
        assert (built[kind] / "index-1").exists() == (kind != "flat")
        if kind == "ivf_pq":
            assert recall(store, clustered(ROWS), np.arange(ROWS), asked=ASKED[kind]) > 0.95
        else:
            assert found == 1 if kind == "flat" else found > 0.97


@KINDS
def test_a_filter_that_admits_a_hundredth_loses_nothing(built: dict[str, Path], kind: str) -> None:
    with opened(kind, built[kind]) as store:
        assert recall(store, clustered(ROWS), np.arange(0, ROWS, 100), {"hundredth": "yes"}) == 1


@KINDS
@pytest.mark.parametrize(("name", "word", "rows"), [("half", "1", np.arange(1, ROWS, 2)), ("corner", "yes", CORNER)])
def test_a_filter_that_admits_many_is_searched_by_the_index(
    built: dict[str, Path], kind: str, name: str, word: str, rows: NDArray[np.int64], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faiss_index, "FEW", 100)
    with opened(kind, built[kind]) as store:
        assert recall(store, clustered(ROWS), rows, {name: word}, asked=ASKED[kind]) > 0.95
        assert {int(match.item.id) for match in store.search(clustered(1)[0], 30, {name: word})} <= set(rows.tolist())
        assert len(store.search(clustered(1)[0], len(rows) + 1, {name: word})) == len(rows)


@KINDS
def test_changes_beside_a_built_index_are_found(folder_of: Callable[[str], Path], kind: str) -> None:
    folder, vectors = folder_of(kind), clustered(ROWS)
    base = {path.name: path.stat().st_ino for path in folder.iterdir() if path.name != "store.json"}
    with opened(kind, folder) as store:
        vectors[:200] = clustered(200, seed=3)
        store.update([Item(str(row), {"new": "yes"}) for row in range(200)], vectors[:200])
        assert store.delete([str(row) for row in range(5000, 6000)]) == 1000
        store.add([Item(str(ROWS))], clustered(1, seed=4))
        store.persist()
    assert base.items() <= {path.name: path.stat().st_ino for path in folder.iterdir()}.items()
    rows, vectors = np.delete(np.arange(ROWS + 1), np.s_[5000:6000]), np.concatenate([vectors, clustered(1, seed=4)])
    with opened(kind, folder) as store:
        assert store.count() == ROWS + 1 - 1000
        assert recall(store, vectors, rows, asked=ASKED[kind]) > 0.95
        assert recall(store, vectors, np.arange(200), {"new": "yes"}) == 1
        assert store.get(["5500", "7"]) == [None, Item("7", {"new": "yes"})]
        np.testing.assert_allclose(store.vectors(["7", "900", str(ROWS)]), unit(vectors[[7, 900, ROWS]]), rtol=1e-5)
        assert store.search(vectors[5500], 1)[0].item.id != "5500"


@KINDS
def test_a_grown_tail_joins_the_index(folder_of: Callable[[str], Path], kind: str) -> None:
    folder, more = folder_of(kind), faiss_store.TAIL + 1
    with opened(kind, folder) as store:
        store.delete(["5"])
        store.add([Item(f"new {row}", {"new": "yes"}) for row in range(more)], clustered(more, seed=5))
        store.persist()
    assert not list(folder.glob("tail_*"))
    assert faiss.read_index(str(folder / "vectors-2")).ntotal == ROWS + more
    with opened(kind, folder) as store:
        assert store.count() == ROWS + more - 1
        found = [store.search(vector, ASKED[kind])[0].item.id for vector in clustered(more, seed=5)[:50]]
        assert found == [f"new {row}" for row in range(50)]
        assert len(store.search(clustered(1)[0], more, {"new": "yes"})) == more
        assert store.get(["5"]) == [None]


@KINDS
def test_what_is_deleted_leaves_the_files_when_it_is_much(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    with opened(kind, folder) as store:
        store.delete([str(row) for row in range(3000)])
        store.persist()
        rows = np.arange(3000, ROWS)
        assert recall(store, clustered(ROWS), rows, asked=ASKED[kind]) > 0.95
    assert faiss.read_index(str(folder / "vectors-2")).ntotal == ROWS - 3000
    with opened(kind, folder) as store:
        store.delete([str(row) for row in range(ROWS)])
        store.persist()
        assert store.search(clustered(1)[0], 5) == []
    assert {path.name for path in folder.iterdir()} == {"store.json"}


def test_changes_in_any_order_end_like_a_dictionary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss_store, "TAIL", 20)
    monkeypatch.setattr(faiss_index, "GRAPH_ROWS", 60)
    rng, there = random.Random(0), dict[str, tuple[Item, NDArray[np.float32]]]()
    store = opened("hnsw", tmp_path)
    for step in range(300):
        vectors = unit(noise(rng.randint(1, 15), DIMENSIONS, seed=step))
        match rng.choice(["add", "add", "update", "delete", "persist", "open"]):
            case "add":
                items = [
                    Item(f"{step} {row}", {"age": row, "sex": rng.choice("FM")} if row % 3 else {})
                    for row in range(len(vectors))
                ]
                store.add(items, vectors)
                there |= {item.id: (item, vector) for item, vector in zip(items, vectors, strict=True)}
            case "update":
                ids = rng.sample(sorted(there), min(len(there), len(vectors)))
                items = [Item(id, {"age": step}, f"text {step}") for id in ids]
                store.update(items, vectors[: len(ids)])
                there |= {item.id: (item, vector) for item, vector in zip(items, vectors, strict=False)}
            case "delete":
                ids = rng.sample(sorted(there), min(len(there), len(vectors)))
                assert store.delete(ids) == len(ids)
                there = {id: kept for id, kept in there.items() if id not in ids}
            case "persist":
                store.persist()
            case "open":
                store.persist()
                store.close()
                store = opened("hnsw", tmp_path)
        assert store.count() == len(there)
    assert store.get(sorted(there)) == [there[id][0] for id in sorted(there)]
    assert sorted(store.items(), key=lambda item: item.id) == [there[id][0] for id in sorted(there)]
    np.testing.assert_allclose(store.vectors(sorted(there)), [there[id][1] for id in sorted(there)], rtol=1e-6)
    women = {id for id, (item, _) in there.items() if item.metadata.get("sex") == "F"}
    assert {match.item.id for match in store.search(unit(noise(1, DIMENSIONS))[0], len(there), {"sex": "F"})} == women
    assert {match.item.id for match in store.search(unit(noise(1, DIMENSIONS))[0], len(there))} == set(there)
    store.close()


def test_below_the_vectors_that_training_needs_all_are_compared(tmp_path: Path) -> None:
    with opened("ivf_pq", tmp_path) as store:
        store.add([known(row) for row in range(3000)], clustered(3000))
        store.persist()
        assert not (tmp_path / "index-1").exists()
        assert recall(store, clustered(3000), np.arange(3000)) == 1
        store.add([known(row) for row in range(3000, ROWS)], clustered(ROWS)[3000:])
        store.persist()
    assert isinstance(faiss.read_index(str(tmp_path / "index-2")), faiss.IndexIVFPQ)


@KINDS
def test_files_are_mapped_not_read(built: dict[str, Path], kind: str) -> None:
    with opened(kind, built[kind]) as store:
        store.search(clustered(1)[0], 5)
        maps = Path("/proc/self/maps").read_text()
        for role in ("vectors", "items") if kind == "flat" else ("vectors", "items", "index"):
            assert str(built[kind] / f"{role}-1") in maps


@KINDS
def test_a_reader_keeps_what_it_has_opened(folder_of: Callable[[str], Path], kind: str) -> None:
    folder = folder_of(kind)
    with opened(kind, folder) as reader:
        with opened(kind, folder) as writer:
            writer.delete([str(row) for row in range(0, ROWS, 2)])
            writer.persist()
        assert not (folder / "vectors-1").exists()
        assert reader.count() == ROWS
        assert recall(reader, clustered(ROWS), np.arange(ROWS), asked=ASKED[kind]) > 0.95
        assert reader.get(["0"]) == [known(0)]


@pytest.mark.parametrize("role", ["vectors", "items", "index", "alive", "tail_vectors", "tail_items"])
@pytest.mark.parametrize("damage", ["a bit", "shorter", "missing"])
def test_damaged_files_are_refused(folder_of: Callable[[str], Path], role: str, damage: str) -> None:
    folder = folder_of("ivf_pq")
    with opened("ivf_pq", folder) as store:
        store.update([Item("1")], clustered(1))
        store.persist()
    [path] = folder.glob(f"{role}-*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "a bit":
            path.write_bytes(content)
        case "shorter":
            path.write_bytes(content[:-1])
        case "missing":
            path.unlink()
    with pytest.raises(DataError, match=f"damaged.*{path.name}") as refused:
        opened("ivf_pq", folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 100, b'{"format": 2}'])
def test_a_damaged_pointer_is_refused(folder_of: Callable[[str], Path], content: bytes) -> None:
    folder = folder_of("flat")
    (folder / "store.json").write_bytes(content)
    with pytest.raises(DataError, match=r"store\.json: damaged"):
        opened("flat", folder)


def test_an_index_that_was_built_in_another_way_is_refused(built: dict[str, Path]) -> None:
    for index in (FlatIndex(), HnswIndex(neighbours=32, build_breadth=64)):
        with pytest.raises(DataError, match="build it anew"):
            FaissVectors.open(FaissStore(index=index), built["hnsw"], DIMENSIONS)
    FaissVectors.open(
        FaissStore(index=HnswIndex(neighbours=16, build_breadth=64, search_breadth=300)), built["hnsw"], DIMENSIONS
    ).close()


def test_codes_must_divide_the_dimensions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"index\.codes: 8 given; allowed: divisors of the 36 dimensions"):
        opened("ivf_pq", tmp_path, dimensions=36)


def test_one_writes_at_a_time(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("flat")
    with opened("flat", folder) as first, opened("flat", folder) as second:
        first.delete(["1"])
        with pytest.raises(Unavailable, match="another process writes"):
            second.delete(["2"])
        first.persist()
        assert second.count() == ROWS
        first.close()
        with pytest.raises(Unavailable, match="was changed since"):
            second.delete(["2"])
    with opened("flat", folder) as third:
        assert third.delete(["1", "2"]) == 1


def test_what_is_persisted_cleans_up_but_leaves_what_is_not_its_own(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("flat")
    for name in ("vectors-9", "tail_items-2", ".store.json.abc", "README", "vectors-old"):
        (folder / name).write_text("left")
    with opened("flat", folder) as store:
        store.delete(["1"])
        store.persist()
    names = {"store.json", "vectors-1", "items-1", "alive-2", "README", "vectors-old"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_full_disk_loses_nothing(small_disk: Callable[[str], Path]) -> None:
    folder = small_disk("2m") / "store"
    with opened("hnsw", folder) as store:
        store.add([known(row) for row in range(1000)], clustered(1000))
        store.persist()
        store.add([known(row) for row in range(1000, 12_000)], clustered(11_000, seed=2))
        with pytest.raises(Unavailable, match="no space left"):
            store.persist()
        assert store.count() == 12_000
        with opened("hnsw", folder) as reader:
            assert reader.count() == 1000
        store.delete([str(row) for row in range(1500, 12_000)])
        store.persist()
    with opened("hnsw", folder) as store:
        assert store.count() == 1500


WRITER = """
import os, sys
from pathlib import Path
from cv_factory_ops.config.retrieval import FaissStore, HnswIndex
from cv_factory_ops.features import faiss_index, faiss_store
from tests.test_faiss_store import step_of, write_step

faiss_store.TAIL, faiss_index.GRAPH_ROWS = 100, 150
for folder in sys.stdin:
    child = os.fork()  # so that the imports are paid once
    if not child:
        with faiss_store.FaissVectors.open(FaissStore(index=HnswIndex()), Path(folder.strip()), 8) as store:
            step = step_of(store)
            while True:
                step += 1
                write_step(store, step)
                store.persist()
                os.write(1, f"persisted {step}\\n".encode())
    os.write(1, f"started {child}\\n".encode())
    os.waitpid(child, 0)
    os.write(1, b"ended\\n")
"""
ITEMS_A_STEP, STEPS_KEPT = 40, 6


def step_of(store: FaissVectors) -> int:
    """The last one that was written."""
    [item] = store.get(["step"])
    return int(item.text) if item else 0


def write_step(store: FaissVectors, step: int) -> None:
    """Add some items, forget older ones, replace the item that says which step this was."""
    store.add([Item(f"{step} {row}", {"step": step}) for row in range(ITEMS_A_STEP)], noise(ITEMS_A_STEP, 8, seed=step))
    store.delete([f"{step - STEPS_KEPT} {row}" for row in range(ITEMS_A_STEP)])
    (store.update if step > 1 else store.add)([Item("step", {}, str(step))], noise(1, 8))


def require_step(store: FaissVectors, step: int) -> None:
    """Everything of this step is there, and nothing else."""
    steps = range(max(1, step - STEPS_KEPT + 1), step + 1)
    assert store.count() == ITEMS_A_STEP * len(steps) + (step > 0)
    for each in steps:
        vectors = noise(ITEMS_A_STEP, 8, seed=each)
        ids = [f"{each} {row}" for row in range(ITEMS_A_STEP)]
        assert store.get(ids) == [Item(id, {"step": each}) for id in ids]
        np.testing.assert_allclose(store.vectors(ids), unit(vectors), rtol=1e-6)
        assert store.search(vectors[0], 1, {"step": each})[0].item.id == f"{each} 0"


def kill_writers(folder: Path, kills: int, seed: int) -> list[int]:
    """Kill a process that persists again and again, at random moments; after each kill, how many steps more than the last
    acknowledged one were found: none or one, complete."""
    rng, acknowledged, later = random.Random(seed), 0, []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WRITER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdin
        assert process.stdout
        for _ in range(kills):
            print(folder, file=process.stdin, flush=True)
            lines, wanted = list[str](), rng.randint(1, 2)
            while sum(line.startswith("persisted") for line in lines) < wanted or not any(
                line.startswith("started") for line in lines
            ):
                lines.append(process.stdout.readline())
            time.sleep(rng.uniform(0, 0.06))
            os.kill(int(next(line for line in lines if line.startswith("started")).split()[1]), signal.SIGKILL)
            lines += iter(process.stdout.readline, "ended\n")
            acknowledged = max(int(line.split()[1]) for line in lines if line.startswith("persisted"))
            with FaissVectors.open(FaissStore(index=HnswIndex()), folder, 8) as store:
                found = step_of(store)
                require_step(store, found)
            later.append(found - acknowledged)
        process.stdin.close()
    return later


def test_what_was_acknowledged_survives_kills_at_any_moment(tmp_path: Path) -> None:
    assert set(kill_writers(tmp_path, 20, seed=0)) <= {0, 1}
