"""What a rank needs to know of the others."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cv_factory_ops.errors import ConfigError, CvFactoryError, PeerLost, Unavailable
from cv_factory_ops.processes import die_with
from cv_factory_ops.records import Frozen
from cv_factory_ops.training.gang import GOES_ON

F = TypeVar("F", bound=Frozen)

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: rank 0 writes the checkpoint meanwhile. A rank that has died is noticed at once."""


LOOK_SECONDS, MOST_STEPS = 1.0, 64
"""About how often, and after how many steps at the latest, ranks ask each other whether to pause."""


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
    store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
    # Ranks that torchrun starts again find the addresses of those that have died in the store of the launch.
    own = PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=TIMEOUT, device_id=device if gpu else None)
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


class Pauses:
    """When all ranks leave off, after the same step: to keep a checkpoint, or to stop because ``stop`` has appeared.

    They ask each other about once a second: doing so after each step would cost small networks a share of their speed.
    """

    def __init__(self, world: World, stop: Path, seconds: float) -> None:
        self._world, self._stop, self._seconds = world, stop, seconds
        self._steps, self._look_after = 0, 1
        self._looked = self._kept = time.monotonic()

    def interruption(self) -> CvFactoryError:
        """Why training stops: this node itself was asked to, or another one."""
        is_own = self._stop.exists()
        return Unavailable(f"interrupted; {GOES_ON}") if is_own else PeerLost("lost a peer: it was interrupted")

    def due(self) -> Literal["stop", "keep"] | None:
        """To be called after each step, by all ranks."""
        self._steps += 1
        if self._steps < self._look_after:
            return None
        now = time.monotonic()
        pace = self._steps / max(now - self._looked, 1e-6)
        look_after = min(max(int(pace * LOOK_SECONDS), 1), MOST_STEPS)
        is_old = now - self._kept >= self._seconds
        said = [look_after, is_old] if self._world.first else [0, 0]
        self._look_after, keep, stop = (round(value) for value in sum_over_ranks([*said, self._stop.exists()], self._world))
        self._steps, self._looked = 0, now
        if keep or stop:
            self._kept = now
        return "stop" if stop else "keep" if keep else None


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


def shared(record: F | None, kind: type[F], world: World) -> F | None:
    """Rank 0's record of that kind, or its None, on all ranks."""
    box = [record.model_dump_json() if record else ""]
    dist.broadcast_object_list(box, device=world.device)
    return kind.model_validate_json(box[0]) if box[0] else None


def share_buffers(network: nn.Module) -> None:
    """Give all ranks rank 0's buffers (batch-norm statistics), so that all ranks validate the same network."""
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)
