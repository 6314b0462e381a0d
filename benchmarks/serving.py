"""`/invocations` beside `mlflow models serve` and LitServe: `python -m benchmarks.serving [--seconds 10] [--rounds 3]`.

ResNet-18 at 224 px, one request a study: a PNG of 224 x 224, then a DICOM file of 1024 x 1024 (16 bits, uncompressed). All
servers are started at once; they and bare engines are measured in turn, round by round, servers by a load generator in a
process of its own (``benchmarks/load.py``), whose processor time they have to do without. Ratios are of the same round. Needs
``pip install litserve``.

- *our bundle*: the others hold the same bundle as `cvf serve`, and decode and prepare with the same code. Ours takes the study
  as the body, they take it as base64 in JSON.
- *as documented* (of the PNG alone): what their own documentation leads to, with PyTorch and the same weights. MLflow serves
  what ``mlflow.pytorch`` has saved, a request is the prepared tensor as JSON: it decodes no picture. LitServe takes base64 in
  JSON, decodes with Pillow, and gathers batches of up to 16. See ``benchmarks/serving_plain.py``.
- *bare*: a process that holds the bytes already: decode, prepare and forward one study after the other (latency); batches that
  are prepared already, of the size that is the fastest (throughput).

``cpu`` is user and system time of the server's processes a request, ``clients`` that of the load generator; ``idle`` is the
share of the machine's processor time that nothing used: what these three leave is other work.

`--updates N`: nothing of that. 16 clients ask a local endpoint (`cvf endpoint`), which is updated N times meanwhile, from one
model to another and back, blue/green; printed are requests, failures and updates.
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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.serving_plain import picture, save_for_mlflow
from cv_factory_ops.bundle import Bundle, BundleManifest, Pca, pack
from cv_factory_ops.config.models import ResNet
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.domain import DeidentificationConfig, open_domain
from cv_factory_ops.engine import open_engine
from cv_factory_ops.models import build
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.processes import keep_memory
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
    clients_cpu: float | None = None
    """The same of the clients; None where there is none."""
    idle: float = 0.0
    """Share of the machine's processor time that nothing used."""


@dataclass(frozen=True)
class Server:
    """A server under measurement."""

    name: str
    process: subprocess.Popen[bytes]
    port: int
    path: str
    health: str
    body: Callable[[Part], tuple[bytes, str]]
    """A study as the server takes it, and its content type."""
    pictures_only: bool = False

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
    parser.add_argument("--updates", type=int, default=0, metavar="N")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers must not outlive it
    keep_memory()  # as `cvf serve` does: bare engines shall be as fast as they can be
    os.environ |= {"OMP_NUM_THREADS": str(options.threads), "CVF_PSEUDONYM_KEY": "benchmark"}
    with tempfile.TemporaryDirectory() as folder:
        if options.updates:
            update(Path(folder), options.updates)
        else:
            compare(Path(folder), options)


def compare(folder: Path, options: argparse.Namespace) -> None:
    bundle = new_bundle(folder / "bundle")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # MLflow starts `uvicorn`
    with started(folder, bundle, ours_only=options.ours_only) as servers:
        for name, study in {"PNG 224 x 224": png(), "DICOM 1024 x 1024": dicom(folder)}.items():
            print(f"\n{name}, {len(study.content) / 1024:.0f} KiB a request, {options.threads} threads")
            fitting = [server for server in servers if not server.pictures_only or study.content_type == "image/png"]
            measure(folder, bundle, fitting, study, options)


def new_bundle(path: Path, seed: int = 0) -> Bundle:
    torch.manual_seed(seed)
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


def as_sent(study: Part) -> tuple[bytes, str]:
    return study.content, study.content_type


def as_base64(study: Part) -> tuple[bytes, str]:
    return json.dumps({"inputs": [base64.b64encode(study.content).decode()]}).encode(), "application/json"


def as_picture(study: Part) -> tuple[bytes, str]:
    return json.dumps({"image": base64.b64encode(study.content).decode()}).encode(), "application/json"


def as_tensor(study: Part) -> tuple[bytes, str]:
    """Decoded and prepared by the client, with as many digits as a picture of 8 bits needs."""
    return json.dumps({"inputs": [np.round(picture(study.content).numpy(), 4).tolist()]}).encode(), "application/json"


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
    module = [sys.executable, "-m"]
    ours = [*module, "cv_factory_ops.cli", "serve", "--model", str(bundle.path), "--port"]
    commands: list[tuple[str, Callable[[int], list[str]], str, str, Callable[[Part], tuple[bytes, str]]]] = [
        ("cvf serve", lambda port: [*ours, str(port)], "/invocations", "/ping", as_sent)
    ]
    if not ours_only:
        same, plain = ([*module, f"benchmarks.serving_{name}", str(bundle.path)] for name in ("litserve", "plain_litserve"))
        mlflow_same, mlflow_plain = mlflow_models(folder, bundle)
        commands += [
            ("LitServe, our bundle", lambda port: [*same, str(port), "1"], "/predict", "/health", as_base64),
            ("LitServe, our bundle, batches of 16", lambda port: [*same, str(port), "16"], "/predict", "/health", as_base64),
            ("LitServe, as documented, batches of 16", lambda port: [*plain, str(port)], "/predict", "/health", as_picture),
            ("`mlflow models serve`, our bundle", mlflow_command(mlflow_same), "/invocations", "/ping", as_base64),
            ("`mlflow models serve`, as documented", mlflow_command(mlflow_plain), "/invocations", "/ping", as_tensor),
        ]
    servers = []
    with contextlib.ExitStack() as stack:
        for name, command, path, health, body in commands:
            port = free_port()
            log = stack.enter_context((folder / f"{port}.log").open("wb"))
            process = subprocess.Popen(command(port), stdout=log, stderr=log, start_new_session=True)
            stack.callback(end, process)
            servers.append(Server(name, process, port, path, health, body, body in {as_picture, as_tensor}))
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


