"""Stages in pods under a real Airflow: ``airflow dags test``, and a scheduler whose parts are killed while pods run.

All of it works with no more rights in the cluster than ``ROLE`` gives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from cv_factory_airflow import run_uri
from cv_factory_ops.stage import TRAINING
from local.cluster import address, runtime
from local.stack import CHECKOUT, Stack, sourced
from tests.conftest import TINY
from tests.kubernetes.conftest import PSEUDONYM_KEY, Seen, names, phases, until

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")

PAGE = (CHECKOUT / "docs" / "kubernetes.md").read_text()
ROLE = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1]) | {"metadata": {"name": "cv-factory"}}
"""The role that the documentation gives to Airflow."""

DAGS = '''
"""One task each: a test waits for nothing else."""

from airflow.sdk import DAG

from cv_factory_airflow.operators import IngestOperator, TrainOperator
from cv_factory_airflow.projects import dag_settings, projects

for path, config in projects():
    for operator in (IngestOperator, TrainOperator):
        with DAG(f"{config.project}_{operator.stage}", **dag_settings(path, config)):
            operator(task_id=operator.stage)
'''

SHORT_WAITS = {
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "10",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "1",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "2",
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "10",
    "PYTHONWARNINGS": "ignore:Unverified HTTPS request",
}
SLOW = {"data.source.patients": 1500}
LONG = {"training.epochs": 100, "training.batch_size": 4}
WAITING = {"tiny": "deferred", "plain": "running"}
"""State of a project's task while its pods run."""


@pytest.fixture(scope="module")
def folder(api: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What this machine and the pods share."""
    path = tmp_path_factory.mktemp("airflow")
    os.chown(path, 1000, 1000)
    return path


@pytest.fixture(scope="module")
def connection(api: Any, namespace: str, folder: Path) -> str:
    """Airflow's connection to the cluster, as a service account that has ``ROLE`` and nothing else."""
    from kubernetes import client

    account = {"kind": "ServiceAccount", "name": "airflow", "namespace": namespace}
    api.create_namespaced_service_account(namespace, {"metadata": {"name": "airflow"}})
    rights = client.RbacAuthorizationV1Api()
    rights.create_namespaced_role(namespace, ROLE)
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "cv-factory"}
    binding = {"metadata": {"name": "cv-factory"}, "subjects": [account], "roleRef": reference}
    rights.create_namespaced_role_binding(namespace, binding)
    token = api.create_namespaced_service_account_token("airflow", namespace, {"spec": {"expirationSeconds": 3600}})
    config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
    config["users"] = [{"name": user["name"], "user": {"token": token.status.token}} for user in config["users"]]
    file = folder / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    return json.dumps({"conn_type": "kubernetes", "extra": {"kube_config_path": str(file)}})


@pytest.fixture(scope="module")
def write_project(namespace: str, folder: Path, mlflow_server: str) -> Callable[..., Path]:
    """``write_project("tiny", deferrable=False)``: the tiny project for the cluster; keywords replace fields of ``runtime``."""

    def write(name: str, sections: dict[str, Any] | None = None, **fields: Any) -> Path:
        path = folder / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        place = runtime(namespace, folder) | {"kubernetes_conn_id": "cluster"} | fields
        given = {"project": name, "mlflow": {"tracking_uri": mlflow_server}, "runtime": place}
        path.write_text(yaml.safe_dump({**TINY, **given, **(sections or {})}))
        return path

    return write


