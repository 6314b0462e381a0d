"""The one error that becomes an answer."""

from __future__ import annotations

from cv_factory_ops.server import Refused as Refused


class NoAnswer(Refused):
    """The endpoint has not answered this try."""

    def __init__(self, status: int, code: str, message: str, *, retriable: bool, outage: bool) -> None:
        super().__init__(status, code, message)
        self.retriable = retriable
        """Another try may help, and does no harm."""
        self.outage = outage
        """It speaks for an endpoint that is not there, rather than for one that is busy."""
