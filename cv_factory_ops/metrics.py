"""Metrics of classification, on plain arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Scores = NDArray[np.floating]


def auc(labels: Labels, probabilities: Scores) -> float:
    """Area under the ROC curve; with more than two classes, the mean of each class against the rest.

    ``labels``: (N,), ``probabilities``: (N, classes). NaN where a class is missing.
    """
    if probabilities.shape[1] == 2:
        return binary_auc(labels == 1, probabilities[:, 1])
    return float(np.mean([binary_auc(labels == c, probabilities[:, c]) for c in range(probabilities.shape[1])]))


def binary_auc(positive: NDArray[np.bool_], scores: Scores) -> float:
    """AUC as the Mann-Whitney statistic (Hanley & McNeil 1982), ties counted half; NaN with one class only."""
    from scipy.stats import rankdata

    count = int(positive.sum())
    others = len(positive) - count
    if not count or not others:
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * others))


def predicted(probabilities: Scores, threshold: float) -> Labels:
    """Class of each row: by the threshold on the second class of two, else the most probable."""
    if probabilities.shape[1] == 2:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    classes: Labels = probabilities.argmax(1)
    return classes


def accuracy(labels: Labels, probabilities: Scores, threshold: float) -> float:
    """Share of rows whose predicted class is the label."""
    return float((predicted(probabilities, threshold) == labels).mean())


def classification(labels: Labels, probabilities: Scores, threshold: float) -> dict[str, float]:
    """``auc``, ``accuracy`` and, with two classes, ``sensitivity`` and ``specificity``; without those that are undefined.

    AUC needs both sides, sensitivity a positive, specificity a negative; empty for no rows.
    """
    if not len(labels):
        return {}
    values = {"auc": auc(labels, probabilities), "accuracy": accuracy(labels, probabilities, threshold)}
    if probabilities.shape[1] == 2:
        positive = predicted(probabilities, threshold) == 1
        values["sensitivity"] = float(positive[labels == 1].mean()) if (labels == 1).any() else float("nan")
        values["specificity"] = float((~positive)[labels == 0].mean()) if (labels == 0).any() else float("nan")
    return {name: round(value, 6) for name, value in values.items() if not np.isnan(value)}


def confusion(labels: Labels, classes: Labels, count: int) -> NDArray[np.int64]:
    """(count, count): rows are the truth, columns the prediction."""
    return np.bincount(labels * count + classes, minlength=count * count).reshape(count, count)


def roc_curve(positive: NDArray[np.bool_], scores: Scores) -> tuple[Scores, Scores, Scores]:
    """False-positive rate, true-positive rate and threshold, from the strictest threshold to the laxest."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(positive[order])
    last_of_tie = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]
    true_rate = np.r_[0.0, hits[last_of_tie] / max(positive.sum(), 1)]
    false_rate = np.r_[0.0, (1 + last_of_tie - hits[last_of_tie]) / max((~positive).sum(), 1)]
    return false_rate, true_rate, np.r_[np.inf, scores[order][last_of_tie]]


def operating_point(labels: Labels, probabilities: Scores) -> float:
    """Threshold on the second of two classes, chosen on validation data.

    Sensitivity + specificity - 1 (Youden 1950) is flat where a model separates well, and its maximum then says little; so
    of all thresholds within one standard error of the best (Breiman et al. 1984) the one nearest to 0.5 is taken.
    """
    positive = labels == 1
    false_rate, true_rate, thresholds = roc_curve(positive, probabilities[:, 1])
    index = true_rate - false_rate
    best = int(index.argmax())
    variance = true_rate[best] * (1 - true_rate[best]) / max(positive.sum(), 1)
    variance += false_rate[best] * (1 - false_rate[best]) / max((~positive).sum(), 1)
    good = index >= index[best] - np.sqrt(variance)
    # Between two neighbouring scores nothing changes, so each threshold stands for the interval down to the next score.
    upper, lower = np.minimum(thresholds, 1.0), np.r_[thresholds[1:], 0.0]
    nearest = np.clip(0.5, np.nextafter(lower, 1.0), upper)
    return float(nearest[good][np.abs(nearest[good] - 0.5).argmin()])
