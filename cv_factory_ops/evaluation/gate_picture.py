"""The verdict of the gate as a picture: each criterion's interval against its limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from cv_factory_ops.records import Criterion, GateRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASSED, FAILED, QUIET = "#4f9d69", "#c8442b", "#9aa5b1"


def draw(verdict: GateRecord, confidence: float) -> Figure:
    """Values on the left, differences to the champion on the right where there are some, counts as text below them."""
    measured = [row for row in verdict.criteria if (row.value is not None and row.limit != 0) or row.low is not None]
    against = [row for row in measured if row.name.endswith("champion's")]
    panels = [rows for rows in ([row for row in measured if row not in against], against) if rows]
    told = [row for row in verdict.criteria if row not in measured]
    height = 1.6 + 0.3 * max([len(rows) for rows in panels], default=1) + 0.22 * len(told)
    figure = Figure(figsize=(5.6 * max(len(panels), 1), height), layout="constrained")
    figure.suptitle(f"Gate: {verdict.verdict}", x=0.01, ha="left", fontsize=12, color=_colour(not verdict.reasons))
    for axes, rows in zip(figure.subplots(1, len(panels), squeeze=False)[0] if panels else (), panels, strict=True):
        _panel(axes, rows)
        title = "challenger - champion" if rows is against else "challenger"
        axes.set_title(f"{title}, {confidence:.0%} intervals; bar: the limit", loc="left", fontsize=9)
    figure.supxlabel("\n".join(map(_line, told)), x=0.01, ha="left", fontsize=8)
    return figure


def _panel(axes: Axes, rows: Sequence[Criterion]) -> None:
    for place, row in enumerate(rows):
        colour = _colour(row.passed)
        if row.low is not None and row.high is not None:
            axes.hlines(place, row.low, row.high, color=colour, linewidth=2)
        if row.value is not None:
            axes.plot(row.value, place, "o", color=colour)
        axes.vlines(row.limit, place - 0.35, place + 0.35, color="0.15", linewidth=2.5)
        arrow = ">" if row.rule == "at least" else "<"
        axes.plot(row.limit, place, marker=arrow, color="0.15", markersize=5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set(ylim=(len(rows) - 0.5, -0.5))


def _line(row: Criterion) -> str:
    """A criterion that has no interval to draw."""
    if row.passed is None:
        return f"{row.name}: {row.reason}"
    value = "undefined" if row.value is None else f"{row.value:g}"
    return f"{row.name}: {value}, {row.rule} {row.limit:g}" + ("" if row.passed else " (FAILED)")


def _colour(passed: bool | None) -> str:
    return QUIET if passed is None else PASSED if passed else FAILED
