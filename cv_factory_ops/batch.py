"""Stage ``predict``: the champion's answers for a batch of studies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import as_uri
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion import sources
from cv_factory_ops.ingestion.decode import as_unit_range, decode
from cv_factory_ops.ingestion.manifest import Refusal, write_quarantine
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
    studies, predicted = _studies(stage, refusals), 0
    with (stage.out / "predictions.jsonl").open("w", encoding="utf-8") as file:
        while batch := list(islice(studies, BATCH)):
            answer = predictor.answer([study for _, study in batch])
            for (name, _), prediction in zip(batch, answer.predictions, strict=True):
                file.write(json.dumps({"study": name, **prediction.model_dump()}) + "\n")
            predicted += len(batch)
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    if not predicted:
        raise DataError(f"none of {len(refusals)} studies could be read" if refusals else "the batch holds no studies")
    return PredictRecord(
        summary=f"{predicted} studies answered by version {champion.version}, {len(refusals)} refused",
        predicted=predicted,
        quarantined=len(refusals),
        bundle_digest=champion.bundle_digest,
        predictions=stage.uri("predictions.jsonl"),
    )


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


def _studies(stage: Stage, refusals: list[Refusal]) -> Iterator[tuple[str, Decoded]]:
    """Name and image of every study that can be read; the others are added to ``refusals``."""
    for item in _files(as_uri(stage.config.batch.path)) if stage.config.batch.path else sources.open_base(stage).items:
        if isinstance(item, Refusal):
            refusals.append(item)
            continue
        try:
            content = item.content
            yield (
                item.id,
                decode(content, None, stage.domain) if isinstance(content, bytes) else Decoded(as_unit_range(content)),
            )
        except Rejected as error:
            refusals.append(Refusal(item.id, error.code, str(error)))


def _files(uri: str) -> Iterator[sources.Item]:
    names = list(storage.listing(uri))
    if not names:
        raise DataError(f"{uri}: holds no files; expected are studies")
    for name in names:
        yield sources.Item(name, storage.read_bytes(f"{uri}/{name}"), label="")
