"""What the rivals of ``benchmarks/serving.py`` serve, and MLflow's model of it ("models from code").

Studies in base64 are answered by the platform's own decoding and preprocessing, and by PyTorch, as the rivals' users would.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import open_domain
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.serving.requests import Part, decoded

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


class Model:
    """Base64 of studies -> predictions."""

    def __init__(self, bundle: Path) -> None:
        torch.set_num_threads(THREADS)
        self.predictor = Predictor(Bundle.load(bundle))
        self.domain = open_domain(self.predictor.manifest.domain)

    def answer(self, studies: Sequence[str]) -> list[dict[str, Any]]:
        images = []
        for study in studies:
            content = base64.b64decode(study)
            kind = self.domain.content_type if self.domain.recognises(content) else "image/png"
            images += decoded(Part(content, kind), self.domain, self.predictor.manifest.decoding)
        return [prediction.model_dump() for prediction in self.predictor.answer(images).predictions]


if __name__ != "benchmarks.serving_model":  # as MLflow loads it
    import mlflow

    class MlflowModel(mlflow.pyfunc.PythonModel):  # type: ignore[misc,name-defined]
        def load_context(self, context: Any) -> None:
            self.model = Model(Path(context.artifacts["bundle"]))

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]  # MLflow warns about type hints
            return self.model.answer([str(study) for study in model_input.ravel()])

    mlflow.models.set_model(MlflowModel())
