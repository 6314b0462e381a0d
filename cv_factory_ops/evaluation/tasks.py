"""What a task measures and draws: the implementations of :class:`Task`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, assert_never

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.sources import TaskName
from cv_factory_ops.evaluation import box_pictures, detection, mask_pictures, pictures, segmentation
from cv_factory_ops.evaluation.bootstrap import Judged, Measured, probabilities_of
from cv_factory_ops.evaluation.detection import JudgedBoxes
from cv_factory_ops.evaluation.segmentation import JudgedMasks
from cv_factory_ops.metrics import Values, Weights, resampled
from cv_factory_ops.preprocessing.preprocess import geometries
from cv_factory_ops.preprocessing.shards import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Drawn = tuple[dict[str, "Figure"], dict[str, float]]
"""Pictures by name, and what the explanations score."""


Column = NDArray[np.floating] | list[NDArray[np.float64]]
"""(N,) numbers, or lists of numbers."""


class Task(Protocol):
    """What evaluation asks of a task."""

    headline: tuple[str, ...]
    """The metrics of the stage's summary."""
    of_subgroups: tuple[str, ...]
    """Those that the model card tells of groups."""
    validation: str
    """The metric that epochs are judged by."""

    def columns(self, bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> dict[str, Column]:
        """(N,) what is kept of the answers to images, by name. ``images``: as the bundle wants them; ``rows``: of the manifest;
        ``folder``: of the ingest stage."""

    def judged(self, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> Measured:
        """A model's answers, from its columns ``<who>_<name>``."""

    def figures(
        self, test: Mapping[str, Any], images: Images, rows: pd.DataFrame, bundle: Bundle, folder: Path, config: ProjectConfig
    ) -> Drawn:
        """Pictures of the challenger, whose bundle it is, and of its rivals on the test set."""


def open_task(name: TaskName) -> Task:
    """The task of a project, or of a bundle."""
    match name:
        case "classification":
            return Classification()
        case "segmentation":
            return Segmentation()
        case "detection":
            return Detection()
        case _:
            assert_never(name)


def sampled(table: pd.DataFrame, who: str, threshold: float, weights: Weights) -> dict[str, Values]:
    """(B,) the metrics of a model in each sample, whatever its task; ``weights``: (B, N)."""
    if values := segmentation.values_of(table, who):
        return segmentation.sampled(values, None, weights)
    if detection.has_boxes(table, who):
        return detection.sampled(table, who, weights)
    return resampled(table["label"].to_numpy(), probabilities_of(table, who), threshold, 0.0, weights)


class Classification:
    """One label for an image."""

    headline: tuple[str, ...] = ("auc", "accuracy")
    of_subgroups: tuple[str, ...] = ("auc", "sensitivity", "specificity")
    validation = "auc"

    def columns(self, bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> dict[str, Column]:
        from cv_factory_ops.predictor import infer

        probabilities, _ = infer(bundle.network(), images, temperature=bundle.manifest.temperature)
        return {str(i): probabilities[:, i] for i in range(probabilities.shape[1])}

    def judged(self, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> Measured:
        return Judged.of(rows, who, manifest)

    def figures(
        self,
        test: Mapping[str, Judged],
        images: Images,
        rows: pd.DataFrame,
        bundle: Bundle,
        folder: Path,
        config: ProjectConfig,
    ) -> Drawn:
        from cv_factory_ops.evaluation.explanation_gallery import explanation_gallery

        challenger, evaluation = test["challenger"], config.evaluation
        gallery, scores = explanation_gallery(challenger, images, bundle.network(), config.explanations)
        figures = {
            "roc": pictures.roc(test, evaluation),
            "precision_recall": pictures.precision_recall(test, evaluation),
            "confusion_matrix": pictures.confusion(challenger),
            "reliability": pictures.reliability(challenger, evaluation),
            "errors": pictures.errors(challenger, images),
            "explanations": gallery,
        }
        return figures, scores


class Segmentation:
    """One label for each pixel of an image."""

    headline: tuple[str, ...] = segmentation.MEASURES
    of_subgroups: tuple[str, ...] = segmentation.MEASURES
    validation = "dice"

    def columns(self, bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> dict[str, Column]:
        return dict(segmentation.measured(bundle, images, rows, folder))

    def judged(self, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> Measured:
        return JudgedMasks.of(rows, who, manifest)

    def figures(
        self,
        test: Mapping[str, JudgedMasks],
        images: Images,
        rows: pd.DataFrame,
        bundle: Bundle,
        folder: Path,
        config: ProjectConfig,
    ) -> Drawn:
        challenger = test["challenger"]
        chosen = np.argsort(challenger.of_images, kind="stable")[: mask_pictures.MOST]  # NaN comes last
        shown = rows.iloc[chosen].reset_index(drop=True)
        outlines = list(segmentation.outlines(bundle, Images([images[chosen]]), shown, folder))
        figures = {
            "dice": mask_pictures.histogram(challenger),
            "errors": mask_pictures.errors(challenger, chosen, images, outlines),
        }
        return figures, {}


class Detection:
    """Boxes in an image."""

    headline: tuple[str, ...] = detection.MEASURES
    of_subgroups: tuple[str, ...] = detection.MEASURES
    validation = "map"

    def columns(self, bundle: Bundle, images: Images, rows: pd.DataFrame, folder: Path) -> dict[str, Column]:
        return {"boxes": [boxes.ravel() for boxes in detection.answers(bundle, images, rows)]}

    def judged(self, rows: pd.DataFrame, who: str, manifest: BundleManifest) -> Measured:
        return JudgedBoxes.of(rows, who, manifest)

    def figures(
        self,
        test: Mapping[str, JudgedBoxes],
        images: Images,
        rows: pd.DataFrame,
        bundle: Bundle,
        folder: Path,
        config: ProjectConfig,
    ) -> Drawn:
        challenger = test["challenger"]
        places = list(geometries(rows, bundle.manifest.preprocessing))
        figures = {
            "precision_recall": box_pictures.precision_recall(test),
            "errors": box_pictures.errors(challenger, images, places),
        }
        return figures, {}
