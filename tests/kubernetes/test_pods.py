"""A stage as one pod of a real cluster: its record, its settings, what is wrong with them, and pods that go away."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from local.cluster import context
from tests.kubernetes.conftest import PSEUDONYM_KEY, Seen, kill_worker_when, names, phases, until

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
Stage = Callable[..., Any]
SLOW = '{"data.source.patients": 1500}'


@pytest.fixture
def stage(operators: ModuleType, pods_project: Callable[..., Path]) -> Stage:
    """``stage("Ingest", pod={...})``: that stage's operator, its project in the cluster."""

    def build(name: str, overrides: str = "{}", arguments: dict[str, Any] | None = None, **settings: Any) -> Any:
        path = pods_project(**settings)
        given = {"config": str(path), "data": "", "overrides": overrides, "runtime": "kubernetes"} | (arguments or {})
        return getattr(operators, f"{name}Operator")(task_id=name.lower(), **given)

    return build


def test_stage_runs_in_a_pod_and_its_record_is_returned(
    api: Any, namespace: str, stage: Stage, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    record = stage("Ingest").execute(context("ingest"))
    assert record["accepted"] > 0
    assert json.loads((Path(os.environ["CVF_HOME"]) / _result("ingest")).read_text())["record"] == record
    [pod] = seen.pods.values()
    labels = pod.metadata.labels
    wanted = {"project": "tiny", "stage": "ingest", "dag": "tiny_training", "run": "manual__1"}
    assert {key: labels[f"cv-factory/{key}"] for key in wanted} == wanted
    assert [container.name for container in pod.spec.containers] == ["ingest"]
    assert names(api, namespace) == []
    told = capfd.readouterr()
    assert (told.out + told.err).count("generating phantoms of 60 patients") == 1
    assert PSEUDONYM_KEY not in told.out + told.err
    assert PSEUDONYM_KEY not in str(pod)


def test_finished_pod_of_a_killed_worker_is_not_paid_twice_and_its_log_is_not_lost(
    api: Any, namespace: str, stage: Stage, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    operator = stage("Ingest")
    kill_worker_when(operator, lambda: names(api, namespace))
    until(lambda: [pod.status.phase for pod in api.list_namespaced_pod(namespace).items] == ["Succeeded"])
    capfd.readouterr()
    assert operator.execute(context("ingest", try_number=2))["accepted"] > 0
    assert len(seen.pods) == 1
    assert names(api, namespace) == []
    assert "".join(capfd.readouterr()).count("generating phantoms of 60 patients") == 1


def test_running_pod_of_a_killed_worker_is_rejoined(
    api: Any, namespace: str, stage: Stage, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    operator = stage("Ingest", SLOW)
    kill_worker_when(operator, lambda: phases(api, namespace) == ["Running"])
    record = operator.execute(context("ingest", try_number=2))
    assert record["accepted"] > 1500
    assert len(seen.pods) == 1
    assert "rejoining pod" in "".join(capfd.readouterr())


def test_failed_pod_of_a_killed_worker_makes_room_for_a_new_one(api: Any, namespace: str, stage: Stage, seen: Seen) -> None:
    broken = stage("Preprocess", arguments={"run": str(Path(os.environ["CVF_HOME"]) / "storage" / "empty")})
    kill_worker_when(broken, lambda: names(api, namespace))
    until(lambda: phases(api, namespace) == ["Failed"])
    with pytest.raises(AirflowFailException, match=r"cvf preprocess: .*ingest/result.json: is not there"):
        broken.execute(context("preprocess", try_number=2))
    assert len(seen.pods) == 2
    assert names(api, namespace) == []


def test_storage_may_lie_on_a_claim(api: Any, namespace: str, stage: Stage, shared: Path, claim: Path) -> None:
    operator = stage("Ingest", storage=str(claim / "storage"))
    _merge_pod(Path(operator.config), {"volumes": [{"kind": "claim", "claim": "storage", "path": str(claim)}]})
    assert operator.execute(context("ingest"))["accepted"] > 0
    assert (claim / "storage" / "tiny" / "runs" / "tiny_training.manual__1" / "ingest" / "result.json").exists()


@pytest.fixture
def claim(api: Any, namespace: str, shared: Path) -> Iterator[Path]:
    """A bound claim named ``storage``, whose volume is a folder of this machine."""
    folder = shared / "claim"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    size, once = {"storage": "1Gi"}, {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    volume = {"hostPath": {"path": str(folder)}, "capacity": size, "claimRef": {"name": "storage", "namespace": namespace}}
    api.create_persistent_volume({"metadata": {"name": namespace}, "spec": volume | once})
    wanted = {"resources": {"requests": size}, "volumeName": namespace}
    api.create_namespaced_persistent_volume_claim(namespace, {"metadata": {"name": "storage"}, "spec": wanted | once})
    until(lambda: api.read_namespaced_persistent_volume_claim("storage", namespace).status.phase == "Bound")
    yield folder
    api.delete_namespaced_persistent_volume_claim("storage", namespace)
    api.delete_persistent_volume(namespace)


def test_evicted_pod_is_started_again_in_the_same_try(
    api: Any, namespace: str, stage: Stage, seen: Seen, capfd: pytest.CaptureFixture[str]
) -> None:
    evictor = threading.Thread(target=_evict_when_running, args=(api, namespace))
    evictor.start()
    record = stage("Ingest", SLOW).execute(context("ingest"))
    evictor.join()
    assert record["accepted"] > 1500
    assert len(seen.pods) == 2
    assert "starting again (1 of 3)" in "".join(capfd.readouterr())


def test_pod_out_of_memory_says_so(api: Any, namespace: str, stage: Stage, seen: Seen) -> None:
    small = {"requests": {"memory": "40Mi"}, "limits": {"memory": "40Mi"}}
    with pytest.raises(AirflowException, match="cvf ingest: node 0: the pod was ended: OOMKilled"):
        stage("Ingest", pod=small, limits={"restarts": 1}).execute(context("ingest"))
    assert len(seen.pods) == 2
    assert names(api, namespace) == []


WRONG = {
    "queue": ({}, {"queue": "gpus"}, "runtime.queue: 'gpus' given; this cluster has no Kueue"),
    "claim": (
        {"volumes": [{"kind": "claim", "claim": "nowhere", "path": "/data"}]},
        {"schedule_timeout": 3},
        'no room for 1 pod within 3 s .*persistentvolumeclaim "nowhere" not found',
    ),
    "gpus": ({"gpus": 4}, {"schedule_timeout": 3}, "no room for 1 pod within 3 s .*Insufficient nvidia.com/gpu"),
    "node": (
        {"node_selector": {"disk": "fast"}},
        {"schedule_timeout": 3},
        "no room for 1 pod within 3 s .*node.* didn't match Pod's node affinity|no room for 1 pod within 3 s .*node selector",
    ),
    "image": ({"image": "localhost:1/nothing:1"}, {}, "1 pod cannot start: ErrImagePull: .*localhost:1/nothing:1"),
    "never": ({"image": "nothing:1", "image_pull_policy": "Never"}, {}, "1 pod cannot start: ErrImageNeverPull"),
    "secret": (
        {"secret_env": {"CVF_PSEUDONYM_KEY": {"secret": "lost", "key": "x"}}},
        {"startup_timeout": 3},
        'not started within 3 s .*CreateContainerConfigError: secret "lost" not found',
    ),
    "volume": (
        {"volumes": [{"kind": "secret", "secret": "lost", "path": "/keys"}]},
        {"startup_timeout": 3},
        'not started within 3 s .*FailedMount: .*secret "lost" not found',
    ),
    "quantity": ({"requests": {"cpu": "much"}}, {}, "Kubernetes: .*quantities must match"),
    "priority": ({"priority_class": "first"}, {}, "Kubernetes: .*no PriorityClass with name first was found"),
    "account": ({"service_account": "nobody"}, {}, 'Kubernetes: .*serviceaccount "nobody" not found'),
    "command": ({"env": {"PATH": "/nowhere"}}, {}, 'cvf ingest: .*executable file not found|"cvf": executable file not found'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_setting_is_one_clear_line_and_leaves_no_pod(api: Any, namespace: str, stage: Stage, case: str) -> None:
    pod, limits, line = WRONG[case]
    operator = stage("Ingest", limits=limits)
    _merge_pod(Path(operator.config), pod)
    with pytest.raises(AirflowException, match=line) as error:
        operator.execute(context("ingest"))
    assert "\n" not in str(error.value)
    assert names(api, namespace) == []


def test_pods_that_do_not_start_are_removed_also_by_who_must_not_read_events(
    api: Any, namespace: str, stage: Stage, other_cluster: Callable[..., dict[str, str]], may_run_pods: str
) -> None:
    limits = other_cluster(user={"token": may_run_pods}) | {"startup_timeout": 3}
    operator = stage("Ingest", limits=limits)
    _merge_pod(Path(operator.config), {"volumes": [{"kind": "secret", "secret": "lost", "path": "/keys"}]})
    with pytest.raises(AirflowException, match="not started within 3 s"):
        operator.execute(context("ingest"))
    assert names(api, namespace) == []


def test_pod_of_other_settings_is_not_taken_for_this_task(api: Any, namespace: str, stage: Stage, seen: Seen) -> None:
    kill_worker_when(stage("Ingest"), lambda: names(api, namespace))
    until(lambda: phases(api, namespace) == ["Succeeded"])
    record = stage("Ingest", '{"data.source.patients": 80}').execute(context("ingest", try_number=2))
    assert record["accepted"] > 80
    assert len(seen.pods) == 2


def test_record_that_this_worker_cannot_read_is_one_line(operators: ModuleType, shared: Path) -> None:
    place = (shared / "nowhere" / "result.json").as_uri()
    with pytest.raises(
        AirflowException, match=r"the stage is done, but this Airflow worker cannot read its record \(FileNotFound"
    ) as e:
        operators._read_record(place)
    assert "\n" not in str(e.value)


def test_unknown_queue_is_named(namespace: str, stage: Stage, kueue: None) -> None:
    """Kueue's kind without its controller, of which there is no build for so old a cluster."""
    line = f"runtime.queue: 'gpus' given; allowed in namespace {namespace}: none is there"
    with pytest.raises(AirflowFailException, match=line):
        stage("Ingest", limits={"queue": "gpus"}).execute(context("ingest"))


def test_pods_of_a_queue_carry_what_kueue_admits_them_by(
    namespace: str, stage: Stage, seen: Seen, kueue: None, other_cluster: Callable[..., dict[str, str]], may_run_pods: str
) -> None:
    """Who must not look at queues leaves it to Kueue to know them."""
    limits = other_cluster(user={"token": may_run_pods}) | {"queue": "gpus"}
    assert stage("Ingest", limits=limits).execute(context("ingest"))["accepted"] > 0
    [pod] = seen.pods.values()
    assert pod.metadata.labels["kueue.x-k8s.io/queue-name"] == "gpus"
    assert pod.metadata.labels["kueue.x-k8s.io/pod-group-name"] == pod.metadata.name
    assert pod.metadata.annotations["kueue.x-k8s.io/pod-group-total-count"] == "1"


@pytest.fixture
def kueue(api: Any) -> Iterator[None]:
    """A cluster that knows what a LocalQueue is."""
    from kubernetes import client

    definitions, name = client.ApiextensionsV1Api(), "localqueues.kueue.x-k8s.io"
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    kind = {"plural": "localqueues", "singular": "localqueue", "kind": "LocalQueue"}
    version = {"name": "v1beta1", "served": True, "storage": True, "schema": schema}
    spec = {"group": "kueue.x-k8s.io", "names": kind, "scope": "Namespaced", "versions": [version]}
    about = {"name": name, "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"}}
    definitions.create_custom_resource_definition({"metadata": about, "spec": spec})
    groups = client.ApisApi()
    until(lambda: "kueue.x-k8s.io" in [group.name for group in groups.get_api_versions().groups])
    yield
    definitions.delete_custom_resource_definition(name)
    until(lambda: "kueue.x-k8s.io" not in [group.name for group in groups.get_api_versions().groups])


@pytest.fixture
def may_run_pods(api: Any, namespace: str) -> str:
    """The token of an account that may do with pods what the operator does, and nothing else."""
    from kubernetes import client

    rules = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["create", "get", "list", "delete"]},
        {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    ]
    access, about = client.RbacAuthorizationV1Api(), {"metadata": {"name": "airflow"}}
    if any(item.metadata.name == "airflow" for item in api.list_namespaced_service_account(namespace).items):
        return _token_of(api, namespace, "airflow")
    api.create_namespaced_service_account(namespace, about)
    access.create_namespaced_role(namespace, about | {"rules": rules})
    subject = {"kind": "ServiceAccount", "name": "airflow", "namespace": namespace}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "airflow"}
    access.create_namespaced_role_binding(namespace, about | {"subjects": [subject], "roleRef": role})
    return _token_of(api, namespace, "airflow")


def _token_of(api: Any, namespace: str, account: str) -> str:
    def found() -> list[Any]:
        secrets = api.list_namespaced_secret(namespace, field_selector="type=kubernetes.io/service-account-token").items
        return [item for item in secrets if item.metadata.annotations["kubernetes.io/service-account.name"] == account]

    [secret] = until(found)
    return base64.b64decode(secret.data["token"]).decode()


def test_quota_is_named_and_tried_again_later(api: Any, namespace: str, stage: Stage) -> None:
    api.create_namespaced_resource_quota(namespace, {"metadata": {"name": "none"}, "spec": {"hard": {"pods": "0"}}})
    try:
        quota = lambda: api.read_namespaced_resource_quota("none", namespace).status.hard  # noqa: E731
        until(quota)
        with pytest.raises(AirflowException, match=r"Kubernetes: .*exceeded quota: none") as error:
            stage("Ingest").execute(context("ingest"))
    finally:
        api.delete_namespaced_resource_quota("none", namespace)
    assert not isinstance(error.value, AirflowFailException)


def test_missing_right_is_named(api: Any, namespace: str, stage: Stage, other_cluster: Callable[..., dict[str, str]]) -> None:
    limits = other_cluster(user={"token": _token_of(api, namespace, "default")})
    with pytest.raises(AirflowFailException, match=r"Kubernetes: pods .*is forbidden: User .*cannot") as error:
        stage("Ingest", limits=limits).execute(context("ingest"))
    assert "\n" not in str(error.value)


def test_unreachable_cluster_is_one_line(stage: Stage, other_cluster: Callable[..., dict[str, str]]) -> None:
    limits = other_cluster(cluster={"server": "https://127.0.0.1:9"})
    with pytest.raises(AirflowException, match="Kubernetes: does not answer") as error:
        stage("Ingest", limits=limits).execute(context("ingest"))
    assert "\n" not in str(error.value)


@pytest.fixture
def other_cluster(shared: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """An Airflow connection whose kubeconfig differs in a user's or a cluster's fields."""

    def connect(**changed: dict[str, str]) -> dict[str, str]:
        config = yaml.safe_load(Path(os.environ["KUBECONFIG"]).read_text())
        for part, fields in changed.items():
            config[f"{part}s"][0][part] |= fields
        (shared / "kubeconfig").write_text(yaml.safe_dump(config))
        extra = {"kube_config_path": str(shared / "kubeconfig")}
        monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({"conn_type": "kubernetes", "extra": extra}))
        return {"kubernetes_conn_id": "other"}

    return connect


def test_cancelled_task_leaves_no_pod(api: Any, namespace: str, stage: Stage) -> None:
    with pytest.raises(AirflowException, match="told to stop"):
        _execute_and_terminate(stage("Ingest", SLOW), context("ingest", state="failed"), api, namespace)
    assert names(api, namespace) == []


def test_pod_of_a_worker_that_must_go_runs_on_and_is_rejoined(api: Any, namespace: str, stage: Stage, seen: Seen) -> None:
    operator = stage("Ingest", SLOW)
    with pytest.raises(AirflowException, match="told to stop; a retry rejoins"):
        _execute_and_terminate(operator, context("ingest", state="running"), api, namespace)
    assert len(names(api, namespace)) == 1
    assert operator.execute(context("ingest", try_number=2))["accepted"] > 1500
    assert len(seen.pods) == 1


def _execute_and_terminate(operator: Any, given: dict[str, Any], api: Any, namespace: str) -> None:
    """Run a task, and once its pod runs do what Airflow's SIGTERM handler does."""
    before = signal.signal(signal.SIGTERM, lambda *_: operator.on_kill())

    def terminate() -> None:
        until(lambda: phases(api, namespace) == ["Running"])
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    try:
        operator.execute(given)
    finally:
        thread.join()
        signal.signal(signal.SIGTERM, before)


def _evict_when_running(api: Any, namespace: str) -> None:
    from kubernetes import client

    until(lambda: phases(api, namespace) == ["Running"])
    [name] = names(api, namespace)
    body = client.V1Eviction(api_version="policy/v1beta1", kind="Eviction", metadata={"name": name, "namespace": namespace})
    api.create_namespaced_pod_eviction(name, namespace, body)


def _merge_pod(path: Path, pod: dict[str, Any]) -> None:
    tree = yaml.safe_load(path.read_text())
    settings = tree["runtime"]["pod"]
    for name, value in pod.items():
        match value:
            case dict() if name != "requests":
                settings[name] = settings.get(name, {}) | value
            case list():
                settings[name] = settings.get(name, []) + value
            case _:
                settings[name] = value
    path.write_text(yaml.safe_dump(tree))


def _result(stage: str) -> str:
    return f"storage/tiny/runs/tiny_training.manual__1/{stage}/result.json"
