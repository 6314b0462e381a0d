"""Slow drift: a change too small for one window, that the windows of many checks show together.

Each window's mean score is compared with the mean over the reference *and all earlier windows*: such recursive residuals of a
quiet sequence are independent standard normal draws (Brown, Durbin & Evans 1975), although all windows are measured against the
same finite reference; sums of plain differences would carry the reference's own error into every window and alarm by it in the
end. Two cumulative sums a series (Page 1954, Biometrika 41) gather residuals of one sign, and their p-value says how often the
sum of any series gets that far within ``horizon`` windows in a row: by a Markov chain for one series (Brook & Evans 1972,
Biometrika 59), times the number of sums (Bonferroni).

What has drifted must not become what is normal: at an alarm the windows since the sum was last zero, where the change most
likely began (Page 1954), leave the mean again, later ones stay out while the alarm lasts, and so does a window that its own
test alarms for. A sum stops a little above the limit, so that an alarm ends soon after the feature has come back; then the sum
begins anew.

A number's score is its ridit (Bross 1958, Biometrics 14), the share of the reference below it; a category's, whether it is that
one. Assumed are independent rows, and windows of some tens of rows or more, so that means are normal; residuals are held within
three standard deviations, because a single strange night is what the window's own test is for.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.special import ndtr

from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.drift.detect import TOGETHER, Comparison
from cv_factory_ops.groups import TOLD
from cv_factory_ops.records import SlowDriftState, SlowSeries

ALLOWANCE = 0.5
"""Standard deviations a window that a sum forgives: it is quickest for changes of twice as much."""
_LARGEST = 3.0
_ABOVE = 3.0
"""How far above the limit a sum stops: some six quiet windows end an alarm, and seldom one that is still half as strong."""
_RARE = 0.05
"""Categories of a smaller share of the reference, or of almost all of it, are left to the window's own test."""
_STATES = 200


def advance(
    state: SlowDriftState | None, comparison: Comparison, config: DriftConfig, drifted: Collection[str] = ()
) -> SlowDriftState:
    """The state after one more window; None before the first window of a champion. ``drifted``: columns that the window's own
    test alarms for."""
    earlier = state.series if state else {}
    scores = [item for item in _scores(comparison) if item.reference.any()]
    limit = _limit(len({*earlier, *(item.name for item in scores)}), config)
    series = {
        item.name: _advanced(earlier.get(item.name, SlowSeries()), item, limit, known=item.column not in drifted)
        for item in scores
    }
    return SlowDriftState(windows=(state.windows if state else 0) + 1, series={**earlier, **series})


def drifted(state: SlowDriftState, config: DriftConfig) -> dict[str, float]:
    """Slowly drifted series -> p-value, the clearest first: how often any series of a quiet sequence gets as far within
    ``config.horizon`` windows in a row."""
    levels = {name: max(item.up, item.down) for name, item in state.series.items()}
    limit = _limit(len(levels), config)
    found = sorted((name for name in levels if levels[name] >= limit), key=lambda name: (-levels[name], name))
    return {name: 2 * len(levels) * crossing(levels[name], config.horizon) for name in found}


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


def _limit(series: int, config: DriftConfig) -> float:
    """The level at which a sum alarms, up or down, where there are so many series."""
    return _level(config.slow_alpha / (2 * max(series, 1)), config.horizon)


@cache
def _level(p: float, horizon: int) -> float:
    """The inverse of :func:`crossing`, whose logarithm falls by about twice the allowance, 1, a unit."""
    level = -math.log(p)
    for _ in range(30):
        step = math.log(max(crossing(level, horizon), 1e-15) / p)
        level += step
        if abs(step) < 1e-3:
            break
    return level


@dataclass(frozen=True)
class _Scores:
    """Centred scores of one series, without missing ones."""

    name: str
    column: str
    reference: NDArray[np.float64]
    window: NDArray[np.float64]


def _scores(comparison: Comparison) -> Iterator[_Scores]:
    for name, kind in comparison.kinds.items():
        reference, window = comparison.reference[name].dropna(), comparison.window[name].dropna()
        if name == TOGETHER or reference.empty or window.empty:
            continue
        if kind == "number":
            yield _Scores(name, name, *_ridits(reference.to_numpy(float), window.to_numpy(float)))
        else:
            yield from _memberships(name, reference, window)


def _ridits(reference: NDArray[np.float64], window: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ordered = np.sort(reference)
    first, second = (
        (np.searchsorted(ordered, side, "left") + np.searchsorted(ordered, side, "right")) / (2 * len(ordered)) - 0.5
        for side in (reference, window)
    )
    return first, second


def _memberships(name: str, reference: pd.Series[str], window: pd.Series[str]) -> Iterator[_Scores]:
    for category, share in reference.value_counts(normalize=True).items():
        if _RARE <= share <= 1 - _RARE and share * len(reference) >= TOLD:
            first, second = ((side == category).to_numpy(float) - share for side in (reference, window))
            yield _Scores(f"{name}={category}", name, first, second)


def _advanced(item: SlowSeries, scores: _Scores, limit: float, *, known: bool) -> SlowSeries:
    """The sums with the residual of one window, and the mean with the window, where it is ``known`` to be no alarm."""
    rows = len(scores.reference) + item.rows
    spread = math.sqrt((scores.reference**2).mean() * (1 / len(scores.window) + 1 / rows))
    residual = min(_LARGEST, max(-_LARGEST, (float(scores.window.mean()) - item.total / rows) / spread))
    up, down = _summed(item.up, residual, limit), _summed(item.down, -residual, limit)
    alarmed = max(item.up, item.down) >= limit
    window = (len(scores.window), float(scores.window.sum())) if known and not alarmed else (0, 0.0)
    since_up, since_down = (
        _plus(since, window) if level else (0, 0.0) for since, level in ((item.since_up, up), (item.since_down, down))
    )
    total = _plus((item.rows, item.total), window)
    if max(up, down) >= limit:
        gone = since_up if up >= limit else since_down
        total, since_up, since_down = (total[0] - gone[0], total[1] - gone[1]), (0, 0.0), (0, 0.0)
    return SlowSeries(rows=total[0], total=total[1], up=up, down=down, since_up=since_up, since_down=since_down)


def _summed(earlier: float, residual: float, limit: float) -> float:
    level = min(limit + _ABOVE, max(0.0, earlier + residual - ALLOWANCE))
    return 0.0 if level < limit <= earlier else level


def _plus(rows: tuple[int, float], more: tuple[int, float]) -> tuple[int, float]:
    return rows[0] + more[0], rows[1] + more[1]
