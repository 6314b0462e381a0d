"""The contract of vector stores, held against each of them; the reference is numpy, vector by vector."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cv_factory_ops.errors import DataError
from cv_factory_ops.features.checks import Metric
from cv_factory_ops.features.stores import Between, Filter, Item, Match, Value, VectorStore
from tests.vector_stores import DIMENSIONS, STORES, Place, noise

PlaceOf = Callable[[Metric], Place]

REOPEN = """
import json, sys
from pathlib import Path
from pydantic import TypeAdapter
from cv_factory_ops.config.retrieval import VectorStoreConfig
from cv_factory_ops.features.stores import open_store

config, folder, name, dimensions, ids, query = json.load(sys.stdin)
import numpy as np
with open_store(TypeAdapter(VectorStoreConfig).validate_python(config), Path(folder), name, dimensions) as store:
    items = [item and [item.id, dict(item.metadata), item.text] for item in store.get(ids)]
    matches = [[match.item.id, match.distance] for match in store.search(np.array(query, np.float32), 3)]
    print(json.dumps([store.count(), items, matches]))
"""


@pytest.fixture(params=STORES)
def place_of(request: pytest.FixtureRequest, tmp_path: Path) -> PlaceOf:
    """An empty place for the store that the test is about, by its metric."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    return lambda metric: Place(STORES[request.param](request, metric), tmp_path / "store", name)


@pytest.fixture
def place(place_of: PlaceOf) -> Place:
    return place_of("cosine")


@pytest.fixture
def store(place: Place) -> Iterator[VectorStore]:
    """An empty store that compares by cosine."""
    with place.open() as opened:
        yield opened


def items(count: int) -> list[Item]:
    """Each third an opacity; ages 0, 1, 2 ...; each fifth says nothing of its view."""
    views = ["AP", "PA", "lateral"]
    return [
        Item(
            f"item {row:03}",
            {"label": "opacity" if row % 3 == 0 else "normal", "age": row} | ({"view": views[row % 3]} if row % 5 else {}),
            f"report {row}",
        )
        for row in range(count)
    ]


def distances(query: NDArray[np.float32], vectors: NDArray[np.float32], metric: Metric) -> NDArray[np.float64]:
    if metric == "l2":
        return np.array([np.linalg.norm(query.astype(float) - vector) for vector in vectors])
    return np.array([1 - query.astype(float) @ vector / np.linalg.norm(query) / np.linalg.norm(vector) for vector in vectors])


def ids(matches: list[Match]) -> list[str]:
    return [match.item.id for match in matches]


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_nearest_come_first_with_the_distances_that_numpy_calculates(place_of: PlaceOf, metric: Metric) -> None:
    vectors, query = noise(60) * 3, noise(1, seed=1)[0]
    with place_of(metric).open() as store:
        store.add(items(60), vectors)
        found = store.search(query, 7)
    expected = distances(query, vectors, metric)
    order = np.argsort(expected)[:7]
    assert ids(found) == [f"item {row:03}" for row in order]
    assert [match.distance for match in found] == pytest.approx(expected[order], abs=1e-5)


@pytest.mark.parametrize(
    ("where", "admits"),
    [
        ({"label": "opacity"}, lambda known: known["label"] == "opacity"),
        ({"age": 17}, lambda known: known["age"] == 17),
        ({"view": ["AP", "lateral"]}, lambda known: known.get("view") in {"AP", "lateral"}),
        ({"view": []}, lambda known: False),
        ({"age": Between(10, 30)}, lambda known: 10 <= known["age"] <= 30),
        ({"age": Between(None, 5)}, lambda known: known["age"] <= 5),
        ({"age": Between(50, None)}, lambda known: known["age"] >= 50),
        ({"view": "PA", "age": Between(20, 44)}, lambda known: known.get("view") == "PA" and 20 <= known["age"] <= 44),
        ({"label": "opacity", "view": ["PA", "AP"], "age": Between(3, None)}, lambda known: known["label"] == "opacity"
            and known.get("view") in {"PA", "AP"} and known["age"] >= 3),
        ({"side": "left"}, lambda known: False),
        ({"label": "effusion"}, lambda known: False),
        ({"label": 3.0}, lambda known: False),
        ({"age": "17"}, lambda known: False),
        ({"age": Between(None, None)}, lambda known: True),
        ({}, lambda known: True),
    ],
)  # fmt: skip
def test_a_filter_admits_what_it_says(store: VectorStore, where: Filter, admits: Callable[[Mapping[str, Value]], bool]) -> None:
    all_items, vectors, query = items(60), noise(60), noise(1, seed=2)[0]
    store.add(all_items, vectors)
    admitted = [row for row in np.argsort(distances(query, vectors, "cosine")) if admits(all_items[row].metadata)]
    assert ids(store.search(query, 60, where)) == [all_items[row].id for row in admitted]
    assert ids(store.search(query, 4, where)) == [all_items[row].id for row in admitted[:4]]


