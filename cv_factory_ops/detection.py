"""From a detector's outputs to boxes, and how far boxes are those of the truth, by COCO's rules (Lin et al. 2014).

A box is a row: the number of its class, then left, top, right, bottom in pixels from the upper left corner of the image, whose
first pixel reaches from 0 to 1; one that was found has its score besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.answers import DetectedPrediction, FoundBox
from cv_factory_ops.config.models import RetinaNet
from cv_factory_ops.metrics import Values, Weights
from cv_factory_ops.preprocessing.geometry import Boxes, Geometry

Found = NDArray[np.float64]
"""(K, 6) class, left, top, right, bottom, score; the greatest score first."""

FLOOR = 0.05
"""Score below which a box is not even measured (Lin et al. 2017)."""
MOST = 100
"""Boxes of an image that are kept, as COCO counts them."""
CANDIDATES = 400
"""Those of the greatest scores that overlaps are looked for among."""
LARGEST = math.log(1000 / 16)
"""Logarithm of how many times a box may be as long as its anchor: an untrained network must not overflow."""
OVERLAPS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Intersection over union above which the lesser of two boxes goes: those that validation chooses from."""
THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""Intersection over union from which on a box is found: COCO's ten."""
RECALLS = np.linspace(0, 1, 101)
"""Where COCO reads precision."""
CELLS = 4_000_000
"""Weights that are held at a time."""


# --- from outputs to boxes ---


def anchors(config: RetinaNet, size: int) -> NDArray[np.float32]:
    """(anchors, 4) left, top, right, bottom of the squares that a network tells boxes from, in the order of its outputs: one in
    the middle of each pixel of each of its maps."""
    squares = []
    for stride, side in zip(config.strides, config.anchors, strict=True):
        places = (np.arange(size // stride) + 0.5) * stride
        middle = np.stack(np.meshgrid(places, places), -1).reshape(-1, 2)  # x, y; row by row
        squares.append(np.concatenate([middle - side / 2, middle + side / 2], 1))
    return np.concatenate(squares).astype(np.float32)


def size_of(config: RetinaNet, count: int) -> int:
    """Rows and columns of the model's input that has as many anchors."""
    return round(math.sqrt(count / sum(1 / stride**2 for stride in config.strides)))


def candidates(output: NDArray[np.float32], squares: NDArray[np.float32], size: int) -> Found:
    """What an output (anchors, 4 + classes - 1) tells of boxes within an input of size x size, each of one class: those of at
    least ``FLOOR``, overlapping as they may."""
    scores = 1 / (1 + np.exp(-output[:, 4:].astype(np.float64)))
    at, category = np.nonzero(scores >= FLOOR)
    order = np.argsort(-scores[at, category], kind="stable")[:CANDIDATES]
    at, category = at[order], category[order]
    low, high = squares[at, :2].astype(np.float64), squares[at, 2:].astype(np.float64)
    middle = (low + high) / 2 + output[at, :2] * (high - low)
    half = np.exp(np.minimum(output[at, 2:4], LARGEST)) * (high - low) / 2
    corners = np.concatenate([middle - half, middle + half], 1).clip(0, size)
    found = np.concatenate([category[:, None] + 1, corners, scores[at, category][:, None]], 1)
    return found[(corners[:, 2:] > corners[:, :2]).all(1)]


def suppressed(found: Found, overlap: float) -> Found:
    """Without the boxes that overlap one of their class with a greater score by more (non-maximum suppression); ``MOST`` at
    most."""
    same = found[:, None, 0] == found[None, :, 0]
    rivals = same & (intersection_over_union(found[:, 1:5], found[:, 1:5]) > overlap)
    kept, gone = list[int](), np.zeros(len(found), bool)
    for place in range(len(found)):
        if not gone[place]:
            kept.append(place)
            gone |= rivals[place]
            if len(kept) == MOST:
                break
    return found[kept]


def intersection_over_union(some: NDArray[np.floating], others: NDArray[np.floating]) -> Values:
    """(A, B) of (A, 4) and (B, 4) left, top, right, bottom."""
    low, high = np.maximum(some[:, None, :2], others[None, :, :2]), np.minimum(some[:, None, 2:], others[None, :, 2:])
    shared = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (some, others)]
    union = areas[0][:, None] + areas[1][None] - shared
    ratio: Values = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
    return ratio


class Reader:
    """Reads the outputs of one detector."""

    def __init__(self, config: RetinaNet, size: int, overlap: float = 1.0) -> None:
        """``overlap``: intersection over union above which the lesser of two boxes goes; 1 keeps all."""
        self._squares, self._size, self._overlap = anchors(config, size), size, overlap

    def __call__(self, output: NDArray[np.float32]) -> Found:
        """(anchors, 4 + classes - 1) -> boxes in pixels of the model's input."""
        return suppressed(self.candidates(output), self._overlap)

    def candidates(self, output: NDArray[np.float32]) -> Found:
        """As they are told, overlapping."""
        return candidates(output, self._squares, self._size)


def told(found: Found, threshold: float) -> dict[str, float]:
    """What an answer says of itself, for drift: ``score``, the greatest of any box, 0 where there is none; ``boxes``, how many
    have at least the threshold."""
    return {"score": _greatest(found), "boxes": float((found[:, 5] >= threshold).sum())}


def detected(
    found: Found,
    labels: Sequence[str],
    threshold: float,
    geometry: Geometry,
    features: Mapping[str, str | float | None],
) -> DetectedPrediction:
    """The boxes of the model's input, as an answer about the image that this was prepared from."""
    of_image = geometry.restore_boxes(found)
    boxes = [
        FoundBox(label=labels[int(row[0])], score=round(float(row[5]), 6), **_corners(row))
        for row in of_image[of_image[:, 5] >= threshold]
    ]
    greatest = {label: _greatest(of_image[of_image[:, 0] == number]) for number, label in enumerate(labels) if number}
    of_answer = told(of_image, threshold)
    return DetectedPrediction(
        label=boxes[0].label if boxes else labels[0],
        score=of_answer["score"],
        scores={labels[0]: round(1 - of_answer["score"], 6), **greatest},
        features={**features, **of_answer},
        boxes=boxes,
    )


def _corners(row: NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 2) for name, value in zip(("left", "top", "right", "bottom"), row[1:5], strict=True)}


