"""From a project's settings to a pod's manifest, without a cluster."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.runtime import KubernetesRuntime, PodSettings, StageName
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.stage import STAGES
from tests.conftest import TINY

KEY = {"CVF_PSEUDONYM_KEY": {"secret": "keys", "key": "pseudonym"}}
S3 = {"storage": "s3://bucket/root", "mlflow": {"tracking_uri": "http://mlflow:5000"}}


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Airflow writes its configuration where this points at its first import."""
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))


def project(pod: dict[str, Any] | None = None, **sections: Any) -> ProjectConfig:
    runtime = {"kind": "kubernetes", "pod": {"image": "trainer:1", "secret_env": KEY} | (pod or {})}
    return ProjectConfig.model_validate({**TINY, **S3, "runtime": runtime, **sections})


def manifest(config: ProjectConfig, stage: str = "train") -> dict[str, Any]:
    from cv_factory_airflow.manifest import manifest

    assert isinstance(config.runtime, KubernetesRuntime)
    return manifest(config, config.runtime, stage, "cvf-tiny", ["cvf", stage], "project: tiny", {"dag": "d", "run": "r"})


def test_restricted_pod_security_policy_admits_the_defaults() -> None:
    """Every rule of the profile: https://kubernetes.io/docs/concepts/security/pod-security-standards/"""
    spec = manifest(project())["spec"]
    [container] = spec["containers"]
    own, security = container["securityContext"], spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] != 0
    assert security["seccompProfile"]["type"] == "RuntimeDefault"
    assert own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert "privileged" not in own
    assert {"hostNetwork", "hostPID", "hostIPC"} & set(spec) == set()
    assert all("hostPort" not in port for port in container.get("ports", []))
    allowed = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    assert {kind for volume in spec["volumes"] for kind in volume if kind != "name"} <= allowed
    assert own["readOnlyRootFilesystem"] is True
    assert spec["automountServiceAccountToken"] is False


def test_settings_of_a_stage_replace_those_of_all() -> None:
    stages = {"train": {"gpus": 2, "node_selector": {"gpu": "a100"}}}
    config = project(runtime={"kind": "kubernetes", "pod": {"image": "trainer:1", "requests": {"cpu": "2"}}, "stages": stages})
    train, gate = (manifest(config, stage)["spec"] for stage in ("train", "gate"))
    assert train["containers"][0]["resources"] == {"requests": {"cpu": "2"}, "limits": {"nvidia.com/gpu": "2"}}
    assert gate["containers"][0]["resources"] == {"requests": {"cpu": "2"}, "limits": {}}
    assert (train["nodeSelector"], gate["nodeSelector"]) == ({"gpu": "a100"}, {})
    assert set(get_args(StageName)) == set(STAGES)


def test_every_setting_reaches_the_manifest() -> None:
    pod = {
        "image_pull_secrets": ["registry"],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "seconds": 60}],
        "affinity": {"nodeAffinity": {}},
        "priority_class": "training",
        "service_account": "trainer",
        "env": {"NCCL_DEBUG": "WARN"},
        "env_from_secrets": ["mlflow"],
        "volumes": [
            {"kind": "claim", "claim": "data", "path": "/data", "sub_path": "x", "read_only": True},
            {"kind": "secret", "secret": "certificates", "path": "/certificates"},
        ],
        "shared_memory": "8Gi",
        "scratch": "50Gi",
        "labels": {"team": "radiology"},
        "annotations": {"note": "x"},
    }
    made = manifest(project(pod))
    spec, [container] = made["spec"], made["spec"]["containers"]
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    assert spec["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 60}
    ]
    assert (spec["affinity"], spec["priorityClassName"]) == ({"nodeAffinity": {}}, "training")
    assert (spec["serviceAccountName"], spec["automountServiceAccountToken"]) == ("trainer", True)
    env = {item["name"]: item for item in container["env"]}
    assert env["NCCL_DEBUG"]["value"] == "WARN"
    assert env["CVF_PSEUDONYM_KEY"]["valueFrom"] == {"secretKeyRef": {"name": "keys", "key": "pseudonym"}}
    assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert volumes["volume-0"] == {"persistentVolumeClaim": {"claimName": "data", "readOnly": True}}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    assert volumes["scratch"]["emptyDir"] == {"sizeLimit": "50Gi"}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/data"] == {"name": "volume-0", "mountPath": "/data", "readOnly": True, "subPath": "x"}
    assert mounts["/certificates"]["readOnly"] is True
    assert made["metadata"]["labels"] | {"team": "radiology", "cv-factory/run": "r"} == made["metadata"]["labels"]
    assert made["metadata"]["annotations"] == {"note": "x", "cv-factory/project": "project: tiny"}


