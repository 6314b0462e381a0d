"""The pictures of a segmentation's answers to the test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from cv_factory_ops.evaluation.pictures import COLOURS, GALLERY, class_colour, finish, show
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    from cv_factory_ops.evaluation.segmentation import JudgedMasks
    from cv_factory_ops.preprocessing.geometry import Mask

MOST = GALLERY[0] * GALLERY[1]
"""Images of the gallery."""
BINS = np.linspace(0, 1, 21)
STYLES: dict[Literal["solid", "dashed"], str] = {"solid": "truth", "dashed": "answer"}


def histogram(judged: JudgedMasks) -> Figure:
    """How many images have which Dice, class by class."""
    names = judged.manifest.labels[1:]
    figure = Figure(figsize=(6.4, 0.6 + 1.7 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for number, (axes, name, values) in enumerate(zip(panels, names, judged.values["dice"].T, strict=True), 1):
        known = values[~np.isnan(values)]
        axes.hist(known, bins=BINS.tolist(), color=class_colour(number - 1, len(names)), rwidth=0.92)
        told = f"median {np.median(known):.3f}" if len(known) else "in no image"
        finish(axes, f"{name}: {told}, {len(known)} of {len(judged)} images show it in truth or answer", "", "images")
    panels[-1].set_xlabel("Dice", fontsize=9)
    return figure


def errors(judged: JudgedMasks, chosen: NDArray[np.int64], images: Images, outlines: Sequence[tuple[Mask, Mask]]) -> Figure:
    """The images of the lowest mean Dice, with truth and answer, both at the size of the model's input, in outlines."""
    rows, columns = GALLERY
    figure = Figure(figsize=(2.2 * columns, 2.42 * rows + 0.7), layout="constrained")
    panels = figure.subplots(rows, columns).ravel()
    names = judged.manifest.labels[1:]
    for place, (axes, i, (truth, answer)) in enumerate(zip(panels, chosen, outlines, strict=False), 1):
        show(axes, images[int(i)])
        for number in range(1, len(names) + 1):
            colour = class_colour(number - 1, len(names))
            for mask, style in zip((truth, answer), STYLES, strict=True):
                if 0 < (mask == number).sum() < mask.size:
                    axes.contour(mask == number, levels=[0.5], colors=[colour], linewidths=1.2, linestyles=style)
        dice = judged.of_images[i]
        axes.set_title(f"{place}. " + ("nothing to find" if np.isnan(dice) else f"Dice {dice:.2f}"), loc="left", fontsize=8)
    for axes in panels:
        axes.set_axis_off()
    handles = [Line2D([], [], color=class_colour(i, len(names)), label=name) for i, name in enumerate(names[: len(COLOURS)])]
    handles += [Line2D([], [], color="0.4", linestyle=style, label=what) for style, what in STYLES.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.suptitle(f"Locked test set, {len(judged)} images: those of the lowest Dice", x=0.01, ha="left", fontsize=11)
    return figure
