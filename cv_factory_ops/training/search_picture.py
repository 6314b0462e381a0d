"""The picture of a search: how the trials came out one after the other, and by each setting that was varied."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cv_factory_ops.config.search import Choice, Dimension, Integer, LogUniform, SearchConfig
from cv_factory_ops.training.study import Trial, told

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUIET = "#9aa5b1"
STYLES: dict[str, dict[str, Any]] = {
    "complete": {"color": "#3b6ea5"},
    "pruned": {"facecolors": "none", "edgecolors": QUIET},
    "failed": {"color": QUIET, "marker": "x"},
    "chosen": {"color": "#c8442b", "zorder": 3},
}
COLUMNS = 4
"""Most panels of settings in a row."""


def draw(search: SearchConfig, trials: Sequence[Trial], chosen: Sequence[int], path: Path) -> None:
    """Write the picture as PNG; ``chosen`` are the numbers of the trials that became the bundle."""
    kinds = ["chosen" if trial.number in chosen else trial.state for trial in trials]
    columns = min(len(search.space), COLUMNS)
    rows = -(-len(search.space) // columns)
    figure = Figure(figsize=(11, 3.4 + 2.4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[3.0] + [2.4] * rows)
    _draw_history(figure.add_subplot(grid[0, :]), trials, kinds)
    for place, (key, dimension) in enumerate(search.space.items()):
        axes = figure.add_subplot(grid[1 + place // columns, place % columns])
        _draw_setting(axes, key, dimension, trials, kinds)
        if place % columns == 0:
            axes.set_ylabel("validation AUC", fontsize=9)
    figure.savefig(path, dpi=120)


def _draw_history(axes: Axes, trials: Sequence[Trial], kinds: Sequence[str]) -> None:
    complete = [trial for trial in trials if trial.state == "complete"]
    best = np.maximum.accumulate([trial.val_auc for trial in complete])
    places = [trial.number for trial in complete]
    axes.step(
        [*places, len(trials) - 1], [*best, best[-1]], where="post", linewidth=1, label="best so far", **STYLES["complete"]
    )
    _dots(axes, [trial.number for trial in trials], trials, kinds)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.set_ylabel("validation AUC", fontsize=9)
    _finish(axes, "trial")


def _draw_setting(axes: Axes, key: str, dimension: Dimension, trials: Sequence[Trial], kinds: Sequence[str]) -> None:
    spread = 0.06 if isinstance(dimension, Choice) else 0.0  # so that trials of the same choice do not hide each other
    _dots(axes, [trial.params[key] + spread * (trial.number % 5 - 2) for trial in trials], trials, kinds)
    if isinstance(dimension, Choice):
        names = [fill(told(value), 10) for value in dimension.values]
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.5, len(names) - 0.5)
    else:
        axes.set_xscale("log" if isinstance(dimension, LogUniform) else "linear")
        axes.set_xlim(dimension.low, dimension.high)
    if isinstance(dimension, Integer):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, key)


def _dots(axes: Axes, places: Sequence[float], trials: Sequence[Trial], kinds: Sequence[str]) -> None:
    """A mark a trial at its validation AUC; those that failed have none, and lie at the lower edge."""
    for name, style in STYLES.items():
        own = [i for i, kind in enumerate(kinds) if kind == name]
        if own:
            heights = [trials[i].val_auc if trials[i].history else 0.03 for i in own]
            transform = axes.get_xaxis_transform() if name == "failed" else axes.transData
            x = [places[i] for i in own]
            axes.scatter(x, heights, s=26, label=name, transform=transform, clip_on=False, **style)


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.92", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
