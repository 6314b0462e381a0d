"""A real local stack: Airflow, MLflow and the SageMaker-compatible endpoint, on 127.0.0.1 only.

``python -m local.stack up|down|status [--home var/stack]`` keeps one running for a person. ``with Stack(home) as stack:``
runs one for the demo or a test, and ``stack.airflow`` talks to its REST API. Everything lies below the home; settings come
from ``airflow.env``, ports and secrets from here.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from cv_factory_ops.errors import CvFactoryError, Unavailable

CHECKOUT = Path(__file__).resolve().parent.parent
MARK = "CVF_STACK"
"""Environment variable that every process of a stack inherits: by it, and only by it, a process is known as ours."""
START_SECONDS = 120
STOP_SECONDS = 15
Report = Callable[[str], None]


@dataclass(frozen=True)
class Service:
    """One process of the stack; ``ready`` says whether it answers."""

    name: str
    command: list[str]
    ready: Callable[[], bool]


class Stack:
    """A stack below one folder; a context manager that leaves nothing running.

    Raises:
        Unavailable: a service did not start; the message names its log.
    """

    def __init__(self, home: Path, report: Report = print) -> None:
        self.home = home.resolve()
        self.report = report
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Start all services side by side and wait until each answers; an earlier stack of this home is stopped first."""
        stop(self.home)
        for folder in ("airflow", "storage", "mlflow", "endpoint", "logs"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        self.ports = {name: _free_port(port) for name, port in (("airflow", 8080), ("mlflow", 5000), ("endpoint", 8765))}
        self.addresses = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.environment = _environment(self.home, self.ports, self.addresses)
        self.airflow = Airflow(self.addresses["airflow"])
        try:
            self._start_services()
        except BaseException:
            self.stop()
            raise

    def restart(self, name: str) -> None:
        """Start a service that has ended again, and wait until it answers."""
        self._processes[name].wait()
        outside, _, inside = self._services()
        (service,) = [service for service in (*outside, *inside) if service.name == name]
        self._launch(service)
        self._record()
        self._await(time.monotonic(), service)

    def stop(self) -> None:
        """Stop everything that belongs to this home."""
        stop(self.home)
        for process in self._processes.values():
            process.wait()
        self._processes.clear()

    def _start_services(self) -> None:
        started = time.monotonic()
        outside, migration, inside = self._services()
        self._launch(*outside, migration)
        self._await(started, migration)
        self._launch(*inside)
        self._record()
        self._await(started, *outside, *inside)

    def _services(self) -> tuple[list[Service], Service, list[Service]]:
        """What starts at once, the database migration, and what needs the migrated database."""
        bin_folder, mlflow_home = Path(sys.executable).parent, self.home / "mlflow"
        airflow = str(bin_folder / "airflow")
        mlflow = mlflow_command("127.0.0.1", self.ports["mlflow"], mlflow_home)
        endpoint = [sys.executable, "-m", "cv_factory_ops.cli", "endpoint", "--state", str(self.home / "endpoint")]
        endpoint += ["--port", str(self.ports["endpoint"])]
        outside = [
            Service("mlflow", mlflow, lambda: answers(f"{self.addresses['mlflow']}/health")),
            Service("endpoint", endpoint, lambda: _listens(self.ports["endpoint"])),
        ]
        inside = [
            Service("api-server", [airflow, "api-server"], lambda: bool(self.airflow.health())),
            Service("scheduler", [airflow, "scheduler", "--skip-serve-logs"], lambda: self._healthy("scheduler")),
            Service("dag-processor", [airflow, "dag-processor"], lambda: self._healthy("dag_processor")),
            Service("triggerer", [airflow, "triggerer", "--skip-serve-logs"], lambda: self._healthy("triggerer")),
        ]
        migration = Service("migration", [airflow, "db", "migrate"], lambda: self._ended_well("migration"))
        return outside, migration, inside

    def _healthy(self, component: str) -> bool:
        return bool(self.airflow.health().get(component, {}).get("status") == "healthy")

    def _ended_well(self, name: str) -> bool:
        return self._processes[name].poll() == 0

    def _launch(self, *services: Service) -> None:
        for service in services:
            with (self.home / "logs" / f"{service.name}.log").open("wb") as log:
                self._processes[service.name] = subprocess.Popen(
                    service.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self.environment,
                    cwd=self.home,
                    start_new_session=True,
                )

    def _await(self, started: float, *services: Service) -> None:
        waiting = list(services)
        while waiting:
            for service in [service for service in waiting if service.ready()]:
                self.report(f"  {service.name:<14} ready after {time.monotonic() - started:4.1f} s")
                waiting.remove(service)
            for service in waiting:
                self._require_running(service, started)
            time.sleep(0.2 if waiting else 0)

    def _require_running(self, service: Service, started: float) -> None:
        log = self.home / "logs" / f"{service.name}.log"
        code = self._processes[service.name].poll()
        if code is not None and not service.ready():
            last = log.read_text(errors="replace").splitlines()[-1:] or [""]
            raise Unavailable(f"{service.name}: ended with exit code {code}: {last[0].strip()} (see {log})")
        if time.monotonic() - started > START_SECONDS:
            raise Unavailable(f"{service.name}: not ready after {START_SECONDS} s (see {log})")

    def _record(self) -> None:
        """``stack.json``: for people and scripts; stopping does not depend on it."""
        pids = {name: process.pid for name, process in self._processes.items() if process.poll() is None}
        record = {"addresses": self.addresses, "pids": pids, "home": str(self.home)}
        (self.home / "stack.json").write_text(json.dumps(record, indent=2), encoding="utf-8")


class Airflow:
    """The few calls of Airflow's public REST API (v2) that the demo and the tests need.

    :param token: who asks, where that is asked
    """

    def __init__(self, address: str, token: str = "") -> None:
        shown = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=f"{address}/api/v2", headers=shown, timeout=30, trust_env=False)

    def health(self) -> dict[str, Any]:
        """State of each component; empty while the API server does not answer."""
        with suppress(httpx.TransportError):
            answer = self._client.get("/monitor/health", timeout=5)
            if answer.is_success:
                return dict(answer.json())
        return {}

    def trigger(self, dag_id: str, conf: dict[str, Any] | None = None, run_id: str | None = None) -> str:
        """Start a DAG run and return its id; waits for a DAG file that is not parsed yet."""
        body = {"dag_run_id": run_id, "conf": conf or {}, "logical_date": None}
        self.await_dag(dag_id)
        return str(self._call("POST", f"/dags/{dag_id}/dagRuns", json=body)["dag_run_id"])

    def wait(
        self, dag_id: str, run_id: str, on_poll: Callable[[dict[str, str]], None] | None = None, timeout: float = 3600
    ) -> str:
        """Wait for the end of a DAG run and return its state; ``on_poll`` is given the tasks' states at every look.

        Raises:
            Unavailable: the run is not over after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = str(self._call("GET", f"/dags/{dag_id}/dagRuns/{run_id}")["state"])
            if on_poll:
                on_poll(self.tasks(dag_id, run_id))
            if state in {"success", "failed"}:
                return state
            time.sleep(0.5)
        raise Unavailable(f"{dag_id} {run_id}: not over after {timeout:.0f} s")

    def task_seconds(self, dag_id: str, run_id: str, task_id: str) -> float:
        """How long a task ran, in Airflow's own account."""
        return float(self._call("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}")["duration"] or 0)

    def tasks(self, dag_id: str, run_id: str) -> dict[str, str]:
        """State of each task of a DAG run; empty for one that is not scheduled yet."""
        found = self._call("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances")["task_instances"]
        return {task["task_id"]: task["state"] or "" for task in found}

    def dag_runs(self, dag_id: str) -> list[dict[str, Any]]:
        """All runs of a DAG, oldest first, as the API describes them."""
        return list(self._call("GET", f"/dags/{dag_id}/dagRuns", params={"order_by": "run_after"})["dag_runs"])

    def xcom(self, dag_id: str, run_id: str, task_id: str, key: str = "return_value") -> Any:
        """What a task returned."""
        return self._call("GET", f"/dags/{dag_id}/dagRuns/{run_id}/taskInstances/{task_id}/xcomEntries/{key}")["value"]

    def await_dag(self, dag_id: str, timeout: float = 60) -> None:
        """Wait until the DAG processor has found a DAG.

        Raises:
            Unavailable: it has not after ``timeout`` seconds, or the API server does not answer.
        """
        deadline = time.monotonic() + timeout
        while self._send("GET", f"/dags/{dag_id}").status_code != 200:
            if time.monotonic() > deadline:
                errors = self._call("GET", "/importErrors")["import_errors"]
                raise Unavailable(f"{dag_id}: no such DAG; import errors: {[item['filename'] for item in errors] or 'none'}")
            time.sleep(0.3)

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        answer = self._send(method, path, **arguments)
        if answer.is_error:
            raise Unavailable(f"{method} {answer.url}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        try:
            return self._client.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise Unavailable(f"{self._client.base_url}: {type(error).__name__}; is the stack up?") from None


def stop(home: Path) -> None:
    """End every process of a home's stack, also those whose parent is gone: asked first, killed after a while."""
    ours = list(_processes_of(home))
    pids = {process.pid for process in ours}
    leaders = [process for process in ours if process.ppid() not in pids]
    _signal(leaders, signal.SIGTERM)
    psutil.wait_procs(leaders, timeout=STOP_SECONDS)
    while left := list(_processes_of(home)):
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=1)
    (home.resolve() / "stack.json").unlink(missing_ok=True)


