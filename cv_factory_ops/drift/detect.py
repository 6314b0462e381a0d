"""The drift test: is a window of requests a sample of the distribution that the reference was drawn from?

Every statistic has one form. The rows of both samples together get scores q, columns that are centred and orthonormal, and
with N rows, m of them in the window,

    S = N (N - 1) / (m (N - m)) * | sum of q over the window's rows |^2

measures how far the window lies from what drawing m of the N rows blindly gives. What the scores are decides what is seen:

- a number: its rank and its squared rank, so location and spread; the first alone is Kruskal and Wallis's H (1952), both are
  Neyman's smooth test for two samples (Eubank, LaRiccia & Rosenstein 1987, Journal of the American Statistical Association 82);
- a category: which one it is; S is Pearson's chi-square of homogeneity, times (N - 1) / N;
- :data:`TOGETHER`, all numbers at once: normal scores (van der Waerden 1952) and their squares, so that a small change of many
  columns, or of what ties them to each other, is seen where no column alone shows it; Hotelling's T^2 in its rank form
  (Puri & Sen 1971, Nonparametric Methods in Multivariate Analysis).

A column's p-value approximates its permutation distribution. What decides is exact: the same statistics of windows drawn
blindly from both samples together (Fisher 1935; for the smallest p-value of many, Westfall & Young 1993) say how small the
smallest p-value of a quiet window gets. A quiet window is called drifted at most at the rate alpha, all columns together,
whatever their number, their correlation and the sizes, if rows are exchangeable: independent draws from one distribution.
Several images of one patient on a side are not, and make alarms more frequent than declared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import chdtrc, ndtri
from scipy.stats import rankdata

from cv_factory_ops.domain import Kind
from cv_factory_ops.groups import MISSING, told
from cv_factory_ops.records import SlowDriftState

TOGETHER = "numbers_together"
"""The column that stands for all numbers at once; its values are the rows' places along the direction of the difference."""
LEVELS = 30
"""Categories of a column that are told apart, the most frequent ones; the rest counts as one."""
_SMALLEST = 1e-300
_TIES = 1 - 1e-3
"""Sums in single precision: p-values as close as this count as equal."""
_VALUES_AT_ONCE = 10_000_000

Scores = NDArray[np.float64]
"""(rows, scores): each column centred; scores @ scores.T is a projection."""


@dataclass(frozen=True)
class Comparison:
    """Reference and window with the same columns, ready to be tested."""

    reference: pd.DataFrame
    window: pd.DataFrame
    kinds: dict[str, Kind]
    alpha: float
    """False-alarm rate over all columns together."""
    scores: Mapping[str, Scores]
    """Column -> scores of the rows of the reference, then of the window."""

    @property
    def testable(self) -> dict[str, Kind]:
        """The columns that have a value on both sides."""
        present = self.reference.notna().any() & self.window.notna().any()
        return {name: kind for name, kind in self.kinds.items() if present[name]}


@dataclass(frozen=True)
class Verdict:
    """p-values against the threshold that each column is held to."""

    p_values: Mapping[str, float]
    threshold: float
    slow: SlowDriftState | None = None
    """Slow drift so far, this window included."""
    slowly: Mapping[str, float] = field(default_factory=dict)
    """Slowly drifted series -> p-value, the clearest first."""

    @property
    def drifted(self) -> dict[str, float]:
        """Drifted column -> p-value, the clearest first."""
        by_evidence = sorted(self.p_values.items(), key=lambda item: (item[1], item[0]))
        return {name: p for name, p in by_evidence if p <= self.threshold}


def sampled(frame: pd.DataFrame, rows: int) -> pd.DataFrame:
    """So many of the rows at random, always the same ones; all where there are no more."""
    if len(frame) <= rows:
        return frame
    return frame.iloc[np.sort(np.random.default_rng(0).choice(len(frame), rows, replace=False))]


