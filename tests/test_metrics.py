"""Metrics, calibration and their intervals, each against another implementation on the same arrays."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax
from sklearn import metrics as reference
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator

from cv_factory_ops import metrics
from cv_factory_ops.calibration import fit_temperature, least_confidence, negative_log_likelihood, operating_point, tempered
from cv_factory_ops.config.evaluation import SensitivityPoint, SpecificityPoint, YoudenPoint
from cv_factory_ops.evaluation.bootstrap import percentile_interval, resamples


def _data(classes: int, seed: int = 0, count: int = 400) -> tuple[metrics.Labels, metrics.Scores]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    scores = generator.random((count, classes)).round(2)  # rounded: ties must count half
    scores[np.arange(count), labels] += 0.3
    return labels, scores / scores.sum(1, keepdims=True)


def _expected(labels: metrics.Labels, scores: metrics.Scores, threshold: float) -> dict[str, float]:
    """The same by scikit-learn, of the rows as they are."""
    classes = scores.shape[1]
    answers = (scores[:, 1] >= threshold).astype(int) if classes == 2 else scores.argmax(1)
    sides = [1] if classes == 2 else range(classes)
    each = {
        "auc": [reference.roc_auc_score(labels == c, scores[:, c]) for c in sides],
        "auprc": [reference.average_precision_score(labels == c, scores[:, c]) for c in sides],
        "sensitivity": [reference.recall_score(labels == c, answers == c) for c in sides],
        "specificity": [reference.recall_score(labels != c, answers != c) for c in sides],
    }
    return {name: float(np.mean(values)) for name, values in each.items()} | {
        "accuracy": reference.accuracy_score(labels, answers),
        "brier": reference.brier_score_loss(labels, scores[:, 1] if classes == 2 else scores),
    }


@pytest.mark.parametrize("classes", [2, 4])
def test_metrics_are_those_of_scikit_learn(classes: int) -> None:
    labels, scores = _data(classes)
    found, expected = metrics.classification(labels, scores, 0.55), _expected(labels, scores, 0.55)
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert set(found) - set(expected) == {"ece"}
    assert metrics.auc(labels, scores) == pytest.approx(expected["auc"], abs=1e-12)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_row_that_counts_twice_is_two_rows(classes: int) -> None:
    labels, scores = _data(classes, seed=3, count=120)
    weights = np.random.default_rng(0).integers(0, 4, (5, 120)).astype(float)
    found = metrics.resampled(labels, scores, 0.5, 0.6, weights)
    for i, counts in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(120), counts)
        repeated = metrics.classification(labels[rows], scores[rows], 0.5, 0.6)
        assert {name: values[i] for name, values in found.items()} == pytest.approx(repeated, abs=1e-6)
        assert found["auc"][i] == pytest.approx(_expected(labels[rows], scores[rows], 0.5)["auc"], abs=1e-12)


def test_calibration_error_of_two_classes_is_the_mean_gap_of_ten_bins() -> None:
    labels, scores = _data(2, seed=1)
    chance, expected = scores[:, 1], 0.0
    for upper in np.arange(1, 11) / 10:
        inside = (chance > upper - 0.1 + 1e-12) & (chance <= upper + 1e-12) if upper > 0.15 else chance <= 0.1
        if inside.any():
            expected += inside.mean() * abs(labels[inside].mean() - chance[inside].mean())
    assert metrics.classification(labels, scores, 0.5)["ece"] == pytest.approx(expected, abs=1e-6)


def test_calibration_error_of_more_classes_is_that_of_the_most_probable_one() -> None:
    scores = np.array([[0.75, 0.15, 0.1], [0.1, 0.72, 0.18], [0.05, 0.0, 0.95]])
    ece = metrics.classification(np.array([0, 0, 2]), scores, 0.5)["ece"]
    # Two answers of 0.75 and 0.72 of which one is right, and one of 0.95 that is.
    assert ece == pytest.approx((abs(1 - 1.47) + abs(1 - 0.95)) / 3, abs=1e-6)


def test_what_one_class_leaves_undefined_is_left_out() -> None:
    scores = np.array([[0.2, 0.8], [0.6, 0.4]])
    found = metrics.classification(np.array([1, 1]), scores, 0.5)
    assert set(found) == {"accuracy", "sensitivity", "ece", "brier"}
    assert (found["accuracy"], found["sensitivity"]) == (0.5, 0.5)
    assert metrics.classification(np.array([], dtype=np.int64), np.empty((0, 2)), 0.5) == {}
    assert np.isnan(metrics.auc(np.zeros(5, dtype=np.int64), np.full((5, 2), 0.5)))


def test_roc_and_precision_recall_curves_are_those_of_scikit_learn() -> None:
    labels, scores = _data(2)
    hits, alarms, thresholds = (
        values.ravel() for values in metrics.cumulative(labels == 1, scores[:, 1], np.ones((1, len(labels))))
    )
    false_rate, true_rate, expected = reference.roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert np.allclose(alarms / alarms[-1], false_rate)
    assert np.allclose(hits / hits[-1], true_rate)
    assert np.array_equal(thresholds, expected)
    precision, recall, _ = reference.precision_recall_curve(labels, scores[:, 1])
    assert np.allclose((hits / np.maximum(hits + alarms, 1))[:0:-1], precision[:-1])
    assert np.allclose(hits[:0:-1] / hits[-1], recall[:-1])


def test_a_score_just_below_the_threshold_is_negative_also_in_single_precision() -> None:
    score = np.float32(0.1)
    threshold = float(np.nextafter(float(score), 1.0))
    assert metrics.predicted(np.array([[1 - score, score]], np.float32), threshold).tolist() == [0]
    assert metrics.predicted(np.array([[1 - score, score]], np.float32), float(score)).tolist() == [1]


class _Logits(ClassifierMixin, BaseEstimator):
    """A fitted model whose outputs are its inputs."""

    def fit(self, inputs: np.ndarray, labels: np.ndarray) -> "_Logits":
        self.classes_ = np.unique(labels)
        return self

    def decision_function(self, inputs: np.ndarray) -> np.ndarray:
        return inputs

    def predict(self, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(self.classes_[inputs.argmax(1)])


def test_the_temperature_is_that_of_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 1500)
    logits = 1.5 * generator.standard_normal((1500, 3))
    logits[np.arange(1500), labels] += 2
    logits *= 2.5  # far too sure of itself
    probabilities = softmax(logits, axis=1)
    fitted = CalibratedClassifierCV(FrozenEstimator(_Logits().fit(logits, labels)), method="temperature", cv=2)
    expected = fitted.fit(logits, labels).predict_proba(logits)
    temperature = fit_temperature(labels, probabilities)
    assert temperature > 1.5
    assert np.allclose(tempered(probabilities, temperature), expected, atol=2e-3)
    better, before = (negative_log_likelihood(labels, p) for p in (tempered(probabilities, temperature), probabilities))
    assert better == pytest.approx(reference.log_loss(labels, expected), abs=1e-4)
    assert better < before - 0.1


def test_a_temperature_is_that_of_the_logits_and_can_be_taken_back() -> None:
    logits = np.random.default_rng(1).standard_normal((50, 4)).astype(np.float32) * 6
    probabilities = softmax(logits, axis=1).astype(np.float32)
    assert np.allclose(tempered(probabilities, 2.5), softmax(logits / 2.5, axis=1), atol=1e-6)
    assert np.allclose(tempered(tempered(probabilities, 2.5), 1 / 2.5), probabilities, atol=1e-6)
    assert tempered(probabilities, 1.0) is probabilities


def test_no_temperature_is_fitted_where_none_is_better_or_none_is_best() -> None:
    labels = np.tile([0, 0, 0, 1], 50)
    calibrated = np.tile([0.75, 0.25], (200, 1))
    assert fit_temperature(labels, calibrated) == pytest.approx(1.0, abs=1e-3)
    separated = np.where(labels[:, None] == [0, 1], 0.7, 0.3)
    assert fit_temperature(labels, separated) == 1.0


def test_operating_point_of_a_separable_set_is_half() -> None:
    labels = np.array([0] * 50 + [1] * 50)
    scores = np.r_[np.linspace(0.0, 0.3, 50), np.linspace(0.6, 1.0, 50)]
    assert operating_point(labels, np.c_[1 - scores, scores], YoudenPoint()) == 0.5


def test_operating_point_follows_a_shifted_score() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 2000)
    scores = np.clip(0.05 + 0.1 * labels + 0.02 * generator.standard_normal(2000), 0, 1)
    threshold = operating_point(labels, np.c_[1 - scores, scores], YoudenPoint())
    assert 0.08 < threshold < 0.12
    assert metrics.classification(labels, np.c_[1 - scores, scores], threshold)["accuracy"] > 0.98


@pytest.mark.parametrize("least", [0.5, 0.8, 0.95, 1.0])
def test_a_fixed_sensitivity_or_specificity_is_reached_and_no_more_is_given_up(least: float) -> None:
    labels, scores = _data(2, seed=5)
    false_rate, true_rate, _ = reference.roc_curve(labels, scores[:, 1], drop_intermediate=False)
    found = metrics.classification(labels, scores, operating_point(labels, scores, SensitivityPoint(at_least=least)))
    assert found["sensitivity"] >= least
    assert found["specificity"] == pytest.approx(1 - false_rate[true_rate >= least].min(), abs=1e-6)
    found = metrics.classification(labels, scores, operating_point(labels, scores, SpecificityPoint(at_least=least)))
    assert found["specificity"] >= least - 1e-6
    assert found["sensitivity"] == pytest.approx(true_rate[false_rate <= 1 - least + 1e-9].max(), abs=1e-6)


def test_full_specificity_is_reached_even_against_a_negative_of_score_1() -> None:
    labels, scores = np.array([0, 1, 0, 1]), np.array([1.0, 0.9, 0.2, 0.95])
    threshold = operating_point(labels, np.c_[1 - scores, scores], SpecificityPoint(at_least=1.0))
    assert metrics.classification(labels, np.c_[1 - scores, scores], threshold)["specificity"] == 1.0


def test_answers_near_the_threshold_are_the_least_certain() -> None:
    scores = np.array([0.02, 0.08, 0.11, 0.3, 0.9])
    confidence = metrics.confidence(np.c_[1 - scores, scores], 0.1)
    assert confidence.argsort().tolist()[:2] == [2, 1]
    odds = np.abs(np.log(scores / (1 - scores)) - np.log(0.1 / 0.9))  # the further the log-odds from the threshold's
    assert np.allclose(np.log(confidence / (1 - confidence)), odds)
    assert np.allclose(metrics.confidence(np.c_[1 - scores, scores], 0.5), np.maximum(scores, 1 - scores))
    assert metrics.confidence(np.array([[0.2, 0.5, 0.3]]), 0.5).tolist() == [0.5]


@pytest.mark.parametrize("classes", [2, 3])
def test_the_least_certain_answers_are_withheld_and_the_others_are_better(classes: int) -> None:
    labels, scores = _data(classes, seed=2)
    cut = least_confidence(scores, 0.4, 0.25)
    found = metrics.classification(labels, scores, 0.4, cut)
    answered = metrics.confidence(scores, 0.4) >= cut
    assert found["abstained"] == pytest.approx(0.25, abs=0.02)
    assert found["accuracy_answered"] == pytest.approx(
        reference.accuracy_score(labels[answered], metrics.predicted(scores, 0.4)[answered]), abs=1e-6
    )
    assert found["accuracy_answered"] > found["accuracy"]
    assert least_confidence(scores, 0.4, 0.0) == 0.0
    assert "abstained" not in metrics.classification(labels, scores, 0.4)


def test_an_interval_is_that_of_scipy() -> None:
    """Of the sensitivity: positives are resampled among themselves, here each of a patient of its own."""
    labels, scores = _data(2, seed=4)
    found = (scores[labels == 1, 1] >= 0.6).astype(float)
    expected = stats.bootstrap((found,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1))
    samples = [
        metrics.resampled(labels, scores, 0.6, 0.0, weights)["sensitivity"]
        for weights in resamples(np.arange(len(labels)), labels, 4000, seed=0)
    ]
    low, high = percentile_interval(np.concatenate(samples), 0.95)
    assert low == pytest.approx(expected.confidence_interval.low, abs=0.008)
    assert high == pytest.approx(expected.confidence_interval.high, abs=0.008)


def test_samples_draw_patients_with_all_their_images_and_all_classes() -> None:
    patients = np.array([7, 7, 7, 3, 5, 5, 9, 1])
    labels = np.array([0, 1, 0, 0, 1, 1, 1, 0])
    weights = np.concatenate(list(resamples(patients, labels, 300, seed=1)))
    assert weights.shape == (300, 8)
    for patient in (7, 5):
        own = weights[:, patients == patient]
        assert (own == own[:, :1]).all()
    one_each = weights[:, [0, 3, 4, 6, 7]]  # one image of each patient
    assert (one_each[:, [0, 1, 4]].sum(1) == 3).all()  # the three whose first image is of class 0
    assert (one_each[:, [2, 3]].sum(1) == 2).all()
    assert np.array_equal(weights, np.concatenate(list(resamples(patients, labels, 300, seed=1))))
    assert not np.array_equal(weights, np.concatenate(list(resamples(patients, labels, 300, seed=2))))


def test_samples_of_many_images_come_in_blocks() -> None:
    count = 30_000
    blocks = list(resamples(np.arange(count), np.zeros(count, np.int64), 100, seed=0))
    assert len(blocks) > 1
    assert sum(len(block) for block in blocks) == 100
    assert all((block.sum(1) == count).all() for block in blocks)
