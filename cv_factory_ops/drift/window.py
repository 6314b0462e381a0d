"""The window of a drift check: the captures behind the cursor, each consumed by exactly one finished check.

    report written to the stage's private folder -> cursor moved -> folder published with result.json

The cursor names the run that moved it and the window that it moved over, so that kill -9 is safe between any two steps: the
same run, retried, takes the same window again; where that run never finished, the next check takes its captures in.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from pydantic import ValidationError

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import missing_to_nan
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import Kind
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import DriftRecord, Frozen
from cv_factory_ops.stage import Stage, now

log = logging.getLogger("cvf")


class Cursor(Frozen):
    """``<project>/drift/cursor.json``."""

    run: str
    """URI of the run of the drift check that moved it."""
    start: str
    """Capture position before that check's window (exclusive)."""
    end: str
    """Capture position that its window ends at (inclusive)."""


@dataclass
class Window:
    """What was found behind the cursor."""

    cursor: Cursor | None
    """The cursor as it was when the window was read."""
    start: str
    """Position before the first capture (exclusive); empty at the first window."""
    end: str
    """Position of the last capture."""
    settled: bool
    """An earlier try of this run has moved the cursor over it."""
    requests: int = 0
    """Captures answered by the champion."""
    foreign: int = 0
    """Captures answered by another bundle, as during a rollout; left out."""
    unreadable: int = 0
    """Captures whose answer is not an answer of ours; left out."""
    rows: list[dict[str, str | float]] = field(default_factory=list)
    """Features of each prediction, in the terms of the bundle's reference."""

    @property
    def left_out(self) -> str:
        """The captures that do not count, in words; empty where there are none."""
        parts = [
            f"; {count} {what} left out"
            for count, what in ((self.foreign, "answers of another model"), (self.unreadable, "unreadable answers"))
            if count
        ]
        return "".join(parts)


def fingerprint(stage: Stage) -> str:
    """A verdict stands; "not enough data" is asked again, as more may have come."""
    published = _published(stage)
    return now(stage) if published and published.verdict == "not enough data" else ""


def read_window(stage: Stage, bundle_digest: str, kinds: dict[str, Kind]) -> Window:
    """The window of this run; ``kinds`` are the features of the champion's bundle.

    Raises:
        DataError: the cursor cannot be read.
    """
    cursor = read_cursor(stage.config)
    start, end = _bounds(stage, cursor)
    window = Window(cursor, start, start, settled=end is not None)
    for capture in _between(stage.config, start, end):
        window.end = capture.position
        _add(window, capture, bundle_digest, kinds)
    return window


def consume(stage: Stage, window: Window) -> None:
    """Move the cursor over the window; nothing where an earlier try of this run has done so.

    Raises:
        Unavailable: another check has moved it since; a retry takes what is left.
    """
    if window.settled:
        return
    if read_cursor(stage.config) != window.cursor:
        raise Unavailable(f"{_cursor_uri(stage.config)}: another drift check has moved it meanwhile; try again")
    cursor = Cursor(run=stage.run, start=window.start, end=window.end)
    storage.write_bytes(_cursor_uri(stage.config), cursor.model_dump_json(indent=2).encode())


def read_cursor(config: ProjectConfig) -> Cursor | None:
    """Where the last check has stopped; None before the first.

    Raises:
        DataError: the file is not a cursor.
    """
    uri = _cursor_uri(config)
    if not storage.exists(uri):
        return None
    try:
        return Cursor.model_validate_json(storage.read_bytes(uri))
    except ValidationError:
        raise DataError(f"{uri}: is not a cursor; expected the fields run, start and end") from None


def _cursor_uri(config: ProjectConfig) -> str:
    return f"{config.root}/drift/cursor.json"


def _bounds(stage: Stage, cursor: Cursor | None) -> tuple[str, str | None]:
    """Position before the window of this run and, where an earlier try has settled it, the one that it ends at."""
    if (published := _published(stage)) and published.verdict != "not enough data":
        return published.window_start, published.window_end
    if cursor is None:
        return "", None
    if cursor.run == stage.run:
        return cursor.start, cursor.end
    finished = storage.exists(f"{cursor.run}/drift/result.json")
    return (cursor.end if finished else cursor.start), None


def _published(stage: Stage) -> DriftRecord | None:
    """What this run has found before, when it is made to work again."""
    try:
        return stage.read(DriftRecord)
    except DataError:
        return None


def _between(config: ProjectConfig, start: str, end: str | None) -> Iterator[captures.Capture]:
    for capture in captures.read(config, after=start):
        if end is not None and capture.position > end:
            return
        yield capture


def _add(window: Window, capture: captures.Capture, bundle_digest: str, kinds: dict[str, Kind]) -> None:
    try:
        answer = json.loads(capture.answer)
        rows = [missing_to_nan(prediction["features"], kinds) for prediction in answer["predictions"]]
        ours = answer["bundle_digest"] == bundle_digest
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("capture %s: left out, its answer cannot be read (%s)", capture.position, type(error).__name__)
        window.unreadable += 1
        return
    if not ours:
        window.foreign += 1
    elif rows:
        window.requests += 1
        window.rows += rows
