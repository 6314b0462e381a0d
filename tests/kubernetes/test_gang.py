"""A training over several pods of a real cluster: one task, one MLflow run, one model, whatever happens to its pods."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from cv_factory_ops import storage
from tests.kubernetes.conftest import PSEUDONYM_KEY as KEY
from tests.kubernetes.conftest import Seen, context, kill_worker_when, names, until

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
LONG = {"epochs": 80, "batch_size": 4, "processes_per_node": 1, "nodes": 2, "learning_rate": 0.003}
Train = Callable[..., Any]


@pytest.fixture
def train(operators: ModuleType, pods_project: Callable[..., Path]) -> Train:
    """The operator of a training over two pods, its inputs prepared by pods too."""

    def build(s3: str = "", **settings: Any) -> Any:
        file = pods_project(**{"training": LONG} | settings)
        if s3:
            _add_env(file, {"AWS_ENDPOINT_URL_S3": s3, "AWS_DEFAULT_REGION": "us-east-1"})
        path = str(file)
        for name in ("Ingest", "Preprocess"):
            stage = getattr(operators, f"{name}Operator")(task_id=name.lower(), **_arguments(path))
            stage.execute(context(name.lower()))
        return operators.TrainOperator(task_id="train", **_arguments(path))

    return build


def test_two_pods_train_one_model(
    api: Any, namespace: str, train: Train, seen: Seen, shared: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record = train(training=LONG | {"epochs": 2}).execute(context("train"))
    assert record["world_size"] == 2
    told = "".join(capfd.readouterr())
    assert "[train] " in told
    assert "epoch 2/2: loss" in told
    first, second = sorted(
        (pod for pod in seen.pods.values() if "train" in pod.metadata.name), key=lambda pod: pod.metadata.name
    )
    assert [owner.uid for owner in second.metadata.owner_references] == [first.metadata.uid]
    assert second.metadata.labels["cv-factory/gang"] == first.metadata.name
    assert names(api, namespace) == []


@pytest.mark.parametrize("node", [0, pytest.param(1, marks=pytest.mark.proof)])
def test_lost_pod_is_replaced_in_the_same_try_and_the_same_mlflow_run(
    api: Any, namespace: str, train: Train, seen: Seen, shared: Path, undisturbed: str, mlflow_server: str, node: int
) -> None:
    operator = train()
    with _when(_checkpoint(shared).exists, lambda: api.delete_namespaced_pod(_gang(api, namespace)[node], namespace)):
        record = operator.execute(context("train"))
    assert _weights(shared) == undisturbed
    assert len([pod for pod in seen.pods.values() if "train" in pod.metadata.name]) == 4
    assert _runs(mlflow_server, shared) == [record["mlflow_run_id"]]
    assert names(api, namespace) == []


def test_killed_worker_and_retry_leave_one_set_of_pods(
    api: Any, namespace: str, train: Train, seen: Seen, shared: Path, undisturbed: str, mlflow_server: str
) -> None:
    operator = train()
    kill_worker_when(operator, lambda: _checkpoint(shared).exists())
    record = operator.execute(context("train", try_number=2))
    assert _weights(shared) == undisturbed
    assert len([pod for pod in seen.pods.values() if "train" in pod.metadata.name]) == 2
    assert _runs(mlflow_server, shared) == [record["mlflow_run_id"]]


@pytest.mark.proof
def test_pods_that_share_only_s3_train_together(
    api: Any, namespace: str, train: Train, bucket: str, s3_server: str, seen: Seen
) -> None:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "a key of the store"}
    api.create_namespaced_secret(namespace, {"metadata": {"name": "s3"}, "stringData": keys})
    root, keys = f"s3://{bucket}/root", {"env_from_secrets": ["s3"]}
    operator = train(storage=root, training=LONG | {"epochs": 60}, pod=keys, s3=s3_server)
    checkpoint = f"{root}/tiny/runs/tiny_training.manual__1/checkpoints/last.pt"
    with _when(lambda: storage.exists(checkpoint), lambda: api.delete_namespaced_pod(_gang(api, namespace)[0], namespace)):
        record = operator.execute(context("train"))
    assert record["bundle"] == f"{root}/tiny/runs/tiny_training.manual__1/train/bundle"
    assert record["world_size"] == 2
    assert "a key of the store" not in str(list(seen.pods.values()))
    assert not storage.exists(checkpoint)
    assert names(api, namespace) == []


def test_failing_rank_ends_all_with_its_reason(api: Any, namespace: str, train: Train) -> None:
    operator = train(training=LONG | {"learning_rate": 1e30})
    with pytest.raises(AirflowFailException, match=r"cvf train: training: the gradient became non-finite in epoch 1; lower"):
        operator.execute(context("train"))
    assert names(api, namespace) == []


def test_gang_without_room_for_all_holds_nothing(api: Any, namespace: str, train: Train, seen: Seen, one_gpu: None) -> None:
    operator = train(
        limits={"stages": {"train": {"gpus": 1}}, "gang_patience": 2, "schedule_timeout": 30}, training=LONG | {"epochs": 1}
    )
    with pytest.raises(AirflowException, match=r"cvf train: no room for 2 pods within 30 s .*: .*Insufficient nvidia.com/gpu"):
        operator.execute(context("train"))
    trained = [pod for pod in seen.pods.values() if "train" in pod.metadata.name]
    assert len(trained) >= 4, "the gang never made room"
    assert names(api, namespace) == []


@pytest.fixture
def one_gpu(api: Any) -> Iterator[None]:
    """The node says that it has one GPU; there is none behind it."""
    from kubernetes import client

    [node] = [item.metadata.name for item in api.list_node().items]
    place = "/status/capacity/nvidia.com~1gpu"
    own = client.CoreV1Api(client.ApiClient(header_name="Content-Type", header_value="application/json-patch+json"))
    own.patch_node_status(node, [{"op": "add", "path": place, "value": "1"}])
    until(lambda: (api.read_node(node).status.allocatable or {}).get("nvidia.com/gpu") == "1")
    yield
    own.patch_node_status(node, [{"op": "remove", "path": place}])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights that the training has when nothing happens to it: as local processes, without a cluster."""
    from cv_factory_ops.cli import main
    from tests.conftest import TINY

    home = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(home))
        patch.setenv("CVF_PSEUDONYM_KEY", KEY)
        patch.delenv("CVF_STORAGE", raising=False)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        (home / "project.yaml").write_text(yaml.safe_dump({**TINY, "training": LONG}))
        for name in ("ingest", "preprocess", "train"):
            assert main([name, "--config", str(home / "project.yaml"), "--run", f"{home}/{RUN}"]) == 0
    return _weights(home)


