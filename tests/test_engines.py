"""What is particular to one store or another: logins, servers that do not answer, limits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cv_factory_ops.config import ChromaStore, MilvusStore, PineconeStore, VectorStoreConfig, WeaviateStore
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
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


def test_names_that_look_alike_are_told_apart() -> None:
    assert len({plain(name) for name in ("a b", "a_b", "a__b", "a_20b", "A b", "ä", "")}) == 7
