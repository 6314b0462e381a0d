"""Stage ``index``: every labelled image of the declared splits, as the bundle sees it, in a store that finds the nearest."""

from __future__ import annotations

import math
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cv_factory_ops.bundle import INDEX, Bundle
from cv_factory_ops.config.retrieval import CrossEncoderReranker, RetrievalConfig
from cv_factory_ops.domain import Kind
from cv_factory_ops.engine import open_engine
from cv_factory_ops.errors import ConfigError, DataError
from cv_factory_ops.features.index import ENCODER, MANIFEST, OWN, STORE, IndexManifest
from cv_factory_ops.features.retrievers import load_encoder
from cv_factory_ops.features.stores import Item, Value, VectorStore, open_store
from cv_factory_ops.ingestion.manifest import REPORTS, read_reports
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing.shards import open_split, read_rows
from cv_factory_ops.records import IndexRecord, IngestRecord, TrainRecord

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.stage import Stage

BATCH = 64
"""Images that are embedded at a time."""


def run(stage: Stage) -> IndexRecord:
    """Embed with the engine that serves, so that a study which is sent later gets the vector that it was indexed with.

    Raises:
        ConfigError: ``retrieval`` is not set, or its cross-encoder cannot be loaded.
        DataError: no image has a label.
        Unavailable: the store's server does not answer.
    """
    settings = stage.config.retrieval
    if settings is None:
        raise ConfigError("retrieval: not set, so there is nothing to index; `retrieval: {}` takes the defaults")
    bundle = Bundle.load(stage.local(stage.read(TrainRecord).bundle))
    predictor = Predictor(bundle, open_engine(bundle, "openvino", len(os.sched_getaffinity(0))).network)
    folder = stage.out / INDEX
    (folder / STORE).mkdir(parents=True)
    if isinstance(settings.reranker, CrossEncoderReranker):
        load_encoder(settings.reranker.path)
        shutil.copytree(settings.reranker.path, folder / ENCODER)
    name = f"{stage.config.project}_{bundle.digest[:12]}_{uuid.uuid4().hex[:8]}"
    dimensions, shards = predictor.dimensions(settings.vector), stage.local(f"{stage.run}/preprocess")
    reports = _reports(stage)
    with open_store(settings.store, folder / STORE, name, dimensions) as store:
        count = sum(_add(store, predictor, settings, shards, split, reports) for split in settings.splits)
        if not count:
            raise DataError(f"{shards}: no image of {', '.join(settings.splits)} has a label")
        store.persist()
    kinds: dict[str, Kind] = {**stage.domain.metadata, **OWN}
    manifest = IndexManifest(
        bundle_digest=bundle.digest, retrieval=settings, name=name, dimensions=dimensions, count=count, metadata=kinds
    )
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2), encoding="utf-8")
    return IndexRecord(
        summary=f"{count} images of bundle {bundle.digest[:12]} can be found, {dimensions} dimensions, {settings.store.kind}",
        index=stage.uri(INDEX),
        bundle_digest=bundle.digest,
        count=count,
    )


def _reports(stage: Stage) -> dict[str, str]:
    """Words by image; none where the project reads no reports."""
    asked = stage.read(IngestRecord).reports_digest
    return read_reports(stage.local(f"{stage.run}/{IngestRecord.stage}/{REPORTS}")) if asked else {}


def _add(
    store: VectorStore,
    predictor: Predictor,
    settings: RetrievalConfig,
    shards: Path,
    split: str,
    reports: Mapping[str, str],
) -> int:
    """Add a split's images; returns how many."""
    count = 0
    images, rows = open_split(shards, split), read_rows(shards, split)
    items = _items(rows, predictor.manifest.labels, split, reports)
    for chunk in with_progress(chunks := images.chunks(BATCH), len(chunks), f"index: {split}", "batch"):
        labelled = [i for i in range(chunk.start, chunk.stop) if items[i].metadata.get("label")]
        if labelled:
            _, embedding = predictor.forward(images[np.array(labelled)])
            store.add([items[i] for i in labelled], predictor.vectors(embedding, settings.vector))
            count += len(labelled)
    return count


def _items(rows: pd.DataFrame, labels: Sequence[str], split: str, reports: Mapping[str, str]) -> list[Item]:
    """One an image; without ``label`` where no person has given one."""
    pseudo = rows["pseudo"] if "pseudo" in rows else np.full(len(rows), -1)
    return [
        Item(row["id"], dict(_metadata(row, labels if by_model < 0 else (), split, position)), reports.get(row["id"], ""))
        for position, (row, by_model) in enumerate(zip(rows.to_dict("records"), pseudo, strict=True))
    ]


def _metadata(row: dict[str, Any], labels: Sequence[str], split: str, position: int) -> Iterator[tuple[str, Value]]:
    for name, value in row.items():
        is_missing = value is None or (isinstance(value, float) and not math.isfinite(value))
        if name.startswith("meta_") and not is_missing:
            yield name.removeprefix("meta_"), value
    if labels and row["label"] >= 0:
        yield "label", labels[row["label"]]
    yield from ((name, row[name]) for name in ("patient", "study") if row[name])
    yield from (("split", split), ("position", float(position)))
