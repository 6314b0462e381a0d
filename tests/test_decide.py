"""Stage ``decide``: the stored, explained decision, on captures and labels as they really lie in the storage."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from cv_factory_ops import audit, captures, cli, refusals, stage, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.data import DataConfig
from cv_factory_ops.config.drift import DecisionConfig, QuietHours
from cv_factory_ops.config.sources import NpzSource
from cv_factory_ops.drift.decide import decide, quiet_until
from cv_factory_ops.drift.decisions import Decision, next_retraining, retrainings
from cv_factory_ops.drift.performance import measured
from cv_factory_ops.errors import DataError, GateRefused
from cv_factory_ops.records import DecideRecord, DriftRecord, Performance, Result
from cv_factory_ops.stage import Order, run_stage
from tests.capture_lines import capture_line
from tests.conftest import TINY
from tests.records import gated, put
from tests.test_performance import manifest

SUMMARY = {
    "drift": "drift in 1 of 7 features (score p=1e-09) over 60 requests",
    "no drift": "no drift: smallest p 0.2 (score), threshold 0.001, 60 requests",
    "not enough data": "not enough data: 12 of at least 50 requests, 38 more are needed",
}


Verdict = Literal["drift", "no drift", "not enough data"]


def checked(verdict: Verdict = "drift", **found: Any) -> DriftRecord:
    """What a drift check has found."""
    usual = {"drifted": {"score": 1e-9} if verdict == "drift" else {}, "bundle_digest": "d" * 64, "alpha": 0.01, "requests": 60}
    return DriftRecord(
        summary=SUMMARY[verdict], verdict=verdict, window_start="", window_end="", report=None, **(usual | found)
    )


@dataclass
class Project:
    config: ProjectConfig
    runs: str

    def decide(self, name: str, verdict: Verdict = "drift", order: Order | None = None, **found: Any) -> DecideRecord:
        """Run the stage behind a finished drift check."""
        run = f"{self.runs}/{name}"
        put(run, checked(verdict, **found))
        result = run_stage("decide", self.config, run, force=order is not None, order=order)
        return DecideRecord.model_validate(result.record)

    def at(self, now: datetime, verdict: Verdict = "drift", **found: Any) -> Decision:
        """What would be decided at that time; nothing is stored."""
        return decide(self.config, f"{self.runs}/r", checked(verdict, **found), now)

    def put_back(self, uri: str, hours: float) -> Decision:
        """Let a stored decision have been made earlier."""
        decision = Decision.model_validate_json(storage.read_bytes(uri))
        past = decision.model_copy(update={"time": decision.time - timedelta(hours=hours)})
        storage.write_bytes(uri, past.model_dump_json().encode())
        return past

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
        decision=DecisionConfig(cooldown_hours=24, minimum_labels=3, repeat_labels=3),
    )
    lines = [capture_line(f"s{i}", time=datetime(2026, 3, 1, tzinfo=UTC)) for i in range(6)]
    place = f"{captures.folder(config)}/{config.endpoint_name}/AllTraffic/2026/03/01/00/0.jsonl"
    storage.write_bytes(place, "\n".join(lines).encode())
    return Project(config, (tmp_path / "runs").as_uri())


def ruled(project: Project, **rules: Any) -> Project:
    """The project with other rules."""
    decision = DecisionConfig.model_validate(project.config.decision.model_dump() | rules)
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


def test_counting_labels_ends_where_all_are_found(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = f"{captures.folder(project.config)}/{project.config.endpoint_name}/AllTraffic/2026/03"
    sagemaker = {
        "eventMetadata": {"eventId": "ours", "customAttributes": ["{}"], "inferenceTime": "2026-03-02T00:00:00Z"},
        "captureData": {"endpointInput": {"data": '{"eventMetadata": {"inferenceId": "s0"}}', "encoding": "JSON"}},
    }
    lines = ["no capture", json.dumps({"eventMetadata": [1]}), json.dumps(sagemaker)]
    storage.write_bytes(f"{folder}/02/00/0.jsonl", "\n".join(lines).encode())
    opened, read_lines = [], storage.read_lines

    def noted(uri: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
        opened.append(uri)
        return read_lines(uri, start)

    monkeypatch.setattr(storage, "read_lines", noted)
    assert captures.captured(project.config, []) == set()
    assert opened == []
    assert captures.captured(project.config, ["ours"]) == {"ours"}
    assert opened == [f"{folder}/02/00/0.jsonl"], "the newest file only"
    assert captures.captured(project.config, ["ours", "s5", "s0", "never captured"]) == {"ours", "s5", "s0"}


def test_cooldown_holds_until_it_is_over(project: Project) -> None:
    project.label("s0", "s1", "s2")
    assert project.decide("r1").retrain
    project.label("s3", "s4", "s5")
    second = project.decide("r2")
    assert not second.retrain
    assert "but a retraining was decided at 20" in second.reason
    assert "the cooldown of 24 h lasts until 20" in second.reason
    first, stored = project.decisions()
    assert (stored.cooldown_until, stored.new_labels, stored.stopped_by) == (first.cooldown_until, 3, "cooldown")
    project.put_back(project.decide("r1").decision, hours=25)
    assert project.decide("r3").retrain


def test_labels_count_from_the_last_retraining(project: Project) -> None:
    eager = ruled(project, cooldown_hours=0)
    eager.label("s0", "s1", "s2")
    assert eager.decide("r1").retrain
    again = eager.decide("r2")
    assert not again.retrain
    assert "but only 0 labelled studies have arrived since the last retraining was decided at 20" in again.reason
    eager.label("s3", "s4", "s5")
    assert eager.decide("r3").retrain
    assert [decision.run.rsplit("/", 1)[1] for decision in retrainings(eager.config)] == ["r3", "r1"]


def test_a_retried_run_decides_once(project: Project) -> None:
    project.label("s0", "s1", "s2")
    first = project.decide("r1")
    storage.delete_tree(f"{project.runs}/r1/decide")  # kill -9 between storing the decision and publishing the record
    again = project.decide("r1")
    assert again == first
    assert len(project.decisions()) == 1


def test_a_retried_check_that_now_finds_drift_is_decided_anew(project: Project) -> None:
    project.label("s0", "s1", "s2")
    assert not project.decide("r1", "not enough data").retrain
    assert not project.decide("r1", "not enough data").retrain
    assert len(project.decisions()) == 1, "nothing has changed"
    assert project.decide("r1").retrain
    assert project.decide("r1", requests=61).retrain, "a retraining that was decided stands"
    assert [decision.verdict for decision in project.decisions()] == ["not enough data", "drift"]


def test_runs_with_the_same_name_are_kept_apart(project: Project) -> None:
    other = Project(project.config, f"{project.runs}/elsewhere")
    assert project.decide("r1").decision != other.decide("r1").decision
    assert len(project.decisions()) == 2


def test_a_broken_decision_is_named(project: Project) -> None:
    storage.write_bytes(f"{project.config.root}/decisions/20260101T000000000000-x-1.retrain.json", b'{"time": 1}')
    with pytest.raises(DataError, match=r"20260101T000000000000-x-1.retrain\.json: is not a decision"):
        project.decide("r1")


NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)
AUC = Performance(metric="auc", value=0.81, low=0.74, high=0.88, labelled=120, estimated=False)


def test_every_trigger_and_every_rule_is_told_with_its_numbers(project: Project) -> None:
    triggers = [
        {"kind": "drift"},
        {"kind": "performance", "metric": "auc", "minimum": 0.9},
        {"kind": "age", "days": 90},
        {"kind": "volume", "labels": 500},
    ]
    project.label("s0", "s1", "s2", "s3")
    decision = ruled(project, triggers=triggers).at(NOON, "no drift", performance=[AUC])
    told = {item.trigger: (item.asks, item.value, item.limit) for item in decision.considered}
    assert told == {
        "drift": (False, None, 0.01),
        "performance": (True, 0.88, 0.9),
        "age": (False, None, 90),
        "volume": (False, 4, 500),
    }
    assert (decision.retrain, decision.trigger, decision.stopped_by) == (True, "performance", "")
    assert decision.reason.startswith("auc 0.810 (0.740 .. 0.880, by 120 late labels), upper end below 0.9; 4 labelled studies")
    assert [(rule.rule, rule.allows) for rule in decision.rules] == [
        ("cooldown", True),
        ("labels", True),
        ("duplicate", True),
        ("budget", True),
    ]


def test_an_estimate_counts_only_where_that_is_configured_and_nothing_was_measured(project: Project) -> None:
    estimate = AUC.model_copy(update={"high": 0.78, "labelled": 0, "estimated": True})
    sound = AUC.model_copy(update={"high": 0.85})

    def asks(estimated: bool, *known: Performance) -> bool:
        trigger = {"kind": "performance", "minimum": 0.8, "estimated": estimated}
        (found,) = ruled(project, triggers=[trigger]).at(NOON, "no drift", performance=list(known)).considered
        return found.asks

    assert asks(True, estimate)
    assert not asks(False, estimate)
    assert not asks(True, estimate, sound), "what was measured goes before what was estimated"
    assert not asks(True)


def test_few_labels_alone_do_not_ask(project: Project) -> None:
    strict = ruled(project, triggers=[{"kind": "performance", "metric": "accuracy", "minimum": 0.8}])

    def asks(right: int, wrong: int) -> bool:
        """Of so many answers, measured as a drift check would."""
        labels, answers = np.zeros(right + wrong, np.int64), np.repeat([0.1, 0.9], [right, wrong])
        known = measured(labels, np.stack([1 - answers, answers], axis=1), manifest(), {})
        (found,) = strict.at(NOON, "no drift", performance=known).considered
        return found.asks

    assert not asks(1, 0)
    assert not asks(0, 1), "it says too little"
    assert not asks(10, 2)
    assert not asks(75, 25), "the interval reaches to 0.82"
    assert asks(60, 40)


def test_an_old_champion_is_trained_anew(project: Project) -> None:
    def registration(aliases: audit.Aliases) -> audit.Change:
        digests = {"bundle_digest": "d" * 64, "gate_digest": ""}
        return audit.Change(action="registration", who="", why="", run="", version=1, aliases={"champion": 1}, **digests)

    entry = audit.append(project.config, {}, registration)
    assert entry is not None
    old = ruled(project, triggers=[{"kind": "age", "days": 30}], minimum_labels=0)
    before, after = (old.at(entry.time + timedelta(days=days), "not enough data") for days in (29.9, 30))
    assert (before.retrain, after.retrain, after.trigger) == (False, True, "age")
    assert after.reason.startswith("the champion is 30.0 days old")


def test_enough_new_labels_are_a_trigger_of_their_own(project: Project) -> None:
    eager = ruled(project, triggers=[{"kind": "volume", "labels": 4}], cooldown_hours=0)
    eager.label("s0", "s1", "s2")
    assert not eager.decide("r1", "no drift").retrain
    eager.label("s3")
    assert eager.decide("r2", "no drift").trigger == "volume"
    assert not eager.decide("r3", "no drift").retrain, "they have been used"


def test_without_a_trigger_nothing_asks(project: Project) -> None:
    decision = ruled(project, triggers=[]).at(NOON)
    assert (decision.retrain, decision.stopped_by) == (False, "")
    assert decision.reason.endswith("no trigger is set")


@pytest.mark.parametrize(
    "again",
    [
        "image_mean (slowly)",
        "image_mean @ manufacturer=Acme @ home",
        "image_mean_missing",
        "metadata_view=AP (slowly)",
        "metadata_view",
    ],
)
def test_another_test_of_the_same_feature_is_no_other_cause(project: Project, again: str) -> None:
    eager = ruled(project, cooldown_hours=0, minimum_labels=0, repeat_labels=1)
    assert eager.decide("r1", drifted={"image_mean": 1e-5, "metadata_view": 1e-5}).retrain
    assert not eager.decide("r2", drifted={again: 1e-7}).retrain
    assert eager.decisions()[-1].stopped_by == "duplicate"
    assert eager.decide("r3", drifted={"image_noise (slowly)": 1e-7}).retrain


@pytest.mark.parametrize(
    ("drifted", "digest", "retrains"),
    [
        (("mean", "score"), "d", False),
        (("mean", "score", "view"), "d", False),  # one that comes and goes is no news
        (("view", "noise", "score"), "d", True),  # most of it is new
        (("mean", "score"), "e", True),  # another champion
    ],
)
def test_one_retraining_for_one_cause(project: Project, drifted: tuple[str, ...], digest: str, retrains: bool) -> None:
    again = ruled(project, cooldown_hours=0, minimum_labels=0, repeat_labels=1)
    assert again.decide("r1", drifted={"mean": 1e-5, "score": 1e-6}).retrain
    record = again.decide("r2", drifted=dict.fromkeys(drifted, 1e-7), bundle_digest=digest * 64)
    assert record.retrain is retrains
    if not retrains:
        assert "a retraining was decided for the same cause at 20" in record.reason
        assert again.decisions()[-1].stopped_by == "duplicate"


def test_a_refused_challenger_is_not_trained_again_without_more_labels(project: Project) -> None:
    again = ruled(project, cooldown_hours=0, minimum_labels=0, repeat_labels=2)
    first = again.decide("r1")
    refusals.keep(f"{again.config.root}/runs/by_hand", "gate", "another run's reason")
    refusals.keep(again.decisions()[0].retraining, "gate", "an earlier reason")
    refusals.keep(again.decisions()[0].retraining, "gate", "auc 0.700 is below gate.minimum 0.8")
    assert first.retrain
    again.label("s0")
    second = again.decide("r2")
    assert not second.retrain
    assert "which was refused (auc 0.700 is below gate.minimum 0.8); 1 labelled studies have arrived since" in second.reason
    again.label("s1")
    assert again.decide("r3").retrain


def test_a_refusal_that_cannot_be_kept_hides_no_reason(
    project: Project, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder lies where the file would."""
    run = f"{project.runs}/r1"
    put(run, gated(("auc 0.5 is below",)))
    (home / "runs" / "r1" / "refused.json").mkdir()
    monkeypatch.setattr(stage, "_result", lambda *_: stage.read_result(run, "gate"))
    with pytest.raises(GateRefused, match=r"auc 0\.5 is below"):
        run_stage("gate", project.config, run)
    assert "refused.json: was not kept" in caplog.text


