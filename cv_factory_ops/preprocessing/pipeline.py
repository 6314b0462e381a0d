"""The declared steps from a decoded image to the model's input, the same at training and at serving."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, assert_never

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config import (
    ClipStep,
    ColorStep,
    CropStep,
    EqualiseStep,
    NormaliseStep,
    PadStep,
    PreprocessingConfig,
    ResizeStep,
    SpacingStep,
    Step,
)
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.manifest import to_uint16

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 80_000_000
"""Rows times columns above which a step does not enlarge: a wrong spacing must not take all memory."""

Image = NDArray[np.float32]
"""(rows, columns) or (rows, columns, 3), 0..1."""
Spacing = tuple[float, float] | None
"""Distance of neighbouring rows and of neighbouring columns in mm, where it is known."""


def prepare(image: Image | NDArray[np.uint16], config: PreprocessingConfig, spacing: Spacing = None) -> NDArray[np.uint16]:
    """All steps, then a resize: float32 in 0..1, or uint16 -> (size, size) or (size, size, 3) uint16, 0..65535 being 0..1.

    uint16 keeps every grey level of 8-bit and 16-bit images while halving what training reads. A float image is rounded to it
    first, as ingestion does: the same study gives the same pixels at training and at serving.

    Raises:
        Rejected: ``no_spacing``, ``intensity_range`` or ``too_large``, where a step cannot be done.
    """
    stored = image if image.dtype == np.uint16 else to_uint16(image.astype(np.float32))
    image = stored.astype(np.float32) / np.float32(65535.0)
    for step in config.steps:
        image, spacing = _apply(step, image, spacing)
    image = _resize(image, config.size, config.size)
    prepared: NDArray[np.uint16] = np.rint(np.clip(image, 0.0, 1.0) * np.float32(65535.0)).astype(np.uint16)
    return prepared


def to_tensor(prepared: NDArray[np.uint16]) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) uint16, 0..65535 -> (N, 1 or C, H, W) float32, 0..1"""
    import torch

    images = torch.from_numpy(prepared.astype(np.float32)).div_(65535.0)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _apply(step: Step, image: Image, spacing: Spacing) -> tuple[Image, Spacing]:
    match step:
        case ColorStep():
            return _color(image, step.space), spacing
        case NormaliseStep():
            return _normalise(image, step), spacing
        case ClipStep():
            return _clip(image, step.lower, step.upper), spacing
        case EqualiseStep():
            return _equalise(image, step), spacing
        case SpacingStep():
            return _resample(image, _known(spacing, step), step.mm)
        case ResizeStep():
            return _scale(image, spacing, step)
        case CropStep():
            return _crop(image, *_pixels(step, image, spacing)), spacing
        case PadStep():
            return _pad(image, *_pixels(step, image, spacing), step.value), spacing
        case _:
            assert_never(step)


def _color(image: Image, space: str) -> Image:
    """OpenCV's float conversions, each channel scaled to 0..1 (hue is in degrees, L* in 0..100, a* and b* in -127..127)."""
    if image.ndim == 2:
        raise Rejected("channels", "is grey; the step color needs red, green, blue")
    match space:
        case "hsv":
            converted = cv2.cvtColor(image, cv2.COLOR_RGB2HSV) / np.array([360, 1, 1], np.float32)
        case "lab":
            converted = (cv2.cvtColor(image, cv2.COLOR_RGB2Lab) + np.array([0, 127, 127], np.float32)) / np.array(
                [100, 254, 254], np.float32
            )
        case _:
            converted = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    return _unit(converted)


def _normalise(image: Image, step: NormaliseStep) -> Image:
    if step.outside == "refuse" and (image.min() < step.low or image.max() > step.high):
        raise Rejected("intensity_range", f"has intensities outside of the declared range {step.low:g}..{step.high:g}")
    scaled: Image = (image - np.float32(step.low)) / np.float32(step.high - step.low)
    return _unit(scaled)


def _clip(image: Image, lower: float, upper: float) -> Image:
    counts = _counts(image)
    bottom, top = _quantile(counts, lower), _quantile(counts, upper)
    return _unit(((image - np.float32(bottom)) / np.float32(max(top - bottom, 1e-6))).astype(np.float32))