WRITTEN = {
    "AWS_SECRET_ACCESS_KEY": "hunter2",
    "MLFLOW_TRACKING_PASSWORD": "hunter2",
    "DB_PASS": "hunter2",
    "WANDB_APIKEY": "hunter2",
    "HF_TOKEN": "hunter2",
    "DATABASE_URL": "postgres://user:hunter2@host/db",
}


@pytest.mark.parametrize("name", WRITTEN)
def test_secret_in_plain_sight_is_refused_and_not_repeated(name: str, tmp_path: Path) -> None:
    from cv_factory_ops.config import load

    path = tmp_path / "project.yaml"
    pod = f"{{image: a, env: {{{name}: '{WRITTEN[name]}'}}}}"
    path.write_text(
        f"project: tiny\nlabels: [a, b]\ndata: {{source: {{kind: phantoms}}}}\nruntime: {{kind: kubernetes, pod: {pod}}}"
    )
    with pytest.raises(ConfigError, match=f"give {name} by secret_env") as error:
        load(path)
    assert "hunter2" not in str(error.value)


def test_secret_in_the_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    from cv_factory_ops.config import load

    path = tmp_path / "project.yaml"
    pod = "{image: a, secret_env: {MLFLOW_TRACKING_PASSWORD: hunter2}}"
    path.write_text(
        f"project: tiny\nlabels: [a, b]\ndata: {{source: {{kind: phantoms}}}}\nruntime: {{kind: kubernetes, pod: {pod}}}"
    )
    with pytest.raises(ConfigError, match=r"secret_env.MLFLOW_TRACKING_PASSWORD: a value given") as error:
        load(path)
    assert "hunter2" not in str(error.value)


def test_numbers_and_harmless_names_are_taken() -> None:
    pod = PodSettings.model_validate({"image": "a", "requests": {"cpu": 16}, "env": {"TOKENIZERS_PARALLELISM": 1}})
    assert (pod.requests["cpu"], pod.env["TOKENIZERS_PARALLELISM"]) == ("16", "1")


def test_image_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"pod.image: the image that the stages run in"):
        KubernetesRuntime(pod=PodSettings())


UNREACHABLE = {
    "storage": ({"storage": "/somewhere"}, {}, "train", "storage: file:///somewhere/.* lies on no volume of the pods"),
    "mlflow": ({"mlflow": {"tracking_uri": "sqlite:///var/x.db"}}, {}, "train", "mlflow.tracking_uri: sqlite:.* no volume"),
    "endpoint": ({}, {}, "deploy", "deploy.url: http://127.0.0.1:8765 is another machine to a pod"),
    "endpoint, later": ({}, {}, "promote", "deploy.url: http://127.0.0.1:8765 is another machine to a pod"),
    "password": ({"mlflow": {"tracking_uri": "http://u:p@mlflow"}}, {}, "train", "mlflow.tracking_uri: holds a password"),
    "data": ({"data": {"source": {"kind": "npz", "path": "a.npz"}}}, {}, "ingest", "data.source.path: a.npz lies on no volume"),
    "masks": (
        {
            "data": {
                "source": {"kind": "files", "path": "s3://b/images", "labels": "s3://b/labels.csv", "masks": "/elsewhere/masks"}
            }
        },
        {},
        "ingest",
        "data.source.masks: /elsewhere/masks lies on no volume",
    ),
    "weights": (
        {"model": {"kind": "resnet", "weights": "/elsewhere/w"}},
        {},
        "train",
        "model.weights: /elsewhere/w lies on no",
    ),
    "weights of the embedding": (
        {"embedding": {"kind": "vit", "weights": "/elsewhere/w"}},
        {},
        "train",
        "embedding.weights: /elsewhere/w lies on no volume",
    ),
    "gpus": ({}, {"gpus": 2}, "train", "training.processes_per_node: 1 given, the pods have gpus: 2"),
    "key": ({}, {"secret_env": {}}, "ingest", "runtime.pod.secret_env: CVF_PSEUDONYM_KEY is missing"),
}


