"""The window of a drift check: the captures that no check has consumed yet, each consumed by exactly one finished check.

    report written to the stage's private folder -> cursor moved -> folder published with window.json and result.json

The cursor (:class:`cv_factory_ops.records.Cursor`) holds how far each file of the last hours was read, so that a file that
arrives behind a newer one is not missed. It names the run that moved it and the window that it moved over, so that kill -9 is
safe between any two steps: the same run, retried, takes the same window again; where that run never finished, the next check
takes its captures in.

Memory does not grow with the log: lines are read one at a time, and of the answers a uniform sample is kept.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TextIO

from pydantic import ValidationError

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import missing_to_nan
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import Kind
from cv_factory_ops.drift.answers import WINDOW, Answers
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import Cursor, DriftRecord, Quality, Reading
from cv_factory_ops.stage import Stage, record_digest

log = logging.getLogger("cvf")

QUARANTINE = "quarantine.jsonl"
Row = dict[str, str | float]


class Sample:
    """Of all rows that were offered, ``size`` ones that are each as likely to be kept (Vitter 1985, algorithm R)."""

    def __init__(self, size: int, seed: str) -> None:
        self.rows: list[tuple[Row, str, int]] = []
        """Features, position of the capture, and which of its predictions it is."""
        self.offered = 0
        self._size, self._random = size, Random(seed)  # noqa: S311 - a sample, not a secret

    def offer(self, row: Row, position: str, number: int) -> None:
        self.offered += 1
        if len(self.rows) < self._size:
            self.rows.append((row, position, number))
        elif (place := int(self._random.random() * self.offered)) < self._size:
            self.rows[place] = (row, position, number)


class Quarantine:
    """What cannot be read, by position and reason; never what it holds."""

    def __init__(self, file: TextIO) -> None:
        self.lines = 0
        """Those that are no captures."""
        self._file = file

    def broken(self, position: str, reason: str) -> None:
        self.lines += 1
        self.note(position, f"is not a capture record ({reason})")

    def note(self, position: str, reason: str) -> None:
        self._file.write(json.dumps({"position": position, "reason": reason}) + "\n")


@dataclass
class Window:
    """What the captures of a check hold."""

    cursor: Cursor | None
    """The cursor as it was when the window was read."""
    start: Reading
    end: Reading
    settled: bool
    """An earlier try of this run has moved the cursor over it."""
    previous: str
    """URI of the run of the last finished check before it; empty at the first."""
    sample: Sample
    answers: Answers
    """Of the champion, for the labels that arrive."""
    requests: int = 0
    """Captures answered by the champion."""
    foreign: int = 0
    """Captures answered by another bundle, as during a rollout; left out."""
    unreadable: int = 0
    """Captures whose answer is not an answer of ours; left out."""
    quarantined: int = 0
    """Lines that are no captures."""
    refused: Counter[str] = field(default_factory=Counter)
    """Captures of a refusal, by its code; left out."""
    missing: Counter[str] = field(default_factory=Counter)
    """Answers that lack a feature."""

    @property
    def rows(self) -> list[Row]:
        """Features of the sample, in the terms of the bundle's reference."""
        return [row for row, _, _ in self.sample.rows]

    @property
    def quality(self) -> Quality:
        answers = max(self.sample.offered, 1)
        return Quality(
            foreign=self.foreign,
            unreadable=self.unreadable,
            quarantined=self.quarantined,
            refused=dict(self.refused),
            missing={name: round(count / answers, 6) for name, count in self.missing.items()},
        )

    @property
    def left_out(self) -> str:
        """The captures that do not count, in words; empty where there are none."""
        parts = [
            f"; {count} {what} left out"
            for count, what in (
                (self.foreign, "answers of another model"),
                (self.unreadable, "unreadable answers"),
                (sum(self.refused.values()), "refused requests"),
                (self.quarantined, "broken lines"),
            )
            if count
        ]
        return "".join(parts)


def fingerprint(stage: Stage) -> str:
    """A verdict stands, and is found by what it was asked behind; "not enough data" is asked again, as more may have come."""
    published = _published(stage)
    if published is None:
        return ""
    return record_digest(stage.run, DriftRecord.stage) if published.verdict == "not enough data" else published.asked


