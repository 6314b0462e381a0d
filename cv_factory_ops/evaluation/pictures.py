"""The pictures of a run, drawn to be read at a glance. Bands and bars are bootstrap intervals over patients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cv_factory_ops.calibration import tempered
from cv_factory_ops.config.evaluation import EvaluationConfig
from cv_factory_ops.evaluation.bootstrap import Judged, percentile_interval
from cv_factory_ops.evaluation.subgroups import is_worse
from cv_factory_ops.metrics import (
    BINS,
    Mask,
    Scores,
    Values,
    Weights,
    average_precision,
    binary_auc,
    calibration_error,
    cumulative,
    forecasts,
    members,
    one_against_rest,
    share,
)
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.records import Subgroup

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

COLOURS = ("#3b6ea5", "#c8442b", "#4f9d69", "#8e6bb0", "#d89b2b", "#4aa3b5", "#b5588f", "#7a6a53")
QUIET = "#9aa5b1"
SPLITS = ("train", "val", "test", "recent", "reserve", "unlabelled")
GRID = np.linspace(0, 1, 201)
GALLERY = (3, 4)
"""Rows and columns of the gallery of errors."""
MOST_BANDS = 3
"""More would lie on top of one another."""
EXAMPLES = 4
"""Images of each class in the picture of the data."""
MOST_EXAMPLES = 12
"""Classes of which images are shown."""
FOREST = {"auc": "AUC", "sensitivity": "sensitivity", "specificity": "specificity"}
"""Metrics of subgroups that are drawn, where a task has no others."""
MOST_NUMBERED = 25
"""Classes of a confusion matrix in which numbers can be read."""


def learning_curves(history: Mapping[str, Mapping[int, float]], best_epoch: int) -> Figure:
    """Training loss and validation by epoch: ``history`` holds ``train_loss``, and ``val_auc``, ``val_dice`` or ``val_map``."""
    figure = Figure(figsize=(8.6, 3.4), layout="constrained")
    known = {
        "train_loss": ("Training loss", COLOURS[0]),
        "val_auc": ("Validation AUC", COLOURS[2]),
        "val_dice": ("Validation Dice", COLOURS[2]),
        "val_map": ("Validation mAP", COLOURS[2]),
    }
    panels = [(name, *known[name]) for name in history]
    for axes, (name, title, colour) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        epochs = sorted(history[name])
        axes.plot(epochs, [history[name][epoch] for epoch in epochs], color=colour, marker="o", markersize=3.5)
        axes.axvline(best_epoch, color=QUIET, linewidth=1, linestyle="--", zorder=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        finish(axes, title, f"epoch (kept: {best_epoch})", "")
    return figure


def roc(rivals: Mapping[str, Judged], config: EvaluationConfig) -> Figure:
    """A curve for each model (two classes), or for each class of the first model against the rest."""

    def points(hits: Values, alarms: Values) -> tuple[Values, Values]:
        return alarms / max(alarms[-1], 1), hits / max(hits[-1], 1)

    figure, axes, judged = _square(rivals)
    axes.plot([0, 1], [0, 1], color="0.85", linewidth=1)
    lines = _lines(rivals, binary_auc)
    for line in lines:
        hits, alarms, _ = cumulative(line.positive, line.scores, _data(line.judged))
        axes.plot(*points(hits[0], alarms[0]), color=line.colour, label=f"{line.title}: AUC {_told(line, binary_auc, config)}")
        if len(lines) <= MOST_BANDS:
            _band(axes, line, config, lambda hits, alarms: np.interp(GRID, *points(hits, alarms)))
    if len(judged.manifest.labels) == 2:
        _mark(axes, 1 - judged.metrics["specificity"], judged.metrics["sensitivity"], judged)
    finish(axes, f"ROC, locked test set, {len(judged)} images", "1 - specificity", "sensitivity")
    _legend(figure, axes, lines, "lower right")
    return figure


def precision_recall(rivals: Mapping[str, Judged], config: EvaluationConfig) -> Figure:
    """As :func:`roc`; a model without skill has a class's own share as precision. AP is the area under the steps."""

    def points(hits: Values, alarms: Values) -> tuple[Values, Values]:
        called = hits + alarms > 0
        recall, precision = hits[called] / max(hits[-1], 1), hits[called] / (hits + alarms)[called]
        return np.r_[0.0, recall], np.r_[precision[0], precision]

    def on_grid(hits: Values, alarms: Values) -> Values:
        recall, precision = points(hits, alarms)
        return precision[np.minimum(np.searchsorted(recall, GRID), len(recall) - 1)]

    figure, axes, judged = _square(rivals)
    lines = _lines(rivals, average_precision)
    for line in lines:
        hits, alarms, _ = cumulative(line.positive, line.scores, _data(line.judged))
        told = f"{line.title}: AP {_told(line, average_precision, config)}"
        axes.step(*points(hits[0], alarms[0]), where="pre", color=line.colour, label=told)
        if len(lines) <= MOST_BANDS:
            _band(axes, line, config, on_grid)
    if len(judged.manifest.labels) == 2:
        axes.axhline(float((judged.labels == 1).mean()), color="0.85", linewidth=1, zorder=0)
        if (judged.answers == 1).any():
            precision = float((judged.labels == 1)[judged.answers == 1].mean())
            _mark(axes, judged.metrics["sensitivity"], precision, judged)
    finish(axes, f"Precision and recall, locked test set, {len(judged)} images", "recall (sensitivity)", "precision")
    _legend(figure, axes, lines, "lower left")
    return figure


