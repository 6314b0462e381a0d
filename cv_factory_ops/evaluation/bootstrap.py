"""Intervals by resampling patients (Efron & Tibshirani 1993): images of one patient are not independent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.bundle import BundleManifest
from cv_factory_ops.config.evaluation import EvaluationConfig
from cv_factory_ops.metrics import Labels, Mask, Scores, Values, Weights, classification, predicted, resampled

if TYPE_CHECKING:
    import pandas as pd

CELLS = 2_000_000
"""Weights that are held at a time: bounds memory to some 100 MiB."""

Interval = tuple[float, float]


class Measured(Protocol):
    """A model's answers to a set of images, measured: of labels :class:`Judged`, of masks
    :class:`cv_factory_ops.evaluation.segmentation.JudgedMasks`, of boxes
    :class:`cv_factory_ops.evaluation.detection.JudgedBoxes`."""

    @property
    def patients(self) -> NDArray[np.int64]:
        """(N,) number of the patient that an image is of."""

    @property
    def manifest(self) -> BundleManifest: ...

    @property
    def metrics(self) -> dict[str, float]:
        """Those that are defined."""

    def __len__(self) -> int: ...

    def only(self, rows: Mask) -> Self:
        """Some of them."""

    def intervals(self, config: EvaluationConfig) -> dict[str, Interval]:
        """Of each metric that is defined."""


@dataclass(frozen=True)
class Judged:
    """A model's answers to a set of images, with the truth."""

    labels: Labels
    """(N,)"""
    probabilities: Scores
    """(N, classes)"""
    patients: NDArray[np.int64]
    """(N,) number of the patient that an image is of."""
    manifest: BundleManifest

    @classmethod
    def of(cls, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> Judged:
        """From the table that :func:`cv_factory_ops.evaluation.evaluate.predict_splits` has made."""
        return cls(rows["label"].to_numpy(np.int64), probabilities_of(rows, who), patients_of(rows), manifest)

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, rows: Mask) -> Judged:
        """Some of them."""
        return replace(self, labels=self.labels[rows], probabilities=self.probabilities[rows], patients=self.patients[rows])

    @cached_property
    def answers(self) -> Labels:
        """(N,) answered class."""
        return predicted(self.probabilities, self.manifest.threshold)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """See :func:`cv_factory_ops.metrics.classification`."""
        return classification(self.labels, self.probabilities, self.manifest.threshold, self.manifest.abstention)

    def samples(self, config: EvaluationConfig) -> Iterator[Weights]:
        """Its bootstrap samples, see :func:`resamples`."""
        return resamples(self.patients, self.labels, config.bootstrap, config.seed)

    def intervals(self, config: EvaluationConfig) -> dict[str, Interval]:
        """Of each metric that is defined."""
        settings = (self.labels, self.probabilities, self.manifest.threshold, self.manifest.abstention)
        blocks = [resampled(*settings, weights) for weights in self.samples(config)] if self.metrics else []
        samples = {name: np.concatenate([block[name] for block in blocks]) for name in self.metrics}
        return {name: percentile_interval(values, config.confidence) for name, values in samples.items()}


def probabilities_of(rows: pd.DataFrame, who: str) -> NDArray[np.float64]:
    """(N, classes) from the columns ``<who>_<class>``."""
    count = sum(str(column).startswith(f"{who}_") for column in rows)
    probabilities: NDArray[np.float64] = rows[[f"{who}_{i}" for i in range(count)]].to_numpy(np.float64)
    return probabilities


def patients_of(rows: pd.DataFrame) -> NDArray[np.int64]:
    """(N,) a number for each patient; an image of an unknown one counts as a patient of its own."""
    owners = rows["patient"].where(rows["patient"] != "", rows["id"])
    numbers: NDArray[np.int64] = np.unique(owners.to_numpy(str), return_inverse=True)[1].astype(np.int64)
    return numbers


def resamples(patients: NDArray[np.int64], labels: Labels, count: int, seed: int) -> Iterator[Weights]:
    """How often each of N rows counts in each of ``count`` samples: blocks of (b, N), together ``count`` rows.

    Patients are drawn with replacement, with all their images. Those of each class (of a patient's first image) are drawn by
    themselves, so that every sample has all classes.
    """
    known, first, number = np.unique(patients, return_index=True, return_inverse=True)
    generator, stratum = np.random.default_rng(seed), labels[first]
    for start in range(0, count, max(CELLS // len(labels), 1)):
        size = min(max(CELLS // len(labels), 1), count - start)
        drawn = np.zeros((size, len(known)))
        for own in (np.flatnonzero(stratum == c) for c in np.unique(stratum)):
            drawn[:, own] = generator.multinomial(len(own), np.full(len(own), 1 / len(own)), size)
        yield drawn[:, number]


def percentile_interval(values: Values, confidence: float) -> Interval:
    """Between the quantiles of the samples in which the value is defined, (low, high)."""
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(values, [tail, 1 - tail])
    return round(float(low), 6), round(float(high), 6)
