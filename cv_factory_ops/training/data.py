"""Batches straight from the memory-mapped shards, and what is changed in them by chance."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from cv_factory_ops.config.training import AugmentConfig, TrainingConfig
from cv_factory_ops.ingestion.manifest import Boxes, as_boxes
from cv_factory_ops.preprocessing.pipeline import to_tensor
from cv_factory_ops.preprocessing.preprocess import PREPARED
from cv_factory_ops.preprocessing.shards import Images, open_masks, open_split


@dataclass(frozen=True)
class Shard(Dataset[int]):
    """One split: images (N, H, W[, 3]) uint16, memory-mapped, and labels (N,) int64. It is read in batches, not by item.

    ``masks`` (N, H, W) uint8 are what a segmentation learns, ``boxes`` (N, most, 5) float32 what a detection does, class 0
    being none; the labels are then those that its images are drawn by.
    """

    images: Images
    labels: NDArray[np.int64]
    masks: Images | None = None
    boxes: NDArray[np.float32] | None = None

    @classmethod
    def open(cls, folder: Path, split: str) -> Shard:
        import pyarrow.parquet as pq

        path = folder / f"{split}.parquet"
        names = [name for name in ("label", PREPARED) if name in pq.read_schema(path).names]
        table = pq.read_table(path, columns=names)
        boxes = stacked(as_boxes(table[PREPARED].to_pylist())) if PREPARED in names else None
        return cls(open_split(folder, split), table["label"].to_numpy().astype(np.int64), open_masks(folder, split), boxes)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Images (n, channels, H, W) float32 in 0..1 and labels (n,), or masks (n, H, W) int64, or boxes (n, most, 5)."""
        images = to_tensor(self.images[indices])
        if self.boxes is not None:
            return images, torch.from_numpy(self.boxes[indices])
        targets = self.labels[indices] if self.masks is None else self.masks[indices].astype(np.int64)
        return images, torch.from_numpy(targets)

    def class_counts(self, classes: int) -> NDArray[np.int64]:
        """(classes,) how often each is a target."""
        if self.masks is None:
            return np.bincount(self.labels, minlength=classes)
        counts: NDArray[np.int64] = sum(
            (np.bincount(self.masks[i].ravel(), minlength=classes) for i in range(len(self))), np.zeros(classes, np.int64)
        )
        return counts


def stacked(boxes: Sequence[Boxes]) -> NDArray[np.float32]:
    """(N, most, 5), filled up with rows of 0, of images with fewer than the most."""
    found = np.zeros((len(boxes), max(max(map(len, boxes), default=0), 1), 5), np.float32)
    for rows, of_image in zip(found, boxes, strict=True):
        rows[: len(of_image)] = of_image
    return found


