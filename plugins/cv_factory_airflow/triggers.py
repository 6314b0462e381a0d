"""Waiting for a full window of captured requests, in the triggerer: no worker is kept busy."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from cv_factory_airflow.sensors import CaptureLog


class CaptureWindowTrigger(BaseTrigger):
    """Fires when ``window`` requests lie behind a position of the capture log, or at the deadline.

    :param captures: URI of the endpoint's captures
    :param after: position behind which requests count
    :param window: requests that make a window full
    :param deadline: Unix time at which it fires in any case
    :param poll_seconds: time between two looks
    """

    def __init__(self, captures: str, after: str, window: int, deadline: float, poll_seconds: float = 5.0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.captures = captures
        self.after = after
        self.window = window
        self.deadline = deadline
        self.poll_seconds = poll_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        names = ("captures", "after", "window", "deadline", "poll_seconds")
        return f"{type(self).__module__}.{type(self).__qualname__}", {name: getattr(self, name) for name in names}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        log = CaptureLog(self.captures, self.after)
        while (found := await asyncio.to_thread(log.count)) < self.window and (left := self.deadline - time.time()) > 0:
            await asyncio.sleep(min(self.poll_seconds, left))
        yield TriggerEvent({"requests": found})  # type: ignore[no-untyped-call]