@pytest.fixture(scope="module")
def stack(folder: Path, connection: str, write_project: Callable[..., Path]) -> Iterator[Stack]:
    """Airflow with a scheduler, two projects, and DAGs of one task."""
    write_project("tiny")
    write_project("plain", deferrable=False)
    (folder / "dags").mkdir()
    (folder / "dags" / "stages.py").write_text(DAGS)
    bundle = {"classpath": "airflow.dag_processing.bundles.local.LocalDagBundle", "kwargs": {"path": str(folder / "dags")}}
    given = SHORT_WAITS | {
        "CVF_CONFIGS": str(folder / "configs"),
        "AIRFLOW_CONN_CLUSTER": connection,
        "AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST": json.dumps([{"name": "stages", **bundle}]),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        with Stack(folder / "home") as running:
            os.chown(running.home / "storage", 1000, 1000)
            yield running


@dataclass(frozen=True)
class Task:
    """The only task of a DAG run, as Airflow's REST API shows it."""

    stack: Stack
    dag: str
    run: str

    @property
    def stage(self) -> str:
        return self.dag.partition("_")[2]

    @property
    def state(self) -> str:
        return str(self._call("GET", "")["state"])

    @property
    def tries(self) -> int:
        return int(self._call("GET", "")["try_number"])

    @property
    def record(self) -> dict[str, Any]:
        return dict(self.stack.airflow.xcom(self.dag, self.run, self.stage))

    def log(self, number: int = 1) -> list[str]:
        """The lines of a try."""
        return [str(line["event"]) for line in self._call("GET", f"/logs/{number}")["content"]]

    def tells(self, words: str) -> bool:
        """Whether the task's first try has begun and said this."""
        return self.tries > 0 and any(words in line for line in self.log())

    def mark(self, state: str) -> None:
        """What a person does in the web UI."""
        self._call("PATCH", "", json={"new_state": state})

    def clear(self) -> None:
        body = {"dry_run": False, "only_failed": False, "dag_run_id": self.run, "task_ids": [self.stage]}
        self._send("POST", f"/dags/{self.dag}/clearTaskInstances", json=body)

    def wait(self, state: str) -> None:
        """Until the task is in a state; another end of it fails the test at once."""
        ends = {"success", "failed"}

        def reached() -> bool:
            now = self.state
            assert now == state or now not in ends, self.log(self.tries)[-10:]
            return now == state

        until(reached)

    def _call(self, method: str, place: str, **arguments: Any) -> Any:
        return self._send(method, f"/dags/{self.dag}/dagRuns/{self.run}/taskInstances/{self.stage}{place}", **arguments)

    def _send(self, method: str, path: str, **arguments: Any) -> Any:
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = client.request(method, f"{self.stack.addresses['airflow']}/api/v2{path}", **arguments)
        assert answer.is_success, answer.text
        return answer.json()


@pytest.fixture
def start(stack: Stack, request: pytest.FixtureRequest) -> Callable[..., Task]:
    """``start("tiny_ingest", SLOW)``: a DAG run with overrides."""

    def trigger(dag: str, overrides: dict[str, Any] | None = None) -> Task:
        conf = {"overrides": overrides or {}, "runtime": "kubernetes"}
        return Task(stack, dag, stack.airflow.trigger(dag, conf, run_id(request)))

    return trigger


@pytest.fixture(scope="module")
def inputs(stack: Stack, folder: Path) -> Path:
    """A run directory with what a training reads."""
    from cv_factory_ops.cli import main

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_STORAGE", str(stack.home / "storage"))
        patch.setenv("CVF_PSEUDONYM_KEY", PSEUDONYM_KEY)
        run = stack.home / "storage" / "inputs"
        for stage in ("ingest", "preprocess"):
            assert main([stage, "--config", str(folder / "configs" / "tiny.yaml"), "--run", str(run)]) == 0
    return run


@pytest.fixture
def train(stack: Stack, inputs: Path, start: Callable[..., Task], request: pytest.FixtureRequest) -> Callable[..., Task]:
    """``train("tiny", {"training.epochs": 3})``: a DAG run whose only task trains over two pods."""

    def trigger(project: str, overrides: dict[str, Any] | None = None) -> Task:
        dag = f"{project}_train"
        shutil.copytree(inputs, run_uri(str(stack.home / "storage" / project), dag, run_id(request)))
        subprocess.run(["chown", "-R", "1000:1000", stack.home / "storage"], check=True)
        return start(dag, {"training.nodes": 2} | (overrides or {}))

    return trigger


@pytest.fixture
def endpoint(folder: Path) -> Iterator[str]:
    """A SageMaker-compatible endpoint on the one address of this machine that pods reach."""
    host = address()
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    command = [Path(sys.executable).with_name("cvf"), "endpoint", "--state", folder / "endpoint", "--host", host]
    command += ["--files", folder]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until(lambda: listens(host, port))
        yield f"http://{host}:{port}"
    finally:
        server.terminate()
        server.wait()


def test_airflow_may_do_what_the_role_says_and_not_enter_pods(api: Any, namespace: str, connection: str) -> None:
    from kubernetes import client

    def allowed(verb: str, resource: str) -> bool:
        name, _, subresource = resource.partition("/")
        attributes = {"namespace": namespace, "verb": verb, "resource": name, "subresource": subresource}
        body = {"spec": {"user": f"system:serviceaccount:{namespace}:airflow", "resourceAttributes": attributes}}
        return bool(client.AuthorizationV1Api().create_subject_access_review(body).status.allowed)

    rules = ROLE["rules"]
    assert all(allowed(verb, resource) for rule in rules for verb in rule["verbs"] for resource in rule["resources"])
    for verb, resource in (("create", "pods/exec"), ("get", "secrets"), ("patch", "pods"), ("watch", "pods")):
        assert not allowed(verb, resource)


def test_dags_test_runs_the_whole_chain_in_pods(
    api: Any,
    namespace: str,
    folder: Path,
    connection: str,
    write_project: Callable[..., Path],
    endpoint: str,
    mlflow_server: str,
    seen: Seen,
) -> None:
    import mlflow

    write_project("whole", {"deploy": {"kind": "local", "url": endpoint}})
    state = folder / "laptop"
    given = {"CVF_STATE": str(state), "CVF_CONFIGS": str(folder / "configs"), "AIRFLOW_CONN_CLUSTER": connection}
    (state / "storage").mkdir(parents=True)
    os.chown(state / "storage", 1000, 1000)
    environment = sourced(given | {"PYTHONWARNINGS": "ignore:Unverified HTTPS request"})
    airflow = [str(Path(sys.executable).with_name("airflow"))]
    subprocess.run([*airflow, "db", "migrate"], env=environment, capture_output=True, check=True)
    ended = subprocess.run([*airflow, "dags", "test", "whole_training"], env=environment, capture_output=True, text=True)
    told = ended.stdout + ended.stderr
    assert ended.returncode == 0, told[-3000:]
    for line in ("generating phantoms of 60 patients", "epoch 1/2: loss", "epoch 2/2: loss"):
        assert told.count(line) == 1
    assert PSEUDONYM_KEY not in told
    assert json.loads(connection)["extra"]["kube_config_path"] not in told
    records = xcoms(state / "airflow" / "airflow.db")
    assert list(records) == list(TRAINING)
    champion = mlflow.MlflowClient(mlflow_server).get_model_version_by_alias("whole", "champion")
    assert champion.run_id == records["train"]["mlflow_run_id"]
    assert sorted(pod.metadata.labels["cv-factory/stage"] for pod in seen.pods.values()) == sorted(TRAINING)
    assert all(len(pod.spec.containers) == 1 for pod in seen.pods.values())
    assert names(api, namespace) == []


def test_training_is_deferred_while_its_pods_run(api: Any, namespace: str, train: Callable[..., Task], seen: Seen) -> None:
    task = train("tiny", {"training.epochs": 3})
    until(lambda: phases(api, namespace) == ["Running", "Running"] and task.state == "deferred")
    task.wait("success")
    assert task.record["world_size"] == 2
    told = task.log()
    for epoch in (1, 2, 3):
        assert len([line for line in told if line.startswith("[train] ") and f"epoch {epoch}/3: loss" in line]) == 1
    assert PSEUDONYM_KEY not in str(told)
    assert len(seen.pods) == 2
    assert task.tries == 1
    assert names(api, namespace) == []


def test_killed_triggerer_is_replaced_by_the_next(
    api: Any, namespace: str, stack: Stack, train: Callable[..., Task], seen: Seen, mlflow_server: str
) -> None:
    task = train("tiny", LONG)
    until(lambda: task.tells("epoch 1/100"))
    kill(service(stack, "triggerer"))
    stack.restart("triggerer")
    task.wait("success")
    assert len(seen.pods) == 2
    assert task.tries == 1
    assert mlflow_runs(mlflow_server, task) == [task.record["mlflow_run_id"]]
    assert names(api, namespace) == []


@pytest.mark.parametrize("project", ["tiny", "plain"])
@pytest.mark.parametrize("state", ["failed", "success"])
def test_task_that_a_person_ends_leaves_no_pod(
    api: Any, namespace: str, train: Callable[..., Task], seen: Seen, project: str, state: str
) -> None:
    task = train(project, LONG)
    until(lambda: phases(api, namespace) == ["Running", "Running"] and task.state == WAITING[project])
    task.mark(state)
    until(lambda: names(api, namespace) == [])
    assert task.state == state
    assert len(seen.pods) == 2


@pytest.mark.parametrize("project", ["tiny", pytest.param("plain", marks=pytest.mark.proof)])
def test_cleared_task_trains_on_in_a_new_pod(
    api: Any, namespace: str, train: Callable[..., Task], seen: Seen, project: str, mlflow_server: str
) -> None:
    task = train(project, LONG | {"training.nodes": 1})
    until(lambda: task.tells("epoch 1/100"))
    old = set(seen.pods)
    task.clear()
    until(lambda: task.tries == 2)
    task.wait("success")
    assert names(api, namespace) == []
    assert len(set(seen.pods) - old) == 1
    assert mlflow_runs(mlflow_server, task) == [task.record["mlflow_run_id"]]


def test_killed_worker_leaves_its_pod_to_the_retry(
    api: Any, namespace: str, stack: Stack, start: Callable[..., Task], seen: Seen
) -> None:
    task = start("plain_ingest", SLOW)
    until(lambda: phases(api, namespace) == ["Running"])
    kill(worker(stack))
    expect_rejoined(task, seen)


def test_worker_that_must_go_leaves_its_pod_to_the_retry(
    api: Any, namespace: str, stack: Stack, start: Callable[..., Task], seen: Seen
) -> None:
    task = start("plain_ingest", SLOW)
    until(lambda: phases(api, namespace) == ["Running"])
    worker(stack).terminate()
    expect_rejoined(task, seen)


@pytest.mark.parametrize(("workers", "patients"), [("killed too", 1500), pytest.param("alive", 8000, marks=pytest.mark.proof)])
def test_killed_scheduler_leaves_its_pod_to_the_next(
    api: Any, namespace: str, stack: Stack, start: Callable[..., Task], seen: Seen, workers: str, patients: int
) -> None:
    task = start("plain_ingest", {"data.source.patients": patients})
    until(lambda: phases(api, namespace) == ["Running"])
    scheduler = service(stack, "scheduler")
    if workers == "killed too":
        kill(scheduler)
    else:
        scheduler.kill()
    stack.restart("scheduler")
    expect_rejoined(task, seen)


@pytest.mark.parametrize(("phase", "pods"), [("Succeeded", 1), ("Running", 2)])
def test_pod_that_vanishes_before_the_worker_looks(
    api: Any, namespace: str, stack: Stack, start: Callable[..., Task], seen: Seen, phase: str, pods: int
) -> None:
    task = start("tiny_ingest", SLOW)
    until(lambda: task.state == "deferred" and phases(api, namespace) == ["Running"])
    with no_free_slot(stack):
        until(lambda: phases(api, namespace) == [phase])
        if phase == "Succeeded":
            until(lambda: task.state == "scheduled")
        [name] = names(api, namespace)
        api.delete_namespaced_pod(name, namespace)
        until(lambda: task.state == "scheduled" and names(api, namespace) == [])
    task.wait("success")
    assert task.record["accepted"] > 1500
    assert task.tries == 1
    assert len(seen.pods) == pods


def run_id(request: pytest.FixtureRequest) -> str:
    """A DAG run is named after its test."""
    return re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


def expect_rejoined(task: Task, seen: Seen) -> None:
    """The second try ends well with the first one's pod."""
    until(lambda: task.tries == 2)
    task.wait("success")
    assert task.record["accepted"] > 1500
    assert len(seen.pods) == 1
    assert any("rejoining pod" in line for line in task.log(2))


def service(stack: Stack, name: str) -> psutil.Process:
    return psutil.Process(json.loads((stack.home / "stack.json").read_text())["pids"][name])


def worker(stack: Stack) -> psutil.Process:
    """The process that the LocalExecutor has for the only running task; its child is the task."""
    [busy] = [process for process in service(stack, "scheduler").children() if process.children()]
    return busy


def kill(process: psutil.Process) -> None:
    """End a process and all that it has started at once, as a machine does that goes away."""
    ended = [process, *process.children(recursive=True)]
    for each in ended:
        each.kill()
    psutil.wait_procs(ended, timeout=10)


@contextmanager
def no_free_slot(stack: Stack) -> Iterator[None]:
    """No task begins or goes on in a worker."""
    resize_pool(stack, 0)
    try:
        yield
    finally:
        resize_pool(stack, 128)


def resize_pool(stack: Stack, slots: int) -> None:
    url = f"{stack.addresses['airflow']}/api/v2/pools/default_pool"
    answer = httpx.patch(url, params={"update_mask": "slots"}, json={"pool": "default_pool", "slots": slots}, trust_env=False)
    assert answer.is_success, answer.text


def xcoms(database: Path) -> dict[str, dict[str, Any]]:
    """What tasks have returned, by task, in the order of the tasks' ends."""
    with closing(sqlite3.connect(database)) as connection:
        rows = connection.execute("SELECT task_id, value FROM xcom WHERE key = 'return_value' ORDER BY timestamp")
        return {task: json.loads(value) for task, value in rows}


def listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def mlflow_runs(server: str, task: Task) -> list[str]:
    """The MLflow runs of a DAG run."""
    import mlflow

    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name(task.dag.partition("_")[0])
    assert experiment
    runs = client.search_runs([experiment.experiment_id])
    return [run.info.run_id for run in runs if run.data.tags["cvf.run"].endswith(f"{task.dag}.{task.run}")]