@pytest.mark.parametrize("case", UNREACHABLE)
def test_what_a_pod_cannot_reach_is_refused_before_it_starts(case: str) -> None:
    from cv_factory_ops.reach import require_reachable

    sections, pod, stage, line = UNREACHABLE[case]
    config = project(pod, **sections)
    assert isinstance(config.runtime, KubernetesRuntime)
    with pytest.raises(ConfigError, match=line):
        require_reachable(config, config.runtime, stage, f"{config.root}/runs/x")


def test_what_lies_on_a_volume_is_reachable() -> None:
    from cv_factory_ops.reach import require_reachable

    volume = {"kind": "claim", "claim": "storage", "path": "/mnt/storage"}
    config = project({"volumes": [volume]}, storage="/mnt/storage", mlflow={"tracking_uri": "sqlite:////mnt/storage/m.db"})
    assert isinstance(config.runtime, KubernetesRuntime)
    require_reachable(config, config.runtime, "train", f"{config.root}/runs/x")


def test_names_are_valid_short_and_the_tasks_own() -> None:
    from cv_factory_airflow.pods import pod_name

    name = pod_name(
        "a_project_with_quite_a_long_name_indeed_42", "preprocess", "dag", "manual__2026-01-01T00:00:00+00:00", "t", "-1"
    )
    assert len(f"{name}-99") <= 63
    assert name == name.lower()
    assert name.replace("-", "").isalnum()
    others = {
        pod_name("tiny", "train", *given) for given in (("d", "r", "t", "0"), ("d", "r", "t", "1"), ("d", "r2", "t", "0"))
    }
    assert len(others) == 3


def ended(node: int, code: int | None, reason: str = "Error", message: str = "", seconds: int = 0) -> Any:
    from cv_factory_airflow.gang import Ending

    return Ending(node, code, reason, message, datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds))


@pytest.mark.parametrize(
    ("endings", "told"),
    [
        ([ended(0, 75, message="lost a peer"), ended(1, 2, message="cvf train: wrong", seconds=9)], "wrong"),
        ([ended(0, 1, message="cvf train: unexpected"), ended(1, 137, "OOMKilled", seconds=9)], "OOMKilled"),
        ([ended(0, 75, message="lost a peer"), ended(1, 1, message="cvf train: unexpected", seconds=9)], "unexpected"),
        ([ended(0, 75, message="lost a peer"), ended(1, 75, message="MLflow does not answer", seconds=9)], "MLflow"),
        ([ended(0, 75, message="lost a peer"), ended(1, None, "Evicted", "low on memory", 9)], "Evicted: low on memory"),
        ([ended(0, 3, message="first", seconds=1), ended(1, 3, message="second", seconds=2)], "first"),
    ],
)
def test_the_most_telling_ending_is_the_reason(endings: list[Any], told: str) -> None:
    assert told in "\n".join(min(endings, key=lambda ending: ending.rank).lines("train"))


