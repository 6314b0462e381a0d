"""How well the champion answers a window: measured where late labels have arrived, and estimated without any.

The estimate is confidence-based (CBPE, as NannyML calls it): where a probability p is calibrated, an answer that holds a study
positive is right with probability p, and one that holds it negative with 1 - p. It knows of no change in what the labels mean,
and of no calibration that is lost: a model that is sure and wrong looks good to it. So the same estimate stands beside it
for the drift reference, and labels are better than either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from cv_factory_ops.bundle import BundleManifest
from cv_factory_ops.metrics import Labels, Scores, Values, binary_auc, classification, predicted
from cv_factory_ops.records import Performance

Metric = Literal["accuracy", "auc", "sensitivity", "specificity"]
METRICS: tuple[Metric, ...] = ("accuracy", "auc", "sensitivity", "specificity")
CONFIDENCE = 0.95
"""Of every interval."""
LEAST = 10
"""Labelled answers that a measurement rests on at least, the AUROC on as many of either class: fewer say too little to go
before an estimate."""


def measured(
    labels: Labels, probabilities: Scores, manifest: BundleManifest, reference: Mapping[str, float]
) -> list[Performance]:
    """Of (N,) labels and (N, classes) probabilities, at the bundle's operating point. ``reference`` is that of the locked test
    set, each metric and its ``<metric>_low``.

    A metric that would rest on fewer than :data:`LEAST` answers is not known. Of more than two classes there is the accuracy
    alone: the others are means over the classes there, without such an interval.
    """
    values = classification(labels, probabilities, manifest.threshold)
    positives = int((labels == 1).sum())
    negatives = len(labels) - positives
    rows = {"accuracy": len(labels), "auc": min(positives, negatives), "sensitivity": positives, "specificity": negatives}
    two = probabilities.shape[1] == 2
    found = []
    for metric in METRICS if two else METRICS[:1]:
        if metric in values and rows[metric] >= LEAST:
            interval = (
                auc_interval(values["auc"], positives, negatives)
                if metric == "auc"
                else proportion_interval(values[metric], rows[metric])
            )
            known = (reference.get(metric), reference.get(f"{metric}_low"))
            found.append(_performance(metric, values[metric], interval, len(labels), *known))
    return found


def estimated(scores: Values, reference: Values, manifest: BundleManifest) -> list[Performance]:
    """Of the column ``score`` of a window and of the reference, (N,) and (M,): the probability of the second of two classes, or
    of the most probable one of more. Answers without a number are left out; empty where there are none, and of segmentations,
    whose score is no probability that an answer is right."""
    sides = [side[np.isfinite(side)] for side in (scores, reference)]
    if manifest.task != "classification" or not all(len(side) for side in sides):
        return []
    estimate = expected_of_two if len(manifest.labels) == 2 else expected_of_more
    ours, theirs = (estimate(side, manifest.threshold) for side in sides)
    return [
        _performance(metric, *ours[metric], 0, theirs[metric][0], theirs[metric][1][0])
        for metric in METRICS
        if metric in ours and metric in theirs
    ]


Interval = tuple[float, float]
Estimate = dict[Metric, tuple[float, Interval]]


def expected_of_two(scores: Values, threshold: float) -> Estimate:
    """Each answer counts as a positive with its score p and as a negative with 1 - p; of the AUROC, so does every pair."""
    scores = np.clip(scores, 0, 1)
    called = predicted(np.stack([1 - scores, scores], axis=1), threshold) == 1
    positives, negatives = float(scores.sum()), float((1 - scores).sum())
    hits, rejections = float(scores[called].sum()), float((1 - scores)[~called].sum())
    found: dict[Metric, tuple[float, float]] = {"accuracy": ((hits + rejections) / len(scores), len(scores))}
    if positives > 0 and negatives > 0:
        found |= {"sensitivity": (hits / positives, positives), "specificity": (rejections / negatives, negatives)}
    estimate: Estimate = {metric: (value, proportion_interval(value, rows)) for metric, (value, rows) in found.items()}
    if positives > 0 and negatives > 0:
        each = np.repeat([True, False], len(scores))
        area = float(binary_auc(each, np.tile(scores, 2), np.concatenate([scores, 1 - scores])[None])[0])
        estimate["auc"] = (area, auc_interval(area, positives, negatives))
    return estimate


def expected_of_more(scores: Values, threshold: float) -> Estimate:
    """The probability of the most probable class is that of a right answer."""
    value = float(np.clip(scores, 0, 1).mean())
    return {"accuracy": (value, proportion_interval(value, len(scores)))}


def proportion_interval(value: float, rows: float) -> Interval:
    """Of a share of so many rows (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    centre = (value + z**2 / (2 * rows)) / (1 + z**2 / rows)
    half = z / (1 + z**2 / rows) * math.sqrt(max(value * (1 - value), 0) / rows + z**2 / (4 * rows**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def auc_interval(value: float, positives: float, negatives: float) -> Interval:
    """Of an area under the ROC curve: as Wilson's, by the variance at the ends themselves and not at the value, so that an area
    of 1 is not certain (Newcombe 2006, Statistics in Medicine 25:559, method 5: the variance of Hanley & McNeil 1982, both
    classes there as large as they are on average)."""
    z, others = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), (positives + negatives) / 2 - 1

    def is_outside(area: float) -> bool:
        spread = 1 + others * (1 - area) / (2 - area) + others * area / (1 + area)
        return (value - area) ** 2 > z**2 * area * (1 - area) * spread / (positives * negatives)

    return _boundary(is_outside, 0.0, value), _boundary(is_outside, 1.0, value)


def _boundary(is_outside: Callable[[float], bool], outer: float, inner: float) -> float:
    """Between two numbers, by bisection; the outer one where that is inside too."""
    for _ in range(50):
        middle = (outer + inner) / 2
        outer, inner = (middle, inner) if is_outside(middle) else (outer, middle)
    return inner


def _performance(
    metric: Metric, value: float, interval: Interval, labelled: int, reference: float | None, reference_low: float | None
) -> Performance:
    numbers = {"value": value, "low": interval[0], "high": interval[1], "reference": reference, "reference_low": reference_low}
    rounded: dict[str, Any] = {name: None if number is None else round(number, 6) for name, number in numbers.items()}
    return Performance(metric=metric, labelled=labelled, estimated=not labelled, **rounded)
