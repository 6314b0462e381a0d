"""What the pods of a stage can see: files that lie on their volumes, servers that are not another machine's loopback.

It follows from the project alone, so Airflow's operators ask it before pods are made, and ``cvf doctor`` before anything is.
"""

from __future__ import annotations

import posixpath
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import LocalDeploy
from cv_factory_ops.config.runtime import ClaimVolume, HostVolume, KubernetesRuntime, PodSettings, Volume
from cv_factory_ops.config.values import SECRET_VALUE
from cv_factory_ops.errors import ConfigError

PSEUDONYMIZING = ("ingest", "predict")
"""Stages that name patients anew, all with the same key."""


def require_reachable(project: ProjectConfig, runtime: KubernetesRuntime, stage: str, run: str) -> None:
    """Refuse what a pod could not see: files that lie on none of its volumes, servers of another machine's loopback.

    Raises:
        ConfigError: with one line that says what to set.
    """
    pod = runtime.pod_of(stage)
    if (parts := urlsplit(run)).scheme == "file" and not _on_a_volume(unquote(parts.path), pod, to_write=True):
        raise ConfigError(
            f"storage: {run} lies on no volume of the pods; set storage to s3://... or mount it by runtime.pod.volumes"
        )
    elsewhere = "MLFLOW_TRACKING_URI" in pod.secret_env or pod.env_from_secrets
    tracking = pod.env.get("MLFLOW_TRACKING_URI") or ("" if elsewhere else project.mlflow.tracking_uri)
    if SECRET_VALUE.search(tracking):
        raise ConfigError("mlflow.tracking_uri: holds a password; give MLFLOW_TRACKING_URI by runtime.pod.secret_env")
    if tracking.startswith("sqlite:") and not _on_a_volume(tracking.removeprefix("sqlite:///"), pod, to_write=True):
        raise ConfigError(
            f"mlflow.tracking_uri: {tracking} is a file on no volume of the pods; "
            "set it, or MLFLOW_TRACKING_URI in runtime.pod.env, to the address of a server"
        )
    if stage in PSEUDONYMIZING and not (pod.env_from_secrets or "CVF_PSEUDONYM_KEY" in pod.secret_env):
        raise ConfigError("runtime.pod.secret_env: CVF_PSEUDONYM_KEY is missing; all pods need the same key, from a Secret")
    for name, path in _places_to_read(project, stage):
        if "://" not in path and not _on_a_volume(path, pod):
            raise ConfigError(f"{name}: {path} lies on no volume of the pods; give an absolute path on one, or s3://...")
    if stage == "train" and pod.gpus and pod.gpus != project.training.processes_per_node:
        raise ConfigError(
            f"training.processes_per_node: {project.training.processes_per_node} given, "
            f"the pods have gpus: {pod.gpus}; allowed: one process for each GPU"
        )
    if stage in {"deploy", "verify", "promote"} and isinstance(project.deploy, LocalDeploy):
        url = pod.env.get("AWS_ENDPOINT_URL_SAGEMAKER") or project.deploy.url
        if urlsplit(url).hostname in {"127.0.0.1", "localhost"}:
            raise ConfigError(f"deploy.url: {url} is another machine to a pod; set it to an address that pods reach")


def _on_a_volume(path: str, pod: PodSettings, *, to_write: bool = False) -> bool:
    place = PurePosixPath(posixpath.normpath(path))
    volumes = [volume for volume in pod.volumes if not (to_write and is_read_only(volume))]
    return any(place.is_relative_to(volume.path) for volume in volumes)


def is_read_only(volume: Volume) -> bool:
    """Secrets and ConfigMaps always are."""
    return volume.read_only if isinstance(volume, ClaimVolume | HostVolume) else True


def _places_to_read(project: ProjectConfig, stage: str) -> list[tuple[str, str]]:
    """Settings of a stage that name files which the user provides, and their values."""
    source = project.data.source
    match stage:
        case "ingest":
            given = {f"data.source.{field}": getattr(source, field, None) for field in ("path", "labels", "masks", "boxes")}
        case "train":
            given = {"model.weights": project.model.weights, "embedding.weights": getattr(project.embedding, "weights", None)}
        case "predict":
            given = {"batch.path": project.batch.path}
        case _:
            given = {}
    return [(name, path) for name, path in given.items() if path]
