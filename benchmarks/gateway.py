"""What the gateway adds: ``python -m benchmarks.gateway [--requests 400] [--size 224] [--soak MINUTES]``.

One client, one connection to each, alternating request by request in one run: InvokeEndpoint of the local endpoint, and
``POST /predict`` of ``cvf gateway`` before it, with API keys, rate limits and metrics on.
Both are processes of their own; the answers are computed by a small network, since what is added does not depend on it.

Target: at most 3 ms added at p50. ``--soak`` sends from four clients instead, also requests that are refused, and prints the
gateway's resident memory each half minute; target: flat after the first minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import cv2
import httpx
import numpy as np
import psutil
import yaml

from cv_factory_ops.bundle import pack
from cv_factory_ops.config.serving import ApiKeys
from cv_factory_ops.gateway.keys import make_key
from tests.bundles import free_port, start_cvf, wait_until, write_bundle
from tests.conftest import TINY


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--requests", type=int, default=400)
    options.add_argument("--size", type=int, default=224)
    options.add_argument("--soak", type=float, metavar="MINUTES")
    given = options.parse_args()
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (given.size, given.size), dtype=np.uint8)
    image = cv2.imencode(".png", noise)[1].tobytes()
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as (endpoint, gateway, key, process):
        if given.soak:
            soak(gateway, key, process, image, given.soak)
        else:
            compare(endpoint, gateway, key, image, given.requests)


@contextmanager
def running(folder: Path) -> Iterator[tuple[str, str, str, psutil.Process]]:
    """Addresses of the endpoint's invocations and of the gateway, a key, and the gateway's process."""
    os.environ |= {"CVF_HOME": str(folder), "CVF_PSEUDONYM_KEY": "a key for benchmarks"}
    url, port = f"http://127.0.0.1:{free_port()}", free_port()
    settings = TINY | {"deploy": {"kind": "local", "url": url}, "gateway": {"rate": "100000/second"}}
    (folder / "project.yaml").write_text(yaml.safe_dump(settings))
    key = make_key(ApiKeys(), "benchmark")
    started: list[subprocess.Popen[bytes]] = []
    try:
        where = ("--state", str(folder / "state"), "--port", url[17:], "--files", str(folder))
        started.append(start_cvf("endpoint", *where, folder=folder))
        wait_until(lambda: is_up(f"{url}/ping"))
        deploy(url, folder)
        arguments = ("--config", str(folder / "project.yaml"), "--port", str(port))
        started.append(start_cvf("gateway", *arguments, folder=folder))
        wait_until(lambda: is_up(f"http://127.0.0.1:{port}/readyz"))
        yield f"{url}/endpoints/tiny/invocations", f"http://127.0.0.1:{port}", key, psutil.Process(started[1].pid)
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)


def deploy(url: str, folder: Path) -> None:
    """A tiny bundle behind the endpoint ``tiny``, without captures."""
    pack(write_bundle(folder / "bundle", seed=1).path, folder / "model.tar.gz")
    keys = {"region_name": "us-east-1", "aws_access_key_id": "x", "aws_secret_access_key": "x"}
    control = boto3.client("sagemaker", endpoint_url=url, **keys)
    container = {"Image": "cv-factory", "ModelDataUrl": (folder / "model.tar.gz").as_uri()}
    control.create_model(ModelName="m", PrimaryContainer=container, ExecutionRoleArn="arn:aws:iam::000000000000:role/local")
    variant: dict[str, Any] = {"VariantName": "AllTraffic", "ModelName": "m", "InitialInstanceCount": 1}
    control.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant | {"InstanceType": "ml.m5.large"}])
    control.create_endpoint(EndpointName="tiny", EndpointConfigName="c")
    wait_until(lambda: control.describe_endpoint(EndpointName="tiny")["EndpointStatus"] == "InService")


def is_up(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def compare(endpoint: str, gateway: str, key: str, image: bytes, requests: int) -> None:
    """Print p50 and p99 of both, and what is added."""
    seconds: dict[str, list[float]] = {"endpoint": [], "gateway": []}
    headers = {"content-type": "image/png", "X-API-Key": key}
    with httpx.Client(trust_env=False, headers=headers) as client:
        for number in range(requests + 50):
            for name, url in (("endpoint", endpoint), ("gateway", f"{gateway}/predict")):
                started = time.perf_counter()
                client.post(url, content=image).raise_for_status()
                if number >= 50:
                    seconds[name].append(time.perf_counter() - started)
    for name, values in seconds.items():
        print(f"{name:10} p50 {1e3 * statistics.median(values):6.2f} ms   p99 {1e3 * np.quantile(values, 0.99):6.2f} ms")
    differences = [there - here for here, there in zip(seconds["endpoint"], seconds["gateway"], strict=True)]
    added = 1e3 * (statistics.median(seconds["gateway"]) - statistics.median(seconds["endpoint"]))
    print(f"added at p50: {added:.2f} ms (median of pairs {1e3 * statistics.median(differences):.2f} ms); target 3 ms")


def soak(gateway: str, key: str, process: psutil.Process, image: bytes, minutes: float) -> None:
    """Print the gateway's resident memory over time."""
    end, sent = time.monotonic() + 60 * minutes, [0] * 4

    def ask(place: int) -> None:
        with httpx.Client(base_url=gateway, trust_env=False, headers={"X-API-Key": key}, timeout=60) as client:
            while time.monotonic() < end:
                client.post("/predict", content=image, headers={"content-type": "image/png"}).raise_for_status()
                client.post("/predict", content=b"no image", headers={"content-type": "image/png"})
                client.post("/predict/batch", files=[("files", ("x", image, "image/png"))] * 3)
                client.post("/feedback", json={"labels": {"an-id": "no label"}})
                sent[place] += 4

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask, place) for place in range(4)]
        started = time.monotonic()
        while time.monotonic() < end:
            time.sleep(min(30, max(1, end - time.monotonic())))
            resident = process.memory_info().rss / 2**20
            print(f"{time.monotonic() - started:6.0f} s   {sum(sent):8d} requests   gateway {resident:6.1f} MiB", flush=True)
        for client in clients:
            client.result()


if __name__ == "__main__":
    sys.exit(main())
