"""Networks: ``model``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cv_factory_ops.config.values import Positive, Share
from cv_factory_ops.records import Frozen


class _Network(Frozen):
    weights: str | None = None
    """Begin with these instead of random ones: a safetensors file by path, ``file://``, ``s3://``, or
    ``hf://owner/repository/file``, which alone needs a network; see docs/training.md."""

    @property
    def least_size(self) -> int:
        """Smallest ``preprocessing.size`` that leaves the last layers a pixel."""
        return 8


class SmallCnn(_Network):
    """Three convolution blocks: trains in seconds on a laptop."""

    kind: Literal["small_cnn"] = "small_cnn"
    width: int = Field(default=16, ge=4, le=256)
    """Channels of the first block; each further block doubles them."""
    dropout: Share = 0.1


class ResNet(_Network):
    """ResNet of MONAI (He et al. 2016), with a 3 x 3 stem and no max-pooling for small inputs."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[10, 18, 34, 50] = 18
    small_input: bool = True
    """Keep the resolution in the stem: for inputs below about 64 pixels."""


class DenseNet(_Network):
    """DenseNet of MONAI (Huang et al. 2017)."""

    kind: Literal["densenet"] = "densenet"
    depth: Literal[121, 169, 201] = 121

    @property
    def least_size(self) -> int:
        return 32


class EfficientNet(_Network):
    """EfficientNet of MONAI (Tan & Le 2019), with the dropout and the stochastic depth of its variant."""

    kind: Literal["efficientnet"] = "efficientnet"
    variant: Literal["b0", "b1", "b2", "b3", "b4"] = "b0"

    @property
    def least_size(self) -> int:
        return 32


class VitSize(Frozen):
    patch: int = Field(default=16, ge=2)
    """Rows and columns of a patch; ``preprocessing.size`` is a multiple of it."""
    width: int = Field(default=192, ge=8)
    """Features of a token, and of the embedding. A multiple of ``heads``, and of 4."""
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.width % self.heads or self.width % 4:
            raise ValueError("a width that is a multiple of heads, and of 4")
        return self


class Vit(VitSize, _Network):
    """Vision transformer of MONAI (Dosovitskiy et al. 2021), which answers from its class token. As it stands, ViT-Ti/16."""

    kind: Literal["vit"] = "vit"
    layers: int = Field(default=12, ge=1)
    dropout: Share = 0.1


class Unet(_Network):
    """U-Net of MONAI with residual units (Ronneberger et al. 2015, Kerfoot et al. 2019): it answers for every pixel, where
    ``task`` is ``segmentation``."""

    kind: Literal["unet"] = "unet"
    width: int = Field(default=16, ge=2, le=256)
    """Channels of the first level; each further level doubles them."""
    levels: int = Field(default=4, ge=2, le=7)
    """Resolutions, each half of the one before; ``preprocessing.size`` is a multiple of the lowest one's factor."""
    residual_units: int = Field(default=2, ge=0, le=4)
    """Convolutions of a level on the way down, with a shortcut; 0 has one without."""
    dropout: Share = 0.0

    @property
    def factor(self) -> int:
        """How many pixels a side become one at the lowest resolution."""
        return int(2 ** (self.levels - 1))

    @property
    def least_size(self) -> int:
        """Instance norms need more than one pixel."""
        return 2 * self.factor


class RetinaNet(_Network):
    """RetinaNet of MONAI (Lin et al. 2017): a ResNet with a feature pyramid that answers with boxes, where ``task`` is
    ``detection``."""

    kind: Literal["retinanet"] = "retinanet"
    depth: Literal[10, 18, 34, 50] = 18
    """Of the ResNet."""
    width: int = Field(default=64, ge=8, le=128, multiple_of=8)
    """Channels of the ResNet's first stage, 64 in the paper, each further stage doubles them; the pyramid has four times as
    many."""
    small_input: bool = True
    """Keep the resolution in the stem: boxes are then looked for every 2, 4 and 8 pixels, without it every 8, 16 and 32."""
    anchors: tuple[Positive, Positive, Positive] = (8, 16, 32)
    """Side of the square that boxes are told from, in pixels of the model's input, one for each of these three resolutions:
    about those of small, middling and large boxes."""

    @property
    def strides(self) -> tuple[int, int, int]:
        """Pixels of the model's input between two anchors, of each resolution."""
        return (2, 4, 8) if self.small_input else (8, 16, 32)

    @property
    def least_size(self) -> int:
        return 2 * self.strides[-1]


Model = Annotated[SmallCnn | ResNet | DenseNet | EfficientNet | Vit | Unet | RetinaNet, Field(discriminator="kind")]


class Member(Frozen):
    """One of the networks of an ensemble."""

    model: Model
    temperature: float = Field(gt=0)
    """What its outputs are divided by."""
    bias: list[float]
    """What is then added to the output of each label."""
    weight: float = Field(gt=0, le=1)
    """Of its probabilities; those of all members sum up to 1."""


class EnsembleModel(Frozen):
    """Several networks that answer as one: what a search may find, and a bundle hold. It cannot be trained as a whole."""

    kind: Literal["ensemble"] = "ensemble"
    members: list[Member] = Field(min_length=2)
    """The weightiest first."""


AnyModel = Annotated[Model | EnsembleModel, Field(discriminator="kind")]
"""What a bundle holds."""
