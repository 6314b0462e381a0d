"""Lines of capture files, as endpoints write them."""

from __future__ import annotations

from datetime import UTC, datetime

from cv_factory_ops import captures


def capture_line(
    name: str,
    request: bytes = b"pixels",
    answer: bytes = b"{}",
    content_type: str = "application/dicom",
    time: datetime = datetime(2026, 3, 1, 10, tzinfo=UTC),
) -> str:
    """One request under its inference id, with its answer."""
    return captures.encode(
        event_id=name,
        inference_id=name,
        time=time,
        request=request,
        content_type=content_type,
        answer=answer,
        answer_type="application/json",
    )
