"""Golden studies: images of the locked test set with what the evaluation found for them, asked of the live endpoint.

They are drawn once for each bundle, with a fixed seed, and kept beside its archive, so a later rollout of the same bundle is
held against the same ones. An image is sent as ingestion decoded it, without any metadata but the pixel spacing where a step
needs it: so preparation, weights and calibration of the server are all in the comparison.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import segmentation, storage
from cv_factory_ops.answers import DetectedPrediction, Prediction, SegmentedPrediction
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import read_group, read_manifest
from cv_factory_ops.preprocessing.preprocess import spacings
from cv_factory_ops.records import EvaluateRecord, RegisterRecord
from cv_factory_ops.server import LARGEST_BODY

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.predictor import Predictor
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

SEED = 0
DECIMALS = 6
"""Of an intensity in 0..1 as text: half of the last is less than half a level of 16 bits, so rounding brings the level back."""
WHO = "challenger_"
"""What the evaluation's columns of the bundle begin with."""
COLUMNS = ("content_types", "probabilities", "masks")
"""Of the file, in the order of :class:`Study`; those from before there were masks have none."""
Spacing = tuple[float, float] | None


class Study(NamedTuple):
    """One image as a request, and what the evaluation made of it."""

    body: bytes
    content_type: str
    probabilities: list[float]
    """In the order of the project's labels; of a detection the greatest scores of boxes, of a segmentation none."""
    mask: str = ""
    """Of a segmentation, as answers have it."""


def studies(stage: Stage, bundle_digest: str) -> list[Study]:
    """The golden studies of a bundle; none where its evaluation is not part of the run."""
    wanted = stage.config.deploy.golden.studies
    uri = f"{stage.config.root}/models/{bundle_digest}/golden.npz"
    if wanted and not storage.exists(uri):
        drawn = _drawn(stage)
        if not drawn:
            log.warning("verify: no golden studies: %s has no answers to test images that fit a request", stage.run)
            return []
        storage.write_bytes(uri, _packed(drawn))
    return _unpacked(storage.read_bytes(uri))[:wanted] if wanted else []


def require_answer(study: Study, number: int, answer: bytes, labels: list[str], tolerance: float) -> float:
    """The largest difference of a probability, of a detection of a label's greatest score; of a segmentation the share of the
    image's pixels that are of another class.

    Raises:
        DataError: it is more than the tolerance, or the answer holds no probabilities of these labels, or no mask of the image.
    """
    if study.mask:
        return _require_mask(study, number, answer, tolerance)
    try:
        [prediction] = json.loads(answer)["predictions"]
        found = [float(prediction["scores"][label]) for label in labels]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"golden study {number}: the answer holds no scores of {', '.join(labels)}") from None
    differences = [abs(one - other) for one, other in zip(found, study.probabilities, strict=True)]
    worst = max(differences)
    if not worst <= tolerance:  # also where it is not a number
        place = differences.index(worst)
        raise DataError(
            f"golden study {number}: the endpoint answers {labels[place]} {found[place]:.6f}, "
            f"the evaluation says {study.probabilities[place]:.6f}; allowed is a difference of {tolerance:g}"
        )
    return worst


def _require_mask(study: Study, number: int, answer: bytes, tolerance: float) -> float:
    expected = segmentation.decoded(study.mask)
    try:
        [prediction] = json.loads(answer)["predictions"]
        found = segmentation.decoded(prediction["mask"])
    except (ValueError, KeyError, TypeError, cv2.error):
        found = np.empty((0, 0), np.uint8)
    if found.shape != expected.shape:
        raise DataError(f"golden study {number}: the answer holds no mask of {' x '.join(map(str, expected.shape))} pixels")
    different = float((found != expected).mean())
    if different > tolerance:
        raise DataError(
            f"golden study {number}: the endpoint answers {different:.6f} of the pixels with another class than the evaluation "
            f"says; allowed is a share of {tolerance:g}"
        )
    return different


