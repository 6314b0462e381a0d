"""Maps of what an answer rests on: ``explanations``."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from cv_factory_ops.records import Frozen


class GradCam(Frozen):
    """How much the features of the last spatial layer speak for the answer, where they are (Selvaraju et al. 2017). The
    quickest: one pass forward and one back."""

    kind: Literal["grad_cam"] = "grad_cam"


class _Hidden(Frozen):
    baseline: float | None = Field(default=None, ge=0, le=1)
    """Intensity of pixels that show nothing; null means the mean of the training images."""


class IntegratedGradients(_Hidden):
    """Gradients on the straight way from the baseline to the image, summed up (Sundararajan et al. 2017)."""

    kind: Literal["integrated_gradients"] = "integrated_gradients"
    steps: int = Field(default=32, ge=8, le=512)
    """Points of that way."""


class _Superpixels(_Hidden):
    superpixels: int = Field(default=40, ge=4, le=256)
    """About as many regions of like intensity (SLIC, Achanta et al. 2012), each shown or hidden as a whole."""
    samples: int = Field(default=256, ge=16, le=4096)
    """Times that the network answers with some of them hidden."""
    seed: int = 0

    @model_validator(mode="after")
    def _enough_samples(self) -> Self:
        if self.samples < 2 * self.superpixels:
            raise ValueError("samples at least twice superpixels")
        return self


class Lime(_Superpixels):
    """Weights of a linear model of the network's answers close to the image (Ribeiro et al. 2016)."""

    kind: Literal["lime"] = "lime"


class Shap(_Superpixels):
    """Shapley values of the superpixels, by Kernel SHAP (Lundberg & Lee 2017)."""

    kind: Literal["shap"] = "shap"


ExplanationMethod = Annotated[GradCam | IntegratedGradients | Lime | Shap, Field(discriminator="kind")]
EXPLANATIONS: dict[str, ExplanationMethod] = {each.kind: each for each in (GradCam(), IntegratedGradients(), Lime(), Shap())}
"""What a request may ask for, by name."""


class ExplanationsConfig(Frozen):
    """The gallery of explained answers that an evaluation draws."""

    method: ExplanationMethod = GradCam()
    """One of ``grad_cam``, ``integrated_gradients``, ``lime``, ``shap``."""
    images: int = Field(default=12, ge=1, le=200)
    """Test images that are explained, about: of each class the most certain right answers and the worst wrong ones, at least
    one of both."""
