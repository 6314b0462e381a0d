"""The gate: what the paired bootstrap resamples, what each criterion asks, and whether the test set was seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score, roc_auc_score

from cv_factory_ops import registry, storage
from cv_factory_ops.config import load
from cv_factory_ops.config.evaluation import EvaluationConfig, GateConfig, SubgroupRule
from cv_factory_ops.domain import open_domain
from cv_factory_ops.evaluation.bootstrap import Judged
from cv_factory_ops.evaluation.gate import difference_interval, in_subgroups, judge
from cv_factory_ops.evaluation.gate_picture import draw
from cv_factory_ops.evaluation.subgroups import subgroups
from cv_factory_ops.evaluation.unseen import unseen
from cv_factory_ops.ingestion.splits import test_digest as digest_of
from cv_factory_ops.records import Criterion, EvaluateRecord, GateRecord, IngestRecord
from cv_factory_ops.stage import Stage


def record(**known: Any) -> EvaluateRecord:
    return EvaluateRecord(
        summary="",
        predictions="",
        recent_metrics={},
        champion_recent_metrics={},
        champion_test_digest="t",
        threshold=0.5,
        champion_threshold=0.5,
        pictures=[],
        **{"metrics": {}, "champion_metrics": {}, "champion_version": 1} | known,
    )


def table(patients: int, images: int, lead: float) -> pd.DataFrame:
    """``images`` identical rows a patient; the challenger's scores are ``lead`` better than the champion's."""
    generator = np.random.default_rng(0)
    label = np.arange(patients) % 2
    noise = generator.standard_normal((2, patients))
    scores = {
        who: 1 / (1 + np.exp(-(more + 1.0) * (2 * label - 1) - n))
        for who, more, n in zip(("challenger", "champion"), (lead, 0), noise, strict=True)
    }
    rows = np.repeat(np.arange(patients), images)
    columns = {f"{who}_{i}": (p if i else 1 - p)[rows] for who, p in scores.items() for i in (0, 1)}
    return pd.DataFrame({"id": np.arange(len(rows)).astype(str), "patient": rows.astype(str), "label": label[rows], **columns})


def test_a_better_challenger_has_an_interval_above_zero() -> None:
    low, high = difference_interval(table(300, 1, lead=1.5), record(), GateConfig())
    assert 0 < low < high


def test_images_of_one_patient_do_not_make_the_interval_narrower() -> None:
    """Four copies of each image are no new evidence: resampling images would halve the interval."""
    config = GateConfig(bootstrap=400)
    one, four = (difference_interval(table(100, images, lead=0.0), record(), config) for images in (1, 4))
    assert four[1] - four[0] == pytest.approx(one[1] - one[0], rel=0.15)


def test_the_operating_point_and_the_calibration_are_held_against_their_limits() -> None:
    metrics = {"auc": 0.9, "sensitivity": 0.84, "specificity": 0.95, "ece": 0.08}
    intervals = {"test": {name: (value - 0.05, value + 0.05) for name, value in metrics.items()}}
    config = GateConfig(minimum=0.8, sensitivity=0.85, specificity=0.95, calibration_error=0.05)
    rows = judge(record(metrics=metrics, intervals=intervals, champion_version=None), "t", None, config)
    told = {row.name: (row.rule, row.limit, row.value, row.passed) for row in rows}
    assert told == {
        "auc": ("at least", 0.8, 0.9, True),
        "sensitivity": ("at least", 0.85, 0.84, False),
        "specificity": ("at least", 0.95, 0.95, True),
        "ece": ("at most", 0.05, 0.08, False),
    }
    assert [row.reason for row in rows if not row.passed] == [
        "sensitivity 0.840 is below gate.sensitivity 0.85",
        "ece 0.080 is above gate.calibration_error 0.05",
    ]
    assert (rows[1].low, rows[1].high) == intervals["test"]["sensitivity"]


def test_what_is_not_asked_for_is_no_criterion_and_what_is_undefined_does_not_pass() -> None:
    (only,) = judge(record(champion_version=None), "t", None, GateConfig())
    assert (only.passed, only.reason) == (False, "auc is undefined on the test set")
    asked = judge(record(champion_version=None), "t", None, GateConfig(sensitivity=0.1, calibration_error=0.1))
    assert [row.passed for row in asked] == [False, False, False]


def test_the_lower_end_of_the_interval_decides_on_non_inferiority() -> None:
    both = {"metrics": {"auc": 0.9}, "champion_metrics": {"auc": 0.88}}
    for margin, passed in ((0.02, False), (0.03, True)):
        (_, row, _) = judge(record(**both), "t", (-0.03, 0.07), GateConfig(margin=margin))
        assert (row.name, row.limit, row.value, row.passed) == ("auc - champion's", -margin, 0.02, passed)
    (_, row, _) = judge(record(**both), "t", (float("nan"), float("nan")), GateConfig())
    assert row.passed is False


def grouped() -> tuple[pd.DataFrame, EvaluateRecord]:
    """200 women on whom the challenger is better, 200 men on whom it is worse, and 3 patients of neither."""
    parts = []
    for sex, count, lead in (("F", 200, 1.5), ("M", 200, -0.8), ("O", 3, 0.0)):
        rows = table(count, 1, lead).assign(meta_sex=sex)
        parts.append(rows.assign(patient=sex + rows["patient"], id=sex + rows["id"]))
    rows = pd.concat(parts, ignore_index=True)
    scores = rows[["challenger_0", "challenger_1"]].to_numpy()
    manifest = Manifest()
    judged = Judged(rows["label"].to_numpy(), scores, np.arange(len(rows)), manifest)  # type: ignore[arg-type]
    config = EvaluationConfig(bootstrap=100, minimum=20, subgroups=["sex"])
    found = subgroups(judged, rows, open_domain("medical"), config)
    return rows, record(subgroups=found, champion_version=1)


class Manifest:
    """What of a bundle's manifest decides on answers."""

    threshold, abstention = 0.5, 0.0


