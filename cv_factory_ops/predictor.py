"""From studies to answers with nothing but a bundle: what training's reference, evaluation, serving and batches share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from cv_factory_ops import detection, segmentation
from cv_factory_ops.answers import Answer as Answer
from cv_factory_ops.answers import Prediction as Prediction
from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.calibration import tempered
from cv_factory_ops.config.models import RetinaNet
from cv_factory_ops.domain import Decoded, Metadata
from cv_factory_ops.errors import Rejected
from cv_factory_ops.metrics import confidence, predicted
from cv_factory_ops.preprocessing.embedders import Embedder
from cv_factory_ops.preprocessing.geometry import Geometry
from cv_factory_ops.preprocessing.pipeline import prepare, to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.preprocessing.statistics import STATISTICS, image_statistics

Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""As :class:`cv_factory_ops.models.Classifier`: images, (N, channels, H, W) in 0..1 -> logits and embedding (N, features)."""


@dataclass(frozen=True)
class Input:
    """What of a study the model sees, and what its answer is told with: the study's own pixels need not be kept."""

    image: NDArray[np.uint16]
    """(size, size) or (size, size, 3)"""
    shape: tuple[int, int]
    """Rows and columns of the study's image."""
    spacing: tuple[float, float] | None
    metadata: Metadata
    statistics: Mapping[str, float]
    patient: str = ""
    """Pseudonym; empty where the format has none."""


class Predictor:
    """A loaded bundle. Not changed by use: one predictor can serve many threads."""

    def __init__(self, bundle: Bundle, network: Network | None = None) -> None:
        """``network`` calculates in place of the bundle's own, with the same weights."""
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._network = network or bundle.network()
        self._embedder = bundle.embedder()
        self._pca = bundle.pca()
        size = self.manifest.preprocessing.size
        self._read = reader_of(self.manifest)
        self._shape = (size, size) if self.manifest.channels == 1 else (size, size, self.manifest.channels)

    def answer(self, studies: Sequence[Decoded]) -> Answer:
        """Predictions in the order of the studies.

        Raises:
            Rejected: a study is not as the bundle's decoding and preprocessing want it.
        """
        inputs = [self.input_of(study) for study in studies]
        return self.conclude(inputs, *self.forward(np.stack([given.image for given in inputs])))

    def input_of(self, study: Decoded) -> Input:
        """The first step of an answer.

        Raises:
            Rejected: see :meth:`prepare`.
        """
        image = self.prepare(study)
        rows, columns = study.image.shape[:2]
        return Input(image, (rows, columns), study.spacing, study.metadata, image_statistics(image), study.patient)

    def conclude(self, inputs: Sequence[Input], probabilities: NDArray[np.float32], embedding: NDArray[np.float32]) -> Answer:
        """The last step of an answer, from what :meth:`forward` gave for the inputs' images."""
        components = self._pca.transform(embedding)
        residual = self._pca.residual(embedding, components)
        predictions = [
            self._prediction(given, probabilities[i], features(given.statistics, given.metadata, components[i], residual[i]))
            for i, given in enumerate(inputs)
        ]
        return Answer(predictions=predictions, bundle_digest=self.bundle.digest)

    def prepare(self, study: Decoded) -> NDArray[np.uint16]:
        """The model's input: (size, size) or (size, size, 3).

        Raises:
            Rejected: ``channels``, or what :func:`cv_factory_ops.preprocessing.pipeline.prepare` refuses.
        """
        prepared = prepare(study.image, self.manifest.preprocessing, study.spacing)
        if prepared.shape != self._shape:
            channels = 1 if study.image.ndim == 2 else study.image.shape[2]
            raise Rejected("channels", f"has {channels} channels; the model takes {self.manifest.channels}")
        return prepared

    def warm_up(self) -> None:
        """Answer once for an empty image, so that the first request is as fast as the others."""
        self._pca.transform(self.forward(np.zeros((1, *self._shape), np.uint16))[1])

    def forward(
        self, prepared: NDArray[np.uint16], network: Network | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, size, size[, 3]) prepared images -> probabilities (N, classes), or (N, classes, size, size) of pixels, or a
        detector's outputs (N, anchors, 4 + classes - 1), and embedding (N, features). ``network`` is as of :meth:`__init__`."""
        return infer(network or self._network, prepared, self._embedder, self.manifest.temperature)

    def vectors(self, embedding: NDArray[np.float32], kind: Literal["components", "embedding"]) -> NDArray[np.float32]:
        """(N, dimensions) what images are compared by, of their embedding (N, features): itself, or its components."""
        return self._pca.transform(embedding).astype(np.float32) if kind == "components" else embedding

    def dimensions(self, kind: Literal["components", "embedding"]) -> int:
        """Of :meth:`vectors`."""
        return int(self._pca.components.shape[0 if kind == "components" else 1])

    def _prediction(
        self, given: Input, probabilities: NDArray[np.float32], values: dict[str, str | float | None]
    ) -> Prediction:
        labels, threshold = self.manifest.labels, self.manifest.threshold
        geometry = Geometry.of(given.shape, self.manifest.preprocessing, given.spacing)
        if self._read:
            return detection.detected(self._read(probabilities), labels, threshold, geometry, values)
        if probabilities.ndim == 3:
            return segmentation.segmented(probabilities, labels, geometry, given.spacing, values)
        answer = int(predicted(probabilities[None], threshold)[0])
        of_answer = told(probabilities, threshold, self.manifest.abstention)
        return Prediction(
            label=labels[answer],
            score=round(float(probabilities[1 if len(labels) == 2 else answer]), 6),
            scores={label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)},
            abstained=of_answer.get("abstained") == "yes",
            features={**values, **of_answer},
        )


