"""What a user of MLflow or LitServe gets by their own documentation, for ``benchmarks/serving.py``: nothing of the platform but
the network's weights, in PyTorch.

:func:`save_for_mlflow` writes what ``mlflow.pytorch`` saves, whose server takes the tensor itself as JSON
(https://mlflow.org/docs/latest/ml/deployment/deploy-model-locally/); LitServe is ``benchmarks/serving_plain_litserve.py``.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cv_factory_ops.bundle import Bundle


class Probabilities(nn.Module):
    """Images, N x 1 x H x W in 0..1 -> probabilities, N x classes."""

    def __init__(self, bundle: Path) -> None:
        super().__init__()
        self.network = Bundle.load(bundle).network()

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)[0]
        return logits.softmax(1)


def save_for_mlflow(bundle: Bundle, folder: Path, size: int) -> None:
    """By ``mlflow.pytorch.save_model``, with the signature of its input."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    kind = np.dtype(np.float32)
    inputs, outputs = TensorSpec(kind, (-1, 1, size, size)), TensorSpec(kind, (-1, len(bundle.manifest.labels)))
    signature = ModelSignature(Schema([inputs]), Schema([outputs]))
    model = Probabilities(bundle.path).eval()
    mlflow.pytorch.save_model(model, folder, signature=signature, pip_requirements=[], serialization_format="pickle")


def picture(content: bytes) -> Tensor:
    """(1, H, W) in 0..1."""
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(content)).convert("L"), np.float32) / 255)[None]
