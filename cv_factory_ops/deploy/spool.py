"""Data capture that survives a crash: a line is on disk before its answer leaves, and at its destination a second later.

    <spool>/<digest of the destination>/destination                     its URI, <DestinationS3Uri>/<endpoint>/<variant>
    <spool>/<digest of the destination>/<yyyy>/<mm>/<dd>/<hh>/<mm-ss-ffffff>-<uuid>.jsonl

File names sort by the time of writing, and files arrive in that order: a reader that goes on behind the last file it has
seen misses nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import uuid
from datetime import UTC, datetime, timedelta
from io import FileIO
from pathlib import Path

from cv_factory_ops import storage
from cv_factory_ops.errors import CvFactoryError

log = logging.getLogger("cvf")

MOVE_SECONDS = 0.5
RETRY_SECONDS = 10


class Spool:
    """Lines on their way to their destinations; one background thread moves the files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, FileIO] = {}
        self._lock = threading.Lock()
        self._latest = datetime.min.replace(tzinfo=UTC)
        self._closing = threading.Event()
        self._mover = threading.Thread(target=self._run, name="capture", daemon=True)
        folder.mkdir(parents=True, exist_ok=True)
        self._mover.start()

    def write(self, destination: str, line: str) -> None:
        """Append one line for a destination; it survives the end of this process once this returns.

        Raises:
            OSError, CvFactoryError: it could not be written, and left nothing; the next one may be.
        """
        with self._lock:
            if destination not in self._open:
                self._open[destination] = self._new_file(destination)
            _append(self._open[destination], line.encode() + b"\n")

    def close(self) -> None:
        """Move what is left and end the thread."""
        self._closing.set()
        self._mover.join()

    def _new_file(self, destination: str) -> FileIO:
        place = self._folder / storage.text_digest(destination)[:16]
        if not (place / "destination").exists():
            storage.write_bytes((place / "destination").resolve().as_uri(), destination.encode())
        self._latest = max(datetime.now(UTC), self._latest + timedelta(microseconds=1))
        path = place / f"{self._latest:%Y/%m/%d/%H/%M-%S-%f}-{uuid.uuid4()}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path.open("ab", buffering=0)  # nothing is left to be written, and to fail, when it is closed

    def _run(self) -> None:
        pause, last = 0.0, False  # what an earlier process left behind goes first
        while not last:
            last = self._closing.wait(pause)
            try:
                pause = MOVE_SECONDS if self._move() else RETRY_SECONDS
            except Exception as error:  # without this thread, no later capture would arrive either
                log.warning("captures: kept in %s for now: %s", self._folder, type(error).__name__)
                pause = RETRY_SECONDS

    def _move(self) -> bool:
        """Hand over every file; of a destination that refuses one, the later files wait behind it."""
        with self._lock:
            for file in self._open.values():
                with contextlib.suppress(OSError):  # a disk may report a lost write as late as here
                    file.close()
            self._open.clear()
            files = sorted(self._folder.glob("*/*/*/*/*/*.jsonl"), key=lambda path: path.relative_to(path.parents[4]))
        refused: set[Path] = set()
        for path in files:
            place = path.parents[4]
            if place in refused:
                continue
            try:
                destination = (place / "destination").read_text(encoding="utf-8")
                storage.upload_file(path, f"{destination}/{path.relative_to(place).as_posix()}")
                self._remove(path)
            except (CvFactoryError, OSError) as error:
                log.warning("captures: kept in %s for now: %s", self._folder, error)
                refused.add(place)
        return not refused

    def _remove(self, path: Path) -> None:
        path.unlink()
        with self._lock, contextlib.suppress(OSError):  # not empty: a new file came meanwhile
            os.removedirs(path.parent)


def _append(file: FileIO, line: bytes) -> None:
    """Write a whole line or, where the disk is full, none of it: later lines go behind this one."""
    size = os.fstat(file.fileno()).st_size
    try:
        written = 0
        while written < len(line):
            written += file.write(line[written:])
    except OSError:
        file.truncate(size)
        raise