def test_filters_come_before_the_nearest(store: VectorStore) -> None:
    vectors = np.concatenate([noise(40) * 0.01 + 1, noise(5, seed=3) * 0.01 - 1])
    store.add([Item(str(row), {"far": "no" if row < 40 else "yes"}) for row in range(45)], vectors)
    found = store.search(np.ones(DIMENSIONS, np.float32), 5, {"far": "yes"})
    assert set(ids(found)) == {"40", "41", "42", "43", "44"}


@pytest.mark.parametrize(
    "where",
    [
        {"age": None},
        {"age": [1, 2]},
        {"age": float("nan")},
        {"age": True},
        {"age": Between(float("nan"), None)},
        {"age": Between(0, float("inf"))},
        {"age": Between(-float("inf"), 0)},
        {"age": "\udcff"},
        {"age": ["a", "\ud800"]},
        {"age\udcff": "a"},
    ],
)
def test_a_filter_of_another_kind_is_refused(store: VectorStore, where: Filter) -> None:
    store.add(items(3), noise(3))
    with pytest.raises(DataError, match="age"):
        store.search(noise(1)[0], 3, where)


def test_a_name_may_hold_a_word_in_one_item_and_a_number_in_another(store: VectorStore) -> None:
    store.add([Item("word", {"stage": "2"}), Item("number", {"stage": 2})], noise(2))
    assert ids(store.search(noise(1)[0], 2, {"stage": "2"})) == ["word"]
    assert ids(store.search(noise(1)[0], 2, {"stage": 2})) == ["number"]
    assert ids(store.search(noise(1)[0], 2, {"stage": Between(1, 3)})) == ["number"]


def test_of_equally_near_ones_the_first_ids_are_found(store: VectorStore) -> None:
    store.add([Item(id) for id in "cadb"], np.tile(noise(1), (4, 1)))
    store.add([Item("e")], -noise(1))
    assert ids(store.search(noise(1)[0], 2)) == ["a", "b"]
    assert ids(store.search(noise(1)[0], 5)) == ["a", "b", "c", "d", "e"]


def test_more_than_there_are_are_all(store: VectorStore) -> None:
    assert store.search(noise(1)[0], 5) == []
    store.add(items(3), noise(3))
    assert len(store.search(noise(1)[0], 50)) == 3
    assert len(store.search(noise(1)[0], 50, {"label": "opacity"})) == 1


@pytest.mark.parametrize("k", [0, -1, -100])
def test_fewer_than_one_are_none(store: VectorStore, k: int) -> None:
    store.add(items(3), noise(3))
    assert store.search(noise(1)[0], k) == []
    with pytest.raises(DataError):
        store.search(noise(1, DIMENSIONS - 1)[0], k)


def test_what_is_kept_comes_back(store: VectorStore) -> None:
    kept = Item("a", {"label": "opacity", "age": 61, "dose": 0.1}, "Opacity in the right lower lobe.")
    store.add([kept, Item("b")], np.stack([noise(1)[0] * 5, noise(1, seed=1)[0]]))
    assert store.get(["b", "nobody", "a"]) == [Item("b"), None, kept]
    assert store.search(noise(1)[0], 1)[0].item == kept
    assert store.count() == 2


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_vectors_come_back_as_they_are_compared(place_of: PlaceOf, metric: Metric) -> None:
    given = noise(3) * 5
    expected = given / np.linalg.norm(given, axis=1, keepdims=True) if metric == "cosine" else given
    with place_of(metric).open() as store:
        store.add(items(3), given)
        np.testing.assert_allclose(store.vectors(["item 002", "item 000", "item 002"]), expected[[2, 0, 2]], rtol=1e-6)
        assert store.vectors([]).shape == (0, DIMENSIONS)
        with pytest.raises(DataError, match="nobody"):
            store.vectors(["item 000", "nobody"])


