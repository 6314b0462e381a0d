"""Stage ``predict``: the champion's answers for a batch of studies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import KafkaTopic, as_uri
from cv_factory_ops.domain import Decoded, Decoding, open_domain
from cv_factory_ops.errors import DataError
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
    from cv_factory_ops.stage import Stage

BATCH = 32
"""Studies that are decoded and predicted at a time: bounds memory."""


def run(stage: Stage) -> PredictRecord:
    """Write a line an answered study to ``predictions.jsonl``, and one a refused study to ``quarantine.jsonl``.

    Raises:
        DataError: there is no champion, or nothing that could be read.
    """
    from cv_factory_ops.predictor import Predictor

    champion = _champion(stage)
    predictor = Predictor(Bundle.load(stage.local(champion.bundle)))
    refusals: list[Refusal] = []
    studies, predicted = _studies(stage, predictor.manifest.decoding, refusals), 0
    with (stage.out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        while batch := list(islice(studies, BATCH)):
            answer = predictor.answer([study for _, study in batch])
            for (name, _), prediction in zip(batch, answer.predictions, strict=True):
                file.write(json.dumps({"study": name, **prediction.model_dump()}) + "\n")
            predicted += len(batch)
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    if not predicted:
        raise DataError(f"none of {len(refusals)} studies could be read" if refusals else "the batch holds no studies")
    if stage.config.batch.publish:
        publish(stage.config.batch.publish, stage.out / "predictions.jsonl")
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
    return storage.text_digest(inputs + _champion(stage).bundle_digest)


def _champion(stage: Stage) -> Champion:
    champion = registry.champion(stage.config)
    if champion is None:
        raise DataError(f"project {stage.config.project} has no champion yet; run its training first")
    return champion


def _studies(stage: Stage, decoding: Decoding, refusals: list[Refusal]) -> Iterator[tuple[str, Decoded]]:
    """Name and image of every study that can be read; the others are added to ``refusals``."""
    path, data = stage.config.batch.path, stage.config.data
    opened = open_files(as_uri(path), stage) if path else sources.open_base(stage, with_labels=False)
    items = with_progress(opened.items, opened.total, "predict", "file")
    settings = (stage.config.domain, decoding)
    for result in read_all(items, _Studies, settings, data.validation, data.workers):
        if isinstance(result, Refusal):
            refusals.append(result)
        else:
            yield from result


class _Studies:
    """Decodes in a process of its own."""

    def __init__(self, settings: tuple[str, Decoding]) -> None:
        self._domain, self._decoding = open_domain(settings[0]), settings[1]

    def __call__(self, item: Item) -> list[tuple[str, Decoded]] | Refusal:
        try:
            images = frames(item, self._domain, self._decoding)
            return [(frame_id(item, image, self._decoding), image) for image in images]
        except Exception as error:
            return refusal(item, error)