def confusion(judged: Judged) -> Figure:
    """Counts and row shares; rows are the truth."""
    from sklearn.metrics import confusion_matrix

    names = judged.manifest.labels
    counts = confusion_matrix(judged.labels, judged.answers, labels=range(len(names)))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3.2 + 0.5 * len(names), 15)
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    size = max(13 - len(names), 6)
    for (row, column), count in np.ndenumerate(counts) if len(names) <= MOST_NUMBERED else ():
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour, fontsize=size)
    slanted = max(map(len, names)) * len(names) > 40
    axes.set_xticks(range(len(names)), names, rotation=40 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="answer", ylabel="truth")
    axes.set_title(f"Locked test set, {len(judged)} images", loc="left", fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def reliability(judged: Judged, config: EvaluationConfig) -> Figure:
    """How often it was so what was forecast with which probability, before and after the temperature."""
    names, temperature = judged.manifest.labels, judged.manifest.temperature
    figure = Figure(figsize=(5.2, 5.8), layout="constrained")
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.plot([0, 1], [0, 1], color="0.85", linewidth=1)
    if temperature != 1:
        before = tempered(judged.probabilities, 1 / temperature)
        _reliability(axes, judged, before, QUIET, "before, ")
    _reliability(axes, judged, judged.probabilities, COLOURS[0], f"at temperature {temperature:.2f}, ")
    forecast, happened = forecasts(judged.labels, judged.probabilities)
    bins = members(forecast)
    samples = np.concatenate([_in_bins(happened, bins, weights) for weights in judged.samples(config)])
    for inside, values in zip(bins.T, samples.T, strict=True):
        if inside.any():
            axes.vlines(forecast[inside].mean(), *percentile_interval(values, config.confidence), color=COLOURS[0], alpha=0.5)
    below.hist(forecast, bins=np.linspace(0, 1, BINS + 1).tolist(), color=COLOURS[0], rwidth=0.92)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    of, seen = (names[1], f"share of {names[1]}") if len(names) == 2 else ("the answer", "accuracy")
    finish(axes, f"Reliability, locked test set, {len(judged)} images", "", seen)
    finish(below, "", f"predicted probability of {of}", "images")
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    return figure


def errors(judged: Judged, images: Images) -> Figure:
    """The images whose true label was given the least probability, the worst first. ``images``: as the model saw them."""
    names, of_truth = judged.manifest.labels, judged.probabilities[np.arange(len(judged)), judged.labels]
    rows, columns = GALLERY
    figure = Figure(figsize=(2.2 * columns, 2.62 * rows + 0.4), layout="constrained")
    panels = figure.subplots(rows, columns).ravel()
    for place, (axes, i) in enumerate(zip(panels, np.argsort(of_truth, kind="stable"), strict=False), 1):
        wrong = judged.answers[i] != judged.labels[i]
        show(axes, images[int(i)])
        answer = f"answer: {names[judged.answers[i]]}"
        text = f"{place}. truth: {names[judged.labels[i]]}, {of_truth[i]:.2g}\n{answer if wrong else 'answered so'}"
        axes.set_title(text, loc="left", fontsize=8, color=COLOURS[1] if wrong else "0.35")
    for axes in panels:
        axes.set_axis_off()
    wrong = int((judged.answers != judged.labels).sum())
    title = f"Locked test set: {wrong} of {len(judged)} answers are wrong. Least probable truths, with their probability"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def forest(
    overall: Subgroup, subgroups: Mapping[str, Mapping[str, Subgroup]], confidence: float, metrics: Mapping[str, str] = FOREST
) -> Figure:
    """Metrics of each subgroup with their intervals, beside those of the whole test set; ``metrics``: names and titles."""
    lines = _forest_lines(overall, subgroups)
    figure = Figure(figsize=(10, 1.5 + 0.27 * len(lines)), layout="constrained")
    title = f"Subgroups of the locked test set, with {confidence:.0%} intervals; red: wholly worse than the value of all"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for column, (axes, name) in enumerate(zip(figure.subplots(1, len(metrics), sharey=True), metrics, strict=True)):
        if name in overall.intervals:
            axes.axvspan(*overall.intervals[name], color=COLOURS[0], alpha=0.1, linewidth=0)
            axes.axvline(overall.metrics[name], color=COLOURS[0], linewidth=1, linestyle="--")
        for place, (_, group) in enumerate(lines):
            if group and name in group.metrics:
                axes.hlines(place, *group.intervals[name], color="0.35", linewidth=1.5)
                colour = COLOURS[1] if is_worse(group, overall.metrics, name) else "0.2"
                axes.plot(group.metrics[name], place, "o", color=colour)
        axes.set_yticks(range(len(lines)), [title for title, _ in lines])
        axes.tick_params(axis="y", length=0, labelleft=column == 0)
        axes.grid(axis="x", color="0.92")
        axes.locator_params(axis="x", nbins=5)
        axes.set_axisbelow(True)
        finish(axes, "", metrics[name], "")
        axes.spines["left"].set_visible(False)
        axes.set(ylim=(len(lines) - 0.5, -0.5))
    for label, (_, group) in zip(figure.axes[0].get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if group else "bold")
    return figure


def data(rows: pd.DataFrame, labels: Sequence[str], examples: Mapping[str, NDArray[np.uint16]]) -> Figure:
    """Images by split and label, and some of each label: ``examples`` holds (n, size, size[, 3]) of each."""
    least = 0.4 * rows["split"].nunique() + 2.0
    figure = Figure(figsize=(9.4, max(1.3 * len(examples), least)), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=(5, 4))
    _draw_counts(figure.add_subfigure(grid[0, 0]), rows, labels, least / figure.get_figheight())
    right = figure.add_subfigure(grid[0, 1])
    panels = right.subplots(len(examples), EXAMPLES, squeeze=False)
    for (name, images), row in zip(examples.items(), panels, strict=True):
        row[0].set_title(name, loc="left", fontsize=9)
        for axes, image in zip(row, images, strict=False):
            show(axes, image)
    for axes in panels.flat:
        axes.set_axis_off()
    return figure


def _draw_counts(figure: SubFigure, rows: pd.DataFrame, labels: Sequence[str], share: float) -> None:
    """Bars in the upper ``share`` of the figure."""
    axes = figure.add_subplot(figure.add_gridspec(2, 1, height_ratios=(share, 1 - share + 1e-6))[0])
    counts = pd.crosstab(rows["split"], rows["label"])
    counts = counts.loc[in_order(counts.index)]
    start = np.zeros(len(counts))
    for number in sorted(counts, key=lambda number: number % (len(labels) + 1)):  # -1, no label, comes last
        name, colour = (labels[number], class_colour(number, len(labels))) if number >= 0 else ("no label", QUIET)
        axes.barh(counts.index, counts[number], left=start, color=colour, label=name)
        start += counts[number].to_numpy()
    axes.invert_yaxis()
    for place, total in enumerate(start):
        axes.text(total, place, f" {total:.0f}", va="center", fontsize=9, color="0.35")
    axes.set_xlim(0, 1.1 * start.max())
    finish(axes, f"{len(rows)} images", "images", "")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)


