"""What a rank needs to know of the others."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from cv_factory_ops.errors import ConfigError
from cv_factory_ops.processes import die_with

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: rank 0 writes the checkpoint meanwhile. A rank that has died is noticed at once."""


@dataclass(frozen=True)
class World:
    """This process among all processes of the training."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Rank 0: it alone writes checkpoints and MLflow."""
        return self.rank == 0


@contextmanager
def join() -> Iterator[World]:
    """Join the process group that torchrun describes: NCCL where there are GPUs, gloo elsewhere.

    A rank that fails does not leave the group in order: the others would learn of it before its reason is written, and with
    NCCL it might wait for them.

    Raises:
        ConfigError: there is no GPU left for this rank.
    """
    die_with(int(os.environ["CVF_LAUNCHER_PID"]))
    device = own_device()
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", timeout=TIMEOUT, device_id=device if gpu else None)
    yield World(dist.get_rank(), dist.get_world_size(), device)
    dist.destroy_process_group()


def own_device() -> torch.device:
    """The GPU of this rank, the CPU on a machine without any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local_rank >= gpus:
        raise ConfigError(
            f"training.processes_per_node: {os.environ['LOCAL_WORLD_SIZE']} given, this machine has {gpus} "
            f"GPU{'s' if gpus > 1 else ''}; allowed: at most one process a GPU"
        )
    return torch.device("cuda", local_rank)


def lost_peer(error: Exception) -> bool:
    """Whether a call failed because another rank is gone; gloo and torch's stores only say so in words."""
    said = r"connection (closed|reset|refused)|broken pipe|timed? ?out|failed to (recv|send)|connectFullMesh"
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and re.search(said, str(error), re.IGNORECASE) is not None
    )


def gather_rows(rows: NDArray[np.float32], total: int, world: World) -> NDArray[np.float32]:
    """All ranks' rows, on all ranks: rank r holds the rows r, r + size, r + 2 size, ... of ``total``."""
    most = -(-total // world.size)
    padded = torch.zeros((most, rows.shape[1]), device=world.device)
    padded[: len(rows)] = torch.from_numpy(rows)
    parts = [torch.empty_like(padded) for _ in range(world.size)]
    dist.all_gather(parts, padded)
    joined = np.empty((total, rows.shape[1]), dtype=np.float32)
    for rank, part in enumerate(parts):
        target = joined[rank :: world.size]
        target[:] = part[: len(target)].cpu().numpy()
    return joined


def sum_over_ranks(values: list[float], world: World) -> list[float]:
    """Element-wise sum over all ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(tensor)
    return [float(value) for value in tensor]


def share_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's buffers (batch-norm statistics), so that all ranks validate the same network."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
