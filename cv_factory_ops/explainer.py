"""Answers with their reasons, as the serving process gives them and ``cvf explain`` draws them."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

import cv_factory_ops
from cv_factory_ops.answers import ExplainedAnswer as ExplainedAnswer
from cv_factory_ops.answers import ExplainedPrediction, Explanation
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config.explanations import ExplanationMethod
from cv_factory_ops.domain import Decoded, Domain, open_domain
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.explanations import Faithfulness, Rgb, explain, faithfulness, overlay
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.predictor import Answer, Predictor


class Explainer:
    """Explains what a predictor answers, for one thread at a time: Captum hangs hooks into the network, which is its own."""

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor
        self._network = predictor.bundle.network()

    def answer(self, studies: Sequence[Decoded], method: ExplanationMethod) -> tuple[ExplainedAnswer, list[Rgb]]:
        """The predictor's answer with explanations, and their overlays.

        Raises:
            Rejected: a study is not as the bundle wants it.
            ConfigError: the method cannot explain this network.
        """
        answer = self._predictor.answer(studies)
        prepared = np.stack([self._predictor.prepare(study) for study in studies])
        labels, temperature = self._predictor.manifest.labels, self._predictor.manifest.temperature
        targets = np.array([labels.index(given.label) for given in answer.predictions])
        maps = explain(self._network, prepared, method, targets, temperature)
        scores = faithfulness(self._network, prepared, maps, targets, temperature)
        overlays = [overlay(image, found) for image, found in zip(prepared, maps, strict=True)]
        return _with_reasons(answer, method, overlays, scores), overlays


def _with_reasons(
    answer: Answer, method: ExplanationMethod, overlays: Sequence[Rgb], scores: Sequence[Faithfulness]
) -> ExplainedAnswer:
    predictions = []
    for given, picture, score in zip(answer.predictions, overlays, scores, strict=True):
        encoded = base64.b64encode(png(picture)).decode()
        reason = Explanation(method=method.kind, overlay=encoded, **score.model_dump())
        predictions.append(ExplainedPrediction(**given.model_dump(), explanation=reason))
    return ExplainedAnswer(predictions=predictions, bundle_digest=answer.bundle_digest)


def explain_file(bundle: Path, image: Path, method: ExplanationMethod, out: Path) -> str:
    """Draw why a bundle answers an image as it does, and tell it in one line.

    Raises:
        ConfigError: ``out`` is neither ``.png`` nor, of a study of the bundle's domain, ``.dcm``; or see :func:`explain`.
        DataError: the bundle or the image cannot be used; a study that is not de-identified is not.
    """
    predictor = Predictor(Bundle.load(bundle))
    domain = open_domain(predictor.manifest.domain)
    try:
        data = image.read_bytes()
    except OSError as error:
        raise DataError(f"{image}: cannot be read: {error.strerror}") from None
    is_study = domain.recognises(data)
    allowed = (".png", ".dcm") if is_study else (".png",)
    if out.suffix not in allowed:
        raise ConfigError(f"{out}: {out.suffix or 'no ending'} given for {image}; allowed: {', '.join(allowed)}")
    try:
        if is_study:
            domain.require_deidentified(data)
        decoded = decode_one(data, None, domain, predictor.manifest.decoding)
        answer, (drawn,) = Explainer(predictor).answer([decoded], method)
        content = png(drawn) if out.suffix == ".png" else as_study(domain, data, answer, drawn)
    except Rejected as error:
        raise DataError(f"{image}: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(content)
    return described(answer.predictions[0])


def as_study(domain: Domain, study: bytes, answer: ExplainedAnswer, drawn: Rgb) -> bytes:
    """The overlay of the first prediction as a picture beside the study, in the domain's format.

    Raises:
        Rejected: see :meth:`cv_factory_ops.domain.Domain.secondary_capture`.
    """
    software = (f"cv-factory {cv_factory_ops.__version__}", answer.bundle_digest)
    return domain.secondary_capture(study, drawn, described(answer.predictions[0]), software)


def described(prediction: ExplainedPrediction) -> str:
    """One line, for people and for DICOM."""
    why, probability = prediction.explanation, prediction.scores[prediction.label]
    return (
        f"{why.method} of the answer {prediction.label} (probability {probability:.3f}): red speaks for it, blue against it; "
        f"deletion {why.deletion:.3f} (map moved elsewhere: {why.deletion_random:.3f}), "
        f"insertion {why.insertion:.3f} ({why.insertion_random:.3f})"
    )


def png(drawn: Rgb) -> bytes:
    """The picture as a PNG file."""
    _, content = cv2.imencode(".png", cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR))
    return content.tobytes()