RUN = "storage/tiny/runs/tiny_training.manual__1"


def _arguments(path: str) -> dict[str, str]:
    return {"config": path, "data": "", "overrides": "{}", "runtime": "kubernetes"}


def _add_env(file: Path, env: dict[str, str]) -> None:
    tree = yaml.safe_load(file.read_text())
    tree["runtime"]["pod"]["env"] |= env
    file.write_text(yaml.safe_dump(tree))


def _weights(home: Path) -> str:
    return hashlib.sha256((home / RUN / "train" / "bundle" / "model.safetensors").read_bytes()).hexdigest()


def _checkpoint(home: Path) -> Path:
    return home / RUN / "checkpoints" / "last.pt"


def _gang(api: Any, namespace: str) -> list[str]:
    return sorted(name for name in names(api, namespace) if "-train-" in name)


def _runs(server: str, home: Path) -> list[str]:
    """Ids of the MLflow runs of the training."""
    import mlflow

    client = mlflow.MlflowClient(server)
    experiment = client.get_experiment_by_name("tiny")
    found = client.search_runs([experiment.experiment_id], f"tags.`cvf.run` = '{(home / RUN).as_uri()}'")
    return [run.info.run_id for run in found]


@contextmanager
def _when(condition: Callable[[], Any], action: Callable[[], Any]) -> Iterator[None]:
    """Do something in another thread once a condition is true; it must have become so by the end."""
    done: list[Any] = []

    def work() -> None:
        until(condition)
        done.append(action())

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    assert done
