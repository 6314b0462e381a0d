"""The steps from an image to the model's input: ``preprocessing``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class ColorStep(Frozen):
    """Another colour space; three channels stay three, each in 0..1. Needs ``decoding.color: rgb``."""

    kind: Literal["color"] = "color"
    space: Literal["hsv", "lab", "ycrcb"]
    """Hue, saturation, value; CIE L*a*b*; luma and chroma (ITU-R BT.601)."""


class NormaliseStep(Frozen):
    """A declared range of intensity becomes 0..1."""

    kind: Literal["normalise"] = "normalise"
    low: Share = 0.0
    """Intensity that becomes 0."""
    high: Share = 1.0
    """Intensity that becomes 1."""
    outside: Literal["clip", "refuse"] = "clip"
    """What happens to an image with intensities outside of the range."""

    @model_validator(mode="after")
    def _ascending(self) -> NormaliseStep:
        if self.low >= self.high:
            raise ValueError("low below high")
        return self


class ClipStep(Frozen):
    """Quantiles of each image's own intensity become 0 and 1."""

    kind: Literal["clip"] = "clip"
    lower: Share = 0.005
    upper: Share = 0.995


class EqualiseStep(Frozen):
    """Contrast-limited adaptive histogram equalisation (Zuiderveld 1994); of colours, on the luma alone."""

    kind: Literal["equalise"] = "equalise"
    limit: float = Field(default=2.0, gt=0)
    """Most that contrast is raised by."""
    tiles: int = Field(default=8, ge=1, le=64)
    """Tiles a side that are equalised each on its own."""


class SpacingStep(Frozen):
    """Resample so that neighbouring pixels are as far apart in every image. An image of unknown spacing is refused."""

    kind: Literal["spacing"] = "spacing"
    mm: float = Field(gt=0, le=100)
    """Distance of neighbouring rows and of neighbouring columns, in mm."""


class ResizeStep(Frozen):
    """Resample so that one side has a number of pixels; the aspect is kept."""

    kind: Literal["resize"] = "resize"
    pixels: int = Field(ge=1, le=8192)
    side: Literal["shorter", "longer"] = "shorter"


class _Side(Frozen):
    pixels: int | None = Field(default=None, ge=1, le=8192)
    """Rows and columns."""
    mm: float | None = Field(default=None, gt=0)
    """Height and width in mm, instead of ``pixels``. An image of unknown spacing is refused."""


class CropStep(_Side):
    """Keep the middle; what is smaller stays as it is."""

    kind: Literal["crop"] = "crop"

    @model_validator(mode="after")
    def _one_given(self) -> CropStep:
        if (self.pixels is None) == (self.mm is None):
            raise ValueError("either pixels or mm")
        return self


class PadStep(_Side):
    """Pad around the middle, by default to a square; what is larger stays as it is."""

    kind: Literal["pad"] = "pad"
    value: Share = 0.0
    """Intensity of the border."""

    @model_validator(mode="after")
    def _at_most_one_given(self) -> PadStep:
        if self.pixels is not None and self.mm is not None:
            raise ValueError("pixels, or mm, or neither for a square")
        return self


Step = Annotated[
    ColorStep | NormaliseStep | ClipStep | EqualiseStep | SpacingStep | ResizeStep | CropStep | PadStep,
    Field(discriminator="kind"),
]


class PreprocessingConfig(Frozen):
    """The same steps at training and at serving."""

    size: int = Field(default=64, ge=8, le=2048)
    """Rows and columns of the model's input, in pixels: what the steps leave is resized to it, whatever its aspect."""
    steps: list[Step] = [PadStep()]
    """In their order: ``color``, ``normalise``, ``clip``, ``equalise``, ``spacing``, ``resize``, ``crop``, ``pad``."""
