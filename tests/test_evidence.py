"""The evidence bundle of a version: complete, checkable, the same each time, and without patients."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml

from cv_factory_ops import audit, protocol, registry, storage
from cv_factory_ops.audit import Change
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.drift.decide import Decision
from cv_factory_ops.evaluation.evidence import IMPACT, MODIFICATIONS, PROTOCOL, changed_settings, pack
from cv_factory_ops.records import ApproveRecord, EvidenceRecord, RegisterRecord, VerifyRecord
from cv_factory_ops.stage import Order, Stage, record_digest, run_stage
from cv_factory_ops.training import train
from tests.bundles import write_bundle
from tests.records import evaluated, gated, put, trained

NOTED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


def finished(run: str, folder: Path, seed: int, champion: int | None = None) -> RegisterRecord:
    """Give a prepared run what comes before its evidence; its bundle is written here."""
    bundle = write_bundle(folder / "bundle", seed)
    registered = RegisterRecord(
        summary="",
        model_name="tiny",
        model_version=seed,
        mlflow_run_id="0",
        bundle=bundle.path.as_uri(),
        bundle_digest=bundle.digest,
    )
    verified = VerifyRecord(
        summary="", endpoint_name="tiny", endpoint_config_name="c", status="InService", bundle_digest=bundle.digest
    )
    for record in (
        trained(bundle.path.as_uri(), bundle.digest, "0").model_copy(
            update={"links": {"mlflow": "https://cvf:hunter2@host/#"}}
        ),
        evaluated(run, champion),
        gated(()),
        registered,
        verified,
    ):
        put(run, record)
    for name, content in (("model_card.html", "<h1>Model</h1>"), ("data_card.html", "<h1>Data</h1>"), ("roc.png", "roc")):
        (folder / "evaluate" / name).write_text(content)
    (folder / "evaluate" / "errors.png").write_text("pictures of patients")
    (folder / "gate" / "criteria.json").write_text("[]")
    (folder / "gate" / "criteria.png").write_bytes(b"criteria")
    return registered


@pytest.fixture
def first(run: str, home: Path) -> RegisterRecord:
    return finished(run, home / "run", 1)


@pytest.fixture
def config(project: Callable[..., Path]) -> ProjectConfig:
    return load(project(mlflow={"tracking_uri": "postgresql://cvf:hunter2@db/mlflow"}))


def evidence(config: ProjectConfig, run: str) -> EvidenceRecord:
    return EvidenceRecord.model_validate(run_stage("evidence", config, run).record)


def bundle_of(home: Path, name: str = "run") -> Path:
    return home / name / "evidence" / "bundle"


def promoted(config: ProjectConfig, run: str, registered: RegisterRecord) -> audit.Entry:
    """The history of a version that is champion now."""
    change = Change(
        action="promotion",
        who="run one",
        why="verified",
        run=run,
        version=registered.model_version,
        bundle_digest=registered.bundle_digest,
        gate_digest=record_digest(run, "gate"),
        aliases={"champion": registered.model_version},
    )
    entry = audit.append(config, {}, lambda aliases: change)
    assert entry is not None
    return entry


def test_it_holds_the_three_parts(config: ProjectConfig, run: str, home: Path, first: RegisterRecord) -> None:
    evidence(config, run)
    names = {path.relative_to(bundle_of(home)).as_posix() for path in bundle_of(home).rglob("*") if path.is_file()}
    parts = {MODIFICATIONS: ("model_card.html", "data_card.html", "modifications.json", "bundle.json")}
    parts |= {PROTOCOL: ("config.yaml", "schema.json", "environment.txt")}
    records = ("ingest", "preprocess", "train", "evaluate", "gate", "register", "verify")
    parts |= {IMPACT: ("criteria.json", "criteria.png", "history.json", "roc.png", *(f"records/{r}.json" for r in records))}
    expected = {f"{part}/{name}" for part, own in parts.items() for name in own}
    assert names == expected | {"index.html", "SHA256SUMS"}


def test_the_checksums_are_those_of_coreutils(config: ProjectConfig, run: str, home: Path, first: RegisterRecord) -> None:
    evidence(config, run)
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=bundle_of(home), check=False).returncode == 0
    listed = {line.split("  ")[1] for line in (bundle_of(home) / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.relative_to(bundle_of(home)).as_posix() for p in bundle_of(home).rglob("*") if p.is_file()} - {
        "SHA256SUMS"
    }
    (bundle_of(home) / IMPACT / "criteria.json").write_text("[{}]")
    assert subprocess.run(check, cwd=bundle_of(home), check=False, capture_output=True).returncode == 1


def test_the_archive_is_the_folder_and_the_same_each_time(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord
) -> None:
    made = evidence(config, run)
    archive = storage.path_of(made.archive)
    assert archive is not None
    assert storage.sha256(archive) == made.archive_digest
    with zipfile.ZipFile(archive) as file:
        assert file.testzip() is None
        inside = {name: file.read(name) for name in file.namelist()}
    assert inside == {
        p.relative_to(bundle_of(home)).as_posix(): p.read_bytes() for p in bundle_of(home).rglob("*") if p.is_file()
    }
    again = EvidenceRecord.model_validate(run_stage("evidence", config, run, force=True).record)
    assert again == made
    shutil.copytree(bundle_of(home), home / "elsewhere")
    for number, path in enumerate(sorted((home / "elsewhere").rglob("*"), reverse=True)):
        path.touch()
        path.chmod(0o700 + number % 8)
    pack(home / "elsewhere", home / "again.zip")
    assert storage.sha256(home / "again.zip") == made.archive_digest


def test_the_protocol_can_be_checked_again(config: ProjectConfig, run: str, home: Path, first: RegisterRecord) -> None:
    evidence(config, run)
    again = load(bundle_of(home) / PROTOCOL / "config.yaml")
    assert again.model_copy(update={"mlflow": config.mlflow}) == config
    assert "torch==" in (bundle_of(home) / PROTOCOL / "environment.txt").read_text()


def test_the_protocol_is_that_of_the_training_and_of_the_gate(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord
) -> None:
    """A retraining's overrides are not in the YAML that a later command is given, which runs on another machine."""
    training = Stage("train", config.with_settings({"training.epochs": 9, "gate.minimum": 0.1}), run, home / "run")
    shutil.copytree(home / "run" / "bundle", training.out / "bundle")
    train.record(training, "", **trained("", "", "0").model_dump(exclude={"bundle", "bundle_digest", "links"}))
    shutil.move(training.out / protocol.FOLDER, home / "run" / "train" / protocol.FOLDER)
    kept = home / "run" / "train" / protocol.FOLDER
    (kept / protocol.SOFTWARE).write_text("torch==0.4\n")
    (kept / protocol.SCHEMA).write_text("{}\n")
    (kept / protocol.SETTINGS).write_text((kept / protocol.SETTINGS).read_text() + "gone: by now\n")
    protocol.keep(config.with_settings({"training.epochs": 3, "gate.minimum": 0.2}), home / "run" / "gate" / protocol.FOLDER)
    evidence(config, run)
    told = yaml.safe_load((bundle_of(home) / PROTOCOL / "config.yaml").read_text())
    assert (told["training"]["epochs"], told["gate"]["minimum"], told["gone"]) == (9, 0.2, "by now")
    assert told["mlflow"]["tracking_uri"] == "postgresql://***@db/mlflow"
    assert (bundle_of(home) / PROTOCOL / "environment.txt").read_text() == "torch==0.4\n"
    assert (bundle_of(home) / PROTOCOL / "schema.json").read_text() == "{}\n"


