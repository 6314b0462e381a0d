"""Kill a training at random moments and try again: ``python -m benchmarks.crash_points [--points 50] [--seed 0]``.

Needs a Kubernetes whose node is this machine (see ``local/cluster.py``). Each point starts a training over two pods and
kills one of these at a random moment of it:

- *worker*: SIGKILL for the process that runs the operator, as for an Airflow worker
- *pod*: one of the pods is deleted at once, as when its machine is lost
- *rank*: SIGKILL for one of the training processes, as by the kernel when memory runs out
- *connection*: every connection to the API server is cut, and none is accepted for three seconds

Then the task is tried again until it succeeds, three times at most. Each point must end with exactly one MLflow run and one
bundle, whose weights are those of the undisturbed training to the last bit, and with no pod left.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import platform
import random
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import yaml
from tqdm import tqdm

from local.cluster import Place, copy_run, place

TRAINING = {"epochs": 8, "batch_size": 4, "nodes": 2, "processes_per_node": 1, "learning_rate": 0.003}
TRIES = 3
OPERATOR = """
import sys, warnings
warnings.simplefilter("ignore")
from cv_factory_airflow.operators import TrainOperator
from local.cluster import context
operator = TrainOperator(task_id="train", config=sys.argv[1], run=sys.argv[2], data="", overrides="{}", runtime="kubernetes")
operator._run_pods(context("train", sys.argv[2].rsplit("/", 1)[1], try_number=int(sys.argv[3])))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with place({}, training=TRAINING) as there, Proxy(there.home.parent) as proxy:
        started = time.monotonic()
        undisturbed = _train(there, proxy, "undisturbed")
        seconds = time.monotonic() - started
        wrong = list(undisturbed.wrong)
        print(f"Python {platform.python_version()}, {os.cpu_count()} cores, undisturbed: {seconds:.0f} s", flush=True)
        moments, hits, tries, missed = random.Random(options.seed), Counter[str](), Counter[int](), 0  # noqa: S311
        with tqdm(total=options.points, unit="point") as progress:
            while progress.n < options.points:
                kind = KINDS[progress.n % len(KINDS)]
                kill = Kill(there, proxy, kind, moments.uniform(0, seconds), moments)
                outcome = _train(there, proxy, f"point-{progress.n}-{missed}", kill)
                wrong += outcome.wrong
                if outcome.weights != undisturbed.weights:
                    wrong.append(f"{kind} after {kill.moment:.1f} s: other weights")
                if not kill.hit:  # the training was over before; another moment
                    missed += 1
                    continue
                hits[kind] += 1
                tries[outcome.tries] += 1
                progress.update()
        print(f"hit: {dict(hits)}; tries needed: {dict(sorted(tries.items()))}; not hit: {missed}; wrong: {len(wrong)}")
        print("\n".join(wrong))
    return 1 if wrong else 0


@dataclass(frozen=True)
class Outcome:
    """How a training ended."""

    weights: str
    tries: int
    wrong: list[str]


def _train(place: Place, proxy: Proxy, name: str, kill: Kill | None = None) -> Outcome:
    """Run a training to its end, disturbed in its first try; says what is not as it should be."""
    run = copy_run(place.home, name)
    environment = os.environ | {"KUBECONFIG": str(proxy.config)}
    for number in range(1, TRIES + 1):
        command = [sys.executable, "-c", OPERATOR, str(place.config), str(run), str(number)]
        with (run / f"try-{number}.log").open("wb") as log:
            worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            if kill and number == 1:
                kill.start(worker, run)
            code = worker.wait()
            if kill:
                kill.join()
        if code == 0:
            break
    wrong = [] if code == 0 else [f"{name}: {(run / f'try-{number}.log').read_text().splitlines()[-1]}"]
    if (runs := _mlflow_runs(place, run)) != 1:
        wrong.append(f"{name}: {runs} MLflow runs")
    if left := _pods(place):
        wrong.append(f"{name}: pods are left: {left}")
    bundle = run / "train" / "bundle" / "model.safetensors"
    return Outcome(hashlib.sha256(bundle.read_bytes()).hexdigest() if bundle.exists() else "none", number, wrong)


class Kill(threading.Thread):
    """One kill at a moment of a training; ``hit`` says whether there was still something to kill."""

    def __init__(self, place: Place, proxy: Proxy, kind: str, moment: float, choice: random.Random) -> None:
        super().__init__(daemon=True)
        self.place, self.proxy, self.kind, self.moment, self.choice = place, proxy, kind, moment, choice
        self.hit = False

    def start(self, worker: subprocess.Popen[bytes], run: Path) -> None:  # type: ignore[override]
        self.worker, self.run_uri = worker, run.as_uri()
        super().start()

    def join(self, timeout: float | None = None) -> None:
        if self.is_alive():
            super().join(timeout)

    def run(self) -> None:
        """Wait for the moment, and then until there is a victim; give up with the end of the training."""
        time.sleep(self.moment)
        while not self.hit and self.worker.poll() is None:
            with suppress(psutil.Error, IndexError):
                self.hit = getattr(self, f"_{self.kind}")()
            time.sleep(0.1)

    def _worker(self) -> bool:
        self.worker.kill()
        return True

    def _pod(self) -> bool:
        from kubernetes import client

        name = self.choice.choice(_pods(self.place))
        with suppress(client.ApiException):
            client.CoreV1Api().delete_namespaced_pod(name, self.place.namespace, grace_period_seconds=0)
            return True
        return False

    def _rank(self) -> bool:
        """The ranks of this very training: children of a launcher that was given its run."""
        ranks = [process for process in psutil.process_iter() if "cv_factory_ops.training.worker" in _command(process)]
        mine = [rank for rank in ranks if (parent := rank.parent()) and self.run_uri in _command(parent)]
        self.choice.choice(mine).kill()
        return True

    def _connection(self) -> bool:
        self.proxy.cut(3)
        return True


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []


KINDS = ("connection", "pod", "rank", "worker")


def _pods(place: Place) -> list[str]:
    from kubernetes import client

    return [pod.metadata.name for pod in client.CoreV1Api().list_namespaced_pod(place.namespace).items]


def _mlflow_runs(place: Place, run: Path) -> int:
    from mlflow import MlflowClient

    logging.getLogger("mlflow.tracking.request_header.registry").setLevel(logging.ERROR)
    client = MlflowClient(place.tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    return len(client.search_runs([experiment.experiment_id], f"tags.`cvf.run` = '{run.as_uri()}'"))


class Proxy:
    """Between the operator and the API server: passes bytes on until it is told to cut."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        cluster = config["clusters"][0]["cluster"]
        address = urlsplit(cluster["server"])
        self._target = (address.hostname, address.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: set[socket.socket] = set()
        self._closed_until = 0.0
        cluster["server"] = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        self.config = folder / "kubeconfig"
        self.config.write_text(yaml.safe_dump(config))

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def cut(self, seconds: float) -> None:
        """End all connections, and for some time every new one."""
        self._closed_until = time.monotonic() + seconds
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):  # the listener is closed
            while True:
                client, _ = self._listener.accept()
                if time.monotonic() < self._closed_until:
                    client.close()
                    continue
                server = socket.create_connection(self._target)
                self._open |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for connection in (source, sink):
            self._open.discard(connection)
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()


if __name__ == "__main__":
    sys.exit(main())
