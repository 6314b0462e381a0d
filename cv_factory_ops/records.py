"""The frozen records that stages hand to each other: small, versioned with the code, never data.

A stage writes ``<run>/<stage>/result.json``, a :class:`Result` around its own record. Paths inside a record are
URIs (``file://`` or ``s3://``), digests are SHA-256 in hexadecimal, scores and shares lie in 0..1.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """Base of records and configuration: immutable, unknown fields refused, docstrings are descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Record(Frozen):
    """What a stage found out. ``summary`` is the one line shown in the task log, the CLI and the demo's table."""

    stage: ClassVar[str]
    summary: str
    links: dict[str, str] = {}
    """Named pages for people: ``mlflow`` (run page), ``report`` (drift report)."""

    @property
    def refusal(self) -> str:
        """Why a gate refused; empty where none did. Such a record is published like any other, then its stage ends with 4."""
        return ""


class Result(Frozen):
    """The envelope that the stage runner writes around a record."""

    stage: str
    run: str
    """URI of the run directory."""
    inputs_digest: str
    """Digest of the configuration sections and of the earlier records that this result was made from."""
    seconds: float
    """Wall time of the stage's own work."""
    record: dict[str, Any]
    refusal: str = ""
    """The record's own, see :attr:`Record.refusal`."""


class IngestRecord(Record):
    """``manifest.parquet`` has a row an accepted image; ``pixels-*.bin`` hold the pixels; ``quarantine.jsonl`` the rest."""

    stage = "ingest"
    accepted: int
    quarantined: int
    quarantine_reasons: dict[str, int]
    to_review: int
    """Accepted images that de-identification has flagged for a person to look at."""
    splits: dict[str, int]
    """Images in each of ``train``, ``val``, ``test``, ``recent`` (held-out newly captured studies) and ``reserve``."""
    captured: int
    """Images that came from captured requests with late labels."""
    data_digest: str
    """Digest of the manifest: ids, labels, splits and pixel digests."""
    test_digest: str
    """Digest of the sorted pixel digests of the locked test set."""


class PreprocessRecord(Record):
    """``<split>-00000.npy`` ... (uint16, N x H x W or N x H x W x 3, 0..65535 is 0..1), ``<split>.parquet`` (the same N rows of
    the manifest) and ``shards.json`` (their sizes and checksums)."""

    stage = "preprocess"
    counts: dict[str, int]
    mean: float
    """Mean intensity of the training split, in 0..1."""
    std: float
    shards_digest: str
    """SHA-256 of ``shards.json``, which holds those of all files."""


class TrainRecord(Record):
    """``bundle/`` is the model bundle."""

    stage = "train"
    bundle: str
    bundle_digest: str
    mlflow_run_id: str
    epochs: int
    best_epoch: int
    val_auc: float | None = None
    val_dice: float | None = None
    """Of a segmentation, in place of the AUC."""
    images_per_second: float
    world_size: int


class Subgroup(Frozen):
    """The challenger on one group of the locked test set, such as the women."""

    images: int
    patients: int
    metrics: dict[str, float] = {}
    """As of the whole test set; empty where the group has fewer patients than ``evaluation.minimum``."""
    intervals: dict[str, tuple[float, float]] = {}


class EvaluateRecord(Record):
    """``predictions.parquet`` (challenger and, where there is one, champion, on the same images), pictures and cards."""

    stage = "evaluate"
    predictions: str
    metrics: dict[str, float]
    """On the locked test set, as :func:`cv_factory_ops.metrics.resampled` has them; at the bundle's threshold."""
    champion_metrics: dict[str, float]
    """The champion's on the same images; empty where there is no champion yet."""
    recent_metrics: dict[str, float]
    """On held-out newly captured studies; empty where there are none."""
    champion_recent_metrics: dict[str, float]
    champion_version: int | None
    champion_test_digest: str | None
    threshold: float
    """Operating point of the challenger, chosen on validation."""
    champion_threshold: float | None
    intervals: dict[str, dict[str, tuple[float, float]]] = {}
    """Of the challenger's metrics, by split and metric: the ends of the bootstrap interval over patients."""
    subgroups: dict[str, dict[str, Subgroup]] = {}
    """By metadata and value or band; empty where the source has no such metadata."""
    pictures: list[str]
    explanations: dict[str, float] = {}
    """``explanation_deletion``, ``explanation_insertion``, and both with ``_random``, of the gallery of explanations."""
    cards: dict[str, str] = {}
    """HTML pages by name: ``model_card``, ``data_card``."""


