"""A container that starts in no time: with this folder in PYTHONPATH, ``cvf serve`` answers from the model's environment.

CVF_STUB_STATUS is the status of ``/invocations``, CVF_STUB_DELAY and CVF_STUB_PING_DELAY are the seconds that an answer, and
the first ``/ping``, take; CVF_STUB_SHIFT is added to every probability. An image's probability is its mean.
"""

import io
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def options() -> dict[str, str]:
    given = sys.orig_argv[sys.orig_argv.index("serve") + 1 :]
    return dict(zip(given[::2], given[1::2], strict=True))


def scores(body: bytes, content_type: str) -> list[float]:
    import numpy as np

    if content_type == "application/x-npy":
        images = [np.load(io.BytesIO(body)) / 65535]
    elif content_type == "application/json":
        images = [np.asarray(image) for image in json.loads(body)["instances"]]
    else:
        return []
    return [float(image.mean()) + float(os.environ.get("CVF_STUB_SHIFT", "0")) for image in images]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet: two would wait for each other

    def do_GET(self) -> None:
        time.sleep(max(0.0, STARTED + float(os.environ.get("CVF_STUB_PING_DELAY", "0")) - time.monotonic()))
        self.reply(200, b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        time.sleep(float(os.environ.get("CVF_STUB_DELAY", "0")))
        found = [
            {"scores": {"normal": 1 - score, "opacity": score}} for score in scores(body, self.headers.get("content-type", ""))
        ]
        answer = {"bundle_digest": DIGEST, "predictions": found, "process": os.getpid()}
        self.reply(int(os.environ.get("CVF_STUB_STATUS", "200")), json.dumps(answer).encode())

    def reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if "serve" in sys.orig_argv and "cv_factory_ops.cli" in sys.orig_argv:
    import signal
    import threading

    from cv_factory_ops.storage import tree_digest

    def stop_with_stdin() -> None:
        while os.read(0, 1024):
            pass
        os._exit(0)

    STARTED, given = time.monotonic(), options()
    DIGEST = tree_digest(Path(given["--model"]))
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    threading.Thread(target=stop_with_stdin, daemon=True).start()
    ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
