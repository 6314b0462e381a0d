"""Retrievers and rerankers against the published formulas, numpy, and transformers."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from cv_factory_ops.config.retrieval import (
    CrossEncoderReranker,
    DenseRetriever,
    ExactReranker,
    FaissStore,
    FlatIndex,
    HybridRetriever,
    IvfPqIndex,
    NoReranker,
    RetrievalConfig,
)
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.features.index import OWN
from cv_factory_ops.features.retrievers import Query, Retriever
from cv_factory_ops.features.stores import Between, Filter, Item, Match, VectorStore, open_store
from cv_factory_ops.features.words import UNSAID, Words, words_of

REPORTS = {
    "a": "opacity in the left lower lobe",
    "b": "the heart is large",
    "c": "no opacity, no effusion, clear lungs",
    "d": "opacity opacity opacity",
    "e": "effusion on the left",
    "f": "normal",
    "g": "clear lungs and a heart of normal size",
}
ITEMS = [
    Item(each, {"view": "lateral" if each in "bdf" else "frontal", "age": 10 * row}, text)
    for row, (each, text) in enumerate(REPORTS.items())
]
VECTORS = np.array([[row, 0] for row in (3, 1, 4, 6, 5, 2, 7)], np.float32)
NEAREST = "bfaceDg".lower()
"""Ids by their distance from the origin, by ``l2``."""
ORIGIN = np.zeros(2, np.float32)
COUNT = 12_000
"""Vectors from which on FAISS compresses them, and more."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[VectorStore]:
    with open_store(FLAT, tmp_path / "store", "", 2) as opened:
        opened.add(ITEMS, VECTORS)
        yield opened


FLAT = FaissStore(metric="l2", index=FlatIndex())
HYBRID = RetrievalConfig(store=FLAT, retriever=HybridRetriever(candidates=4, rank_constant=60), reranker=NoReranker())


def ids(matches: Sequence[Match]) -> str:
    return "".join(match.item.id for match in matches)


def bm25(asked: str) -> dict[str, float]:
    """By the formula of Robertson and Zaragoza 2009, with k1 1.2 and b 0.75, in an inverse document frequency that is at least
    0.000001; of items that share a word with what is asked."""
    documents = {
        item.id: re.findall(r"\w+", f"{item.metadata['view']} {item.text}".lower()) for item in ITEMS
    }  # fmt: skip
    mean = sum(map(len, documents.values())) / len(documents)
    scores: dict[str, float] = {}
    for word in asked.split():
        having = [each for each, words in documents.items() if word in words]
        rarity = max(math.log((len(documents) - len(having) + 0.5) / (len(having) + 0.5)), 1e-6)
        for each in having:
            count, length = documents[each].count(word), len(documents[each])
            weight = count * 2.2 / (count + 1.2 * (0.25 + 0.75 * length / mean))
            scores[each] = scores.get(each, 0) + rarity * weight
    return scores


@pytest.mark.parametrize(
    "asked", ["opacity", "effusion left", "opacity left lobe", "lateral opacity", "heart normal", "nothing"]
)
def test_words_are_ranked_by_bm25(asked: str) -> None:
    scores = bm25(asked)
    words = Words(ITEMS)
    rank = {each: 1 + sum(other > score * (1 + 1e-9) for other in scores.values()) for each, score in scores.items()}
    assert words.ranks(asked, 10) == rank
    through = {each: sum(other <= place for other in rank.values()) for each, place in rank.items()}
    assert words.ranks(asked, 2) == {each: place for each, place in rank.items() if through[each] <= 2}
    assert words.ranks(asked, 0, None, "af") == {each: place for each, place in rank.items() if each in "af"}


def test_bm25_by_hand() -> None:
    words = Words(
        [Item("1", {}, "x y"), Item("2", {}, "x x"), Item("3", {}, "z z"), Item("4", {}, "z y"), Item("5", {}, "w w")]
    )
    # x: ln(3.5 / 2.5) = 0.336 in 1 and 2, twice in 2: 0.336 * 2.2 * 2 / 3.2 = 0.463 beside 0.336; y the same in 1 and 4.
    assert words.ranks("x", 5) == {"2": 1, "1": 2}
    assert words.ranks("x y", 5) == {"1": 1, "2": 2, "4": 3}


def test_equally_good_ones_have_one_rank_and_are_told_all_or_not_at_all() -> None:
    words = Words([Item(str(number), {}, "x y z" if number == 7 else "y w" if number < 6 else "w v") for number in range(20)])
    assert words.ranks("x y", 7) == {"7": 1} | dict.fromkeys("012345", 2)
    assert words.ranks("x y", 6) == {"7": 1}
    assert words.ranks("x y", 6, None, ["4", "19"]) == {"7": 1, "4": 2}


