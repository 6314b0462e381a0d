"""Files are read in processes of their own, each limited in time and memory: what breaks one costs one file, not the run."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from cv_factory_ops.config.data import ValidationConfig
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.processes import die_with, keep_memory

if TYPE_CHECKING:
    from pebble import ProcessFuture

R = TypeVar("R")
Batch = list[Item | Refusal]
Pending = tuple[Batch, "ProcessFuture[Any]"]

TOGETHER, BYTES_TOGETHER = 16, 8 << 20
"""Items, and bytes of items that hold their content, that are handed to a process at a time: handing over costs as much as
decoding a small image."""
AHEAD = 2
"""Such batches that are handed out for each process: enough to keep it busy, few enough to keep memory flat."""

_reader: Any = None


def read_all(
    items: Iterable[Item | Refusal],
    reader: Callable[[Any], Callable[[Sequence[Item]], Sequence[R]]],
    settings: Any,
    limits: ValidationConfig,
    workers: int | None,
) -> Iterator[R | Refusal]:
    """What ``reader(settings)(several items)`` makes of each item, in their order; ``reader`` is called once in each process.

    An item whose reading takes too long, too much memory, or ends its process becomes a refusal with the code ``too_slow``,
    ``too_large`` or ``crashed``.
    """
    with reading(reader, settings, limits, workers) as read:
        yield from read(items)


@contextmanager
def reading(
    reader: Callable[[Any], Callable[[Sequence[Item]], Sequence[R]]],
    settings: Any,
    limits: ValidationConfig,
    workers: int | None,
) -> Iterator[Callable[[Iterable[Item | Refusal]], Iterator[R | Refusal]]]:
    """:func:`read_all` for items that come by and by: the processes stay, starting them takes a second."""
    from pebble import ProcessPool

    count = workers or len(os.sched_getaffinity(0))
    # Not forked: this process may hold threads and connections that a copy of it must not touch.
    context = multiprocessing.get_context("spawn")
    arguments = (reader, settings, limits.max_memory, os.getpid())
    others = set(multiprocessing.active_children())
    pool = ProcessPool(max_workers=count, initializer=_start, initargs=arguments, context=context)

    def schedule(batch: Batch) -> Pending:
        return batch, pool.schedule(_read, (batch,), timeout=limits.max_seconds)

    def read(items: Iterable[Item | Refusal]) -> Iterator[R | Refusal]:
        pending: deque[Pending] = deque()
        for batch in _batches(items):
            pending.append(schedule(batch))
            if len(pending) >= AHEAD * count:
                yield from _results(pending.popleft(), schedule, limits)
        while pending:
            yield from _results(pending.popleft(), schedule, limits)

    try:
        yield read
    finally:
        pool.stop()  # type: ignore[no-untyped-call]
        for process in set(multiprocessing.active_children()) - others:
            process.kill()  # one that is still starting would print a traceback about the end of the pool
        pool.join()


def _batches(items: Iterable[Item | Refusal]) -> Iterator[Batch]:
    batch: Batch = []
    size = 0
    for item in items:
        batch.append(item)
        size += len(item.content) if isinstance(item, Item) and isinstance(item.content, bytes) else 0
        if len(batch) == TOGETHER or size >= BYTES_TOGETHER:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(reader: Callable[[Any], Callable[[Sequence[Item]], Any]], settings: Any, max_memory: int, parent: int) -> None:
    global _reader
    die_with(parent)
    keep_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the first one ends the others
    _reader = reader(settings)
    resource.setrlimit(resource.RLIMIT_DATA, (max_memory, max_memory))


def _read(batch: Batch) -> list[Any]:
    results = iter(_reader([item for item in batch if isinstance(item, Item)]))
    return [item if isinstance(item, Refusal) else next(results) for item in batch]


def _results(pending: Pending, schedule: Callable[[Batch], Pending], limits: ValidationConfig) -> Iterator[Any]:
    """Results of a batch; where it broke, of each of its items alone, so that only the one that is to blame is refused."""
    from pebble import ProcessExpired

    batch, future = pending
    try:
        yield from future.result()
        return
    except TimeoutError:
        broken = ("too_slow", f"takes longer than {limits.max_seconds:g} s to read")
    except MemoryError:
        broken = ("too_large", f"takes more than {limits.max_memory} bytes of memory to read")
    except ProcessExpired:
        broken = ("crashed", "ends the process that reads it")
    if len(batch) > 1:
        for alone in [schedule([item]) for item in batch]:
            yield from _results(alone, schedule, limits)
    else:
        [item] = batch
        yield item if isinstance(item, Refusal) else Refusal(item.id, *broken)
