"""The loop of every training: read it top to bottom. What is learned is the objective's (``objectives.py``), what an epoch is
judged by the validation's (``validation.py``).

Everything random in a step is drawn from a seed made of (seed, epoch, position, rank), so a step that is taken again after a
crash repeats itself exactly, and no generator state needs saving.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cv_factory_ops.config.training import FineTuning, TrainingConfig
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.ingestion.progress import with_progress
from cv_factory_ops.models import Classifier, freeze, parameter_groups
from cv_factory_ops.training.data import Shard, epoch_order, seed_of, share_of
from cv_factory_ops.training.distributed import Pauses, World, gather_rows, share_buffers, sum_over_ranks
from cv_factory_ops.training.objectives import open_objective
from cv_factory_ops.training.validation import open_validation


@dataclass
class Progress:
    """Where training stands; together with weights and optimizer, all that a resume needs."""

    epoch: int = 0
    """Epochs that are finished."""
    position: int = 0
    """Images of the next epoch that all ranks together have taken."""
    loss: list[float] = field(default_factory=lambda: [0.0, 0.0])
    """Of those: sum of the loss, and number."""
    best_epoch: int = 0
    best_score: float = -math.inf
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    images_per_second: float = 0.0
    history: list[float] = field(default_factory=list)
    """Score of each finished epoch on validation."""
    seconds: float = 0.0
    """That all this took, in tries before this one."""


class Trainer:
    """Network, objective and optimizer of one training on one rank."""

    def __init__(
        self,
        network: Classifier,
        train: Shard,
        val: Shard,
        config: TrainingConfig,
        world: World,
        unlabelled: Shard | None = None,
    ) -> None:
        self.config, self.world, self.train, self.val = config, world, train, val
        self.network = network.to(world.device)
        self.objective = open_objective(config, self.network, self._class_weights(), unlabelled)
        self.validation = open_validation(self.network)
        groups = self._parameter_groups()
        self.parallel = DistributedDataParallel(self.objective.module, [world.device] if world.device.type == "cuda" else None)
        self.step_images = config.batch_size * config.accumulate * world.size
        self.optimizer = torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay)
        self.precision = own_precision(config, world.device)
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=self.precision is torch.float16)
        self.average = moving_average(self.network, config.ema) if config.ema else None
        self.progress = Progress()
        self.started = time.monotonic()

    @property
    def candidate(self) -> nn.Module:
        """The network that is validated and kept: the moving average where there is one."""
        return self.average.module if self.average else self.network

    @property
    def seconds(self) -> float:
        """That the training took so far, all tries together."""
        return self.progress.seconds + time.monotonic() - self.started

    def best_network(self) -> Classifier:
        """The network of the best epoch, on the CPU and in evaluation mode; the training is over with it."""
        network = self.network.cpu()
        network.load_state_dict(self.progress.best_weights)
        return network.eval()

    def fit(
        self,
        on_epoch: Callable[[dict[str, float]], None],
        on_pause: Callable[[], None],
        pauses: Pauses,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the last epoch, until validation stops improving, or until ``is_over`` says so between two epochs; it
        says the same on all ranks.

        ``on_epoch`` gets the metrics of each epoch; ``on_pause`` is called within one, with all ranks waiting.

        Raises:
            Unavailable, PeerLost: this node or another was asked to stop; ``on_pause`` has been called.
        """
        while self.progress.epoch < self.config.epochs and not self._out_of_patience() and not is_over():
            started, position = time.monotonic(), self.progress.position
            self.train_epoch(on_pause, pauses)
            rate = (len(self.train) - position) / (time.monotonic() - started)
            summed, counted = sum_over_ranks(self.progress.loss, self.world)
            score = self.validate()
            self._note(score, rate)
            on_epoch({"train_loss": summed / counted, f"val_{self.validation.metric}": score, "images_per_second": rate})

    def train_epoch(self, on_pause: Callable[[], None], pauses: Pauses) -> None:
        """Take the images of this epoch that are left."""
        order = epoch_order(self.train.labels, self.config, self.progress.epoch)
        self.parallel.train()  # type: ignore[no-untyped-call]
        loss = torch.zeros((), device=self.world.device)
        for start in self._steps(len(order)):
            images = order[start : start + self.step_images]
            own = share_of(images, self.world.rank, self.world.size)
            loss += self.train_step(own) * len(own)
            self.progress.position += len(images)
            self.progress.loss[1] += len(own)
            if pause := pauses.due():
                self.progress.loss[0] += float(loss)
                loss.zero_()
                self._pause(on_pause)
                if pause == "stop":
                    raise pauses.interruption()
        self.progress.loss[0] += float(loss)

    def _steps(self, images: int) -> Iterable[int]:
        """Where the steps of this epoch that are left begin; rank 0 shows how far it is.

        Batch norms need two images a rank: a last step of fewer is left out, other images fall into it in the next epoch.
        """
        end = images - self.world.size if images > self.step_images else images
        steps = range(self.progress.position, end, self.step_images)
        return with_progress(steps, len(steps), f"epoch {self.progress.epoch + 1}", "step") if self.world.first else steps

    def train_step(self, own: NDArray[np.int64]) -> Tensor:
        """One change of the weights from this rank's images; returns its mean loss.

        Raises:
            ConfigError: the gradient is not finite. DDP has averaged it, so all ranks see the same and stop together,
                before the optimizer has touched the weights.
        """
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        batches = np.array_split(own, min(-(-len(own) // self.config.batch_size), max(len(own) // 2, 1)))
        for i, indices in enumerate(batches):
            self._seed(i)
            images, labels = (tensor.to(self.world.device, non_blocking=True) for tensor in self.train.batch(indices))
            with nullcontext() if i == len(batches) - 1 else self.parallel.no_sync(), self._autocast():
                loss = self.objective.loss(self.parallel, images, labels) * (len(indices) / len(own))
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        self._step()
        return total

    def _step(self) -> None:
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.objective.module.parameters(), self.config.clip_norm)
        is_scale_left = self.scaler.is_enabled() and self.scaler.get_scale() >= 1  # a scaler goes on with half of it
        if not torch.isfinite(norm) and not is_scale_left:
            self._give_up("the gradient")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average:
            self.average.update_parameters(self.network)

    def validate(self) -> float:
        """The score of the whole validation split, the same number on all ranks.

        Raises:
            ConfigError: the network's answers are not finite.
        """
        rows = self.answers(self.val)
        if not np.isfinite(rows).all():
            self._give_up("an answer")
        return self.validation.score(self.val.labels, rows)

    @torch.inference_mode()
    def answers(self, shard: Shard) -> NDArray[np.float32]:
        """(N, columns) what validation keeps of each image of a split: each rank computes its part, all ranks get all."""
        share_buffers(self.candidate)
        self.candidate.eval()
        own, size = np.arange(self.world.rank, len(shard), self.world.size), self.config.batch_size
        parts = []
        for start in range(0, len(own), size):
            images, targets = (tensor.to(self.world.device) for tensor in shard.batch(own[start : start + size]))
            parts.append(self.validation.rows(self.candidate(images)[0], targets).cpu())
        rows = torch.cat(parts).numpy() if parts else np.empty((0, self.validation.columns), dtype=np.float32)
        return gather_rows(rows, len(shard), self.world)

    def state(self) -> dict[str, Any]:
        """Everything that a resume needs, as tensors and plain values."""
        return {
            "network": self.objective.module.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": vars(self.progress) | {"seconds": self.seconds},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`, also that of another number of ranks."""
        self.objective.module.load_state_dict(state["network"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(**state["progress"])
        if not self.world.first:  # the loss so far is that of all ranks
            self.progress.loss = [0.0, 0.0]

    def _pause(self, on_pause: Callable[[], None]) -> None:
        summed = sum_over_ranks(self.progress.loss, self.world)
        self.progress.loss = summed if self.world.first else [0.0, 0.0]
        on_pause()
        sum_over_ranks([], self.world)  # a rank that left now would end the one that writes

    def _give_up(self, what: str) -> NoReturn:
        raise ConfigError(
            f"training: {what} became non-finite in epoch {self.progress.epoch + 1}; "
            f"lower training.learning_rate (now {self.config.learning_rate:g})"
        )

    def _seed(self, batch: int) -> None:
        """Seed the generators for this batch of the step."""
        seed = seed_of(self.config.seed, self.progress.epoch, self.progress.position, batch, self.world.rank)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device, which takes a while
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, self.precision, enabled=self.precision is not torch.float32)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer learns, each group with the peak of its learning rate."""
        if isinstance(self.config.objective, FineTuning):
            freeze(self.network, self.config.objective)
            groups = parameter_groups(self.network, self.config.learning_rate, self.config.objective)
        else:
            groups = [{"params": list(self.objective.module.parameters()), "lr": self.config.learning_rate}]
        return [group | {"peak": group["lr"]} for group in groups]

    def _set_learning_rate(self) -> None:
        middle = min(self.progress.position + self.step_images / 2, len(self.train))  # of this step
        done = (self.progress.epoch + middle / len(self.train)) / self.config.epochs
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share_of_peak(done, self.config)

    def _class_weights(self) -> Tensor | None:
        if not self.config.class_weights:
            return None
        counts = self.train.class_counts(self.network.classes)
        weights = counts.sum() / np.maximum(counts, 1) / len(counts)
        return torch.tensor(weights, dtype=torch.float32, device=self.world.device)

    def _out_of_patience(self) -> bool:
        behind = self.progress.epoch - self.progress.best_epoch
        return 0 < self.config.patience <= behind

    def _note(self, score: float, images_per_second: float) -> None:
        self.progress.epoch += 1
        self.progress.position, self.progress.loss = 0, [0.0, 0.0]
        self.progress.images_per_second = images_per_second
        self.progress.history.append(score)
        if score > self.progress.best_score:
            self.progress.best_score, self.progress.best_epoch = score, self.progress.epoch
            self.progress.best_weights = copy.deepcopy(self.candidate.state_dict())


def share_of_peak(done: float, config: TrainingConfig) -> float:
    """The learning rate as a share of its peak, when a share ``done`` of all images is taken.

    A function of that share rather than of steps: the number of processes, and with it that of steps, may change.
    """
    lowest = 1 / 25 if config.schedule == "one_cycle" else 0.0
    last = lowest / 10_000 if config.schedule == "one_cycle" else 0.0
    if done < config.warmup:
        return lowest + (1 - lowest) * (1 - math.cos(math.pi * done / config.warmup)) / 2
    if config.schedule == "constant":
        return 1.0
    return last + (1 - last) * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup))) / 2


def own_precision(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """The type of the forward pass's numbers on this device.

    Raises:
        ConfigError: it cannot do what is asked for.
    """
    if config.precision != "auto":
        if config.precision == "float16" and device.type == "cpu":
            raise ConfigError("training.precision: float16 given, there is no GPU; allowed on CPUs: auto, float32, bfloat16")
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[config.precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def moving_average(network: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of the weights and buffers."""
    return AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]