def mlflow_models(folder: Path, bundle: Bundle) -> tuple[Path, Path]:
    """Folders of what MLflow serves: our bundle, and what ``mlflow.pytorch`` makes of its network."""
    import mlflow

    same, plain = folder / "mlflow", folder / "mlflow_plain"
    script = Path(__file__).with_name("serving_model.py")
    mlflow.pyfunc.save_model(same, python_model=str(script), artifacts={"bundle": str(bundle.path)}, pip_requirements=[])
    save_for_mlflow(bundle, plain, SIZE)
    return same, plain


def mlflow_command(model: Path) -> Callable[[int], list[str]]:
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


class Bare:
    """One engine in this process, no server."""

    def __init__(self, engine: str, predictor: Predictor, study: Part) -> None:
        domain, decoding = open_domain("medical"), predictor.bundle.manifest.decoding

        def one() -> None:
            predictor.forward(predictor.prepare(decoded(study, domain, decoding)[0])[None])

        prepared = predictor.prepare(decoded(study, domain, decoding)[0])[None]
        batches = {size: partial(predictor.forward, np.repeat(prepared, size, axis=0)) for size in BATCHES}
        self._one = one
        self._best = max(batches, key=lambda size: size / statistics.median(timed(batches[size], 2.0)[0]))
        self._batch = batches[self._best]
        self.name = f"bare {engine}, prepared batches of {self._best}"

    def loads(self, seconds: float) -> tuple[Load, Load]:
        """One study after the other; batches of the size that was the fastest at the start."""
        latencies, cpu = timed(self._one, seconds)
        batched, batched_cpu = timed(self._batch, seconds)
        rate = self._best / statistics.median(batched)
        return Load(latencies, 0, 1 / statistics.median(latencies), cpu), Load(batched, 0, rate, batched_cpu / self._best)


def bare(bundle: Bundle, study: Part, threads: int) -> list[Bare]:
    network = open_engine(bundle, "openvino", threads).network
    torch.set_num_threads(threads)
    return [Bare("PyTorch", Predictor(bundle), study), Bare("OpenVINO", Predictor(bundle, network), study)]


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


def measure(folder: Path, bundle: Bundle, servers: list[Server], study: Part, options: argparse.Namespace) -> None:
    """The bare engines and all servers in turn, each round; of several rounds the medians."""
    engines = bare(bundle, study, options.threads)
    for server in servers:
        for clients in (1, CLIENTS):
            loaded(folder, server, study, clients, 2.0)  # warms up
    found: dict[str, list[tuple[Load, Load]]] = {}
    for _ in range(options.rounds):
        for engine in engines:
            found.setdefault(engine.name, []).append(engine.loads(options.seconds))
        for server in servers:
            one, many = (loaded(folder, server, study, clients, options.seconds) for clients in (1, CLIENTS))
            found.setdefault(server.name, []).append((one, many))
    print("| | 1 client, p50 | p99 | cpu | 16 clients, requests/s | cpu | clients | idle | failed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, windows in found.items():
        print(row(name, windows), flush=True)
    ours = found[servers[0].name]
    print("\n| `cvf serve` beside | p50, ratio (min .. max) | requests/s, ratio (min .. max) |\n|---|---|---|")
    for name, windows in found.items():
        if windows is not ours:
            pairs = list(zip(ours, windows, strict=True))
            slower = [quantile(a.latencies, 0.5) / quantile(b.latencies, 0.5) for (a, _), (b, _) in pairs]
            faster = [a.throughput / b.throughput for (_, a), (_, b) in pairs]
            print(f"| {name} | {spread(slower)} | {spread(faster)} |", flush=True)


def row(name: str, windows: list[tuple[Load, Load]]) -> str:
    one, many = zip(*windows, strict=True)
    p50, p99 = (statistics.median(quantile(window.latencies, share) for window in one) for share in (0.5, 0.99))
    rate = statistics.median(window.throughput for window in many)
    cpu = [statistics.median(window.cpu for window in part) * 1e3 for part in (one, many)]
    told = f"| {name} | {p50:.1f} ms | {p99:.1f} ms | {cpu[0]:.1f} ms | {rate:.1f} | {cpu[1]:.1f} ms "
    generators = [window.clients_cpu for window in many if window.clients_cpu is not None]
    if not generators:
        return told + "| | | |"
    clients = statistics.median(generators) * 1e3
    idle = statistics.median(window.idle for window in many)
    return told + f"| {clients:.2f} ms | {idle:.0%} | {sum(window.failed for window in (*one, *many))} |"


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})"


