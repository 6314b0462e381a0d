"""What a retraining is worth: the champion before it and the one after it on studies of the changed acquisition that neither
was trained on, nor anything chosen by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import open_domain
from cv_factory_ops.evaluation.bootstrap import Interval, Judged, percentile_interval
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.metrics import resampled
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.records import Frozen
from local.consumer import Study

METRICS = ("accuracy", "auc")


class Recovered(Frozen):
    """A metric before and after; intervals over studies, that of the gain by the same samples of them for both."""

    before: float
    before_interval: Interval
    after: float
    after_interval: Interval
    gain_interval: Interval

    @property
    def cells(self) -> tuple[str, str, str]:
        """Before, after and gain, for people."""
        gain = f"{self.after - self.before:+.3f} ({self.gain_interval[0]:+.3f} to {self.gain_interval[1]:+.3f})"
        return _told(self.before, self.before_interval), _told(self.after, self.after_interval), gain


def recovery(config: ProjectConfig, before: Path, after: Path, studies: Sequence[Study]) -> dict[str, Recovered]:
    """Accuracy, at each bundle's own operating point, and AUROC of two bundles on the same studies, each of another person."""
    old, new = (_judged(config, bundle, studies) for bundle in (before, after))
    old_samples, new_samples = (_samples(config, judged) for judged in (old, new))
    confidence, found = config.evaluation.confidence, {}
    for name in METRICS:
        found[name] = Recovered(
            before=old.metrics[name],
            before_interval=percentile_interval(old_samples[name], confidence),
            after=new.metrics[name],
            after_interval=percentile_interval(new_samples[name], confidence),
            gain_interval=percentile_interval(new_samples[name] - old_samples[name], confidence),
        )
    return found


def _judged(config: ProjectConfig, path: Path, studies: Sequence[Study]) -> Judged:
    bundle, domain = Bundle.load(path), open_domain(config.domain)
    predictor, decoding = Predictor(bundle), bundle.manifest.decoding
    images = [predictor.prepare(decode_one(study.body, study.content_type, domain, decoding)) for study in studies]
    labels = np.array([bundle.manifest.labels.index(study.label) for study in studies])
    return Judged(labels, predictor.forward(np.stack(images))[0], np.arange(len(studies)), bundle.manifest)


def _samples(config: ProjectConfig, judged: Judged) -> dict[str, NDArray[np.float64]]:
    """Each metric in each bootstrap sample; the same samples for all bundles, as these depend on studies and seed alone."""
    settings = (judged.labels, judged.probabilities, judged.manifest.threshold, judged.manifest.abstention)
    blocks = [resampled(*settings, weights) for weights in judged.samples(config.evaluation)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in METRICS}


def _told(value: float, interval: Interval) -> str:
    return f"{value:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"
