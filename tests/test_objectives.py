"""Objectives, schedules and orders of the training loop, on networks small enough to follow by hand; gloo is real."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.config.training import AugmentConfig, ContrastiveConfig, FixMatchConfig, TrainingConfig
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.models import Classifier, build
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.training.data import Shard, augment, epoch_order, share_of
from cv_factory_ops.training.distributed import Pauses, World
from cv_factory_ops.training.loop import Trainer, own_precision, share_of_peak
from cv_factory_ops.training.objectives import contrastive_loss, open_objective

STILL = AugmentConfig(flip=False, shift=0, intensity=0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def alone(tmp_path: Path) -> Iterator[World]:
    """A gloo group of this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield World(0, 1, CPU)
    dist.destroy_process_group()


def shard(count: int = 24, classes: int = 2, size: int = 8) -> Shard:
    """Images whose mean brightness is that of their label."""
    generator = np.random.default_rng(0)
    labels = generator.permutation(np.arange(count) % classes)
    images = generator.integers(0, 30_000, (count, size, size)) + 15_000 * labels[:, None, None]
    return Shard(Images([images.astype(np.uint16)]), labels.astype(np.int64))


class Plain(nn.Module):
    """A network without batch norms, so that a batch's gradient is the mean of its images'."""

    def forward(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images, 2).flatten(1)


def plain(classes: int = 2) -> Classifier:
    torch.manual_seed(3)
    return Classifier(SmallCnn(), Plain(), nn.Linear(4, classes), classes, 0.3, 0.2)


def weights_after(config: TrainingConfig, world: World, steps: int = 3) -> dict[str, Tensor]:
    trainer = Trainer(plain(), shard(), shard(), config, world)
    for step in range(steps):
        trainer.progress.position = step
        trainer.train_step(np.arange(step, step + 8))
    return trainer.network.state_dict()


def test_the_contrastive_loss_is_that_of_simclr_and_of_supcon() -> None:
    torch.manual_seed(0)
    vectors = functional.normalize(torch.randn(8, 5, dtype=torch.float64))
    for keys in ([0, 1, 2, 3, 0, 1, 2, 3], [0, 0, 1, 1, 0, 0, 1, 1]):
        expected = 0.0
        for i in range(8):
            shares = {k: math.exp(float(vectors[i] @ vectors[k]) / 0.5) for k in range(8) if k != i}
            positives = [k for k in shares if keys[k] == keys[i]]
            expected += sum(-math.log(shares[k] / sum(shares.values())) for k in positives) / len(positives) / 8
        assert contrastive_loss(vectors, torch.tensor(keys), 0.5).item() == pytest.approx(expected, rel=1e-9)


TWO_RANKS = """
import sys, torch, torch.distributed as dist
from torch.nn import functional
from cv_factory_ops.training.objectives import contrastive_loss
rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[2], 2), rank=rank, world_size=2)
torch.manual_seed(0)
inputs, keys = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
own = slice(6 * rank, 6 * rank + 6)
loss = contrastive_loss(functional.normalize(inputs[own] * weight), keys[own], 0.3)
loss.backward()
both = torch.cat([loss.detach().view(1), weight.grad]) / 2
dist.all_reduce(both)
if rank == 0:
    print(both.tolist())
dist.destroy_process_group()
"""


def test_two_ranks_compare_with_each_other_as_one_would_with_all(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(rank), tmp_path / "two"], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[0] for process in ranks]
    torch.manual_seed(0)
    inputs, keys = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(functional.normalize(inputs * weight), keys, 0.3)
    loss.backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert eval(said[0]) == pytest.approx([loss.item(), *weight.grad.tolist()])  # noqa: S307


@pytest.mark.parametrize("method", ["simclr", "supcon"])
def test_the_head_of_contrastive_training_leaves_the_embedding_alone(method: str) -> None:
    network = build(SmallCnn(width=4), 2)
    config = TrainingConfig(objective=ContrastiveConfig(method=method), augment=STILL)
    objective = open_objective(config, network, None, None)
    logits, projected = objective.module(torch.rand(6, 1, 8, 8))
    logits.sum().backward()
    assert all(weight.grad is None for weight in network.backbone.parameters())
    assert all(weight.grad is not None for weight in network.head.parameters())
    assert torch.linalg.vector_norm(projected, dim=1).allclose(torch.ones(6))


