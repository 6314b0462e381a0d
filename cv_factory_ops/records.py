"""The frozen records that stages hand to each other: small, versioned with the code, never data.

A stage writes ``<run>/<stage>/result.json``, a :class:`Result` around its own record. Paths inside a record are
URIs (``file://`` or ``s3://``), digests are SHA-256 in hexadecimal, scores and shares lie in 0..1.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
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
    """Images that came from captured requests."""
    late_labels: int | None = None
    """Those of them whose label has arrived; None in records of before that was counted."""
    pseudo_labels: int | None = None
    """Those of them that train with the champion's answer as their label; None likewise."""
    data_digest: str
    """Digest of the manifest: ids, labels, splits and pixel digests."""
    test_digest: str
    """Digest of the sorted pixel digests of the locked test set."""
    reports_digest: str = ""
    """Digest of ``reports.parquet``; empty where no reports are read."""


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


class WarmStart(Frozen):
    """Whose weights a training began with, where ``training.warm_start`` asks for the champion's."""

    version: int | None = None
    """Of the champion; None where there was none yet."""
    bundle_digest: str = ""
    weights: str = ""
    """URI of its ``model.safetensors``."""
    misfit: str = ""
    """Why they were not taken; empty where they were."""

    @property
    def told(self) -> str:
        """In words."""
        if self.misfit:
            return f"training does not begin with the champion's weights: {self.misfit}"
        return f"training begins with the weights of champion version {self.version}, bundle {self.bundle_digest[:12]}"


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
    val_map: float | None = None
    """Of a detection, in place of the AUC."""
    images_per_second: float
    world_size: int
    warm_start: WarmStart | None = None
    """None where no warm start was asked for."""


class IndexRecord(Record):
    """``index/`` is the index of similar studies, see :mod:`cv_factory_ops.features.index`."""

    stage = "index"
    index: str
    bundle_digest: str
    """Of the bundle that it was made for."""
    count: int
    """Images that can be found."""


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


class Performance(Frozen):
    """How well the champion answers the requests of a window: measured on late labels, or estimated without any."""

    metric: Literal["accuracy", "auc", "sensitivity", "specificity"]
    value: float
    low: float
    """Lower end of its interval."""
    high: float
    labelled: int
    """Answers with a label that it was measured on; 0 where it is estimated."""
    estimated: bool
    """Expected from the calibrated probabilities of the answers, see :mod:`cv_factory_ops.drift.performance`."""
    reference: float | None = None
    """The champion's on its locked test set or, of an estimate, the same estimate on the drift reference; None: not known."""
    reference_low: float | None = None
    """Lower end of its interval."""

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies below that of the reference."""
        return self.reference_low is not None and self.high < self.reference_low


class Quality(Frozen):
    """What of a window's captures cannot be watched, and what is missing in the rest."""

    foreign: int = 0
    """Captures that another bundle has answered, as during a rollout."""
    unreadable: int = 0
    """Captures whose answer is none of ours."""
    quarantined: int = 0
    """Lines that are no captures; ``quarantine.jsonl`` has their positions."""
    refused: dict[str, int] = {}
    """Requests that were captured with a refusal, by its code."""
    missing: dict[str, float] = {}
    """Share of the answers that lack a feature; those that lack none are left out."""


class WatchedGroup(Frozen):
    """The requests of one scanner, view or age band in a window."""

    images: int
    """In the sample that was compared."""
    share: float
    reference_share: float
    p_values: dict[str, float] = {}
    """Of features among these images alone; empty where either side has too few of them."""


HOUR = "%Y/%m/%d/%H"
"""Folder of the captures of an hour, UTC."""


def is_hour(text: str) -> bool:
    """Whether this is the name of such a folder: an hour that there is."""
    try:
        return datetime.strptime(text, HOUR).strftime(HOUR) == text
    except ValueError:
        return False


class Reading(Frozen):
    """How far an endpoint's captures have been read."""

    floor: str = ""
    """Hour, ``yyyy/mm/dd/hh``, before which no capture file is looked at any more; empty: all are."""
    read: dict[str, int] = {}
    """Bytes read of each file, ``yyyy/mm/dd/hh/<variant>/<file>``, of that hour and later."""

    def of(self, file: str) -> int:
        """Bytes of a file that count as read: all that it may have, where it lies before the floor."""
        return sys.maxsize if file < self.floor else self.read.get(file, 0)

    def advanced(self, read: Mapping[str, int], late_hours: int) -> Reading:
        """After more was read: the floor lies so many hours before the newest file, or before now, and never falls."""
        files = {**self.read, **read}
        if not files:
            return self
        newest = min(datetime.strptime(max(files)[:13], HOUR), datetime.now(UTC).replace(tzinfo=None))  # a clock may be wrong
        floor = max(self.floor, (newest - timedelta(hours=late_hours)).strftime(HOUR))
        return Reading(floor=floor, read={file: size for file, size in sorted(files.items()) if file >= floor})

    @property
    def last(self) -> str:
        """Where reading of the newest file stopped, ``<file>#<byte>``; empty where nothing was read."""
        newest = max(self.read, default="")
        return newest and f"{newest}#{self.read[newest]}"


