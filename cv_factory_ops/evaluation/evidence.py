"""Stage ``evidence``: what a version rests on, as a folder to read and an archive to keep.

It is laid out after the three parts of a predetermined change control plan in FDA's final guidance "Marketing Submission
Recommendations for a Predetermined Change Control Plan for Artificial Intelligence-Enabled Device Software Functions" (December
2024, reissued August 2025): description of modifications, modification protocol, impact assessment. The protocol is the
project's configuration itself, which every stage has been checked against.

No image, identifier or pseudonym of a patient is in it: records, settings, digests, plots and the cards.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cv_factory_ops import audit, protocol, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.evaluation.cards import GALLERIES, NAMES, html, templates
from cv_factory_ops.promotion import approval_of
from cv_factory_ops.records import (
    EvaluateRecord,
    EvidenceRecord,
    GateRecord,
    IngestRecord,
    PreprocessRecord,
    RegisterRecord,
    TrainRecord,
)
from cv_factory_ops.registry import flat
from cv_factory_ops.stage import read_result, record_digest

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

MODIFICATIONS, PROTOCOL, IMPACT = "1-description-of-modifications", "2-modification-protocol", "3-impact-assessment"
SUMS = "SHA256SUMS"
STAGES = ("ingest", "preprocess", "train", "evaluate", "gate", "register", "verify")
"""Stages whose records are part of it; so is that of ``index``, where it has run."""
CARDS = tuple(f"evaluate/{name}.html" for name in NAMES)
LONG_AGO = (1980, 1, 1, 0, 0, 0)
"""Time of every file in the archive, the earliest that ZIP knows: what is the same shall give the same archive."""


def run(stage: Stage) -> EvidenceRecord:
    """Collect everything, write its index and its checksums, pack it. A person who promotes by hand keeps what there is."""
    registered, folder, basis = stage.read(RegisterRecord), stage.out / "bundle", _basis(stage)
    if stage.order and (kept := _kept(stage, basis)):
        return kept
    before, settings = _champion(stage), protocol.fetch(stage.run, stage.config, folder / PROTOCOL)
    facts = {"splits": settings["splits"], "asked": stage.config.approval.enabled}
    facts |= _modifications(stage, folder / MODIFICATIONS, before, settings)
    facts |= _impact(stage, folder / IMPACT, before)
    sums = {path.relative_to(folder).as_posix(): storage.sha256(path) for path in _files(folder)}
    index = templates().get_template("evidence.md.jinja").render(facts, project=stage.config.project, files=sums)
    page = templates().get_template("card.html.jinja")
    title = f"Evidence: {stage.config.project}, version {registered.model_version}"
    (folder / "index.html").write_text(page.render(title=title, body=html(index, folder, [f"{IMPACT}/criteria.png"])))
    sums["index.html"] = storage.sha256(folder / "index.html")
    (folder / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    archive = stage.out / "evidence.zip"
    pack(folder, archive)
    digest = storage.sha256(archive)
    uri = f"{stage.config.root}/evidence/{registered.model_version}-{registered.bundle_digest[:12]}-{digest[:12]}.zip"
    if not storage.exists(uri):
        storage.upload_file(archive, uri)
    archive.unlink()
    return EvidenceRecord(
        summary=f"{len(sums)} files on version {registered.model_version}, archive {digest[:12]}",
        links={"evidence": stage.uri("bundle", "index.html")},
        archive=uri,
        archive_digest=digest,
        files=len(sums),
        basis=basis,
    )


def require_inputs(stage: Stage) -> None:
    """What stage ``deploy`` asks before it touches the endpoint: that nothing is missing which the evidence will be made of, so
    that no version is rolled out only to be put back for a file.

    Raises:
        DataError: a record or a file of the run is not there, or a record is of another version.
    """
    if stage.order and _has_kept(stage, _basis(stage)):
        return
    for record in (IngestRecord, PreprocessRecord, TrainRecord, EvaluateRecord, GateRecord, RegisterRecord):
        stage.read(record)
    approval_of(stage, stage.read(RegisterRecord))
    for name in (*CARDS, *_proofs(stage.read(EvaluateRecord))):
        if not storage.exists(f"{stage.run}/{name}"):
            cure = f"run `cvf {name.partition('/')[0]} --force` with the same --config and --run first"
            raise DataError(f"{stage.run}/{name}: is not there, and belongs to the evidence of this version; {cure}")


def fingerprint(stage: Stage) -> str:
    """An approval that came later belongs into it. Decisions and history that came later do not: they had no part in it."""
    return record_digest(stage.run, "approve") if storage.exists(f"{stage.run}/approve/result.json") else ""


def _basis(stage: Stage) -> str:
    digests = [stage.read(RegisterRecord).bundle_digest, record_digest(stage.run, "gate"), fingerprint(stage)]
    return storage.text_digest(json.dumps(digests))


def _kept(stage: Stage, basis: str) -> EvidenceRecord | None:
    """What an earlier rollout of the same has left, its folder included; None where there is none."""
    if not _has_kept(stage, basis):
        return None
    shutil.copytree(stage.local(f"{stage.run}/{EvidenceRecord.stage}/bundle"), stage.out / "bundle")
    return stage.read(EvidenceRecord)


def _has_kept(stage: Stage, basis: str) -> bool:
    stored = f"{stage.run}/{EvidenceRecord.stage}/result.json"
    return storage.exists(stored) and read_result(stage.run, EvidenceRecord.stage).record.get("basis") == basis


def pack(folder: Path, archive: Path) -> None:
    """A ZIP that depends on nothing but names and contents: sorted, without times, not compressed (compressors differ)."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as file:
        for path in _files(folder):
            info = zipfile.ZipInfo(path.relative_to(folder).as_posix(), LONG_AGO)
            info.external_attr = 0o644 << 16
            file.writestr(info, path.read_bytes())