def _drawn(stage: Stage) -> list[Study]:
    """The first images of a random order that a request can hold."""
    if not storage.exists(f"{stage.run}/evaluate/result.json"):
        return []
    import pandas as pd

    from cv_factory_ops.predictor import Predictor

    table = pd.read_parquet(stage.local(stage.read(EvaluateRecord).predictions))
    task, labels = stage.config.task, stage.config.labels
    columns = [f"{WHO}{index}" for index in range(len(labels))] if task == "classification" else []
    if not set(columns) <= set(table):
        return []
    bundle = Bundle.load(stage.local(stage.read(RegisterRecord).bundle))
    predictor = None if task == "classification" else Predictor(bundle)
    needs_spacing = any(getattr(step, "mm", None) is not None for step in bundle.manifest.preprocessing.steps)
    table = table[table["split"] == "test"].set_index("id")
    ids = np.random.default_rng(SEED).permutation(np.sort(table.index.to_numpy()))
    found: list[Study] = []
    for row_id, image, spacing in _images(stage, list(ids)):
        body, content_type = _request(image, spacing if needs_spacing else None)
        if len(body) <= LARGEST_BODY:
            answered = _answered(predictor, image, spacing) if predictor else None
            mask = answered.mask if isinstance(answered, SegmentedPrediction) else ""
            probabilities = table.loc[row_id, columns].astype(float).tolist()
            if isinstance(answered, DetectedPrediction):
                probabilities = [answered.scores[label] for label in labels]
            found.append(Study(body, content_type, probabilities, mask))
        if len(found) == stage.config.deploy.golden.studies:
            break
    return found


def _answered(predictor: Predictor, image: NDArray[np.uint16], spacing: Spacing) -> Prediction:
    """As the evaluation had it: it keeps measures of masks, and not them, and boxes from below the threshold."""
    [prediction] = predictor.answer([Decoded(image, spacing=spacing)]).predictions
    return prediction


def _images(stage: Stage, ids: list[str]) -> Iterator[tuple[str, NDArray[np.uint16], Spacing]]:
    """Id, pixels and spacing in mm, in the order of the ids."""
    folder = stage.local(f"{stage.run}/ingest")
    manifest: pd.DataFrame = read_manifest(folder).set_index("id", drop=False)
    known = spacings(manifest)
    for row_id in ids:
        [(_, image)] = read_group(folder, manifest.loc[[row_id]])
        yield row_id, image, known[row_id]


def _request(image: NDArray[np.uint16], spacing: Spacing) -> tuple[bytes, str]:
    """Body and content type: JSON where the spacing is wanted, which the shorter formats cannot hold."""
    if spacing:
        instance = np.round(image / 65535, DECIMALS).tolist()
        return json.dumps({"instances": [instance], "spacing": spacing}, separators=(",", ":")).encode(), "application/json"
    file = BytesIO()
    if image.ndim == 2:  # shorter, and without loss; Pillow writes no colors of 16 bits
        from PIL import Image

        Image.fromarray(image).save(file, "PNG")
        return file.getvalue(), "image/png"
    np.save(file, image)
    return file.getvalue(), "application/x-npy"


def _packed(drawn: list[Study]) -> bytes:
    file = BytesIO()
    bodies = {f"body_{index}": np.frombuffer(study.body, np.uint8) for index, study in enumerate(drawn)}
    types, probabilities = [study.content_type for study in drawn], [study.probabilities for study in drawn]
    answers = {"probabilities": np.array(probabilities), "masks": np.array([study.mask for study in drawn])}
    np.savez(file, allow_pickle=False, content_types=np.array(types), **answers, **bodies)
    return file.getvalue()


def _unpacked(content: bytes) -> list[Study]:
    with np.load(BytesIO(content), allow_pickle=False) as found:
        rows = zip(*(found[name].tolist() for name in COLUMNS if name in found), strict=True)
        return [Study(found[f"body_{index}"].tobytes(), *row) for index, row in enumerate(rows)]
