"""The cluster that stages run in: whether it is reached, what we may do there, and whether it has what the pods name.

Rights are asked for by SelfSubjectAccessReview, which every account may create; nothing else is written.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, get_args

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.runtime import (
    ClaimVolume,
    ConfigMapVolume,
    KubernetesRuntime,
    PodSettings,
    SecretVolume,
    StageName,
    Toleration,
)
from cv_factory_ops.doctor.findings import QUESTION_SECONDS, CannotTell, Check, Finding, fail, ok, warn
from cv_factory_ops.errors import ConfigError, Unavailable
from cv_factory_ops.reach import require_reachable

RIGHTS = (("pods", "", "create get list delete"), ("pods", "log", "get"), ("events", "", "list"))
"""What Airflow's account needs, see docs/kubernetes.md."""
OLDEST = (1, 20)
GPU = "nvidia.com/gpu"
Look = Callable[[ProjectConfig], Iterator[Finding]]


def checks(config: ProjectConfig) -> list[Check]:
    """What to look at, where stages are pods."""
    if not isinstance(config.runtime, KubernetesRuntime):
        return []
    looks: dict[str, Look] = {"cluster.namespace": _namespace, "cluster.rights": _rights, "cluster.named": _named}
    looks |= {"cluster.image": _images, "cluster.room": _room, "cluster.queue": _queue}
    silent: list[Unavailable] = []
    return [
        Check("cluster.reach", _seen_by_pods),
        Check("cluster", _unless(silent, _reached), "set KUBECONFIG to a file that opens the cluster"),
        *(Check(name, _unless(silent, look)) for name, look in looks.items()),
    ]


def _unless(silent: list[Unavailable], look: Look) -> Look:
    """Look, but not any more once the cluster did not answer: each question to it would take its time, and say the same."""

    def looked(config: ProjectConfig) -> Iterator[Finding]:
        if silent:
            return
        try:
            yield from look(config)
        except Unavailable as error:
            silent.append(error)
            raise

    return looked


def _seen_by_pods(config: ProjectConfig) -> Iterator[Finding]:
    """Files and servers that the settings name, as the operators refuse them before pods are made."""
    refused: dict[str, list[str]] = {}
    for stage in get_args(StageName):
        try:
            require_reachable(config, _runtime(config), stage, f"{config.root}/runs/any")
        except ConfigError as error:
            refused.setdefault(str(error), []).append(stage)
    for reason, stages in refused.items():
        yield fail("cluster.reach", f"{', '.join(stages)}: {reason}")
    if not refused:
        yield ok("cluster.reach", "storage, MLflow, source and endpoint lie where pods can see them")


def _reached(config: ProjectConfig) -> Iterator[Finding]:
    with _asked("the version"):
        found = _client().VersionApi().get_code(_request_timeout=QUESTION_SECONDS)
    if not _client().Configuration.get_default_copy().verify_ssl:
        yield warn("cluster.tls", "the cluster's certificate is not checked", "give its authority in the kubeconfig")
    number = (int(found.major), int("".join(filter(str.isdigit, found.minor))))
    told = f"Kubernetes {found.git_version} answers"
    yield ok("cluster", told) if number >= OLDEST else fail("cluster", told, "1.20 or newer is needed")
    if (runtime := _runtime(config)).kubernetes_conn_id != "kubernetes_default":
        given = (
            f"looked at by KUBECONFIG; what Airflow's connection {runtime.kubernetes_conn_id} opens cannot be told from here"
        )
        yield warn("cluster.connection", given, f"airflow connections test {runtime.kubernetes_conn_id}")


def _namespace(config: ProjectConfig) -> Iterator[Finding]:
    name = _namespace_of(config)
    with _asked(f"namespace {name}"):
        found = _or_none(lambda: _client().CoreV1Api().read_namespace(name, _request_timeout=QUESTION_SECONDS))
    if found is None:
        yield fail("cluster.namespace", f"{name} is not there", f"kubectl create namespace {name}")
    elif found.status.phase != "Active":
        yield fail("cluster.namespace", f"{name} is {found.status.phase}", "wait until it is gone, then make it anew")
    else:
        yield ok("cluster.namespace", f"{name} is there")


