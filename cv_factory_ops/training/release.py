"""The end of a training: the best network becomes a model bundle."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

import cv_factory_ops
from cv_factory_ops import detection, segmentation
from cv_factory_ops.bundle import Bundle, BundleManifest, Pca, missing_to_nan
from cv_factory_ops.calibration import fit_temperature, least_confidence, operating_point, tempered
from cv_factory_ops.config.evaluation import CalibrationConfig
from cv_factory_ops.domain import Kind, open_domain
from cv_factory_ops.ingestion.manifest import as_boxes
from cv_factory_ops.metrics import Labels, Scores
from cv_factory_ops.models import Classifier, Detector, Segmenter
from cv_factory_ops.predictor import features, in_batches, infer, told
from cv_factory_ops.preprocessing.embedders import Embedder, fit_embedder
from cv_factory_ops.preprocessing.preprocess import PREPARED, geometries
from cv_factory_ops.preprocessing.shards import one_a_patient, read_rows
from cv_factory_ops.preprocessing.statistics import image_statistics
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.train import Assignment

PCA_IMAGES = 4096
"""Training images, evenly spaced, that the principal components are computed from."""
UNCALIBRATED = 1.0, 0.5, 0.0
"""Temperature, threshold and least confidence of a segmentation: a pixel's class is the most probable one."""


