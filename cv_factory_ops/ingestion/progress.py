"""How far a long piece of work is: a bar at a terminal, lines of log elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

log = logging.getLogger("cvf")

T = TypeVar("T")


def with_progress(items: Iterable[T], total: int | None, task: str, unit: str = "image") -> Iterator[T]:
    """The same items. Lines of log come about every tenth, and no more than one in five seconds; where no ``total`` is known,
    whenever there is a tenth more."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(items, total=total, desc=task, unit=unit, mininterval=1, leave=False)
        return
    started = said = time.monotonic()
    logged = 0
    for done, item in enumerate(items, start=1):
        yield item
        if done - logged >= (total or done) / 10 and time.monotonic() - said >= 5:
            logged, said = done, time.monotonic()
            rate = done / (said - started)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            log.info("%s: %d%s %ss, %.0f/s%s", task, done, f" of {total}" if total else "", unit, rate, left)
