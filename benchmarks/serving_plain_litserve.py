"""LitServe with a plain PyTorch model, for ``benchmarks/serving.py``.

    python -m benchmarks.serving_plain_litserve BUNDLE PORT

``{"image": base64 of a picture}`` -> ``{"probabilities": [...]}``, decoded by Pillow, in batches of up to 16 that are gathered
for 10 ms (https://lightning.ai/docs/litserve/features/batching).
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path
from typing import Any

import litserve
import torch
from torch import Tensor

from benchmarks.serving_plain import Probabilities, picture

BATCH, WAIT = 16, 0.01


class Api(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        self.model = Probabilities(Path(sys.argv[1])).eval().to(device)

    def decode_request(self, request: dict[str, str]) -> Tensor:
        return picture(base64.b64decode(request["image"]))

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.stack(inputs)

    def predict(self, images: Tensor) -> Tensor:
        with torch.inference_mode():
            probabilities: Tensor = self.model(images)
        return probabilities

    def unbatch(self, output: Tensor) -> list[list[float]]:
        found: list[list[float]] = output.tolist()
        return found

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"probabilities": output}


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=BATCH, batch_timeout=WAIT), accelerator="cpu")
    server.run(host="127.0.0.1", port=int(sys.argv[2]), log_level="error", generate_client_file=False)
