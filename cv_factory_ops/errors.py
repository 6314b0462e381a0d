"""Every error this project raises on purpose, with the exit code that says what a retry would do.

    CvFactoryError
    +-- ConfigError        2   the configuration is wrong: a retry changes nothing
    +-- DataError          3   the data is wrong: a retry changes nothing
    |   +-- Rejected       3   one item is wrong: it goes to quarantine, the stage goes on
    +-- GateRefused        4   a gate said no: the challenger is not good enough
    +-- Unavailable       75   a service, a disk or a peer is not ready: try again
        +-- PeerLost      75   another node or rank is gone: its own reason, where there is one, is the one to tell

    BaseException
    +-- Interrupted       75   SIGTERM: try again

The numbers are part of the stage contract: operators, pods and shell scripts act on them.
"""

import tempfile
import traceback
from typing import ClassVar


class CvFactoryError(Exception):
    """A failure that is explained in one line; ``str(error)`` is that line."""

    exit_code: ClassVar[int] = 1


class ConfigError(CvFactoryError):
    """The configuration is wrong; the message names the field, what was given and what is allowed."""

    exit_code = 2


class DataError(CvFactoryError):
    """The data is wrong or missing; the message names the path and what was expected."""

    exit_code = 3


class Rejected(DataError):
    """One item cannot be used. ``code`` is the machine-readable reason, the message the readable one.

    The message must not quote anything from the item that could identify a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GateRefused(CvFactoryError):
    """A gate refused the challenger; champion and endpoint stay as they are."""

    exit_code = 4


class Unavailable(CvFactoryError):
    """Something outside is not ready (service, disk space, rollout in progress); a retry may succeed."""

    exit_code = 75


class PeerLost(Unavailable):
    """Another rank of the training is gone: a consequence, so any other reason is told rather than this one."""


class Interrupted(BaseException):
    """SIGTERM; ``str(error)`` is the line to end with. Not an :class:`Exception`: nothing must take it for its own failure."""

    exit_code: ClassVar[int] = Unavailable.exit_code


def unexpected(error: Exception) -> str:
    """One line for an error that nobody foresaw: its kind, and the file in which its traceback is kept.

    The error's own words stay in that file: they may quote data.
    """
    try:
        with tempfile.NamedTemporaryFile("w", prefix="cvf-", suffix=".log", delete=False, encoding="utf-8") as file:
            traceback.print_exception(error, file=file)
    except OSError:
        return f"unexpected {type(error).__name__}; its details could not be written, the disk may be full"
    return f"unexpected {type(error).__name__}; details in {file.name}"


def without_values(error: BaseException) -> BaseException:
    """The same kind at the same place in the code, for a log: its words, and those of what caused it, may quote a request."""
    return RuntimeError(type(error).__name__).with_traceback(error.__traceback__)
