"""Video files and camera streams as a source: frames sampled by time, kept without loss as PNG."""

from __future__ import annotations

import itertools
import logging
import os
import posixpath
import re
import tempfile
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri
from cv_factory_ops.config.sources import VideoSource
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import ConfigError, DataError, Rejected, Unavailable
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.sources.inbox import Inbox

log = logging.getLogger("cvf")

VIDEOS = (
    *(".3gp", ".asf", ".avi", ".flv", ".h264", ".h265", ".m2ts", ".m4v", ".mjpeg", ".mjpg", ".mkv", ".mov", ".mp4", ".mpeg"),
    *(".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
)
"""Files that are opened: FFmpeg would take a text or a picture for a video, too."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds before a dropped stream is opened again; doubled with each time in a row."""


def fetch_frames(source: VideoSource, inbox: Inbox) -> None:
    """Store a frame every ``every_seconds``: ``<file>/<version>/<ms>.png`` of a file, ``stream/<UTC time>.png`` of a stream.

    All frames of a video are of one patient. A video that was read to its end is not opened again unless it has changed; then
    the frames of what it was before are removed.

    Raises:
        ConfigError: a variable of the stream's address is not set.
        DataError: there is no video that could be read.
        Unavailable: the stream stays away; what was recorded is kept.
    """
    if "://" in source.path and not source.path.startswith(("file://", "s3://")):
        _record(source, inbox)
        return
    uri = as_uri(source.path)
    videos = list(_videos(uri))
    if not videos:
        raise DataError(f"{uri}: holds no videos; looked for {', '.join(VIDEOS)}")
    for file, name, version in videos:
        folder = f"{name}/{storage.text_digest(version)[:8]}"
        mark = storage.join(inbox.uri, f"{folder}/finished")
        if storage.exists(mark):
            continue
        _forget_others(name, folder, inbox)
        try:
            with tempfile.TemporaryDirectory() as below:
                _sample(storage.local(file, Path(below)), folder, pseudonym(name, "video"), source.every_seconds * 1000, inbox)
        except Rejected as error:
            if len(videos) == 1:
                raise DataError(f"{file}: {error}") from None
            inbox.refuse(name, error.code, str(error), for_now=True)
        else:
            storage.write_bytes(mark, b"")


def _forget_others(name: str, folder: str, inbox: Inbox) -> None:
    """Remove what the inbox has of other versions of a video."""
    for other in inbox.folders(name) - {folder}:
        inbox.forget(other)


def _videos(uri: str) -> Iterator[tuple[str, str, str]]:
    """URI, name and mark of change of a video file, or of those below a directory or prefix."""
    for below, version in storage.versions(uri):
        file = uri if below in {"", "."} else storage.join(uri, below)
        name = posixpath.basename(uri) if file == uri else below
        if name.lower().endswith(VIDEOS) and not posixpath.basename(name).startswith("."):
            yield file, name, version


def _sample(path: Path, folder: str, patient: str, every: float, inbox: Inbox) -> None:
    """The first frame at or after each multiple of ``every`` milliseconds.

    Raises:
        Rejected: ``not_video``: it holds no frame that can be decoded.
    """
    import cv2

    taken, due = 0, 0.0
    with _opened(str(path)) as capture:
        frames = round(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        for at in with_progress(_times(capture), frames if frames > 0 else None, "video", "frame"):
            if at + 0.5 < due:  # times are rounded to the file's time base
                continue
            frame = f"{folder}/{round(at):09d}.png"
            if frame in inbox or _put(capture, frame, patient, inbox):
                taken, due = taken + 1, ((at + 0.5) // every + 1) * every
    if not taken:
        raise Rejected("not_video", "holds no frame that can be decoded")


def _times(capture: Any) -> Iterator[float]:
    """Presentation times of the frames in ms, each of which can be retrieved then; by their number where the file has none."""
    import cv2

    rate, last = capture.get(cv2.CAP_PROP_FPS) or 25.0, -1.0
    for index in itertools.count():
        if not capture.grab():
            return
        told = capture.get(cv2.CAP_PROP_POS_MSEC)
        last = told if told > last else max(last, index * 1000 / rate)
        yield last


def _record(source: VideoSource, inbox: Inbox) -> None:
    """A frame every ``every_seconds`` of wall-clock time."""
    patient, due = pseudonym(source.path, "video"), 0.0
    for capture in with_progress(_live(source), None, "video", "frame"):
        now = time.monotonic()
        if now >= due and _put(capture, f"stream/{datetime.now(UTC):%Y%m%dT%H%M%S.%fZ}.png", patient, inbox):
            due = now + source.every_seconds


def _live(source: VideoSource) -> Iterator[Any]:
    """The open stream, once for each frame that arrives, until ``max_seconds`` are over; where it drops it is opened again."""
    address, end, failures = _expanded(source.path), time.monotonic() + source.max_seconds, 0
    while True:
        with _opened(address, source.timeout) as capture:
            while time.monotonic() < end and capture.grab():
                failures = 0
                yield capture
        if time.monotonic() >= end:
            return
        failures += 1
        if failures > source.reconnects:
            raise Unavailable(f"{_shown(address)}: the stream ended or does not answer; what was recorded is kept")
        log.info("video: %s has dropped, opening it again (%d of %d)", _shown(address), failures, source.reconnects)
        wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
        time.sleep(max(0.0, min(wait, end - time.monotonic())))


@contextmanager
def _opened(address: str, timeout: float = 60) -> Iterator[Any]:
    """A file or stream by FFmpeg; one that cannot be opened has no frames. FFmpeg's own log may hold addresses: it is off."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    limit = round(timeout * 1000)
    capture = cv2.VideoCapture(
        address, cv2.CAP_FFMPEG, [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    )
    try:
        yield capture
    finally:
        capture.release()


def _put(capture: Any, name: str, patient: str, inbox: Inbox) -> bool:
    """Store the frame that the capture is at; False where it cannot be decoded."""
    import cv2

    decoded, image = capture.retrieve()
    if decoded:
        inbox.put(name, cv2.imencode(".png", image)[1].tobytes(), patient=patient, content_type="image/png")
    return bool(decoded)


def _expanded(path: str) -> str:
    """A stream's address with ``${NAME}`` replaced from the environment; what is not allowed in an address is escaped."""

    def value(found: re.Match[str]) -> str:
        if (given := os.environ.get(found[1])) is None:
            raise ConfigError(f"data.source.path: the variable {found[1]} is not set")
        return urllib.parse.quote(given, safe="")

    return re.sub(r"\$\{(\w+)\}", value, path)


def _shown(address: str) -> str:
    """An address without user, password and query."""
    parts = urllib.parse.urlsplit(address)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
