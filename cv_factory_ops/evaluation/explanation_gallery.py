"""The gallery of explained answers: of each class the ones that the model is surest of, and the ones it is most wrong about."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from cv_factory_ops.config.explanations import ExplanationsConfig
from cv_factory_ops.evaluation.bootstrap import Judged
from cv_factory_ops.explanations import Faithfulness, Rgb, explain, faithfulness, overlay, picture
from cv_factory_ops.models import Classifier
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    from matplotlib.figure import SubFigure

TITLES = {"grad_cam": "Grad-CAM", "integrated_gradients": "Integrated gradients", "lime": "LIME", "shap": "Kernel SHAP"}
TILE = 1.55
"""Side of an image in the gallery, in inches."""


class Chosen(NamedTuple):
    """An image that is explained; the answered label is the one that is."""

    row: int
    truth: int
    answer: int
    probability: float
    """Of the answered label."""


def explanation_gallery(
    judged: Judged, images: Images, network: Classifier, config: ExplanationsConfig
) -> tuple[Figure, dict[str, float]]:
    """Of the N prepared images that a model has answered, explain and draw some.

    Returns:
        The picture, and the means over its images of what :class:`cv_factory_ops.explanations.Faithfulness` says, under
        ``explanation_<name>``.

    Raises:
        ConfigError: the method cannot explain this network.
    """
    chosen, temperature = choose(judged, config.images), judged.manifest.temperature
    found, targets = images[np.array([each.row for each in chosen])], np.array([each.answer for each in chosen])
    maps = explain(network, found, config.method, targets, temperature)
    scores = faithfulness(network, found, maps, targets, temperature)
    metrics = {f"explanation_{name}": _mean(scores, name) for name in Faithfulness.model_fields}
    pictures = [(picture(image), overlay(image, each)) for image, each in zip(found, maps, strict=True)]
    title = f"{TITLES[config.method.kind]} of the answered label (red: for it, blue: against it)\n{_verdict(metrics)}"
    return _figure(chosen, pictures, judged.manifest.labels, title), metrics


def choose(judged: Judged, count: int) -> list[Chosen]:
    """About so many: of each class the right answers of the highest probability, and the wrong ones of the lowest for the
    truth; ordered by class, the right ones first."""
    truths, answers, probabilities = judged.labels, judged.answers, judged.probabilities
    classes = probabilities.shape[1]
    each, chosen = max(1, count // (2 * classes)), list[int]()
    for truth in range(classes):
        members = np.flatnonzero(truths == truth)
        ordered = members[np.argsort(-probabilities[members, truth], kind="stable")]
        is_right = answers[ordered] == truth
        chosen += [*ordered[is_right][:each], *ordered[~is_right][::-1][:each]]
    return [Chosen(int(i), int(truths[i]), int(answers[i]), float(probabilities[i, answers[i]])) for i in chosen]


def _mean(scores: list[Faithfulness], name: str) -> float:
    return float(np.mean([getattr(score, name) for score in scores]))


def _figure(chosen: list[Chosen], pictures: list[tuple[Rgb, Rgb]], names: list[str], title: str) -> Figure:
    """A band for each class: above the images, below the overlays; the right answers left, the wrong ones right."""
    bands = [
        [
            [k for k, each in enumerate(chosen) if each.truth == truth and (each.answer == truth) == right]
            for right in (True, False)
        ]
        for truth in range(len(names))
    ]
    columns = max(2, *(len(group) for band in bands for group in band))  # narrower than two has no room for the title
    figure = Figure(figsize=(TILE * (2 * columns + 0.5) + 0.4, (2 * TILE + 0.44) * len(names) + 0.8), layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02, hspace=0.02)
    figure.suptitle(title, fontsize=9)
    for part, name, band in zip(figure.subfigures(len(names), 1, squeeze=False).flat, names, bands, strict=True):
        part.supylabel(f"truth: {name}", fontsize=9)
        halves = part.subfigures(1, 2, wspace=0.04)
        for half, group, what in zip(halves, band, ("surest right answers", "worst wrong answers"), strict=True):
            half.suptitle(what, fontsize=8, color="0.35")
            _tiles(half, columns, [(k + 1, chosen[k], pictures[k]) for k in group], names)
    return figure


def _verdict(metrics: dict[str, float]) -> str:
    parts = []
    for name, better in (("deletion", "lower"), ("insertion", "higher")):
        value, moved = metrics[f"explanation_{name}"], metrics[f"explanation_{name}_random"]
        parts.append(f"{name} {value:.2f} ({better} is better), of the map moved elsewhere {moved:.2f}")
    return "\n".join(parts)


def _tiles(part: SubFigure, columns: int, tiles: list[tuple[int, Chosen, tuple[Rgb, Rgb]]], names: list[str]) -> None:
    axes = part.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    if not tiles:
        part.text(0.5, 0.5, "none", ha="center", va="center", color="0.35")
    for (above, below), (number, each, (plain, explained)) in zip(axes.T, tiles, strict=False):
        above.set_title(f"{number}: {names[each.answer]} {each.probability:.2f}", fontsize=8, pad=3)
        above.imshow(plain, interpolation="nearest")
        below.imshow(explained)