def _greatest(found: Found) -> float:
    return round(float(found[:, 5].max(initial=0)), 6)


# --- how far they are right ---


@dataclass(frozen=True)
class Matched:
    """The boxes found in one image, held against the true ones."""

    classes: NDArray[np.int64]
    """(K,) of each box found"""
    scores: Values
    """(K,)"""
    hits: NDArray[np.bool_]
    """(K, thresholds) whether it is a true one's"""
    truths: NDArray[np.int64]
    """(classes - 1,) number of true boxes"""


def matched(truth: Boxes, found: Found, classes: int) -> Matched:
    """Each box found, the greatest score first, takes the true one of its class that it overlaps most, of those that are left
    and that it overlaps by the threshold, as COCO has it."""
    hits = np.zeros((len(found), len(THRESHOLDS)), bool)
    for number in range(1, classes):
        true, own = truth[truth[:, 0] == number], np.flatnonzero(found[:, 0] == number)
        overlaps = intersection_over_union(found[own, 1:5], true[:, 1:5])
        left = np.ones((len(THRESHOLDS), len(true)), bool)
        for place in np.argsort(-found[own, 5], kind="stable") if len(true) else []:
            fits = np.where(left & (overlaps[place] >= THRESHOLDS[:, None] - 1e-10), overlaps[place], -1.0)
            best = len(true) - 1 - fits[:, ::-1].argmax(1)  # of equal ones the last
            taken = np.flatnonzero(fits.max(1) >= 0)
            hits[own[place], taken], left[taken, best[taken]] = True, False
    truths = np.bincount(truth[:, 0].astype(np.int64), minlength=classes)[1:]
    return Matched(found[:, 0].astype(np.int64), found[:, 5], hits, truths)


@dataclass(frozen=True)
class Curves:
    """All boxes of one class found in a set of images, the greatest score first."""

    owners: NDArray[np.int64]
    """(K,) the image of each"""
    scores: Values
    hits: NDArray[np.bool_]
    """(K, thresholds)"""
    truths: NDArray[np.int64]
    """(N,) number of true boxes of each image"""

    @classmethod
    def of(cls, images: Sequence[Matched], number: int) -> Curves:
        """Of the class of that number."""
        own = [np.flatnonzero(image.classes == number) for image in images]
        owners = np.repeat(np.arange(len(images)), [len(rows) for rows in own])
        scores = np.concatenate([np.empty(0), *(image.scores[rows] for image, rows in zip(images, own, strict=True))])
        none = np.zeros((0, len(THRESHOLDS)), bool)
        hits = np.concatenate([none, *(image.hits[rows] for image, rows in zip(images, own, strict=True))])
        order = np.argsort(-scores, kind="stable")
        truths = np.array([image.truths[number - 1] for image in images], np.int64)
        return cls(owners[order], scores[order], hits[order], truths)

    def precision_recall(self, weights: Weights, threshold: int) -> tuple[Values, Values]:
        """(B, K) precision and recall after each box, at one of ``THRESHOLDS``; ``weights``: (B, N), how often images count."""
        of_boxes = weights[:, self.owners]
        found = np.cumsum(of_boxes * self.hits[:, threshold], 1)
        all_of_them, true = np.cumsum(of_boxes, 1), weights @ self.truths
        precision: Values = np.divide(found, all_of_them, out=np.zeros_like(found), where=all_of_them > 0)
        recall: Values = np.divide(found, true[:, None], out=np.zeros_like(found), where=true[:, None] > 0)
        return precision, recall

    def average_precision(self, weights: Weights) -> Values:
        """(B, thresholds): the mean over ``RECALLS`` of the greatest precision at that recall or beyond; NaN where no image
        that counts has a true box."""
        found = np.full((len(weights), len(THRESHOLDS)), np.nan)
        for threshold in range(len(THRESHOLDS)):
            precision, recall = self.precision_recall(weights, threshold)
            precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
            for sample, any_true in enumerate(weights @ self.truths > 0):
                if any_true:
                    at = np.searchsorted(recall[sample], RECALLS, side="left")
                    read = np.append(precision[sample], 0.0)[at]
                    found[sample, threshold] = read.mean()
        return found


