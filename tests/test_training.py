"""Training by real torchrun launches on gloo, with a real SQLite MLflow."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cv_factory_ops import registry, storage
from cv_factory_ops.bundle import Bundle, unpack
from cv_factory_ops.config import AugmentConfig, ProjectConfig, load
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.models import build
from cv_factory_ops.predictor import infer
from cv_factory_ops.records import PreprocessRecord, TrainRecord
from cv_factory_ops.stage import read_result, run_stage
from cv_factory_ops.training.data import augment
from cv_factory_ops.training.release import fit_pca

Project = Callable[..., Path]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with ``ingest`` and ``preprocess`` done, in the folder ``run`` of a home."""
    import yaml

    from tests.conftest import TINY

    home = tmp_path_factory.mktemp("prepared")
    (home / "project.yaml").write_text(yaml.safe_dump(TINY))
    environment = {**os.environ, "CVF_HOME": str(home), "CVF_PSEUDONYM_KEY": "a key for tests"}
    for stage in ("ingest", "preprocess"):
        command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", home / "project.yaml", "--run", home / "run"]
        subprocess.run(command, check=True, env=environment, capture_output=True)
    return home


@pytest.fixture
def run(prepared: Path, home: Path) -> str:
    """A copy of the prepared run for one test."""
    shutil.copytree(prepared / "run", home / "run")
    for name in ("ingest", "preprocess"):
        path = home / "run" / name / "result.json"
        path.write_text(path.read_text().replace(str(prepared), str(home)))
    return (home / "run").as_uri()


def start_training(path: Path, run: str, *settings: str) -> subprocess.Popen[str]:
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "cv_factory_ops.cli", "train", "--config", str(path), "--run", run, *overrides]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def weights(home: Path) -> str:
    return storage.sha256(home / "run" / "train" / "bundle" / "model.safetensors")


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def mlflow_runs(config: ProjectConfig, run: str) -> list[str]:
    client = registry.connect(config)
    experiment = client.get_experiment_by_name(config.project)
    return [found.info.run_id for found in client.search_runs([experiment.experiment_id], f"tags.`cvf.run` = '{run}'")]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_training_leaves_a_bundle_and_repeats_itself_exactly(project: Project, home: Path, run: str, processes: int) -> None:
    path = project(training={"epochs": 2, "batch_size": 8, "processes": processes, "ema": 0.9, "class_weights": True})
    done = start_training(path, run)
    output, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    record = TrainRecord.model_validate(json.loads(output)["record"])
    assert record.world_size == processes
    assert "epoch 2/2: loss" in errors
    bundle = Bundle.load(home / "run" / "train" / "bundle")
    assert bundle.digest == record.bundle_digest
    assert set(bundle.reference().columns) == set(bundle.manifest.features)
    assert {item.name for item in bundle.path.iterdir()} == {"bundle.json", "model.safetensors", "pca.npz", "reference.parquet"}
    first = weights(home)
    run_stage("train", load(path), run, force=True)
    assert weights(home) == first
    assert mlflow_runs(load(path), run) == [record.mlflow_run_id]


def test_kill_9_and_a_retry_end_with_the_same_weights_and_one_mlflow_run(project: Project, home: Path, run: str) -> None:
    settings = {"epochs": 5, "batch_size": 4, "processes": 2}
    path = project(training=settings)
    killed = start_training(path, run)
    wait_for(home / "run" / "checkpoints" / "last.pt")
    killed.kill()
    killed.communicate()
    retried = start_training(path, run)
    output, errors = retried.communicate(timeout=300)
    assert retried.returncode == 0, errors
    assert "goes on after epoch" in errors
    assert not (home / "run" / "checkpoints" / "last.pt").exists()
    resumed = weights(home)
    assert len(mlflow_runs(load(path), run)) == 1
    history = registry.connect(load(path)).get_metric_history(json.loads(output)["record"]["mlflow_run_id"], "val_auc")
    assert {metric.step for metric in history} == {1, 2, 3, 4, 5}
    run_stage("train", load(path), run, force=True)
    assert weights(home) == resumed


def test_a_killed_rank_ends_the_others_and_may_be_tried_again(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 500, "batch_size": 4, "processes": 2})
    training = start_training(path, run)
    wait_for(home / "run" / "checkpoints" / "last.pt")
    ranks = [int(pid) for pid in _children(training.pid)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 75
    assert errors.strip().splitlines()[-1].startswith("cvf train: rank 1 was ended by SIGKILL")
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_sigterm_stops_all_ranks_and_may_be_tried_again(project: Project, home: Path, run: str) -> None:
    training = start_training(project(training={"epochs": 500, "batch_size": 4, "processes": 2}), run)
    wait_for(home / "run" / "checkpoints" / "last.pt")
    ranks = _children(training.pid)
    training.terminate()
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 75, errors
    assert "goes on from the last finished epoch" in errors
    assert "Traceback" not in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_non_finite_gradient_stops_all_ranks_with_one_line(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 3, "batch_size": 4, "processes": 2, "learning_rate": 1e30})
    with pytest.raises(ConfigError, match=r"non-finite in epoch 1; lower training.learning_rate \(now 1e\+30\)"):
        run_stage("train", load(path), run)
    assert not (home / "run" / "train").exists()