def compare(reference: pd.DataFrame, window: pd.DataFrame, kinds: Mapping[str, Kind], alpha: float) -> Comparison:
    """Columns to test: every feature, ``<feature>_missing`` for each number that is missing here and there, and
    :data:`TOGETHER` for two numbers or more.

    A missing number says nothing of the values and much of the sender, so it is evidence of its own. Whether the further
    column is there depends on both samples taken together, not on which row is in which: the test stays exact.

    All values of metadata are tested; what is shown of them afterwards are those that may be told, as clients write into
    headers what they like (:func:`cv_factory_ops.groups.told`).
    """
    sides = [_cleaned(frame, kinds) for frame in (reference, window)]
    both = pd.concat(sides, ignore_index=True)
    columns: dict[str, Kind] = dict(kinds)
    numbers = [name for name, kind in kinds.items() if kind == "number"]
    for name in numbers:
        missing = both[name].isna()
        if missing.any() and not missing.all():
            columns[f"{name}_missing"] = "category"
            both[f"{name}_missing"] = np.where(missing, "missing", "present")
    size = len(sides[1])
    scores = {name: _scores_of(both[name], kind) for name, kind in columns.items()}
    for name in (name for name, kind in kinds.items() if kind == "category" and name.startswith("metadata_")):
        both[name] = told(both[name], both[name][:-size])
    if len(numbers) > 1:
        columns[TOGETHER] = "number"
        scores[TOGETHER] = scores_together(both[numbers].to_numpy())
        both[TOGETHER] = scores[TOGETHER] @ scores[TOGETHER][-size:].sum(0)
    return Comparison(both[:-size], both[-size:].reset_index(drop=True), columns, alpha, scores)


def judge(comparison: Comparison) -> Verdict:
    """The p-value of each column, 1 where there is nothing to compare, and the threshold that keeps the rate alpha.

    The threshold lies below the r-th smallest of the smallest p-values of B blindly drawn windows, r = floor(alpha (B + 1)):
    counting the window itself among them makes the rate hold for any B (Phipson & Smyth 2010), so the error of drawing only
    some of all possible windows is on the safe side.
    """
    size = len(comparison.window)
    parts = {name: scores for name, scores in comparison.scores.items() if scores.shape[1]}
    values = dict.fromkeys(comparison.kinds, 1.0)
    if not parts:
        return Verdict(values, comparison.alpha / len(values))
    resamples = max(1_999, math.ceil(20 / comparison.alpha) - 1)
    statistics = _statistics(parts, size, resamples)
    found = np.stack([p_values(statistics[name], scores, size) for name, scores in parts.items()])
    values |= dict(zip(parts, found[:, 0].tolist(), strict=True))
    smallest = np.sort(found[:, 1:].min(0))
    return Verdict(values, float(smallest[math.floor(comparison.alpha * (resamples + 1) + 1e-9) - 1] * _TIES))


def number_scores(values: NDArray[np.float64]) -> Scores:
    """(rows,) with NaN where missing -> (rows, 0 to 2): orthonormal polynomials of the ranks of first and second degree."""
    present = ~np.isnan(values)
    if not present.any():
        return np.zeros((len(values), 0))
    rank = _ranks(values[present])
    basis: list[NDArray[np.float64]] = []
    for score in (rank, rank**2):
        rest = score - score.mean()
        for earlier in basis:
            rest = rest - earlier * (earlier @ rest)
        if (length := math.sqrt(rest @ rest)) > 1e-6:
            basis.append(rest / length)
    scores = np.zeros((len(values), len(basis)))
    scores[present] = np.stack(basis, 1) if basis else 0.0
    return scores


def category_scores(values: NDArray[np.object_]) -> Scores:
    """(rows,) -> (rows, categories): membership less the category's share, over the root of its rows. Which ones are told apart
    depends on their numbers and then on their names, not on which row comes first."""
    codes, names = pd.factorize(values, sort=True)
    rows = np.bincount(codes, minlength=len(names))
    if len(names) > LEVELS:
        codes = np.minimum(np.argsort(np.argsort(-rows, kind="stable"))[codes], LEVELS)
        rows = np.bincount(codes)
    if len(rows) < 2:
        return np.zeros((len(values), 0))
    scores: Scores = ((codes[:, None] == np.arange(len(rows))) - rows / len(values)) / np.sqrt(rows)
    return scores


