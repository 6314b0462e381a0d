import numpy as np
import pytest
from sklearn.metrics import accuracy_score, confusion_matrix, roc_auc_score, roc_curve

from cv_factory_ops import metrics


def _data(classes: int, seed: int = 0, count: int = 400) -> tuple[metrics.Labels, metrics.Scores]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    scores = generator.random((count, classes)).round(2)  # rounded: ties must count half
    scores[np.arange(count), labels] += 0.3
    return labels, scores / scores.sum(1, keepdims=True)


@pytest.mark.parametrize("classes", [2, 4])
def test_auc_is_that_of_scikit_learn(classes: int) -> None:
    labels, scores = _data(classes)
    expected = roc_auc_score(labels, scores[:, 1] if classes == 2 else scores, multi_class="ovr")
    assert metrics.auc(labels, scores) == pytest.approx(expected, abs=1e-12)


def test_auc_of_one_class_is_not_a_number() -> None:
    assert np.isnan(metrics.auc(np.zeros(5, dtype=np.int64), np.full((5, 2), 0.5)))


def test_classification_is_that_of_scikit_learn() -> None:
    labels, scores = _data(2)
    values = metrics.classification(labels, scores, 0.55)
    classes = (scores[:, 1] >= 0.55).astype(int)
    (tn, fp), (fn, tp) = confusion_matrix(labels, classes)
    assert values["accuracy"] == pytest.approx(accuracy_score(labels, classes), abs=1e-6)
    assert values["sensitivity"] == pytest.approx(tp / (tp + fn), abs=1e-6)
    assert values["specificity"] == pytest.approx(tn / (tn + fp), abs=1e-6)
    assert (metrics.confusion(labels, classes, 2) == [[tn, fp], [fn, tp]]).all()


def test_what_one_class_leaves_undefined_is_left_out() -> None:
    scores = np.array([[0.2, 0.8], [0.6, 0.4]])
    assert metrics.classification(np.array([1, 1]), scores, 0.5) == {"accuracy": 0.5, "sensitivity": 0.5}
    assert metrics.classification(np.array([], dtype=np.int64), np.empty((0, 2)), 0.5) == {}


def test_roc_curve_is_that_of_scikit_learn() -> None:
    labels, scores = _data(2)
    false_rate, true_rate, _ = metrics.roc_curve(labels == 1, scores[:, 1])
    expected_false, expected_true, _ = roc_curve(labels, scores[:, 1], drop_intermediate=False)
    assert np.allclose(false_rate, expected_false)
    assert np.allclose(true_rate, expected_true)


def test_operating_point_of_a_separable_set_is_half() -> None:
    labels = np.array([0] * 50 + [1] * 50)
    scores = np.r_[np.linspace(0.0, 0.3, 50), np.linspace(0.6, 1.0, 50)]
    assert metrics.operating_point(labels, np.c_[1 - scores, scores]) == 0.5


def test_operating_point_follows_a_shifted_score() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 2000)
    scores = np.clip(0.05 + 0.1 * labels + 0.02 * generator.standard_normal(2000), 0, 1)
    threshold = metrics.operating_point(labels, np.c_[1 - scores, scores])
    assert 0.08 < threshold < 0.12
    assert metrics.accuracy(labels, np.c_[1 - scores, scores], threshold) > 0.98