def test_contrastive_training_brings_the_images_of_a_label_together(alone: World) -> None:
    objective = ContrastiveConfig(method="supcon")
    config = TrainingConfig(objective=objective, epochs=12, batch_size=12, learning_rate=0.01, weight_decay=0)
    torch.manual_seed(0)
    trainer = Trainer(build(SmallCnn(width=4), 2, 0.3, 0.2), shard(), shard(), config, alone)

    def spread() -> float:
        with torch.no_grad():
            images, labels = shard().batch(np.arange(24))
            vectors = functional.normalize(trainer.network.eval().embed(images))
        middles = torch.stack([vectors[labels == label].mean(0) for label in (0, 1)])
        within = (vectors - middles[labels]).norm(dim=1).mean()
        return float(within / (middles[0] - middles[1]).norm())

    before = spread()
    fit(trainer, alone)
    assert spread() < before / 2
    assert trainer.progress.best_score > 0.9


class Known(nn.Module):
    """A network that answers a bright image with a sure yes, and any other with a doubtful one."""

    classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        bright = (images.mean((1, 2, 3)) > 0.5).float()
        logits = torch.stack([torch.zeros_like(bright), self.slope * (0.5 + 5 * bright)], dim=1)
        return logits, logits


def test_fixmatch_learns_from_unlabelled_images_that_the_network_is_sure_of() -> None:
    other = np.zeros((4, 8, 8), np.uint16)
    other[:2] = 60_000
    unlabelled = Shard(Images([other]), np.full(4, -1))
    config = TrainingConfig(objective=FixMatchConfig(confidence=0.9, ratio=4, weight=2, strong=STILL), augment=STILL)
    network: Any = Known()
    objective = open_objective(config, network, None, unlabelled)
    images, labels = torch.zeros(3, 1, 8, 8), torch.tensor([1, 0, 1])
    torch.manual_seed(5)
    drawn = torch.randint(4, (12,))
    torch.manual_seed(5)
    loss = objective.loss(objective.module, images, labels).item()
    sure = (drawn < 2).double().mean().item()
    of_labels = -np.mean([math.log(1 / (1 + math.exp(-0.5 if label else 0.5))) for label in (1, 0, 1)])
    assert loss == pytest.approx(of_labels + 2 * sure * math.log(1 + math.exp(-5.5)), rel=1e-5)


def test_fixmatch_without_unlabelled_images_says_what_to_set() -> None:
    with pytest.raises(DataError, match=r"data\.unlabelled: keep"):
        open_objective(TrainingConfig(objective=FixMatchConfig()), plain(), None, None)


def test_accumulated_batches_are_one_large_batch(alone: World) -> None:
    settings = {"augment": STILL, "schedule": "constant", "warmup": 0}
    together = weights_after(TrainingConfig(batch_size=8, **settings), alone)
    apart = weights_after(TrainingConfig(batch_size=3, accumulate=3, **settings), alone)
    for name, values in together.items():
        assert values.allclose(apart[name], atol=1e-6), name
    assert not together["head.weight"].allclose(plain().state_dict()["head.weight"], atol=1e-4)


def test_the_forward_pass_in_bfloat16_keeps_weights_in_float32(alone: World) -> None:
    exact = weights_after(TrainingConfig(augment=STILL), alone)
    coarse = weights_after(TrainingConfig(augment=STILL, precision="bfloat16"), alone)
    assert {values.dtype for values in coarse.values()} == {torch.float32}
    assert coarse["head.weight"].allclose(exact["head.weight"], atol=0.01)
    assert not coarse["head.weight"].equal(exact["head.weight"])


def test_precision_is_what_the_device_can_do() -> None:
    assert own_precision(TrainingConfig(), CPU) is torch.float32
    with pytest.raises(ConfigError, match=r"training\.precision: float16 given, there is no GPU"):
        own_precision(TrainingConfig(precision="float16"), CPU)


def test_schedules_are_those_of_pytorch() -> None:
    weight = nn.Parameter(torch.zeros(1))
    steps = 2000
    schedules = {
        "one_cycle": torch.optim.lr_scheduler.OneCycleLR(torch.optim.SGD([weight], 1.0), 1.0, steps + 1, cycle_momentum=False),
        "cosine": torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([weight], 1.0), steps),
    }
    for name, schedule in schedules.items():
        config = TrainingConfig(schedule=name, warmup=0.3 if name == "one_cycle" else 0)
        for step in range(steps + 1):
            # PyTorch counts the rise of one_cycle to a step less, and its own steps to one less than their number.
            tolerance = 0.002 if name == "one_cycle" else 1e-6
            assert share_of_peak(step / steps, config) == pytest.approx(schedule.get_last_lr()[0], abs=tolerance)
            schedule.optimizer.step()
            schedule.step()
    constant = TrainingConfig(schedule="constant", warmup=0.5)
    assert [share_of_peak(done, constant) for done in (0, 0.25, 0.5, 1)] == pytest.approx([0, 0.5, 1, 1])


