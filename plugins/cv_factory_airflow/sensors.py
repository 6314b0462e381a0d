"""Waiting for captured requests, and counting them cheaply enough to look every few seconds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseSensorOperator

from cv_factory_airflow import run_uri, stored
from cv_factory_airflow.operators import form_settings, load_project

if TYPE_CHECKING:
    from airflow.sdk import Context, ObjectStoragePath

# The verify stage's own requests, which no drift check sees. The library names them captures.PROBE, which brings its storage
# clients along: too much for a DAG file. Whole lines are not decoded, as each holds an image.
PROBE = re.compile(rb'"inferenceId": ?"verify-')


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
        after = consumed_position(project.root, run_uri(project.root, dag_run.dag_id, dag_run.run_id))
        found, window = CaptureLog(captures, after).count(), project.drift.window
        if found < window:
            self.log.info(
                "%d of %d requests captured behind %s; waiting up to %g minutes",
                found,
                window,
                after or "the beginning",
                project.drift.wait_minutes,
            )
            deadline = time.time() + 60 * project.drift.wait_minutes
            self.defer(trigger=CaptureWindowTrigger(captures, after, window, deadline), method_name="window_ready")
        return self.window_ready(context, {"requests": found})

    def window_ready(self, context: Context, event: dict[str, int]) -> dict[str, int]:
        """What comes of waiting: the number of requests, whether or not the window is full."""
        self.log.info("%d requests captured for the drift check", event["requests"])
        return event


class CaptureLog:
    """How many requests of consumers lie behind a position of an endpoint's capture log.

    The log is ``<captures>/<variant>/yyyy/mm/dd/hh/<file>.jsonl`` with a request a line; a position is
    ``yyyy/mm/dd/hh/<file>.jsonl#<line>``, and what has a greater one lies behind it. A file is read again only when its size
    has changed.
    """

    def __init__(self, captures: str, after: str = "") -> None:
        self.folder = stored(captures)
        self.after_file, _, self.after_line = after.partition("#")
        self._counted: dict[str, tuple[int, int]] = {}

    def count(self) -> int:
        """Requests behind the position, now."""
        if not self.folder.exists():
            return 0
        return sum(self._count_file(path) for path in self.folder.rglob("*.jsonl"))

    def _count_file(self, path: ObjectStoragePath) -> int:
        place = "/".join(path.parts[-5:])  # without the variant: the hour, the file
        if place < self.after_file:
            return 0
        size = path.stat().st_size
        if self._counted.get(str(path), (-1, 0))[0] != size:
            seen = int(self.after_line) + 1 if place == self.after_file else 0
            requests = path.read_bytes().splitlines()[seen:]
            self._counted[str(path)] = (size, sum(not PROBE.search(request) for request in requests))
        return self._counted[str(path)][1]


def consumed_position(root: str, run: str) -> str:
    """Position up to which earlier drift checks of the project have consumed the log; empty before the first.

    ``<root>/drift/cursor.json`` holds the last check's run, start and end: for a repeated check of that same run, the start.
    """
    cursor = stored(f"{root}/drift/cursor.json")
    if not cursor.exists():
        return ""
    last = json.loads(cursor.read_text())
    return str(last["start"] if last["run"] == run else last["end"])
