"""The paired bootstrap: what it resamples, and what it says."""

import numpy as np
import pandas as pd
import pytest

from cv_factory_ops.config import GateConfig
from cv_factory_ops.evaluation.gate import difference_interval
from cv_factory_ops.records import EvaluateRecord


def record() -> EvaluateRecord:
    return EvaluateRecord(
        summary="",
        predictions="",
        metrics={},
        champion_metrics={},
        recent_metrics={},
        champion_recent_metrics={},
        champion_version=1,
        champion_test_digest="t",
        threshold=0.5,
        champion_threshold=0.5,
        pictures=[],
    )


def table(patients: int, images: int, lead: float) -> pd.DataFrame:
    """``images`` identical rows a patient; the challenger's scores are ``lead`` better than the champion's."""
    generator = np.random.default_rng(0)
    label = np.arange(patients) % 2
    noise = generator.standard_normal((2, patients))
    scores = {
        who: 1 / (1 + np.exp(-(more + 1.0) * (2 * label - 1) - n))
        for who, more, n in zip(("challenger", "champion"), (lead, 0), noise, strict=True)
    }
    rows = np.repeat(np.arange(patients), images)
    columns = {f"{who}_{i}": (p if i else 1 - p)[rows] for who, p in scores.items() for i in (0, 1)}
    return pd.DataFrame({"id": np.arange(len(rows)).astype(str), "patient": rows.astype(str), "label": label[rows], **columns})


def test_a_better_challenger_has_an_interval_above_zero() -> None:
    low, high = difference_interval(table(300, 1, lead=1.5), record(), GateConfig())
    assert 0 < low < high


def test_images_of_one_patient_do_not_make_the_interval_narrower() -> None:
    """Four copies of each image are no new evidence: resampling images would halve the interval."""
    config = GateConfig(bootstrap=400)
    one, four = (difference_interval(table(100, images, lead=0.0), record(), config) for images in (1, 4))
    assert four[1] - four[0] == pytest.approx(one[1] - one[0], rel=0.15)