def test_a_new_kind_of_evidence_is_a_cause_of_its_own(project: Project) -> None:
    triggers = [{"kind": "drift"}, {"kind": "performance", "minimum": 0.9}]
    both = ruled(project, triggers=triggers, cooldown_hours=0, minimum_labels=0)
    assert both.decide("r1").retrain
    assert not both.decide("r2").retrain
    assert both.decide("r3", performance=[AUC]).retrain


def test_the_budget_counts_thirty_days_of_runs_and_minutes(project: Project) -> None:
    free = {"cooldown_hours": 0, "minimum_labels": 0, "repeat_labels": 0}
    first = project_of = ruled(project, **free)
    record = first.decide("r1")
    trained = Result(stage="train", run="", inputs_digest="", seconds=600, record={})
    storage.write_bytes(f"{first.decisions()[0].retraining}/train/result.json", trained.model_dump_json().encode())
    now = datetime.now(UTC)
    assert ruled(project_of, **free, budget={"runs": 2, "minutes": 10.5}).at(now).retrain
    runs = ruled(project_of, **free, budget={"runs": 1}).at(now)
    minutes = ruled(project_of, **free, budget={"minutes": 10}).at(now)
    assert (runs.stopped_by, minutes.stopped_by) == ("budget", "budget")
    assert "1 retrainings were decided in the last 30 days, 1 are allowed" in runs.reason
    assert "their training took 10.0 minutes, 10 are allowed" in minutes.reason
    first.put_back(record.decision, hours=30 * 24 + 1)
    assert ruled(project_of, **free, budget={"runs": 1, "minutes": 10}).at(now).retrain