def _rights(config: ProjectConfig) -> Iterator[Finding]:
    """Each verb by itself, as Airflow's account will use it; what is asked here is what this login may."""
    client, namespace = _client(), _namespace_of(config)
    denied = []
    for resource, part, verbs in RIGHTS:
        for verb in verbs.split():
            wanted = client.V1ResourceAttributes(namespace=namespace, verb=verb, resource=resource, subresource=part or None)
            review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=wanted))
            with _asked("for rights"):
                answer = client.AuthorizationV1Api().create_self_subject_access_review(
                    review, _request_timeout=QUESTION_SECONDS
                )
            if not answer.status.allowed:
                denied.append(f"{verb} {resource}{f'/{part}' if part else ''}")
    if denied:
        yield fail(
            "cluster.rights", f"in {namespace} this login may not: {', '.join(denied)}", "bind the Role of docs/kubernetes.md"
        )
    else:
        yield ok("cluster.rights", f"in {namespace} this login may run pods, read their logs and list events")


def _named(config: ProjectConfig) -> Iterator[Finding]:
    """Everything of the cluster that the pods' settings name."""
    core, namespace, pods = _client().CoreV1Api(), _namespace_of(config), list(_pods(config))
    volumes = [volume for _, pod in pods for volume in pod.volumes]
    wanted: list[tuple[str, Callable[..., Any], Iterable[str]]] = [
        ("claim", core.read_namespaced_persistent_volume_claim, (v.claim for v in volumes if isinstance(v, ClaimVolume))),
        ("config_map", core.read_namespaced_config_map, (v.config_map for v in volumes if isinstance(v, ConfigMapVolume))),
        ("service_account", core.read_namespaced_service_account, (pod.service_account or "" for _, pod in pods)),
    ]
    for kind, read, names in wanted:
        for name in sorted({*names} - {""}):
            yield _there(kind, name, read, namespace)
    for kind, read, names in (
        ("priority_class", _client().SchedulingV1Api().read_priority_class, (pod.priority_class or "" for _, pod in pods)),
        ("runtime_class", _client().NodeV1Api().read_runtime_class, (pod.runtime_class or "" for _, pod in pods)),
    ):
        for name in sorted({*names} - {""}):
            yield _there(kind, name, read)
    for name, keys in sorted(_secrets(pods).items()):
        yield _secret(core, namespace, name, keys)


def _secrets(pods: Iterable[tuple[str, PodSettings]]) -> dict[str, set[str]]:
    """Names of Secrets, each with the keys that must be in it."""
    found: dict[str, set[str]] = {}
    for _, pod in pods:
        plain = [
            *pod.env_from_secrets,
            *pod.image_pull_secrets,
            *(v.secret for v in pod.volumes if isinstance(v, SecretVolume)),
        ]
        for name in plain:
            found.setdefault(name, set())
        for given in pod.secret_env.values():
            found.setdefault(given.secret, set()).add(given.key)
    return found


def _there(kind: str, name: str, read: Callable[..., Any], *namespace: str) -> Finding:
    place = f"cluster.{kind}"
    try:
        with _asked(f"{kind} {name}"):
            found = _or_none(lambda: read(name, *namespace, _request_timeout=QUESTION_SECONDS))
    except CannotTell as error:
        return warn(place, f"cannot be told: {error}")
    if found is None:
        return fail(place, f"{name} is not there", "make it, or change runtime.pod")
    return ok(place, f"{name} is there")


def _secret(core: Any, namespace: str, name: str, keys: set[str]) -> Finding:
    """Names of keys only: values are not looked at."""
    try:
        with _asked(f"secret {name}"):
            found = _or_none(lambda: core.read_namespaced_secret(name, namespace, _request_timeout=QUESTION_SECONDS))
    except CannotTell as error:
        return warn("cluster.secret", f"cannot be told: {error}")
    if found is None:
        return fail(
            "cluster.secret", f"{name} is not there", f"kubectl --namespace {namespace} create secret generic {name} ..."
        )
    if lacking := sorted(keys - {*(found.data or {})}):
        return fail("cluster.secret", f"{name} lacks {', '.join(lacking)}", "add it to the Secret")
    return ok("cluster.secret", f"{name} is there" + (f" with {', '.join(sorted(keys))}" if keys else ""))


