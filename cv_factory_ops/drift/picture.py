"""The pictures of a drift check: p-values against the threshold, the clearest drifts as histograms, and of both sides the
embedding and example images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from cv_factory_ops.drift.subgroups import telling

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from cv_factory_ops.drift.detect import Comparison, Verdict
    from cv_factory_ops.drift.examples import Examples

_QUIET, _DRIFTED, _REFERENCE = "#9aa5b1", "#c8442b", "#3b6ea5"
_SMALLEST = 1e-16
"""p-values below are drawn as this one, so that the threshold stays in sight."""
_MOST = 16
"""Columns whose p-values are drawn, those of the strongest evidence."""
_POINTS = 2_000
"""Of a side in the embedding map: more would hide one another."""


def draw(comparison: Comparison, verdict: Verdict, path: Path) -> None:
    """Write the picture as PNG."""
    detailed = list(telling(verdict.drifted))[:4]
    height = max(3.2, 1.7 * len(detailed), 1.2 + 0.24 * min(len(verdict.p_values), _MOST))
    figure = Figure(figsize=(11 if detailed else 7, height), layout="constrained")
    grid = figure.add_gridspec(max(len(detailed), 1), 2 if detailed else 1, width_ratios=(3, 2) if detailed else None)
    _draw_p_values(figure.add_subplot(grid[:, 0]), verdict)
    for row, name in enumerate(detailed):
        _draw_column(figure.add_subplot(grid[row, 1]), comparison, name, legend=row == 0)
    figure.savefig(path, dpi=120)


def draw_embedding(comparison: Comparison, path: Path) -> bool:
    """Write the map of both sides by the first two components of the embedding; False where there are none."""
    names = ["embedding_0", "embedding_1"]
    if not set(names) <= comparison.testable.keys():
        return False
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.add_subplot()
    sides = (comparison.reference, "reference", _REFERENCE, 14), (comparison.window, "window", _DRIFTED, 18)
    for side, label, colour, size in sides:
        points = side[names].dropna()
        shown = points.sample(min(len(points), _POINTS), random_state=0)
        axes.scatter(shown[names[0]], shown[names[1]], s=size, color=colour, alpha=0.45, linewidths=0, label=label)
        middle = points.median()
        axes.scatter(middle.iloc[:1], middle.iloc[1:], marker="P", s=140, color=colour, edgecolors="white", zorder=3)
    axes.set_xlabel("first component", fontsize=9)
    axes.set_ylabel("second component", fontsize=9)
    axes.set_title("Embedding of the images (crosses: medians)", loc="left", fontsize=11)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return True


def draw_examples(sides: dict[str, Examples], feature: str, path: Path) -> bool:
    """Write a row of images for each side, from the least to the greatest value of the feature; False where there are none."""
    sides = {name: side for name, side in sides.items() if side.images}
    if not sides:
        return False
    columns = max(len(side.images) for side in sides.values())
    figure = Figure(figsize=(max(1.6 * columns, 5.0), 2.15 * len(sides)), layout="constrained")
    rows = figure.subfigures(len(sides), 1, squeeze=False)[:, 0]
    for row, (name, side) in zip(rows, sides.items(), strict=True):
        _draw_row(row, f"{name}, by {feature}", side, columns)
    figure.savefig(path, dpi=120)
    return True


def _plain(text: str) -> str:
    """Dollar signs as they are: between two of them matplotlib would read a formula, and fail where it is none."""
    return text.replace("$", r"\$")


def _draw_row(row: SubFigure, title: str, side: Examples, columns: int) -> None:
    row.suptitle(_plain(title), fontsize=10, x=0.01, ha="left")
    panels = row.subplots(1, columns, squeeze=False)[0]
    for axes in panels:
        axes.set_axis_off()
    for axes, image, value in zip(panels, side.images, side.values, strict=False):
        axes.imshow(image / 65535, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(f"{value:.3g}", fontsize=8, pad=2)


def _draw_p_values(axes: Axes, verdict: Verdict) -> None:
    names = sorted(verdict.p_values, key=lambda name: verdict.p_values[name])[:_MOST][::-1]
    evidence = [-np.log10(max(verdict.p_values[name], _SMALLEST)) for name in names]
    colours = [_DRIFTED if name in verdict.drifted else _QUIET for name in names]
    axes.barh([_plain(name) for name in names], evidence, color=colours)
    limit = -np.log10(verdict.threshold)
    axes.axvline(limit, color="black", linewidth=1, linestyle="--")
    end = max(*evidence, limit) * 1.05
    side = "right" if limit > end / 2 else "left"
    axes.text(limit, len(names) - 0.4, f" drift from here: p ≤ {verdict.threshold:.1g} ", fontsize=8, va="bottom", ha=side)
    ticks = range(0, int(end) + 1, 1 if end < 8 else 2)
    axes.set_xticks(ticks, [f"$10^{{-{tick}}}$" if tick else "1" for tick in ticks])
    axes.set_xlim(0, end)
    axes.set_ylim(-0.6, len(names) + 0.4)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("p-value (a longer bar is stronger evidence)", fontsize=9)
    axes.set_title(
        f"{len(verdict.drifted)} of {len(verdict.p_values)} columns drifted, those of groups included", loc="left", fontsize=11
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_column(axes: Axes, comparison: Comparison, name: str, *, legend: bool) -> None:
    reference, window = comparison.reference[name].dropna(), comparison.window[name].dropna()
    draw_side = _draw_numbers if comparison.kinds[name] == "number" else _draw_categories
    draw_side(axes, reference, window)
    axes.set_title(_plain(name), loc="left", fontsize=9)
    axes.set_ylabel("share", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(fontsize=7, frameon=False)


def _draw_numbers(axes: Axes, reference: pd.Series[float], window: pd.Series[float]) -> None:
    edges = np.histogram_bin_edges(np.concatenate([reference, window]), bins=25)
    for side, label, colour in ((reference, "reference", _REFERENCE), (window, "window", _DRIFTED)):
        axes.hist(side, bins=list(edges), weights=np.full(len(side), 1 / len(side)), alpha=0.6, label=label, color=colour)


def _draw_categories(axes: Axes, reference: pd.Series[str], window: pd.Series[str]) -> None:
    shares = [side.value_counts(normalize=True) for side in (reference, window)]
    names = sorted(set(shares[0].index) | set(shares[1].index), key=lambda name: -max(side.get(name, 0) for side in shares))[:8]
    places = np.arange(len(names))
    for side, offset, label, colour in zip(shares, (-0.2, 0.2), ("reference", "window"), (_REFERENCE, _DRIFTED), strict=True):
        axes.bar(places + offset, [float(side.get(name, 0)) for name in names], 0.4, label=label, color=colour, alpha=0.8)
    axes.set_xticks(places, [_plain(name[:14]) for name in names])
