"""Slow drift: a change too small for one window, that the windows of many checks show together.

Each window's mean score is compared with the mean over the reference *and all earlier windows*: such recursive residuals of a
quiet sequence are independent standard normal draws (Brown, Durbin & Evans 1975), although all windows are measured against the
same finite reference; sums of plain differences would carry the reference's own error into every window and alarm by it in the
end. Two cumulative sums a series (Page 1954, Biometrika 41) gather residuals of one sign, and their p-value says how often the
sum of any series gets that far within ``horizon`` windows in a row: by a Markov chain for one series (Brook & Evans 1972,
Biometrika 59), times the number of sums (Bonferroni).

A number's score is its ridit (Bross 1958, Biometrics 14), the share of the reference below it; a category's, whether it is that
one. Assumed are independent rows, and windows of some tens of rows or more, so that means are normal; residuals are held within
three standard deviations, because a single strange night is what the window's own test is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from cv_factory_ops.config import DriftConfig
from cv_factory_ops.drift.detect import TOGETHER, Comparison
from cv_factory_ops.records import SlowDriftState, SlowSeries

ALLOWANCE = 0.5
"""Standard deviations a window that a sum forgives: it is quickest for changes of twice as much."""
_LARGEST = 3.0
_RARE = 0.05
"""Categories of a smaller share of the reference, or of almost all of it, are left to the window's own test."""
_STATES = 200


def advance(state: SlowDriftState | None, comparison: Comparison) -> SlowDriftState:
    """The state after one more window; None before the first window of a champion."""
    earlier = state.series if state else {}
    series = {
        name: _advanced(earlier.get(name, SlowSeries()), reference, window)
        for name, reference, window in _scores(comparison)
        if reference.any()
    }
    return SlowDriftState(windows=(state.windows if state else 0) + 1, series={**earlier, **series})


def drifted(state: SlowDriftState, config: DriftConfig) -> dict[str, float]:
    """Slowly drifted series -> p-value, the clearest first: how often any series of a quiet sequence gets as far within
    ``config.horizon`` windows in a row."""
    levels = {name: max(item.up, item.down) for name, item in state.series.items()}
    found: dict[str, float] = {}
    for name in sorted(levels, key=lambda name: (-levels[name], name)):
        p = 2 * len(levels) * crossing(levels[name], config.horizon)
        if p > config.slow_alpha:
            break
        found[name] = p
    return found


def crossing(level: float, horizon: int) -> float:
    """Probability that one cumulative sum of standard normal residuals reaches ``level`` within ``horizon`` windows, after
    as many without reaching it: a sequence is not always at its beginning."""
    if level <= 0:
        return 1.0
    width = level / (_STATES - 0.5)
    steps = np.arange(_STATES)
    edges = (steps - steps[:, None] + 0.5) * width + ALLOWANCE
    below = ndtr(edges)
    moves = np.diff(below, axis=1, prepend=0.0)
    at = np.zeros(_STATES)
    at[0] = 1.0
    for _ in range(horizon):
        at = at @ moves
    at /= max(at.sum(), 1e-300)
    for _ in range(horizon):
        at = at @ moves
    return float(max(0.0, 1 - at.sum()))


def _scores(comparison: Comparison) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    """Series, centred scores of the reference's rows, and those of the window's rows, without missing ones."""
    for name, kind in comparison.kinds.items():
        reference, window = comparison.reference[name].dropna(), comparison.window[name].dropna()
        if name == TOGETHER or reference.empty or window.empty:
            continue
        if kind == "number":
            yield name, *_ridits(reference.to_numpy(float), window.to_numpy(float))
        else:
            yield from _memberships(name, reference, window)


def _ridits(reference: NDArray[np.float64], window: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ordered = np.sort(reference)
    first, second = (
        (np.searchsorted(ordered, side, "left") + np.searchsorted(ordered, side, "right")) / (2 * len(ordered)) - 0.5
        for side in (reference, window)
    )
    return first, second


def _memberships(
    name: str, reference: pd.Series[str], window: pd.Series[str]
) -> Iterator[tuple[str, NDArray[np.float64], NDArray[np.float64]]]:
    for category, share in reference.value_counts(normalize=True).items():
        if _RARE <= share <= 1 - _RARE:
            first, second = ((side == category).to_numpy(float) - share for side in (reference, window))
            yield f"{name}={category}", first, second


def _advanced(item: SlowSeries, reference: NDArray[np.float64], window: NDArray[np.float64]) -> SlowSeries:
    """The residual of one window, and the sums with it."""
    known = len(reference) + item.rows
    spread = math.sqrt((reference**2).mean() * (1 / len(window) + 1 / known))
    residual = min(_LARGEST, max(-_LARGEST, (float(window.mean()) - item.total / known) / spread))
    return SlowSeries(
        rows=item.rows + len(window),
        total=item.total + float(window.sum()),
        up=max(0.0, item.up + residual - ALLOWANCE),
        down=max(0.0, item.down - residual - ALLOWANCE),
    )
