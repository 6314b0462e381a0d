"""Answers of a segmentation measured against masks, image by image, in the pixels of the images themselves.

Of a class that neither truth nor answer show, both measures are undefined: the image is left out for it. Where one of both
shows it, Dice is 0, and the distance the diagonal of the image, which no distance within it exceeds: a false alarm and a miss
cost as much as can be.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config.evaluation import EvaluationConfig
from cv_factory_ops.evaluation.bootstrap import Interval, patients_of, percentile_interval, resamples
from cv_factory_ops.ingestion.manifest import read_masks
from cv_factory_ops.metrics import Labels, Mask, Values, Weights, share
from cv_factory_ops.preprocessing.preprocess import geometries, spacings
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd

    from cv_factory_ops.preprocessing.geometry import Mask as ClassMask
    from cv_factory_ops.preprocessing.geometry import Spacing

MEASURES = ("dice", "hd95")
"""Overlap, and the 95th percentile of the Hausdorff distance in mm."""
PERCENTILE = 95


def dice_and_hd95(truth: ClassMask, answer: ClassMask, classes: int, spacing: Spacing) -> tuple[Values, Values]:
    """(classes - 1,) Dice and HD95 in mm of each class but the background, by MONAI; NaN where undefined.

    HD95 is the greater of both directed 95th percentiles of the distances between the edges (Huttenlocher et al. 1993),
    undefined where the image has no spacing.
    """
    import torch
    from monai.metrics import compute_dice, compute_hausdorff_distance

    dice, distance = np.full(classes - 1, np.nan), np.full(classes - 1, np.nan)
    for number in range(1, classes):
        true, found = (torch.from_numpy(mask == number)[None, None] for mask in (truth, answer))
        if true.any() and found.any():
            dice[number - 1] = float(compute_dice(found, true))
            if spacing:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message=".*always_return_as_numpy")  # MONAI calls itself as of old
                    distances = compute_hausdorff_distance(found, true, True, percentile=PERCENTILE, spacing=list(spacing))
                distance[number - 1] = float(distances)
        elif true.any() or found.any():
            dice[number - 1] = 0.0
            if spacing:
                distance[number - 1] = math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1])
    return dice, distance


def answers(bundle: Bundle, images: Images, rows: pd.DataFrame) -> Iterator[ClassMask]:
    """The mask that a bundle answers each image with, (rows, columns) of the image. ``images``: as the bundle wants them, of
    these ``rows`` of the manifest."""
    from cv_factory_ops.predictor import in_batches

    places = geometries(rows, bundle.manifest.preprocessing)
    for probabilities, _ in in_batches(bundle.network(), images):
        for answer in probabilities.argmax(1).astype(np.uint8):
            yield next(places).restore(answer)


def measured(bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> dict[str, Values]:
    """(N,) columns ``dice_<class>`` and ``hd95_<class>`` of what a bundle answers; ``folder`` is that of the ingest stage."""
    classes, known = len(bundle.manifest.labels), spacings(rows)
    pairs = zip(rows["id"], read_masks(folder, rows), answers(bundle, images, rows), strict=True)
    found = np.array([dice_and_hd95(truth, answer, classes, known[row_id]) for row_id, truth, answer in pairs])
    return {f"{name}_{c}": found[:, i, c - 1] for i, name in enumerate(MEASURES) for c in range(1, classes)}


def outlines(bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> Iterator[tuple[ClassMask, ClassMask]]:
    """Truth and answer of each image at the size of the model's input; arguments as of :func:`measured`."""
    places = geometries(rows, bundle.manifest.preprocessing)
    for place, truth, answer in zip(places, read_masks(folder, rows), answers(bundle, images, rows), strict=True):
        yield place.prepare(truth), place.prepare(answer)


@dataclass(frozen=True)
class JudgedMasks:
    """A model's masks of a set of images, measured; see :class:`cv_factory_ops.evaluation.bootstrap.Judged`."""

    labels: Labels
    """(N,) what samples are stratified by: the class of the largest region."""
    values: Mapping[str, Values]
    """(N, classes - 1) of each of ``MEASURES``."""
    patients: NDArray[np.int64]
    manifest: BundleManifest

    @classmethod
    def of(cls, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> JudgedMasks:
        """From the table that :func:`cv_factory_ops.evaluation.evaluate.predict_splits` has made."""
        return cls(rows["label"].to_numpy(np.int64), values_of(rows, who), patients_of(rows), manifest)

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, rows: Mask) -> JudgedMasks:
        """Some of them."""
        values = {name: values[rows] for name, values in self.values.items()}
        return replace(self, labels=self.labels[rows], values=values, patients=self.patients[rows])

    def sampled(self, weights: Weights) -> dict[str, Values]:
        """(B,) each metric in each sample: ``dice`` and ``hd95``, and of more than one class those of each as well."""
        return sampled(self.values, self.manifest.labels, weights)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Those that are defined."""
        values = self.sampled(np.ones((1, len(self)))) if len(self) else {}
        return {name: round(float(value[0]), 6) for name, value in values.items() if not np.isnan(value[0])}

    def intervals(self, config: EvaluationConfig) -> dict[str, Interval]:
        """Of each metric that is defined."""
        draws = resamples(self.patients, self.labels, config.bootstrap, config.seed) if self.metrics else []
        blocks = [self.sampled(weights) for weights in draws]
        samples = {name: np.concatenate([block[name] for block in blocks]) for name in self.metrics}
        return {name: percentile_interval(values, config.confidence) for name, values in samples.items()}

    @property
    def of_images(self) -> Values:
        """(N,) mean Dice of each image over the classes that it or its answer shows; NaN where there is none."""
        dice = self.values["dice"]
        counted = ~np.isnan(dice)
        means: Values = np.divide(np.nansum(dice, 1), counted.sum(1), out=np.full(len(self), np.nan), where=counted.any(1))
        return means


def values_of(rows: pd.DataFrame, who: str) -> dict[str, Values]:
    """(N, classes - 1) of each of ``MEASURES``, from the columns ``<who>_<measure>_<class>``; empty where there are none."""
    count = sum(str(column).startswith(f"{who}_dice_") for column in rows)
    names = {name: [f"{who}_{name}_{c}" for c in range(1, count + 1)] for name in MEASURES if count}
    return {name: rows[columns].to_numpy(np.float64) for name, columns in names.items()}


def sampled(values: Mapping[str, Values], labels: list[str] | None, weights: Weights) -> dict[str, Values]:
    """(B,) each measure in each sample, the mean over the images of each class, then over the classes; with ``labels``, also
    ``<measure>_<label>`` of more than one class. NaN where a class is undefined in a sample.

    ``values``: (N, classes - 1), ``weights``: (B, N).
    """
    found = {}
    for name, of_classes in values.items():
        means = [share(np.nan_to_num(column), weights, ~np.isnan(column)) for column in of_classes.T]
        found[name] = np.mean(means, axis=0)
        if labels and len(means) > 1:
            found |= {metric_name(name, label): mean for label, mean in zip(labels[1:], means, strict=True)}
    return found


def metric_name(measure: str, label: str) -> str:
    """As MLflow allows names: what else a label holds becomes an underscore."""
    return f"{measure}_{re.sub(r'[^A-Za-z0-9_. -]', '_', label)}"
