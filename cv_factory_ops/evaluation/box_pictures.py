"""The pictures of a detection's answers to the test set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from cv_factory_ops.detection import THRESHOLDS, Curves
from cv_factory_ops.evaluation.mask_pictures import STYLES
from cv_factory_ops.evaluation.pictures import COLOURS, GALLERY, class_colour, finish, show
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    from cv_factory_ops.evaluation.detection import JudgedBoxes
    from cv_factory_ops.preprocessing.geometry import Geometry

AT = (0.5, 0.75)
"""Intersections over union of the curves."""


def precision_recall(rivals: Mapping[str, JudgedBoxes]) -> Figure:
    """Of each category a panel, in it a curve of each model at each of ``AT``: the second is dashed."""
    first = next(iter(rivals.values()))
    names = first.manifest.labels[1:]
    figure = Figure(figsize=(4.6 * len(names), 4.6), layout="constrained")
    for number, (axes, name) in enumerate(zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True), 1):
        for place, (who, judged) in enumerate(rivals.items()):
            curves, whole = Curves.of(judged.matches, number), np.ones((1, len(judged)))
            values = curves.average_precision(whole)[0]
            for at, style in zip(AT, ("solid", "dashed"), strict=True):
                threshold = int(np.abs(THRESHOLDS - at).argmin())
                precision, recall = (side[0] for side in curves.precision_recall(whole, threshold))
                told = f"{who}, IoU {at:g}: AP {values[threshold]:.3f}"
                axes.plot(recall, precision, color=COLOURS[place], linestyle=style, label=told)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.01)
        finish(axes, f"{name}: {int(curves.truths.sum())} boxes in {len(first)} images", "recall", "precision")
        axes.legend(loc="upper right", frameon=False, fontsize=8)
    return figure


def errors(judged: JudgedBoxes, images: Images, places: Sequence[Geometry]) -> Figure:
    """The images with the worst mistakes, with true boxes and those answered. ``images``: as the model saw them; ``places``: of
    all of them."""
    rows, columns = GALLERY
    names, threshold = judged.manifest.labels, judged.manifest.threshold
    figure = Figure(figsize=(2.2 * columns, 2.42 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns).ravel()
    worst = np.argsort(-judged.mistakes, kind="stable")[: len(panels)]
    for place, (axes, i) in enumerate(zip(panels, worst, strict=False), 1):
        show(axes, images[int(i)])
        answered = judged.found[i][judged.found[i][:, 5] >= threshold]
        for boxes, style in ((judged.truths[i], "solid"), (answered, "dashed")):
            for box in places[i].prepare_boxes(boxes):
                colour = class_colour(int(box[0]) - 1, len(names) - 1)
                width, height = box[3] - box[1], box[4] - box[2]
                corner = (box[1] - 0.5, box[2] - 0.5)  # pictures count from the middle of the first pixel
                axes.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linestyle=style, linewidth=1.2))
        scores = ", ".join(f"{score:.2f}" for score in answered[:3, 5])
        axes.set_title(f"{place}. " + (f"found {scores}" if scores else "nothing found"), loc="left", fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    handles = [Line2D([], [], color=class_colour(i, len(names) - 1), label=name) for i, name in enumerate(names[1:])]
    handles += [Line2D([], [], color="0.4", linestyle=style, label=what) for style, what in STYLES.items()]
    figure.legend(handles=handles[: len(COLOURS) + 2], loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(f"Locked test set, {len(judged)} images: those with the worst mistakes", x=0.01, ha="left", fontsize=11)
    return figure
