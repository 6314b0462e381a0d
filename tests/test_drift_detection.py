"""The drift tests themselves: against scipy, against every possible window, and by simulation of quiet sequences."""

from __future__ import annotations

import json
import tracemalloc
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, chi2_contingency, kruskal, permutation_test

from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.domain import Kind, open_domain
from cv_factory_ops.drift import detect, picture, sequential
from cv_factory_ops.drift.detect import TOGETHER, Comparison, Verdict, compare, judge
from cv_factory_ops.drift.report import write_report
from cv_factory_ops.drift.subgroups import groups_of, with_groups
from cv_factory_ops.groups import group_of
from cv_factory_ops.records import SlowDriftState
from tests.drift import KINDS, Project, project_in, quiet, table

NUMBERS: dict[str, Kind] = dict.fromkeys(("a", "b", "c", "d"), "number")


def judged(reference: pd.DataFrame, window: pd.DataFrame, kinds: dict[str, Kind], alpha: float = 0.01) -> Verdict:
    return judge(compare(reference, window, kinds, alpha))


def statistic(scores: NDArray[np.float64], size: int) -> float:
    """S where the window is the last rows."""
    rows = len(scores)
    return float(rows * (rows - 1) / (size * (rows - size)) * (scores[-size:].sum(0) ** 2).sum())


def correlated(rng: np.random.Generator, rows: int) -> pd.DataFrame:
    """Four columns that share nearly all of their variance."""
    common = rng.normal(size=(rows, 1))
    return pd.DataFrame(common + 0.2 * rng.normal(size=(rows, 4)), columns=list(NUMBERS))


def test_statistics_are_those_of_kruskal_and_pearson() -> None:
    rng = np.random.default_rng(0)
    reference, window = rng.normal(size=70).round(1), rng.normal(0.3, 1, size=40).round(1)
    location = detect.number_scores(np.concatenate([reference, window]))[:, :1]
    assert statistic(location, 40) == pytest.approx(kruskal(reference, window).statistic)
    sides = [rng.choice(list("abc"), size, p=[0.6, 0.3, 0.1]).astype(object) for size in (70, 40)]
    counts = [[(side == name).sum() for name in "abc"] for side in sides]
    pearson = chi2_contingency(counts, correction=False).statistic
    assert statistic(detect.category_scores(np.concatenate(sides)), 40) == pytest.approx(pearson * 109 / 110)


@pytest.mark.parametrize("size", [3, 4, 6])
def test_moments_are_those_over_every_possible_window(size: int) -> None:
    rng = np.random.default_rng(1)
    for scores in (
        detect.number_scores(np.array([1.0, 1, 2, 3, 3, 8, 9, np.nan, 4])),
        detect.category_scores(np.array(list("aaaaabbcd"), object)),
        detect.scores_together(rng.normal(size=(9, 2))),
    ):
        windows = np.array([scores[list(rows)].sum(0) for rows in combinations(range(9), size)])
        values = 9 * 8 / (size * (9 - size)) * (windows**2).sum(1)
        assert detect.moments(scores, size) == pytest.approx((values.mean(), values.var()))


def test_p_values_are_those_of_a_permutation_test() -> None:
    rng = np.random.default_rng(2)
    for shift in (0.0, 0.4, 0.6):
        reference, window = rng.normal(size=90), rng.normal(shift, 1, size=40)
        scores = detect.number_scores(np.concatenate([reference, window]))
        p = float(detect.p_values(np.array([statistic(scores, 40)]), scores, 40)[0])

        def measure(rows: NDArray[np.intp], others: NDArray[np.intp], scores: NDArray[np.float64] = scores) -> float:
            return float((scores[rows.astype(int)].sum(0) ** 2).sum())

        sides = (np.arange(90, 130), np.arange(90))
        exact = permutation_test(sides, measure, n_resamples=2_000, alternative="greater", rng=np.random.default_rng(0)).pvalue
        assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 2_000) + 0.002)


def test_p_values_are_not_smaller_than_they_should_be() -> None:
    rng = np.random.default_rng(3)
    names = rng.choice(list("abcde"), 190, p=[0.9, 0.06, 0.02, 0.01, 0.01]).astype(object)
    for scores in (detect.category_scores(names), detect.number_scores(rng.exponential(size=190).round(1))):
        values = np.array([statistic(scores[rng.permutation(190)], 50) for _ in range(2_000)])
        found = detect.p_values(values, scores, 50)
        for level in (0.1, 0.01):
            hits = int((found <= level).sum())
            assert binomtest(hits, 2_000, 1.5 * level, alternative="greater").pvalue > 0.001, f"{hits} of 2000 at {level}"