def _images(config: ProjectConfig) -> Iterator[Finding]:
    """An image that is not to be pulled must be on a node; whether a registry has one cannot be told from here."""
    with _asked("nodes"):
        nodes = _client().CoreV1Api().list_node(_request_timeout=QUESTION_SECONDS).items
    there = {name for node in nodes for image in node.status.images or [] for name in image.names or []}
    for image, policy in sorted({(pod.image, pod.image_pull_policy) for _, pod in _pods(config)}):
        present = bool(there & {image, f"docker.io/{image}", f"docker.io/library/{image}"})
        if present and policy != "Always":
            yield ok("cluster.image", f"{image} is on a node")
        elif policy == "Never":
            yield fail(
                "cluster.image", f"{image} is on no node, and image_pull_policy is Never", "load it, or let it be pulled"
            )
        else:
            yield warn(
                "cluster.image", f"{image} will be pulled ({policy}); whether its registry has it cannot be told from here"
            )


def _room(config: ProjectConfig) -> Iterator[Finding]:
    """Whether nodes are large enough when they are empty; what others take of them now is not counted."""
    with _asked("nodes"):
        nodes = _client().CoreV1Api().list_node(_request_timeout=QUESTION_SECONDS).items
    for stage, pod in _pods(config):
        yield room(f"stage {stage}" if stage else "stages", pod, config.training.nodes if stage == "train" else 1, nodes)


def room(shown: str, pod: PodSettings, count: int, nodes: list[Any]) -> Finding:
    """Whether so many pods fit on the nodes, and what keeps them off; an autoscaler may add nodes of which there is none."""
    meant = [node for node in nodes if _is_meant(node, pod)]
    free = [node for node in meant if not _repelling(node, pod)]
    fitting = sum(_fits(node, pod) for node in free)
    asked = ", ".join(f"{name} {amount}" for name, amount in _asked_for(pod).items()) or "no requests"
    wanted = f"{shown}: {count} pods with {asked}"
    if fitting >= count:
        return ok("cluster.room", f"{wanted}: room on {len(free)} nodes")
    if not meant:
        selector = ", ".join(f"{name}={value}" for name, value in pod.node_selector.items())
        told = f"{wanted}: no node {f'with the labels {selector}' if selector else f'has {GPU}' if pod.gpus else 'is there'}"
        return warn("cluster.room", told, "an autoscaler may add one; else change node_selector or requests")
    if not free:
        taints = [taint for node in meant for taint in _repelling(node, pod)]
        names = ", ".join(sorted({f"{taint.key}={taint.value or ''}:{taint.effect}" for taint in taints}))
        # Some clusters, EKS among them, add the toleration of a resource that a pod asks for.
        kind = warn if all(taint.key in _asked_for(pod) for taint in taints) else fail
        return kind("cluster.room", f"{wanted}: the nodes have the taint {names}", "add it to runtime.pod.tolerations")
    told = f"{wanted}: the nodes have room for {fitting}"
    if fitting:
        return warn("cluster.room", told, "an autoscaler may add nodes; else fewer or smaller requests")
    return fail("cluster.room", told, "smaller requests, another node_selector, or larger nodes")


def _is_meant(node: Any, pod: PodSettings) -> bool:
    """Whether the pods' settings allow this node: its labels, a GPU where they ask for one, and that it takes pods at all."""
    labels = node.metadata.labels or {}
    chosen = all(labels.get(name) == value for name, value in pod.node_selector.items())
    return chosen and not node.spec.unschedulable and (not pod.gpus or int(node.status.allocatable.get(GPU, "0")) > 0)


def _repelling(node: Any, pod: PodSettings) -> list[Any]:
    """The taints that keep these pods off a node.

    https://kubernetes.io/docs/concepts/scheduling-eviction/taint-and-toleration/
    """
    return [
        taint
        for taint in node.spec.taints or []
        if taint.effect != "PreferNoSchedule" and not any(_tolerates(toleration, taint) for toleration in pod.tolerations)
    ]


