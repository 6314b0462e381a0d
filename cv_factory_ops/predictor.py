"""From studies to answers with nothing but a bundle: what training's reference, evaluation, serving and batches share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import Decoded
from cv_factory_ops.models import Classifier
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.statistics import STATISTICS, image_statistics
from cv_factory_ops.records import Frozen


class Prediction(Frozen):
    """The answer for one image."""

    label: str
    score: float
    """Probability of the positive class (two classes) or of the answered class."""
    scores: dict[str, float]
    """Probability of each label."""
    features: dict[str, str | float | None]
    """What drift is watched on; captured with the answer, so that the nightly check reads no pixels."""


class Answer(Frozen):
    """The body of a response of ``/invocations``."""

    predictions: list[Prediction]
    bundle_digest: str


class Predictor:
    """A loaded bundle. Not changed by use: one predictor can serve many threads."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._network = bundle.network()
        self._pca = bundle.pca()

    def answer(self, studies: Sequence[Decoded]) -> Answer:
        """Predictions in the order of the studies."""
        prepared = np.stack([prepare(study.image, self.manifest.preprocessing) for study in studies])
        probabilities, embedding = self.forward(prepared)
        components = self._pca.transform(embedding)
        predictions = [
            self._prediction(
                probabilities[i], features(image_statistics(prepared[i]), study.metadata, components[i], probabilities[i])
            )
            for i, study in enumerate(studies)
        ]
        return Answer(predictions=predictions, bundle_digest=self.bundle.digest)

    def forward(self, prepared: NDArray[np.uint16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, size, size) prepared images -> probabilities (N, classes) and embedding (N, features)."""
        return infer(self._network, prepared)

    def _prediction(self, probabilities: NDArray[np.float32], values: dict[str, str | float | None]) -> Prediction:
        labels = self.manifest.labels
        scores = {label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)}
        if len(labels) == 2:
            score = float(probabilities[1])
            label = labels[int(score >= self.manifest.threshold)]
        else:
            score = float(probabilities.max())
            label = labels[int(probabilities.argmax())]
        return Prediction(label=label, score=round(score, 6), scores=scores, features=values)


@torch.inference_mode()
def infer(
    network: Classifier, prepared: NDArray[np.uint16], batch_size: int = 64
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, size, size) prepared images -> probabilities (N, classes) and embedding (N, features), in batches."""
    parts = [network(to_tensor(prepared[start : start + batch_size])) for start in range(0, len(prepared), batch_size)]
    logits, embedding = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    return logits.softmax(1).numpy(), embedding.numpy()


def features(
    statistics: Mapping[str, float],
    metadata: Mapping[str, str | float | None],
    components: NDArray[np.float64],
    probabilities: NDArray[np.float32],
) -> dict[str, str | float | None]:
    """The features of one image under their names: ``image_*``, ``metadata_*``, ``embedding_*``, ``score``, ``entropy``."""
    values: dict[str, str | float | None] = {f"image_{name}": round(statistics[name], 6) for name in STATISTICS}
    values |= {f"metadata_{name}": value for name, value in metadata.items()}
    values |= {f"embedding_{i}": round(float(value), 6) for i, value in enumerate(components)}
    values["score"] = round(float(probabilities[1] if len(probabilities) == 2 else probabilities.max()), 6)
    values["entropy"] = round(float(-(probabilities * np.log(np.clip(probabilities, 1e-12, 1))).sum()), 6)
    return values


def to_tensor(prepared: NDArray[np.uint16]) -> torch.Tensor:
    """(N, H, W) uint16, 0..65535 -> (N, 1, H, W) float32, 0..1"""
    return torch.from_numpy(prepared.astype(np.float32)).div_(65535.0).unsqueeze(1)
