"""The bodies of requests and answers, as they stand in the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Field, StringConstraints

from cv_factory_ops.answers import AnyPrediction, ExplainedPrediction, Neighbour
from cv_factory_ops.records import Frozen

INFERENCE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Ids that callers of the endpoint choose, or the gateway's own; SageMaker takes up to 64 characters."""

EXAMPLE_ID = "0f0e7b1c-6a53-4c7b-9a37-0d3d6f6f2a11"
PREDICTION: dict[str, Any] = {
    "label": "opacity",
    "score": 0.91,
    "scores": {"normal": 0.09, "opacity": 0.91},
    "abstained": False,
    "features": {"image_mean": 0.41, "metadata_modality": "DX", "score": 0.91, "entropy": 0.3},
}
EXPLANATION: dict[str, Any] = {
    "method": "grad_cam",
    "overlay": "iVBORw0KGgo=",
    "deletion": 0.22,
    "deletion_random": 0.61,
    "insertion": 0.83,
    "insertion_random": 0.55,
}
NEIGHBOUR: dict[str, Any] = {
    "id": "1c9e…",
    "label": "opacity",
    "distance": 0.07,
    "patient": "8f14e45fceea167a5a36dedd",
    "study": "c9f0f895fb98ab9159f51fd0",
    "metadata": {"modality": "DX", "patient_age": 61.0},
}
FINDING = "opacity (probability 0.91); of 1 similar study 1 has opacity"
REFUSAL = {"error": "de-identify the study before sending it (PatientName is not empty)", "code": "identified"}


def _example(value: dict[str, Any]) -> ConfigDict:
    return ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, json_schema_extra={"examples": [value]})


class Refusal(Frozen):
    """Why there is no answer."""

    model_config = _example(REFUSAL)
    error: str
    """One line for a person; nothing of the request is in it."""
    code: str
    """The reason for a program."""


class Predicted(Frozen):
    """The answer for a study."""

    model_config = _example({"inference_id": EXAMPLE_ID, "prediction": PREDICTION, "bundle_digest": "5f2b…"})
    inference_id: str
    """Name of this answer: the one that a label which arrives later is given for."""
    prediction: AnyPrediction
    bundle_digest: str
    """Which model has answered."""


class Explained(Frozen):
    """The answer for a study, with its reason."""

    model_config = _example(
        {"inference_id": EXAMPLE_ID, "prediction": PREDICTION | {"explanation": EXPLANATION}, "bundle_digest": "5f2b…"}
    )
    inference_id: str
    prediction: ExplainedPrediction
    bundle_digest: str


class SimilarStudies(Frozen):
    """The answer for a study, with those that are most like it."""

    model_config = _example(
        {
            "inference_id": EXAMPLE_ID,
            "prediction": PREDICTION,
            "similar": [NEIGHBOUR],
            "finding": FINDING,
            "bundle_digest": "5f2b…",
        }
    )
    inference_id: str
    prediction: AnyPrediction
    similar: list[Neighbour]
    """Most similar first, one of each patient, none of the study's own."""
    finding: str
    """What the model found, and what similar studies have, in a line."""
    bundle_digest: str


class PredictedBatch(Frozen):
    """An answer or a refusal for each study, in the order of the request."""

    answers: list[Predicted | Refusal]


class Feedback(Frozen):
    """Labels that are known by now; one that is sent again replaces the earlier one."""

    model_config = _example({"labels": {EXAMPLE_ID: "normal"}})
    labels: dict[Annotated[str, StringConstraints(pattern=INFERENCE_ID)], str] = Field(min_length=1, max_length=1000)
    """Inference id -> one of the project's labels."""


class Stored(Frozen):
    """How many labels were stored."""

    stored: int


class Health(Frozen):
    """The gateway itself works."""

    status: str
