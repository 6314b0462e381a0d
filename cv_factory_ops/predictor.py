"""From studies to answers with nothing but a bundle: what training's reference, evaluation, serving and batches share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.calibration import tempered
from cv_factory_ops.domain import Decoded
from cv_factory_ops.errors import Rejected
from cv_factory_ops.metrics import confidence, predicted
from cv_factory_ops.models import Classifier
from cv_factory_ops.preprocessing.embedders import Embedder
from cv_factory_ops.preprocessing.pipeline import prepare, to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.preprocessing.statistics import STATISTICS, image_statistics
from cv_factory_ops.records import Frozen


class Prediction(Frozen):
    """The answer for one image."""

    label: str
    score: float
    """Probability of the positive class (two classes) or of the answered class."""
    scores: dict[str, float]
    """Probability of each label."""
    abstained: bool = False
    """The answer is less certain than the bundle demands: a person should decide."""
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
        self._embedder = bundle.embedder()
        self._pca = bundle.pca()
        size = self.manifest.preprocessing.size
        self._shape = (size, size) if self.manifest.channels == 1 else (size, size, self.manifest.channels)

    def answer(self, studies: Sequence[Decoded]) -> Answer:
        """Predictions in the order of the studies.

        Raises:
            Rejected: a study is not as the bundle's decoding and preprocessing want it.
        """
        prepared = np.stack([self.prepare(study) for study in studies])
        probabilities, embedding = self.forward(prepared)
        components = self._pca.transform(embedding)
        predictions = [
            self._prediction(
                probabilities[i], features(image_statistics(prepared[i]), study.metadata, components[i], probabilities[i])
            )
            for i, study in enumerate(studies)
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

    def forward(self, prepared: NDArray[np.uint16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(N, size, size[, 3]) prepared images -> probabilities (N, classes) and embedding (N, features)."""
        return infer(self._network, prepared, self._embedder, self.manifest.temperature)

    def _prediction(self, probabilities: NDArray[np.float32], values: dict[str, str | float | None]) -> Prediction:
        labels, threshold = self.manifest.labels, self.manifest.threshold
        answer = int(predicted(probabilities[None], threshold)[0])
        return Prediction(
            label=labels[answer],
            score=round(float(probabilities[1 if len(labels) == 2 else answer]), 6),
            scores={label: round(float(p), 6) for label, p in zip(labels, probabilities, strict=True)},
            abstained=bool(confidence(probabilities[None], threshold)[0] < self.manifest.abstention),
            features=values,
        )


@torch.inference_mode()
def infer(
    network: Classifier,
    prepared: NDArray[np.uint16] | Images,
    embedder: Embedder | None = None,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(N, size, size[, 3]) prepared images -> probabilities (N, classes) and embedding (N, features), in batches.

    The embedding is the network's own where no embedder is given, the temperature a bundle's.
    """
    logits, embeddings = [], []
    for start in range(0, len(prepared), batch_size):
        batch = prepared[start : start + batch_size]
        outputs, features = network(to_tensor(batch))
        logits.append(outputs)
        embeddings.append(embedder.embed(batch) if embedder else features.numpy())
    return tempered(torch.cat(logits).softmax(1).numpy(), temperature), np.concatenate(embeddings)


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
