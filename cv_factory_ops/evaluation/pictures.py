"""Confusion matrix and ROC curve, drawn to be read at a glance."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.metrics import Labels, binary_auc, confusion, predicted, roc_curve

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def confusion_picture(
    path: Path, labels: Labels, probabilities: NDArray[np.float64], threshold: float, names: list[str]
) -> None:
    """Counts and row shares; rows are the truth."""
    counts = confusion(labels, predicted(probabilities, threshold), len(names))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{count}\n{shares[row, column]:.0%}", ha="center", va="center", color=colour)
    axes.set(xticks=range(len(names)), yticks=range(len(names)), xticklabels=names, yticklabels=names)
    axes.set(xlabel="answered", ylabel="truth", title=f"Locked test set, {len(labels)} images")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def roc_picture(path: Path, labels: Labels, curves: dict[str, NDArray[np.float64]], names: list[str]) -> None:
    """One curve for each model (two classes), or for each class of the challenger against the rest."""
    figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
    for title, positive, scores in _roc_lines(labels, curves, names):
        false_rate, true_rate, _ = roc_curve(positive, scores)
        axes.plot(false_rate, true_rate, label=f"{title}: AUC {binary_auc(positive, scores):.3f}")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=f"ROC, locked test set, {len(labels)} images")
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _roc_lines(
    labels: Labels, curves: dict[str, NDArray[np.float64]], names: list[str]
) -> list[tuple[str, NDArray[np.bool_], NDArray[np.float64]]]:
    if len(names) == 2:
        return [(who, labels == 1, probabilities[:, 1]) for who, probabilities in curves.items()]
    return [(name, labels == i, curves["challenger"][:, i]) for i, name in enumerate(names)]
