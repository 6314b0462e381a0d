"""Stage ``predict``: the champion's answers for a batch of studies. What a killed try has answered is not done again."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, as_uri
from cv_factory_ops.config.sources import KafkaTopic
from cv_factory_ops.domain import Decoded, Decoding, open_domain
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion import sources
from cv_factory_ops.ingestion.manifest import Refusal, write_quarantine
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.readers import read_all
from cv_factory_ops.ingestion.sources.files import open_files
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.ingestion.validate import frame_id, frames, refusal
from cv_factory_ops.records import PredictRecord
from cv_factory_ops.registry import Champion

if TYPE_CHECKING:
    from cv_factory_ops.answers import Prediction
    from cv_factory_ops.predictor import Predictor
    from cv_factory_ops.stage import Stage

BATCH = 32
"""Studies that are decoded and predicted at a time: bounds memory."""


def run(stage: Stage) -> PredictRecord:
    """Write a line an answered study to ``predictions.jsonl``, and one a refused study to ``quarantine.jsonl``.

    Raises:
        DataError: there is no champion, or nothing that could be read.
    """
    from cv_factory_ops.predictor import Predictor

    champion = champion_of(stage.config)
    predictor = Predictor(Bundle.load(stage.local(champion.bundle)))
    with Journal(stage.out / "journal.jsonl") as journal:
        studies = _studies(stage, predictor.manifest.decoding, journal.items)
        while batch := list(islice(studies, BATCH)):
            journal.add(answered(predictor, batch))
    predicted, refusals = 0, list[Refusal]()
    with (stage.out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        for outcome in journal.outcomes():
            file.writelines(json.dumps(answer) + "\n" for answer in outcome.answers)
            predicted += len(outcome.answers)
            refusals += outcome.refusals
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    if not predicted:
        raise DataError(f"none of {len(refusals)} studies could be read" if refusals else "the batch holds no studies")
    if stage.config.batch.publish:
        publish(stage.config.batch.publish, stage.out / "predictions.jsonl")
    journal.path.unlink()
    return PredictRecord(
        summary=f"{predicted} studies answered by version {champion.version}, {len(refusals)} refused",
        predicted=predicted,
        quarantined=len(refusals),
        bundle_digest=champion.bundle_digest,
        predictions=stage.uri("predictions.jsonl"),
    )


def publish(topic: KafkaTopic, path: Path) -> None:
    """Send each line of a table of predictions to a topic, keyed by its study. A retry of the stage sends all of them again.

    Raises:
        Unavailable, ConfigError: not every line was delivered.
    """
    from cv_factory_ops.kafka import Publisher

    with Publisher(topic) as publisher, path.open("rb") as file:
        for line in file:
            publisher.send(line.rstrip(b"\n"), key=json.loads(line)["study"].encode())


def fingerprint(stage: Stage) -> str:
    """What would be read now, and the champion that would answer."""
    path = stage.config.batch.path
    inputs = json.dumps(list(storage.versions(as_uri(path)))) if path else sources.fingerprint(stage)
    return storage.text_digest(inputs + champion_of(stage.config).bundle_digest)


def champion_of(config: ProjectConfig) -> Champion:
    """The project's champion.

    Raises:
        DataError: there is none yet.
    """
    champion = registry.champion(config)
    if champion is None:
        raise DataError(f"project {config.project} has no champion yet; run its training first")
    return champion


@dataclass(frozen=True)
class Study:
    """A decoded item: the name and the image of each of its frames."""

    item: str
    frames: list[tuple[str, Decoded]]


@dataclass(frozen=True)
class Outcome:
    """What became of an item: an answer or a refusal for each of its frames, or one refusal of all."""

    item: str
    answers: list[dict[str, Any]]
    """Lines of ``predictions.jsonl``."""
    refusals: list[Refusal]


def answered(predictor: Predictor, studies: Sequence[Study | Refusal]) -> list[Outcome]:
    """The outcome of each, in their order; the network sees all frames at once."""
    frames = [(study.item, *frame) for study in studies if isinstance(study, Study) for frame in study.frames]
    answers: dict[str, list[dict[str, Any]]] = {}
    refusals: dict[str, list[Refusal]] = {}
    for (item, name, _), found in zip(frames, _predictions(predictor, [image for _, _, image in frames]), strict=True):
        if isinstance(found, Rejected):
            refusals.setdefault(item, []).append(Refusal(name, found.code, str(found)))
        else:
            answers.setdefault(item, []).append({"study": name, **found.model_dump()})
    return [
        Outcome(study.item, [], [study])
        if isinstance(study, Refusal)
        else Outcome(study.item, answers.get(study.item, []), refusals.get(study.item, []))
        for study in studies
    ]


def _predictions(predictor: Predictor, images: list[Decoded]) -> Iterator[Prediction | Rejected]:
    """One by one where the bundle does not take one of them: the others are answered all the same."""
    try:
        yield from predictor.answer(images).predictions if images else ()
        return
    except Rejected as error:
        if len(images) == 1:
            yield error
            return
    for image in images:
        yield from _predictions(predictor, [image])


class Journal:
    """The outcomes so far, an item a line, in a ``with`` block; what a killed process has half written is forgotten."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        with path.open("rb") as file:
            whole = sum(len(line) for line in file if line.endswith(b"\n"))
        os.truncate(path, whole)
        self.items = {outcome.item for outcome in self.outcomes()}
        """Names of the items that are done."""

    def __enter__(self) -> Journal:
        self._file = self.path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Write outcomes; once this returns, the end of the process loses none."""
        self._file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
        self._file.flush()

    def outcomes(self) -> Iterator[Outcome]:
        """All so far."""
        with self.path.open(encoding="utf-8") as file:
            for line in file:
                found = json.loads(line)
                yield Outcome(found["item"], found["answers"], [Refusal(**refusal) for refusal in found["refusals"]])


def _studies(stage: Stage, decoding: Decoding, done: Collection[str]) -> Iterator[Study | Refusal]:
    """Every item that is not done: decoded, or why it cannot be."""
    path, data = stage.config.batch.path, stage.config.data
    opened = open_files(as_uri(path), stage) if path else sources.open_base(stage, with_labels=False)
    items = with_progress(opened.items, opened.total, "predict", "file")
    left = (item for item in items if (item.item if isinstance(item, Refusal) else item.id) not in done)
    return read_all(left, Studies, (stage.config.domain, decoding), data.validation, data.workers)


class Studies:
    """Decodes in a process of its own."""

    def __init__(self, settings: tuple[str, Decoding]) -> None:
        self._domain, self._decoding = open_domain(settings[0]), settings[1]

    def __call__(self, items: Sequence[Item]) -> list[Study | Refusal]:
        return [self._read(item) for item in items]

    def _read(self, item: Item) -> Study | Refusal:
        try:
            images = frames(item, self._domain, self._decoding)
            return Study(item.id, [(frame_id(item, image, self._decoding), image) for image in images])
        except Exception as error:
            return refusal(item, error)
