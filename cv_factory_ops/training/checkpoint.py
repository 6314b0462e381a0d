"""The state of a training on shared storage: written atomically by rank 0, read by all."""

from __future__ import annotations

import io
from typing import Any

import torch

from cv_factory_ops import storage


def save(uri: str, state: dict[str, Any], inputs_digest: str) -> None:
    """Replace the checkpoint at a URI; ``inputs_digest`` says what the training was started with."""
    buffer = io.BytesIO()
    torch.save({"inputs_digest": inputs_digest, **state}, buffer)
    storage.write_bytes(uri, buffer.getvalue())


def load(uri: str, inputs_digest: str) -> dict[str, Any] | None:
    """The checkpoint at a URI, None where there is none or it belongs to a training with other inputs."""
    if not storage.exists(uri):
        return None
    state: dict[str, Any] = torch.load(io.BytesIO(storage.read_bytes(uri)), map_location="cpu", weights_only=True)
    return state if state.pop("inputs_digest") == inputs_digest else None