def test_by_hand_the_evidence_of_the_same_verdict_is_kept(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord
) -> None:
    made, order = evidence(config, run), Order("rollback", "mara", "worse")
    page = (bundle_of(home) / "index.html").read_bytes()
    decided(config, first.bundle_digest, 6)
    promoted(config, run, first)
    changed = config.with_settings({"training.epochs": 9})
    assert EvidenceRecord.model_validate(run_stage("evidence", changed, run, order=order).record) == made
    assert (bundle_of(home) / "index.html").read_bytes() == page
    put(run, gated(()).model_copy(update={"summary": "auc 0.850"}))
    assert EvidenceRecord.model_validate(run_stage("evidence", changed, run, order=order).record) != made


def test_a_link_to_mlflow_names_no_login() -> None:
    run = SimpleNamespace(info=SimpleNamespace(experiment_id="1"))
    client = SimpleNamespace(tracking_uri="https://cvf:hunter@2@mlflow.example/base", get_run=lambda run_id: run)
    assert registry.run_page(client, "7") == "https://mlflow.example/base/#/experiments/1/runs/7"  # type: ignore[arg-type]


def test_neither_patients_nor_passwords_are_in_it(config: ProjectConfig, run: str, home: Path, first: RegisterRecord) -> None:
    made = evidence(config, run)
    archive = storage.path_of(made.archive)
    assert archive is not None
    content = archive.read_bytes()
    manifest = pd.read_parquet(home / "run" / "ingest" / "manifest.parquet")
    for column in ("id", "patient", "study", "instance"):
        found = [value for value in manifest[column].unique() if value and str(value).encode() in content]
        assert found == [], column
    assert b"pictures of patients" not in content
    assert b"hunter2" not in content