def read_window(stage: Stage, bundle_digest: str, kinds: Mapping[str, Kind], labels: Sequence[str] = ()) -> Window:
    """The window of this run; ``kinds`` are the features of the champion's bundle, ``labels`` its classes where their late
    labels are asked for. What cannot be read is noted in ``quarantine.jsonl`` of the stage's folder, by position and reason.

    Raises:
        DataError: the cursor cannot be read.
    """
    config, cursor = stage.config, read_cursor(stage.config)
    start, until, previous = _bounds(stage, cursor)
    sample = Sample(config.drift.sample, stage.run)
    window = Window(cursor, start, start, until is not None, previous, sample, Answers(labels))
    read: dict[str, int] = {}
    stage.out.mkdir(parents=True, exist_ok=True)
    with (stage.out / QUARANTINE).open("w", encoding="utf-8") as file:
        quarantine = Quarantine(file)
        for name, first, end in captures.unread(config, start, until):
            for behind, capture in captures.read_file(config, name, first, end, quarantine.broken):
                read[name] = behind
                if capture:
                    _add(window, capture, bundle_digest, kinds, quarantine)
    window.quarantined = quarantine.lines
    window.end = until or start.advanced(read, config.drift.late_hours)
    if found := window.quarantined + window.unreadable:
        log.warning("captures: %d could not be read, see %s", found, stage.uri(QUARANTINE))
    return window


def consume(stage: Stage, window: Window) -> None:
    """Move the cursor over the window; nothing where an earlier try of this run has done so.

    Raises:
        Unavailable: another check has moved it since, or that one has finished after all whose captures this one took over; a
            retry takes what is left.
    """
    moved = Cursor(run=stage.run, start=window.start, end=window.end, previous=window.previous).model_dump_json(indent=2)
    (stage.out / WINDOW).write_text(moved, encoding="utf-8")
    window.answers.save(stage.out)
    if window.settled:
        return
    if _bounds(stage, window.cursor)[0] != window.start or not _move(_cursor_uri(stage.config), window.cursor, moved.encode()):
        raise Unavailable(f"{_cursor_uri(stage.config)}: another drift check has moved it meanwhile; try again")


def _move(uri: str, expected: Cursor | None, moved: bytes) -> bool:
    """Whether the cursor was as expected, and is moved now."""
    if expected is None:
        return storage.create_bytes(uri, moved)
    present = storage.read_bytes(uri)
    return _parsed(uri, present) == expected and storage.replace_bytes(uri, present, moved)


def read_cursor(config: ProjectConfig) -> Cursor | None:
    """Where the last check has stopped; None before the first.

    Raises:
        DataError: the file is not a cursor.
    """
    return _read_cursor(_cursor_uri(config))


def _read_cursor(uri: str) -> Cursor | None:
    return _parsed(uri, storage.read_bytes(uri)) if storage.exists(uri) else None


def _parsed(uri: str, content: bytes) -> Cursor:
    try:
        return Cursor.model_validate_json(content)
    except ValidationError:
        raise DataError(f"{uri}: is not a cursor; expected the fields run, start and end") from None


def _cursor_uri(config: ProjectConfig) -> str:
    return f"{config.root}/drift/cursor.json"


def _bounds(stage: Stage, cursor: Cursor | None) -> tuple[Reading, Reading | None, str]:
    """What this run begins behind and, where an earlier try has settled that, ends at; and the finished check before it."""
    if _has_verdict(stage.run) and (own := _read_cursor(stage.uri(WINDOW))):
        return own.start, own.end, own.previous
    if cursor is None:
        return Reading(), None, ""
    finished = _has_verdict(cursor.run)
    return *cursor.window(stage.run, finished), cursor.before(stage.run, finished)


def _has_verdict(run: str) -> bool:
    """Whether a check has published one; on S3 the record comes last, and goes first."""
    return all(storage.exists(f"{run}/{DriftRecord.stage}/{name}") for name in (WINDOW, "result.json"))


def _published(stage: Stage) -> DriftRecord | None:
    """What this run has found before, when it is made to work again."""
    try:
        return stage.read(DriftRecord)
    except DataError:
        return None


def _add(
    window: Window, capture: captures.Capture, bundle_digest: str, kinds: Mapping[str, Kind], quarantine: Quarantine
) -> None:
    try:
        answer = json.loads(capture.answer)
        if "error" in answer and "code" in answer:
            window.refused[str(answer["code"])[:40]] += 1
            return
        ours, predictions = answer["bundle_digest"] == bundle_digest, answer["predictions"]
        rows = [missing_to_nan(prediction["features"], kinds) for prediction in predictions]
        if ours:
            window.answers.offer(capture.inference_id, predictions)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        quarantine.note(capture.position, f"its answer cannot be read ({type(error).__name__})")
        window.unreadable += 1
        return
    if not ours:
        window.foreign += 1
    elif rows:
        window.requests += 1
        for number, row in enumerate(rows):
            window.missing.update(name for name, value in row.items() if value != value or value == "missing")
            window.sample.offer(row, capture.position, number)
