"""LitServe in front of a bundle, for ``benchmarks/serving.py``: `python -m benchmarks.serving_litserve BUNDLE PORT BATCH_SIZE`.

With a batch size above 1 it gathers requests for up to 10 ms.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve

from benchmarks.serving_model import Model


class Api(litserve.LitAPI):  # type: ignore[misc]
    """``{"inputs": [base64 of a study]}`` -> ``{"predictions": [...]}``."""

    def setup(self, device: str) -> None:
        self.model = Model(Path(sys.argv[1]))

    def decode_request(self, request: dict[str, list[str]]) -> str:
        return request["inputs"][0]

    def predict(self, given: str | list[str]) -> Any:
        answers = self.model.answer(given if isinstance(given, list) else [given])
        return answers if isinstance(given, list) else answers[0]

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        return {"predictions": [output]}


if __name__ == "__main__":
    port, batch_size = int(sys.argv[2]), int(sys.argv[3])
    api = Api(max_batch_size=batch_size, batch_timeout=0.01 if batch_size > 1 else 0.0)
    litserve.LitServer(api, accelerator="cpu").run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
