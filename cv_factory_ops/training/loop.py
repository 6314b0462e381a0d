"""The supervised loop: read it top to bottom.

Everything random in an epoch is drawn from a seed made of (seed, epoch, rank), so an epoch that is started again after a
crash repeats itself exactly, and no generator state needs saving.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DistributedSampler

from cv_factory_ops.config import TrainingConfig
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.metrics import auc
from cv_factory_ops.models import Classifier
from cv_factory_ops.training.data import Shard, augment, mix, train_batches
from cv_factory_ops.training.distributed import World, gather_rows, share_buffers, sum_over_ranks

log = logging.getLogger("cvf")


@dataclass
class Progress:
    """Where training stands after an epoch; together with the weights, all that a resume needs."""

    epoch: int = 0
    best_epoch: int = 0
    best_auc: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    images_per_second: float = 0.0


class Trainer:
    """Network, optimizer and schedule of one training on one rank."""

    def __init__(self, network: Classifier, train: Shard, val: Shard, config: TrainingConfig, world: World) -> None:
        self.config, self.world, self.train, self.val = config, world, train, val
        self.network = network.to(world.device)
        self.parallel = DistributedDataParallel(self.network, [world.device] if world.device.type == "cuda" else None)
        self.sampler: DistributedSampler[int] = DistributedSampler(train, world.size, world.rank, seed=config.seed)
        self.steps = math.ceil(len(self.sampler) / config.batch_size)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, config.learning_rate, total_steps=config.epochs * self.steps
        )
        self.average = moving_average(self.network, config.ema) if config.ema else None
        self.class_weights = self._class_weights()
        self.progress = Progress()

    @property
    def candidate(self) -> nn.Module:
        """The network that is validated and kept: the moving average where there is one."""
        return self.average.module if self.average else self.network

    def fit(self, on_epoch: Callable[[dict[str, float]], None]) -> None:
        """Train until the last epoch or until validation stops improving; ``on_epoch`` gets the metrics of each epoch."""
        while self.progress.epoch < self.config.epochs and not self._out_of_patience():
            started = time.monotonic()
            train_loss = self.train_epoch(self.progress.epoch)
            seconds = time.monotonic() - started
            val_auc = self.validate()
            self._note(val_auc, len(self.train) / seconds)
            on_epoch({"train_loss": train_loss, "val_auc": val_auc, "images_per_second": self.progress.images_per_second})

    def train_epoch(self, epoch: int) -> float:
        """One pass over the training images; returns the mean loss over all ranks."""
        torch.manual_seed(self.config.seed * 1_000_003 + epoch * 1_009 + self.world.rank)
        self.sampler.set_epoch(epoch)
        self.parallel.train()  # type: ignore[no-untyped-call]
        total, count = torch.zeros((), device=self.world.device), 0
        for images, labels in train_batches(self.train, self.sampler, self.config.batch_size):
            images = augment(images.to(self.world.device), self.config.augment)
            images, targets = mix(images, labels.to(self.world.device), self.network.classes, self.config.augment)
            total += self.train_step(images, targets) * len(labels)
            count += len(labels)
        summed, counted = sum_over_ranks([float(total), count], self.world)
        return summed / counted

    def train_step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step towards labels (n,) or shares of labels (n, classes); returns this rank's loss.

        Raises:
            ConfigError: the gradient is not finite. DDP has averaged it, so all ranks see the same and stop together,
                before the optimizer has touched the weights.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self.parallel(images)[0], targets, self.class_weights, self.config.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise ConfigError(
                f"training: the gradient became non-finite in epoch {self.progress.epoch + 1}; "
                f"lower training.learning_rate (now {self.config.learning_rate:g})"
            )
        self.optimizer.step()
        self.schedule.step()
        if self.average:
            self.average.update_parameters(self.network)
        return loss.detach()

    def validate(self) -> float:
        """AUC over the whole validation split, the same number on all ranks."""
        probabilities = self.probabilities(self.val)
        return auc(self.val.labels, probabilities)

    @torch.inference_mode()
    def probabilities(self, shard: Shard) -> NDArray[np.float32]:
        """(N, classes) of a split: each rank computes its part, all ranks get all."""
        share_buffers(self.candidate)
        self.candidate.eval()
        own = np.arange(self.world.rank, len(shard), self.world.size)
        parts = [
            self.candidate(shard.batch(own[start : start + 64])[0].to(self.world.device))[0].softmax(1).cpu()
            for start in range(0, len(own), 64)
        ]
        rows = torch.cat(parts).numpy() if parts else np.empty((0, self.network.classes), dtype=np.float32)
        return gather_rows(rows, len(shard), self.world)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, as tensors and plain values."""
        return {
            "network": self.network.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "progress": vars(self.progress),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.network.load_state_dict(state["network"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.progress = Progress(**state["progress"])

    def _class_weights(self) -> Tensor | None:
        if not self.config.class_weights:
            return None
        counts = self.train.class_counts(self.network.classes)
        weights = counts.sum() / np.maximum(counts, 1) / len(counts)
        return torch.tensor(weights, dtype=torch.float32, device=self.world.device)

    def _out_of_patience(self) -> bool:
        behind = self.progress.epoch - self.progress.best_epoch
        return 0 < self.config.patience <= behind

    def _note(self, val_auc: float, images_per_second: float) -> None:
        self.progress.epoch += 1
        self.progress.images_per_second = images_per_second
        if val_auc > self.progress.best_auc:
            self.progress.best_auc, self.progress.best_epoch = val_auc, self.progress.epoch
            self.progress.best_weights = copy.deepcopy(self.candidate.state_dict())


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Mean over a batch of the cross entropy with labels (n,) int64, or with shares of labels (n, classes).

    PyTorch divides by the weights of the labels where those are numbers, but by n where they are shares; here both are means
    by weight, so that a share of 1 counts as the label itself.
    """
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    total = functional.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=smoothing)
    return total / (len(targets) if weights is None else (targets @ weights).sum())


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights and buffers."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