@pytest.mark.parametrize(
    ("zone", "now", "until"),
    [
        ("UTC", "2026-03-10T21:59:00+00:00", "2026-03-10T21:59:00+00:00"),
        ("UTC", "2026-03-10T22:00:00+00:00", "2026-03-11T06:00:00+00:00"),
        ("UTC", "2026-03-11T05:59:00+00:00", "2026-03-11T06:00:00+00:00"),
        ("UTC", "2026-03-11T06:00:00+00:00", "2026-03-11T06:00:00+00:00"),
        ("Europe/Berlin", "2026-01-10T21:30:00+00:00", "2026-01-11T05:00:00+00:00"),  # CET is an hour ahead of UTC
        ("Europe/Berlin", "2026-03-28T23:30:00+00:00", "2026-03-29T04:00:00+00:00"),  # the night to CEST
        ("Europe/Berlin", "2026-10-24T21:30:00+00:00", "2026-10-25T05:00:00+00:00"),  # the night to CET
        ("Asia/Tokyo", "2026-03-10T12:59:00+00:00", "2026-03-10T12:59:00+00:00"),
        ("Asia/Tokyo", "2026-03-10T13:00:00+00:00", "2026-03-10T21:00:00+00:00"),
    ],
)
def test_quiet_hours_are_local_and_pass_midnight(zone: str, now: str, until: str) -> None:
    quiet = QuietHours.model_validate(yaml.safe_load(f"{{start: 22:00, end: 06:00, time_zone: {zone}}}"))
    assert quiet_until(quiet, datetime.fromisoformat(now)) == datetime.fromisoformat(until)