def test_each_subgroup_is_judged_by_itself_and_small_ones_are_named() -> None:
    rows, evaluation = grouped()
    rule = SubgroupRule(metric="auc", minimum=0.7, margin=0.02)
    config = GateConfig(bootstrap=200, subgroups=rule)
    found = {row.name: row for row in in_subgroups(rule, evaluation, rows, open_domain("medical"), 20, config)}
    assert list(found) == [
        *("auc, sex F", "auc, sex F - champion's", "auc, sex M", "auc, sex M - champion's"),
        "auc, sex O",
    ]
    for sex, passed in (("F", True), ("M", False)):
        own = rows[rows["meta_sex"] == sex]
        new, old = (roc_auc_score(own["label"], own[f"{who}_1"]) for who in ("challenger", "champion"))
        assert found[f"auc, sex {sex}"].value == pytest.approx(new, abs=1e-6)
        against = found[f"auc, sex {sex} - champion's"]
        assert against.value == pytest.approx(new - old, abs=1e-6)
        assert against.passed is passed
        assert against.low is not None
        assert against.low < new - old < against.high
    assert "may be" in found["auc, sex M - champion's"].reason
    few = found["auc, sex O"]
    assert (few.passed, few.reason) == (None, "not judged: 3 patients, 20 are needed")


def test_a_subgroup_rule_may_ask_for_the_operating_point() -> None:
    rows, evaluation = grouped()
    rule = SubgroupRule(metric="sensitivity", minimum=0.75)
    found = list(in_subgroups(rule, evaluation, rows, open_domain("medical"), 20, GateConfig(subgroups=rule)))
    own = rows[rows["meta_sex"] == "M"]
    expected = recall_score(own["label"], own["challenger_1"] >= 0.5)
    men = next(row for row in found if row.name == "sensitivity, sex M")
    assert men.value == pytest.approx(expected, abs=1e-6)
    assert men.passed is bool(expected >= 0.75)
    assert not any("champion" in row.name for row in found), "a margin of 1 asks for no comparison"


def test_without_metadata_the_rule_is_named_as_not_judged() -> None:
    rule = SubgroupRule()
    (row,) = in_subgroups(rule, record(), pd.DataFrame(), open_domain("medical"), 20, GateConfig(subgroups=rule))
    assert (row.passed, row.reason) == (None, "no metadata of the test set makes a group")


@pytest.fixture
def gate(run: str, project: Callable[..., Path], home: Path) -> Stage:
    """The stage ``gate`` of a run with real shards."""
    return Stage("gate", load(project()), run, home / "run")


def rows_of(home: Path, split: str) -> pd.DataFrame:
    return pd.read_parquet(home / "run" / "preprocess" / f"{split}.parquet")


def told(stage: Stage, champion: int | None = None, declared: str = "") -> dict[str, Criterion]:
    return {row.name: row for row in unseen(stage, declared or stage.read(IngestRecord).test_digest, champion)}


def test_a_test_set_that_nobody_has_seen_passes(gate: Stage, home: Path) -> None:
    found = told(gate)
    assert {name: (row.value, row.passed) for name, row in found.items()} == {
        "test set other than declared": (0.0, True),
        "test images trained on": (0.0, True),
        "test patients trained on": (0.0, True),
    }


