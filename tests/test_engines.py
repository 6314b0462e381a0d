"""What is particular to one store or another: logins, servers that do not answer, limits."""

from __future__ import annotations

import fcntl
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cv_factory_ops.config.retrieval import (
    ChromaStore,
    FaissStore,
    MilvusStore,
    PineconeStore,
    VectorStoreConfig,
    WeaviateStore,
)
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable
from cv_factory_ops.features.chroma_store import ChromaVectors
from cv_factory_ops.features.faiss_index import Vectors
from cv_factory_ops.features.fields import fields, metadata_of, plain
from cv_factory_ops.features.stores import Item, open_store
from tests.pinecone_server import KEY, PineconeServer
from tests.vector_stores import DIMENSIONS, STORES, noise

VARIABLE = "STORE_KEY"
NOBODY = "http://127.0.0.1:9"  # the discard port


@given(st.dictionaries(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")) | st.integers(-99, 99)))
def test_names_and_words_are_letters_that_tell_them_apart(metadata: dict[str, str | float]) -> None:
    kept = fields(metadata)
    assert metadata_of(kept) == metadata
    for text in [*kept, *(value for value in kept.values() if isinstance(value, str))]:
        assert text
        assert text.isascii()
        assert text.replace("_", "a").isalnum()


def test_a_name_can_be_read_in_the_stores_own_tools() -> None:
    assert fields({"patient age": 61, "view": "PA", "ai_score": 0.5}) == {
        "n_patient_20age": 61,
        "w_view": "PA",
        "n_ai__score": 0.5,
    }


@pytest.mark.parametrize(
    "config",
    [
        ChromaStore(url=NOBODY),
        MilvusStore(url=NOBODY),
        PineconeStore(url=NOBODY),
        WeaviateStore(url=NOBODY),
    ],
    ids=lambda config: config.kind,
)
def test_a_server_that_does_not_answer_may_do_so_later(
    config: VectorStoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    with pytest.raises(Unavailable, match=NOBODY):
        open_store(config, tmp_path, "name", DIMENSIONS)


@pytest.mark.parametrize(
    "config",
    [
        ChromaStore(url=NOBODY, token_env=VARIABLE),
        MilvusStore(url=NOBODY, token_env=VARIABLE),
        PineconeStore(url=NOBODY, api_key_env=VARIABLE),
        WeaviateStore(url=NOBODY, api_key_env=VARIABLE),
    ],
    ids=lambda config: config.kind,
)
def test_a_missing_login_is_named(config: VectorStoreConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=VARIABLE):
        open_store(config, tmp_path, "name", DIMENSIONS)


@pytest.mark.parametrize(("name", "variable"), [("pinecone", "PINECONE_API_KEY"), ("weaviate", "WEAVIATE_KEY")])
def test_a_login_that_is_refused_is_a_matter_of_configuration(
    name: str, variable: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = STORES[name](request, "cosine")
    monkeypatch.setenv(variable, "an old key")
    with pytest.raises(ConfigError, match="api_key_env") as refused:
        open_store(config, tmp_path, "name", DIMENSIONS)
    assert "an old key" not in str(refused.value)


@pytest.mark.parametrize("name", ["milvus-lite", "pinecone"])
def test_an_item_that_is_too_large_is_refused_with_all_others(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with open_store(STORES[name](request, "cosine"), tmp_path, "large", DIMENSIONS) as store:
        with pytest.raises(DataError, match="bytes"):
            store.add([Item("small"), Item("large", {}, "word " * 15_000)], noise(2))
        assert store.count() == 0


def test_pinecone_is_waited_for_until_it_finds_what_was_written(
    pinecone_servers: dict[str, PineconeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = pinecone_servers["l2"]
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    with open_store(PineconeStore(url=server.url, metric="l2"), tmp_path, "late", DIMENSIONS) as store:
        store.add([Item("a")], noise(1))
        server.behind = 3
        store.persist()
        assert server.behind == 0
        server.behind = 1
        store.persist()  # nothing was written since
        assert server.behind == 1
        server.behind = 0
    with open_store(PineconeStore(url=server.url, metric="l2"), tmp_path, "late", DIMENSIONS) as store:
        assert store.count() == 1


@pytest.mark.parametrize("behind", [4, 7, 9, 11])
def test_pinecone_that_shows_old_data_for_a_while_has_what_was_written(
    pinecone_servers: dict[str, PineconeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, behind: int
) -> None:
    server, config = pinecone_servers["l2"], PineconeStore(url=pinecone_servers["l2"].url, metric="l2")
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setattr("cv_factory_ops.features.pinecone_store.PAUSE", 0.01)
    changed = Item("b", {"label": "changed"})
    with open_store(config, tmp_path, f"old {behind}", DIMENSIONS) as store:
        store.add([Item("a"), Item("b"), Item("c")], noise(3))
        store.persist()
        server.behind = behind
        assert store.delete(["a", "b"]) == 2
        store.add([Item("a", {"label": "new"})], noise(1, seed=1))
        store.add([changed], noise(1, seed=2))
        store.delete(["a"])
        assert store.get(["a", "b", "c"]) == [None, changed, Item("c")]
        assert store.count() == 2
        store.persist()
        assert server.behind == 0
    with open_store(config, tmp_path, f"old {behind}", DIMENSIONS) as store:
        assert store.count() == 2
        assert store.get(["a", "b", "c"]) == [None, changed, Item("c")]
        assert [match.item for match in store.search(noise(1, seed=2)[0], 1)] == [changed]


@pytest.mark.parametrize("config", [ChromaStore(), MilvusStore()], ids=lambda config: config.kind)
def test_a_folder_that_cannot_be_written_is_read_from_a_copy(
    config: VectorStoreConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scratch = tmp_path / "store", tmp_path / "scratch"
    scratch.mkdir()
    with open_store(config, folder, "name", DIMENSIONS) as store:
        store.add([Item("a", {"view": "PA"}), Item("b")], noise(2))
        store.persist()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    with read_only(folder, monkeypatch):
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        stores = [open_store(config, folder, "name", DIMENSIONS) for _ in range(2)]  # replicas share a volume
        for store in stores:
            assert [match.item.id for match in store.search(noise(1)[0], 2)] == ["a", "b"]
            for change in (
                lambda: store.add([Item("c")], noise(1)),  # noqa: B023
                lambda: store.update([Item("a")], noise(1)),  # noqa: B023
                lambda: store.delete(["a"]),  # noqa: B023
            ):
                with pytest.raises(DataError, match="read-only") as refused:
                    change()
                assert str(folder) in str(refused.value)
        assert len(list(scratch.iterdir())) == 2
        for store in stores:
            store.close()
        assert list(scratch.iterdir()) == []
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@contextmanager
def read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As a container's volume is: mounted read-only where the test may mount, else seen so by ``os.access``."""
    if subprocess.run(["mount", "--bind", folder, folder], capture_output=True, check=False).returncode:
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: folder not in Path(path, "x").parents and access(path, mode))
        yield
        return
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_chroma_folder_that_is_damaged_is_named(tmp_path: Path) -> None:
    (tmp_path / "chroma.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(CvFactoryError, match=str(tmp_path)):
        open_store(ChromaStore(), tmp_path, "name", DIMENSIONS)


def test_what_could_not_be_opened_holds_nothing(tmp_path: Path) -> None:
    with open_store(MilvusStore(), tmp_path, "name", DIMENSIONS) as store:
        store.add([Item("a")], noise(1))
    with pytest.raises(DataError):
        open_store(MilvusStore(), tmp_path, "name", DIMENSIONS + 1)
    with (tmp_path / "milvus.db" / "LOCK").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_pinecone_that_stays_behind_is_unavailable(
    pinecone_servers: dict[str, PineconeServer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = pinecone_servers["l2"]
    monkeypatch.setenv("PINECONE_API_KEY", KEY)
    monkeypatch.setattr("cv_factory_ops.features.pinecone_store.PATIENCE", 0.0)
    with open_store(PineconeStore(url=server.url, metric="l2"), tmp_path, "never", DIMENSIONS) as store:
        store.add([Item("a")], noise(1))
        server.behind = 100
        with pytest.raises(Unavailable, match="not found"):
            store.persist()
        server.behind = 0


def test_a_store_in_a_folder_is_not_shared_with_another_name(place_of_folder: Callable[[VectorStoreConfig, str], int]) -> None:
    for config in (ChromaStore(), MilvusStore()):
        assert place_of_folder(config, "one") == 1
        assert place_of_folder(config, "two") == 1


@pytest.fixture
def place_of_folder(tmp_path: Path) -> Callable[[VectorStoreConfig, str], int]:
    """Adds an item under a name in a folder of its kind; returns how many there are then."""

    def add(config: VectorStoreConfig, name: str) -> int:
        with open_store(config, tmp_path / config.kind, name, DIMENSIONS) as store:
            store.add([Item("a")], noise(1))
            return store.count()

    return add


def test_of_ever_so_many_equally_near_ones_no_more_are_asked_for_than_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    nearest, exact = ChromaVectors.nearest, Vectors.nearest
    monkeypatch.setattr(ChromaVectors, "nearest", lambda store, query, k, _: asked.append(k) or nearest(store, query, k, _))
    monkeypatch.setattr(Vectors, "nearest", lambda store, query, k, _: asked.append(k) or exact(store, query, k, _))
    for module in ("engine", "faiss_store"):
        monkeypatch.setattr(f"cv_factory_ops.features.{module}.TIED", 10)
    for config in (ChromaStore(), FaissStore()):
        with open_store(config, tmp_path / config.kind, "tied", DIMENSIONS) as store:
            store.add([Item(str(number)) for number in range(40)], np.tile(noise(1), (40, 1)))
            assert len(store.search(noise(1)[0], 3)) == 3
            assert len(store.search(noise(1)[0], 20)) == 20
    assert asked == [4, 8, 10, 21] * 2


def test_names_that_look_alike_are_told_apart() -> None:
    assert len({plain(name) for name in ("a b", "a_b", "a__b", "a_20b", "A b", "ä", "")}) == 7