def test_an_id_is_added_once(store: VectorStore) -> None:
    store.add(items(2), noise(2))
    with pytest.raises(DataError, match="item 001"):
        store.add([Item("new"), Item("item 001")], noise(2))
    with pytest.raises(DataError):
        store.add([Item("twice"), Item("twice")], noise(2))
    assert store.count() == 2
    assert store.get(["new", "twice"]) == [None, None]


UNFIT = {
    "dimensions": noise(2, DIMENSIONS + 1),
    "count": noise(3),
    "one": noise(2)[0],
    "nan": noise(2) * np.nan,
    "infinite": np.full((2, DIMENSIONS), np.inf),
    "zero": noise(2) * [[1], [0]],
}


@pytest.mark.parametrize("vectors", UNFIT.values(), ids=UNFIT)
def test_vectors_that_cannot_be_compared_are_refused_whole(store: VectorStore, vectors: NDArray[np.float32]) -> None:
    store.add([Item("x")], noise(1))
    with pytest.raises(DataError):
        store.add([Item("a"), Item("b")], vectors)
    with pytest.raises(DataError):
        store.update([Item("x"), Item("y")], vectors)
    assert store.count() == 1


def test_a_vector_that_cannot_be_compared_is_named_by_its_id(store: VectorStore) -> None:
    for unfit in (0, np.nan):
        vectors = noise(3)
        vectors[1] *= unfit
        with pytest.raises(DataError, match="item 001"):
            store.add(items(3), vectors)


@pytest.mark.parametrize("query", [noise(1, DIMENSIONS - 1)[0], noise(1), noise(1)[0] * np.nan, noise(1)[0] * 0])
def test_queries_that_cannot_be_compared_are_refused(store: VectorStore, query: NDArray[np.float32]) -> None:
    store.add(items(3), noise(3))
    with pytest.raises(DataError):
        store.search(query, 1)


def test_a_vector_of_length_0_has_a_distance_in_l2(place_of: PlaceOf) -> None:
    with place_of("l2").open() as store:
        store.add([Item("zero")], np.zeros((1, DIMENSIONS), np.float32))
        assert store.search(np.full(DIMENSIONS, 2, np.float32), 1)[0].distance == pytest.approx(2 * DIMENSIONS**0.5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, ["a"], True])
def test_metadata_are_words_and_finite_numbers(store: VectorStore, value: Value) -> None:
    with pytest.raises(DataError, match="age"):
        store.add([Item("a", {"age": value})], noise(1))
    assert store.count() == 0


@pytest.mark.parametrize(
    "item", [Item("\ud800"), Item("a", {}, "\udcff"), Item("a", {"age": "\udfff"}), Item("a", {"age\udcff": 1})], ids=ascii
)
def test_what_is_no_text_of_unicode_is_refused(store: VectorStore, item: Item) -> None:
    with pytest.raises(DataError) as refused:
        store.add([Item("fine"), item], noise(2))
    str(refused.value).encode()
    assert store.count() == 0
    assert store.get([item.id, "fine"]) == [None, None]
    assert store.delete([item.id]) == 0


def test_an_update_replaces_vector_metadata_and_text(store: VectorStore) -> None:
    store.add(items(10), noise(10))
    changed = Item("item 004", {"label": "effusion"}, "another report")
    store.update([changed], noise(1, seed=9))
    assert store.count() == 10
    assert store.get(["item 004"]) == [changed]
    assert store.search(noise(1, seed=9)[0], 1)[0].item == changed
    assert ids(store.search(noise(10)[4], 10, {"age": 4})) == []
    assert ids(store.search(noise(10)[4], 10, {"label": "effusion"})) == ["item 004"]
    with pytest.raises(DataError, match="nobody"):
        store.update([Item("item 005", {}, "lost"), Item("nobody")], noise(2))
    assert store.get(["item 005"]) == [items(10)[5]]


def test_what_is_deleted_is_found_no_more(store: VectorStore) -> None:
    store.add(items(10), noise(10))
    assert store.delete(["item 002", "nobody", "item 007", "item 002"]) == 2
    assert store.count() == 8
    assert store.get(["item 002"]) == [None]
    assert "item 002" not in ids(store.search(noise(10)[2], 10))
    store.add([Item("item 002", {}, "again")], noise(1, seed=4))
    assert store.count() == 9
    assert store.search(noise(1, seed=4)[0], 1)[0].item.text == "again"


