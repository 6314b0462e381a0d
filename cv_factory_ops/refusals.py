"""What ended a run for good: ``<run>/refused.json``, from the stage that said no until that stage of the run ends well.

Which of a stage's errors end a run, is said by :attr:`cv_factory_ops.stage.Spec.final`. ``cvf retrain`` does not take such a
run up again, and the stage ``decide`` tells the reason where the same cause asks for another retraining.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from pydantic import ValidationError

from cv_factory_ops import storage
from cv_factory_ops.errors import CvFactoryError
from cv_factory_ops.records import Frozen

log = logging.getLogger("cvf")


class Refusal(Frozen):
    """Why a run did not become champion."""

    time: datetime
    """UTC."""
    stage: str
    """The one that refused it."""
    reason: str
    """One line for people."""


def keep(run: str, stage: str, reason: str) -> None:
    """Store why a run has ended; where that fails, the reason itself is still the one to end with."""
    refusal = Refusal(time=datetime.now(UTC), stage=stage, reason=reason)
    try:
        storage.write_bytes(_uri(run), refusal.model_dump_json(indent=2).encode())
    except CvFactoryError as error:
        log.warning("%s: was not kept: %s", _uri(run), error)


def take_back(run: str, stage: str) -> None:
    """Forget a stage's refusal: it has ended well since."""
    if (refusal := refusal_of(run)) and refusal.stage == stage:
        storage.delete_tree(_uri(run))


def is_refused(run: str) -> bool:
    return storage.exists(_uri(run))


def refusal_of(run: str) -> Refusal | None:
    """Why a run has ended; None where it has not, or, with a warning, where that cannot be read."""
    if not is_refused(run):
        return None
    try:
        return Refusal.model_validate_json(storage.read_bytes(_uri(run)))
    except ValidationError as error:
        log.warning("%s: is not a refusal; wrong at %s", _uri(run), error.errors()[0]["loc"])
        return None


def _uri(run: str) -> str:
    return f"{run}/refused.json"
