"""Dynamic micro-batching: images of concurrent requests that the network answers together, within a bound of waiting."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Generic, TypeVar

In = TypeVar("In")
Out = TypeVar("Out")


class Batcher(Generic[In, Out]):
    """Hands what waits to ``work``, up to ``lanes`` batches at a time, in the order in which it came. Of one event loop.

    While batches are worked on the next one gathers. Where a lane is free a batch starts at once, unless it is not full and
    others are known to be on their way (:meth:`coming`): then it starts with the last of them, or after ``wait`` seconds.
    """

    def __init__(self, work: Callable[[Sequence[In]], Sequence[Out]], size: int, wait: float, lanes: int = 1) -> None:
        self._work, self._size, self._wait = work, size, wait
        self._waiting: deque[tuple[In, asyncio.Future[Out]]] = deque()
        self._coming = 0
        self._free = lanes
        self._timer: asyncio.TimerHandle | None = None
        self._worker = ThreadPoolExecutor(lanes, thread_name_prefix="batch")

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Around what ends with items to be answered: those that are there already wait for them, within the bound."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1
            asyncio.get_running_loop().call_soon(self._start)  # after what came has been given in

    async def answer(self, items: Sequence[In]) -> list[Out]:
        """What ``work`` makes of the items, in their order; of many items it may be that of several batches.

        Raises:
            Exception: what ``work`` raised for a batch that one of them was in.
        """
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[Out]] = [loop.create_future() for _ in items]
        self._waiting.extend(zip(items, futures, strict=True))
        self._start()
        return await asyncio.gather(*futures)

    def _start(self) -> None:
        if not self._free or not self._waiting:
            return
        if self._coming and self._wait and len(self._waiting) < self._size:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._wait, self._launch)
            return
        self._launch()

    def _launch(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
        self._free -= 1
        working = asyncio.get_running_loop().run_in_executor(self._worker, self._work, [item for item, _ in batch])
        working.add_done_callback(lambda done: self._deliver([future for _, future in batch], done))
        self._start()

    def _deliver(self, futures: Sequence[asyncio.Future[Out]], done: asyncio.Future[Sequence[Out]]) -> None:
        self._free += 1
        self._start()
        if error := done.exception():
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return
        for future, result in zip(futures, done.result(), strict=True):
            if not future.done():
                future.set_result(result)
