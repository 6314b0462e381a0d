"""What a candidate is measured by, and what it must reach: ``evaluation``, ``gate``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class YoudenPoint(Frozen):
    """Greatest sum of sensitivity and specificity (Youden 1950); of the thresholds within one standard error of it, the one
    nearest to 0.5."""

    kind: Literal["youden"] = "youden"


class SensitivityPoint(Frozen):
    """Greatest specificity that leaves enough sensitivity."""

    kind: Literal["sensitivity"] = "sensitivity"
    at_least: Share = 0.95
    """Sensitivity on validation; on other data it comes out higher or lower."""


class SpecificityPoint(Frozen):
    """Greatest sensitivity that leaves enough specificity."""

    kind: Literal["specificity"] = "specificity"
    at_least: Share = 0.95
    """Specificity on validation; on other data it comes out higher or lower."""


OperatingPoint = Annotated[YoudenPoint | SensitivityPoint | SpecificityPoint, Field(discriminator="kind")]


class CalibrationConfig(Frozen):
    """From the network's outputs to answers; all of it is chosen on validation and kept in the bundle."""

    temperature: bool = True
    """Divide the network's outputs by the number that makes the labels of validation most likely (Guo et al. 2017)."""
    operating_point: OperatingPoint = YoudenPoint()
    """Where an answer of two classes becomes the second: ``youden``, ``sensitivity`` or ``specificity``."""
    abstain: float = Field(default=0.0, ge=0, lt=1)
    """Share of validation, its least certain answers, that sets the confidence below which answers are marked ``abstained``."""


class EvaluationConfig(Frozen):
    """What is measured on the held-out images, and what the model card says."""

    bootstrap: int = Field(default=1000, ge=100)
    """Resamples of patients that the intervals come from (Efron & Tibshirani 1993)."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of the intervals."""
    seed: int = 0
    subgroups: list[str] | None = None
    """Metadata whose groups are measured each by itself; null takes those that the domain names, ``[]`` none."""
    minimum: int = Field(default=20, ge=2)
    """Patients of a subgroup below which only their number is told."""
    intended_use: str = ""
    """For the model card, as Markdown: who should use the model for what, and for what not."""


class SubgroupRule(Frozen):
    """What every group of the locked test set must reach that has ``evaluation.minimum`` patients; a smaller one is named, not
    judged."""

    metric: Literal["auc", "accuracy", "sensitivity", "specificity", "dice", "map"] = "auc"
    minimum: Share = 0.0
    """Smallest value of the metric in each group."""
    margin: Share = 1.0
    """As ``gate.margin``, in each group; 1 allows any difference to the champion."""


class ApprovalConfig(Frozen):
    """Ask a person before the rollout, in Airflow's UI."""

    enabled: bool = False
    """Without the answer of such a person no run is deployed. `cvf promote` and `cvf rollback` by hand need none: who runs
    them decides, under their own name."""
    assignees: list[str] = []
    """Airflow user ids of those who may answer, also by `cvf approve`; empty means everybody who may edit the DAG's runs."""
    timeout_hours: float = Field(default=72.0, gt=0)
    """Without an answer in this time the run fails, and everything stays as it is."""


class GateConfig(Frozen):
    """What a challenger must reach on the locked test set before it may be registered."""

    metric: Literal["auc", "accuracy", "dice", "map"] = "auc"
    """``dice`` where ``task`` is ``segmentation``, ``map`` where it is ``detection``, and only there."""
    minimum: Share = 0.8
    """Smallest value of the metric."""
    margin: Share = 0.02
    """How much worse than the champion the lower end of the paired bootstrap interval may be (non-inferiority)."""
    sensitivity: Share = 0.0
    """Smallest sensitivity at the bundle's own threshold; 0 asks for none."""
    specificity: Share = 0.0
    """Smallest specificity there; 0 asks for none."""
    calibration_error: Share = 1.0
    """Greatest expected calibration error (``ece``); 1 allows any. Chance alone makes it greater, the more the fewer images."""
    subgroups: SubgroupRule | None = None
    """What each of ``evaluation.subgroups`` must reach; null judges none."""
    bootstrap: int = Field(default=1000, ge=100)
    """Resamples of the paired bootstrap (Efron & Tibshirani 1993)."""
    confidence: Share = 0.95
    seed: int = 0
