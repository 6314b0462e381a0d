"""Boxes of a detection measured against the true ones by COCO's rules, in the pixels of the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config.evaluation import EvaluationConfig
from cv_factory_ops.detection import Found, Matched, matched, mean_average_precision
from cv_factory_ops.evaluation.bootstrap import Interval, patients_of, percentile_interval, resamples
from cv_factory_ops.evaluation.segmentation import metric_name
from cv_factory_ops.ingestion.manifest import Boxes, as_boxes
from cv_factory_ops.metrics import Labels, Mask, Values, Weights
from cv_factory_ops.preprocessing.preprocess import geometries
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    import pandas as pd

MEASURES = ("map", "map50")
"""Mean average precision over ten overlaps, and at an intersection over union of 0.5."""


def answers(bundle: Bundle, images: Images, rows: pd.DataFrame) -> Iterator[Found]:
    """All boxes that a bundle finds in each image, also those below its threshold, in pixels of the image. ``images``: as the
    bundle wants them, of these ``rows`` of the manifest."""
    from cv_factory_ops.predictor import in_batches, reader_of

    read, places = reader_of(bundle.manifest), geometries(rows, bundle.manifest.preprocessing)
    if read is None:
        raise TypeError(f"{bundle.manifest.model.kind} does not answer with boxes")
    for outputs, _ in in_batches(bundle.network(), images):
        for output in outputs:
            yield next(places).restore_boxes(read(output))


@dataclass(frozen=True)
class JudgedBoxes:
    """A model's boxes in a set of images, measured; see :class:`cv_factory_ops.evaluation.bootstrap.Judged`."""

    labels: Labels
    """(N,) what samples are stratified by: the class of the largest box."""
    truths: Sequence[Boxes]
    found: Sequence[Found]
    matches: Sequence[Matched]
    patients: NDArray[np.int64]
    manifest: BundleManifest

    @classmethod
    def of(cls, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> JudgedBoxes:
        """From the table that :func:`cv_factory_ops.evaluation.evaluate.predict_splits` has made."""
        truths, found = boxes_of(rows, who)
        matches = matches_of(truths, found, len(manifest.labels))
        return cls(rows["label"].to_numpy(np.int64), truths, found, matches, patients_of(rows), manifest)

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, rows: Mask) -> JudgedBoxes:
        """Some of them."""
        chosen = np.flatnonzero(rows).tolist()
        return replace(
            self,
            labels=self.labels[rows],
            truths=[self.truths[i] for i in chosen],
            found=[self.found[i] for i in chosen],
            matches=[self.matches[i] for i in chosen],
            patients=self.patients[rows],
        )

    def sampled(self, weights: Weights) -> dict[str, Values]:
        """(B,) each metric in each sample: those of ``MEASURES``, and of more than one category ``map`` of each as well."""
        labels = self.manifest.labels
        found = mean_average_precision(self.matches, len(labels), weights)
        names = {f"map_{number}": metric_name("map", label) for number, label in enumerate(labels) if number}
        several = len(names) > 1
        return {names.get(name, name): values for name, values in found.items() if name in MEASURES or several}

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
    def mistakes(self) -> Values:
        """(N,) how wrong each image is: the score of its surest false box, and 1 for each true box that no answered one is, at
        an intersection over union of 0.5."""
        wrong = np.zeros(len(self))
        for i, each in enumerate(self.matches):
            right = each.hits[:, 0]
            missed = each.truths.sum() - (right & (each.scores >= self.manifest.threshold)).sum()
            wrong[i] = each.scores[~right].max(initial=0) + missed
        return wrong


def has_boxes(rows: pd.DataFrame, who: str) -> bool:
    """Whether a model's answers are boxes."""
    return f"{who}_boxes" in rows


def boxes_of(rows: pd.DataFrame, who: str) -> tuple[list[Boxes], list[Found]]:
    """The true boxes of each image, and those that a model found."""
    return as_boxes(rows["boxes"]), as_boxes(rows[f"{who}_boxes"], width=6)


def matches_of(truths: Sequence[Boxes], found: Sequence[Found], classes: int) -> list[Matched]:
    """Of each image."""
    return [matched(truth, boxes, classes) for truth, boxes in zip(truths, found, strict=True)]


def sampled(rows: pd.DataFrame, who: str, weights: Weights) -> dict[str, Values]:
    """(B,) each of ``MEASURES`` in each sample; ``weights``: (B, N)."""
    truths, found = boxes_of(rows, who)
    classes = 1 + int(max((boxes[:, 0].max(initial=0) for boxes in (*truths, *found)), default=0))
    values = mean_average_precision(matches_of(truths, found, classes), classes, weights)
    return {name: values[name] for name in MEASURES}
