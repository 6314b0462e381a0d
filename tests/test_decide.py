"""Stage ``decide``: the stored, explained decision, on captures and labels as they really lie in the storage."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from cv_factory_ops import captures, storage
from cv_factory_ops.config import DataConfig, DecisionConfig, NpzSource, ProjectConfig
from cv_factory_ops.drift.decide import Decision, last_retraining
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import DecideRecord, DriftRecord, Result
from cv_factory_ops.stage import run_stage

SUMMARY = {
    "drift": "drift in 1 of 7 features (score p=1e-09) over 60 requests",
    "no drift": "no drift: smallest p 0.2 (score), threshold 0.001, 60 requests",
    "not enough data": "not enough data: 12 of at least 50 requests, 38 more are needed",
}


@dataclass
class Project:
    config: ProjectConfig
    runs: str

    def decide(self, name: str, verdict: Literal["drift", "no drift", "not enough data"] = "drift") -> DecideRecord:
        """Run the stage behind a finished drift check."""
        run = f"{self.runs}/{name}"
        drift = DriftRecord(
            summary=SUMMARY[verdict],
            verdict=verdict,
            requests=60,
            window_start="",
            window_end="",
            drifted={"score": 1e-9} if verdict == "drift" else {},
            alpha=0.01,
            bundle_digest="d" * 64,
            report=None,
        )
        result = Result(stage="drift", run=run, inputs_digest="", seconds=0, record=drift.model_dump(mode="json"))
        storage.write_bytes(f"{run}/drift/result.json", result.model_dump_json().encode())
        return DecideRecord.model_validate(run_stage("decide", self.config, run).record)

    def label(self, *names: str) -> None:
        """Late labels of captured studies."""
        captures.add_labels(self.config, dict.fromkeys(names, "b"))

    def decisions(self) -> list[Decision]:
        folder = f"{self.config.root}/decisions"
        return [Decision.model_validate_json(storage.read_bytes(f"{folder}/{name}")) for name in storage.listing(folder)]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Six captured studies, s0 to s5; three labels and a day's cooldown are asked for."""
    monkeypatch.delenv("CVF_STORAGE", raising=False)
    config = ProjectConfig(
        project="decisions",
        labels=["a", "b"],
        storage=str(tmp_path / "storage"),
        data=DataConfig(source=NpzSource(path="none.npz")),
        decision=DecisionConfig(cooldown_hours=24, minimum_labels=3),
    )
    lines = [
        captures.encode(
            event_id=f"e{i}",
            inference_id=f"s{i}",
            time=datetime(2026, 3, 1, tzinfo=UTC),
            request=b"pixels",
            content_type="application/dicom",
            answer=b"{}",
            answer_type="application/json",
        )
        for i in range(6)
    ]
    place = f"{captures.folder(config)}/{config.endpoint_name}/AllTraffic/2026/03/01/00/0.jsonl"
    storage.write_bytes(place, "\n".join(lines).encode())
    return Project(config, (tmp_path / "runs").as_uri())


def with_cooldown(project: Project, hours: float) -> Project:
    decision = DecisionConfig(cooldown_hours=hours, minimum_labels=3)
    return Project(project.config.model_copy(update={"decision": decision}), project.runs)


@pytest.mark.parametrize("verdict", ["no drift", "not enough data"])
def test_without_drift_there_is_a_stored_no(project: Project, verdict: Literal["no drift", "not enough data"]) -> None:
    project.label("s0", "s1", "s2")
    record = project.decide("r1", verdict)
    assert (record.retrain, record.reason) == (False, SUMMARY[verdict])
    assert record.summary == f"do not retrain: {SUMMARY[verdict]}"
    (decision,) = project.decisions()
    assert (decision.verdict, decision.retrain, decision.new_labels, decision.cooldown_until) == (verdict, False, 3, None)


def test_drift_with_labels_retrains(project: Project) -> None:
    project.label("s0", "s1")
    project.label("s2", "never captured")
    record = project.decide("scheduled__2026-03-01T00:00:00+00:00")
    assert record.retrain
    assert record.reason == f"{SUMMARY['drift']}; 3 labelled studies have arrived so far (3 needed)"
    name = record.decision.rsplit("/", 1)[1]
    decision = Decision.model_validate_json(storage.read_bytes(record.decision))
    assert name.startswith(decision.time.strftime("%Y%m%dT%H%M%S"))
    assert "-scheduled__2026-03-01T00_00_00_00_00-" in name
    assert decision.cooldown_until == decision.time + timedelta(hours=24)
    assert (decision.drifted, decision.requests, decision.bundle_digest) == ({"score": 1e-9}, 60, "d" * 64)
    assert decision.run == f"{project.runs}/scheduled__2026-03-01T00:00:00+00:00"


def test_labels_of_no_capture_do_not_count(project: Project) -> None:
    project.label("s0", "s1", "x", "y")
    record = project.decide("r1")
    assert not record.retrain
    assert record.reason.endswith("but only 2 labelled studies have arrived so far; at least 3 are needed")


def test_cooldown_holds_until_it_is_over(project: Project) -> None:
    project.label("s0", "s1", "s2")
    assert project.decide("r1").retrain
    project.label("s3", "s4", "s5")
    second = project.decide("r2")
    assert not second.retrain
    assert "but a retraining was decided at 20" in second.reason
    assert "the cooldown of 24 h lasts until 20" in second.reason
    first, stored = project.decisions()
    assert (stored.cooldown_until, stored.new_labels) == (first.cooldown_until, 3)
    past = first.model_copy(update={"time": first.time - timedelta(hours=25)})
    storage.write_bytes(project.decide("r1").decision, past.model_dump_json().encode())
    assert project.decide("r3").retrain


def test_labels_count_from_the_last_retraining(project: Project) -> None:
    eager = with_cooldown(project, 0)
    eager.label("s0", "s1", "s2")
    assert eager.decide("r1").retrain
    again = eager.decide("r2")
    assert not again.retrain
    assert "but only 0 labelled studies have arrived since the last retraining was decided at 20" in again.reason
    eager.label("s3", "s4", "s5")
    assert eager.decide("r3").retrain
    last = last_retraining(eager.config)
    assert last is not None
    assert last.run.endswith("/r3")


def test_a_retried_run_decides_once(project: Project) -> None:
    project.label("s0", "s1", "s2")
    first = project.decide("r1")
    storage.delete_tree(f"{project.runs}/r1/decide")  # kill -9 between storing the decision and publishing the record
    again = project.decide("r1")
    assert again == first
    assert len(project.decisions()) == 1


def test_runs_with_the_same_name_are_kept_apart(project: Project) -> None:
    other = Project(project.config, f"{project.runs}/elsewhere")
    assert project.decide("r1").decision != other.decide("r1").decision
    assert len(project.decisions()) == 2


def test_a_broken_decision_is_named(project: Project) -> None:
    storage.write_bytes(f"{project.config.root}/decisions/20260101T000000000000-x-1.json", b'{"time": 1}')
    with pytest.raises(DataError, match=r"20260101T000000000000-x-1\.json: is not a decision"):
        project.decide("r1")