@pytest.mark.parametrize(("column", "what"), [("digest", "images"), ("patient", "patients")])
def test_a_test_image_or_patient_among_those_trained_on_is_found(gate: Stage, home: Path, column: str, what: str) -> None:
    """Somebody has added rows to the training shards afterwards."""
    train, test = rows_of(home, "train"), rows_of(home, "test")
    train.loc[:1, column] = test[column].unique()[:2]
    train.to_parquet(home / "run" / "preprocess" / "train.parquet")
    found = told(gate)
    assert found[f"test {what} trained on"].value == 2.0
    assert found[f"test {what} trained on"].reason == f"2 {what} of the test set were trained on"
    assert [name for name, row in found.items() if not row.passed] == [f"test {what} trained on"]


def test_another_test_set_than_the_bundle_declares_is_found(gate: Stage, home: Path) -> None:
    assert told(gate, declared="0" * 64)["test set other than declared"].passed is False
    test = rows_of(home, "test")
    test[1:].to_parquet(home / "run" / "preprocess" / "test.parquet")
    assert told(gate)["test set other than declared"].passed is False
    assert told(gate, declared=digest_of(test["digest"][1:]))["test set other than declared"].passed is False


def test_what_the_champion_was_trained_on_is_asked_too(gate: Stage, home: Path) -> None:
    client = registry.connect(gate.config)
    client.create_registered_model("tiny")
    for run in (gate.run, (home / "gone").as_uri()):
        client.create_model_version("tiny", run, tags={registry.RUN_TAG: run})
    found = told(gate, champion=1)
    assert found["test images the champion trained on"].passed
    assert found["test patients the champion trained on"].passed
    (lost,) = [row for row in told(gate, champion=2).values() if row.passed is None]
    assert lost.reason == "not judged: the training data of version 2 cannot be read: its run is not there any more"


def test_of_shards_on_s3_only_the_tables_are_fetched(gate: Stage, home: Path, bucket: str) -> None:
    run = f"s3://{bucket}/run"
    for name in ("ingest/result.json", "preprocess/result.json"):
        storage.upload_file(home / "run" / name, f"{run}/{name}")
    storage.upload_tree(home / "run" / "preprocess", f"{run}/preprocess")
    client = registry.connect(gate.config)
    client.create_registered_model("tiny")
    client.create_model_version("tiny", run, tags={registry.RUN_TAG: run})
    found = told(Stage("gate", gate.config, run, home / "work"), champion=1)
    assert [row.passed for row in found.values()] == [True] * 5
    fetched = {path.name for path in (home / "work").rglob("*") if path.is_file()}
    assert fetched == {"shards.json", "test.parquet", "train.parquet", "val.parquet"}


def test_the_picture_shows_every_interval_against_its_limit(project: Callable[..., Path]) -> None:
    def row(name: str, limit: float, value: float, passed: bool) -> Criterion:
        return Criterion(
            name=name, rule="at least", limit=limit, value=value, low=value - 0.1, high=value + 0.1, passed=passed, reason=""
        )

    criteria = [row("auc", 0.8, 0.9, True), row("sensitivity", 0.9, 0.7, False), row("auc - champion's", -0.02, 0.1, True)]
    criteria.append(Criterion(name="test images trained on", rule="at most", limit=0, value=0.0, passed=True))
    criteria.append(Criterion(name="auc, sex O", rule="at least", limit=0, passed=None, reason="not judged: 3 patients"))
    verdict = GateRecord(
        summary="",
        verdict="refused",
        metric="auc",
        challenger=0.9,
        champion=0.8,
        difference_low=0.0,
        difference_high=0.2,
        reasons=["sensitivity"],
        criteria=criteria,
        test_digest="t",
    )
    figure = draw(verdict, 0.95)
    values, differences = figure.axes
    assert [label.get_text() for label in values.get_yticklabels()] == ["auc", "sensitivity"]
    assert [label.get_text() for label in differences.get_yticklabels()] == ["auc - champion's"]
    drawn = [collection.get_segments()[0] for collection in values.collections]  # type: ignore[attr-defined]
    spans = [tuple(segment[:, 0].round(6)) for segment in drawn]
    assert spans == [(0.8, 1.0), (0.8, 0.8), (0.6, 0.8), (0.9, 0.9)], "interval and limit of each"
    below = figure.get_supxlabel()
    assert "test images trained on: 0, at most 0" in below
    assert "auc, sex O: not judged: 3 patients" in below