def test_training_stops_early_when_validation_no_longer_improves(project: Project, run: str) -> None:
    path = project(training={"epochs": 60, "batch_size": 8, "processes": 1, "patience": 2, "learning_rate": 0.01})
    record = TrainRecord.model_validate(run_stage("train", load(path), run).record)
    assert record.epochs < 60
    assert record.epochs == record.best_epoch + 2


def test_the_bundle_scores_as_training_did(project: Project, home: Path, run: str) -> None:
    from cv_factory_ops.metrics import auc
    from cv_factory_ops.training.data import Shard

    record = TrainRecord.model_validate(run_stage("train", load(project()), run).record)
    val = Shard.open(home / "run" / "preprocess", "val")
    probabilities, _ = infer(Bundle.load(home / "run" / "train" / "bundle").network(), val.images)
    assert auc(val.labels, probabilities) == pytest.approx(record.val_auc, abs=1e-6)


@pytest.mark.parametrize("model", [{"kind": "small_cnn", "width": 4}, {"kind": "resnet", "depth": 18}])
def test_networks_standardise_with_their_own_statistics(project: Project, model: dict[str, object]) -> None:
    network = build(load(project(model=model)).model, 3, mean=0.5, std=0.25).eval()
    logits, embedding = network(torch.rand(2, 1, 32, 32))
    assert logits.shape == (2, 3)
    assert embedding.shape[0] == 2
    assert {"mean", "std"} <= set(network.state_dict())


def test_augmentation_keeps_shape_and_range_and_follows_the_seed() -> None:
    images = torch.rand(8, 1, 20, 24)
    config = AugmentConfig(shift=0.2, intensity=0.5, noise=0.2)
    torch.manual_seed(1)
    first = augment(images.clone(), config)
    torch.manual_seed(1)
    assert torch.equal(first, augment(images.clone(), config))
    assert first.shape == images.shape
    assert 0 <= float(first.min()) <= float(first.max()) <= 1
    assert not torch.equal(first, images)


def test_principal_components_are_those_of_scikit_learn_with_a_fixed_sign() -> None:
    from sklearn.decomposition import PCA

    data = np.random.default_rng(0).standard_normal((200, 12)).astype(np.float32) * np.arange(1, 13, dtype=np.float32)
    ours = fit_pca(data, 4)
    theirs = PCA(4).fit(data.astype(np.float64))
    assert np.allclose(np.abs(ours.transform(data)), np.abs(theirs.transform(data)), atol=1e-3)
    assert (ours.components[np.arange(4), np.abs(ours.components).argmax(1)] > 0).all()


def test_the_archive_of_a_bundle_is_the_same_bytes_each_time(project: Project, home: Path, run: str) -> None:
    from cv_factory_ops.bundle import pack

    run_stage("train", load(project()), run)
    bundle = home / "run" / "train" / "bundle"
    pack(bundle, home / "a.tar.gz")
    os.utime(bundle / "bundle.json")
    pack(bundle, home / "b.tar.gz")
    assert (home / "a.tar.gz").read_bytes() == (home / "b.tar.gz").read_bytes()
    unpack(home / "a.tar.gz", home / "copy")
    assert storage.tree_digest(home / "copy") == storage.tree_digest(bundle)


def test_shards_are_the_prepared_images_in_the_order_of_their_rows(run: str, home: Path) -> None:
    from cv_factory_ops.config import PreprocessingConfig
    from cv_factory_ops.ingestion.manifest import read_images
    from cv_factory_ops.preprocessing.pipeline import prepare
    from cv_factory_ops.training.data import Shard

    record = PreprocessRecord.model_validate(read_result(run, "preprocess").record)
    images = dict(read_images(home / "run" / "ingest"))
    for split, count in record.counts.items():
        import pandas as pd

        shard = Shard.open(home / "run" / "preprocess", split)
        rows = pd.read_parquet(home / "run" / "preprocess" / f"{split}.parquet")
        assert len(shard) == count == len(rows)
        last = images[rows["id"].iloc[-1]].astype(np.float32) / 65535.0
        assert (shard.images[-1] == prepare(last, PreprocessingConfig(size=32))).all()
    train = np.load(home / "run" / "preprocess" / "train.npy") / 65535.0
    assert record.mean == pytest.approx(train.mean())
    assert record.std == pytest.approx(train.std())


def _children(pid: int) -> list[str]:
    return subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()
