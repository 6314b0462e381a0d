"""From a network's outputs to answers: temperature, operating point, abstention; all of them chosen on validation alone."""

from __future__ import annotations

from typing import assert_never

import numpy as np

from cv_factory_ops.config.evaluation import OperatingPoint, SensitivityPoint, SpecificityPoint, YoudenPoint
from cv_factory_ops.metrics import Labels, Scores, Values, confidence, cumulative

TEMPERATURES = (0.05, 20.0)
"""Within which the temperature is looked for."""


def tempered(probabilities: Scores, temperature: float) -> Scores:
    """(N, classes) probabilities at another temperature: softmax(z / T) is softmax(z) ** (1 / T), scaled to a sum of 1."""
    if temperature == 1:
        return probabilities
    logits = np.log(np.maximum(probabilities.astype(np.float64), np.finfo(np.float64).tiny)) / temperature
    shares = np.exp(logits - logits.max(1, keepdims=True))
    scaled: Scores = (shares / shares.sum(1, keepdims=True)).astype(probabilities.dtype)
    return scaled


def negative_log_likelihood(labels: Labels, probabilities: Scores) -> float:
    """Mean of -log of the probability of the label, (N,) and (N, classes)."""
    of_label = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return float(-np.log(np.maximum(of_label, np.finfo(np.float64).tiny)).mean())


def fit_temperature(labels: Labels, probabilities: Scores) -> float:
    """The temperature at which the labels are most likely (Guo et al. 2017); 1 where none is better than that.

    Also 1 where every label is the most probable one: likelihood then grows without end as the temperature falls.
    """
    from scipy.optimize import minimize_scalar

    if (probabilities.argmax(1) == labels).all():
        return 1.0
    exact = probabilities.astype(np.float64)
    bounds = np.log(TEMPERATURES)
    found = minimize_scalar(
        lambda logarithm: negative_log_likelihood(labels, tempered(exact, float(np.exp(logarithm)))), bounds=bounds
    )
    better = found.fun < negative_log_likelihood(labels, exact)
    return round(float(np.exp(found.x)), 6) if better else 1.0


def operating_point(labels: Labels, probabilities: Scores, config: OperatingPoint) -> float:
    """Threshold on the second of two classes; between two neighbouring scores nothing changes, so it may lie anywhere there."""
    hits, alarms, thresholds = (
        values.ravel() for values in cumulative(labels == 1, probabilities[:, 1], np.ones((1, len(labels))))
    )
    upper, lower = np.minimum(thresholds, np.nextafter(1.0, 2.0)), np.r_[thresholds[1:], 0.0]
    match config:
        case YoudenPoint():
            return _youden(hits, alarms, upper, lower)
        case SensitivityPoint(at_least=least):
            place = int(np.flatnonzero(hits / max(hits[-1], 1) >= least)[0])
        case SpecificityPoint(at_least=least):
            place = int(np.flatnonzero((alarms[-1] - alarms) / max(alarms[-1], 1) >= least)[-1])
        case _:
            assert_never(config)
    return float(np.maximum((upper[place] + lower[place]) / 2, np.nextafter(lower[place], 2.0)))


def _youden(hits: Values, alarms: Values, upper: Values, lower: Values) -> float:
    """Sensitivity + specificity - 1 (Youden 1950) is flat where a model separates well, and its maximum then says little; so
    of all thresholds within one standard error of the best (Breiman et al. 1984) the one nearest to 0.5 is taken."""
    true_rate, false_rate = hits / max(hits[-1], 1), alarms / max(alarms[-1], 1)
    index = true_rate - false_rate
    best = int(index.argmax())
    variance = true_rate[best] * (1 - true_rate[best]) / max(hits[-1], 1)
    variance += false_rate[best] * (1 - false_rate[best]) / max(alarms[-1], 1)
    good = index >= index[best] - np.sqrt(variance)
    nearest = np.clip(0.5, np.nextafter(lower, 1.0), np.minimum(upper, 1.0))
    return float(nearest[good][np.abs(nearest[good] - 0.5).argmin()])


def least_confidence(probabilities: Scores, threshold: float, share: float) -> float:
    """Confidence below which that share of the answers lies; 0, which none is below, for a share of 0."""
    return float(np.quantile(confidence(probabilities, threshold), share)) if share else 0.0
