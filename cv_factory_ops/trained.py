"""Which training ended well last: ``<project>/trained.json``, for those who watch that trainings happen at all.

Looking through all runs for it would cost a question a run.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import ValidationError

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import Frozen


class LastTraining(Frozen):
    """A training whose bundle is made."""

    time: datetime
    """UTC."""
    run: str
    """URI of its run."""


def keep(config: ProjectConfig, run: str) -> None:
    """Tell that the training of a run has ended well now."""
    told = LastTraining(time=datetime.now(UTC), run=run)
    storage.write_bytes(_uri(config), told.model_dump_json(indent=2).encode())


def last(config: ProjectConfig) -> LastTraining | None:
    """None before the first.

    Raises:
        DataError: it is not what :func:`keep` writes.
    """
    if not storage.exists(_uri(config)):
        return None
    try:
        return LastTraining.model_validate_json(storage.read_bytes(_uri(config)))
    except ValidationError as error:
        raise DataError(f"{_uri(config)}: does not name a training; wrong at {error.errors()[0]['loc']}") from None


def _uri(config: ProjectConfig) -> str:
    return f"{config.root}/trained.json"
