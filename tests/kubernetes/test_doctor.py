"""``cvf doctor`` on a real cluster: what is there is found, and what is not, also with an account that has no rights."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from local import cluster
from tests.test_doctor import found, status

Project = Callable[..., Path]


def pods(namespace: str, *, nodes: int = 1, **pod: Any) -> dict[str, Any]:
    secret = {"CVF_PSEUDONYM_KEY": {"secret": cluster.KEYS, "key": "pseudonym"}}
    small = {"image": cluster.IMAGE, "requests": {"cpu": "100m", "memory": "64Mi"}, "secret_env": secret}
    training = {"epochs": 1, "batch_size": 8, "processes_per_node": max(1, pod.get("gpus", 1)), "nodes": nodes}
    return {"runtime": {"kind": "kubernetes", "namespace": namespace, "pod": small | pod}, "training": training}


def test_a_cluster_that_has_everything_passes(api: Any, namespace: str, project: Project) -> None:
    path = project(**pods(namespace))
    checks = (
        "cluster",
        "cluster.namespace",
        "cluster.rights",
        "cluster.named",
        "cluster.image",
        "cluster.room",
        "cluster.queue",
    )
    told = found(path, *checks)
    told.pop("cluster.tls", None)  # a matter of this cluster's kubeconfig
    assert {finding.status for finding in told.values()} == {"ok"}, told
    assert told["cluster.secret"].found == f"{cluster.KEYS} is there with pseudonym"
    assert set(told) == {*checks, "cluster.secret"} - {"cluster.named", "cluster.queue"}


@pytest.mark.parametrize(
    ("check", "name", "pod"),
    [
        ("cluster.named", "cluster.secret", {"secret_env": {"A": {"secret": cluster.KEYS, "key": "another"}}}),
        ("cluster.named", "cluster.secret", {"env_from_secrets": ["nobody"]}),
        ("cluster.named", "cluster.claim", {"volumes": [{"kind": "claim", "claim": "none", "path": "/data"}]}),
        ("cluster.named", "cluster.config_map", {"volumes": [{"kind": "config_map", "config_map": "none", "path": "/data"}]}),
        ("cluster.named", "cluster.service_account", {"service_account": "nobody"}),
        ("cluster.named", "cluster.priority_class", {"priority_class": "none"}),
        ("cluster.image", "cluster.image", {"image": "nowhere/at-all:1", "image_pull_policy": "Never"}),
        ("cluster.room", "cluster.room", {"requests": {"cpu": "100000"}}),
    ],
)
def test_what_the_cluster_lacks_fails(
    api: Any, namespace: str, project: Project, check: str, name: str, pod: dict[str, Any]
) -> None:
    assert status(project(**pods(namespace, **pod)), check)[name] == "fail"


def test_an_image_that_must_be_pulled_cannot_be_told(api: Any, namespace: str, project: Project) -> None:
    assert status(project(**pods(namespace, image="nowhere/at-all:1")), "cluster.image") == {"cluster.image": "warn"}


@pytest.mark.parametrize("pod", [{"gpus": 64}, {"node_selector": {"of": "no node"}}])
def test_nodes_that_an_autoscaler_may_add_are_a_warning(
    api: Any, namespace: str, project: Project, pod: dict[str, Any]
) -> None:
    if any("nvidia.com/gpu" in node.status.allocatable for node in api.list_node().items):
        pytest.skip("this cluster has GPUs")
    assert status(project(**pods(namespace, **pod)), "cluster.room")["cluster.room"] == "warn"


def test_a_training_of_more_pods_than_fit_is_a_warning(api: Any, namespace: str, project: Project) -> None:
    cores = sum(int(node.status.allocatable["cpu"]) for node in api.list_node().items)
    wide = pods(namespace, nodes=cores + 1, requests={"cpu": "1"})
    told = found(project(**wide), "cluster.room")["cluster.room"]
    assert told.status == "warn", "an autoscaler may add nodes"
    assert f"stage train: {cores + 1} pods with cpu 1: the nodes have room for {cores}" in told.found


def test_a_namespace_and_a_queue_that_are_not_there_fail(api: Any, namespace: str, project: Project) -> None:
    assert status(project(**pods("nobody-made-it")), "cluster.namespace") == {"cluster.namespace": "fail"}
    queued = pods(namespace)
    queued["runtime"]["queue"] = "gpus"
    assert "has no Kueue" in found(project(**queued), "cluster.queue")["cluster.queue"].found


def test_an_account_without_rights_is_told_so(
    api: Any, namespace: str, project: Project, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes import config

    path = project(**pods(namespace))
    _, context = config.list_kube_config_contexts()
    given = yaml.safe_load(Path(config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION).expanduser().read_text())
    given["users"] = [{"name": context["context"]["user"], "user": {"token": _token(api, namespace)}}]
    (home / "kubeconfig").write_text(yaml.safe_dump(given))
    monkeypatch.setenv("KUBECONFIG", str(home / "kubeconfig"))
    monkeypatch.setattr(config.kube_config, "KUBE_CONFIG_DEFAULT_LOCATION", str(home / "kubeconfig"))
    told = found(path, "cluster", "cluster.rights", "cluster.namespace", "cluster.named", "cluster.room")
    assert told["cluster.rights"].status == "fail"
    assert "create pods" in told["cluster.rights"].found
    assert "get pods/log" in told["cluster.rights"].found
    assert {told[name].status for name in ("cluster.namespace", "cluster.secret", "cluster.room")} == {"warn"}


def _token(api: Any, namespace: str) -> str:
    """The token of the namespace's own account, to which no role is bound."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for secret in api.list_namespaced_secret(namespace).items:
            if secret.type == "kubernetes.io/service-account-token" and secret.data:
                return base64.b64decode(secret.data["token"]).decode()
        time.sleep(0.2)
    return str(api.create_namespaced_service_account_token("default", namespace, {"spec": {}}).status.token)
