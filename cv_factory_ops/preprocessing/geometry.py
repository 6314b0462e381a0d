"""Where the pixels of the model's input lie in the image: what takes masks and boxes the same way as their image, and answers
back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import assert_never

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.preprocessing import CropStep, PadStep, PreprocessingConfig, ResizeStep, SpacingStep, Step
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.manifest import Boxes as Boxes

Spacing = tuple[float, float] | None
"""Distance of neighbouring rows and of neighbouring columns in mm, where it is known."""
Mask = NDArray[np.uint8]
"""(rows, columns), the number of each pixel's class."""
Moving = SpacingStep | ResizeStep | CropStep | PadStep
"""The steps after which pixels lie elsewhere; all others change intensities alone."""


def extent(step: Moving, shape: tuple[int, ...], spacing: Spacing) -> tuple[tuple[int, int], Spacing]:
    """Rows and columns that a step asks for, of an image of that shape, and the spacing after it.

    Raises:
        Rejected: ``no_spacing``, where it is not known and the step needs it.
    """
    rows, columns = shape[:2]
    match step:
        case SpacingStep(mm=mm):
            row, column = known(spacing, step)
            return (max(round(rows * row / mm), 1), max(round(columns * column / mm), 1)), (mm, mm)
        case ResizeStep(pixels=pixels, side=side):
            factor = pixels / (min(rows, columns) if side == "shorter" else max(rows, columns))
            counts = max(round(rows * factor), 1), max(round(columns * factor), 1)
            return counts, spacing and (spacing[0] * rows / counts[0], spacing[1] * columns / counts[1])
        case CropStep(mm=mm, pixels=pixels) | PadStep(mm=mm, pixels=pixels):
            if mm is not None:
                row, column = known(spacing, step)
                return (max(round(mm / row), 1), max(round(mm / column), 1)), spacing
            square = pixels or max(rows, columns)
            return (square, square), spacing
        case _:
            assert_never(step)


def known(spacing: Spacing, step: Step) -> tuple[float, float]:
    """The spacing, which the step cannot do without."""
    if spacing is None:
        raise Rejected("no_spacing", f"has no pixel spacing; the step {step.kind} needs it")
    return spacing


@dataclass(frozen=True)
class Axis:
    """One side of the prepared image: ``count`` pixels of ``step`` pixels of the image each, the first of which begins at
    ``begin`` (below 0, and beyond the image's last, there is padding)."""

    count: int
    begin: float = 0.0
    step: float = 1.0

    def through(self, step: Moving, count: int) -> Axis:
        """What a step makes of it, that asks for as many pixels."""
        match step:
            case SpacingStep() | ResizeStep():
                return self.resampled(count)
            case CropStep():
                return self.cropped(count)
            case PadStep():
                return self.padded(count)
            case _:
                assert_never(step)

    def resampled(self, count: int) -> Axis:
        """As many pixels on the same length."""
        return Axis(count, self.begin, self.step * self.count / count)

    def cropped(self, count: int) -> Axis:
        """The middle of it, where it is longer."""
        return Axis(min(count, self.count), self.begin + max(self.count - count, 0) // 2 * self.step, self.step)

    def padded(self, count: int) -> Axis:
        """A border around it, where it is shorter."""
        return Axis(max(count, self.count), self.begin - max(count - self.count, 0) // 2 * self.step, self.step)

    def sources(self) -> NDArray[np.int64]:
        """(count,) the pixel of the image that the middle of each prepared one lies in; outside of it there is none."""
        places: NDArray[np.int64] = np.floor(self.begin + (np.arange(self.count) + 0.5) * self.step).astype(np.int64)
        return places

    def seen(self, length: int) -> NDArray[np.int64]:
        """(count,) how many of the image's pixels each prepared one answers for."""
        at = self.targets(length)
        return np.bincount(at[(at >= 0) & (at < self.count)], minlength=self.count)

    def targets(self, length: int) -> NDArray[np.int64]:
        """(length,) the prepared pixel that the middle of each one of the image lies in; outside of 0..count there is none."""
        places: NDArray[np.int64] = np.floor((np.arange(length) + 0.5 - self.begin) / self.step).astype(np.int64)
        return places


@dataclass(frozen=True)
class Geometry:
    """How an image of a certain shape and spacing becomes the model's input."""

    shape: tuple[int, int]
    """Rows and columns of the image."""
    rows: Axis
    columns: Axis

    @classmethod
    def of(cls, shape: tuple[int, int], config: PreprocessingConfig, spacing: Spacing = None) -> Geometry:
        """Of all steps that move pixels, and the last resize.

        Raises:
            Rejected: ``no_spacing``, where a step needs it.
        """
        rows, columns = Axis(shape[0]), Axis(shape[1])
        for step in config.steps:
            if isinstance(step, Moving):
                counts, spacing = extent(step, (rows.count, columns.count), spacing)
                rows, columns = rows.through(step, counts[0]), columns.through(step, counts[1])
        return cls(shape, rows.resampled(config.size), columns.resampled(config.size))

    def weights(self) -> NDArray[np.int64]:
        """(size, size) how many pixels of the image take their answer from each one of the model's input: none from padding."""
        return np.outer(self.rows.seen(self.shape[0]), self.columns.seen(self.shape[1]))

    def prepare(self, mask: Mask) -> Mask:
        """The mask of the image as that of the model's input, by the nearest pixel; 0, background, where there is padding."""
        return _picked(mask, self.rows.sources(), self.columns.sources())

    def restore(self, answer: Mask) -> Mask:
        """A mask of the model's input as one of the image, by the nearest pixel; 0 where the model has not looked."""
        return _picked(answer, self.rows.targets(self.shape[0]), self.columns.targets(self.shape[1]))

    def prepare_boxes(self, boxes: Boxes) -> Boxes:
        """The boxes of the image as those of the model's input, cut where that ends; without those whose middle it does not
        show."""
        found, is_shown = boxes.copy(), np.ones(len(boxes), bool)
        for sides, axis in (([1, 3], self.columns), ([2, 4], self.rows)):
            moved = (boxes[:, sides] - axis.begin) / axis.step
            is_shown &= (moved.mean(1) >= 0) & (moved.mean(1) < axis.count)
            found[:, sides] = moved.clip(0, axis.count)
        shown: Boxes = found[is_shown]
        return shown

    def restore_boxes(self, boxes: Boxes) -> Boxes:
        """Boxes of the model's input as those of the image, cut where that ends; without those that lie in padding."""
        found, (rows, columns) = boxes.copy(), self.shape
        for sides, axis, length in (([1, 3], self.columns, columns), ([2, 4], self.rows, rows)):
            found[:, sides] = (axis.begin + boxes[:, sides] * axis.step).clip(0, length)
        inside: Boxes = found[(found[:, 3:5] > found[:, 1:3]).all(1)]
        return inside


def _picked(mask: Mask, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Mask:
    """The pixels at these rows and columns; 0 where they lie outside."""
    inside_rows, inside_columns = ((at >= 0) & (at < length) for at, length in zip((rows, columns), mask.shape, strict=True))
    found = mask[np.ix_(rows.clip(0, mask.shape[0] - 1), columns.clip(0, mask.shape[1] - 1))]
    picked: Mask = np.where(inside_rows[:, None] & inside_columns, found, 0).astype(np.uint8)
    return picked
