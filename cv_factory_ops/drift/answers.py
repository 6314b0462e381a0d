"""The champion's answers of each window, kept in its check's folder: so a label counts whenever it arrives, also when the check
that has read its capture is long over.

``answers.npz`` holds, of each answer about one image, 64 bits of a digest of its inference id, and the probabilities: 24 bytes
where there are two classes.
"""

from __future__ import annotations

import hashlib
import io
import logging
from array import array
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.metrics import Labels
from cv_factory_ops.records import HOUR, Cursor, DriftRecord
from cv_factory_ops.stage import read_result

log = logging.getLogger("cvf")

ANSWERS, WINDOW = "answers.npz", "window.json"
Keys = NDArray[np.uint64]
Probabilities = NDArray[np.float64]
Part = tuple[Keys, Probabilities]
"""(N,) and (N, classes) of one window."""


class Answers:
    """Those of a window: a million of two classes take some 24 MiB."""

    def __init__(self, classes: Sequence[str]) -> None:
        """Without classes nothing is kept."""
        self.classes = classes
        self._keys, self._probabilities = array("Q"), array("d")

    def offer(self, inference_id: str, predictions: Sequence[Mapping[str, Any]]) -> None:
        """An answer about one image; a label of a request with several says not which one is meant."""
        if self.classes and len(predictions) == 1:
            self._probabilities.extend([float(predictions[0]["scores"][name]) for name in self.classes])
            self._keys.append(_key(inference_id))

    @property
    def part(self) -> Part:
        shape = len(self._keys), max(len(self.classes), 1)
        return np.array(self._keys, np.uint64), np.array(self._probabilities, np.float64).reshape(shape)

    def save(self, folder: Path) -> None:
        keys, probabilities = self.part
        np.savez(folder / ANSWERS, keys=keys, probabilities=probabilities)


def labelled(config: ProjectConfig, answers: Answers, end: str, previous: str, digest: str) -> tuple[Labels, Probabilities]:
    """(N,) labels and (N, classes) probabilities of all answers of a champion that have a label by now, of a window that ends
    at ``end`` and of those before it, as far back as ``drift.label_days``; ``previous``: the run of the check before it."""
    if not answers.classes:
        return np.array([], np.int64), answers.part[1]
    newest = min(datetime.strptime(end[:13], HOUR), datetime.now(UTC).replace(tzinfo=None))  # a clock may be wrong
    since = newest - timedelta(days=config.drift.label_days)
    arrived = captures.read_labels(config, after=since.strftime("%Y%m%dT%H"))  # no label comes before its capture
    numbers = {name: number for number, name in enumerate(answers.classes)}
    known = {_key(name): numbers[label] for name, label in arrived.items() if label in numbers}
    found = [_joined(part, known) for part in (answers.part, *_earlier(previous, digest, since.strftime(HOUR)))]
    return np.concatenate([labels for labels, _ in found]), np.concatenate([probabilities for _, probabilities in found])


def _key(inference_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(inference_id.encode(), digest_size=8).digest())


def _joined(part: Part, known: Mapping[int, int]) -> tuple[Labels, Probabilities]:
    keys, probabilities = part
    has_label = np.isin(keys, np.fromiter(known, np.uint64, len(known)))
    return np.array([known[key] for key in keys[has_label].tolist()], np.int64), probabilities[has_label]


def _earlier(run: str, digest: str, since: str) -> Iterator[Part]:
    """The answers of finished checks, newest first, back to another champion's or to an hour."""
    while run:
        folder = f"{run}/{DriftRecord.stage}"
        try:
            record = DriftRecord.model_validate(read_result(run, DriftRecord.stage).record)
            run = Cursor.model_validate_json(storage.read_bytes(f"{folder}/{WINDOW}")).previous
            if record.bundle_digest != digest or record.window_end < since:
                return
            with np.load(io.BytesIO(storage.read_bytes(f"{folder}/{ANSWERS}"))) as kept:
                yield kept["keys"], kept["probabilities"]
        except (DataError, ValidationError) as error:
            log.warning("late labels: those of %s and before are not measured (%s)", folder, type(error).__name__)
            return
