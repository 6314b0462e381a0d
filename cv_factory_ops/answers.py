"""The bodies of answers: what the container says, the gateway passes on, and their clients read. Loads no heavy library."""

from __future__ import annotations

from typing import Literal

from cv_factory_ops.records import Frozen


class Prediction(Frozen):
    """The answer for one image."""

    label: str
    score: float
    """Probability of the positive class (two classes) or of the answered class."""
    scores: dict[str, float]
    """Probability of each label."""
    abstained: bool = False
    """The answer is less certain than the bundle demands: a person should decide."""
    features: dict[str, str | float | None]
    """What drift is watched on; captured with the answer, so that the nightly check reads no pixels."""


class Region(Frozen):
    """What of an image belongs to a class."""

    area: float
    unit: Literal["mm2", "pixels"]
    """``pixels`` where the image does not say how far they are apart."""
    confidence: float | None
    """Mean probability of the class in its pixels; null where it has none."""


class SegmentedPrediction(Prediction):
    """The answer for the pixels of one image.

    ``label`` is the class of the largest region, or the background where there is none; ``score`` the mean probability of the
    pixels that are not background, each in its class, or of all where all are; ``scores`` the mean probability of each class
    over all pixels. Pixels are those of the image that the model has seen, without padding.
    """

    regions: dict[str, Region]
    """By label, but the background."""
    mask: str
    """PNG of 8 bits grey, base64, of the image's rows and columns: the value of a pixel is the number of its class."""


class FoundBox(Frozen):
    """Where something is in an image, in pixels from its upper left corner: the first pixel reaches from 0 to 1."""

    label: str
    score: float
    """0..1; not calibrated."""
    left: float
    top: float
    right: float
    bottom: float


class DetectedPrediction(Prediction):
    """The boxes in one image.

    ``label`` is that of the box with the greatest score, or the first label where there is no box; ``score`` the greatest score
    of any box, also of those below the bundle's threshold, which are not answered; ``scores`` that of each label, and of the
    first label 1 less ``score``.
    """

    boxes: list[FoundBox]
    """Of at least the bundle's threshold, the greatest score first."""


class Neighbour(Frozen):
    """A study that another one is like; pseudonyms stand for who it is."""

    id: str
    """Of its image, as in the manifest of the run that indexed it."""
    label: str
    distance: float
    """As of the index's metric: of ``cosine`` 1 - cosine, 0..2, of ``l2`` Euclidean."""
    patient: str
    """Pseudonym; empty where the source has none."""
    study: str
    """Pseudonym; empty where the source has none."""
    metadata: dict[str, str | float]


AnyPrediction = DetectedPrediction | SegmentedPrediction | Prediction


class Answer(Frozen):
    """The body of a response of ``/invocations``."""

    predictions: list[AnyPrediction]
    bundle_digest: str


class SimilarAnswer(Frozen):
    """The body of a response that came with similar studies."""

    predictions: list[AnyPrediction]
    bundle_digest: str
    similar: list[list[Neighbour]]
    """Of each prediction, most similar first."""
    findings: list[str]
    """Of each prediction, as the domain says it in a line."""
    index: str
    """Name of the index that was searched: of the bundle, and of the build."""


class Faithfulness(Frozen):
    """Areas, 0..1, under the curve of a label's probability while pixels are taken away or put in, those of a map's greatest
    values first (Petsiuk et al. 2018). A map means something that beats itself moved elsewhere, which keeps its grain."""

    deletion: float
    """Pixels become the mean of the training images: the lower, the better."""
    deletion_random: float
    """The same, mean over maps that were moved."""
    insertion: float
    """Pixels of the image take the place of those of a blurred one: the higher, the better."""
    insertion_random: float


class Explanation(Faithfulness):
    """Why an image was given the label that it was given."""

    method: str
    overlay: str
    """PNG, base64: the model's input in grey, red where it speaks for the label, blue where against it."""


class ExplainedPrediction(Prediction):
    """An answer with its reason."""

    explanation: Explanation


class ExplainedAnswer(Frozen):
    """The body of a response that was to be explained."""

    predictions: list[ExplainedPrediction]
    bundle_digest: str