def _counts(image: Image) -> NDArray[np.int64]:
    """(65536,) how many values are at most at each level: counting is ten times as fast as sorting."""
    counts: NDArray[np.int64] = np.bincount(to_uint16(image).ravel(), minlength=65536).cumsum()
    return counts


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    """The quantile, linear between two values, in 0..1."""
    rank = share * (int(counts[-1]) - 1)
    below, above = np.searchsorted(counts, [math.floor(rank), math.ceil(rank)], side="right")
    return float(below + (above - below) * (rank - math.floor(rank))) / 65535


def _equalise(image: Image, step: EqualiseStep) -> Image:
    if image.ndim == 3:
        luma, red, blue = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
        equalised = cv2.cvtColor(cv2.merge([_equalise(luma, step), red, blue]), cv2.COLOR_YCrCb2RGB)
        return _unit(equalised)
    levels = cv2.createCLAHE(step.limit, (step.tiles, step.tiles)).apply(to_uint16(image))
    result: Image = levels.astype(np.float32) / np.float32(65535.0)
    return result


def _known(spacing: Spacing, step: Step) -> tuple[float, float]:
    if spacing is None:
        raise Rejected("no_spacing", f"has no pixel spacing; the step {step.kind} needs it")
    return spacing


def _resample(image: Image, spacing: tuple[float, float], mm: float) -> tuple[Image, Spacing]:
    rows, columns = (max(round(n * old / mm), 1) for n, old in zip(image.shape, spacing, strict=False))
    return _resize(image, rows, columns), (mm, mm)


def _scale(image: Image, spacing: Spacing, step: ResizeStep) -> tuple[Image, Spacing]:
    rows, columns = image.shape[:2]
    factor = step.pixels / (min(rows, columns) if step.side == "shorter" else max(rows, columns))
    resized = _resize(image, max(round(rows * factor), 1), max(round(columns * factor), 1))
    return resized, spacing and (spacing[0] * rows / resized.shape[0], spacing[1] * columns / resized.shape[1])


def _resize(image: Image, rows: int, columns: int) -> Image:
    """Area means where there are fewer pixels afterwards, which does not alias; linear where there are more."""
    if image.shape[:2] == (rows, columns):
        return image
    if rows * columns > MAX_PIXELS:
        raise Rejected("too_large", f"would become {rows} x {columns} pixels; allowed are {MAX_PIXELS}")
    shrinking = rows * columns < image.shape[0] * image.shape[1]
    resized: Image = cv2.resize(image, (columns, rows), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return resized


def _pixels(step: CropStep | PadStep, image: Image, spacing: Spacing) -> tuple[int, int]:
    """Rows and columns that a step asks for; by default a square."""
    if step.mm is not None:
        row, column = _known(spacing, step)
        return max(round(step.mm / row), 1), max(round(step.mm / column), 1)
    side = step.pixels or max(image.shape[:2])
    return side, side


def _crop(image: Image, rows: int, columns: int) -> Image:
    top, left = max(image.shape[0] - rows, 0) // 2, max(image.shape[1] - columns, 0) // 2
    return image[top : top + rows, left : left + columns]


def _pad(image: Image, rows: int, columns: int, value: float) -> Image:
    missing_rows, missing_columns = max(rows - image.shape[0], 0), max(columns - image.shape[1], 0)
    if not (missing_rows or missing_columns):
        return image
    padded_rows, padded_columns = image.shape[0] + missing_rows, image.shape[1] + missing_columns
    if padded_rows * padded_columns > MAX_PIXELS:
        raise Rejected("too_large", f"would become {padded_rows} x {padded_columns} pixels; allowed are {MAX_PIXELS}")
    top, left = missing_rows // 2, missing_columns // 2
    widths = ((top, missing_rows - top), (left, missing_columns - left), (0, 0))
    return np.pad(image, widths[: image.ndim], constant_values=value)


def _unit(image: Image) -> Image:
    """Cut off what lies outside of 0..1: every step gives what it was given, an image in that range."""
    inside: Image = np.clip(image, 0, 1)
    return inside
