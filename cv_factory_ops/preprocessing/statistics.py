"""Numbers that describe how an image was acquired rather than what it shows: what drift is watched on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import to_uint16
from cv_factory_ops.ingestion.decode import as_unit_range

STATISTICS = ("mean", "std", "p05", "p95", "sharpness", "noise", "saturated")


def image_statistics(prepared: NDArray[np.uint16]) -> dict[str, float]:
    """Statistics of a prepared image, in intensities of 0..1; of colours, in their luminance.

    ``mean``, ``std`` (contrast), ``p05`` and ``p95`` (quantiles); ``sharpness``: logarithm of the variance of the Laplacian
    (Pech-Pacheco et al. 2000); ``noise``: standard deviation estimated by the mask of Immerkaer (1996); ``saturated``:
    share of pixels at either end of the range.
    """
    image = as_unit_range(prepared)
    low, high = quantiles(prepared if prepared.ndim == 2 else to_uint16(image), [0.05, 0.95])
    return {
        "mean": float(image.mean()),
        "std": float(image.std()),
        "p05": low,
        "p95": high,
        "sharpness": float(np.log(cv2.Laplacian(image, cv2.CV_32F).var() + 1e-8)),
        "noise": _noise(image),
        "saturated": float(((image <= 0.0) | (image >= 1.0)).mean()),
    }


def quantiles(levels: NDArray[np.uint16], shares: Sequence[float]) -> list[float]:
    """Of the values of an image, 0..65535, as 0..1, linear between two: counting them is several times as fast as sorting."""
    at_most = np.bincount(levels.ravel(), minlength=65536).cumsum()
    return [_quantile(at_most, share) for share in shares]


def _quantile(at_most: NDArray[np.int64], share: float) -> float:
    rank = share * (int(at_most[-1]) - 1)
    below, above = np.searchsorted(at_most, [math.floor(rank), math.ceil(rank)], side="right")
    return float(below + (above - below) * (rank - math.floor(rank))) / 65535


def _noise(image: NDArray[np.float32]) -> float:
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    response = cv2.filter2D(image, -1, mask)[1:-1, 1:-1]
    return float(np.sqrt(np.pi / 2) * np.abs(response).mean() / 6)
