"""Waiting for captured requests, and counting them cheaply enough to look every few seconds."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator
from airflow.sdk.exceptions import AirflowFailException
from pydantic import ValidationError

from cv_factory_airflow import run_uri, stored
from cv_factory_airflow.operators import form_settings, load_project
from cv_factory_ops.records import Cursor, Reading, is_hour

if TYPE_CHECKING:
    from airflow.sdk import Context

# The verify stage's own requests, which no drift check sees. The library names them captures.PROBE, which brings its storage
# clients along: too much for a DAG file. Whole lines are not decoded, as each holds an image.
PROBE = re.compile(rb'"inferenceId": ?"verify-')
Item = dict[str, Any]
"""A file or folder as fsspec lists it: its path as ``name``, ``type``, ``size``."""


class CaptureWindowSensor(BaseSensorOperator):
    """Wait until the endpoint has captured a full drift window since the last check.

    It looks once at the start and then waits in the triggerer. After ``drift.wait_minutes`` it succeeds with what there
    is: the drift stage then records that there was not enough data, which is an answer, not a failure.

    :param config: the project's YAML; a relative path is relative to ``CVF_HOME``
    :param data: replaces ``data.source.path``, as in the stages of the same DAG run
    :param overrides: further settings as a JSON object, ``{"drift.window": 20}``
    """

    template_fields: Sequence[str] = ("config", "data", "overrides")
    ui_color = "#fdeecb"

    def __init__(
        self,
        *,
        config: str = "{{ params.config }}",
        data: str = "{{ params.data or '' }}",
        overrides: str = "{{ params.overrides | tojson }}",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.config = config
        self.data = data
        self.overrides = overrides

    def execute(self, context: Context) -> dict[str, int]:
        from cv_factory_airflow.triggers import CaptureWindowTrigger

        _, project = load_project(self.config, form_settings(self.data, self.overrides))
        dag_run = context["dag_run"]
        captures = f"{project.root}/captures/{project.endpoint_name}"
        start, end = check_window(project.root, run_uri(project.root, dag_run.dag_id, dag_run.run_id))
        found, window = CaptureLog(captures, start, end).count(), project.drift.window
        if end is None and found < window:
            self.log.info(
                "%d of %d requests captured behind %s; waiting up to %g minutes",
                found,
                window,
                start.last or "the beginning",
                project.drift.wait_minutes,
            )
            deadline = time.time() + 60 * project.drift.wait_minutes
            self.defer(trigger=CaptureWindowTrigger(captures, start, window, deadline), method_name="window_ready")
        return self.window_ready(context, {"requests": found})

    def window_ready(self, context: Context, event: dict[str, int]) -> dict[str, int]:
        """What comes of waiting: the number of requests, whether or not the window is full."""
        self.log.info("%d requests captured for the drift check", event["requests"])
        return event


class CaptureLog:
    """How many requests of consumers lie where a drift check would read an endpoint's capture log: also those that it leaves
    out because they were refused, answered by another model, or are broken. To know that, they would have to be decoded.

    The log is ``<captures>/<variant>/yyyy/mm/dd/hh/<file>.jsonl`` with a request a line. A file is read again only when its
    size has changed, and never what the check does not read.
    """

    def __init__(self, captures: str, start: Reading, end: Reading | None = None) -> None:
        self.folder = stored(captures)
        self.start, self.end = start, end
        self._counted: dict[str, tuple[int, int]] = {}

    def count(self) -> int:
        """Requests from start to end, or to now."""
        if not self.folder.exists():
            return 0
        return sum(
            self._count_file(f"{hour}/{_name(variant)}/{_name(file)}", file)
            for variant in self._folders(self.folder.path)
            for hour, folder in self._hours(variant)
            for file in self._listed(folder)
            if file["type"] == "file" and _name(file).endswith(".jsonl")
        )

    def _hours(self, variant: Item) -> Iterator[tuple[str, str]]:
        """Names and paths of those of the floor and later; of the years, months and days before it nothing is listed."""
        found = [("", variant["name"])]
        for _ in ("year", "month", "day", "hour"):
            below = [
                (f"{name}/{_name(item)}".lstrip("/"), item["name"]) for name, path in found for item in self._folders(path)
            ]
            found = [(name, path) for name, path in below if name >= self.start.floor[: len(name)]]
        return ((name, path) for name, path in found if is_hour(name))

    def _folders(self, path: str) -> list[Item]:
        return [item for item in self._listed(path) if item["type"] == "directory"]

    def _listed(self, path: str) -> list[Item]:
        items: list[Item] = self.folder.fs.ls(path, detail=True, refresh=True)  # s3fs would keep a listing for ever
        return items

    def _count_file(self, file: str, item: Item) -> int:
        start, size = self.start.of(file), int(item["size"])
        end = min(size, self.end.of(file)) if self.end else size
        if self._counted.get(file, (-1, 0))[0] != end:
            self._counted[file] = (end, self._count_requests(item["name"], start, end) if start < end else 0)
        return self._counted[file][1]

    def _count_requests(self, path: str, start: int, end: int) -> int:
        """Lines that begin in these bytes, line by line, as images may be large."""
        found = 0
        with self.folder.fs.open(path, "rb") as file:
            file.seek(start)
            for line in file:
                if start >= end:
                    break
                is_whole = line.endswith((b"\n", b"}"))  # else it is still being written
                found += is_whole and bool(line.strip()) and not PROBE.search(line)
                start += len(line)
        return found


def _name(item: Item) -> str:
    return str(item["name"]).rsplit("/", 1)[1]


def check_window(root: str, run: str) -> tuple[Reading, Reading | None]:
    """What the drift check of a run begins behind and, where an earlier try of it has settled that, ends at: as the stage
    itself finds it, by ``<root>/drift/cursor.json`` and the ``window.json`` of checks that have a verdict.

    Raises:
        AirflowFailException: one of them is broken; a retry would change nothing.
    """
    if _has_verdict(run):
        own = _cursor(f"{run}/drift/window.json")
        return own.start, own.end
    if not stored(f"{root}/drift/cursor.json").exists():
        return Reading(), None
    cursor = _cursor(f"{root}/drift/cursor.json")
    return cursor.window(run, _has_verdict(cursor.run))


def _cursor(uri: str) -> Cursor:
    try:
        return Cursor.model_validate_json(stored(uri).read_bytes())
    except ValidationError:
        raise AirflowFailException(f"{uri}: is not a cursor; expected the fields run, start and end") from None


def _has_verdict(run: str) -> bool:
    return all(stored(f"{run}/drift/{name}").exists() for name in ("window.json", "result.json"))
