"""The drift tests: is a window of requests a sample of the distribution that the reference was drawn from?

Every test is exact at any sample size, so that quiet windows raise alarms at no more than the declared rate. Over all
columns together the rate is kept by Bonferroni's bound: each column is tested at ``alpha / columns``. Rows are taken as
independent: several images of one patient on a side make alarms more frequent than declared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from cv_factory_ops.domain import Kind

_RESAMPLES_AT_ONCE = 100_000


@dataclass(frozen=True)
class Comparison:
    """Reference and window with the same columns, ready to be tested column by column."""

    reference: pd.DataFrame
    window: pd.DataFrame
    kinds: dict[str, Kind]
    alpha: float
    """False-alarm rate over all columns together."""

    @property
    def threshold(self) -> float:
        """p-value up to which a column counts as drifted."""
        return self.alpha / len(self.kinds)

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

    @property
    def drifted(self) -> dict[str, float]:
        """Drifted column -> p-value, the clearest first."""
        by_evidence = sorted(self.p_values.items(), key=lambda item: (item[1], item[0]))
        return {name: p for name, p in by_evidence if p <= self.threshold}


def compare(reference: pd.DataFrame, window: pd.DataFrame, kinds: Mapping[str, Kind], alpha: float) -> Comparison:
    """Columns to test: every feature, and ``<feature>_missing`` for each number that is missing here and there.

    A missing number says nothing of the values and much of the sender, so it is evidence of its own. Whether the further
    column is there depends on both samples taken together, not on which row is in which: the tests stay exact.
    """
    sides = [_cleaned(frame, kinds) for frame in (reference, window)]
    columns: dict[str, Kind] = dict(kinds)
    for name in [name for name, kind in kinds.items() if kind == "number"]:
        missing = pd.concat([side[name].isna() for side in sides])
        if missing.any() and not missing.all():
            columns[f"{name}_missing"] = "category"
            for side in sides:
                side[f"{name}_missing"] = np.where(side[name].isna(), "missing", "present")
    return Comparison(sides[0], sides[1], columns, alpha)


def p_values(comparison: Comparison) -> dict[str, float]:
    """The p-value of each column; 1 where a side has no value to compare."""
    values = dict.fromkeys(comparison.kinds, 1.0)
    for name, kind in comparison.testable.items():
        reference, window = comparison.reference[name].dropna(), comparison.window[name].dropna()
        test = number_p_value if kind == "number" else category_p_value
        values[name] = test(reference, window, comparison.threshold)
    return values


def number_p_value(reference: pd.Series[float], window: pd.Series[float], threshold: float) -> float:
    """Two-sample Kolmogorov-Smirnov test, exact up to 10,000 rows a side (Hodges 1958); ties make it conservative."""
    return float(ks_2samp(reference, window).pvalue)


def category_p_value(reference: pd.Series[str], window: pd.Series[str], threshold: float) -> float:
    """Chi-square test of homogeneity, its p-value by Monte Carlo over all tables with the same margins (Hope 1968).

    The usual approximation needs expected counts of five (Cochran 1954), which rare and unseen categories never have; and
    a goodness-of-fit test against the reference's shares forgets that the reference is a sample too, and raises false
    alarms. Counting the observed table among the resampled ones keeps the test valid with any number of them (Phipson &
    Smyth 2010); there are enough for p-values well below the threshold.
    """
    observed, pooled = _counts(reference, window)
    if len(pooled) < 2:
        return 1.0
    resamples = max(9_999, math.ceil(20 / threshold))
    limit = _chi_square(observed, pooled, len(window)) * (1 - 1e-9)
    tables = _tables(pooled, len(window), resamples)
    as_extreme = sum(int((_chi_square(batch, pooled, len(window)) >= limit).sum()) for batch in tables)
    return (1 + as_extreme) / (1 + resamples)


def _cleaned(frame: pd.DataFrame, kinds: Mapping[str, Kind]) -> pd.DataFrame:
    columns = {
        name: frame[name].astype("float64").replace([np.inf, -np.inf], np.nan)
        if kind == "number"
        else frame[name].astype("object").fillna("missing").astype(str)
        for name, kind in kinds.items()
    }
    return pd.DataFrame(columns).reset_index(drop=True)


def _counts(reference: pd.Series[str], window: pd.Series[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of each category in the window, and in both samples together."""
    names, codes = np.unique(np.concatenate([reference.to_numpy(str), window.to_numpy(str)]), return_inverse=True)
    observed = np.bincount(codes[len(reference) :], minlength=len(names))
    return observed, np.bincount(codes, minlength=len(names))


def _tables(pooled: NDArray[np.int64], size: int, resamples: int) -> Iterator[NDArray[np.int64]]:
    """Counts of ``size`` rows drawn from the pooled rows without replacement, (batch, categories); always the same ones."""
    rng = np.random.default_rng(0)
    for start in range(0, resamples, _RESAMPLES_AT_ONCE):
        yield rng.multivariate_hypergeometric(pooled, size, size=min(_RESAMPLES_AT_ONCE, resamples - start))


def _chi_square(window: NDArray[np.int64], pooled: NDArray[np.int64], size: int) -> NDArray[np.float64]:
    """Pearson's statistic up to a factor that is the same for all tables with these margins."""
    expected = pooled * (size / pooled.sum())
    statistic: NDArray[np.float64] = ((window - expected) ** 2 / expected).sum(-1)
    return statistic