def _tolerates(toleration: Toleration, taint: Any) -> bool:
    """An empty key with ``Exists`` fits every taint, an empty effect every effect."""
    fits = toleration.operator == "Exists" or (toleration.value or "") == (taint.value or "")
    return fits and toleration.key in {None, "", taint.key} and toleration.effect in {None, taint.effect}


def _asked_for(pod: PodSettings) -> dict[str, str]:
    return {**pod.limits, **pod.requests, **({GPU: str(pod.gpus)} if pod.gpus else {})}


def _fits(node: Any, pod: PodSettings) -> int:
    """How many such pods an empty node holds; a node has a number of pods that it takes, too."""
    from kubernetes.utils import parse_quantity

    amounts = {name: Decimal(parse_quantity(amount)) for name, amount in ({"pods": "1"} | _asked_for(pod)).items()}
    allocatable = {name: Decimal(parse_quantity(node.status.allocatable.get(name, "0"))) for name in amounts}
    return min(int(allocatable[name] // amount) for name, amount in amounts.items() if amount)


def _queue(config: ProjectConfig) -> Iterator[Finding]:
    runtime = _runtime(config)
    if not runtime.queue:
        return
    client = _client()
    with _asked("queues"):
        groups = {group.name: group for group in client.ApisApi().get_api_versions(_request_timeout=QUESTION_SECONDS).groups}
        if "kueue.x-k8s.io" not in groups:
            yield fail("cluster.queue", f"runtime.queue: {runtime.queue} given; this cluster has no Kueue", "install it")
            return
        version = groups["kueue.x-k8s.io"].preferred_version.version
        found = client.CustomObjectsApi().list_namespaced_custom_object(
            "kueue.x-k8s.io", version, _namespace_of(config), "localqueues", _request_timeout=QUESTION_SECONDS
        )
    known = sorted(item["metadata"]["name"] for item in found["items"])
    told = f"{runtime.queue}; there are: {', '.join(known) or 'none'}"
    yield ok("cluster.queue", told) if runtime.queue in known else fail("cluster.queue", told, "make a LocalQueue of that name")


def _pods(config: ProjectConfig) -> Iterator[tuple[str, PodSettings]]:
    """The settings of all stages, and of each that has its own; training counts by itself where it takes several pods."""
    runtime = _runtime(config)
    yield "", runtime.pod
    for stage in sorted({*runtime.stages, *(["train"] if config.training.nodes > 1 else [])}):
        yield stage, runtime.pod_of(stage)


def _runtime(config: ProjectConfig) -> KubernetesRuntime:
    assert isinstance(config.runtime, KubernetesRuntime)  # noqa: S101 - by `checks`
    return config.runtime


def _namespace_of(config: ProjectConfig) -> str:
    return _runtime(config).namespace or "default"


def _client() -> Any:
    """The Kubernetes package, pointed at the cluster of ``KUBECONFIG``, or at the one that we run in."""
    try:
        import urllib3
        from kubernetes import client
        from kubernetes import config as loading
    except ImportError:
        raise CannotTell("needs kubernetes: pip install 'cv-factory[airflow]'") from None
    try:
        if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
            loading.load_incluster_config()
        else:
            loading.load_kube_config()
        patience = client.Configuration.get_default_copy()
        patience.retries = False  # by themselves three more, of QUESTION_SECONDS each
        client.Configuration.set_default(patience)
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)  # `cluster.tls` tells it once
    except loading.ConfigException:
        raise Unavailable("no cluster is configured: neither KUBECONFIG nor a pod's own account") from None
    return client


@contextmanager
def _asked(subject: str) -> Iterator[None]:
    """Turn what the cluster's client raises into one line."""
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        if error.status == 401:
            raise Unavailable("the cluster does not take this login") from None
        raise CannotTell(f"this login may not ask {subject} ({error.status})") from None
    except HTTPError as error:
        raise Unavailable(f"the cluster does not answer ({type(error).__name__})") from None


def _or_none(read: Callable[[], Any]) -> Any:
    """What is read; None where there is no such thing."""
    from kubernetes.client import ApiException

    try:
        return read()
    except ApiException as error:
        if error.status != 404:
            raise
        return None