class Criterion(Frozen):
    """One thing that a gate asks for."""

    name: str
    """Such as ``auc``, ``auc - champion's``, ``sensitivity, sex F``, ``test patients trained on``."""
    rule: Literal["at least", "at most"]
    limit: float
    value: float | None = None
    """None where it is undefined or was not measured."""
    low: float | None = None
    """Lower end of its interval; the interval of a difference, not its value, is held against the limit."""
    high: float | None = None
    passed: bool | None
    """None where it was not judged, for the reason given; that refuses nobody."""
    reason: str = ""
    """What speaks against the challenger, or why it was not judged; empty where it passed."""


class GateRecord(Record):
    """The verdict with its numbers; ``criteria.json`` and ``criteria.png`` are a table and a picture of them."""

    stage = "gate"
    verdict: Literal["passed", "refused"]
    metric: str
    challenger: float | None
    """None where the metric is undefined on the test set."""
    champion: float | None
    difference_low: float | None
    """Lower end of the paired bootstrap interval of challenger minus champion; None without a champion."""
    difference_high: float | None
    reasons: list[str]
    criteria: list[Criterion] = []
    """Everything that was asked for, in the order in which a person would ask."""
    test_digest: str

    @property
    def refusal(self) -> str:
        return "; ".join(self.reasons)


class RegisterRecord(Record):
    stage = "register"
    model_name: str
    model_version: int
    mlflow_run_id: str
    bundle: str
    bundle_digest: str


class ApproveRecord(Record):
    """What a person answered who was asked before the rollout."""

    stage = "approve"
    approved: bool
    who: str
    """Name of that person, as Airflow or ``--by`` gives it."""
    login: str = ""
    """Login and machine that kept the answer: a worker's, or by ``cvf approve`` the person's own."""
    time: datetime
    """Of the answer, UTC."""
    note: str
    bundle_digest: str
    gate_digest: str
    """Of the gate's record that was approved, see :func:`cv_factory_ops.stage.record_digest`."""

    @property
    def refusal(self) -> str:
        return "" if self.approved else f"the rollout was rejected by {self.who}: {self.note or 'no reason given'}"


class DeployRecord(Record):
    stage = "deploy"
    endpoint_name: str
    endpoint_config_name: str
    model_name: str
    bundle_digest: str
    previous_config_name: str | None


class VerifyRecord(Record):
    """What the live endpoint said of itself after the rollout."""

    stage = "verify"
    endpoint_name: str
    endpoint_config_name: str
    status: str
    bundle_digest: str
    golden_studies: int = 0
    """Studies of the locked test set that it answered as the evaluation did."""
    largest_difference: float | None = None
    """Of a probability, among those, or the share of pixels of another class; None where there were none."""


class EvidenceRecord(Record):
    """``bundle/`` holds what the version rests on, ``bundle/index.html`` is its first page."""

    stage = "evidence"
    archive: str
    """URI of a ZIP of it, named by its content: another one never replaces it."""
    archive_digest: str
    """SHA-256 of that file."""
    files: int
    basis: str = ""
    """Digest of bundle, verdict and approval: where they are the same, a person who promotes by hand keeps it as it is."""


class PromoteRecord(Record):
    stage = "promote"
    model_name: str
    model_version: int
    previous_version: int | None
    """The version that the alias ``previous`` points at now."""
    bundle_digest: str
    entry: int | None = None
    """Number of the newest entry of the project's history, see :mod:`cv_factory_ops.audit`."""
    entry_digest: str = ""


class DriftRecord(Record):
    """``report.html`` and ``report.json`` are Evidently's; ``features.parquet`` the window's features."""

    stage = "drift"
    verdict: Literal["drift", "no drift", "not enough data"]
    requests: int
    window_start: str
    """Last capture position already consumed before this window (exclusive); empty at the first window."""
    window_end: str
    drifted: dict[str, float]
    """Drifted feature -> p-value."""
    alpha: float
    bundle_digest: str
    report: str | None


class DecideRecord(Record):
    stage = "decide"
    retrain: bool
    reason: str
    decision: str
    """URI of the stored decision."""


class PredictRecord(Record):
    """``predictions.jsonl`` has a line a study; ``quarantine.jsonl`` the ones that could not be read."""

    stage = "predict"
    predicted: int
    quarantined: int
    bundle_digest: str
    predictions: str
