"""Of the five training images that are most like a test image of PneumoniaMNIST: how many have its label.

    python -m benchmarks.retrieval_quality pneumoniamnist.npz [--epochs 16] [--seed 0]

Trains a bundle by `cvf ingest preprocess train` with configs/pneumoniamnist.yaml, embeds the official training split, and asks
for each image of the official test split. Printed is the mean share of the five, with a 95% interval over the test images
(bootstrap). Beside it: as many images at random, and the nearest in pixels.

`cvf similar` asks with the words of a study's metadata. These images come with none, so each is given words by chance, one of
two sexes and of three views: the row shows what hybrid loses by words that say nothing of the finding.

They come with no reports either, so the rows with reports have **generated** ones: two sentences about something else by
chance, and among them one about the finding, in one of several wordings, with negations ("no consolidation") where there is
none. Of a tenth the sentence is that of the other label, a quarter say nothing of the finding. A question is asked with the
metadata alone, or with what a person who suspects pneumonia, or thinks the image clear, might type; of every tenth that is
wrong too. So these rows show what the search makes of words that say something, not what reports of a hospital would give.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config.retrieval import (
    DenseRetriever,
    ExactReranker,
    FaissStore,
    FlatIndex,
    HnswIndex,
    HybridRetriever,
    NoReranker,
    RetrievalConfig,
)
from cv_factory_ops.features.retrievers import Query, Retriever
from cv_factory_ops.features.stores import Item, open_store
from cv_factory_ops.features.words import Words
from cv_factory_ops.ingestion.labels import report_words
from cv_factory_ops.metrics import predicted
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing.shards import open_split, read_rows
from cv_factory_ops.records import TrainRecord
from cv_factory_ops.stage import read_result
from cv_factory_ops.storage import path_of

CONFIG = Path(__file__).parents[1] / "configs" / "pneumoniamnist.yaml"
K = 5
OPACITIES = (
    "There is a focal consolidation in the right lower lobe.",
    "Patchy airspace opacities, suspicious for pneumonia.",
    "Findings are consistent with pneumonia; consolidation on the left.",
    "New infiltrate with air bronchograms.",
)
CLEAR = (
    "The lungs are clear, no consolidation.",
    "No evidence of pneumonia.",
    "No focal infiltrate or airspace opacity, lungs well aerated.",
    "Unremarkable lungs.",
)
ELSE = (
    "The heart is of normal size.",
    "No pleural effusion.",
    "Small pleural effusion on the left.",
    "No pneumothorax.",
    "Central venous line in place.",
    "The bones are unremarkable.",
    "Comparison with the previous image.",
    "Rotated, limited inspiration.",
)
ASKED = {"pneumonia": "pneumonia consolidation infiltrate", "normal": "lungs clear unremarkable"}
WRONG, SILENT = 0.1, 0.25
SEXES, VIEWS = ("F", "M"), ("AP", "PA", "lateral")
NARROW = HnswIndex(neighbours=4, build_breadth=8, search_breadth=5)
EXACT, AS_RETRIEVED = ExactReranker(), NoReranker()
WAYS = {
    "dense, flat": RetrievalConfig(store=FaissStore(index=FlatIndex()), reranker=AS_RETRIEVED),
    "dense, HNSW": RetrievalConfig(store=FaissStore(), reranker=AS_RETRIEVED),
    "dense, HNSW, re-scored": RetrievalConfig(store=FaissStore(), reranker=EXACT),
    "dense, narrow HNSW": RetrievalConfig(store=FaissStore(index=NARROW), reranker=AS_RETRIEVED),
    "dense, narrow HNSW, re-scored": RetrievalConfig(store=FaissStore(index=NARROW), reranker=EXACT),
    "dense, principal components": RetrievalConfig(
        store=FaissStore(), vector="components", retriever=DenseRetriever(), reranker=EXACT
    ),
    "hybrid, words of the metadata": RetrievalConfig(store=FaissStore(), retriever=HybridRetriever(), reranker=EXACT),
}
HYBRID = WAYS["hybrid, words of the metadata"]


class Split:
    """Images of a split, (N, size, size), with their labels and what the model makes of them."""

    def __init__(self, shards: Path, split: str, predictor: Predictor) -> None:
        manifest = predictor.manifest
        self.images = np.asarray(open_split(shards, split)[:])
        self.labels = np.array(manifest.labels)[read_rows(shards, split)["label"].to_numpy()]
        probabilities, self.embedding = predictor.forward(self.images)
        self.answers = np.array(manifest.labels)[predicted(probabilities, manifest.threshold)]
        chance = np.random.default_rng(len(self.images))
        self.known = [{"sex": str(chance.choice(SEXES)), "view": str(chance.choice(VIEWS))} for _ in self.images]
        self.reports = [report(str(label), chance) for label in self.labels]
        self.typed = [ASKED[told_as(str(label), chance)] for label in self.labels]
        self.components = predictor.vectors(self.embedding, "components")
        self.pixels = self.images.reshape(len(self.images), -1).astype(np.float32) / 65535


def told_as(label: str, chance: np.random.Generator) -> str:
    """The label, or of a tenth the other one."""
    [other] = ASKED.keys() - {label}
    return other if chance.random() < WRONG else label


def report(label: str, chance: np.random.Generator) -> str:
    """A generated one."""
    sentences = [str(each) for each in chance.choice(ELSE, 2, replace=False)]
    if chance.random() >= SILENT:
        sentences.append(str(chance.choice(OPACITIES if told_as(label, chance) == "pneumonia" else CLEAR)))
    chance.shuffle(sentences)
    return report_words(" ".join(sentences))


def train(data: Path, home: Path, epochs: int, seed: int) -> tuple[Predictor, Path]:
    """A trained bundle, and the folder of its prepared images."""
    project = yaml.safe_load(CONFIG.read_text())
    project["data"]["source"]["path"] = str(data)
    project["training"] |= {"epochs": epochs, "seed": seed}
    (home / "project.yaml").write_text(yaml.safe_dump(project))
    for stage in ("ingest", "preprocess", "train"):
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", home / "project.yaml", "--run", home / "run"]
        subprocess.run(command, env={**os.environ, "CVF_HOME": str(home)}, stdout=subprocess.DEVNULL, check=True)
    record = TrainRecord.model_validate(read_result((home / "run").as_uri(), TrainRecord.stage).record)
    bundle = path_of(record.bundle)
    assert bundle  # noqa: S101 - the storage is a folder here
    return Predictor(Bundle.load(bundle)), home / "run" / "preprocess"


def neighbours(
    config: RetrievalConfig, train: Split, test: Split, folder: Path, with_reports: bool = False, typed: bool = False
) -> list[list[str]]:
    """Labels of the five that are found for each test image; of items with reports, by what a person has typed."""
    kept, asked = (train.embedding, test.embedding) if config.vector == "embedding" else (train.components, test.components)
    with open_store(config.store, folder, "", kept.shape[1]) as store:
        known = zip(train.known, train.reports, strict=True)
        store.add([Item(f"{row:05}", said, text if with_reports else "") for row, (said, text) in enumerate(known)], kept)
        store.persist()
    with open_store(config.store, folder, "", kept.shape[1]) as store, Retriever(store, config) as retriever:
        words = [" ".join([*said.values(), more if typed else ""]) for said, more in zip(test.known, test.typed, strict=True)]
        questions = [Query(vector, text) for vector, text in zip(asked, words, strict=True)]
        return [[str(train.labels[int(match.item.id)]) for match in retriever.retrieve(each, K)] for each in questions]


def words_alone(train: Split, test: Split) -> list[list[str]]:
    """By what is typed and nothing else; of equally good ones the first by id."""
    words = Words(
        Item(f"{row:05}", said, text) for row, (said, text) in enumerate(zip(train.known, train.reports, strict=True))
    )
    ranks = [words.ranks(text, len(train.labels)) for text in test.typed]
    return [[str(train.labels[int(each)]) for each in sorted(found, key=lambda i: (found[i], i))[:K]] for found in ranks]


def nearest_pixels(train: Split, test: Split) -> list[list[str]]:
    """By Euclidean distance of the prepared images."""
    squares = (train.pixels**2).sum(1)
    return [list(train.labels[np.argsort(squares - 2 * train.pixels @ image)[:K]]) for image in test.pixels]


def row(name: str, found: Callable[[], Sequence[Sequence[str]]], test: Split, generator: np.random.Generator) -> str:
    started = time.perf_counter()
    labels = found()
    milliseconds = (time.perf_counter() - started) / len(labels) * 1000
    precision = np.array([np.mean([each == label for each in five]) for five, label in zip(labels, test.labels, strict=True)])
    low, high = interval(precision, generator)
    return f"| {name} | {precision.mean():.3f} | {low:.3f} .. {high:.3f} | {milliseconds:.2f} ms |"


def interval(values: NDArray[np.float64], generator: np.random.Generator) -> tuple[float, float]:
    means = [generator.choice(values, len(values)).mean() for _ in range(2000)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = np.random.default_rng(options.seed)
    with tempfile.TemporaryDirectory() as home:
        predictor, shards = train(options.data.resolve(), Path(home), options.epochs, options.seed)
        known, asked = Split(shards, "train", predictor), Split(shards, "test", predictor)
        print(f"{len(known.labels)} images, {len(asked.labels)} questions, {known.embedding.shape[1]} dimensions,", end=" ")
        print(
            f"{known.components.shape[1]} components; the model answers {np.mean(asked.answers == asked.labels):.3f} rightly\n"
        )
        print(f"| what finds them | precision at {K} | 95% | a question, with its share of the index |\n|---|---|---|---|")
        print(row("at random", lambda: generator.choice(known.labels, (len(asked.labels), K)).tolist(), asked, generator))
        print(row("pixels, l2", lambda: nearest_pixels(known, asked), asked, generator))
        for place, (name, config) in enumerate(WAYS.items()):
            folder = Path(home, f"store{place}")
            print(row(name, lambda c=config, f=folder: neighbours(c, known, asked, f), asked, generator), flush=True)  # type: ignore[misc]
        of_reports = {
            "words of generated reports alone": lambda: words_alone(known, asked),
            "hybrid, generated reports, asked by metadata": lambda: neighbours(HYBRID, known, asked, Path(home, "told"), True),
            "hybrid, generated reports, asked by typed words": lambda: neighbours(
                HYBRID, known, asked, Path(home, "typed"), True, True
            ),
        }
        for name, found in of_reports.items():
            print(row(name, found, asked, generator), flush=True)
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "faiss-cpu", "numpy"))
    print(f"\n{packages}, Python {platform.python_version()}, {os.cpu_count()} cores,", end=" ")
    print(f"seed {options.seed}, {options.epochs} epochs")


if __name__ == "__main__":
    main()