def test_pseudonyms_and_the_split_are_no_words() -> None:
    item = Item("1", {"patient": "abc", "study": "def", "split": "train", "view": "PA"}, "clear")
    assert words_of(item) == "PA clear"
    assert set(OWN) >= UNSAID
    assert Words([item, Item("2")]).ranks("train abc def", 5) == {}


@pytest.mark.parametrize(
    "asked", ["", "  ", '"', "* OR NOT (", '"opacity" NEAR', "-opacity:words^2", "opacity\x00", "word " * 3000]
)
def test_what_is_asked_is_words_and_no_syntax(asked: str) -> None:
    found = Words(ITEMS).ranks(asked, 10)
    assert list(found) == (["d", "a", "c"] if "opacity" in asked else [])


def test_thousands_of_different_words_can_be_asked_for() -> None:
    assert Words(ITEMS).ranks(" ".join(f"w{number}" for number in range(5000)) + " large", 3) == {"b": 1}


def test_words_are_found_in_any_case_and_without_accents() -> None:
    words = Words([Item("1", {"région": "Poumon Gauche"}, "Épanchement"), Item("2", {}, "正常")])
    assert words.ranks("epanchement", 1) == words.ranks("GAUCHE", 1) == {"1": 1}
    assert words.ranks("正常", 1) == {"2": 1}


@pytest.mark.parametrize(
    ("where", "admitted"),
    [
        ({"view": "lateral"}, "bdf"),
        ({"view": ["frontal"]}, "aceg"),
        ({"view": []}, ""),
        ({"age": Between(10, 30)}, "bcd"),
        ({"age": Between(None, 0)}, "a"),
        ({"age": 60}, "g"),
        ({"age": "60"}, ""),
        ({"view": "frontal", "age": Between(15, None)}, "ceg"),
        ({"view'; DROP TABLE facts; --": "x' OR 1=1"}, ""),
    ],
)
def test_filters_come_before_the_best(where: Filter, admitted: str, store: VectorStore) -> None:
    words = Words(ITEMS)
    everything = " ".join(REPORTS.values())
    assert sorted(words.ranks(everything, 10, where)) == sorted(admitted)
    assert set(words.ranks(everything, 1, where, "abcdefg")) == set(admitted)
    with Retriever(store, HYBRID) as retriever:
        for k in (1, 3, 7):
            found = retriever.retrieve(Query(ORIGIN, everything, where), k)
            assert len(found) == min(k, len(admitted))
            assert set(ids(found)) <= set(admitted)


def test_dense_is_what_the_store_finds(store: VectorStore) -> None:
    config = RetrievalConfig(store=FLAT, retriever=DenseRetriever(), reranker=NoReranker())
    with Retriever(store, config) as retriever:
        assert ids(retriever.retrieve(Query(ORIGIN, "opacity"), 7)) == NEAREST
        assert retriever.retrieve(Query(ORIGIN), 3) == store.search(ORIGIN, 3)


def test_hybrid_joins_both_by_reciprocal_ranks(store: VectorStore) -> None:
    with Retriever(store, HYBRID) as retriever:
        found = retriever.retrieve(Query(ORIGIN, "opacity"), 5)
    # Near: b f a c; by words: d a c. a 1/63 + 1/62, c 1/64 + 1/63, b and d 1/61 each, f 1/62.
    assert ids(found) == "acbdf"
    assert [match.distance for match in found] == [3, 4, 1, 6, 2]


def test_the_rank_constant_weighs_the_first_ranks(store: VectorStore) -> None:
    config = HYBRID.model_copy(update={"retriever": HybridRetriever(candidates=4, rank_constant=0.01)})
    with Retriever(store, config) as retriever:
        # b and d 1/1.01 each, a 1/3.01 + 1/2.01, c 1/4.01 + 1/3.01, f 1/2.01.
        assert ids(retriever.retrieve(Query(ORIGIN, "opacity"), 5)) == "bdacf"


def test_hybrid_without_words_is_dense(store: VectorStore) -> None:
    with Retriever(store, HYBRID) as retriever:
        assert ids(retriever.retrieve(Query(ORIGIN), 7)) == NEAREST
        assert ids(retriever.retrieve(Query(ORIGIN, "unheard"), 7)) == NEAREST