def in_order(splits: Iterable[str]) -> list[str]:
    """As people name them: training first."""
    return sorted(splits, key=lambda split: SPLITS.index(split) if split in SPLITS else len(SPLITS))


@dataclass(frozen=True)
class _Line:
    """A curve: one class of a model against the rest."""

    title: str
    colour: str
    judged: Judged
    positive: Mask
    scores: Scores


def _lines(rivals: Mapping[str, Judged], metric: Callable[[Mask, Scores, Weights], Values]) -> list[_Line]:
    """Each model, or each class; of more classes than can be told apart, those that the model knows least."""
    first = next(iter(rivals.values()))
    names, binary = first.manifest.labels, len(first.manifest.labels) == 2
    found = [
        _Line(who if binary else names[c], "", judged, positive, scores)
        for who, judged in rivals.items()
        for c, positive, scores in one_against_rest(judged.labels, judged.probabilities)
        if binary or judged is first
    ]
    if len(found) > len(COLOURS):
        found = sorted(found, key=lambda line: float(metric(line.positive, line.scores, _data(first))[0]))
    return [replace(line, colour=colour) for line, colour in zip(found, COLOURS, strict=False)]


def _legend(figure: Figure, axes: Axes, lines: Sequence[_Line], place: Literal["lower left", "lower right"]) -> None:
    """Within the plot, or below it where it would cover the curves."""
    if len(lines) <= MOST_BANDS:
        axes.legend(loc=place, frameon=False, fontsize=8)
    else:
        figure.set_size_inches(5.6, 5.2 + 0.11 * len(lines))
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=7)


