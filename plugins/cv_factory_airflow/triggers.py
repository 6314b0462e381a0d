"""Waiting for a full window of captured requests, in the triggerer: no worker is kept busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from cv_factory_airflow.sensors import CaptureLog
from cv_factory_ops.records import Reading


class CaptureWindowTrigger(BaseTrigger):
    """Fires when ``window`` requests lie behind what drift checks have read, or at the deadline.

    :param captures: URI of the endpoint's captures
    :param start: how far they have read; a dictionary where the triggerer makes it anew
    :param window: requests that make a window full
    :param deadline: Unix time at which it fires in any case
    :param poll_seconds: time between two looks
    """

    def __init__(
        self, captures: str, start: Reading | dict[str, Any], window: int, deadline: float, poll_seconds: float = 5.0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.captures = captures
        self.start = Reading.model_validate(start)
        self.window = window
        self.deadline = deadline
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        settings = {name: getattr(self, name) for name in ("captures", "window", "deadline", "poll_seconds")}
        return f"{type(self).__module__}.{type(self).__qualname__}", {**settings, "start": self.start.model_dump()}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        log = CaptureLog(self.captures, self.start)
        while (found := await asyncio.to_thread(log.count)) < self.window and (left := self.deadline - time.time()) > 0:
            await asyncio.sleep(min(self.poll_seconds, left))
        yield TriggerEvent({"requests": found})  # type: ignore[no-untyped-call]
