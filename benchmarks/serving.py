"""`/invocations` beside `mlflow models serve` and LitServe: `python -m benchmarks.serving [--seconds 10] [--rounds 3]`.

ResNet-18 at 224 px, one request a study: a PNG of 224 x 224, then a DICOM file of 1024 x 1024 (16 bits, uncompressed). All
servers hold the same bundle, decode and prepare with the same code and are started at once; they are measured in turn, round by
round, by a load generator in a process of its own, whose processor time the servers have to do without. Ours takes the study as
the body; the others take it as base64 in JSON. *Bare* is a process that holds the bytes already: decode, prepare and forward
one study after the other (latency); batches that are prepared already (throughput; the best batch counts). ``cpu`` is user and
system time of the server's processes a request. Needs ``pip install litserve``.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import psutil
import torch
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle, BundleManifest, Pca
from cv_factory_ops.config import PreprocessingConfig, ResNet
from cv_factory_ops.domain import DeidentificationConfig, open_domain
from cv_factory_ops.engine import open_engine
from cv_factory_ops.models import build
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.serving.requests import Part, decoded

SIZE = 224
NETWORK = ResNet(depth=18, small_input=False)
CLIENTS = 16
BATCHES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Load:
    """What one window of load has measured."""

    latencies: list[float]
    """Seconds of each request, sorted."""
    failed: int
    throughput: float
    """Answers a second."""
    cpu: float
    """Seconds of processor time of the server a request."""


@dataclass(frozen=True)
class Server:
    """A server under measurement."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    path: str
    health: str
    is_json: bool

    def body(self, study: Part) -> tuple[bytes, str]:
        if not self.is_json:
            return study.content, study.content_type
        return json.dumps({"inputs": [base64.b64encode(study.content).decode()]}).encode(), "application/json"

    def cpu_seconds(self) -> float:
        total = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for process in [root, *root.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += sum(process.cpu_times()[:2])
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--load", nargs=5, metavar=("PORT", "PATH", "BODY", "TYPE", "CLIENTS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        port, path, body, content_type, clients = options.load
        print(json.dumps(load(int(port), path, Path(body).read_bytes(), content_type, int(clients), options.seconds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers must not outlive it
    bundle = new_bundle(folder / "bundle")
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "CVF_PSEUDONYM_KEY": "benchmark"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts `uvicorn`
    with started(folder, bundle, ours_only=options.ours_only) as servers:
        for name, study in {"PNG 224 x 224": png(), "DICOM 1024 x 1024": dicom(folder)}.items():
            print(f"\n{name}, {len(study.content) / 1024:.0f} KiB a request, {options.threads} threads")
            bare(bundle, study, options)
            measure(folder, servers, study, options)


def new_bundle(path: Path) -> Bundle:
    torch.manual_seed(0)
    manifest = BundleManifest(
        project="benchmark",
        domain="medical",
        labels=["normal", "opacity"],
        model=NETWORK,
        preprocessing=PreprocessingConfig(size=SIZE),
        mean=0.5,
        std=0.25,
        threshold=0.5,
        features={"score": "number"},
        data_digest="",
        test_digest="",
        code_version="",
        git_sha="",
    )
    network = build(NETWORK, 2, 0.5, 0.25, 1, SIZE)
    pca = Pca(np.zeros(network.features), np.eye(8, network.features))
    return Bundle.write(path, manifest, network, pca, pd.DataFrame({"score": [0.4, 0.6]}))


def smooth(side: int) -> NDArray[np.float32]:
    noise = np.random.default_rng(0).random((side, side), dtype=np.float32)
    blurred = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.asarray((blurred - blurred.min()) / np.ptp(blurred), np.float32)


def png() -> Part:
    return Part(cv2.imencode(".png", np.rint(255 * smooth(SIZE)).astype(np.uint8))[1].tobytes(), "image/png")


def dicom(folder: Path) -> Part:
    domain = open_domain("medical")
    domain.generate(folder / "phantoms", patients=1, image_size=1024, seed=0, labels=["normal", "opacity"])
    file = next(
        path for path in sorted((folder / "phantoms").rglob("*")) if path.is_file() and domain.recognises(path.read_bytes())
    )
    return Part(domain.deidentify(file.read_bytes(), DeidentificationConfig(pixels="trust")).content, domain.content_type)


@contextlib.contextmanager
def started(folder: Path, bundle: Bundle, *, ours_only: bool) -> Iterator[list[Server]]:
    here = [sys.executable, "-m", "benchmarks.serving_litserve", str(bundle.path)]
    commands: dict[str, tuple[Callable[[int], list[str]], str, str, bool]] = {
        "cvf serve": (
            lambda port: [
                sys.executable,
                "-m",
                "cv_factory_ops.cli",
                "serve",
                "--model",
                str(bundle.path),
                "--port",
                str(port),
            ],
            *("/invocations", "/ping", False),
        )
    }
    if not ours_only:
        commands |= {
            "LitServe": (lambda port: [*here, str(port), "1"], "/predict", "/health", True),
            "LitServe, batches of 16": (lambda port: [*here, str(port), "16"], "/predict", "/health", True),
            "mlflow models serve": (mlflow_command(folder, bundle), "/invocations", "/ping", True),
        }
    servers = []
    with contextlib.ExitStack() as stack:
        for name, (command, path, health, is_json) in commands.items():
            port = free_port()
            log = stack.enter_context((folder / f"{port}.log").open("wb"))
            process = subprocess.Popen(command(port), stdout=log, stderr=log, start_new_session=True)
            stack.callback(end, process)
            servers.append(Server(name, process, port, path, health, is_json))
        for server in servers:
            began = time.monotonic()
            while not answers(server):
                if server.process.poll() is not None or time.monotonic() - began > 180:
                    sys.exit(f"{server.name} does not start:\n{(folder / f'{server.port}.log').read_text()[-2000:]}")
                time.sleep(0.2)
        yield servers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def mlflow_command(folder: Path, bundle: Bundle) -> Callable[[int], list[str]]:
    import mlflow

    model = folder / "mlflow"
    script = Path(__file__).with_name("serving_model.py")
    mlflow.pyfunc.save_model(model, python_model=str(script), artifacts={"bundle": str(bundle.path)}, pip_requirements=[])
    base = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(model), "--env-manager", "local"]
    return lambda port: [*base, "--host", "127.0.0.1", "--port", str(port)]


def answers(server: Server) -> bool:
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=2)
        connection.request("GET", server.health)
        return connection.getresponse().status == 200
    except OSError:
        return False


def end(process: subprocess.Popen[bytes]) -> None:
    """The process that was started here, and those that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        family = [*root.children(recursive=True), root]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.terminate()
        _, alive = psutil.wait_procs(family, timeout=10)
        for member in alive:
            member.kill()
    process.wait(10)


def bare(bundle: Bundle, study: Part, options: argparse.Namespace) -> None:
    """In this process, no server."""
    domain, decoding = open_domain("medical"), bundle.manifest.decoding
    engine = open_engine(bundle, "openvino", options.threads)
    torch.set_num_threads(options.threads)
    rows = []
    for name, predictor in {"PyTorch": Predictor(bundle), "OpenVINO": Predictor(bundle, engine.network)}.items():

        def one(predictor: Predictor = predictor) -> None:
            given = predictor.prepare(decoded(study, domain, decoding)[0])
            predictor.forward(given[None])

        latencies, cpu = timed(one, options.seconds / 2)
        prepared = predictor.prepare(decoded(study, domain, decoding)[0])[None]
        rates = {
            size: size / statistics.median(timed(lambda: predictor.forward(batch), options.seconds / 5)[0])  # noqa: B023
            for size in BATCHES
            for batch in [np.repeat(prepared, size, axis=0)]
        }
        best = max(rates, key=lambda size: rates[size])
        rows.append(
            f"| bare {name} | {quantile(latencies, 0.5):.1f} ms | {quantile(latencies, 0.99):.1f} ms | {cpu * 1e3:.1f} ms "
            f"| {rates[best]:.1f} (batches of {best}, prepared) | | |"
        )
    print("| | 1 client, p50 | p99 | cpu | 16 clients, requests/s | cpu | failed |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows), flush=True)


def timed(work: Callable[[], Any], seconds: float) -> tuple[list[float], float]:
    """Sorted times of a call, and processor time of one."""
    work()
    latencies: list[float] = []
    used, until = time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < until or len(latencies) < 3:
        began = time.perf_counter()
        work()
        latencies.append(time.perf_counter() - began)
    return sorted(latencies), (time.process_time() - used) / len(latencies)


def measure(folder: Path, servers: list[Server], study: Part, options: argparse.Namespace) -> None:
    """All servers in turn, each round; of several rounds the medians."""
    found: dict[tuple[str, int], list[Load]] = {}
    for number in range(options.rounds + 1):
        for server in servers:
            for clients in (1, CLIENTS):
                window = loaded(folder, server, study, clients, options.seconds if number else 2.0)
                if number:  # the first round warms up
                    found.setdefault((server.name, clients), []).append(window)
    for server in servers:
        one, many = found[server.name, 1], found[server.name, CLIENTS]
        p50, p99 = (statistics.median(quantile(window.latencies, share) for window in one) for share in (0.5, 0.99))
        rate = statistics.median(window.throughput for window in many)
        cpu = [statistics.median(window.cpu for window in windows) * 1e3 for windows in (one, many)]
        failed = sum(window.failed for window in (*one, *many))
        print(
            f"| {server.name} | {p50:.1f} ms | {p99:.1f} ms | {cpu[0]:.1f} ms | {rate:.1f} | {cpu[1]:.1f} ms | {failed} |",
            flush=True,
        )


def loaded(folder: Path, server: Server, study: Part, clients: int, seconds: float) -> Load:
    """A window of load from a process of its own."""
    content, content_type = server.body(study)
    (folder / "body").write_bytes(content)
    arguments = [str(server.port), server.path, str(folder / "body"), content_type, str(clients)]
    command = [sys.executable, "-m", "benchmarks.serving", "--seconds", str(seconds), "--load", *arguments]
    used = server.cpu_seconds()
    printed = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 120).stdout
    told = json.loads(printed)
    answered = len(told["latencies"])
    if not answered:
        sys.exit(f"{server.name} has not answered: {told['first_failure']}")
    return Load(sorted(told["latencies"]), told["failed"], answered / told["seconds"], (server.cpu_seconds() - used) / answered)


def load(port: int, path: str, body: bytes, content_type: str, clients: int, seconds: float) -> dict[str, Any]:
    """Each client sends its next request when the last one is answered, over one connection, for ``seconds``."""
    latencies: list[float] = []
    failures: list[str] = []
    began = time.perf_counter()

    def client() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.perf_counter() - began < seconds:
            sent = time.perf_counter()
            try:
                connection.request("POST", path, body, {"content-type": content_type})
                response = connection.getresponse()
                answer = response.read()
                if response.status != 200:
                    raise http.client.HTTPException(f"{response.status} {answer[:200]!r}")
                latencies.append(time.perf_counter() - sent)
            except (OSError, http.client.HTTPException) as error:
                failures.append(str(error))
                connection.close()
                time.sleep(0.05)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - began
    return {"latencies": latencies, "failed": len(failures), "first_failure": failures[:1], "seconds": took}


def quantile(latencies: list[float], share: float) -> float:
    """In ms, of sorted seconds."""
    return 1e3 * latencies[min(int(share * len(latencies)), len(latencies) - 1)]


if __name__ == "__main__":
    main()