@pytest.mark.parametrize("said", [["DX F PA"], ["DX F PA", "DX M PA"], ["DX F PA", "DX F AP", "DX M PA", "DX M AP"]])
def test_words_that_hundreds_have_leave_the_nearest_first(tmp_path: Path, said: list[str]) -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(600, 8)).astype(np.float32)
    query = vectors[7] + np.float32(0.1)
    known = [Item(f"{row:03}", {}, said[row % len(said)]) for row in range(600)]
    order = np.argsort(np.linalg.norm(vectors - query, axis=1))
    expected = [f"{row:03}" for row in order[:100] if row % len(said) == 0][:5]
    config = HYBRID.model_copy(update={"retriever": HybridRetriever(candidates=100)})
    with open_store(FLAT, tmp_path / "many", "", 8) as store:
        store.add(known, vectors)
        with Retriever(store, config) as retriever:
            found = [match.item.id for match in retriever.retrieve(Query(query, "DX F PA"), 5)]
    assert found == expected


def test_what_was_deleted_since_is_not_found(store: VectorStore) -> None:
    with Retriever(store, HYBRID) as retriever:
        store.delete(["a", "d"])
        assert ids(retriever.retrieve(Query(ORIGIN, "opacity"), 4)) == "cbfe"


def test_exact_re_scoring_mends_the_order_of_a_compressed_index(tmp_path: Path) -> None:
    index = FaissStore(index=IvfPqIndex(cells=4, codes=2, probes=4))
    generator = np.random.default_rng(0)
    vectors, query = generator.normal(size=(COUNT, 16)).astype(np.float32), generator.normal(size=16).astype(np.float32)
    angles = 1 - vectors.astype(float) @ query.astype(float) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    expected = [str(row) for row in np.argsort(angles)[:10]]
    with open_store(index, tmp_path / "store", "", 16) as store:
        store.add([Item(str(row)) for row in range(COUNT)], vectors)
        store.persist()
    with open_store(index, tmp_path / "store", "", 16) as store:
        compressed = [match.item.id for match in store.search(query, 10)]
        config = RetrievalConfig(store=index, reranker=ExactReranker(candidates=1000))
        with Retriever(store, config) as retriever:
            found = retriever.retrieve(Query(query), 10)
    assert compressed != expected
    assert [match.item.id for match in found] == expected
    assert [match.distance for match in found] == pytest.approx(np.sort(angles)[:10], abs=1e-7)


def test_exact_re_scoring_leaves_words_their_part(store: VectorStore) -> None:
    config = HYBRID.model_copy(update={"reranker": ExactReranker()})
    with Retriever(store, config) as retriever, Retriever(store, HYBRID) as as_retrieved:
        query = Query(ORIGIN, "opacity")
        assert retriever.retrieve(query, 5) == as_retrieved.retrieve(query, 5)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small cross-encoder that has learned nothing."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    folder = tmp_path_factory.mktemp("encoder")
    words = sorted({word for text in REPORTS.values() for word in re.findall(r"\w+", text)} | {"frontal", "lateral"})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    size = BertConfig(
        vocab_size=5 + len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
    )
    BertForSequenceClassification(size).save_pretrained(folder)
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def scores(folder: Path, asked: str) -> dict[str, float]:
    """What transformers itself makes of the pairs of texts."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.inference_mode():
        return {
            item.id: model(**tokenizer(asked, f"{item.metadata['view']} {item.text}", return_tensors="pt")).logits.item()
            for item in ITEMS
        }


def test_a_cross_encoder_reads_both_texts(store: VectorStore, encoder: Path) -> None:
    config = RetrievalConfig(store=FLAT, reranker=CrossEncoderReranker(path=str(encoder)))
    expected = scores(encoder, "opacity left")
    with Retriever(store, config) as retriever:
        found = retriever.retrieve(Query(ORIGIN, "opacity left"), 7)
        assert ids(found) == "".join(sorted(expected, key=lambda each: -expected[each])) != NEAREST
        assert ids(retriever.retrieve(Query(ORIGIN, "opacity left"), 2)) == ids(found)[:2]
        assert ids(retriever.retrieve(Query(ORIGIN), 7)) == NEAREST


def test_a_cross_encoder_reads_no_more_than_the_candidates(store: VectorStore, encoder: Path) -> None:
    config = RetrievalConfig(store=FLAT, reranker=CrossEncoderReranker(path=str(encoder), candidates=3))
    with Retriever(store, config) as retriever:
        assert set(ids(retriever.retrieve(Query(ORIGIN, "opacity left"), 2))) <= set(NEAREST[:3])


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_without_a_cross_encoder_is_named(store: VectorStore, tmp_path: Path, made: bool) -> None:
    if made:
        (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        Retriever(store, RetrievalConfig(store=FLAT, reranker=CrossEncoderReranker(path=str(tmp_path / "empty"))))
