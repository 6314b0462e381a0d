"""What the operator adds to a pod, and what a second pod costs: ``python -m benchmarks.kubernetes [--rounds 5]``.

Needs a Kubernetes whose node is this machine (see ``local/cluster.py``). In turn, on the same prepared data:

- *launch*: seconds from the start of the task, in a process that has loaded the operators, to the first training step; and
  from ``kubectl create`` of the very same pod. The target is a ratio of at most 1.3.
- *pods*: images/s of a training over two pods with a process each, and of one on this machine with two processes. The target
  is a ratio of at least 0.9.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from local.cluster import Place, context, copy_run, place

FIRST_STEP = "steps an epoch"
"""What rank 0 logs when it begins."""
WORK = {"epochs": 4, "batch_size": 16, "seed": 0}
LARGE = {"data": {"source": {"kind": "phantoms", "patients": 600, "image_size": 64, "seed": 3}}, "preprocessing": {"size": 64}}
OPERATOR = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
from cv_factory_airflow.operators import TrainOperator
from local.cluster import context
operator = TrainOperator(
    task_id="train", config=sys.argv[1], run=sys.argv[2], data="", overrides=sys.argv[3], runtime="kubernetes"
)
started = time.time()
print(json.dumps({"started": started, "record": operator._run_pods(context("train", sys.argv[2]))}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, seed 0, {options.rounds} rounds")
    with place({"requests": {"cpu": "900m"}}, **LARGE) as there:
        rounds = range(options.rounds)
        launch = [_alternating(number, _launched_by_operator, _launched_by_kubectl, there) for number in rounds]
        _print("launch", "operator, s", "kubectl, s", launch)
        pods = [_alternating(number, _speed_of_pods, _speed_of_processes, there) for number in rounds]
        _print("pods", "two pods, images/s", "two processes, images/s", pods)


Measure = Callable[[Place, str], float]


def _alternating(number: int, first: Measure, second: Measure, place: Place) -> tuple[float, float]:
    """Measure both, in turn the one and the other first."""
    if number % 2:
        other = second(place, f"b-{number}")
        return first(place, f"a-{number}"), other
    return first(place, f"a-{number}"), second(place, f"b-{number}")


def _launched_by_operator(place: Place, name: str) -> float:
    settings = WORK | {"epochs": 1, "nodes": 1, "processes_per_node": 1}
    with FirstStep(place.namespace) as seen:
        started = _run_operator(place, copy_run(place.home, f"launch-{name}"), settings)["started"]
    return seen.at - started


def _launched_by_kubectl(place: Place, name: str) -> float:
    """The pod of the operator, made by kubectl."""
    from kubernetes.client import ApiClient

    from cv_factory_airflow.operators import TrainOperator

    settings = WORK | {"epochs": 1, "nodes": 1, "processes_per_node": 1}
    run, overrides = copy_run(place.home, f"launch-{name}"), _overrides(settings)
    operator = TrainOperator(
        task_id="train", config=str(place.config), run=str(run), data="", overrides=overrides, runtime="kubernetes"
    )
    pod = operator._stage_pods(context("train", name)).build_pod_request_obj(context("train", name))
    manifest = json.dumps(ApiClient().sanitize_for_serialization(pod))
    with FirstStep(place.namespace) as seen:
        started = time.time()
        subprocess.run(["kubectl", "create", "-f", "-"], input=manifest, text=True, check=True, capture_output=True)
        ended = ["kubectl", "-n", place.namespace, "get", "pod", pod.metadata.name, "-o", "jsonpath={.status.phase}"]
        while subprocess.run(ended, capture_output=True, text=True, check=True).stdout not in {"Succeeded", "Failed"}:
            time.sleep(1)
    subprocess.run(["kubectl", "-n", place.namespace, "delete", "pod", pod.metadata.name], check=True, capture_output=True)
    return seen.at - started


def _speed_of_pods(place: Place, name: str) -> float:
    settings = WORK | {"nodes": 2, "processes_per_node": 1}
    return float(_run_operator(place, copy_run(place.home, f"pods-{name}"), settings)["record"]["images_per_second"])


def _speed_of_processes(place: Place, name: str) -> float:
    settings = WORK | {"nodes": 1, "processes_per_node": 2}
    run = copy_run(place.home, f"processes-{name}")
    command = [sys.executable, "-m", "cv_factory_ops.cli", "train", "--config", str(place.config), "--run", str(run)]
    command += [part for key, value in settings.items() for part in ("--set", f"training.{key}={value}")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(ended.stdout.splitlines()[-1])["record"]["images_per_second"])


def _run_operator(place: Place, run: Path, settings: dict[str, int]) -> dict[str, Any]:
    command = [sys.executable, "-c", OPERATOR, str(place.config), str(run), _overrides(settings)]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def _overrides(settings: dict[str, int]) -> str:
    return json.dumps({f"training.{key}": value for key, value in settings.items()})


class FirstStep:
    """When the first rank of a namespace begins, by the time that Kubernetes puts before its log lines."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        self.at = float("nan")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> FirstStep:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        from kubernetes import client

        api = client.CoreV1Api()
        while not self._over.wait(0.5):
            for pod in api.list_namespaced_pod(self.namespace).items:
                with suppress(client.ApiException):
                    log = api.read_namespaced_pod_log(
                        pod.metadata.name, self.namespace, timestamps=True, _preload_content=False
                    ).data.decode()
                    for line in log.splitlines():
                        if FIRST_STEP in line:
                            self.at = datetime.fromisoformat(line.split()[0][:26] + "+00:00").timestamp()
                            return


def _print(what: str, ours: str, theirs: str, rounds: list[tuple[float, float]]) -> None:
    ratios = [one / other for one, other in rounds]
    print(f"{what}: {ours} | {theirs} | ratio")
    for (one, other), ratio in zip(rounds, ratios, strict=True):
        print(f"  {one:.1f} | {other:.1f} | {ratio:.2f}")
    print(f"  median ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} .. {max(ratios):.2f})", flush=True)


if __name__ == "__main__":
    main()
