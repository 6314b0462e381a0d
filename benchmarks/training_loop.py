"""Images per second of the training loop beside a bare PyTorch loop, on the same network and tensors.

    python benchmarks/training_loop.py [--processes 1] [--kind small_cnn] [--size 28] [--rounds 7]

Both loops live in the same process (one process: against a plain network; more: against a bare DDP script under the same
torchrun) and take turns, an epoch each; what counts is the ratio within each round. Ours also clips the gradient, checks
that it is finite, steps a schedule and converts the stored uint16 images; augmentation is off, as the bare loop has none.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cv_factory_ops.config import AugmentConfig, ResNet, SmallCnn, TrainingConfig
from cv_factory_ops.models import build
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.distributed import World, join
from cv_factory_ops.training.loop import Trainer

IMAGES, BATCH, SEED = 2048, 32, 0


def measure(kind: str, size: int, rounds: int, world: World) -> None:
    """Print images/s of both and their ratio, as rank 0."""
    generator = np.random.default_rng(SEED)
    images = generator.integers(0, 65535, (IMAGES, size, size), dtype=np.uint16)
    labels = generator.integers(0, 2, IMAGES)
    config = SmallCnn(width=32) if kind == "small_cnn" else ResNet(depth=18)
    settings = TrainingConfig(
        epochs=rounds + 1,
        batch_size=BATCH,
        augment=AugmentConfig(flip=False, shift=0, intensity=0),
    )
    shard = Shard(Images([images]), labels)
    trainer = Trainer(build(config, 2, 0.5, 0.25), shard, shard, settings, world)
    network: nn.Module = build(config, 2, 0.5, 0.25)
    if world.size > 1:
        network = DistributedDataParallel(network)
    ours, bare = [], []
    for epoch in range(rounds + 1):
        bare.append(timed(lambda epoch=epoch: bare_epoch(network, images, labels, epoch, world)))
        ours.append(timed(lambda epoch=epoch: trainer.train_epoch(epoch)))
    if world.first:
        ratios = [b / o for b, o in zip(bare[1:], ours[1:], strict=True)]  # the first round warms up
        report(kind, size, world, [IMAGES / t for t in ours[1:]], [IMAGES / t for t in bare[1:]], ratios)


def bare_epoch(network: nn.Module, images: np.ndarray, labels: np.ndarray, epoch: int, world: World) -> None:
    """What a tutorial does: shuffled batches of float tensors, forward, backward, step."""
    tensors = torch.from_numpy(images.astype(np.float32) / 65535).unsqueeze(1)
    targets = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    loss_of = nn.CrossEntropyLoss()
    order = torch.randperm(len(tensors), generator=torch.Generator().manual_seed(epoch))[world.rank :: world.size]
    network.train()
    started = time.perf_counter()
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        optimizer.zero_grad()
        loss_of(network(tensors[rows])[0], targets[rows]).backward()
        optimizer.step()
    bare_epoch.seconds = time.perf_counter() - started  # without the conversion of all images beforehand


def timed(work) -> float:
    torch.distributed.barrier()
    bare_epoch.seconds = None
    started = time.perf_counter()
    work()
    return bare_epoch.seconds or time.perf_counter() - started


def report(kind: str, size: int, world: World, ours: list[float], bare: list[float], ratios: list[float]) -> None:
    print(
        f"{kind} {size} px, {world.size} process(es): ours {statistics.median(ours):.0f} images/s, "
        f"bare {statistics.median(bare):.0f} images/s, ratio ours/bare {statistics.median(ratios):.3f} "
        f"(min {min(ratios):.3f}, max {max(ratios):.3f}, {len(ratios)} rounds)"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores, seed {SEED}, batch {BATCH}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--kind", choices=["small_cnn", "resnet"], default="small_cnn")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        launcher = subprocess.Popen([*command, *sys.argv], env=environment)
        sys.exit(launcher.wait())
    os.environ["CVF_LAUNCHER_PID"] = str(os.getppid())
    torch.set_num_threads(1)
    with join() as world:
        measure(options.kind, options.size, options.rounds, world)


if __name__ == "__main__":
    main()
