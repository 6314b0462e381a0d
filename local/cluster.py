"""Stages in a Kubernetes whose node is this machine: no image is built, the pods run this checkout.

Interpreter, virtual environment and checkout are mounted from this machine into a bare image. Tests and benchmarks use it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from cv_factory_ops.errors import Unavailable
from local.stack import CHECKOUT, answers, mlflow_command

IMAGE = os.environ.get("CVF_TEST_IMAGE", "localhost/host:1")
"""Any image with a C library like this machine's; it must be on the node."""
PREFIX = Path(sys.executable).resolve().parents[1]
LIBRARIES = [path for path in (Path("/usr/lib/x86_64-linux-gnu/libsqlite3.so.0"),) if path.exists()]
"""What the interpreter needs of this machine that a bare image lacks."""
KEYS = "keys"
"""Name of the Secret with the pseudonym key, in every namespace that is used."""


def address() -> str:
    """This machine's address as pods see it: that of the node."""
    from kubernetes import client, config

    config.load_kube_config()
    [node] = client.CoreV1Api().list_node().items
    return next(str(item.address) for item in node.status.addresses if item.type == "InternalIP")


def runtime(namespace: str, shared: Path, **pod: Any) -> dict[str, Any]:
    """``runtime`` of a project whose pods run this checkout.

    :param shared: a folder that this machine and the pods see under the same path; the pods' user must be able to write to it
    :param pod: further settings of the pods
    """
    (shared / "user").mkdir(exist_ok=True)
    # The interpreter may lie below a home directory that other users must not enter.
    own = dict.fromkeys((PREFIX, Path(sys.prefix), CHECKOUT, shared, *LIBRARIES))
    mounts = [(shared / "user", Path.home()), *((path, path) for path in own)]
    settings = {
        "image": IMAGE,
        "requests": {"cpu": "100m", "memory": "256Mi"},
        "env": {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": f"{CHECKOUT}:{CHECKOUT / 'plugins'}",
            "GIT_PYTHON_REFRESH": "quiet",
        },
        "secret_env": {"CVF_PSEUDONYM_KEY": {"secret": KEYS, "key": "pseudonym"}},
        "volumes": [{"kind": "host", "host": str(host), "path": str(path)} for host, path in mounts],
        "grace_seconds": 5,
    }
    return {"kind": "kubernetes", "namespace": namespace, "pod": settings | pod}


@contextmanager
def namespace(key: str) -> Iterator[str]:
    """A namespace of its own, with the pseudonym key as a Secret; it is deleted with everything in it."""
    from kubernetes import client, config

    config.load_kube_config()
    api, name = client.CoreV1Api(), f"cvf-{uuid.uuid4().hex[:8]}"
    api.create_namespace({"metadata": {"name": name}})
    try:
        api.create_namespaced_secret(name, {"metadata": {"name": KEYS}, "stringData": {"pseudonym": key}})
        while not api.list_namespaced_service_account(name).items:  # without its account no pod is admitted
            time.sleep(0.2)
        yield name
    finally:
        api.delete_namespace(name)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Address of an MLflow server that pods reach; its data lie in the folder.

    Raises:
        Unavailable: it does not answer within two minutes.
    """
    host = address()
    with socket.create_server((host, 0)) as probe:
        port = probe.getsockname()[1]
    place = f"{host}:{port}"
    command = [*mlflow_command(host, port, folder), "--allowed-hosts", place]
    environment = os.environ | {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not answers(f"http://{place}/health"):
            if time.monotonic() > deadline:
                raise Unavailable(f"MLflow: does not answer at {place} (see {folder / 'log'})")
            time.sleep(0.2)
        yield f"http://{place}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()


def context(task_id: str, run_id: str = "manual__1", try_number: int = 1, state: str = "running") -> dict[str, Any]:
    """What Airflow hands to a task, as far as operators read it; ``state`` is what its API server would say of the task."""
    dag_run = SimpleNamespace(dag_id="tiny_training", run_id=run_id)
    ti = SimpleNamespace(
        dag_id=dag_run.dag_id,
        run_id=run_id,
        task_id=task_id,
        map_index=-1,
        try_number=try_number,
        xcom_push=lambda **_: None,
        get_task_states=lambda **_: {run_id: {task_id: state}},
    )
    return {"ti": ti, "dag_run": dag_run, "run_id": run_id, "dag": SimpleNamespace()}


@dataclass(frozen=True)
class Place:
    """A small project in a namespace of its own, ingested and preprocessed."""

    home: Path
    namespace: str
    config: Path
    tracking_uri: str


@contextmanager
def place(pod: dict[str, Any], **sections: Any) -> Iterator[Place]:
    """A project for benchmarks, with an MLflow server; ``CVF_HOME`` is its home.

    :param pod: further settings of its pods
    :param sections: further sections of the project
    """
    with tempfile.TemporaryDirectory() as name, namespace("a key") as where:
        folder, home, server = Path(name), Path(name) / "home", Path(name) / "mlflow"
        folder.chmod(0o755)  # the pods' user enters it
        home.mkdir()
        server.mkdir()
        os.environ |= {"CVF_HOME": str(home), "AIRFLOW_HOME": str(folder / "airflow")}
        with mlflow_server(server) as url:
            own = runtime(where, home, **pod) | {"deferrable": False}
            yield Place(home, where, _prepare(home, mlflow={"tracking_uri": url}, runtime=own, **sections), url)


def _prepare(home: Path, **sections: Any) -> Path:
    """Write the project, ingest and preprocess on this machine; returns its YAML."""
    config = home / "project.yaml"
    project = {
        "project": "tiny",
        "labels": ["normal", "opacity"],
        "storage": str(home / "storage"),
        "data": {"source": {"kind": "phantoms", "patients": 60, "image_size": 48, "seed": 3}},
        "preprocessing": {"size": 32},
        "model": {"kind": "small_cnn", "width": 4},
    }
    config.write_text(yaml.safe_dump(project | sections))
    environment = os.environ | {"CVF_PSEUDONYM_KEY": "a key"}
    for stage in ("ingest", "preprocess"):
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", str(config), "--run", str(home / "prepared")]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    return config


def copy_run(home: Path, name: str) -> Path:
    """A run directory with what :func:`place` has made, which pods may write to."""
    run = home / "runs" / name
    shutil.copytree(home / "prepared", run)
    subprocess.run(["chown", "-R", "1000:1000", str(home)], check=True)
    return run
