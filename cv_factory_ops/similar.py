"""``cvf similar``: the indexed studies that are most like an image, told and drawn."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import registry, storage
from cv_factory_ops.answers import Neighbour
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import Decoded, open_domain
from cv_factory_ops.engine import open_engine
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.features.index import MOST, Index, filters
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.predictor import Prediction, Predictor
from cv_factory_ops.preprocessing.shards import read_image
from cv_factory_ops.records import IndexRecord, TrainRecord
from cv_factory_ops.stage import read_result

WIDEST = 6
"""Pictures in a row."""


def find(config: ProjectConfig, run: str, image: Path, k: int | None, where: Sequence[str], text: str, out: Path | None) -> str:
    """A table of the ``k`` (or ``retrieval.k``) most similar, one of each patient, with the model's own answer; and, to
    ``out``, a picture of them. A hybrid search looks for the words of ``text`` as well.

    ``run`` is the URI of the run whose index is searched; empty for the champion's.

    Raises:
        ConfigError: an argument is not as it must be.
        DataError: the run has no index, it was made for another bundle, or the image cannot be used.
    """
    if k is not None and not 1 <= k <= MOST:
        raise ConfigError(f"--k: {k} given; allowed: 1 to {MOST}")
    if out and out.suffix != ".png":
        raise ConfigError(f"{out}: {out.suffix or 'no ending'} given; allowed: .png")
    run = run or _run_of_champion(config)
    train = TrainRecord.model_validate(read_result(run, TrainRecord.stage).record)
    record = IndexRecord.model_validate(read_result(run, IndexRecord.stage).record)
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Bundle.load(storage.local(train.bundle, Path(scratch)))
        with Index.open(storage.local(record.index, Path(scratch)), bundle.digest) as index:
            predictor = Predictor(bundle, open_engine(bundle, "openvino", len(os.sched_getaffinity(0))).network)
            prepared, answer, found = _searched(predictor, index, image, k, where, text)
            if out:
                out.parent.mkdir(parents=True, exist_ok=True)
                _draw(out, prepared, answer, found, [_picture(run, index, each) for each in found])
    return _table(answer, found)


def _run_of_champion(config: ProjectConfig) -> str:
    champion = registry.champion(config)
    if champion is None:
        raise DataError(f"project {config.project} has no champion yet; name a run by --run")
    return registry.run_of(config, champion.version)


def _searched(
    predictor: Predictor, index: Index, image: Path, k: int | None, where: Sequence[str], text: str
) -> tuple[NDArray[np.uint16], Prediction, list[Neighbour]]:
    """The image as the model sees it, the model's answer, and who is like it."""
    try:
        wanted = index.where(filters(where))
    except Rejected as error:
        raise ConfigError(f"--where: {error}") from None
    try:
        given = predictor.input_of(_decoded(predictor, image))
    except Rejected as error:
        raise DataError(f"{image}: {error}") from None
    probabilities, embedding = predictor.forward(given.image[None])
    (vector,) = predictor.vectors(embedding, index.manifest.retrieval.vector)
    answer = predictor.conclude([given], probabilities, embedding).predictions[0]
    try:
        return given.image, answer, index.similar(vector, k, wanted, given.metadata, given.patient, text)
    except Rejected as error:
        raise ConfigError(f"--text: {error}") from None


def _decoded(predictor: Predictor, image: Path) -> Decoded:
    """A study must be de-identified, as the endpoint wants it: what is found is shown beside it."""
    domain = open_domain(predictor.manifest.domain)
    try:
        data = image.read_bytes()
    except OSError as error:
        raise DataError(f"{image}: cannot be read: {error.strerror}") from None
    if domain.recognises(data):
        domain.require_deidentified(data)
    return decode_one(data, None, domain, predictor.manifest.decoding)


def _table(answer: Prediction, found: Sequence[Neighbour]) -> str:
    rows = [("", "label", "distance", "patient", "study", "image")]
    rows += [
        (str(rank), each.label, f"{each.distance:.4f}", each.patient or "-", each.study or "-", each.id)
        for rank, each in enumerate(found, 1)
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    told = f"the model answers {answer.label} (score {answer.score:.3f})"
    return "\n".join([told, *lines] if found else [told, "no indexed study is as --where wants it"])


def _picture(run: str, index: Index, neighbour: Neighbour) -> NDArray[np.uint16]:
    """Its image as the model has seen it, from the shards of the run that was indexed."""
    (item,) = index.store.get([neighbour.id])
    if item is None:
        raise DataError(f"{run}/{IndexRecord.stage}: has changed while it was searched; try again")
    return read_image(f"{run}/preprocess", str(item.metadata["split"]), int(item.metadata["position"]))


def _draw(
    out: Path,
    image: NDArray[np.uint16],
    answer: Prediction,
    found: Sequence[Neighbour],
    pictures: Sequence[NDArray[np.uint16]],
) -> None:
    """The image first, then the nearest in their order, each with its label and distance."""
    from matplotlib.figure import Figure

    shown = [image, *pictures]
    titles = [f"this image\nanswered: {answer.label}"]
    titles += [f"{rank}. {each.label}\ndistance {each.distance:.3f}" for rank, each in enumerate(found, 1)]
    columns = min(len(shown), WIDEST)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, picture, title in zip(axes, shown, titles, strict=False):
        axis.imshow(picture / np.float32(65535), cmap="gray", vmin=0, vmax=1)
        axis.set_title(title, fontsize=9)
    figure.savefig(out, dpi=120)