def test_log_lines_are_told_once_and_the_record_not_at_all() -> None:
    from cv_factory_airflow.gang import Watch

    watch = Watch(1)
    stamp = "2026-01-01T00:00:{:02d}.{}Z {}".format
    first = [stamp(1, "1", "one"), stamp(2, "1", "two"), stamp(2, "2", '{"stage":"train"}')]
    assert list(watch.new_lines(0, first)) == ["one", "two"]
    assert list(watch.new_lines(0, [*first, stamp(2, "3", "three")])) == ["three"]


def pod(
    node: int,
    phase: str = "Pending",
    placed: float | None = None,
    created: float = 0,
    since: float = 0,
    deleted: float | None = None,
    containers: dict[str, int | None] | None = None,
) -> Any:
    """A pod as the API describes it; times in seconds before now, containers by their exit codes."""
    now = datetime.now(UTC)
    condition = SimpleNamespace(
        type="PodScheduled",
        status="True" if placed is not None else "False",
        last_transition_time=now - timedelta(seconds=placed or 0),
    )
    statuses = [
        SimpleNamespace(
            name=name,
            state=SimpleNamespace(
                waiting=None,
                terminated=None
                if code is None
                else SimpleNamespace(exit_code=code, reason="Error" if code else "Completed", message="", finished_at=now),
            ),
        )
        for name, code in (containers or {}).items()
    ]
    return SimpleNamespace(
        metadata=SimpleNamespace(
            labels={"cv-factory/node": str(node), "cv-factory/stage": "train"},
            deletion_timestamp=now - timedelta(seconds=deleted) if deleted is not None else None,
            annotations={"cv-factory/waiting-since": str(now.timestamp() - since)},
            creation_timestamp=now - timedelta(seconds=created),
        ),
        status=SimpleNamespace(phase=phase, conditions=[condition], container_statuses=statuses, reason=None, message=None),
    )


LIMITS = {"nodes": 2, "schedule_timeout": 60, "startup_timeout": 30, "patience": 20}
MOMENTS: dict[str, tuple[list[dict[str, Any]], bool | str]] = {
    "all run": ([{"phase": "Running", "placed": 1}, {"phase": "Running", "placed": 1}], True),
    "none has room": ([{}, {}], False),
    "none has room for long": ([{"since": 99}, {"since": 99}], "room"),
    "one has room": ([{"placed": 5, "created": 5}, {"created": 5}], False),
    "one has room for long": ([{"placed": 50, "created": 50}, {"created": 50}], "retreat"),
    "one does not start": ([{"placed": 50}, {"phase": "Running", "placed": 50}], "start"),
    "one has failed": ([{"phase": "Failed", "placed": 50}, {"phase": "Running", "placed": 50}], True),
    "one is gone": ([{"phase": "Running", "placed": 50}], True),
}


@pytest.mark.parametrize(
    ("fields", "over"),
    [
        ({"containers": {"train": None, "mesh": None}}, False),
        ({"containers": {"train": None, "mesh": 0}}, False),
        ({"containers": {"train": 1, "mesh": None}}, True),
        ({"containers": {"train": 0, "mesh": None}}, True),
        ({"containers": {"train": None}, "deleted": 5}, False),
        ({"containers": {"train": None}, "deleted": 100}, True),
    ],
)
def test_a_stage_is_over_when_its_own_container_is_or_its_machine_is_lost(fields: dict[str, Any], over: bool) -> None:
    from cv_factory_airflow.gang import Watch

    assert Watch(1).over([pod(0, "Running", 1, **fields)]) is over


@pytest.mark.parametrize("moment", MOMENTS)
def test_time_outs_count_from_the_pods_own_marks(moment: str) -> None:
    from cv_factory_airflow.gang import Limits, NotStarted, check_start

    given, state = MOMENTS[moment]
    pods = [pod(node, **fields) for node, fields in enumerate(given)]
    if isinstance(state, bool):
        assert check_start(pods, Limits(**LIMITS)) is state
        return
    with pytest.raises(NotStarted, match=state):
        check_start(pods, Limits(**LIMITS))
