"""Batches straight from the memory-mapped shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler

from cv_factory_ops.config import AugmentConfig
from cv_factory_ops.predictor import to_tensor


@dataclass(frozen=True)
class Shard(Dataset[int]):
    """One split: images (N, H, W) uint16, memory-mapped, and labels (N,) int64. It is read in batches, not by item."""

    images: NDArray[np.uint16]
    labels: NDArray[np.int64]

    @classmethod
    def open(cls, folder: Path, split: str) -> Shard:
        import pyarrow.parquet as pq

        labels = pq.read_table(folder / f"{split}.parquet", columns=["label"])["label"].to_numpy()
        return cls(np.load(folder / f"{split}.npy", mmap_mode="r", allow_pickle=False), labels.astype(np.int64))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (n, 1, H, W) float32 in 0..1 and labels (n,)."""
        return to_tensor(self.images[indices]), torch.from_numpy(self.labels[indices])

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        return np.bincount(self.labels, minlength=classes)


def train_batches(shard: Shard, sampler: DistributedSampler[int], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's batches of one epoch, in the sampler's order."""
    order = np.fromiter(sampler, dtype=np.int64)
    for start in range(0, len(order), size):
        yield shard.batch(order[start : start + size])


def augment(images: Tensor, config: AugmentConfig) -> Tensor:
    """Random flip, translation, contrast, brightness and noise of (n, 1, H, W) images; the range stays 0..1."""
    count, _, rows, columns = images.shape
    if config.shift:
        images = _shift(images, round(config.shift * rows), round(config.shift * columns))
    if config.flip:
        images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images.flip(3), images)
    if config.intensity:
        contrast = 1 + config.intensity * (2 * torch.rand(count, 1, 1, 1) - 1)
        brightness = config.intensity * (2 * torch.rand(count, 1, 1, 1) - 1)
        images = ((images - 0.5) * contrast + 0.5 + brightness).clamp_(0, 1)
    if config.noise:
        images = (images + config.noise * torch.rand(count, 1, 1, 1) * torch.randn_like(images)).clamp_(0, 1)
    return images


def _shift(images: Tensor, most_rows: int, most_columns: int) -> Tensor:
    """Translate each image by its own whole number of pixels; what moves in at the border repeats the border."""
    count, _, rows, columns = images.shape
    down = torch.randint(-most_rows, most_rows + 1, (count, 1))
    right = torch.randint(-most_columns, most_columns + 1, (count, 1))
    row = (torch.arange(rows) + down).clamp_(0, rows - 1)
    column = (torch.arange(columns) + right).clamp_(0, columns - 1)
    return images[torch.arange(count)[:, None, None], 0, row[:, :, None], column[:, None, :]].unsqueeze(1)
