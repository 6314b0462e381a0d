"""Images per second of the training loop beside a bare PyTorch loop and PyTorch Lightning, on the same network and tensors.

    python -m benchmarks.training_loop [--processes 1] [--kind small_cnn] [--size 28] [--rounds 7] [--epochs 10]

All loops live in the same process (one process: against a plain network; more: against a bare DDP script under the same
torchrun) and take turns, an epoch each; what counts is the ratio within each round. Ours also clips the gradient, checks that
it is finite, follows a schedule, seeds each step, asks whether to stop and converts the stored uint16 images; augmentation is
off, as the other loops have none. Lightning takes part with one process, if it is installed (``pip install lightning``),
without logger, checkpoints and progress bar.

Then ``--epochs`` epochs of ours: images/s and resident memory of the first and the last ones, and with more than one process
the share of a step that is spent in all-reduce (the time of a step beside that of one without it).
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cv_factory_ops.config.models import ResNet, SmallCnn
from cv_factory_ops.config.training import AugmentConfig, TrainingConfig
from cv_factory_ops.models import build
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.distributed import Pauses, World, join
from cv_factory_ops.training.loop import Trainer

IMAGES, BATCH, SEED = 2048, 32, 0


class Ours:
    """The platform's loop, an epoch at a time."""

    def __init__(self, network: nn.Module, shard: Shard, epochs: int, world: World) -> None:
        still = AugmentConfig(flip=False, shift=0, intensity=0)
        self.trainer = Trainer(network, shard, shard, TrainingConfig(epochs=epochs, batch_size=BATCH, augment=still), world)
        self.pauses = Pauses(world, Path("/nonexistent/stop"), 1e9)

    def epoch(self) -> float:
        started = time.perf_counter()
        self.trainer.train_epoch(lambda: None, self.pauses)
        seconds = time.perf_counter() - started
        self.trainer.progress.epoch += 1
        self.trainer.progress.position = 0
        return seconds


class Bare:
    """What a tutorial does: shuffled batches of float tensors, forward, backward, step."""

    def __init__(self, network: nn.Module, images: np.ndarray, labels: np.ndarray, world: World) -> None:
        self.network = DistributedDataParallel(network) if world.size > 1 else network
        self.images = torch.from_numpy(images.astype(np.float32) / 65535).unsqueeze(1)
        self.labels, self.world, self.epochs = torch.from_numpy(labels), world, 0
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-3)

    def epoch(self) -> float:
        self.epochs += 1
        loss_of = nn.CrossEntropyLoss()
        generator = torch.Generator().manual_seed(self.epochs)
        order = torch.randperm(IMAGES, generator=generator)[self.world.rank :: self.world.size]
        self.network.train()
        started = time.perf_counter()
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            self.optimizer.zero_grad()
            loss_of(self.network(self.images[rows])[0], self.labels[rows]).backward()
            self.optimizer.step()
        return time.perf_counter() - started


def lightning_epoch(network: nn.Module, images: np.ndarray, labels: np.ndarray) -> Callable[[], float] | None:
    """An epoch of Lightning's trainer over the same tensors, without what is around it; None where it is not installed."""
    try:
        import lightning
    except ModuleNotFoundError:
        return None
    import logging

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")

    class Module(lightning.LightningModule):
        seconds = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return nn.functional.cross_entropy(self.network(batch[0])[0], batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.network.parameters(), 1e-3)

        def on_train_epoch_start(self) -> None:
            self.started = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            self.seconds = time.perf_counter() - self.started

    tensors = torch.utils.data.TensorDataset(
        torch.from_numpy(images.astype(np.float32) / 65535).unsqueeze(1), torch.from_numpy(labels)
    )
    loader = torch.utils.data.DataLoader(tensors, BATCH, shuffle=True)
    module = Module()

    def epoch() -> float:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        lightning.Trainer(max_epochs=1, accelerator="cpu", devices=1, **quiet).fit(module, loader)
        return module.seconds

    return epoch