def write_bundle(assignment: Assignment, network: Classifier, device: torch.device) -> Bundle:
    """Write ``<out>/bundle`` of a trained network, on the CPU and in evaluation mode; an embedder learns on ``device``.

    Temperature, threshold, abstention and drift reference come from the validation split: the network was not fitted to it, and
    the locked test set stays untouched.
    """
    config = assignment.config
    train, val = (Shard.open(assignment.shards, split) for split in ("train", "val"))
    step = max(len(train) // PCA_IMAGES, 1)
    embedder = fit_embedder(config.embedding, train.images, device)
    learned = np.concatenate([embedding for _, embedding in in_batches(network, train.images.every(step), embedder)])
    pca = fit_pca(learned, config.training.embedding_components)
    overlap = None
    if isinstance(network, Segmenter):
        (temperature, threshold, abstention), (answers, embedding) = UNCALIBRATED, _answers(assignment, network, val, embedder)
    elif isinstance(network, Detector):
        temperature, _, abstention = UNCALIBRATED
        overlap, threshold, answers, embedding = _boxes(assignment, network, val, embedder)
    else:
        probabilities, embedding = infer(network, val.images, embedder)
        temperature, threshold, abstention = calibrate(val.labels, probabilities, config.calibration)
        answers = [told(row, threshold, abstention) for row in tempered(probabilities, temperature)]
    components = pca.transform(embedding)
    reference, kinds = reference_table(assignment, val, answers, components, pca.residual(embedding, components))
    manifest = BundleManifest(
        project=config.project,
        domain=config.domain,
        labels=config.labels,
        model=network.config,
        decoding=config.decoding,
        preprocessing=config.preprocessing,
        embedding=config.embedding,
        mean=assignment.mean,
        std=assignment.std,
        threshold=threshold,
        overlap=overlap,
        temperature=temperature,
        abstention=abstention,
        features=kinds,
        data_digest=assignment.data_digest,
        test_digest=assignment.test_digest,
        code_version=cv_factory_ops.__version__,
        git_sha=git_sha(),
    )
    return Bundle.write(assignment.out / "bundle", manifest, network, pca, reference, embedder)


def _answers(
    assignment: Assignment, network: Classifier, val: Shard, embedder: Embedder | None
) -> tuple[list[dict[str, str | float]], NDArray[np.float32]]:
    """What the segmentations of the validation split say of themselves, and its embedding, without keeping the answers."""
    answers, embeddings = list[dict[str, str | float]](), []
    places = geometries(read_rows(assignment.shards, "val"), assignment.config.preprocessing)
    for probabilities, embedding in in_batches(network, val.images, embedder):
        answers += [{**segmentation.told(each, next(places).weights())} for each in probabilities]
        embeddings.append(embedding)
    return answers, np.concatenate(embeddings)


def _boxes(
    assignment: Assignment, network: Detector, val: Shard, embedder: Embedder | None
) -> tuple[float, float, list[dict[str, str | float]], NDArray[np.float32]]:
    """What validation chooses of a detector, overlap and threshold; what its answers then say of themselves; its embedding."""
    read, classes = detection.Reader(network.config, assignment.config.preprocessing.size), network.classes
    found, embeddings = list[detection.Found](), []
    for outputs, embedding in in_batches(network, val.images, embedder):
        found += [read.candidates(output) for output in outputs]
        embeddings.append(embedding)
    rows = read_rows(assignment.shards, "val")
    truths = as_boxes(rows[PREPARED])
    overlap = detection.chosen_overlap(truths, found, classes)
    found = [detection.suppressed(boxes, overlap) for boxes in found]
    threshold = detection.chosen_threshold(
        [detection.matched(truth, boxes, classes) for truth, boxes in zip(truths, found, strict=True)], classes
    )
    places = geometries(rows, assignment.config.preprocessing)
    answers = list[dict[str, str | float]]()
    for place, boxes in zip(places, found, strict=True):
        answers.append({**detection.told(place.restore_boxes(boxes), threshold)})
    return overlap, threshold, answers, np.concatenate(embeddings)


def calibrate(labels: Labels, probabilities: Scores, config: CalibrationConfig) -> tuple[float, float, float]:
    """Temperature, threshold and least confidence from validation; each is chosen with those before it in use."""
    temperature = fit_temperature(labels, probabilities) if config.temperature else 1.0
    calibrated = tempered(probabilities, temperature)
    threshold = operating_point(labels, calibrated, config.operating_point) if calibrated.shape[1] == 2 else 0.5
    abstention = least_confidence(calibrated, threshold, config.abstain)
    return temperature, threshold, abstention


def fit_pca(embedding: NDArray[np.float32], components: int) -> Pca:
    """Principal components of (N, features) by singular value decomposition.

    The sign of each component is fixed by its largest entry, so that the same data give the same components.
    """
    mean = embedding.mean(0, dtype=np.float64)
    _, _, directions = np.linalg.svd(embedding - mean, full_matrices=False)
    kept = directions[:components].astype(np.float64)
    largest = kept[np.arange(len(kept)), np.abs(kept).argmax(1)]
    return Pca(mean, kept * np.where(largest < 0, -1.0, 1.0)[:, None])


def reference_table(
    assignment: Assignment,
    shard: Shard,
    answers: Sequence[Mapping[str, str | float]],
    components: NDArray[np.float64],
    residual: NDArray[np.float64],
) -> tuple[pd.DataFrame, dict[str, Kind]]:
    """The features of a split's images, and the kind of each; metadata that no image has is left out. ``answers`` are those of
    :func:`cv_factory_ops.predictor.told`, :func:`cv_factory_ops.segmentation.told` or :func:`cv_factory_ops.detection.told`,
    ``components`` and ``residual`` those of :class:`cv_factory_ops.bundle.Pca`.

    One image a patient: the tests that drift is found by hold for independent rows.
    """
    rows = read_rows(assignment.shards, "val")
    domain = open_domain(assignment.config.domain)
    known = [name for name in domain.metadata if f"meta_{name}" in rows and rows[f"meta_{name}"].notna().any()]
    metadata = rows[[f"meta_{name}" for name in known]].set_axis(known, axis=1).astype(object)
    metadata = metadata.where(metadata.notna(), None)
    table = [
        {
            **features(image_statistics(shard.images[i]), metadata.iloc[i].to_dict(), components[i], residual[i]),
            **answers[int(i)],
        }
        for i in one_a_patient(rows)
    ]
    kinds: dict[str, Kind] = {name: "category" if name == "abstained" else "number" for name in table[0]}
    kinds |= {f"metadata_{name}": domain.metadata[name] for name in known}
    return pd.DataFrame([missing_to_nan(row, kinds) for row in table]), kinds


def git_sha() -> str:
    """Commit of the code: ``CVF_GIT_SHA`` (images have no repository), else git's own word, else ``unknown``."""
    if given := os.environ.get("CVF_GIT_SHA"):
        return given
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
