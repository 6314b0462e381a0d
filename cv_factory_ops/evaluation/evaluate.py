"""Stage ``evaluate``: challenger and champion on the same images, numbers and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_factory_ops import registry
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.evaluation.pictures import confusion_picture, roc_picture
from cv_factory_ops.ingestion.decode import as_unit_range
from cv_factory_ops.ingestion.manifest import read_images
from cv_factory_ops.metrics import classification
from cv_factory_ops.predictor import infer
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.preprocess import spacings
from cv_factory_ops.preprocessing.shards import Images, open_split, read_index, read_rows
from cv_factory_ops.records import EvaluateRecord, TrainRecord

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

SPLITS = ("test", "recent")
"""The locked test set, and held-out newly captured studies."""
PICTURES = ("confusion_matrix.png", "roc.png")


def run(stage: Stage) -> EvaluateRecord:
    """Measure on ``test`` and, where there are new studies, on ``recent``."""
    train = stage.read(TrainRecord)
    challenger = Bundle.load(stage.local(train.bundle))
    champion = registry.champion(stage.config)
    table = predict_splits(stage, challenger, "challenger")
    metrics = {split: _metrics(table, split, challenger, "challenger") for split in SPLITS}
    champion_metrics: dict[str, dict[str, float]] = {split: {} for split in SPLITS}
    if champion:
        bundle = Bundle.load(stage.local(champion.bundle))
        rivals = predict_splits(stage, bundle, "champion").drop(columns=["patient", "label", "split"])
        table = table.merge(rivals, on="id", validate="one_to_one")
        champion_metrics = {split: _metrics(table, split, bundle, "champion") for split in SPLITS}
    table.to_parquet(stage.out / "predictions.parquet", index=False)
    _draw(stage, table, challenger)
    _log(stage, train.mlflow_run_id, metrics)
    return EvaluateRecord(
        summary=_summary(metrics, champion_metrics),
        links=train.links,
        predictions=stage.uri("predictions.parquet"),
        metrics=metrics["test"],
        champion_metrics=champion_metrics["test"],
        recent_metrics=metrics["recent"],
        champion_recent_metrics=champion_metrics["recent"],
        champion_version=champion.version if champion else None,
        champion_test_digest=champion.test_digest if champion else None,
        threshold=challenger.manifest.threshold,
        champion_threshold=bundle.manifest.threshold if champion else None,
        pictures=[stage.uri(name) for name in PICTURES],
    )


def predict_splits(stage: Stage, bundle: Bundle, who: str) -> pd.DataFrame:
    """Columns ``id``, ``patient``, ``split``, ``label`` and a probability ``<who>_<i>`` for each class."""
    network, shards, tables = bundle.network(), stage.local(f"{stage.run}/preprocess"), []
    for split in SPLITS:
        if split not in read_index(shards).splits:
            continue
        rows = read_rows(shards, split)
        probabilities, _ = infer(network, _images(stage, shards, split, rows, bundle))
        columns = {f"{who}_{i}": probabilities[:, i] for i in range(probabilities.shape[1])}
        tables.append(rows[["id", "patient", "split", "label"]].assign(**columns))
    return pd.concat(tables, ignore_index=True)


def probabilities_of(table: pd.DataFrame, who: str) -> NDArray[np.float64]:
    """(N, classes) from the columns that :func:`predict_splits` wrote."""
    count = sum(str(column).startswith(f"{who}_") for column in table)
    probabilities: NDArray[np.float64] = table[[f"{who}_{i}" for i in range(count)]].to_numpy(np.float64)
    return probabilities


def _images(stage: Stage, shards: Path, split: str, rows: pd.DataFrame, bundle: Bundle) -> Images:
    """The rows as this bundle wants them: the shards, or the images anew where a champion was prepared otherwise.

    Raises:
        DataError: an image cannot be prepared as the champion's steps want it.
    """
    config, color = bundle.manifest.preprocessing, bundle.manifest.decoding.color
    if config == stage.config.preprocessing and color == stage.config.decoding.color:
        return open_split(shards, split)
    known, found = spacings(rows), {}
    for row_id, image in read_images(stage.local(f"{stage.run}/ingest")):
        if row_id in known:
            try:
                found[row_id] = prepare(as_unit_range(image, color), config, known[row_id])
            except Rejected as error:
                raise DataError(f"{row_id}: cannot be prepared as the champion wants it: {error}") from None
    return Images([np.stack([found[row_id] for row_id in rows["id"]])])


def _metrics(table: pd.DataFrame, split: str, bundle: Bundle, who: str) -> dict[str, float]:
    rows = table[table["split"] == split]
    return classification(rows["label"].to_numpy(), probabilities_of(rows, who), bundle.manifest.threshold)


def _draw(stage: Stage, table: pd.DataFrame, challenger: Bundle) -> None:
    test = table[table["split"] == "test"]
    labels, names = test["label"].to_numpy(), challenger.manifest.labels
    curves = {who: probabilities_of(test, who) for who in ("challenger", "champion") if f"{who}_0" in test}
    confusion_picture(stage.out / "confusion_matrix.png", labels, curves["challenger"], challenger.manifest.threshold, names)
    roc_picture(stage.out / "roc.png", labels, curves, names)


def _log(stage: Stage, run_id: str, metrics: dict[str, dict[str, float]]) -> None:
    """Metrics and pictures; with them the MLflow run is complete, whatever the gate will say."""
    client = registry.connect(stage.config)
    with registry.explained("evaluation"):
        for split, values in metrics.items():
            for name, value in values.items():
                client.log_metric(run_id, f"{split}_{name}", value)
        for name in PICTURES:
            client.log_artifact(run_id, str(stage.out / name), "evaluation")
        client.set_terminated(run_id)


def _summary(metrics: dict[str, dict[str, float]], champion: dict[str, dict[str, float]]) -> str:
    parts = []
    for split, name in (("test", "locked test"), ("recent", "new studies")):
        values = []
        for metric in ("auc", "accuracy"):
            if metric in metrics[split]:
                before = f" (champion {champion[split][metric]:.3f})" if metric in champion[split] else ""
                values.append(f"{metric} {metrics[split][metric]:.3f}{before}")
        if values:
            parts.append(f"{name}: {', '.join(values)}")
    return "; ".join(parts)
