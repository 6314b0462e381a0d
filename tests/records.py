"""Records of stages as a test wants them, so that what comes after can be run for real."""

from __future__ import annotations

import io

import pandas as pd

from cv_factory_ops import storage
from cv_factory_ops.evaluation.evidence import CARDS
from cv_factory_ops.records import EvaluateRecord, GateRecord, IngestRecord, PreprocessRecord, Record, Result, TrainRecord


def put(run: str, record: Record) -> None:
    """A record as its stage would publish it."""
    result = Result(
        stage=record.stage, run=run, inputs_digest="", seconds=0, record=record.model_dump(mode="json"), refusal=record.refusal
    )
    storage.write_bytes(f"{run}/{record.stage}/result.json", result.model_dump_json().encode())


def trained(bundle: str, digest: str, mlflow_run: str) -> TrainRecord:
    numbers = {"epochs": 2, "best_epoch": 1, "val_auc": 0.9, "images_per_second": 1.0, "world_size": 1}
    return TrainRecord(summary="", bundle=bundle, bundle_digest=digest, mlflow_run_id=mlflow_run, **numbers)


def evaluated(run: str, champion: int | None) -> EvaluateRecord:
    return EvaluateRecord(
        summary="",
        predictions=f"{run}/evaluate/predictions.parquet",
        metrics={"auc": 0.9},
        champion_metrics={"auc": 0.9} if champion else {},
        recent_metrics={},
        champion_recent_metrics={},
        champion_version=champion,
        champion_test_digest="t" if champion else None,
        threshold=0.5,
        champion_threshold=0.5,
        pictures=[f"{run}/evaluate/{name}.png" for name in ("roc", "errors")],
    )


def gated(reasons: tuple[str, ...]) -> GateRecord:
    return GateRecord(
        summary="auc 0.900",
        verdict="refused" if reasons else "passed",
        metric="auc",
        challenger=0.9,
        champion=None,
        difference_low=None,
        difference_high=None,
        reasons=list(reasons),
        test_digest="t",
    )


def put_what_evidence_needs(run: str, bundle: str, digest: str) -> None:
    """Records and files that the stages before ``register`` would have left; a rollout asks for them."""
    counts = {"accepted": 0, "quarantined": 0, "to_review": 0, "captured": 0}
    for record in (
        IngestRecord(summary="", quarantine_reasons={}, splits={}, data_digest="", test_digest="t", **counts),
        PreprocessRecord(summary="", counts={}, mean=0.5, std=0.25, shards_digest=""),
        evaluated(run, None),
    ):
        put(run, record)
    put_judged(run, bundle, digest)
    none = io.BytesIO()
    pd.DataFrame({"id": [], "split": []}).to_parquet(none)  # no golden studies
    storage.write_bytes(f"{run}/evaluate/predictions.parquet", none.getvalue())


def put_judged(run: str, bundle: str, digest: str) -> None:
    """Records of training and gate, and the files that show what the verdict rests on."""
    for record in (trained(bundle, digest, "0"), gated(())):
        put(run, record)
    for name in (*CARDS, "evaluate/roc.png", "gate/criteria.json", "gate/criteria.png"):
        storage.write_bytes(f"{run}/{name}", b"")
