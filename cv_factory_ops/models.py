"""The networks: each gives logits and the embedding that they are computed from.

``freeze`` and ``parameter_groups`` say which stages of one learn, and how fast.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Self, assert_never

import torch
from torch import Tensor, nn

from cv_factory_ops.config.models import (
    AnyModel,
    DenseNet,
    EfficientNet,
    EnsembleModel,
    Member,
    ResNet,
    RetinaNet,
    SmallCnn,
    Unet,
    Vit,
)
from cv_factory_ops.config.training import FineTuning
from cv_factory_ops.errors import ConfigError

Stage = list[nn.Module | nn.Parameter]


class Classifier(nn.Module):
    """Standardise, embed, classify.

    Input: float32, N x channels x H x W, 0..1. Output: logits (N x classes) and embedding (N x features). The mean and the
    standard deviation of the training images are part of the weights, so serving cannot forget them.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AnyModel, backbone: nn.Module, head: nn.Module, classes: int, mean: float, std: float) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        self.backbone, self.head = backbone, head
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.frozen: list[nn.Module] = []

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.embed(images)
        return self.head(embedding), embedding

    def embed(self, images: Tensor) -> Tensor:
        """(N, features)"""
        embedding: Tensor = self.backbone((images - self.mean) / self.std)
        return embedding

    def train(self, mode: bool = True) -> Self:
        """As every module's; what is frozen stays in evaluation mode, so that its batch norms keep their statistics."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def features(self) -> int:
        """Length of an embedding."""
        return sum(layer.in_features for layer in self.head.modules() if isinstance(layer, nn.Linear))


class Segmenter(Classifier):
    """Standardise, and classify each pixel.

    Logits are (N, classes, H, W); the embedding is the mean over the image of what the lowest resolution holds.
    """

    config: Unet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels, embedding = self.backbone((images - self.mean) / self.std)
        return self.head(pixels), embedding

    def embed(self, images: Tensor) -> Tensor:
        return self(images)[1]  # type: ignore[no-any-return]

    @property
    def features(self) -> int:
        return self.config.width * self.config.factor


class Detector(Classifier):
    """Standardise, and answer at each anchor of :func:`cv_factory_ops.detection.anchors` whether and where a box is.

    Outputs are (N, anchors, 4 + classes - 1): how the box differs from the anchor, as MONAI's ``BoxCoder`` tells it, then the
    logits of all classes but the first, each by itself. The embedding is the mean over the image of the ResNet's last stage.
    """

    config: RetinaNet

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps, embedding = self.backbone((images - self.mean) / self.std)
        return self.head(maps), embedding

    def embed(self, images: Tensor) -> Tensor:
        return self(images)[1]  # type: ignore[no-any-return]

    @property
    def features(self) -> int:
        return self.config.width * 8 * _expansion(self.config)


def build(config: AnyModel, classes: int, mean: float = 0.0, std: float = 1.0, channels: int = 1, size: int = 64) -> Classifier:
    """A new network with random weights for images of that many channels; of ``vit`` for images of size x size alone."""
    match config:
        case SmallCnn():
            backbone, head = _small_cnn(config, classes, channels)
        case ResNet():
            backbone, head = _resnet(config, classes, channels)
        case DenseNet():
            backbone, head = _densenet(config, classes, channels)
        case EfficientNet():
            backbone, head = _efficientnet(config, classes, channels)
        case Vit():
            backbone, head = _vit(config, classes, channels, size)
        case Unet():
            return Segmenter(config, *_unet(config, classes, channels), classes, mean, std)
        case RetinaNet():
            return Detector(config, *_retinanet(config, classes, channels), classes, mean, std)
        case EnsembleModel():
            return join(config, [build(member.model, classes, mean, std, channels, size) for member in config.members])
        case _:
            assert_never(config)
    return Classifier(config, backbone, head, classes, mean, std)


def join(config: EnsembleModel, members: Sequence[Classifier]) -> Classifier:
    """Networks that were trained on the same images as one: its probabilities are the weighted mean of theirs, as the members
    are calibrated.

    Its embedding is theirs side by side, all that the answer is computed from: what only one of them sees is seen.
    """
    first, backbone = members[0], _SideBySide([member.backbone for member in members])
    heads, widths = [member.head for member in members], [member.features for member in members]
    head = _MeanAnswer(heads, widths, config.members)
    return Classifier(config, backbone, head, first.classes, float(first.mean), float(first.std))


class _SideBySide(nn.Module):
    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([member(images) for member in self.members], 1)


class _MeanAnswer(nn.Module):
    """Logits whose softmax is the weighted mean of what several heads say, each of its part of the embedding."""

    temperatures: Tensor
    biases: Tensor
    log_weights: Tensor

    def __init__(self, heads: Sequence[nn.Module], widths: Sequence[int], members: Sequence[Member]) -> None:
        super().__init__()
        self.members, self.widths = nn.ModuleList(heads), list(widths)
        for name, values in (
            ("temperatures", [[member.temperature] for member in members]),
            ("biases", [member.bias for member in members]),
            ("log_weights", [[math.log(member.weight)] for member in members]),
        ):  # members x 1 x (classes or 1); the configuration holds them, so the weights need not
            self.register_buffer(name, torch.tensor(values)[:, None], persistent=False)

    def forward(self, embedding: Tensor) -> Tensor:
        parts = torch.split(embedding, self.widths, 1)
        logits = torch.stack([head(part) for head, part in zip(self.members, parts, strict=True)])
        answers = (logits / self.temperatures + self.biases).log_softmax(2)
        return (answers + self.log_weights).logsumexp(0)


def _small_cnn(config: SmallCnn, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
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
    return backbone, nn.Sequential(nn.Dropout(config.dropout), nn.Linear(channels, classes))


def _resnet(config: ResNet, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
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
    return network, head


def _densenet(config: DenseNet, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks import nets

    network = getattr(nets, f"DenseNet{config.depth}")(spatial_dims=2, in_channels=channels, out_channels=classes)
    head, network.class_layers.out = network.class_layers.out, nn.Identity()
    return network, head


def _efficientnet(config: EfficientNet, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks.nets import EfficientNetBN

    # MONAI's momentum, 0.01, takes hundreds of steps to follow: more than a small training has.
    norm = ("batch", {"eps": 1e-3, "momentum": 0.1})
    name = f"efficientnet-{config.variant}"
    network = EfficientNetBN(name, pretrained=False, in_channels=channels, num_classes=classes, norm=norm)
    head = nn.Sequential(network._dropout, network._fc)
    network._dropout, network._fc = nn.Identity(), nn.Identity()
    return network, head


def _vit(config: Vit, classes: int, channels: int, size: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks.nets import ViT

    class ClassToken(ViT):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Tensor:
            embedding: Tensor = super().forward(images)[0]
            return embedding

    network = ClassToken(
        in_channels=channels,
        img_size=size,
        patch_size=config.patch,
        hidden_size=config.width,
        mlp_dim=4 * config.width,
        num_layers=config.layers,
        num_heads=config.heads,
        classification=True,
        num_classes=classes,
        dropout_rate=config.dropout,
        spatial_dims=2,
        post_activation="",  # what is not Tanh is none
    )
    for block in network.blocks:
        block.norm_cross_attn = nn.Identity()  # MONAI has it in every block and calls it in none: DDP would wait for it
    head, network.classification_head = network.classification_head, nn.Identity()
    return network, head


def _unet(config: Unet, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks.nets import UNet

    class WithBottom(UNet):  # type: ignore[misc]
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            pixels, bottom = _descend(self.model, images)
            return pixels, bottom.mean((2, 3))

    network = WithBottom(
        spatial_dims=2,
        in_channels=channels,
        out_channels=config.width,
        channels=[config.width * 2**level for level in range(config.levels)],
        strides=[2] * (config.levels - 1),
        num_res_units=config.residual_units,
        dropout=config.dropout,
    )
    return network, nn.Conv2d(config.width, classes, 1)


def _descend(block: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a level of MONAI's U-Net gives, and what the lowest one in it does.

    A level is a way down, a skip connection around the levels below, and a way up.
    """
    from monai.networks.layers import SkipConnection

    if not (isinstance(block, nn.Sequential) and len(block) == 3 and isinstance(block[1], SkipConnection)):
        bottom = block(images)
        return bottom, bottom
    images = block[0](images)
    inner, bottom = _descend(block[1].submodule, images)
    return block[2](torch.cat([images, inner], 1)), bottom


BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
"""Of a ResNet's stages, by its depth (He et al. 2016, table 1; 10 is MONAI's)."""


def _expansion(config: RetinaNet) -> int:
    """Channels that a block gives, as a multiple of those that it is named by."""
    return 4 if config.depth >= 50 else 1


def _retinanet(config: RetinaNet, classes: int, channels: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks.blocks.feature_pyramid_network import FeaturePyramidNetwork
    from monai.networks.nets import ResNet as MonaiResNet

    widths = [config.width * 2**stage for stage in range(4)]

    class WithPyramid(MonaiResNet):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(
                "bottleneck" if config.depth >= 50 else "basic",
                list(BLOCKS[config.depth]),
                widths,
                spatial_dims=2,
                n_input_channels=channels,
                conv1_t_size=3 if config.small_input else 7,
                conv1_t_stride=1 if config.small_input else 2,
                no_max_pool=config.small_input,
                feed_forward=False,
            )
            self.pyramid = FeaturePyramidNetwork(2, [_expansion(config) * width for width in widths[1:]], 4 * config.width)

        def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
            features = self.act(self.bn1(self.conv1(images)))
            features = self.layer1(features if self.no_max_pool else self.maxpool(features))
            maps = {}
            for name in ("layer2", "layer3", "layer4"):
                maps[name] = features = getattr(self, name)(features)
            return list(self.pyramid(maps).values()), features.mean((2, 3))

    return WithPyramid(), _BoxHead(4 * config.width, classes - 1)


class _BoxHead(nn.Module):
    """The heads of MONAI's RetinaNet with one anchor a place, which see all resolutions alike."""

    def __init__(self, features: int, categories: int) -> None:
        from monai.apps.detection.networks.retinanet_network import RetinaNetClassificationHead, RetinaNetRegressionHead

        super().__init__()
        self.differences = RetinaNetRegressionHead(features, 1, 2)
        self.logits = RetinaNetClassificationHead(features, 1, categories, 2)

    def forward(self, maps: list[Tensor]) -> Tensor:
        # Their own forward ends a training by another word for what is not finite, and the loop looks for that itself.
        found = []
        for features in maps:
            boxes = self.differences.bbox_reg(self.differences.conv(features))
            logits = self.logits.cls_logits(self.logits.conv(features))
            found.append(torch.cat([boxes, logits], 1).flatten(2).transpose(1, 2))
        return torch.cat(found, 1)


def stages(network: Classifier) -> dict[str, Stage]:
    """Parts of a network from its input to its head, by name; together they have all of its weights."""
    backbone = {
        name: [attrgetter(part)(network.backbone) for part in parts.split()] for name, parts in _stage_parts(network.config)
    }
    return backbone | {"head": [network.head]}


def _stage_parts(config: AnyModel) -> list[tuple[str, str]]:
    """Name of each stage of the backbone, and its modules and parameters with weights."""
    match config:
        case SmallCnn():
            first = (0, 7, 14)  # a block has 7 layers: convolution, batch norm, activation, the same again, pooling
            return [(f"block{i}", f"{at} {at + 1} {at + 3} {at + 4}") for i, at in enumerate(first, 1)]
        case ResNet():
            return [("stem", "conv1 bn1"), *((f"layer{i}", f"layer{i}") for i in range(1, 5))]
        case DenseNet():
            ends = ("transition1", "transition2", "transition3", "norm5")
            blocks = [(f"block{i}", f"features.denseblock{i} features.{end}") for i, end in enumerate(ends, 1)]
            return [("stem", "features.conv0 features.norm0"), *blocks]
        case EfficientNet():
            blocks = [(f"block{i + 1}", f"_blocks.{i}") for i in range(7)]
            return [("stem", "_conv_stem _bn0"), *blocks, ("top", "_conv_head _bn1")]
        case Vit():
            *blocks, last = [(f"block{i + 1}", f"blocks.{i}") for i in range(config.layers)]
            return [("stem", "patch_embedding cls_token"), *blocks, (last[0], f"{last[1]} norm")]
        case Unet():
            levels = ["model" + ".1.submodule" * level for level in range(config.levels)]
            down = [(f"down{i}", f"{level}.0") for i, level in enumerate(levels[:-1], 1)]
            up = [(f"up{i}", f"{level}.2") for i, level in enumerate(levels[:-1], 1)]
            return [*down, ("bottom", levels[-1]), *reversed(up)]
        case RetinaNet():
            return [("stem", "conv1 bn1"), *((f"layer{i}", f"layer{i}") for i in range(1, 5)), ("pyramid", "pyramid")]
        case EnsembleModel():
            raise TypeError("an ensemble is not trained as a whole: it has no stages of its own")
        case _:
            assert_never(config)


def freeze(network: Classifier, finetuning: FineTuning) -> None:
    """Hold the first stages as they are: their weights, and in training mode the statistics of their batch norms too.

    Raises:
        ConfigError: the backbone has fewer stages.
    """
    frozen = [part for stage in _split(network, finetuning)[0] for part in stage]
    for part in frozen:
        part.requires_grad_(False)
    network.frozen = [part for part in frozen if isinstance(part, nn.Module)]


def parameter_groups(network: Classifier, learning_rate: float, finetuning: FineTuning) -> list[dict[str, Any]]:
    """What an optimizer is given: the weights that are not frozen, by their learning rate.

    It is ``learning_rate`` for the head, and ``decay`` times that of the stage after it for any other (Howard & Ruder 2018,
    section 3.2).
    """
    learning = _split(network, finetuning)[1]
    groups: dict[float, list[nn.Parameter]] = {}
    for distance, stage in zip(reversed(range(len(learning))), learning, strict=True):
        groups.setdefault(learning_rate * finetuning.decay**distance, []).extend(_weights(stage))
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def _split(network: Classifier, finetuning: FineTuning) -> tuple[list[Stage], list[Stage]]:
    """The stages that are frozen, and those that learn."""
    *names, _ = parts = stages(network)
    if finetuning.frozen > len(names):
        raise ConfigError(
            f"training.objective.frozen: {finetuning.frozen} given; allowed: 0 to {len(names)}, the stages of "
            f"model.kind {network.config.kind} before its head: {', '.join(names)}"
        )
    count = len(names) if finetuning.probe else finetuning.frozen
    return list(parts.values())[:count], list(parts.values())[count:]


def _weights(stage: Stage) -> list[nn.Parameter]:
    return [weight for part in stage for weight in ([part] if isinstance(part, nn.Parameter) else part.parameters())]
