"""A namespace of a real cluster whose node is this machine, and a project whose stages run in it.

The pods run this checkout in a bare image: interpreter, virtual environment and checkout are mounted from this machine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from urllib3.exceptions import HTTPError

from local import cluster
from local.cluster import IMAGE, context, runtime
from tests.conftest import TINY

PSEUDONYM_KEY = "a key that only a Secret holds"
PATIENCE = 240.0
os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="airflow-"))  # Airflow writes there when imported


@pytest.fixture(scope="session")
def api() -> Any:
    """The cluster's API; without a cluster on this machine the test skips."""
    from kubernetes import client, config

    try:
        config.load_kube_config()
        core = client.CoreV1Api()
        nodes = core.list_node(_request_timeout=5).items
    except (config.ConfigException, HTTPError, client.ApiException) as error:
        pytest.skip(f"no Kubernetes cluster answers ({type(error).__name__}); set KUBECONFIG")
    if IMAGE not in [name for node in nodes for image in node.status.images for name in image.names or []]:
        pytest.skip(f"the cluster has no image {IMAGE}: only a cluster on this machine can mount this checkout")
    return core


@pytest.fixture(scope="module")
def namespace(api: Any) -> Iterator[str]:
    """A namespace of its own for a module's tests; at its end no pod may be left in it."""
    with cluster.namespace(PSEUDONYM_KEY) as name:
        yield name
        assert [
            pod.metadata.name for pod in api.list_namespaced_pod(name).items if pod.metadata.deletion_timestamp is None
        ] == []


@pytest.fixture(scope="session")
def mlflow_server(api: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server that pods reach."""
    with cluster.mlflow_server(tmp_path_factory.mktemp("mlflow")) as url:
        yield url


@pytest.fixture(scope="session")
def s3_server(api: Any) -> Iterator[str]:
    """Address of a moto server that pods reach; it takes the place of the one that only this machine reaches."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address=cluster.address(), port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def shared(home: Path) -> Path:
    """A folder that this machine and the pods see under the same path; the pods' user may write to it."""
    os.chown(home, 1000, 1000)
    return home


@pytest.fixture
def pods_project(namespace: str, shared: Path, mlflow_server: str) -> Callable[..., Path]:
    """Write the tiny project for the cluster; ``pod`` adds to the pods' settings, other keywords replace sections."""

    def write(pod: dict[str, Any] | None = None, limits: dict[str, Any] | None = None, **sections: Any) -> Path:
        path = shared / "project.yaml"
        given = {"storage": str(shared / "storage"), "mlflow": {"tracking_uri": mlflow_server}}
        place = runtime(namespace, shared, **(pod or {})) | {"deferrable": False} | (limits or {})
        path.write_text(yaml.safe_dump({**TINY, **given, "runtime": place, **sections}))
        return path

    return write


@pytest.fixture
def operators() -> ModuleType:
    import cv_factory_airflow.operators

    return cv_factory_airflow.operators


def until(condition: Callable[[], Any]) -> Any:
    """Wait for a condition; returns its value. A kubelet may take a minute to notice what it should do."""
    deadline = time.monotonic() + PATIENCE
    while not (value := condition()):
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.2)
    return value


class Seen:
    """Every pod that a namespace has had since, by uid."""

    def __init__(self, api: Any, namespace: str) -> None:
        from kubernetes import watch

        self.pods: dict[str, Any] = {}
        self._watch = watch.Watch()
        self._stream = self._watch.stream(api.list_namespaced_pod, namespace, timeout_seconds=1800)
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        with suppress(HTTPError):  # :meth:`stop` looks whether that came too early
            for event in self._stream:
                self.pods[event["object"].metadata.uid] = event["object"]

    def stop(self) -> None:
        """End the watch, which must have gone on until now: a pod that was not seen is not counted."""
        assert self._thread.is_alive()
        self._watch.stop()


@pytest.fixture
def seen(api: Any, namespace: str) -> Iterator[Seen]:
    found = Seen(api, namespace)
    yield found
    found.stop()


def names(api: Any, namespace: str) -> list[str]:
    return [pod.metadata.name for pod in api.list_namespaced_pod(namespace).items]


def phases(api: Any, namespace: str) -> list[str]:
    return [pod.status.phase for pod in api.list_namespaced_pod(namespace).items]


def kill_worker_when(operator: Any, condition: Callable[[], Any]) -> None:
    """Run a task in a process of its own and kill that."""
    worker = multiprocessing.get_context("fork").Process(target=operator.execute, args=(context(operator.task_id),))
    worker.start()
    until(condition)
    worker.kill()
    worker.join()
