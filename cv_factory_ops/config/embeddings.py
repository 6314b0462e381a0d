"""Vectors that stand for images: ``embedding``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cv_factory_ops.config.models import VitSize
from cv_factory_ops.records import Frozen


class ModelEmbedding(Frozen):
    """What the trained network computes its answer from."""

    kind: Literal["model"] = "model"


class HogEmbedding(Frozen):
    """Histograms of oriented gradients (Dalal & Triggs 2005)."""

    kind: Literal["hog"] = "hog"
    orientations: int = Field(default=9, ge=2, le=36)
    cells: int = Field(default=8, ge=2, le=64)
    """Cells a side; blocks of 2 x 2 cells are normalised together."""

    @property
    def least_size(self) -> int:
        """Smallest ``preprocessing.size`` that gives every cell two pixels."""
        return 2 * self.cells


class _Words(Frozen):
    words: int = Field(default=64, ge=2, le=4096)
    """Visual words: k-means clusters of the training images' descriptors (Sivic & Zisserman 2003)."""
    keypoints: int = Field(default=200, ge=1)
    """Most keypoints of an image, the strongest first."""
    seed: int = 0


class OrbEmbedding(_Words):
    """How often which visual word occurs among an image's ORB descriptors (Rublee et al. 2011)."""

    kind: Literal["orb"] = "orb"


class SiftEmbedding(_Words):
    """How often which visual word occurs among an image's SIFT descriptors (Lowe 2004)."""

    kind: Literal["sift"] = "sift"


class _Learned(Frozen):
    weights: str
    """``.safetensors`` file, a path or ``s3://``, with MONAI's names of the weights; it is copied into the bundle."""
    mean: float = 0.0
    """What these weights expect intensities of 0..1 to be standardised with: (x - mean) / std."""
    std: float = Field(default=1.0, gt=0)


class CnnEmbedding(_Learned):
    """Pooled features of a ResNet of MONAI with weights that were learned elsewhere; those of its classifier may be missing."""

    kind: Literal["cnn"] = "cnn"
    depth: Literal[10, 18, 34, 50] = 18
    small_input: bool = False
    """A 3 x 3 stem that keeps the resolution."""


class VitEmbedding(VitSize, _Learned):
    """Mean of all tokens of a vision transformer of MONAI (Dosovitskiy et al. 2021) with weights that were learned
    elsewhere."""

    kind: Literal["vit"] = "vit"


class MaskedImageEmbedding(VitSize):
    """Mean of all tokens of a masked autoencoder of MONAI (He et al. 2022), learned from the training images without their
    labels."""

    kind: Literal["masked_image"] = "masked_image"
    masked: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches that are hidden and painted in again."""
    epochs: int = Field(default=20, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    seed: int = 0


Embedding = Annotated[
    ModelEmbedding | HogEmbedding | OrbEmbedding | SiftEmbedding | CnnEmbedding | VitEmbedding | MaskedImageEmbedding,
    Field(discriminator="kind"),
]
