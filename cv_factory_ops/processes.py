"""Processes that never outlive the one that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> None:
    """Ask Linux to kill this process when its parent, of that id, dies, however that dies: a retry must not meet a survivor."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it died before it could be asked
            os.kill(os.getpid(), signal.SIGKILL)