def test_quiet_hours_that_end_in_the_hour_that_autumn_repeats_end_in_either_round() -> None:
    quiet = QuietHours.model_validate(yaml.safe_load("{start: 22:00, end: 02:30, time_zone: Europe/Berlin}"))
    first, second = datetime(2026, 10, 25, 0, 15, tzinfo=UTC), datetime(2026, 10, 25, 1, 15, tzinfo=UTC)  # both are 02:15
    assert quiet_until(quiet, first) == first.replace(minute=30)
    assert quiet_until(quiet, second) == second.replace(minute=30)


def test_what_is_decided_in_quiet_hours_says_when_it_may_begin(project: Project) -> None:
    quiet = ruled(project, minimum_labels=0, quiet_hours={"start": "11:00", "end": "13:00", "time_zone": "UTC"})
    decision = quiet.at(NOON)
    assert (decision.retrain, decision.not_before) == (True, NOON.replace(hour=13))
    assert decision.reason.endswith("it begins after the quiet hours, at 2026-03-10 13:00 UTC")
    assert quiet.at(NOON.replace(hour=14)).not_before == NOON.replace(hour=14)


def test_a_person_is_not_stopped_and_the_words_stay_in_the_storage(project: Project) -> None:
    assert not project.decide("r1", "no drift").retrain
    order = Order("retraining", "mara", "a new scanner comes on Monday")
    record = project.decide("r1", "no drift", order)
    assert (record.retrain, record.trigger) == (True, "manual")
    assert record.summary == "retrain: asked for by mara"
    assert record.reason == "mara asks for it: a new scanner comes on Monday"
    assert project.decide("r1", "no drift", order) == record, "a second try finds the first one's decision"
    first, second = project.decisions()
    assert (first.retrain, second.retrain, second.who, second.stopped_by) == (False, True, "mara", "")
    assert not project.decide("r2").retrain, "others wait for the cooldown after it too"


