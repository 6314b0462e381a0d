"""From a network's probabilities of pixels to an answer about the image, and masks as text."""

from __future__ import annotations

import base64
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.answers import Region, SegmentedPrediction
from cv_factory_ops.preprocessing.geometry import Geometry, Mask, Spacing


def told(probabilities: NDArray[np.float32]) -> dict[str, float]:
    """What an answer (classes, H, W) says of itself, for drift.

    ``score``: its confidence, the mean probability of the pixels that are not background, each in its class, or of all pixels
    where all are; ``entropy``: the mean of the pixels', in nats; ``foreground``: share of the pixels that are not background.
    """
    answer, sure = probabilities.argmax(0), probabilities.max(0)
    found = answer > 0
    return {
        "score": round(float(sure[found].mean() if found.any() else sure.mean()), 6),
        "entropy": round(float(-(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum(0).mean()), 6),
        "foreground": round(float(found.mean()), 6),
    }


def segmented(
    probabilities: NDArray[np.float32],
    labels: Sequence[str],
    geometry: Geometry,
    spacing: Spacing,
    features: dict[str, str | float | None],
) -> SegmentedPrediction:
    """The answer (classes, H, W) of the model's input, as one about the image that this was prepared from."""
    answer = probabilities.argmax(0).astype(np.uint8)
    mask = geometry.restore(answer)
    regions = {
        label: Region(
            area=round(float((mask == number).sum()) * (spacing[0] * spacing[1] if spacing else 1.0), 3),
            unit="mm2" if spacing else "pixels",
            confidence=round(float(probabilities[number][answer == number].mean()), 6) if (answer == number).any() else None,
        )
        for number, label in enumerate(labels)
        if number
    }
    areas = np.bincount(answer.ravel(), minlength=len(labels))[1:]
    return SegmentedPrediction(
        label=labels[1 + int(areas.argmax()) if areas.any() else 0],
        score=told(probabilities)["score"],
        scores={label: round(float(of_class.mean()), 6) for label, of_class in zip(labels, probabilities, strict=True)},
        features=features,
        regions=regions,
        mask=encoded(mask),
    )


def encoded(mask: Mask) -> str:
    """A PNG of 8 bits grey, base64: the value of a pixel is the number of its class."""
    return base64.b64encode(cv2.imencode(".png", mask)[1].tobytes()).decode()


def mask_of(prediction: SegmentedPrediction) -> Mask:
    """The mask of an answer, (rows, columns)."""
    return np.asarray(cv2.imdecode(np.frombuffer(base64.b64decode(prediction.mask), np.uint8), cv2.IMREAD_GRAYSCALE), np.uint8)
