"""Whether a gateway really answers: ``python -m local.smoke http://127.0.0.1:8000``, its key in ``CVF_GATEWAY_KEY``,
or a token of the identity provider in ``CVF_GATEWAY_TOKEN``.

It asks about a drawn picture, never about a study. Like every request it is captured: one a rollout disturbs no drift check.
"""

from __future__ import annotations

import io
import os
import sys

import httpx
import numpy as np
from PIL import Image

SECONDS = 30.0


def picture() -> bytes:
    """A PNG of 64 x 64 pixels, a ramp."""
    file = io.BytesIO()
    Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))).save(file, "PNG")
    return file.getvalue()


def ask(url: str, key: str = "", token: str = "") -> str:
    """The answer's label, its model and the time that it took, in one line.

    Raises:
        SystemExit: it does not answer as its API says; 503 where the endpoint behind it is away.
    """
    shown = {"x-api-key": key} if key else {"authorization": f"Bearer {token}"} if token else {}
    try:
        with httpx.Client(base_url=url, timeout=SECONDS) as client:
            answer = client.post("/predict", content=picture(), headers={"content-type": "image/png"} | shown)
            if answer.status_code != 200:
                raise SystemExit(f"{url}/predict: {answer.status_code} {answer.json().get('code', '')}")
            told = answer.json()
            label, digest = told["prediction"]["label"], told["bundle_digest"]
    except (httpx.TransportError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise SystemExit(f"{url}: does not answer as a gateway ({type(error).__name__})") from None
    return f"{url}: {label} by model {digest[:12]} in {answer.elapsed.total_seconds():.2f} s"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m local.smoke URL")
    print(ask(sys.argv[1].rstrip("/"), os.environ.get("CVF_GATEWAY_KEY", ""), os.environ.get("CVF_GATEWAY_TOKEN", "")))
