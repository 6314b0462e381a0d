"""What a check has found, in one line; and how a check is carried out so that none holds up or hides another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import CvFactoryError, unexpected
from cv_factory_ops.processes import ends_within
from cv_factory_ops.records import Frozen

PATIENCE = 60.0
"""Seconds that a check may take; its own questions give up earlier."""
QUESTION_SECONDS = 10.0
"""Seconds that one question to a service may take."""


class Finding(Frozen):
    """One thing that a run needs."""

    status: Literal["ok", "warn", "fail"]
    """``ok``: it is there. ``fail``: a run will stop for want of it. ``warn``: a run may go on without it, or it cannot be
    told from here."""
    name: str
    """What was looked at, ``storage.create`` for example."""
    found: str
    """Without any value of a secret."""
    mend: str = ""
    """How to mend it."""

    def __str__(self) -> str:
        return f"{self.status:<4}  {self.name}  {self.found}" + (f" - {self.mend}" if self.mend else "")


class CannotTell(Exception):
    """A check cannot be made from here; ``str(error)`` is why."""


class Check(NamedTuple):
    """A check: what it looks at, and how to mend what it says where it raises."""

    name: str
    look: Callable[[ProjectConfig], Iterator[Finding]]
    mend: str = ""


def ok(name: str, found: str) -> Finding:
    return Finding(status="ok", name=name, found=found)


def warn(name: str, found: str, mend: str = "") -> Finding:
    return Finding(status="warn", name=name, found=found, mend=mend)


def fail(name: str, found: str, mend: str = "") -> Finding:
    return Finding(status="fail", name=name, found=found, mend=mend)


def carried_out(check: Check, config: ProjectConfig, patience: float = PATIENCE) -> list[Finding]:
    """What a check finds; one that breaks or hangs is told as such, and its thread left behind."""
    found: list[Finding] = []
    if ends_within(patience, partial(_look, check, config, found)):
        return found
    return [*found, warn(check.name, f"cannot be told: no end within {patience:g} s", check.mend)]


def _look(check: Check, config: ProjectConfig, found: list[Finding]) -> None:
    try:
        with storage.impatient(QUESTION_SECONDS / 2):
            for finding in check.look(config):
                found.append(finding)
    except CannotTell as error:
        found.append(warn(check.name, f"cannot be told: {error}"))
    except CvFactoryError as error:
        found.append(fail(check.name, " ".join(str(error).split()), check.mend))
    except Exception as error:
        found.append(warn(check.name, f"cannot be told: {unexpected(error)}"))
