"""Where stages run: ``runtime``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from cv_factory_ops.config.values import SECRET_NAME, SECRET_VALUE, Text
from cv_factory_ops.records import Frozen


class ProcessRuntime(Frozen):
    """Each stage is a process on the Airflow worker's machine."""

    kind: Literal["process"] = "process"


class ClaimVolume(Frozen):
    """A PersistentVolumeClaim of the pods' namespace; for several nodes it must be ``ReadWriteMany``."""

    kind: Literal["claim"] = "claim"
    claim: str = Field(min_length=1)
    path: str = Field(pattern="^/.")
    """Where the pods see it."""
    sub_path: str = ""
    read_only: bool = False


class HostVolume(Frozen):
    """A directory of the node's own disk; a ``restricted`` Pod Security policy does not admit it."""

    kind: Literal["host"] = "host"
    host: str = Field(pattern="^/.")
    """The directory on the node."""
    path: str = Field(pattern="^/.")
    """Where the pods see it."""
    read_only: bool = False


class SecretVolume(Frozen):
    """The keys of a Secret, as files."""

    kind: Literal["secret"] = "secret"
    secret: str = Field(min_length=1)
    path: str = Field(pattern="^/.")
    """Where the pods see it."""


class ConfigMapVolume(Frozen):
    """The keys of a ConfigMap, as files: certificates of a hospital's own authority, for example."""

    kind: Literal["config_map"] = "config_map"
    config_map: str = Field(min_length=1)
    path: str = Field(pattern="^/.")
    """Where the pods see it."""


Volume = Annotated[ClaimVolume | HostVolume | SecretVolume | ConfigMapVolume, Field(discriminator="kind")]


class SecretKey(Frozen):
    """One key of a Secret of the pods' namespace."""

    secret: str = Field(min_length=1)
    key: str = Field(min_length=1)


class Toleration(Frozen):
    """A taint that the pods put up with; the fields are Kubernetes' own."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    seconds: int | None = None
    """How long a ``NoExecute`` taint is put up with."""


class PodSettings(Frozen):
    """What a pod of a stage looks like. It runs as a user without rights, on a read-only root file system: a namespace with
    the Pod Security policy ``restricted`` admits it (but for ``host`` volumes)."""

    image: str = ""
    """Image with ``cvf`` in it; ``make image-trainer`` builds one."""
    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    image_pull_secrets: list[str] = []
    requests: dict[str, Text] = {"cpu": "1", "memory": "2Gi"}
    """Resources that the scheduler sets aside for a pod."""
    limits: dict[str, Text] = {}
    """Resources above which a pod is slowed down (cpu) or killed (memory)."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a pod, asked for as ``nvidia.com/gpu``; a training needs one for each of ``training.processes_per_node``."""
    node_selector: dict[str, Text] = {}
    tolerations: list[Toleration] = []
    affinity: dict[str, Any] = {}
    """Kubernetes' own ``affinity`` object."""
    priority_class: str | None = None
    service_account: str | None = None
    """Service account, for example one with a cloud role. Its token is only mounted when it is named."""
    runtime_class: str | None = None
    """RuntimeClass, where GPUs need one."""
    run_as_user: int | None = Field(default=1000, ge=1)
    """Null leaves user and group to the cluster, as OpenShift wants it."""
    run_as_group: int | None = Field(default=1000, ge=1)
    fs_group: int | None = Field(default=1000, ge=1)
    """Group that claims are made writable for; null leaves them as they are."""
    env: dict[str, Text] = {}
    """Plain variables. Passwords, keys and tokens belong into ``secret_env``."""
    secret_env: dict[str, SecretKey] = {}
    """Variables whose value is a key of a Secret."""
    env_from_secrets: list[str] = []
    """Secrets whose keys all become variables."""
    volumes: list[Volume] = []
    shared_memory: str = "1Gi"
    """Size of ``/dev/shm``; it counts as memory of the pod."""
    scratch: str = "20Gi"
    """Most that a pod may write to ``/tmp``, its only writable place beside the volumes; above it is evicted."""
    labels: dict[str, str] = {}
    """Further labels; those of project, stage, DAG and run are always there."""
    annotations: dict[str, str] = {}
    grace_seconds: int = Field(default=30, ge=0)
    """Time between SIGTERM and SIGKILL when a pod is deleted."""

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        if secret := [name for name, value in env.items() if SECRET_NAME.search(name) or SECRET_VALUE.search(value)]:
            raise ValueError(f"variables that are no secrets; give {', '.join(secret)} by secret_env")
        return env


StageName = Literal[
    "ingest",
    "preprocess",
    "train",
    "index",
    "evaluate",
    "gate",
    "register",
    "approve",
    "deploy",
    "verify",
    "evidence",
    "promote",
    "drift",
    "decide",
    "predict",
]


class KubernetesRuntime(Frozen):
    """Each stage is a pod; a training with ``training.nodes`` is as many pods, and still one task."""

    kind: Literal["kubernetes"] = "kubernetes"
    pod: PodSettings
    """The pods of all stages."""
    stages: dict[StageName, PodSettings] = {}
    """What is different for the pods of a stage: the fields that are given here replace those of ``pod``."""
    namespace: str | None = None
    """Null means the namespace of the Airflow connection, else ``default``."""
    kubernetes_conn_id: str = "kubernetes_default"
    """Airflow connection of the cluster; without it ``KUBECONFIG`` or the worker's own cluster."""
    queue: str | None = None
    """Kueue LocalQueue that admits the pods of a stage together; null leaves them to the scheduler."""
    schedule_timeout: int = Field(default=600, ge=1)
    """Seconds that the pods of a stage may wait for room."""
    startup_timeout: int = Field(default=600, ge=1)
    """Seconds from there until all run: pulling the image, mounting the volumes."""
    gang_patience: int = Field(default=30, ge=1)
    """Seconds that pods with room wait for the others of their gang, before all are removed and tried again later."""
    restarts: int = Field(default=3, ge=0)
    """How often a try of the task starts pods again that were lost (preempted, evicted, drained, out of memory)."""
    deferrable: bool = True
    """Wait in the triggerer rather than in a worker's slot; ``airflow dags test`` always waits in the task."""

    @model_validator(mode="after")
    def _image_given(self) -> KubernetesRuntime:
        if not self.pod.image:
            raise ValueError("pod.image: the image that the stages run in")
        return self

    def pod_of(self, stage: str) -> PodSettings:
        """The settings of a stage's pods: ``pod``, with what ``stages`` replaces."""
        own = next((settings for name, settings in self.stages.items() if name == stage), None)
        return self.pod.model_copy(update={name: getattr(own, name) for name in own.model_fields_set}) if own else self.pod


Runtime = Annotated[ProcessRuntime | KubernetesRuntime, Field(discriminator="kind")]
