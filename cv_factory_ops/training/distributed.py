"""What a rank needs to know of the others."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn


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
    """Join the process group that torchrun describes: NCCL where there are GPUs, gloo elsewhere."""
    _die_with_parent()
    local_rank = int(os.environ["LOCAL_RANK"])
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


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


def _die_with_parent() -> None:
    """Ask Linux to kill this rank when the launcher dies, however it dies: a retry must not meet a survivor."""
    if sys.platform == "linux":
        launcher = int(os.environ["CVF_LAUNCHER_PID"])
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it died before it could be asked
            os.kill(os.getpid(), signal.SIGKILL)
