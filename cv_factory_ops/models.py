"""The networks: each gives logits and the embedding that they are computed from."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor, nn

from cv_factory_ops.config import Model, ResNet, SmallCnn


class Classifier(nn.Module):
    """Standardise, embed, classify.

    Input: float32, N x channels x H x W, 0..1. Output: logits (N x classes) and embedding (N x features). The mean and the
    standard deviation of the training images are part of the weights, so serving cannot forget them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, head: nn.Module, classes: int, mean: float, std: float) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.classes = classes
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.backbone((images - self.mean) / self.std)
        return self.head(embedding), embedding


def build(config: Model, classes: int, mean: float = 0.0, std: float = 1.0, channels: int = 1) -> Classifier:
    """A new network with random weights for images of that many channels."""
    match config:
        case SmallCnn():
            return _small_cnn(config, classes, mean, std, channels)
        case ResNet():
            return _resnet(config, classes, mean, std, channels)
        case _:
            assert_never(config)


def _small_cnn(config: SmallCnn, classes: int, mean: float, std: float, channels: int) -> Classifier:
    blocks: list[nn.Module] = []
    for features in (config.width, 2 * config.width, 4 * config.width):
        blocks += [
            nn.Conv2d(channels, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.Conv2d(features, features, 3, padding=1, bias=False),
            nn.BatchNorm2d(features),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
        channels = features
    backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(backbone, nn.Sequential(nn.Dropout(config.dropout), nn.Linear(channels, classes)), classes, mean, std)


def _resnet(config: ResNet, classes: int, mean: float, std: float, channels: int) -> Classifier:
    from monai.networks import nets

    network = getattr(nets, f"resnet{config.depth}")(
        spatial_dims=2,
        n_input_channels=channels,
        num_classes=classes,
        conv1_t_size=3 if config.small_input else 7,
        conv1_t_stride=1 if config.small_input else 2,
        no_max_pool=config.small_input,
        shortcut_type="B",
    )
    head, network.fc = network.fc, nn.Identity()
    return Classifier(network, head, classes, mean, std)