def _processes_of(home: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == str(home.resolve()) and process.status() != psutil.STATUS_ZOMBIE:
                yield process


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _environment(home: Path, ports: dict[str, int], addresses: dict[str, str]) -> dict[str, str]:
    """The variables of all services, and of the stages that they start."""
    keys = _secrets(home)
    given = {
        "CVF_HOME": str(CHECKOUT),
        "CVF_STATE": str(home),
        "CVF_STORAGE": str(home / "storage"),
        "CVF_PSEUDONYM_KEY": os.environ.get("CVF_PSEUDONYM_KEY") or keys["pseudonym"],
        "MLFLOW_TRACKING_URI": addresses["mlflow"],
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        MARK: str(home),
        "SPT_NOENV": "1",  # process titles must not overwrite the environment that MARK is read from
        "AIRFLOW__API__PORT": str(ports["airflow"]),
        "AIRFLOW__API__BASE_URL": addresses["airflow"],
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{addresses['airflow']}/execution/",
        "AIRFLOW__CORE__FERNET_KEY": keys["fernet"],
        "AIRFLOW__API__SECRET_KEY": keys["api"],
        "AIRFLOW__API_AUTH__JWT_SECRET": keys["jwt"],
        "AWS_ENDPOINT_URL_SAGEMAKER": addresses["endpoint"],
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": addresses["endpoint"],
        "AWS_DEFAULT_REGION": os.environ.get("AWS_DEFAULT_REGION", "us-east-1"),
    }
    return sourced(given)


def sourced(given: dict[str, str]) -> dict[str, str]:
    """The environment after sourcing ``airflow.env`` in the checkout, with some variables given beforehand."""
    script, before = ". ./airflow.env && env -0", os.environ | given
    listed = subprocess.run(["sh", "-c", script], cwd=CHECKOUT, env=before, capture_output=True, check=True)
    return dict(line.split("=", 1) for line in listed.stdout.decode().split("\0") if "=" in line)


def _secrets(home: Path) -> dict[str, str]:
    """Keys of this home, made at its first start."""
    file = home / "secrets.json"
    if not file.exists():
        keys = {name: secrets.token_hex(32) for name in ("jwt", "api", "pseudonym")}
        keys["fernet"] = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
        with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as target:
            json.dump(keys, target)
    return dict(json.loads(file.read_text(encoding="utf-8")))


def _free_port(first: int) -> int:
    """The first port from here on that nothing on this machine listens on."""
    for port in range(first, first + 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise Unavailable(f"ports {first} to {first + 199}: all are taken")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def mlflow_command(host: str, port: int, folder: Path) -> list[str]:
    """An MLflow server whose database and artifacts lie in a folder."""
    command = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    return [*command, "--artifacts-destination", str(folder / "artifacts")]


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=5, trust_env=False).is_success
    return False


def _up(home: Path) -> None:
    stack = Stack(home)
    print("Starting")
    stack.start()
    print(f"\nAirflow   {stack.addresses['airflow']}\nMLflow    {stack.addresses['mlflow']}")
    print(f"Endpoint  {stack.addresses['endpoint']}  (endpoint_url= of boto3's sagemaker-runtime)")
    print(f"Logs      {stack.home / 'logs'}")


def _status(home: Path) -> None:
    file = home / "stack.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"pids": {}, "addresses": {}}
    running = {process.pid for process in _processes_of(home)}
    for name, pid in record["pids"].items():
        print(f"{name:<14} {'running' if pid in running else 'stopped'}  pid {pid}")
    for name, address in record["addresses"].items():
        print(f"{name:<14} {address}")
    if not running:
        print("nothing is running")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.stack", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("action", choices=["up", "down", "status"])
    parser.add_argument("--home", type=Path, default=CHECKOUT / "var" / "stack", help="folder of the stack's state")
    options = parser.parse_args()
    try:
        match options.action:
            case "up":
                _up(options.home)
            case "down":
                stop(options.home)
            case "status":
                _status(options.home)
    except CvFactoryError as error:
        print(f"stack: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