def loaded(folder: Path, server: Server, study: Part, clients: int, seconds: float) -> Load:
    """A window of load from a process of its own."""
    content, content_type = server.body(study)
    (folder / "body").write_bytes(content)
    arguments = [str(server.port), server.path, str(folder / "body"), content_type, str(clients), str(seconds)]
    command = [sys.executable, "-m", "benchmarks.load", *arguments]
    used, before = server.cpu_seconds(), psutil.cpu_times()
    printed = subprocess.run(command, check=True, capture_output=True, timeout=seconds + 120).stdout
    told = json.loads(printed)
    answered = len(told["latencies"])
    if not answered:
        sys.exit(f"{server.name} has not answered: {told['failures'][:1]}")
    cpu = (server.cpu_seconds() - used) / answered
    rate, spent = answered / told["seconds"], np.subtract(psutil.cpu_times(), before)
    idle = float(spent[3] / spent[:8].sum())  # user, nice, system, idle, iowait, irq, softirq, steal
    return Load(sorted(told["latencies"]), len(told["failures"]), rate, cpu, told["cpu"] / answered, idle)


def update(folder: Path, updates: int) -> None:
    """Blue/green updates of a local endpoint under the load of ``CLIENTS``."""
    study, port = png(), free_port()
    (folder / "body").write_bytes(study.content)
    command = [sys.executable, "-m", "cv_factory_ops.cli", "endpoint", "--state", str(folder / "state"), "--port", str(port)]
    with contextlib.ExitStack() as stack:
        log = stack.enter_context((folder / "endpoint.log").open("wb"))
        server = subprocess.Popen([*command, "--files", str(folder)], stdout=log, stderr=log, start_new_session=True)
        stack.callback(end, server)
        control = control_plane(port)
        for seed, name in enumerate(("blue", "green")):
            new_model(control, folder, name, seed)
        control.create_endpoint(EndpointName="benchmark", EndpointConfigName="blue")
        in_service(control, "blue")
        arguments = [str(port), "/endpoints/benchmark/invocations", str(folder / "body"), study.content_type, str(CLIENTS)]
        clients = subprocess.Popen([sys.executable, "-m", "benchmarks.load", *arguments, "86400"], stdout=subprocess.PIPE)
        stack.callback(end, clients)
        time.sleep(3)
        took = []
        for number in range(updates):
            began, name = time.monotonic(), ("green", "blue")[number % 2]
            control.update_endpoint(EndpointName="benchmark", EndpointConfigName=name)
            in_service(control, name)
            took.append(time.monotonic() - began)
            print(f"update {number + 1} of {updates}: {took[-1]:.1f} s", file=sys.stderr)
        time.sleep(3)
        clients.terminate()
        told = json.loads(clients.communicate(timeout=120)[0])
    answered, failed = len(told["latencies"]), len(told["failures"])
    print("| updates | an update | requests | requests/s | failed | longest answer |\n|---|---|---|---|---|---|")
    print(f"| {updates} | {statistics.median(took):.1f} s | {answered + failed} |", end=" ")
    print(f"{answered / told['seconds']:.1f} | {failed} | {max(told['latencies']):.2f} s |")
    print("\n".join(sorted(set(told["failures"]))[:5]))


def control_plane(port: int) -> Any:
    """A client of the local endpoint's, once that answers."""
    import boto3

    keys = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2):
            return boto3.client("sagemaker", endpoint_url=f"http://127.0.0.1:{port}", **keys)
        time.sleep(0.2)


def new_model(control: Any, folder: Path, name: str, seed: int) -> None:
    """A model and an endpoint config of this name."""
    pack(new_bundle(folder / name, seed).path, folder / f"{name}.tar.gz")
    container = {"Image": "cv-factory", "ModelDataUrl": (folder / f"{name}.tar.gz").as_uri()}
    control.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn="arn:aws:iam::000000000000:role/local")
    variant = {"VariantName": "AllTraffic", "ModelName": name, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    control.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])


def in_service(control: Any, name: str) -> None:
    """Wait until the endpoint serves this config."""
    while (found := control.describe_endpoint(EndpointName="benchmark"))["EndpointStatus"] in {"Creating", "Updating"}:
        time.sleep(0.2)
    if (found["EndpointStatus"], found["EndpointConfigName"]) != ("InService", name):
        sys.exit(f"the endpoint is {found['EndpointStatus']} with {found['EndpointConfigName']}: {found.get('FailureReason')}")


def quantile(latencies: list[float], share: float) -> float:
    """In ms, of sorted seconds."""
    return 1e3 * latencies[min(int(share * len(latencies)), len(latencies) - 1)]


if __name__ == "__main__":
    main()
