"""What processes ask of the system: to end with the parent that started them, and to keep the memory they work in; and waiting
no longer than so long for a call that may never return."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable

KEPT_ALLOCATION, KEPT_HEAP = 32 << 20, 256 << 20
"""Bytes: the largest allocation that is taken from the heap, and how much of the heap's end may lie free."""


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent, of that id, dies, however that dies: a retry must not meet a survivor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before it could be asked
            os.kill(os.getpid(), signal.SIGKILL)


def keep_memory() -> None:
    """Ask the C library to use freed memory again rather than give it back: every image that is
    decoded, prepared or trained on would otherwise cost a page fault each 4 KiB, which is a good part of the time."""
    if sys.platform == "linux":
        c = ctypes.CDLL(None)
        if hasattr(c, "mallopt"):  # not every C library is GNU's
            c.mallopt(-3, KEPT_ALLOCATION)  # M_MMAP_THRESHOLD
            c.mallopt(-1, KEPT_HEAP)  # M_TRIM_THRESHOLD


def ends_within(seconds: float, call: Callable[[], object]) -> bool:
    """Whether ``call`` returned in time; raises what it raises. One that did not is left behind in a thread of its own."""
    raised: list[Exception] = []

    def carry_out() -> None:
        try:
            call()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=carry_out, daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()
