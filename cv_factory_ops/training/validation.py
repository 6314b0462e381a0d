"""What an epoch is judged by on validation: of each image a row of numbers, of all rows one score, the greater the better."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from cv_factory_ops.config.models import RetinaNet
from cv_factory_ops.detection import MOST, THRESHOLDS, Reader, from_row, matched, mean_average_precision, rows_of, size_of
from cv_factory_ops.metrics import Labels, auc
from cv_factory_ops.models import Classifier, Detector, Segmenter


class Validation(Protocol):
    """What the loop calls after each epoch; rows are what ranks exchange."""

    metric: str
    columns: int

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(n, columns) of n images; NaN where an answer is none."""

    def score(self, labels: Labels, rows: NDArray[np.float32]) -> float:
        """Of all images (N,) and their rows (N, columns)."""


def open_validation(network: Classifier) -> Validation:
    """The one that the network's answers call for."""
    match network:
        case Segmenter():
            return DiceOfMasks(network.classes)
        case Detector():
            return MapOfBoxes(network.config, network.classes)
        case _:
            return AucOfLabels(network.classes)


class AucOfLabels:
    """Area under the ROC curve; a row holds the probabilities of the classes."""

    metric = "auc"

    def __init__(self, classes: int) -> None:
        self.columns = classes

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.softmax(1)

    def score(self, labels: Labels, rows: NDArray[np.float32]) -> float:
        return auc(labels, rows)


class DiceOfMasks:
    """Mean Dice of the classes but the background, at the size of the model's input.

    That of a class is the mean over the images that show it in truth or answer; a row holds twice the pixels that both have,
    then the pixels of truth and answer together, each class by class.
    """

    metric = "dice"

    def __init__(self, classes: int) -> None:
        self.columns = 2 * (classes - 1)

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        count = logits.shape[1]
        truth, answer = (functional.one_hot(masks, count)[..., 1:].flatten(1, 2) for masks in (targets, logits.argmax(1)))
        rows = torch.cat([2 * (truth * answer).sum(1), truth.sum(1) + answer.sum(1)], 1).float()
        return rows.masked_fill(~logits.isfinite().flatten(1).all(1, keepdim=True), torch.nan)

    def score(self, labels: Labels, rows: NDArray[np.float32]) -> float:
        shared, both = np.split(rows.astype(np.float64), 2, axis=1)
        dice = np.divide(shared, both, out=np.full(both.shape, np.nan), where=both > 0)
        return float(np.mean([np.nanmean(values) for values in dice.T if not np.isnan(values).all()] or [np.nan]))


class MapOfBoxes:
    """Mean average precision by COCO's rules, at the size of the model's input; a row is that of
    :func:`cv_factory_ops.detection.rows_of`."""

    metric = "map"

    def __init__(self, config: RetinaNet, classes: int) -> None:
        self._config, self._classes = config, classes
        self.columns = classes - 1 + MOST * (2 + len(THRESHOLDS))

    def rows(self, logits: Tensor, targets: Tensor) -> Tensor:
        read = Reader(self._config, size_of(self._config, logits.shape[1]), OVERLAP)
        pairs = zip(targets.cpu().double().numpy(), logits.float().cpu().numpy(), strict=True)
        images = [matched(boxes[boxes[:, 0] > 0], read(output), self._classes) for boxes, output in pairs]
        rows = torch.from_numpy(np.stack(list(rows_of(images))))
        return rows.masked_fill(~logits.isfinite().flatten(1).all(1, keepdim=True).cpu(), torch.nan)

    def score(self, labels: Labels, rows: NDArray[np.float32]) -> float:
        images = [from_row(row, self._classes) for row in rows]
        found = mean_average_precision(images, self._classes, np.ones((1, len(images))))
        return float(found["map"][0])


OVERLAP = 0.5
"""Of boxes while epochs are compared; what the bundle has is chosen afterwards."""
