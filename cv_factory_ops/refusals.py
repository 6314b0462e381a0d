"""Retrainings that were refused: why, and against which champion. The stage ``decide`` reads them.

``<project>/refusals/<UTC time>-<run and stage>.json`` holds a :class:`RefusedRetraining`. It is written where a stage of a run
with captured studies (``data.include_captures``) ends with exit code 4: the gate, a person asked for approval, or a rollout
that may not go on. Champion and endpoint are as they were then; the next drift check meets the same champion and the same
drift, and without more data than the refused retraining had, another one would end in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

from pydantic import ValidationError

from cv_factory_ops import audit, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import Frozen


class RefusedRetraining(Frozen):
    """Why a retraining did not become champion."""

    time: datetime
    """UTC."""
    run: str
    """URI of the run."""
    stage: str
    """The one that refused it."""
    reason: str
    """One line for people."""
    champion_digest: str
    """Of the bundle that was champion then; empty where there was none."""


def keep(config: ProjectConfig, run: str, stage: str, reason: str) -> None:
    """Store that a retraining was refused; a stage that is repeated is refused once."""
    name = storage.text_digest(f"{run} {stage}")[:12]
    if any(known.endswith(f"-{name}.json") for known in storage.listing(_folder(config))):
        return
    champion = audit.champion(config)
    digest = champion.bundle_digest if champion else ""
    refused = RefusedRetraining(time=datetime.now(UTC), run=run, stage=stage, reason=reason, champion_digest=digest)
    uri = f"{_folder(config)}/{_stamp(refused.time)}-{name}.json"
    storage.write_bytes(uri, refused.model_dump_json(indent=2).encode())


def refusal_of(config: ProjectConfig, decided: datetime, champion_digest: str) -> RefusedRetraining | None:
    """Why the retraining that was decided on then was refused, None where it was not (yet): the first refusal since, while the
    champion was the bundle whose drift had led to it.

    Raises:
        DataError: a stored refusal cannot be read.
    """
    return next((refused for refused in _since(config, decided) if refused.champion_digest == champion_digest), None)


def _since(config: ProjectConfig, time: datetime) -> Iterator[RefusedRetraining]:
    for name in storage.listing(_folder(config), after=_stamp(time)):
        uri = f"{_folder(config)}/{name}"
        try:
            yield RefusedRetraining.model_validate_json(storage.read_bytes(uri))
        except ValidationError as error:
            raise DataError(f"{uri}: is not a refused retraining; wrong at {error.errors()[0]['loc']}") from None


def _folder(config: ProjectConfig) -> str:
    return f"{config.root}/refusals"


def _stamp(time: datetime) -> str:
    """Sortable."""
    return time.astimezone(UTC).strftime("%Y%m%dT%H%M%S%f")