def mean_average_precision(images: Sequence[Matched], classes: int, weights: Weights) -> dict[str, Values]:
    """(B,) ``map``, the mean over ``THRESHOLDS`` and the classes that have true boxes, ``map50``, that at 0.5, and
    ``map_<number>`` of each class; NaN where there is none. ``weights``: (B, N)."""
    found = np.full((classes - 1, len(weights), len(THRESHOLDS)), np.nan)
    for number in range(1, classes):
        curves = Curves.of(images, number)
        step = max(CELLS // max(len(curves.scores), 1), 1)
        blocks = [curves.average_precision(weights[start : start + step]) for start in range(0, len(weights), step)]
        found[number - 1] = np.concatenate(blocks)
    of_classes = {f"map_{number}": found[number - 1].mean(1) for number in range(1, classes)}
    return {"map": _mean(found.mean(2)), "map50": _mean(found[:, :, 0]), **of_classes}


def _mean(of_classes: Values) -> Values:
    """(classes - 1, B) -> (B,) over those that are defined."""
    defined = ~np.isnan(of_classes)
    none = np.full(of_classes.shape[1], np.nan)
    mean: Values = np.divide(np.nansum(of_classes, 0), defined.sum(0), out=none, where=defined.any(0))
    return mean


# --- chosen on validation ---


def chosen_overlap(truths: Sequence[Boxes], found: Sequence[Found], classes: int) -> float:
    """Of ``OVERLAPS`` the one with the greatest ``map`` of ``found``, which are :func:`candidates`; of equal ones 0.5, then the
    least."""

    def score(overlap: float) -> float:
        images = [matched(truth, suppressed(boxes, overlap), classes) for truth, boxes in zip(truths, found, strict=True)]
        value = mean_average_precision(images, classes, np.ones((1, len(images))))["map"][0]
        return 0.0 if np.isnan(value) else float(value)

    return max(OVERLAPS, key=lambda overlap: (score(overlap), overlap == 0.5, -overlap))


def chosen_threshold(images: Sequence[Matched], classes: int) -> float:
    """The score from which on boxes are answered: that of the greatest F1 of all boxes at an intersection over union of 0.5;
    0.5 where none is right."""
    scores = np.concatenate([image.scores for image in images])
    hits = np.concatenate([image.hits[:, 0] for image in images])
    order = np.argsort(-scores, kind="stable")
    right, true = np.cumsum(hits[order]), sum(int(image.truths.sum()) for image in images)
    if not right.any():
        return 0.5
    f1 = 2 * right / (np.arange(len(right)) + 1 + true)
    last = np.r_[np.diff(scores[order]) != 0, True]  # of equal scores all are answered
    return float(scores[order][np.where(last, f1, -1).argmax()])


def rows_of(images: Sequence[Matched]) -> Iterator[NDArray[np.float32]]:
    """Each image as a row of as many numbers: what ranks exchange."""
    for image in images:
        table = np.zeros((MOST, 2 + len(THRESHOLDS)), np.float32)
        table[: len(image.scores)] = np.concatenate([image.classes[:, None], image.scores[:, None], image.hits], 1)
        yield np.concatenate([image.truths.astype(np.float32), table.ravel()])


def from_row(row: NDArray[np.float32], classes: int) -> Matched:
    """What :func:`rows_of` has made a row of."""
    table = row[classes - 1 :].reshape(MOST, 2 + len(THRESHOLDS)).astype(np.float64)
    table = table[table[:, 0] > 0]
    return Matched(table[:, 0].astype(np.int64), table[:, 1], table[:, 2:] > 0, row[: classes - 1].astype(np.int64))