def scores_together(values: NDArray[np.float64]) -> Scores:
    """(rows, columns) with NaN where missing -> orthonormal scores that span the columns' normal scores and their squares;
    a missing value counts as a mean one."""
    first, second = np.zeros_like(values), np.zeros_like(values)
    for i, value in enumerate(values.T):
        if (present := ~np.isnan(value)).any():
            normal = ndtri((_ranks(value[present]) + 1) / 2)
            first[present, i], second[present, i] = normal - normal.mean(), normal**2 - (normal**2).mean()
    spanned = np.concatenate([first, second], 1)
    lengths, directions = np.linalg.eigh(spanned.T @ spanned)
    kept = lengths > 1e-9 * max(lengths[-1], 1e-9)
    scores: Scores = spanned @ (directions[:, kept] / np.sqrt(lengths[kept]))
    return scores


def p_values(statistics: NDArray[np.float64], scores: Scores, size: int) -> NDArray[np.float64]:
    """Upper tail of S by the chi-square distribution with the mean and the variance that S has when ``size`` rows are drawn
    blindly (Box 1954, Annals of Mathematical Statistics 25: scale and degrees of freedom from two moments)."""
    mean, variance = moments(scores, size)
    if variance <= 1e-9 * mean:
        return np.ones_like(statistics)
    scale, freedom = variance / (2 * mean), 2 * mean**2 / variance
    found: NDArray[np.float64] = np.maximum(chdtrc(freedom, statistics / scale), _SMALLEST)
    return found


def moments(scores: Scores, size: int) -> tuple[float, float]:
    """Exact mean and variance of S over all ways to draw ``size`` of the rows without replacement.

    The mean is the dimension d. The variance sums the projection's products over all patterns of equal and distinct rows;
    besides d it needs only the sum of squared leverages, which is large where few rows carry a score, as in a rare category.
    """
    rows = len(scores)
    leverage = (scores**2).sum(1)
    d, h = float(leverage.sum()), float((leverage**2).sum())
    drawn = np.cumprod([(size - i) / max(rows - i, 1) for i in range(4)])  # that 1, 2, 3, 4 given rows are all drawn
    patterns = [h, d**2 + 2 * d - 7 * h, -2 * d**2 - 4 * d + 12 * h, d**2 + 2 * d - 6 * h]
    factor = rows * (rows - 1) / (size * (rows - size))
    return d, float(factor**2 * (drawn @ patterns) - d**2)


def _statistics(parts: Mapping[str, Scores], size: int, resamples: int) -> dict[str, NDArray[np.float64]]:
    """S of each column, (1 + resamples,): of the window, then of windows drawn blindly."""
    joined = np.concatenate(list(parts.values()), 1).astype(np.float32)
    rows = len(joined)
    window = (np.arange(rows)[None] >= rows - size).astype(np.float32)
    rng = np.random.default_rng(0)
    batch = max(1, min(resamples, _VALUES_AT_ONCE // rows))
    draws = (_draws(rng, rows, size, min(batch, resamples - start)) for start in range(0, resamples, batch))
    starts = np.cumsum([0, *(scores.shape[1] for scores in parts.values())])[:-1]
    factor = rows * (rows - 1) / (size * (rows - size))
    squares = [np.add.reduceat((drawn @ joined).astype(np.float64) ** 2, starts, axis=1) for drawn in chain([window], draws)]
    return dict(zip(parts, factor * np.concatenate(squares).T, strict=True))


def _draws(rng: np.random.Generator, rows: int, size: int, count: int) -> NDArray[np.float32]:
    """(count, rows), 1 where a row is drawn: ``size`` of the rows without replacement, by Floyd's algorithm (Bentley & Floyd
    1987); of more than half of the rows, the others are drawn instead, whose centred sums differ in sign alone."""
    drawn = np.zeros((count, rows), np.float32)
    line = np.arange(count)
    for last in range(rows - min(size, rows - size), rows):
        row = rng.integers(0, last + 1, count)
        row = np.where(drawn[line, row] > 0, last, row)
        drawn[line, row] = 1
    return drawn


def _scores_of(column: pd.Series[float], kind: Kind) -> Scores:
    return number_scores(column.to_numpy(float)) if kind == "number" else category_scores(column.to_numpy(object))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks as places in -1..1, ties in their middle."""
    places: NDArray[np.float64] = (2 * rankdata(values) - 1) / len(values) - 1
    return places


def _cleaned(frame: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    columns = {
        name: frame[name].astype("float64").replace([np.inf, -np.inf], np.nan)
        if kind == "number"
        else frame[name].astype("object").fillna(MISSING).astype(str)
        for name, kind in kinds.items()
    }
    return pd.DataFrame(columns).reset_index(drop=True)
