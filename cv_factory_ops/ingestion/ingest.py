"""Stage ``ingest``: read every image once, check it, and decide which of them train, validate and test."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.config.sources import NpzSource
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion import sources, splits
from cv_factory_ops.ingestion.labels import UNLABELLED
from cv_factory_ops.ingestion.manifest import Refusal, Row, write_manifest, write_quarantine, write_reports
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.ingestion.readers import read_all
from cv_factory_ops.ingestion.validate import Validated, Validation
from cv_factory_ops.records import IngestRecord

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")


def run(stage: Stage) -> IngestRecord:
    """Write ``manifest.parquet``, ``pixels-*.bin`` and ``quarantine.jsonl``; where reports are asked for, ``reports.parquet``.

    Raises:
        DataError: the source is unusable, too much of it was refused, or it cannot be split without leakage.
    """
    rows, refusals = _read(stage)
    rows = splits.with_patients(rows)
    if missing := sum(not row.patient for row in rows if not row.split):
        log.warning("ingest: %d images say no patient; those are split by image, so a patient may be on two sides", missing)
    rows, copies = splits.drop_duplicates(rows)
    refusals += copies
    _require_enough(stage, rows, refusals)
    known = _known_splits(stage)
    new = splits.draw(rows, stage.config.splits, known)
    rows = splits.assign(rows, known | new, frozenset(_locked(stage)))
    rows, held_out = splits.set_unlabelled_apart(rows)
    refusals += held_out
    splits.refuse_leakage(rows)
    splits.require_classes(rows, stage.config.labels)
    rows = splits.learn_from_answers(rows)
    _keep_splits(stage, new)
    write_manifest(stage.out, rows, stage.domain.metadata)
    write_quarantine(stage.out / "quarantine.jsonl", refusals)
    reports = write_reports(stage.out, rows) if stage.config.data.report_column else ""
    return _record(rows, refusals, reports)


def fingerprint(stage: Stage) -> str:
    """What the sources would read, and the locked test set where it is not the one that this run itself has."""
    locked = _locked(stage)
    result = f"{stage.run}/{stage.name}/result.json"
    lock = splits.test_digest(locked) if locked and storage.exists(result) else ""
    if lock and json.loads(storage.read_bytes(result))["record"].get("test_digest") == lock:
        lock = ""  # the promotion of this very run has locked it: nothing would change
    return f"{sources.fingerprint(stage)} {lock}"


def _read(stage: Stage) -> tuple[list[Row], list[Refusal]]:
    """Decode, check and store the pixels of every item, those of the source before captured ones."""
    rows: list[Row] = []
    refusals: list[Refusal] = []
    source = stage.config.data.source
    share = source.reserve if isinstance(source, NpzSource) else 0.0
    seen: set[str] = set()
    for result in _results(stage):
        if isinstance(result, Refusal):
            refusals.append(result)
        elif result.id in seen:  # an archive may hold a name twice
            refusals.append(Refusal(result.id, "duplicate_id", "has the name of an image before it"))
        else:
            seen.add(result.id)
            rows.append(splits.reserve(result, share))
    return rows, refusals


def _results(stage: Stage) -> Iterator[Row | Refusal]:
    yield from _labelled(stage, sources.open_base(stage))
    if stage.config.data.include_captures:
        yield from _labelled(stage, sources.open_captures(stage))


def _labelled(stage: Stage, opened: sources.Opened) -> Iterator[Row | Refusal]:
    """What became of each item; labels that go by study or instance are found now that those are known."""
    used: set[int] = set()
    data = stage.config.data
    settings = Validation(stage.config.domain, stage.config.labels, stage.config.decoding, data.validation, stage.out)
    items = with_progress(opened.items, opened.total, "ingest", "file")
    for result in read_all(items, Validated, settings, data.validation, data.workers):
        if isinstance(result, Refusal):
            yield result
            continue
        for row in result:
            if isinstance(row, Refusal) or row.label >= 0 or row.pseudo >= 0:
                yield row
            elif opened.table and (found := opened.table.of_row(row)):
                used.add(found.line)
                label = stage.config.labels.index(found.label)
                yield replace(row, label=label, patient=found.patient or row.patient, report=found.report)
            else:
                yield row if data.unlabelled == "keep" else Refusal(row.id, *UNLABELLED)
    if opened.table:
        yield from opened.table.unused(used)


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


def _known_splits(stage: Stage) -> dict[str, str]:
    """The split that earlier runs of the project have given to each patient; the first one counts."""
    known: dict[str, str] = {}
    uri = _splits_uri(stage)
    for name in storage.listing(uri):
        known = json.loads(storage.read_bytes(f"{uri}/{name}")) | known
    return known


def _keep_splits(stage: Stage, new: dict[str, str]) -> None:
    """Remember what this run has drawn, in a file of its own: runs at the same time lose nothing of each other's."""
    if new:
        name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
        storage.write_bytes(f"{_splits_uri(stage)}/{name}.json", json.dumps(new).encode())


def _splits_uri(stage: Stage) -> str:
    """Other shares or another seed start anew."""
    return f"{stage.config.root}/splits/{storage.text_digest(stage.config.splits.model_dump_json())[:12]}"


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


def _record(rows: Sequence[Row], refusals: Sequence[Refusal], reports_digest: str) -> IngestRecord:
    counts = dict(sorted(Counter(row.split for row in rows).items()))
    summary = f"{len(rows)} images: " + ", ".join(f"{split} {count}" for split, count in counts.items())
    captured = [row for row in rows if row.source == "capture"]
    pseudo = sum(row.pseudo >= 0 for row in captured)
    labelled = sum(row.label >= 0 for row in captured) - pseudo
    if captured:
        summary += f"; {len(captured)} of them captured ({labelled} with late labels, {pseudo} with the champion's answers)"
    if refusals:
        summary += f"; {len(refusals)} in quarantine ({_counts(refusals)})"
    if to_review := sum(bool(row.review) for row in rows):
        summary += f"; {to_review} for a person to look at (column review of the manifest)"
    return IngestRecord(
        summary=summary,
        accepted=len(rows),
        quarantined=len(refusals),
        quarantine_reasons=dict(sorted(Counter(refusal.code for refusal in refusals).items())),
        to_review=to_review,
        splits=counts,
        captured=len(captured),
        late_labels=labelled,
        pseudo_labels=pseudo,
        data_digest=splits.data_digest(rows),
        test_digest=splits.test_digest(row.digest for row in rows if row.split == "test"),
        reports_digest=reports_digest,
    )


def _counts(refusals: Sequence[Refusal]) -> str:
    return ", ".join(f"{code} {count}" for code, count in Counter(refusal.code for refusal in refusals).most_common())
