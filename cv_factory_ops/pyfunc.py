"""MLflow's door to a bundle ("models from code"): ``mlflow models serve`` runs this file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.domain import Decoded
from cv_factory_ops.ingestion.decode import as_levels
from cv_factory_ops.predictor import Predictor


class BundleModel(PythonModel):  # type: ignore[misc]
    """Images in, the predictions of the bundle out."""

    def load_context(self, context: Any) -> None:
        """Open the bundle among the logged artifacts."""
        self.predictor = Predictor(Bundle.load(Path(context.artifacts["bundle"])))

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """(N, rows, columns) float32 in 0..1 -> one prediction an image."""
        images = [Decoded(as_levels(np.asarray(image, dtype=np.float32))) for image in model_input]
        return [prediction.model_dump() for prediction in self.predictor.answer(images).predictions]


set_model(BundleModel())
