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
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from tests.kubernetes.conftest import PSEUDONYM_KEY as KEY
from tests.kubernetes.conftest import Seen, context, kill_worker_when, names, until

pytestmark = pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
LONG = {"epochs": 12, "batch_size": 4, "processes_per_node": 1, "nodes": 2, "learning_rate": 0.003}
Train = Callable[..., Any]


@pytest.fixture
def train(operators: ModuleType, pods_project: Callable[..., Path]) -> Train:
    """The operator of a training over two pods, its inputs prepared by pods too."""

    def build(**settings: Any) -> Any:
        path = str(pods_project(**{"training": LONG} | settings))
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


@pytest.mark.parametrize("node", [0, 1])
def test_lost_pod_is_replaced_in_the_same_try_and_the_same_mlflow_run(
    api: Any, namespace: str, train: Train, seen: Seen, shared: Path, undisturbed: str, mlflow_server: str, node: int
) -> None:
    operator = train()
    with _after_epoch(shared, lambda: api.delete_namespaced_pod(_gang(api, namespace)[node], namespace)):
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


def test_failing_rank_ends_all_with_its_reason(api: Any, namespace: str, train: Train) -> None:
    operator = train(training=LONG | {"learning_rate": 1e30})
    with pytest.raises(AirflowFailException, match=r"cvf train: training: the gradient became non-finite in epoch 1; lower"):
        operator.execute(context("train"))
    assert names(api, namespace) == []


def test_gang_without_room_for_all_holds_nothing(api: Any, namespace: str, train: Train, seen: Seen, one_gpu: None) -> None:
    operator = train(
        limits={"stages": {"train": {"gpus": 1}}, "gang_patience": 2, "schedule_timeout": 15}, training=LONG | {"epochs": 1}
    )
    with pytest.raises(AirflowException, match=r"cvf train: no room for 2 pods within 15 s .*: .*Insufficient nvidia.com/gpu"):
        operator.execute(context("train"))
    trained = [pod for pod in seen.pods.values() if "train" in pod.metadata.name]
    assert len(trained) >= 4, "the gang never made room"
    assert names(api, namespace) == []


@pytest.fixture
def one_gpu(api: Any) -> Iterator[None]:
    """The node says that it has one GPU; there is none behind it."""
    [node] = [item.metadata.name for item in api.list_node().items]
    place = "/status/capacity/nvidia.com~1gpu"
    api.api_client.set_default_header("Content-Type", "application/json-patch+json")
    api.patch_node_status(node, [{"op": "add", "path": place, "value": "1"}])
    until(lambda: (api.read_node(node).status.allocatable or {}).get("nvidia.com/gpu") == "1")
    yield
    api.patch_node_status(node, [{"op": "remove", "path": place}])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights that the training has when nothing happens to it: as local processes, without a cluster."""
    import yaml

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
def _after_epoch(home: Path, action: Callable[[], Any]) -> Iterator[None]:
    """Do something in another thread once the first checkpoint is there."""
    done: list[Any] = []

    def work() -> None:
        until(lambda: _checkpoint(home).exists())
        done.append(action())

    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()
    assert done