def test_what_has_changed_since_the_champion_is_told(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord, project: Callable[..., Path]
) -> None:
    evidence(config, run)
    entry = promoted(config, run, first)
    second = (home / "second").as_uri()
    shutil.copytree(home / "run", home / "second", ignore=shutil.ignore_patterns("evidence", "bundle"))
    registered = finished(second, home / "second", 2, champion=1)
    changed = load(project(training={"epochs": 7}, mlflow={"tracking_uri": "postgresql://cvf:hunter2@db/mlflow"}))
    for bundle, hour in ((first.bundle_digest, 6), ("f" * 64, 7)):
        decided(config, bundle, hour)
    evidence(changed, second)
    told = json.loads((bundle_of(home, "second") / MODIFICATIONS / "modifications.json").read_text())
    assert told["settings"]["training.epochs"] == [2, 7]
    assert "project" not in told["settings"]
    assert told["champion_before"]["bundle_digest"] == first.bundle_digest
    assert told["digests"]["now"]["bundle"] == registered.bundle_digest
    assert told["digests"]["before"]["data"] == told["digests"]["now"]["data"]
    drift = sorted((bundle_of(home, "second") / IMPACT / "drift").iterdir())
    assert [json.loads(path.read_text())["requests"] for path in drift] == [6], "only decisions about the champion before"
    history = json.loads((bundle_of(home, "second") / IMPACT / "history.json").read_text())
    assert [item["digest"] for item in history] == [entry.digest]
    page = (bundle_of(home, "second") / "index.html").read_text()
    assert "Version 2 follows version 1." in page
    assert "scores have moved" in page


def decided(config: ProjectConfig, bundle_digest: str, hour: int) -> None:
    decision = Decision(
        time=NOTED.replace(hour=hour),
        project="tiny",
        run=f"file:///runs/drift{hour}",
        verdict="drift",
        retrain=True,
        reason="scores have moved",
        drifted={"score": 0.001},
        requests=hour,
        new_labels=30,
        cooldown_until=None,
        bundle_digest=bundle_digest,
    )
    storage.write_bytes(f"{config.root}/decisions/{hour}.json", decision.model_dump_json().encode())


def test_a_setting_that_is_new_or_gone_is_named() -> None:
    assert changed_settings({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == {"a.c": [2, None], "a.d": [None, 3]}


def test_an_approval_that_comes_later_makes_another_archive(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord
) -> None:
    before = evidence(config, run)
    assert evidence(config, run) == before
    approval = ApproveRecord(
        summary="",
        approved=True,
        who="mara",
        time=NOTED,
        note="<b>fine</b>",
        bundle_digest=first.bundle_digest,
        gate_digest=record_digest(run, "gate"),
    )
    put(run, approval)
    after = evidence(config, run)
    assert after.archive != before.archive
    assert storage.exists(before.archive), "what was kept stays"
    page = (bundle_of(home) / "index.html").read_text()
    assert "Approved by mara at 2026-01-02 03:04 UTC" in page
    assert "<b>fine</b>" not in page


class Links(HTMLParser):
    """Where the links of a page lead."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name == "href"]


def test_every_link_of_the_first_page_leads_to_a_file(
    config: ProjectConfig, run: str, home: Path, first: RegisterRecord
) -> None:
    evidence(config, run)
    page = (bundle_of(home) / "index.html").read_text()
    links = Links()
    links.feed(page)
    assert len(links.found) > 10
    assert [link for link in links.found if not (bundle_of(home) / link).is_file()] == []
    assert "Predetermined Change Control Plan for Artificial Intelligence-Enabled Device Software Functions" in " ".join(
        page.split()
    )
    assert re.search(r'<img src="data:image/png;base64,', page), "the picture is in the page"


def test_settings_are_plain_data(config: ProjectConfig, run: str, home: Path, first: RegisterRecord) -> None:
    evidence(config, run)
    tree = yaml.safe_load((bundle_of(home) / PROTOCOL / "config.yaml").read_text())
    assert tree["gate"]["margin"] == config.gate.margin
    assert tree["mlflow"]["tracking_uri"] == "postgresql://***@db/mlflow"
