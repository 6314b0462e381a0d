"""Stage ``evaluate``: challenger and champion on the same images; numbers, pictures, and the cards of model and data."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cv_factory_ops import registry
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.evaluation import cards, pictures
from cv_factory_ops.evaluation.bootstrap import Measured
from cv_factory_ops.evaluation.subgroups import subgroups
from cv_factory_ops.evaluation.tasks import open_task
from cv_factory_ops.ingestion.decode import as_levels
from cv_factory_ops.ingestion.manifest import read_images
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.preprocess import spacings
from cv_factory_ops.preprocessing.shards import Images, open_split, read_index, read_rows
from cv_factory_ops.records import EvaluateRecord, Subgroup, TrainRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cv_factory_ops.registry import Champion
    from cv_factory_ops.stage import Stage

SPLITS = ("test", "recent")
"""The locked test set, and held-out newly captured studies."""


def run(stage: Stage) -> EvaluateRecord:
    """Measure on ``test`` and, where there are new studies, on ``recent``.

    Raises:
        ConfigError: ``evaluation.subgroups`` names unknown metadata, or the champion was trained for other labels.
    """
    train, champion = stage.read(TrainRecord), registry.champion(stage.config)
    bundles = {"challenger": Bundle.load(stage.local(train.bundle))}
    if champion:
        bundles["champion"] = Bundle.load(stage.local(champion.bundle))
        _require_comparable(bundles["champion"], stage.config.task, stage.config.labels)
    table = predict_splits(stage, bundles)
    table.to_parquet(stage.out / "predictions.parquet", index=False)
    judged = {who: _by_split(table, who, bundle) for who, bundle in bundles.items()}
    record = _measured(stage, judged, table, champion).model_copy(update={"links": train.links})
    drawn, explanations = _draw(stage, record, judged, bundles["challenger"])
    record = record.model_copy(update={"pictures": [stage.uri(name) for name in drawn], "explanations": explanations})
    cards.write(stage, record, bundles["challenger"], drawn)
    _log(stage, train.mlflow_run_id, record)
    return record


def predict_splits(stage: Stage, bundles: Mapping[str, Bundle]) -> pd.DataFrame:
    """Columns ``id``, ``patient``, ``split``, ``label``, ``meta_*``, and of each model those of its task: a probability of each
    class, ``<who>_<i>``, or ``<who>_dice_<i>`` and ``<who>_hd95_<i>`` of each class but the background, or ``<who>_boxes``,
    rows of :data:`cv_factory_ops.detection.Found` one after the other, beside the true ``boxes``."""
    shards, ingested, tables = stage.local(f"{stage.run}/preprocess"), stage.local(f"{stage.run}/ingest"), []
    task = open_task(stage.config.task)
    for split in SPLITS:
        if split not in read_index(shards).splits:
            continue
        rows = read_rows(shards, split)
        metadata = [column for column in rows if column.startswith("meta_") or column == "boxes"]
        table = rows[["id", "patient", "split", "label", *metadata]]
        for who, bundle in bundles.items():
            found = task.columns(bundle, _images(stage, shards, split, rows, bundle), rows, ingested)
            table = table.assign(**{f"{who}_{name}": values for name, values in found.items()})
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def _require_comparable(champion: Bundle, task: str, labels: list[str]) -> None:
    if champion.manifest.task != task:
        raise ConfigError(f"task: {task} given; allowed: {champion.manifest.task}, the champion's: another is another project")
    if champion.manifest.labels != labels:
        raise ConfigError(
            f"labels: {', '.join(labels)} given; allowed: {', '.join(champion.manifest.labels)}, in this order, as the champion"
            " has them: others cannot be compared with it, and are another project"
        )


def _by_split(table: pd.DataFrame, who: str, bundle: Bundle) -> dict[str, Measured]:
    task = open_task(bundle.manifest.task)
    return {split: task.judged(table[table["split"] == split], who, bundle.manifest) for split in SPLITS}


def _measured(
    stage: Stage, judged: Mapping[str, Mapping[str, Measured]], table: pd.DataFrame, champion: Champion | None
) -> EvaluateRecord:
    config, challenger = stage.config.evaluation, judged["challenger"]
    ours = {split: challenger[split].metrics for split in SPLITS}
    theirs = {split: judged["champion"][split].metrics if champion else {} for split in SPLITS}
    return EvaluateRecord(
        summary=_summary(ours, theirs, open_task(stage.config.task).headline),
        predictions=stage.uri("predictions.parquet"),
        metrics=ours["test"],
        champion_metrics=theirs["test"],
        recent_metrics=ours["recent"],
        champion_recent_metrics=theirs["recent"],
        champion_version=champion.version if champion else None,
        champion_test_digest=champion.test_digest if champion else None,
        threshold=challenger["test"].manifest.threshold,
        champion_threshold=judged["champion"]["test"].manifest.threshold if champion else None,
        intervals={split: found.intervals(config) for split, found in challenger.items() if len(found)},
        subgroups=subgroups(challenger["test"], table[table["split"] == "test"], stage.domain, config),
        pictures=[],
        cards={name: stage.uri(f"{name}.html") for name in cards.NAMES},
    )


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
                found[row_id] = prepare(as_levels(image, color), config, known[row_id])
            except Rejected as error:
                raise DataError(f"{row_id}: cannot be prepared as the champion wants it: {error}") from None
    return Images([np.stack([found[row_id] for row_id in rows["id"]])])


def _draw(
    stage: Stage, record: EvaluateRecord, judged: Mapping[str, Mapping[str, Measured]], bundle: Bundle
) -> tuple[list[str], dict[str, float]]:
    """Write every picture; returns the names of the files, and what the explanations score."""
    shards, test = stage.local(f"{stage.run}/preprocess"), {who: splits["test"] for who, splits in judged.items()}
    task, rows = open_task(stage.config.task), read_rows(shards, "test")
    seen, ingested = _images(stage, shards, "test", rows, bundle), stage.local(f"{stage.run}/ingest")
    own, explanations = task.figures(test, seen, rows, bundle, ingested, stage.config)
    figures = {
        "learning_curves": pictures.learning_curves(_history(stage, task.validation), stage.read(TrainRecord).best_epoch),
        **own,
        "data": _data_picture(shards, stage.config.labels),
    }
    if any(group.metrics for groups in record.subgroups.values() for group in groups.values()):
        overall, titles = _overall(test["challenger"], record), {name: cards.metric_title(name) for name in task.of_subgroups}
        figures["subgroups"] = pictures.forest(overall, record.subgroups, stage.config.evaluation.confidence, titles)
    for name, figure in figures.items():
        figure.savefig(stage.out / f"{name}.png", dpi=120)
    return [f"{name}.png" for name in figures], explanations


def _overall(challenger: Measured, record: EvaluateRecord) -> Subgroup:
    """The whole test set, as a group."""
    patients = len(np.unique(challenger.patients))
    return Subgroup(images=len(challenger), patients=patients, metrics=record.metrics, intervals=record.intervals["test"])


def _history(stage: Stage, validation: str) -> dict[str, dict[int, float]]:
    """Training loss and validation by epoch; of an epoch that a resumed training has repeated, the last one. A longer one
    before it is left out."""
    client, run_id = registry.connect(stage.config), stage.read(TrainRecord).mlflow_run_id
    curves = ("train_loss", f"val_{validation}")
    with registry.explained("evaluation"):
        found = {name: {point.step: point.value for point in client.get_metric_history(run_id, name)} for name in curves}
    last = stage.read(TrainRecord).epochs
    return {name: {step: value for step, value in points.items() if step <= last} for name, points in found.items()}


def _data_picture(shards: Path, labels: list[str]) -> Figure:
    rows, images = read_rows(shards, "train"), open_split(shards, "train")
    places = {
        name: np.flatnonzero(rows["label"] == i)[: pictures.EXAMPLES] for i, name in enumerate(labels[: pictures.MOST_EXAMPLES])
    }
    every = pd.concat([read_rows(shards, split) for split in read_index(shards).splits])
    return pictures.data(every, labels, {name: images[place] for name, place in places.items()})


def _log(stage: Stage, run_id: str, record: EvaluateRecord) -> None:
    """Metrics, pictures and cards; with them the MLflow run is complete, whatever the gate will say."""
    from mlflow.entities import Metric

    (stage.out / "subgroups.json").write_text(json.dumps(record.model_dump(mode="json")["subgroups"], indent=1))
    values = {f"test_{name}": value for name, value in record.metrics.items()}
    values |= {f"recent_{name}": value for name, value in record.recent_metrics.items()} | record.explanations
    for split, intervals in record.intervals.items():
        values |= {f"{split}_{name}_low": low for name, (low, _) in intervals.items()}
        values |= {f"{split}_{name}_high": high for name, (_, high) in intervals.items()}
    now, client = int(time.time() * 1000), registry.connect(stage.config)
    with registry.explained("evaluation"):
        client.log_batch(run_id, [Metric(name, value, now, 0) for name, value in values.items()])
        for path in sorted(stage.out.iterdir()):
            if path.suffix in {".png", ".md", ".html", ".json"}:
                client.log_artifact(run_id, str(path), "evaluation")
        client.set_terminated(run_id)


def _summary(metrics: dict[str, dict[str, float]], champion: dict[str, dict[str, float]], headline: tuple[str, ...]) -> str:
    parts = []
    for split, name in (("test", "locked test"), ("recent", "new studies")):
        values = []
        for metric in headline:
            if metric in metrics[split]:
                before = f" (champion {champion[split][metric]:.3f})" if metric in champion[split] else ""
                values.append(f"{metric} {metrics[split][metric]:.3f}{before}")
        if values:
            parts.append(f"{name}: {', '.join(values)}")
    return "; ".join(parts)