def test_a_filter_that_was_asked_before_sees_each_change(store: VectorStore) -> None:
    def found() -> list[str]:
        return ids(store.search(noise(10)[2], 10, {"view": "lateral"}))

    store.add(items(10), noise(10))
    store.persist()
    assert set(found()) == {"item 002", "item 008"}
    store.delete(["item 002"])
    assert found() == ["item 008"]
    store.update([Item("item 000", {"view": "lateral"})], noise(1))
    assert set(found()) == {"item 000", "item 008"}
    store.persist()
    assert set(found()) == {"item 000", "item 008"}


def test_all_items_are_told_once(store: VectorStore) -> None:
    assert list(store.items()) == []
    store.add(items(30), noise(30))
    store.persist()
    store.delete(["item 003"])
    changed = Item("item 004", {}, "changed")
    store.update([changed], noise(1))
    expected = {item.id: item for item in [*items(30), changed] if item.id != "item 003"}
    found = list(store.items())
    assert len(found) == 29
    assert {item.id: item for item in found} == expected


def test_words_of_every_language_are_kept_and_filtered(store: VectorStore) -> None:
    named = [
        Item("Grüße/Ünïcödé 影像 🫁", {"région": "poumon gauche", "标签": "肺炎", "_a-b.c": "x"}, "Befund: «ja»\n\ttab"),
        Item('it\'s "quoted" \\ $where {}', {"région": "a \"b\" 'c' \\ or 1=1", "标签": ""}),
    ]
    store.add(named, noise(2))
    assert store.get([item.id for item in named]) == named
    assert ids(store.search(noise(1)[0], 5, {"标签": "肺炎"})) == [named[0].id]
    assert ids(store.search(noise(1)[0], 5, {"région": named[1].metadata["région"]})) == [named[1].id]
    assert ids(store.search(noise(1)[0], 5, {"_a-b.c": ["x"]})) == [named[0].id]
    assert ids(store.search(noise(1)[0], 5, {"标签": ""})) == [named[1].id]
    assert store.delete([named[1].id]) == 1


def test_nothing_added_is_nothing_changed(store: VectorStore) -> None:
    store.add([], np.zeros((0, DIMENSIONS), np.float32))
    store.update([], np.zeros((0, DIMENSIONS), np.float32))
    assert store.delete([]) == 0
    assert store.get([]) == []
    assert store.count() == 0


def test_another_process_finds_what_was_persisted(place: Place) -> None:
    with place.open() as store:
        store.add(items(50), noise(50))
        store.persist()
        store.update([Item("item 001", {"label": "changed"}, "new text")], noise(1, seed=5))
        store.delete(["item 002"])
        store.persist()
    given = [place.config.model_dump(), str(place.folder), place.name, DIMENSIONS]
    asked = [["item 002", "item 001", "item 000"], noise(1, seed=5)[0].tolist()]
    command = [sys.executable, "-c", REOPEN]
    answer = subprocess.run(command, input=json.dumps([*given, *asked]), capture_output=True, text=True, check=True)
    count, found, matches = json.loads(answer.stdout.splitlines()[-1])
    assert count == 49
    assert found == [None, ["item 001", {"label": "changed"}, "new text"], ["item 000", dict(items(1)[0].metadata), "report 0"]]
    assert matches[0] == ["item 001", pytest.approx(0, abs=1e-6)]
    with place.open() as store:
        assert [match.item.id for match in store.search(noise(1, seed=5)[0], 3)] == [id for id, _ in matches]


def test_other_dimensions_than_were_persisted_are_refused(place: Place) -> None:
    with place.open() as store:
        store.add(items(5), noise(5))
        store.persist()
    with pytest.raises(DataError, match=rf"\b{DIMENSIONS}\b"):
        place.open(DIMENSIONS * 2)


def test_another_metric_than_was_persisted_is_refused(place: Place) -> None:
    with place.open() as store:
        store.add(items(5), noise(5))
        store.persist()
    with pytest.raises(DataError, match="cosine"):
        Place(place.config.model_copy(update={"metric": "l2"}), place.folder, place.name).open()
