"""How well the champion answers: measured against scikit-learn, estimated against what simulated labels then show."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from cv_factory_ops.bundle import BundleManifest
from cv_factory_ops.config.models import SmallCnn, Unet
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.drift.performance import auc_interval, estimated, expected_of_two, measured, proportion_interval
from cv_factory_ops.records import Performance


def manifest(labels: int = 2, threshold: float = 0.3, segments: bool = False) -> BundleManifest:
    return BundleManifest(
        project="test",
        domain="medical",
        labels=[str(i) for i in range(labels)],
        model=Unet() if segments else SmallCnn(width=4),
        preprocessing=PreprocessingConfig(size=32),
        mean=0.5,
        std=0.2,
        threshold=threshold,
        features={"score": "number"},
        data_digest="",
        test_digest="",
        code_version="0",
        git_sha="",
    )


def by_metric(found: list[Performance]) -> dict[str, Performance]:
    return {each.metric: each for each in found}


def test_measured_is_what_scikit_learn_says() -> None:
    rng = np.random.default_rng(0)
    scores = rng.beta(1, 2, 300)
    labels = (rng.random(300) < scores).astype(np.int64)
    reference = {"accuracy": 0.95, "accuracy_low": 0.93, "auc": 0.8}
    found = by_metric(measured(labels, np.stack([1 - scores, scores], 1), manifest(), reference))
    answers = scores >= 0.3
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, answers), abs=1e-6)
    assert found["auc"].value == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert found["sensitivity"].value == pytest.approx(recall_score(labels, answers), abs=1e-6)
    assert found["specificity"].value == pytest.approx(recall_score(labels, answers, pos_label=0), abs=1e-6)
    assert all(not each.estimated and each.labelled == 300 and each.low < each.value < each.high for each in found.values())
    assert found["accuracy"].is_worse, "0.7 against at least 0.93"
    assert (found["auc"].reference, found["auc"].is_worse) == (0.8, False), "without an interval nothing is called worse"
    assert found["sensitivity"].reference is None


def test_one_class_alone_has_no_auc_and_more_than_two_have_an_accuracy() -> None:
    scores = np.tile([0.1, 0.2, 0.9], 4)
    found = by_metric(measured(np.zeros(12, np.int64), np.stack([1 - scores, scores], 1), manifest(), {}))
    assert set(found) == {"accuracy", "specificity"}
    three = np.eye(3)[np.tile([0, 1, 2, 2], 3)] * 0.8 + 0.1
    (accuracy,) = measured(np.tile([0, 1, 2, 0], 3), three, manifest(3), {})
    assert (accuracy.metric, accuracy.value) == ("accuracy", 0.75)


@pytest.mark.parametrize(
    ("negatives", "positives", "known"),
    [
        (9, 0, set()),
        (1, 1, set()),
        (10, 1, {"accuracy", "specificity"}),
        (9, 10, {"accuracy", "sensitivity"}),
        (10, 10, {"accuracy", "sensitivity", "specificity", "auc"}),
    ],
)
def test_what_rests_on_few_labels_is_not_known(negatives: int, positives: int, known: set[str]) -> None:
    labels = np.repeat([0, 1], [negatives, positives])
    scores = np.where(labels, 0.1, 0.9)
    assert set(by_metric(measured(labels, np.stack([1 - scores, scores], 1), manifest(), {}))) == known


def test_estimates_are_the_mean_of_what_simulated_labels_show() -> None:
    rng = np.random.default_rng(1)
    scores = rng.beta(0.7, 1.6, 400)
    expected, shown = expected_of_two(scores, 0.3), []
    answers = scores >= 0.3
    for _ in range(400):
        labels = rng.random(400) < scores
        shown.append(
            [
                accuracy_score(labels, answers),
                recall_score(labels, answers),
                recall_score(labels, answers, pos_label=0),
                roc_auc_score(labels, scores),
            ]
        )
    means = np.mean(shown, axis=0)
    for metric, mean, each in zip(("accuracy", "sensitivity", "specificity", "auc"), means, np.transpose(shown), strict=True):
        value, (low, high) = expected[metric]  # type: ignore[index]
        assert value == pytest.approx(mean, abs=0.004), metric
        inside = np.mean((each >= low) & (each <= high))
        assert inside >= 0.93, f"{metric}: the interval holds what comes in {inside:.0%} of cases"


def test_expected_auc_is_that_of_each_answer_as_both_classes() -> None:
    scores = np.random.default_rng(2).choice([0.0, 0.1, 0.2, 0.5, 0.8, 1.0], 60)
    both = np.r_[np.ones(60), np.zeros(60)]
    expected = roc_auc_score(both, np.r_[scores, scores], sample_weight=np.r_[scores, 1 - scores])
    assert expected_of_two(scores, 0.5)["auc"][0] == pytest.approx(expected)


def test_estimate_falls_where_the_model_is_less_sure() -> None:
    rng = np.random.default_rng(3)
    sure, unsure = rng.beta(0.2, 0.2, 500), rng.beta(3, 3, 500)
    quiet = by_metric(estimated(rng.beta(0.2, 0.2, 500), sure, manifest(threshold=0.5)))
    worse = by_metric(estimated(np.r_[unsure, np.nan], sure, manifest(threshold=0.5)))
    assert not any(each.is_worse for each in quiet.values())
    assert all(each.is_worse and each.estimated and each.labelled == 0 for each in worse.values())
    assert worse["accuracy"].reference == quiet["accuracy"].reference == pytest.approx(np.maximum(sure, 1 - sure).mean())


def test_of_more_classes_the_accuracy_is_the_mean_confidence() -> None:
    (found,) = estimated(np.array([0.9, 0.7]), np.array([0.9, 0.95]), manifest(3))
    assert (found.metric, found.value, found.reference) == ("accuracy", 0.8, 0.925)


def test_nothing_is_estimated_of_segmentations_or_without_scores() -> None:
    scores = np.array([0.9, 0.7])
    assert estimated(scores, scores, manifest(segments=True)) == []
    assert estimated(np.array([np.nan]), scores, manifest()) == []


def test_intervals_are_those_of_the_literature() -> None:
    # Newcombe 1998, Statistics in Medicine 17, table I: by the score method
    for right, rows, expected in ((81, 263, (0.2553, 0.3662)), (15, 148, (0.0624, 0.1605)), (0, 20, (0, 0.1611))):
        assert proportion_interval(right / rows, rows) == pytest.approx(expected, abs=5e-5)
    # Hanley & McNeil 1982, p. 33: area 0.893, 51 abnormal and 58 normal, standard error 0.032
    low, high = auc_interval(0.893, 51, 58)
    assert (high - low) / 2 / 1.96 == pytest.approx(0.032, abs=1e-3)


@pytest.mark.parametrize(("positives", "negatives", "distance"), [(10, 10, 0.0), (10, 10, 3.0), (300, 10, 1.0), (10, 300, 2.0)])
def test_the_interval_of_an_auc_holds_the_true_one_also_of_few_labels(positives: int, negatives: int, distance: float) -> None:
    """Scores are normal, so the area is known: that of the distance over the square root of 2."""
    rng, true, inside = np.random.default_rng(4), norm.cdf(distance / np.sqrt(2)), []
    labels = np.repeat([1, 0], [positives, negatives])
    for _ in range(400):
        area = roc_auc_score(labels, rng.normal(distance * labels))
        low, high = auc_interval(float(area), positives, negatives)
        inside.append(low <= true <= high)
    assert np.mean(inside) >= 0.92


def test_no_auc_is_certain() -> None:
    for value in (0.0, 1.0):
        low, high = auc_interval(value, 10, 10)
        assert high - low == pytest.approx(0.2, abs=0.01)
        assert low <= value <= high