def seed_of(*numbers: int) -> int:
    """A seed for these numbers; sums of them would repeat themselves."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest())


def epoch_order(labels: NDArray[np.int64], config: TrainingConfig, epoch: int) -> NDArray[np.int64]:
    """(N,) the images of an epoch in the order in which all ranks together take them; the same for any number of ranks."""
    generator = torch.Generator().manual_seed(seed_of(config.seed, epoch))
    if not config.weighted_sampling:
        return torch.randperm(len(labels), generator=generator).numpy()
    weights = torch.from_numpy(1 / np.bincount(labels)[labels])
    return torch.multinomial(weights, len(labels), replacement=True, generator=generator).numpy()


def share_of(order: NDArray[np.int64], rank: int, ranks: int) -> NDArray[np.int64]:
    """Each ``ranks``-th image from ``rank`` on; as many for each rank, so some come twice where they do not come out even."""
    return np.resize(order, -(-len(order) // ranks) * ranks)[rank::ranks]


def augment(images: Tensor, config: AugmentConfig) -> Tensor:
    """Random rotation, translation, flip, contrast, brightness, noise of (n, channels, H, W) images; the range stays 0..1."""
    return _shade(_move(images, _drawn(images, config)), config)


def augment_with_masks(images: Tensor, masks: Tensor, classes: int, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """As :func:`augment`; masks (n, H, W) int64 are moved as their images are.

    What turns between pixels is interpolated class by class, and the class of the greatest share is taken.
    """
    of_classes = functional.one_hot(masks, classes).permute(0, 3, 1, 2).to(images.dtype)
    moved = _move(torch.cat([images, of_classes], 1), _drawn(images, config))
    channels = images.shape[1]
    return _shade(moved[:, :channels].contiguous(), config), moved[:, channels:].argmax(1)


def augment_with_boxes(images: Tensor, boxes: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """As :func:`augment`; boxes (n, most, 5) are moved as their images are.

    Of a box that is turned it is the box around that. Boxes are cut at the border; one whose middle moves out becomes class 0.
    """
    motion = _drawn(images, config)
    return _shade(_move(images, motion), config), _move_boxes(boxes, motion, images.shape[2], images.shape[3])


@dataclass(frozen=True)
class _Motion:
    """How each of n images is moved: turned first, then shifted, then mirrored; None where none of them is."""

    turn: tuple[Tensor, Tensor] | None
    """(n,) angle in radians, and pixels of the image that become one"""
    shift: tuple[Tensor, Tensor] | None
    """(n, 1) rows and columns that it is moved up and to the left"""
    mirrored: Tensor | None
    """(n, 1, 1, 1) bool"""


def _drawn(images: Tensor, config: AugmentConfig) -> _Motion:
    (count, _, rows, columns), device = images.shape, images.device
    turn = shift = mirrored = None
    if config.rotate or config.zoom:
        angle = torch.deg2rad(config.rotate * (2 * torch.rand(count, device=device) - 1))
        scale = 1 / (1 + config.zoom * torch.rand(count, device=device)) if config.zoom else torch.ones_like(angle)
        turn = angle, scale
    if config.shift:
        down, right = (
            torch.randint(-most, most + 1, (count, 1), device=device)
            for most in (round(config.shift * rows), round(config.shift * columns))
        )
        shift = down, right
    if config.flip:
        mirrored = _one_each(images) < 0.5
    return _Motion(turn, shift, mirrored)


def _move(images: Tensor, motion: _Motion) -> Tensor:
    """Rotation, zoom, translation, flip of (n, channels, H, W), all channels of an image alike."""
    if motion.turn:
        images = _turn(images, *motion.turn)
    if motion.shift:
        images = _shift(images, *motion.shift)
    if motion.mirrored is not None:
        images = torch.where(motion.mirrored, images.flip(3), images)
    return images


def _move_boxes(boxes: Tensor, motion: _Motion, rows: int, columns: int) -> Tensor:
    """As :func:`_move`, of (n, most, 5)."""
    kinds, (left, top, right, bottom) = boxes[..., 0], boxes[..., 1:].unbind(-1)
    x, y = (left + right) / 2 - columns / 2, (top + bottom) / 2 - rows / 2  # of the middle, from that of the image
    half_width, half_height = (right - left) / 2, (bottom - top) / 2
    if motion.turn:
        angle, scale = (each[:, None] for each in motion.turn)
        cosine, sine = angle.cos() / scale, angle.sin() / scale
        x, y = cosine * x + sine * y, cosine * y - sine * x
        half_width, half_height = (
            cosine.abs() * half_width + sine.abs() * half_height,
            sine.abs() * half_width + cosine.abs() * half_height,
        )
    if motion.shift:
        x, y = x - motion.shift[1], y - motion.shift[0]
    if motion.mirrored is not None:
        x = torch.where(motion.mirrored[:, :, 0, 0], -x, x)
    inside = (x.abs() < columns / 2) & (y.abs() < rows / 2)
    x, y = x + columns / 2, y + rows / 2
    low = torch.stack([(x - half_width).clamp(0, columns), (y - half_height).clamp(0, rows)], -1)
    high = torch.stack([(x + half_width).clamp(0, columns), (y + half_height).clamp(0, rows)], -1)
    return torch.cat([torch.where(inside, kinds, 0)[..., None], low, high], -1)


def _shade(images: Tensor, config: AugmentConfig) -> Tensor:
    """Contrast, brightness, noise."""
    if config.intensity:
        contrast = 1 + config.intensity * (2 * _one_each(images) - 1)
        brightness = config.intensity * (2 * _one_each(images) - 1)
        images = ((images - 0.5) * contrast + 0.5 + brightness).clamp_(0, 1)
    if config.noise:
        images = (images + config.noise * _one_each(images) * torch.randn_like(images)).clamp_(0, 1)
    return images


def mix(images: Tensor, labels: Tensor, classes: int, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """Where ``mixup`` or ``cutmix`` is on: each image mixed with another of the batch, labels (n,) -> shares (n, classes)."""
    if not (config.mixup or config.cutmix):
        return images, labels
    partner = torch.randperm(len(images), device=images.device)
    use_cutmix = bool(config.cutmix) and (not config.mixup or bool(torch.rand(()) < 0.5))
    alpha = config.cutmix if use_cutmix else config.mixup
    share = torch.distributions.Beta(alpha, alpha).sample((len(images),)).to(images.device)
    if use_cutmix:
        box = _boxes(images, 1 - share)
        images = torch.where(box, images[partner], images)
        share = 1 - box.float().mean((1, 2, 3))  # a box that reaches over the border is smaller than was drawn
    else:
        images = torch.lerp(images[partner], images, share[:, None, None, None])
    own = functional.one_hot(labels, classes).to(images.dtype)
    return images, torch.lerp(own[partner], own, share[:, None])


def _one_each(images: Tensor) -> Tensor:
    """(n, 1, 1, 1), uniform in 0..1"""
    return torch.rand(len(images), 1, 1, 1, device=images.device)


def _shift(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Translate each image by its own whole number of pixels; what moves in at the border repeats the border."""
    count, _, rows, columns = images.shape
    device = images.device
    row = (torch.arange(rows, device=device) + down).clamp_(0, rows - 1)
    column = (torch.arange(columns, device=device) + right).clamp_(0, columns - 1)
    image = torch.arange(count, device=device)[:, None, None]
    moved = images[image, :, row[:, :, None], column[:, None, :]].permute(0, 3, 1, 2)
    return moved.flatten().view(images.shape)  # contiguous() leaves one channel with strides that DDP warns of


def _turn(images: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Turn and magnify each image about its middle, each by its own measure; what turns in at the border repeats the border."""
    _, _, rows, columns = images.shape
    cosine, sine, none = scale * angle.cos(), scale * angle.sin(), torch.zeros_like(angle)
    # Both sides have length 2 in the grid, whatever their pixels.
    across = torch.stack([cosine, -sine * rows / columns, none], dim=1)
    down = torch.stack([sine * columns / rows, cosine, none], dim=1)
    grid = functional.affine_grid(torch.stack([across, down], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _boxes(images: Tensor, areas: Tensor) -> Tensor:
    """(n, 1, H, W) bool: a box of that share of the area of each image, anywhere, cut at the border"""
    count, _, rows, columns = images.shape
    inside = []
    for pixels in (rows, columns):
        middle = pixels * torch.rand(count, 1, device=images.device)
        half = pixels * areas.sqrt()[:, None] / 2
        place = torch.arange(pixels, device=images.device) + 0.5
        inside.append((place - middle).abs() <= half)
    return (inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1)
