"""From a network's probabilities of pixels to an answer about the image, and masks as text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.answers import Region, SegmentedPrediction
from cv_factory_ops.preprocessing.geometry import Geometry, Mask, Spacing


def told(probabilities: NDArray[np.float32], weights: NDArray[np.int64]) -> dict[str, float]:
    """What an answer (classes, H, W) says of itself, for drift; ``weights``: (H, W) of
    :meth:`cv_factory_ops.preprocessing.geometry.Geometry.weights`, so that all is said of the image, and nothing of padding.

    ``score``: its confidence, the mean probability of the pixels that are not background, each in its class, or of all pixels
    where all are; ``entropy``: the mean of the pixels', in nats; ``foreground``: share of the pixels that are not background.
    """
    answer, sure = probabilities.argmax(0), probabilities.max(0)
    found = weights * (answer > 0)
    return {
        "score": _mean(sure, found if found.any() else weights),
        "entropy": _mean(-(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(0), weights),
        "foreground": _mean(answer > 0, weights),
    }


def segmented(
    probabilities: NDArray[np.float32],
    labels: Sequence[str],
    geometry: Geometry,
    spacing: Spacing,
    features: Mapping[str, str | float | None],
) -> SegmentedPrediction:
    """The answer (classes, H, W) of the model's input, as one about the image that this was prepared from."""
    answer, weights = probabilities.argmax(0).astype(np.uint8), geometry.weights()
    counts = np.bincount(answer.ravel(), weights.ravel(), len(labels))
    unit_area = spacing[0] * spacing[1] if spacing else 1.0
    regions = {
        label: Region(
            area=round(float(counts[number]) * unit_area, 3),
            unit="mm2" if spacing else "pixels",
            confidence=_mean(probabilities[number], weights * (answer == number)) if counts[number] else None,
        )
        for number, label in enumerate(labels)
        if number
    }
    of_answer = told(probabilities, weights)
    return SegmentedPrediction(
        label=labels[1 + int(counts[1:].argmax()) if counts[1:].any() else 0],
        score=of_answer["score"],
        scores={label: _mean(of_class, weights) for label, of_class in zip(labels, probabilities, strict=True)},
        features={**features, **of_answer},
        regions=regions,
        mask=encoded(geometry.restore(answer)),
    )


def _mean(values: NDArray[np.float32 | np.bool_], weights: NDArray[np.int64]) -> float:
    """Of (H, W); 0 where nothing weighs, as of a crop that shows less than a pixel of the image."""
    return round(float((values * weights).sum() / max(weights.sum(), 1)), 6)


def encoded(mask: Mask) -> str:
    """A PNG of 8 bits grey, base64: the value of a pixel is the number of its class."""
    return base64.b64encode(cv2.imencode(".png", mask)[1].tobytes()).decode()


def mask_of(prediction: SegmentedPrediction) -> Mask:
    """The mask of an answer, (rows, columns)."""
    return decoded(prediction.mask)


def decoded(text: str) -> Mask:
    """What :func:`encoded` was given; of another text a ValueError or TypeError."""
    return np.asarray(cv2.imdecode(np.frombuffer(base64.b64decode(text), np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