def measure(kind: str, size: int, rounds: int, epochs: int, world: World) -> None:
    """Print images/s of all and their ratios, as rank 0; then those of ours over several epochs."""
    generator = np.random.default_rng(SEED)
    images = generator.integers(0, 65535, (IMAGES, size, size), dtype=np.uint16)
    labels = generator.integers(0, 2, IMAGES)
    config = SmallCnn(width=32) if kind == "small_cnn" else ResNet(depth=18)
    shard = Shard(Images([images]), labels)
    ours = Ours(build(config, 2, 0.5, 0.25), shard, rounds + epochs + 1, world)
    loops: dict[str, Callable[[], float]] = {"ours": ours.epoch}
    loops["bare"] = Bare(build(config, 2, 0.5, 0.25), images, labels, world).epoch
    if world.size == 1 and (lightning := lightning_epoch(build(config, 2, 0.5, 0.25), images, labels)):
        loops["Lightning"] = lightning
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, epoch in loops.items():
            torch.distributed.barrier()
            seconds[name].append(epoch())
    if world.first:
        report(kind, size, world, {name: values[1:] for name, values in seconds.items()})  # the first round warms up
    steady(ours, epochs, world)
    if world.size > 1:
        all_reduce(ours, world)


def report(kind: str, size: int, world: World, seconds: dict[str, list[float]]) -> None:
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, seed {SEED}, batch {BATCH}")
    for name, values in seconds.items():
        ratios = [other / own for other, own in zip(values, seconds["ours"], strict=True)]
        versus = (
            f", ours/{name} {statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})" if name != "ours" else ""
        )
        rate = IMAGES / statistics.median(values)
        print(f"{kind} {size} px, {world.size} process(es), {len(values)} rounds: {name} {rate:.0f} images/s{versus}")


def steady(ours: Ours, epochs: int, world: World) -> None:
    rates, memory = [], []
    for _ in range(epochs):
        rates.append(IMAGES / ours.epoch())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20)
    if world.first:
        third = max(epochs // 3, 1)
        early, late = statistics.median(rates[:third]), statistics.median(rates[-third:])
        print(
            f"{epochs} epochs: {early:.0f} images/s in the first third, {late:.0f} in the last ({late / early:.3f});", end=" "
        )
        print(f"resident memory {memory[0]:.0f} MiB after the first, {memory[-1]:.0f} MiB after the last epoch")


def all_reduce(ours: Ours, world: World) -> None:
    """Steps with and without the exchange of gradients, in turns."""
    own = np.arange(BATCH)
    images, labels = ours.trainer.train.batch(own)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for step in range(80):
        with_exchange = step % 2 == 0
        torch.distributed.barrier()
        started = time.perf_counter()
        if with_exchange:
            ours.trainer.objective.loss(ours.trainer.parallel, images, labels).backward()
        else:
            with ours.trainer.parallel.no_sync():
                ours.trainer.objective.loss(ours.trainer.parallel, images, labels).backward()
        seconds[with_exchange].append(time.perf_counter() - started)
    if world.first:
        exchanged, alone = statistics.median(seconds[True]), statistics.median(seconds[False])
        print(f"forward and backward {1000 * exchanged:.1f} ms with all-reduce, {1000 * alone:.1f} ms without:", end=" ")
        print(f"{max(1 - alone / exchanged, 0):.0%} of it is spent in all-reduce")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kind", choices=["small_cnn", "resnet"], default="small_cnn")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1"]
        command += [f"--nproc-per-node={options.processes}", "-m", "benchmarks.training_loop", *sys.argv[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)
    os.environ["CVF_LAUNCHER_PID"] = str(os.getppid())
    torch.set_num_threads(1)
    with join() as world:
        measure(options.kind, options.size, options.rounds, options.epochs, world)


if __name__ == "__main__":
    main()