def test_an_epoch_takes_each_image_once_whatever_the_number_of_ranks() -> None:
    labels = np.arange(23) % 2
    order = epoch_order(labels, TrainingConfig(), 4)
    assert sorted(order) == list(range(23))
    assert not np.array_equal(order, epoch_order(labels, TrainingConfig(), 5))
    shares = [share_of(order, rank, 4) for rank in range(4)]
    assert {len(share) for share in shares} == {6}
    assert set(np.concatenate(shares)) == set(range(23))


def test_weighted_sampling_draws_each_label_as_often() -> None:
    labels = np.repeat([0, 1, 2], [2700, 200, 100])
    order = epoch_order(labels, TrainingConfig(weighted_sampling=True), 0)
    assert len(order) == 3000
    assert np.bincount(labels[order]) / 3000 == pytest.approx(1 / 3, abs=0.03)


def test_zoom_magnifies_about_the_middle() -> None:
    image = torch.zeros(64, 1, 33, 33)
    image[:, :, 14:19, 14:19] = 1
    torch.manual_seed(0)
    zoomed = augment(image, AugmentConfig(flip=False, shift=0, intensity=0, zoom=1.0))
    areas = zoomed.sum((1, 2, 3)) / 25
    assert areas.min() >= 0.99
    assert 3 < areas.max() <= 4.1
    assert zoomed.flip(3).allclose(zoomed, atol=1e-4)


def fit(trainer: Trainer, world: World, **limits: Any) -> list[dict[str, float]]:
    metrics: list[dict[str, float]] = []
    trainer.fit(metrics.append, limits.get("on_pause", lambda: None), limits.get("pauses", Pauses(world, Path("none"), 1e9)))
    return metrics


def test_a_training_that_is_stopped_keeps_its_place_and_repeats_itself_exactly(alone: World, tmp_path: Path) -> None:
    config = TrainingConfig(epochs=2, batch_size=2, augment=AugmentConfig(mixup=0.4), ema=0.9)

    def trainer() -> Trainer:
        torch.manual_seed(1)
        return Trainer(build(SmallCnn(width=4), 2, 0.3, 0.2), shard(), shard(), config, alone)

    undisturbed = trainer()
    told = fit(undisturbed, alone)
    stop = tmp_path / "stop"
    stop.touch()
    stopped, kept = trainer(), []
    with pytest.raises(Unavailable, match="a retry goes on from the last checkpoint"):
        fit(stopped, alone, on_pause=lambda: kept.append(stopped.state()), pauses=Pauses(alone, stop, 1e9))
    assert stopped.progress.position == 2
    resumed = trainer()
    resumed.load_state(kept[0])
    retold = fit(resumed, alone)
    for name, values in undisturbed.candidate.state_dict().items():
        assert resumed.candidate.state_dict()[name].equal(values), name
    assert retold[0]["train_loss"] == pytest.approx(told[0]["train_loss"], rel=1e-6)
    assert retold[1]["val_auc"] == told[1]["val_auc"]


def test_a_network_that_answers_with_no_numbers_is_never_the_best(alone: World) -> None:
    trainer = Trainer(plain(), shard(), shard(), TrainingConfig(augment=STILL), alone)
    trainer.network.head.bias.data.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(ConfigError, match=r"an answer became non-finite in epoch 1; lower training\.learning_rate"):
        trainer.validate()


def test_seeds_share_no_order() -> None:
    labels = np.zeros(50, np.int64)
    orders = [tuple(epoch_order(labels, TrainingConfig(seed=seed), epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_no_batch_of_a_step_is_a_single_image(alone: World) -> None:
    taken: list[int] = []

    class Counting(Plain):
        def forward(self, images: Tensor) -> Tensor:
            taken.append(len(images))
            return super().forward(images)

    config = TrainingConfig(batch_size=2, accumulate=3, augment=STILL)
    network = Classifier(SmallCnn(), Counting(), nn.Linear(4, 2), 2, 0.3, 0.2)
    Trainer(network, shard(), shard(), config, alone).train_step(np.arange(5))
    assert taken == [3, 2]


def test_checkpoints_within_an_epoch_are_kept_by_the_clock(alone: World, tmp_path: Path) -> None:
    pauses = Pauses(alone, tmp_path / "stop", 0.0)
    assert pauses.due() == "keep"
    patient = Pauses(alone, tmp_path / "stop", 3600.0)
    assert {patient.due() for _ in range(200)} == {None}
    (tmp_path / "stop").touch()
    assert "stop" in {patient.due() for _ in range(200)}