def _modifications(stage: Stage, folder: Path, before: audit.Entry | None, settings: dict[str, Any]) -> dict[str, Any]:
    """What is another than in the champion before: settings, data, weights."""
    registered = stage.read(RegisterRecord)
    changes = None if before is None else changed_settings(_protocol_of(before), settings)
    facts = {
        "registered": registered,
        "before": before.change if before else None,
        "changes": changes,
        "digests": {"before": _digests(before.change.run) if before else {}, "now": _digests(stage.run)},
    }
    told = {
        "version": registered.model_version,
        "bundle_digest": registered.bundle_digest,
        "champion_before": before.change.model_dump(mode="json", include={"version", "bundle_digest", "run"})
        if before
        else None,
        "settings": changes,
        "digests": facts["digests"],
    }
    _write_json(folder / "modifications.json", told)
    for name in CARDS:
        _copy(stage, name, folder)
    shutil.copyfile(stage.local(registered.bundle) / "bundle.json", folder / "bundle.json")
    return facts


def _impact(stage: Stage, folder: Path, before: audit.Entry | None) -> dict[str, Any]:
    """The verdict with its numbers, what it rests on, who approved, and the drift that led here."""
    registered, gate, evaluation = stage.read(RegisterRecord), stage.read(GateRecord), stage.read(EvaluateRecord)
    approval, decisions = approval_of(stage, registered), list(_decisions(stage.config, before))
    with_index = ("index",) if storage.exists(f"{stage.run}/index/result.json") else ()
    for name in (*STAGES, *with_index):
        _write_json(folder / "records" / f"{name}.json", protocol.without_logins(read_result(stage.run, name).record))
    for name in _proofs(evaluation):
        _copy(stage, name, folder)
    if approval:
        _write_json(folder / "approval.json", approval.model_dump(mode="json"))
    for decision in decisions:
        stamp = re.sub(r"[^0-9T]", "", decision["time"])
        _write_json(folder / "drift" / f"{stamp}.json", decision)
    stored = [audit.stored(stage.config, entry.number) for entry in audit.entries(stage.config)]
    history = [item["entry"] | {"digest": item["digest"]} for item in stored]
    _write_json(folder / "history.json", history)
    return {"gate": gate, "approval": approval, "decisions": decisions, "history": history, "impact": IMPACT}


def _proofs(evaluation: EvaluateRecord) -> list[str]:
    """Files of the run that show what the verdict rests on: criteria and plots."""
    plots = [uri.rsplit("/", 1)[1] for uri in evaluation.pictures]
    return ["gate/criteria.json", "gate/criteria.png", *(f"evaluate/{plot}" for plot in plots if plot not in GALLERIES)]


def changed_settings(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    """Old and new value of every setting that differs, by its dotted name; None where there was or is none."""
    old, new = flat(before), flat(now)
    return {key: [old.get(key), new.get(key)] for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)}


def _champion(stage: Stage) -> audit.Entry | None:
    """The entry by which the version that the gate compared with became champion; None where there is none."""
    judged = stage.read(EvaluateRecord).champion_version
    found = [entry for entry in audit.entries(stage.config) if entry.change.aliases.get("champion") == entry.change.version]
    return next((entry for entry in reversed(found) if entry.change.version == judged), None)


def _protocol_of(entry: audit.Entry) -> dict[str, Any]:
    """The settings of an earlier version, from its run or its own evidence; empty where both are gone."""
    uri = f"{entry.change.run}/evidence/bundle/{PROTOCOL}/{protocol.SETTINGS}"
    if (found := protocol.settings_of(entry.change.run)) or not storage.exists(uri):
        return found
    return dict(yaml.safe_load(storage.read_bytes(uri)))


def _decisions(config: ProjectConfig, before: audit.Entry | None) -> Iterable[dict[str, Any]]:
    """Every decision about the champion before, oldest first: also those by which it was kept."""
    folder = f"{config.root}/decisions"
    for name in storage.listing(folder) if before else ():
        decision = json.loads(storage.read_bytes(f"{folder}/{name}"))
        if before and decision.get("bundle_digest") == before.change.bundle_digest:
            yield decision


def _digests(run: str) -> dict[str, str]:
    """What names data, test set, shards and weights of a run; empty where it is gone."""
    places = {"data": ("ingest", "data_digest"), "test set": ("ingest", "test_digest")}
    places |= {"shards": ("preprocess", "shards_digest"), "bundle": ("train", "bundle_digest")}
    if not storage.exists(f"{run}/train/result.json"):
        return {}
    return {title: str(read_result(run, stage).record[field]) for title, (stage, field) in places.items()}


def _copy(stage: Stage, name: str, folder: Path) -> None:
    _write_bytes(folder / name.rsplit("/", 1)[1], storage.read_bytes(f"{stage.run}/{name}"))


def _write_json(path: Path, content: Any) -> None:
    _write(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def _write(path: Path, content: str) -> None:
    _write_bytes(path, content.encode())


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _files(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
