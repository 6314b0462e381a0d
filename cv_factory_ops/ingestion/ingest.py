"""Stage ``ingest``: read every image once, check it, and decide which of them train, validate and test."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.config import NpzSource
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion import sources, splits
from cv_factory_ops.ingestion.decode import as_unit_range, decode
from cv_factory_ops.ingestion.manifest import (
    ImageWriter,
    Refusal,
    Row,
    pixel_digest,
    to_uint16,
    write_manifest,
    write_quarantine,
)
from cv_factory_ops.ingestion.sources import Item
from cv_factory_ops.records import IngestRecord

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

BLANK = 1e-3
"""An image whose 0.1 % and 99.9 % quantiles of intensity (0..1) are closer than this shows nothing."""


def run(stage: Stage) -> IngestRecord:
    """Write ``manifest.parquet``, ``images-*.parquet`` and ``quarantine.jsonl``.

    Raises:
        DataError: the source is unusable, too much of it was refused, or it cannot be split without leakage.
    """
    rows, refusals = _read(stage)
    rows, copies = splits.drop_duplicates(rows)
    refusals += copies
    _require_enough(stage, rows, refusals)
    rows = splits.assign(rows, stage.config.splits, frozenset(_locked(stage)))
    splits.refuse_leakage(rows)
    splits.require_classes(rows, stage.config.labels)
    write_manifest(stage.out, rows, stage.domain.metadata)
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    return _record(rows, refusals)


def fingerprint(stage: Stage) -> str:
    """What the sources would read, and the locked test set where it is not the one that this run itself has."""
    locked = _locked(stage)
    result = f"{stage.run}/{stage.name}/result.json"
    lock = splits.test_digest(locked) if locked and storage.exists(result) else ""
    if lock and json.loads(storage.read_bytes(result))["record"].get("test_digest") == lock:
        lock = ""  # the promotion of this very run has locked it: nothing would change
    return f"{sources.fingerprint(stage)} {lock}"


def _read(stage: Stage) -> tuple[list[Row], list[Refusal]]:
    """Decode, check and store the pixels of every item."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    source = stage.config.data.source
    share = source.reserve if isinstance(source, NpzSource) else 0.0
    with ImageWriter(stage.out) as writer:
        for item in _items(stage):
            if isinstance(item, Refusal):
                refusals.append(item)
                continue
            try:
                row, pixels = _accept(stage, item)
            except Rejected as error:
                refusals.append(Refusal(item.id, error.code, str(error)))
            else:
                writer.append(row.id, pixels)
                rows.append(splits.reserve(row, share))
    return rows, refusals


def _items(stage: Stage) -> Iterator[Item | Refusal]:
    yield from _with_progress(sources.open_base(stage))
    if stage.config.data.include_captures:
        yield from _with_progress(sources.open_captures(stage))


def _with_progress(opened: sources.Opened) -> Iterator[Item | Refusal]:
    """A bar at a terminal; elsewhere a line of log about every tenth, and no more than one in five seconds."""
    if sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(opened.items, total=opened.total, desc="ingest", unit="image", mininterval=1, leave=False)
        return
    logged, said = 0, time.monotonic()
    for done, item in enumerate(opened.items, start=1):
        yield item
        if done - logged >= opened.total / 10 and time.monotonic() - said >= 5:
            logged, said = done, time.monotonic()
            log.info("ingest: %d of %d images", done, opened.total)


def _accept(stage: Stage, item: Item) -> tuple[Row, NDArray[np.uint16]]:
    """The item's row and pixels.

    Raises:
        Rejected: it cannot be decoded, or shows nothing (``blank``).
    """
    if isinstance(item.content, bytes):
        decoded = decode(item.content, item.content_type, stage.domain)
    else:
        decoded = Decoded(as_unit_range(item.content))
    low, high = np.quantile(decoded.image, [0.001, 0.999])
    if high - low < BLANK:
        raise Rejected("blank", "shows nothing: nearly all of its pixels are the same")
    pixels = to_uint16(decoded.image)
    row = Row(
        id=item.id,
        patient=item.patient or decoded.patient,
        study=decoded.study,
        label=stage.config.labels.index(item.label),
        split=item.split,
        source=item.source,
        digest=pixel_digest(pixels),
        rows=pixels.shape[0],
        columns=pixels.shape[1],
        metadata=decoded.metadata,
    )
    return row, pixels


def _require_enough(stage: Stage, rows: Sequence[Row], refusals: Sequence[Refusal]) -> None:
    """Stop where too much was refused; the list of it is kept beside the run's stages. Copies do no harm and do not count."""
    refused = [refusal for refusal in refusals if refusal.code != "duplicate"]
    total, allowed = len(rows) + len(refused), stage.config.data.max_quarantined
    if rows and len(refused) <= allowed * total:
        return
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    kept = f"{stage.run}/quarantine.jsonl"
    storage.upload_file(stage.out / "quarantine.jsonl", kept)
    raise DataError(f"{len(refused)} of {total} images refused ({_counts(refused)}); allowed share {allowed}; list: {kept}")


def _locked(stage: Stage) -> list[str]:
    """Pixel digests of the locked test set; none before the first promotion."""
    uri = f"{stage.config.root}/locked_test.json"
    if not storage.exists(uri):
        return []
    try:
        digests: list[str] = json.loads(storage.read_bytes(uri))["digests"]
        return digests
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{uri}: is not a list of the locked test set's digests") from None


def _record(rows: Sequence[Row], refusals: Sequence[Refusal]) -> IngestRecord:
    counts = dict(sorted(Counter(row.split for row in rows).items()))
    summary = f"{len(rows)} images: " + ", ".join(f"{split} {count}" for split, count in counts.items())
    if refusals:
        summary += f"; {len(refusals)} in quarantine ({_counts(refusals)})"
    return IngestRecord(
        summary=summary,
        accepted=len(rows),
        quarantined=len(refusals),
        quarantine_reasons=dict(sorted(Counter(refusal.code for refusal in refusals).items())),
        splits=counts,
        captured=sum(row.source == "capture" for row in rows),
        data_digest=splits.data_digest(rows),
        test_digest=splits.test_digest(row.digest for row in rows if row.split == "test"),
    )


def _counts(refusals: Sequence[Refusal]) -> str:
    return ", ".join(f"{code} {count}" for code, count in Counter(refusal.code for refusal in refusals).most_common())
