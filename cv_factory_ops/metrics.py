"""Metrics of classification, on plain arrays.

Those that take ``weights`` of shape (B, N), how often each of N rows counts in each of B samples, give (B,) values: a row of
ones is the data as they are, the others may be a bootstrap's. With more than two classes, what is defined for two is the mean
of each class against the rest. NaN is what a sample leaves undefined, such as the AUC of one class.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Mask = NDArray[np.bool_]
Scores = NDArray[np.floating]
Values = NDArray[np.float64]
Weights = NDArray[np.float64]

BINS = 10
"""Bins of equal width that the calibration error is measured in: 0..0.1, above 0.1..0.2, and so on."""


def classification(labels: Labels, probabilities: Scores, threshold: float, abstention: float = 0.0) -> dict[str, float]:
    """The metrics of :func:`resampled` on the data as they are, without those that are undefined; empty for no rows."""
    if not len(labels):
        return {}
    values = resampled(labels, probabilities, threshold, abstention, np.ones((1, len(labels))))
    return {name: round(float(value[0]), 6) for name, value in values.items() if not np.isnan(value[0])}


def resampled(
    labels: Labels, probabilities: Scores, threshold: float, abstention: float, weights: Weights
) -> dict[str, Values]:
    """Every metric of each sample, (B,).

    ``auc`` and ``auprc``, the areas under the ROC and (as average precision) the precision-recall curve; ``accuracy``,
    ``sensitivity`` and ``specificity`` of the answers at the operating point; ``ece``, the expected calibration error, and
    ``brier``. Where answers may be withheld (``abstention`` above 0) also ``abstained``, their share, and
    ``accuracy_answered``, the accuracy of the others.

    ``labels``: (N,), ``probabilities``: (N, classes), ``weights``: (B, N).
    """
    answers = predicted(probabilities, threshold)
    right, sides = answers == labels, one_against_rest(labels, probabilities)
    values = {
        "auc": _mean([binary_auc(positive, scores, weights) for _, positive, scores in sides]),
        "auprc": _mean([average_precision(positive, scores, weights) for _, positive, scores in sides]),
        "accuracy": share(right, weights),
        "sensitivity": _mean([share(answers == c, weights, positive) for c, positive, _ in sides]),
        "specificity": _mean([share(answers != c, weights, ~positive) for c, positive, _ in sides]),
        "ece": calibration_error(labels, probabilities, weights),
        "brier": share(_squared_errors(labels, probabilities), weights),
    }
    if abstention > 0:
        answered = confidence(probabilities, threshold) >= abstention
        values |= {"abstained": share(~answered, weights), "accuracy_answered": share(right, weights, answered)}
    return values


def auc(labels: Labels, probabilities: Scores) -> float:
    """Area under the ROC curve; with more than two classes, the mean of each class against the rest.

    ``labels``: (N,), ``probabilities``: (N, classes). NaN where a class is missing.
    """
    sides, data = one_against_rest(labels, probabilities), np.ones((1, len(labels)))
    return float(_mean([binary_auc(positive, scores, data) for _, positive, scores in sides])[0])


def one_against_rest(labels: Labels, probabilities: Scores) -> list[tuple[int, Mask, Scores]]:
    """Class, whether a row is of it, and its probability: the second of two classes, or each of more."""
    count = probabilities.shape[1]
    return [(c, labels == c, probabilities[:, c]) for c in ([1] if count == 2 else range(count))]


def predicted(probabilities: Scores, threshold: float) -> Labels:
    """Class of each row: by the threshold on the second class of two, else the most probable."""
    exact = probabilities.astype(np.float64)  # against a threshold in single precision, a score just below it would pass
    classes: Labels = (exact[:, 1] >= threshold).astype(np.int64) if exact.shape[1] == 2 else exact.argmax(1)
    return classes


def confidence(probabilities: Scores, threshold: float) -> Values:
    """(N,) how sure each answer is: the probability of the answered class.

    Of two classes, as if the threshold were at 1/2: a threshold t says that one mistake weighs as much as t / (1 - t) of the
    other (Elkan 2001), so the odds are divided by its odds; an answer then turns where its confidence is least, and Chow's
    rule (1970), to withhold answers below a certain probability, holds for these costs.
    """
    exact = probabilities.astype(np.float64)
    if exact.shape[1] == 2:
        at = np.clip(threshold, 1e-9, 1 - 1e-9)
        exact = exact * [at, 1 - at]
        exact /= exact.sum(1, keepdims=True)
    greatest: Values = exact.max(1)
    return greatest


def cumulative(positive: Mask, scores: Scores, weights: Weights) -> tuple[Values, Values, Values]:
    """True positives (B, T), false positives (B, T) and thresholds (T,), from the strictest, infinity, to the laxest.

    Raises:
        ValueError: a score is NaN: it has no place in the order.
    """
    if np.isnan(scores).any():
        raise ValueError("scores that are no numbers cannot be ranked")
    order = np.argsort(-scores, kind="stable")
    last_of_tie = np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]
    ordered = weights[:, order]
    hits = np.cumsum(ordered * positive[order], axis=1)[:, last_of_tie]
    called = np.cumsum(ordered, axis=1)[:, last_of_tie]
    before = ((0, 0), (1, 0))
    thresholds = np.r_[np.inf, scores[order][last_of_tie].astype(np.float64)]
    return np.pad(hits, before), np.pad(called - hits, before), thresholds


def binary_auc(positive: Mask, scores: Scores, weights: Weights) -> Values:
    """Area under the ROC curve by trapezoids: the Mann-Whitney statistic, ties counted half (Hanley & McNeil 1982)."""
    hits, alarms, _ = cumulative(positive, scores, weights)
    area = (np.diff(alarms) * (hits[:, 1:] + hits[:, :-1])).sum(1) / 2
    return _ratio(area, hits[:, -1] * alarms[:, -1])


def average_precision(positive: Mask, scores: Scores, weights: Weights) -> Values:
    """Area under the precision-recall curve, each step of recall times the precision there (Davis & Goadrich 2006 show why
    not by trapezoids); NaN with one class only."""
    hits, alarms, _ = cumulative(positive, scores, weights)
    precision = np.nan_to_num(_ratio(hits, hits + alarms))
    area = (np.diff(hits) * precision[:, 1:]).sum(1)
    return np.where(alarms[:, -1] > 0, _ratio(area, hits[:, -1]), np.nan)


def calibration_error(labels: Labels, probabilities: Scores, weights: Weights) -> Values:
    """Expected calibration error (Naeini et al. 2015): the mean over the rows of how far, in their bin, forecast and
    frequency lie apart. Random error alone makes it greater than 0, the more the fewer the rows."""
    forecast, happened = forecasts(labels, probabilities)
    gaps = weights @ (members(forecast) * (forecast - happened)[:, None])
    return _ratio(np.abs(gaps).sum(1), weights.sum(1))


def forecasts(labels: Labels, probabilities: Scores) -> tuple[Values, Mask]:
    """What was forecast (N,) and whether it happened (N,): of two classes, the second; of more, that the most probable one
    is right (Guo et al. 2017)."""
    exact = probabilities.astype(np.float64)
    if exact.shape[1] == 2:
        return exact[:, 1], labels == 1
    return exact.max(1), exact.argmax(1) == labels


def members(forecast: Values) -> Mask:
    """(N, BINS): the bin of each forecast in 0..1; its upper edge belongs to a bin."""
    inner = np.linspace(0, 1, BINS + 1)[1:-1]
    return np.asarray(np.searchsorted(inner, forecast)[:, None] == np.arange(BINS))


def _squared_errors(labels: Labels, probabilities: Scores) -> Values:
    """(N,) of the Brier score (Brier 1950): of two classes, of the second; of more, the sum over all."""
    exact, classes = probabilities.astype(np.float64), probabilities.shape[1]
    squares = (exact - (labels[:, None] == np.arange(classes))) ** 2
    errors: Values = squares[:, 1] if classes == 2 else squares.sum(1)
    return errors


def share(values: NDArray[np.bool_] | Values, weights: Weights, among: Mask | None = None) -> Values:
    """(B,) mean of (N,) values over the rows, or over those of ``among``."""
    counted = np.ones(len(values)) if among is None else among.astype(np.float64)
    return _ratio(weights @ (values * counted), weights @ counted)


def _ratio(numerator: Values, denominator: Values) -> Values:
    """NaN where nothing is counted."""
    ratio: Values = np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)
    return ratio


def _mean(values: list[Values]) -> Values:
    mean: Values = np.mean(values, axis=0)
    return mean
