"""The declared steps from a decoded image to the model's input, the same at training and at serving."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config import PreprocessingConfig


def prepare(image: NDArray[np.float32], config: PreprocessingConfig) -> NDArray[np.uint16]:
    """Clip, pad to a square, resize: (rows, columns) float32 in 0..1 -> (size, size) uint16, 0..65535 being 0..1.

    uint16 keeps every grey level of 8-bit and 16-bit images while halving what training reads.
    """
    clipped = _clip(image, *config.clip)
    square = _pad_to_square(clipped)
    if square.shape[0] != config.size:
        shrinking = config.size < square.shape[0]
        square = cv2.resize(square, (config.size, config.size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR)
    prepared: NDArray[np.uint16] = np.rint(np.clip(square, 0.0, 1.0) * 65535.0).astype(np.uint16)
    return prepared


def _clip(image: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    if (low, high) == (0.0, 1.0):
        return image
    bottom, top = np.quantile(image, [low, high])
    clipped: NDArray[np.float32] = ((image - bottom) / max(top - bottom, 1e-6)).astype(np.float32)
    return clipped


def _pad_to_square(image: NDArray[np.float32]) -> NDArray[np.float32]:
    rows, columns = image.shape
    side = max(rows, columns)
    if rows == columns:
        return image
    top, left = (side - rows) // 2, (side - columns) // 2
    return np.pad(image, ((top, side - rows - top), (left, side - columns - left)))