def test_the_next_retraining_is_the_one_that_is_neither_done_nor_refused_and_may_begin(project: Project) -> None:
    now = datetime.now(UTC)
    assert next_retraining(project.config, now) == ("", "no retraining has been decided")
    record = project.decide("r1", order=Order("retraining", "mara", "why"))
    (decision,) = project.decisions()
    assert decision.retraining == f"{project.config.root}/runs/decisions_retraining.{record.retraining}"
    assert next_retraining(project.config, datetime.now(UTC))[0] == decision.retraining
    run, told = next_retraining(project.config, decision.time - timedelta(hours=1))
    assert run == ""
    assert "may not begin before 20" in told
    refusals.keep(decision.retraining, "train", "none of the 9 complete trials keeps to search.select.rules")
    run, told = next_retraining(project.config, datetime.now(UTC))
    assert run == ""
    assert told.endswith("was refused by stage train: none of the 9 complete trials keeps to search.select.rules")
    storage.write_bytes(f"{decision.retraining}/refused.json", b"{")
    assert next_retraining(project.config, datetime.now(UTC))[0] == "", "refused it was, whatever the reason"
    refusals.keep(decision.retraining, "train", "anew")
    refusals.take_back(decision.retraining, "ingest")
    assert next_retraining(project.config, datetime.now(UTC))[0] == ""
    refusals.take_back(decision.retraining, "train")
    assert next_retraining(project.config, datetime.now(UTC))[0] == decision.retraining
    storage.write_bytes(f"{decision.retraining}/promote/result.json", b"{}")
    assert next_retraining(project.config, datetime.now(UTC))[1].endswith("is done")


def test_a_person_decides_and_a_schedule_asks_by_command(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = home / "project.yaml"
    config.write_text(yaml.safe_dump(TINY))
    given = ["--config", str(config)]
    assert cli.main(["retrain", *given]) == 0
    assert capsys.readouterr().out == "nothing to do: no retraining has been decided\n"
    put((home / "r1").as_uri(), checked("no drift"))
    assert cli.main(["decide", *given, "--run", str(home / "r1")]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["retrain"] is False
    assert cli.main(["decide", *given, "--run", str(home / "r1"), "--why", "new scanner", "--by", "mara"]) == 0
    assert json.loads(capsys.readouterr().out)["record"]["reason"] == "mara asks for it: new scanner"
    assert cli.main(["retrain", *given, "--set", "data.source.path=none"]) == 2
    assert "data.source" in capsys.readouterr().err


@pytest.mark.parametrize(("page", "sections"), [("drift", {"decision"}), ("monitoring", {"notifications", "pushgateway"})])
def test_the_settings_in_the_documentation_are_valid(page: str, sections: set[str]) -> None:
    text = (Path(__file__).parents[1] / "docs" / f"{page}.md").read_text()
    trees = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    shown = [tree for tree in trees if set(tree) & sections]
    assert {name for tree in shown for name in tree} >= sections
    for tree in shown:
        ProjectConfig.model_validate(TINY | tree)
