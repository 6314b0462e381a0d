"""Training by real torchrun launches on gloo, with a real SQLite MLflow."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from cv_factory_ops import registry, storage, trained
from cv_factory_ops.bundle import Bundle, unpack
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.training import AugmentConfig
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.models import build
from cv_factory_ops.predictor import infer
from cv_factory_ops.records import PreprocessRecord, TrainRecord
from cv_factory_ops.stage import assist_stage, read_result, run_stage
from cv_factory_ops.training import gang
from cv_factory_ops.training.data import augment
from cv_factory_ops.training.release import fit_pca
from domain_medical.synthetic import studies

Project = Callable[..., Path]


def start_training(path: Path, run: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cv_factory_ops.cli", "train", "--config", str(path), "--run", run]
    given = os.environ | environment
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given)


def start_node(rank: int, path: Path, run: str, launch: str, **environment: str) -> subprocess.Popen[str]:
    """A node as a pod would start it."""
    return start_training(path, run, PET_NODE_RANK=str(rank), CVF_GANG=launch, **environment)


def last_line(errors: str) -> str:
    return errors.strip().splitlines()[-1]


def weights(home: Path) -> str:
    return storage.sha256(home / "run" / "train" / "bundle" / "model.safetensors")


def wait_for(path: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.05)


def wait_for_an_epoch(home: Path) -> None:
    """Until a checkpoint is written that is not there yet."""
    checkpoint = home / "run" / "checkpoints" / "last.pt"
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    deadline = time.monotonic() + 120
    while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline, "no epoch has ended"
        time.sleep(0.02)


def mlflow_runs(config: ProjectConfig, run: str) -> list[str]:
    client = registry.connect(config)
    experiment = client.get_experiment_by_name(config.project)
    return [found.info.run_id for found in client.search_runs([experiment.experiment_id], f"tags.`cvf.run` = '{run}'")]


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.proof), 2])
def test_a_training_leaves_a_bundle_and_repeats_itself_exactly(project: Project, home: Path, run: str, processes: int) -> None:
    path = project(training={"epochs": 2, "batch_size": 8, "processes_per_node": processes, "ema": 0.9, "class_weights": True})
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
    first, told = weights(home), trained.last(load(path))
    assert told
    assert told.run == run
    run_stage("train", load(path), run, force=True)
    assert weights(home) == first
    again = trained.last(load(path))
    assert again
    assert again.time > told.time
    assert mlflow_runs(load(path), run) == [record.mlflow_run_id]


def test_kill_9_and_a_retry_end_with_the_same_weights_and_one_mlflow_run(project: Project, home: Path, run: str) -> None:
    settings = {"epochs": 5, "batch_size": 4, "processes_per_node": 2}
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


@pytest.mark.parametrize("method", [pytest.param("simclr", marks=pytest.mark.proof), "supcon"])
def test_contrastive_training_leaves_a_bundle_that_can_be_tuned_further(
    project: Project, home: Path, run: str, method: str
) -> None:
    settings = {"epochs": 2, "batch_size": 8, "processes_per_node": 2, "augment": {"zoom": 0.3, "intensity": 0.3}}
    run_stage("train", load(project(training={**settings, "objective": {"kind": "contrastive", "method": method}})), run)
    bundle = Bundle.load(home / "run" / "train" / "bundle")
    learned = bundle.network().state_dict()
    assert not any("projection" in name for name in learned)
    weights = shutil.copy(bundle.path / "model.safetensors", home / "learned.safetensors")
    tuning = {"epochs": 1, "objective": {"kind": "fine_tuning", "probe": True}}
    run_stage("train", load(project(training=tuning, model={"kind": "small_cnn", "width": 4, "weights": str(weights)})), run)
    tuned = Bundle.load(home / "run" / "train" / "bundle").network().state_dict()
    for name, values in learned.items():
        assert values.equal(tuned[name]) == (not name.startswith("head.")), name


def test_unlabelled_images_are_learned_from(project: Project, home: Path) -> None:
    (home / "data").mkdir()
    lines = ["file,label"]
    for i, (study, label) in enumerate(studies(60, image_size=48, seed=1, labels=["normal", "opacity"])):
        (home / "data" / f"{i}.dcm").write_bytes(study)
        lines += [f"{i}.dcm,{label}"] if i % 3 else []
    (home / "data.csv").write_text("\n".join(lines))
    source = {"kind": "files", "path": "data", "labels": "data.csv"}
    objective = {"kind": "fixmatch", "confidence": 0.5, "ratio": 2}
    settings = {"epochs": 2, "batch_size": 8, "processes_per_node": 2, "objective": objective}
    config = load(project(data={"source": source, "unlabelled": "keep"}, training=settings))
    for stage in ("ingest", "preprocess", "train"):
        record = run_stage(stage, config, (home / "run").as_uri()).record
    preprocessed = PreprocessRecord.model_validate(read_result((home / "run").as_uri(), "preprocess").record)
    assert preprocessed.counts["unlabelled"] >= 5
    assert TrainRecord.model_validate(record).epochs == 2


@pytest.mark.proof
def test_sigterm_within_an_epoch_keeps_what_is_learned_and_changes_nothing(project: Project, home: Path, run: str) -> None:
    settings = {"epochs": 1, "batch_size": 1, "ema": 0.9, "augment": {"mixup": 0.3, "rotate": 5}}
    path = project(training=settings, model={"kind": "resnet", "depth": 10}, preprocessing={"size": 96})
    run_stage("preprocess", load(path), run)
    stopped = start_training(path, run)
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if "steps an epoch" in line:
            break
    stopped.terminate()
    assert stopped.wait(60) == 75
    assert (home / "run" / "checkpoints" / "last.pt").exists()
    retried = start_training(path, run)
    _, errors = retried.communicate(timeout=300)
    assert retried.returncode == 0, errors
    found = re.search(r"goes on after epoch 0, image (\d+) of (\d+)", errors)
    assert found is not None, errors
    assert 0 < int(found[1]) < int(found[2])
    resumed = weights(home)
    run_stage("train", load(path), run, force=True)
    assert weights(home) == resumed


def test_another_number_of_processes_goes_on_from_the_checkpoint(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 4, "batch_size": 4, "processes_per_node": 2})
    killed = start_training(path, run)
    wait_for_an_epoch(home)
    killed.kill()
    killed.communicate()
    done = start_training(project(training={"epochs": 4, "batch_size": 4, "processes_per_node": 1}), run)
    output, errors = done.communicate(timeout=300)
    assert done.returncode == 0, errors
    assert "goes on after epoch" in errors
    assert json.loads(output)["record"]["world_size"] == 1


@pytest.mark.proof
def test_torchrun_starts_ranks_again_that_have_died(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 6, "batch_size": 2, "processes_per_node": 2, "restarts": 1})
    training = start_training(path, run)
    wait_for(home / "run" / "checkpoints" / "last.pt")
    os.kill(_children(training.pid)[1], signal.SIGKILL)
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 0, errors
    assert "goes on after epoch" in errors
    restarted = weights(home)
    run_stage("train", load(path), run, force=True)
    assert weights(home) == restarted


@pytest.mark.proof
def test_torchrun_does_not_repeat_what_cannot_succeed(project: Project, home: Path, run: str) -> None:
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e30, "processes_per_node": 2, "restarts": 3}
    failed = start_training(project(training=settings), run)
    _, errors = failed.communicate(timeout=120)
    assert failed.returncode == 2, errors
    assert "lower training.learning_rate" in last_line(errors)
    assert errors.count("steps an epoch") == 1


@pytest.mark.proof
def test_other_weights_at_the_same_place_are_another_training(project: Project, home: Path, run: str) -> None:
    run_stage("train", load(project()), run)
    weights = shutil.copy(home / "run" / "train" / "bundle" / "model.safetensors", home / "start.safetensors")
    config = load(project(model={"kind": "small_cnn", "width": 4, "weights": str(weights)}))
    first = TrainRecord.model_validate(run_stage("train", config, run).record)
    assert TrainRecord.model_validate(run_stage("train", config, run).record) == first
    shutil.copy(home / "run" / "train" / "bundle" / "model.safetensors", weights)
    second = TrainRecord.model_validate(run_stage("train", config, run).record)
    assert second.bundle_digest != first.bundle_digest
    tags = registry.connect(config).get_run(second.mlflow_run_id).data.tags
    assert tags["cvf.weights_sha256"] == storage.sha256(Path(weights))


def test_a_killed_rank_ends_the_others_and_may_be_tried_again(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 500, "batch_size": 4, "processes_per_node": 2})
    training = start_training(path, run)
    wait_for(home / "run" / "checkpoints" / "last.pt")
    ranks = _children(training.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 75
    assert errors.strip().splitlines()[-1].startswith("cvf train: rank 1 was ended by SIGKILL")
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (1, "cvf train: interrupted; a retry goes on from the last checkpoint"),
        (2, "cvf train: interrupted; a retry goes on from"),  # on a busy machine, the process ends before its children have
    ],
)
def test_sigterm_stops_all_ranks_of_all_nodes_and_may_be_tried_again(
    project: Project, home: Path, run: str, nodes: int, said: str
) -> None:
    settings = {"epochs": 500, "batch_size": 4, "nodes": nodes, "processes_per_node": 2 // nodes}
    training = start_training(project(training=settings), run)
    wait_for_an_epoch(home)
    below = _descendants(training.pid)
    assert len(below) == 2 + (nodes - 1)
    training.terminate()
    _, errors = training.communicate(timeout=120)
    assert training.returncode == 75, errors
    assert last_line(errors).startswith(said)
    assert "Traceback" not in errors
    _wait_until_gone(below)
    assert not (home / "run" / "train").exists()
    assert not (home / "run" / ".train.work").exists()


@pytest.mark.proof
def test_a_gang_that_is_killed_again_and_again_ends_with_the_weights_of_one_undisturbed_node(
    project: Project, home: Path, run: str
) -> None:
    settings = {"epochs": 15, "batch_size": 4, "processes_per_node": 1}
    path = project(training={**settings, "nodes": 2})
    for victim, reason in [
        ("node 1", "cvf train: node 1: was ended by SIGKILL; a retry goes on from the last checkpoint"),
        ("rank 1", "cvf train: node 1: rank 1 was ended by SIGKILL; a retry goes on from the last checkpoint"),
        ("node 0", ""),
    ]:
        training = start_training(path, run)
        wait_for_an_epoch(home)
        below = _descendants(training.pid)
        (node,) = [pid for pid in _children(training.pid) if b"cv_factory_ops.cli" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        os.kill({"node 0": training.pid, "node 1": int(node), "rank 1": int(_children(int(node))[0])}[victim], signal.SIGKILL)
        _, errors = training.communicate(timeout=120)
        if victim != "node 0":
            assert training.returncode == 75, errors
            assert last_line(errors) == reason, errors
        _wait_until_gone(below)
    finished = start_training(path, run)
    output, errors = finished.communicate(timeout=300)
    assert finished.returncode == 0, errors
    assert re.search(r"\[rank 0\] goes on after epoch \d", errors)
    assert re.search(r"\[rank 1\] goes on after epoch \d", errors)
    record = json.loads(output)["record"]
    assert record["world_size"] == 2
    assert mlflow_runs(load(path), run) == [record["mlflow_run_id"]]
    assert list((home / "run" / "rendezvous").iterdir()) == []
    resumed = weights(home)
    run_stage("train", load(project(training={**settings, "nodes": 1, "processes_per_node": 2})), run)
    assert weights(home) == resumed


def test_nodes_that_share_only_s3_train_together_and_know_when_nothing_has_changed(
    project: Project, home: Path, run: str, bucket: str
) -> None:
    for result in (home / "run").glob("*/result.json"):
        result.write_text(result.read_text().replace(run, f"s3://{bucket}/run"))
    storage.upload_tree(home / "run", f"s3://{bucket}/run")
    run = f"s3://{bucket}/run"
    path = project(training={"epochs": 2, "batch_size": 8, "nodes": 2, "processes_per_node": 1})
    own = {"POD_IP": _outward_address()}
    first, second = start_node(0, path, run, "a", **own), start_node(1, path, run, "a", CVF_HOME=str(home / "1"), **own)
    output, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert second.communicate(timeout=60)[0] == ""
    assert second.returncode == 0
    record = TrainRecord.model_validate(json.loads(output)["record"])
    assert record.world_size == 2
    assert storage.exists(f"{record.bundle}/model.safetensors")
    assert list(storage.listing(f"{run}/rendezvous")) == []

    again = [start_node(rank, path, run, "b", CVF_HOME=str(home / str(rank))) for rank in (1, 0)]
    outputs = [node.communicate(timeout=60) for node in again]
    assert [node.returncode for node in again] == [0, 0]
    assert "nothing has changed: node 1 is not needed" in outputs[0][1]
    assert json.loads(outputs[1][0])["record"] == record.model_dump(mode="json")

    (shard,) = (home / "1").rglob("train-00000.npy")
    shard.write_bytes(b"damaged on this node alone")
    path = project(training={"epochs": 3, "batch_size": 8, "nodes": 2, "processes_per_node": 1})
    broken = [start_node(0, path, run, "c"), start_node(1, path, run, "c", CVF_HOME=str(home / "1"))]
    reasons = [node.communicate(timeout=120)[1] for node in broken]
    assert [node.returncode for node in broken] == [3, 3]
    assert last_line(reasons[0]).startswith("cvf train: node 1: ")
    assert "train-00000.npy: has 26 bytes, not" in last_line(reasons[0])


def test_nodes_on_a_shared_folder_end_together_when_one_is_killed(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 500, "batch_size": 4, "nodes": 2, "processes_per_node": 1})
    second, first = start_node(1, path, run, "first"), start_node(0, path, run, "first")
    wait_for_an_epoch(home)
    first.kill()
    first.communicate()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 75
    assert last_line(errors).startswith("cvf train: lost a peer: ")


@pytest.mark.proof
def test_nodes_on_a_shared_folder_end_together_when_one_is_stopped(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 500, "batch_size": 4, "nodes": 2, "processes_per_node": 1})
    second, first = start_node(1, path, run, "pod-uid"), start_node(0, path, run, "pod-uid")
    wait_for_an_epoch(home)
    assert json.loads((home / "run" / "rendezvous" / "pod-uid.json").read_text())["address"] == "127.0.0.1"
    second.terminate()
    _, errors = second.communicate(timeout=60)
    assert second.returncode == 75
    assert last_line(errors) == "cvf train: interrupted; a retry goes on from the last checkpoint"
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 75
    assert last_line(errors) == "cvf train: node 1: interrupted; a retry goes on from the last checkpoint"
    assert "Traceback" not in errors
    assert not (home / "run" / "rendezvous" / "pod-uid.json").exists()


def test_a_node_that_waits_for_a_peer_is_told_when_that_gives_up(
    project: Project, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = project(training={"nodes": 2, "processes_per_node": 1})
    wrong = start_node(1, path, run, "g", POD_IP="203.0.113.9")
    monkeypatch.setenv("PET_NODE_RANK", "0")
    monkeypatch.setenv("CVF_GANG", "g")
    with pytest.raises(ConfigError, match=r"node 1: POD_IP: '203\.0\.113\.9' given; allowed: an address of this machine"):
        run_stage("train", load(path), run)
    wrong.communicate(timeout=60)
    assert wrong.returncode == 2


def test_a_node_whose_first_node_never_comes_may_be_tried_again(
    project: Project, home: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang, "PATIENCE_SECONDS", 1)
    monkeypatch.setenv("PET_NODE_RANK", "1")
    monkeypatch.setenv("CVF_GANG", "g")
    with pytest.raises(Unavailable, match="node 0 of 2 has not come within 1 s; a retry may find it"):
        assist_stage("train", load(project(training={"nodes": 2})), run)
    assert not (home / "run" / ".train.work").exists()


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"PET_NODE_RANK": "two"}, "PET_NODE_RANK: 'two' given; allowed: the number of a node, from 0"),
        ({"PET_NODE_RANK": "2", "CVF_GANG": "g"}, "PET_NODE_RANK: 2 given; allowed: below training.nodes, which is 2"),
        ({"PET_NODE_RANK": "1"}, "CVF_GANG: '' given; allowed: an id of this launch of all nodes"),
        ({"PET_NODE_RANK": "1", "CVF_GANG": "../g"}, "CVF_GANG: '../g' given; allowed: an id of this launch of all nodes"),
    ],
)
def test_a_wrong_environment_of_a_node_is_one_line(project: Project, run: str, environment: dict[str, str], said: str) -> None:
    failed = start_training(project(training={"nodes": 2}), run, **environment)
    _, errors = failed.communicate(timeout=60)
    assert failed.returncode == 2
    assert errors.startswith(f"cvf train: {said}")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("failures", "cause"),
    [
        (["PeerLost", "CvFactoryError", "ConfigError"], "ConfigError"),
        (["PeerLost", "CvFactoryError"], "CvFactoryError"),
        (["PeerLost"], "PeerLost"),
    ],
)
def test_a_lost_peer_is_told_only_where_nothing_else_is_known(failures: list[str], cause: str) -> None:
    found = gang.first_cause(gang.Failure(error=error, message="why") for error in failures)
    assert found is not None
    assert type(found.as_error()).__name__ == cause


def test_a_non_finite_gradient_stops_all_ranks_with_one_line(project: Project, home: Path, run: str) -> None:
    path = project(training={"epochs": 3, "batch_size": 4, "processes_per_node": 2, "learning_rate": 1e30})
    with pytest.raises(ConfigError, match=r"non-finite in epoch 1; lower training.learning_rate \(now 1e\+30\)"):
        run_stage("train", load(path), run)
    assert not (home / "run" / "train").exists()


def test_training_stops_early_when_validation_no_longer_improves(project: Project, run: str) -> None:
    path = project(training={"epochs": 60, "batch_size": 8, "processes_per_node": 1, "patience": 2, "learning_rate": 0.01})
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


@pytest.mark.parametrize(
    ("name", "kind"),
    [("../out", tarfile.REGTYPE), ("/out", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("pipe", tarfile.FIFOTYPE)],
)
@pytest.mark.parametrize("has_filters", [True, False])
def test_an_archive_that_reaches_out_of_its_folder_is_refused(
    name: str, kind: bytes, has_filters: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "model.tar.gz", "w:gz") as tar:
        tar.addfile(member)
    if not has_filters:  # as in Python 3.11.0 to 3.11.3
        monkeypatch.delattr(tarfile, "data_filter")
    with pytest.raises(DataError, match=re.escape(f"{name} is not a file below it")):
        unpack(tmp_path / "model.tar.gz", tmp_path / "model")
    assert list((tmp_path / "model").iterdir() if (tmp_path / "model").exists() else []) == []


def test_shards_are_the_prepared_images_in_the_order_of_their_rows(run: str, home: Path) -> None:
    from cv_factory_ops.config.preprocessing import PreprocessingConfig
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
    train = np.load(home / "run" / "preprocess" / "train-00000.npy") / 65535.0
    assert record.mean == pytest.approx(train.mean())
    assert record.std == pytest.approx(train.std())


def _children(pid: int) -> list[int]:
    return [int(child) for child in subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout.split()]


def _descendants(pid: int) -> list[int]:
    return [found for child in _children(pid) for found in (child, *_descendants(child))]


def _wait_until_gone(pids: list[int], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while any(map(_lives, pids)):
        assert time.monotonic() < deadline, "a process has outlived its launcher"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    """Whether a process still runs; one that has ended may wait in the table for init."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _outward_address() -> str:
    """An address of this machine that is not the loopback's, as a pod has; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
        try:
            unused.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        return str(unused.getsockname()[0])