def reader_of(manifest: BundleManifest) -> detection.Reader | None:
    """What makes boxes of a detector's outputs, as the bundle has them suppressed; None of a bundle of another task."""
    if not isinstance(manifest.model, RetinaNet) or manifest.overlap is None:
        return None
    return detection.Reader(manifest.model, manifest.preprocessing.size, manifest.overlap)


def infer(
    network: Network,
    prepared: NDArray[np.uint16] | Images,
    embedder: Embedder | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, size, size[, 3]) prepared images -> probabilities (N, classes), or (N, classes, size, size) of pixels, or a
    detector's outputs (N, anchors, 4 + classes - 1), and embedding (N, features).

    The embedding is the network's own where no embedder is given, the temperature a bundle's.
    """
    batches = list(in_batches(network, prepared, embedder, temperature, batch_size))
    return np.concatenate([probabilities for probabilities, _ in batches]), np.concatenate([found for _, found in batches])


def in_batches(
    network: Network,
    prepared: NDArray[np.uint16] | Images,
    embedder: Embedder | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """As :func:`infer`, batch by batch: the probabilities of all pixels of many images would take much memory."""
    for start in range(0, len(prepared), batch_size):
        batch = prepared[start : start + batch_size]
        with torch.inference_mode():
            outputs, features = network(to_tensor(batch))
            is_of_boxes = outputs.ndim == 3
            probabilities = outputs.numpy() if is_of_boxes else tempered(outputs.softmax(1).numpy(), temperature)
        yield probabilities.astype(np.float32, copy=False), embedder.embed(batch) if embedder else features.numpy()


def features(
    statistics: Mapping[str, float],
    metadata: Mapping[str, str | float | None],
    components: NDArray[np.float64],
    residual: float | np.float64,
) -> dict[str, str | float | None]:
    """The features of one image under their names, ``image_*``, ``metadata_*``, ``embedding_*``; an answer adds those of
    :func:`told`. ``components`` and ``residual`` are the embedding's, as of :class:`cv_factory_ops.bundle.Pca`."""
    values: dict[str, str | float | None] = {f"image_{name}": round(statistics[name], 6) for name in STATISTICS}
    values |= {f"metadata_{name}": value for name, value in metadata.items()}
    values |= {f"embedding_{i}": round(float(value), 6) for i, value in enumerate(components)}
    return values | {"embedding_residual": round(float(residual), 6)}


def told(probabilities: NDArray[np.float32], threshold: float, abstention: float) -> dict[str, str | float]:
    """What one answer (classes,) says of itself: ``score``, ``entropy`` in nats and, where answers may be withheld
    (``abstention`` above 0), ``abstained``; of pixels see :func:`cv_factory_ops.segmentation.told`."""
    values: dict[str, str | float] = {
        "score": round(float(probabilities[1] if len(probabilities) == 2 else probabilities.max()), 6),
        "entropy": round(float(-(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum()), 6),
    }
    if abstention > 0:
        values["abstained"] = "yes" if confidence(probabilities[None], threshold)[0] < abstention else "no"
    return values