@pytest.mark.parametrize(("rows", "size"), [(200, 50), (60, 100)])
def test_quiet_windows_alarm_no_more_often_than_declared(rows: int, size: int) -> None:
    alpha, windows = 0.1, 100
    rng = np.random.default_rng(5)
    alarms = sum(bool(judged(table(quiet(rng, rows)), table(quiet(rng, size)), KINDS, alpha).drifted) for _ in range(windows))
    assert binomtest(alarms, windows, alpha, alternative="greater").pvalue > 0.01, f"{alarms} of {windows}"
    assert alarms > 0  # the tests are not asleep


def test_correlated_columns_cost_less_than_bonferroni_and_keep_the_rate() -> None:
    alpha, windows = 0.1, 100
    rng = np.random.default_rng(6)
    verdicts = [judged(correlated(rng, 200), correlated(rng, 50), NUMBERS, alpha) for _ in range(windows)]
    alarms = sum(bool(verdict.drifted) for verdict in verdicts)
    assert alarms > 0
    assert binomtest(alarms, windows, alpha, alternative="greater").pvalue > 0.01, f"{alarms} of {windows}"
    assert np.median([verdict.threshold for verdict in verdicts]) > 1.3 * alpha / 5


def moved(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(a=frame["a"] + 0.8)


def widened(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(a=2 * frame["a"])


def apart(frame: pd.DataFrame) -> pd.DataFrame:
    """Two columns that go together go a little apart."""
    return frame.assign(a=frame["a"] + 0.15, b=frame["b"] - 0.15)


@pytest.mark.parametrize(
    ("change", "found"),
    [(moved, "a"), (widened, "a"), (apart, TOGETHER)],
    ids=["location", "spread", "together alone"],
)
def test_documented_shifts_are_found(change: object, found: str) -> None:
    rng = np.random.default_rng(7)
    reference, window = correlated(rng, 400), correlated(rng, 100)
    assert callable(change)
    assert judged(reference, window, NUMBERS).drifted == {}
    assert found in judged(reference, change(window), NUMBERS).drifted


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize(
    ("changed", "column"),
    [
        ({"metadata_manufacturer": "Gamma"}, "metadata_manufacturer"),
        ({"metadata_manufacturer": "Unseen"}, "metadata_manufacturer"),
        ({"metadata_photometric": "MONOCHROME1"}, "metadata_photometric"),
        ({"metadata_photometric": None}, "metadata_photometric"),
        ({"metadata_kvp": None}, "metadata_kvp_missing"),
        ({"metadata_kvp": float("inf")}, "metadata_kvp_missing"),
        ({"score": None}, "score_missing"),
    ],
    ids=["rare", "unseen", "constant changes", "category missing", "number missing", "infinite", "never missing before"],
)
def test_degenerate_columns_are_evidence(changed: dict[str, str | float | None], column: str, share: float) -> None:
    reference, rows = quiet(np.random.default_rng(0), 150), quiet(np.random.default_rng(1), 80)
    window = [row | changed if i < share * len(rows) else row for i, row in enumerate(rows)]
    assert next(iter(judged(table(reference), table(window), KINDS).drifted)) == column


def test_columns_without_values_or_differences_are_no_evidence() -> None:
    frame = pd.DataFrame({"a": [1.0] * 60, "b": [np.nan] * 60, "c": ["x"] * 60})
    verdict = judged(frame, frame[:50], {"a": "number", "b": "number", "c": "category"})
    assert set(verdict.p_values.values()) == {1.0}
    assert verdict.drifted == {}


def test_many_categories_are_told_apart_up_to_a_limit() -> None:
    rng = np.random.default_rng(8)
    names = pd.DataFrame({"c": [f"device {i}" for i in rng.integers(0, 400, 500)]})
    assert detect.category_scores(names["c"].to_numpy(object)).shape == (500, detect.LEVELS + 1)
    assert judged(names[:400], names[400:], {"c": "category"}).drifted == {}
    assert judged(names[:400], names[400:].assign(c="device 1"), {"c": "category"}).drifted


def test_report_of_evidently_holds_our_p_values_and_verdict(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    reference, window = quiet(rng, 90), quiet(rng, 120)
    window = [row | {"image_mean": float(row["image_mean"] or 0) + 0.05, "metadata_manufacturer": "Gamma"} for row in window]
    comparison = compare(table(reference), table(window).assign(score=np.nan), KINDS, 0.01)
    verdict = judge(comparison)
    write_report(comparison, verdict, tmp_path)
    metrics = json.loads((tmp_path / "report.json").read_text())["metrics"]
    shown = {item["config"]["column"]: item["value"] for item in metrics if item["config"]["type"].endswith(":ValueDrift")}
    assert shown == pytest.approx({name: p for name, p in verdict.p_values.items() if name in shown})
    assert shown.keys() == comparison.testable.keys()
    (count,) = [item["value"]["count"] for item in metrics if item["config"]["type"].endswith(":DriftedColumnsCount")]
    assert count == len(verdict.drifted) > 0
    assert verdict.p_values["score"] == 1.0  # no value in the window: its column of missing values says so
    assert "score_missing" in verdict.drifted


def test_cumulative_sums_cross_as_often_as_computed() -> None:
    rng = np.random.default_rng(9)
    horizon, level, sequences = 40, 5.0, 4_000
    sums, crossed = np.zeros(sequences), np.zeros(sequences, bool)
    for window in range(2 * horizon):
        sums = np.maximum(0, sums + rng.normal(size=sequences) - sequential.ALLOWANCE)
        if window == horizon:
            sums = rng.choice(sums[~crossed], sequences)  # those that have not alarmed before
            crossed[:] = False
        crossed |= sums >= level
    expected = sequential.crossing(level, horizon)
    assert crossed.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected / sequences) + 0.01)
    assert sequential.crossing(0.0, horizon) == 1.0


def advanced(reference: pd.DataFrame, windows: list[pd.DataFrame], kinds: dict[str, Kind]) -> SlowDriftState:
    """The state after the windows; the scores of the window's own test are not needed for it."""
    state = None
    for window in windows:
        state = sequential.advance(state, Comparison(reference, window, kinds, 0.01, {}), DriftConfig())
    assert state is not None
    return state


def test_quiet_sequences_seldom_alarm_though_they_share_a_small_reference() -> None:
    config = DriftConfig(slow_alpha=0.2, horizon=30)
    rng = np.random.default_rng(10)
    alarms, sequences = 0, 40
    for _ in range(sequences):
        reference, state = pd.DataFrame(rng.normal(size=(100, 4)), columns=list(NUMBERS)), None
        for _ in range(config.horizon):
            window = pd.DataFrame(rng.normal(size=(100, 4)), columns=list(NUMBERS))
            state = sequential.advance(state, Comparison(reference, window, NUMBERS, 0.01, {}), config)
            if sequential.drifted(state, config):
                alarms += 1
                break
    assert binomtest(alarms, sequences, 0.2, alternative="greater").pvalue > 0.01, f"{alarms} of {sequences}"


def test_slow_drift_is_found_that_no_window_shows() -> None:
    rng = np.random.default_rng(13)
    kinds: dict[str, Kind] = {"a": "number", "b": "number", "scanner": "category"}

    def night(shift: float) -> pd.DataFrame:
        columns = {"a": rng.normal(shift, 1, 100), "b": rng.normal(size=100), "scanner": rng.choice(["x", "y"], 100)}
        return pd.DataFrame(columns)

    reference = pd.concat([night(0) for _ in range(20)], ignore_index=True)
    windows = [night(-min(0.03 * i, 0.15)) for i in range(22)]
    assert [window for window in windows if judged(reference, window, kinds).drifted] == []
    state = advanced(reference, windows, kinds)
    assert list(sequential.drifted(state, DriftConfig())) == ["a"]
    assert state.series["a"].down > state.series["a"].up
    assert set(state.series) == {"a", "b", "scanner=x", "scanner=y"}
    assert state.windows == 22


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_slow_drift_ends_when_the_feature_comes_back(seed: int) -> None:
    """The windows that drifted have not become what is normal: there is no alarm that the feature fell."""
    rng, config, state = np.random.default_rng(seed), DriftConfig(), None
    reference, alarms = pd.DataFrame({"a": rng.normal(size=2_000)}), dict[int, bool]()
    for night in range(200):
        window = pd.DataFrame({"a": rng.normal(0.3 if 10 <= night < 40 else 0.0, 1, 100)})
        state = sequential.advance(state, Comparison(reference, window, {"a": "number"}, 0.01, {}), config)
        if sequential.drifted(state, config):
            alarms[night] = state.series["a"].up > state.series["a"].down
    assert set(range(15, 40)) <= alarms.keys(), "it stays so as long as it lasts"
    assert all(alarms.values()), "always upward"
    assert max(alarms) < 80


def test_a_window_that_its_own_test_alarms_for_is_not_taken_for_normal() -> None:
    rng = np.random.default_rng(0)
    reference, window = pd.DataFrame({"a": rng.normal(size=500)}), pd.DataFrame({"a": rng.normal(3, 1, 100)})
    comparison = compare(reference, window, {"a": "number"}, 0.01)
    state = sequential.advance(None, comparison, DriftConfig(), judge(comparison).drifted)
    assert (state.series["a"].rows, state.series["a"].total) == (0, 0.0)
    assert state.series["a"].up > 0


def test_which_categories_are_told_apart_does_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(11)
    values = np.array([f"device {i}" for i in range(100)] * 2, object)
    order = rng.permutation(len(values))
    assert np.allclose(detect.category_scores(values)[order], detect.category_scores(values[order]))
    column = pd.Series(values)
    assert (group_of(column, {})[order] == group_of(column.iloc[order], {})).all()


def test_the_least_rate_of_false_alarms_needs_no_gigabyte() -> None:
    rng = np.random.default_rng(12)
    names: dict[str, Kind] = {f"c{i}": "category" for i in range(12)}
    frames = [pd.DataFrame({name: rng.integers(0, 29, 60).astype(str) for name in names}) for _ in range(2)]
    comparison = compare(*frames, names, 1e-4)
    tracemalloc.start()
    judge(comparison)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(scores.shape[1] for scores in comparison.scores.values()) > 300
    assert most < 500 << 20, f"{most >> 20} MiB"


def test_values_that_the_reference_hardly_has_are_tested_but_not_told() -> None:
    rng = np.random.default_rng(13)
    kinds: dict[str, Kind] = {"metadata_model_name": "category", "abstained": "category"}
    models = ["X1"] * 30 + ["X2"] * 26 + ["SMITH^JOHN"] * 4
    reference = pd.DataFrame({"metadata_model_name": models, "abstained": ["no"] * 59 + ["yes"]})
    window = pd.DataFrame(
        {"metadata_model_name": ["X1"] * 30 + ["MILLER^ANN"] * 50, "abstained": rng.choice(["yes", "no"], 80)}
    )
    window.loc[0, "metadata_model_name"] = None
    comparison = compare(reference, window, kinds, 0.01)
    assert "metadata_model_name" in judge(comparison).drifted
    assert set(comparison.reference["metadata_model_name"]) == {"X1", "X2", "others"}
    assert set(comparison.window["metadata_model_name"]) == {"X1", "others", "missing"}
    assert set(comparison.reference["abstained"]) == {"yes", "no"}, "an answer of ours is no name"
    groups = groups_of(comparison, open_domain("medical"), DriftConfig(subgroups=["model_name"]))
    assert [group.value for group in groups] == ["X1", "X2", "others", "not known"]
    assert set(sequential.advance(None, comparison, DriftConfig()).series) == {
        "metadata_model_name=X1",
        "metadata_model_name=X2",
    }


def test_text_of_headers_is_neither_markup_nor_a_formula(tmp_path: Path) -> None:
    wicked = ["</script><script>alert(1)</script>", r"A$ \frac{ B_$", "plain"]
    rng = np.random.default_rng(14)
    rows = [quiet(rng, 300), quiet(rng, 300)]
    sides = [table(side).assign(metadata_manufacturer=rng.choice(wicked, 300)) for side in rows]
    sides[1]["image_mean"] += 0.2
    sides[1].loc[:200, "metadata_manufacturer"] = wicked[0]
    comparison = compare(sides[0], sides[1], KINDS, 0.01)
    comparison = with_groups(comparison, groups_of(comparison, open_domain("medical"), DriftConfig()))
    verdict = judge(comparison)
    assert "metadata_manufacturer" in verdict.drifted
    assert any(wicked[0] in name for name in verdict.p_values)
    assert any(wicked[1] in name for name in verdict.p_values)
    write_report(comparison, verdict, tmp_path)
    picture.draw(comparison, verdict, tmp_path / "drift.png")
    page = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in page
    assert "alert(1)" in page


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path, tracking_uri: str) -> Project:
    return project_in(tmp_path, request.node.name, tracking_uri)


def test_a_window_counts_once_in_the_test_of_slow_drift(project: Project) -> None:
    rng = np.random.default_rng(1)
    for _ in range(2):
        project.capture(quiet(rng, 60))
        last = project.check(f"r{project.written}")
    assert last.slow is not None
    assert last.slow.windows == 2
    assert last.slow.series["score"].rows == 120
    again = project.check("r2", force=True)
    assert again.slow == last.slow
    first = project.check("r1", force=True).slow
    assert first is not None
    assert first.windows == 1


def test_slow_drift_is_a_verdict_and_its_own_words(project: Project) -> None:
    settings = project.config.drift.model_copy(update={"slow_alpha": 0.5, "horizon": 3})
    project.config = project.config.model_copy(update={"drift": settings})
    rng = np.random.default_rng(1)
    for _ in range(3):
        project.capture([row | {"image_mean": float(row["image_mean"] or 0) + 0.06} for row in quiet(rng, 60)])
        record = project.check(f"r{project.written}")
    assert record.verdict == "drift"
    assert "image_mean (slowly)" in record.drifted
    assert "slow drift in 1 (image_mean p=" in record.summary
    assert "over 3 windows" in record.summary
