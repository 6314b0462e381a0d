"""From a project's ``PodSettings`` to the manifest of a pod, in Kubernetes' own words.

The pod gets the project's YAML as one of its annotations, mounted as a file: it needs no checkout, no ConfigMap and no
right to ask the cluster for anything.
"""

from __future__ import annotations

from typing import Any, assert_never

from airflow.providers.cncf.kubernetes.pod_generator import make_safe_label_value

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.runtime import (
    ClaimVolume,
    ConfigMapVolume,
    HostVolume,
    KubernetesRuntime,
    PodSettings,
    SecretVolume,
    Toleration,
    Volume,
)
from cv_factory_ops.reach import is_read_only

PROJECT_FOLDER = "/etc/cv-factory"
PROJECT_FILE = f"{PROJECT_FOLDER}/project.yaml"
"""Where a pod finds its project."""
LABEL = "cv-factory/"
"""Prefix of our labels and annotations."""
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"


def manifest(
    project: ProjectConfig,
    runtime: KubernetesRuntime,
    stage: str,
    name: str,
    command: list[str],
    yaml: str,
    owner: dict[str, str],
) -> dict[str, Any]:
    """The pod of a stage, or of the first node of a training.

    :param name: name of the pod; those of further nodes are made of it
    :param command: what the container runs
    :param yaml: the project's file
    :param owner: ``dag`` and ``run``, for the labels that costs are told apart by
    """
    pod = runtime.pod_of(stage)
    about = {"project": project.project, "stage": stage, **owner}
    labels = pod.labels | {f"{LABEL}{key}": make_safe_label_value(value) for key, value in about.items()}
    annotations = pod.annotations | {f"{LABEL}project": yaml}
    if runtime.queue:
        labels[QUEUE_LABEL] = runtime.queue
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": runtime.namespace, "labels": labels, "annotations": annotations},
        "spec": {
            "restartPolicy": "Never",
            "runtimeClassName": pod.runtime_class,
            "containers": [_container(project, runtime, stage, command)],
            "securityContext": _pod_security(pod),
            "imagePullSecrets": [{"name": secret} for secret in pod.image_pull_secrets],
            "nodeSelector": pod.node_selector,
            "tolerations": [_toleration(toleration) for toleration in pod.tolerations],
            "affinity": pod.affinity,
            "priorityClassName": pod.priority_class,
            "serviceAccountName": pod.service_account,
            "automountServiceAccountToken": pod.service_account is not None,
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": pod.grace_seconds,
            "volumes": [*_own_volumes(pod), *(_volume(number, volume) for number, volume in enumerate(pod.volumes))],
        },
    }


def _container(project: ProjectConfig, runtime: KubernetesRuntime, stage: str, command: list[str]) -> dict[str, Any]:
    pod = runtime.pod_of(stage)
    gpus = {"nvidia.com/gpu": str(pod.gpus)} if pod.gpus else {}
    return {
        "name": stage,
        "image": pod.image,
        "imagePullPolicy": pod.image_pull_policy,
        "command": command,
        "env": _environment(project, runtime, pod),
        "envFrom": [{"secretRef": {"name": secret}} for secret in pod.env_from_secrets],
        "resources": {"requests": pod.requests, "limits": pod.limits | gpus},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "scratch", "mountPath": "/tmp"},  # noqa: S108 - the pod's own
            {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108
            {"name": "project", "mountPath": PROJECT_FOLDER, "readOnly": True},
            *(_mount(number, volume) for number, volume in enumerate(pod.volumes)),
        ],
    }


def _environment(project: ProjectConfig, runtime: KubernetesRuntime, pod: PodSettings) -> list[dict[str, Any]]:
    home = "/tmp"  # noqa: S108 - the pod's own, and with the volumes all that it may write to
    plain = {"HOME": home, "CVF_HOME": home, "CVF_STORAGE": project.storage_uri, "PYTHONUNBUFFERED": "1"}
    plain |= {"CVF_GANG_PATIENCE": str(runtime.schedule_timeout + runtime.startup_timeout)} | pod.env
    fields = {"POD_IP": "status.podIP", "CVF_GANG": "metadata.uid"}
    return [
        *({"name": name, "value": value} for name, value in plain.items()),
        *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
        *(
            {"name": name, "valueFrom": {"secretKeyRef": {"name": given.secret, "key": given.key}}}
            for name, given in pod.secret_env.items()
        ),
    ]


def _pod_security(pod: PodSettings) -> dict[str, Any]:
    group = {"fsGroup": pod.fs_group, "fsGroupChangePolicy": "OnRootMismatch"} if pod.fs_group else {}
    return {
        "runAsNonRoot": True,
        **({"runAsUser": pod.run_as_user} if pod.run_as_user else {}),
        **({"runAsGroup": pod.run_as_group} if pod.run_as_group else {}),
        "seccompProfile": {"type": "RuntimeDefault"},
        **group,
    }


def _toleration(toleration: Toleration) -> dict[str, Any]:
    return toleration.model_dump(exclude_none=True, exclude={"seconds"}) | (
        {} if toleration.seconds is None else {"tolerationSeconds": toleration.seconds}
    )


def _own_volumes(pod: PodSettings) -> list[dict[str, Any]]:
    project = {"path": "project.yaml", "fieldRef": {"fieldPath": f"metadata.annotations['{LABEL}project']"}}
    return [
        {"name": "scratch", "emptyDir": {"sizeLimit": pod.scratch}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": pod.shared_memory}},
        {"name": "project", "downwardAPI": {"items": [project]}},
    ]


def _volume(number: int, volume: Volume) -> dict[str, Any]:
    name = {"name": f"volume-{number}"}
    match volume:
        case ClaimVolume():
            return name | {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": volume.read_only}}
        case HostVolume():
            return name | {"hostPath": {"path": volume.host}}
        case SecretVolume():
            return name | {"secret": {"secretName": volume.secret}}
        case ConfigMapVolume():
            return name | {"configMap": {"name": volume.config_map}}
        case _:
            assert_never(volume)


def _mount(number: int, volume: Volume) -> dict[str, Any]:
    mount = {"name": f"volume-{number}", "mountPath": volume.path, "readOnly": is_read_only(volume)}
    return mount | ({"subPath": volume.sub_path} if isinstance(volume, ClaimVolume) and volume.sub_path else {})
