"""The declared steps from a decoded image to the model's input, the same at training and at serving."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.preprocessing import (
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
from cv_factory_ops.domain import to_uint16
from cv_factory_ops.errors import Rejected
from cv_factory_ops.preprocessing.geometry import Spacing as Spacing
from cv_factory_ops.preprocessing.geometry import extent
from cv_factory_ops.preprocessing.statistics import quantiles

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 80_000_000
"""Rows times columns above which a step does not enlarge: a wrong spacing must not take all memory."""

Image = NDArray[np.float32]
"""(rows, columns) or (rows, columns, 3), 0..1."""
Levels = NDArray[np.uint16]
"""(rows, columns) or (rows, columns, 3), 0..65535 being 0..1: what steps hand to each other."""


def prepare(image: Image | Levels, config: PreprocessingConfig, spacing: Spacing = None) -> Levels:
    """All steps, then a resize to (size, size) or (size, size, 3).

    A float image is rounded first, as decoding does: the same study gives the same pixels at training and at serving.

    Raises:
        Rejected: ``no_spacing``, ``intensity_range`` or ``too_large``, where a step cannot be done.
    """
    levels = to_uint16(image.astype(np.float32)) if image.dtype.kind == "f" else np.asarray(image, np.uint16)
    for step in config.steps:
        levels, spacing = _apply(step, levels, spacing)
    return _resize(levels, config.size, config.size)


def to_tensor(prepared: NDArray[np.uint16]) -> torch.Tensor:
    """(N, H, W) or (N, H, W, C) uint16, 0..65535 -> (N, 1 or C, H, W) float32, 0..1"""
    import torch

    images = torch.from_numpy(prepared.astype(np.float32)).div_(65535.0)
    return images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()


def _apply(step: Step, levels: Levels, spacing: Spacing) -> tuple[Levels, Spacing]:
    match step:
        case SpacingStep() | ResizeStep():
            (rows, columns), spacing = extent(step, levels.shape, spacing)
            return _resize(levels, rows, columns), spacing
        case CropStep():
            return _crop(levels, *extent(step, levels.shape, spacing)[0]), spacing
        case PadStep():
            return _pad(levels, *extent(step, levels.shape, spacing)[0], round(step.value * 65535)), spacing
        case _:
            return to_uint16(_with_intensities(step, levels.astype(np.float32) / np.float32(65535.0))), spacing


def _with_intensities(step: ColorStep | NormaliseStep | ClipStep | EqualiseStep, image: Image) -> Image:
    match step:
        case ColorStep():
            return _color(image, step.space)
        case NormaliseStep():
            return _normalise(image, step)
        case ClipStep():
            return _clip(image, step.lower, step.upper)
        case EqualiseStep():
            return _equalise(image, step)
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
    bottom, top = quantiles(to_uint16(image), [lower, upper])
    return _unit(((image - np.float32(bottom)) / np.float32(max(top - bottom, 1e-6))).astype(np.float32))


def _equalise(image: Image, step: EqualiseStep) -> Image:
    if image.ndim == 3:
        luma, red, blue = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb))
        equalised = cv2.cvtColor(cv2.merge([_equalise(luma, step), red, blue]), cv2.COLOR_YCrCb2RGB)
        return _unit(equalised)
    levels = cv2.createCLAHE(step.limit, (step.tiles, step.tiles)).apply(to_uint16(image))
    result: Image = levels.astype(np.float32) / np.float32(65535.0)
    return result


def _resize(levels: Levels, rows: int, columns: int) -> Levels:
    """Area means where there are fewer pixels afterwards, which does not alias; linear where there are more."""
    if levels.shape[:2] == (rows, columns):
        return levels
    if rows * columns > MAX_PIXELS:
        raise Rejected("too_large", f"would become {rows} x {columns} pixels; allowed are {MAX_PIXELS}")
    shrinking = rows * columns < levels.shape[0] * levels.shape[1]
    resized: Levels = cv2.resize(levels, (columns, rows), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    return resized


def _crop(levels: Levels, rows: int, columns: int) -> Levels:
    top, left = max(levels.shape[0] - rows, 0) // 2, max(levels.shape[1] - columns, 0) // 2
    return levels[top : top + rows, left : left + columns]


def _pad(levels: Levels, rows: int, columns: int, value: int) -> Levels:
    missing_rows, missing_columns = max(rows - levels.shape[0], 0), max(columns - levels.shape[1], 0)
    if not (missing_rows or missing_columns):
        return levels
    padded_rows, padded_columns = levels.shape[0] + missing_rows, levels.shape[1] + missing_columns
    if padded_rows * padded_columns > MAX_PIXELS:
        raise Rejected("too_large", f"would become {padded_rows} x {padded_columns} pixels; allowed are {MAX_PIXELS}")
    top, left = missing_rows // 2, missing_columns // 2
    widths = ((top, missing_rows - top), (left, missing_columns - left), (0, 0))
    return np.pad(levels, widths[: levels.ndim], constant_values=value)


def _unit(image: Image) -> Image:
    """Cut off what lies outside of 0..1: every step gives what it was given, an image in that range."""
    inside: Image = np.clip(image, 0, 1)
    return inside