class Cursor(Frozen):
    """``<project>/drift/cursor.json``, and ``window.json`` of the check that moved it."""

    run: str
    """URI of the run of that drift check."""
    start: Reading
    """Before its window."""
    end: Reading
    """After it."""
    previous: str = ""
    """URI of the run of the last finished check before it; empty at the first."""

    def before(self, run: str, finished: bool) -> str:
        """URI of the run of the last finished check before one of ``run``; ``finished`` as in :meth:`window`."""
        return self.run if finished and self.run != run else self.previous

    def window(self, run: str, finished: bool) -> tuple[Reading, Reading | None]:
        """What a check of ``run`` begins behind and, where an earlier try of it has settled that, ends at; ``finished``:
        whether the check that moved the cursor has published its verdict. If not, its captures belong to the next check."""
        if self.run == run:
            return self.start, self.end
        return (self.end if finished else self.start), None


class SlowSeries(Frozen):
    """One feature, or one category of one, over the windows so far; see :mod:`cv_factory_ops.drift.sequential`."""

    rows: int = 0
    """Values in the windows so far, without those that drifted."""
    total: float = 0
    """Sum of their scores, which are 0 on average over the reference."""
    up: float = 0
    """Cumulative sum of upward residuals, in standard deviations of a window's mean."""
    down: float = 0
    """Likewise, downward."""
    since_up: tuple[int, float] = (0, 0.0)
    """Those of the rows, and of the total, that came since ``up`` was last 0."""
    since_down: tuple[int, float] = (0, 0.0)
    """Likewise, of ``down``."""


class SlowDriftState(Frozen):
    """What the sequential test of slow drift keeps from one finished check to the next of the same champion."""

    windows: int
    """Windows that are counted in."""
    series: dict[str, SlowSeries]


def public_name(column: str) -> str:
    """A tested column's name for messages and metrics: without its group (`` @ <metadata>=<value>``) or category
    (``=<category>``), which are words from the headers of images."""
    return re.split(" @ |=", column, maxsplit=1)[0]


def feature_of(column: str) -> str:
    """The feature that a tested column is about, whether by a group, a category, its missing values or slowly."""
    return public_name(column).removesuffix(" (slowly)").removesuffix("_missing")


class DriftRecord(Record):
    """``index.html`` is the page for people; ``report.html`` and ``report.json`` are Evidently's; ``features.parquet`` the
    features of the window's sample; ``answers.npz`` its answers, for labels to come; ``window.json`` what was read,
    ``quarantine.jsonl`` what could not be."""

    stage = "drift"
    verdict: Literal["drift", "no drift", "not enough data"]
    requests: int
    window_start: str
    """How far checks before this one had read, ``<file>#<byte>``; empty at the first window."""
    window_end: str
    """How far this one has read; ``window.json`` tells it of every file."""
    drifted: dict[str, float]
    """Drifted feature -> p-value; of slow drift, ``<feature> (slowly)``."""
    p_values: dict[str, float] = {}
    """Of every feature that was tested."""
    alpha: float
    bundle_digest: str
    report: str | None
    asked: str = ""
    """Digest of the record before of the same run, which had not enough data; empty at the first try."""
    slow: SlowDriftState | None = None
    """For the next check to go on from; None where there is no verdict."""
    performance: list[Performance] = []
    quality: Quality = Quality()
    groups: dict[str, dict[str, WatchedGroup]] = {}
    """By metadata and value or band."""


class DecideRecord(Record):
    stage = "decide"
    retrain: bool
    reason: str
    decision: str
    """URI of the stored decision."""
    trigger: str = ""
    """What asked for it first: ``drift``, ``performance``, ``age``, ``volume``, ``manual``; empty where nothing did."""
    retraining: str = ""
    """Name of the retraining, which is its DAG run's id; empty where there is none."""
    not_before: datetime | None = None
    """When the retraining may begin, UTC; None where there is none."""


class PredictRecord(Record):
    """``predictions.jsonl`` has a line a study; ``quarantine.jsonl`` the ones that could not be read."""

    stage = "predict"
    predicted: int
    quarantined: int
    bundle_digest: str
    predictions: str