def _data(judged: Judged) -> Weights:
    """Each image once."""
    return np.ones((1, len(judged)))


def _told(line: _Line, metric: Callable[[Mask, Scores, Weights], Values], config: EvaluationConfig) -> str:
    """The metric with its interval."""
    values = [metric(line.positive, line.scores, weights) for weights in line.judged.samples(config)]
    low, high = percentile_interval(np.concatenate(values), config.confidence)
    return f"{metric(line.positive, line.scores, _data(line.judged))[0]:.3f} ({low:.3f} to {high:.3f})"


def _band(axes: Axes, line: _Line, config: EvaluationConfig, on_grid: Callable[[Values, Values], Values]) -> None:
    """Between the quantiles of the samples' curves, at each place of the grid."""
    curves: list[Values] = []
    for weights in line.judged.samples(config):
        hits, alarms, _ = cumulative(line.positive, line.scores, weights)
        curves += [on_grid(*sample) for sample in zip(hits, alarms, strict=True)]
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(curves, [tail, 1 - tail], axis=0)
    axes.fill_between(GRID, low, high, color=line.colour, alpha=0.15, linewidth=0)


def _square(rivals: Mapping[str, Judged]) -> tuple[Figure, Axes, Judged]:
    """A square plot from 0 to 1, and the model that it is of."""
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return figure, axes, next(iter(rivals.values()))


def _mark(axes: Axes, x: float, y: float, judged: Judged) -> None:
    """The operating point."""
    axes.plot(x, y, "o", color=COLOURS[0], markeredgecolor="white", label=f"operating point {judged.manifest.threshold:.3g}")


def _reliability(axes: Axes, judged: Judged, probabilities: Scores, colour: str, when: str) -> None:
    forecast, happened = forecasts(judged.labels, probabilities)
    bins = members(forecast)[:, members(forecast).any(0)]
    error = calibration_error(judged.labels, probabilities, _data(judged))[0]
    places, shares = (_in_bins(values, bins, _data(judged))[0] for values in (forecast, happened))
    axes.plot(places, shares, marker="o", markersize=4, color=colour, label=f"{when}calibration error {error:.3f}")


def _in_bins(values: Values | Mask, bins: Mask, weights: Weights) -> Values:
    """(B, bins) mean of each bin."""
    return np.stack([share(values, weights, inside) for inside in bins.T], axis=1)


def show(axes: Axes, image: NDArray[np.uint16]) -> None:
    axes.imshow(image / 65535.0, cmap="gray", vmin=0, vmax=1)


def _forest_lines(overall: Subgroup, subgroups: Mapping[str, Mapping[str, Subgroup]]) -> list[tuple[str, Subgroup | None]]:
    """Text and numbers of each line; a heading has no numbers."""
    lines: list[tuple[str, Subgroup | None]] = [(f"all ({overall.images} images)", overall)]
    for name, groups in subgroups.items():
        measured = {group: found for group, found in groups.items() if found.metrics}
        lines += [(name.replace("_", " "), None)] if measured else []
        lines += [(f"{group[:28]} ({found.images})", found) for group, found in measured.items()]
    return lines


def class_colour(number: int, count: int) -> Any:
    """One of ``count`` that differ."""
    return COLOURS[number] if count <= len(COLOURS) else colormaps["turbo"](number / (count - 1))


def finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
