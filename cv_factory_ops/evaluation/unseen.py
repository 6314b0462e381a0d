"""Whether the locked test set has stayed unseen: what the gate judges on must be the declared images, and no image or patient
of them may stand in what the challenger or the champion was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pandas as pd

from cv_factory_ops import registry, storage
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.splits import test_digest
from cv_factory_ops.preprocessing.shards import INDEX, read_index, read_rows
from cv_factory_ops.records import Criterion, IngestRecord

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

HELD_OUT = {"test", "recent", "reserve"}
"""All other splits are learned from, or chosen by."""


def unseen(stage: Stage, declared: str, champion: int | None) -> Iterator[Criterion]:
    """``declared``: digest of the test set that the challenger's bundle names; ``champion``: its version."""
    test = _rows(stage, stage.run, "test")
    found = test_digest(test["digest"])
    same = found == declared == stage.read(IngestRecord).test_digest
    reason = (
        "" if same else f"the images judged on (digest {found[:12]}) are not those that the bundle declares ({declared[:12]})"
    )
    yield Criterion(
        name="test set other than declared", rule="at most", limit=0, value=float(not same), passed=same, reason=reason
    )
    yield from _strangers(test, learned_from(stage, stage.run), "trained on")
    if champion is not None:
        yield from _champion(stage, test, champion)


def learned_from(stage: Stage, run: str) -> pd.DataFrame:
    """Rows of all images that a run's training could see."""
    index = read_index(stage.local(f"{run}/preprocess/{INDEX}").parent)
    splits = [split for split in index.splits if split not in HELD_OUT]
    return pd.concat([_rows(stage, run, split)[["digest", "patient"]] for split in splits], ignore_index=True)


def _rows(stage: Stage, run: str, split: str) -> pd.DataFrame:
    """The table alone: the images, which may be hundreds of gigabytes, are not fetched."""
    return read_rows(stage.local(f"{run}/preprocess/{split}.parquet").parent, split)


def _champion(stage: Stage, test: pd.DataFrame, version: int) -> Iterator[Criterion]:
    """The champion's own training data, as far as its run is still there."""
    run = registry.run_of(stage.config, version)
    try:
        if not storage.exists(f"{run}/preprocess/result.json"):
            raise DataError("its run is not there any more")
        rows = learned_from(stage, run)
    except DataError as error:
        reason = f"not judged: the training data of version {version} cannot be read: {error}"
        yield Criterion(name="test images the champion trained on", rule="at most", limit=0, passed=None, reason=reason)
        return
    yield from _strangers(test, rows, "the champion trained on")


def _strangers(test: pd.DataFrame, learned: pd.DataFrame, by_whom: str) -> Iterator[Criterion]:
    """No image and no patient in common; images without a patient are compared as images alone."""
    for column, what in (("digest", "images"), ("patient", "patients")):
        common = (set(test[column]) & set(learned[column])) - {""}
        reason = f"{len(common)} {what} of the test set were {by_whom}" if common else ""
        if common and by_whom != "trained on":
            reason = f"{len(common)} {what} of the test set are among those that {by_whom}"
        name = f"test {what} {by_whom}"
        yield Criterion(name=name, rule="at most", limit=0, value=float(len(common)), passed=not common, reason=reason)
