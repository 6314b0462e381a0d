"""Stage ``gate``: may the challenger be registered?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cv_factory_ops import storage
from cv_factory_ops.config import GateConfig
from cv_factory_ops.errors import GateRefused
from cv_factory_ops.evaluation.bootstrap import patients_of, percentile_interval, probabilities_of, resamples
from cv_factory_ops.metrics import resampled
from cv_factory_ops.records import EvaluateRecord, GateRecord, IngestRecord

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage


def run(stage: Stage) -> GateRecord:
    """Judge on the locked test set.

    Raises:
        GateRefused: with every reason; the verdict is kept in ``<run>/gate.refused.json``.
    """
    evaluation, test_digest = stage.read(EvaluateRecord), stage.read(IngestRecord).test_digest
    config = stage.config.gate
    interval = None
    if evaluation.champion_version is not None and config.metric in evaluation.metrics:
        interval = difference_interval(_test_table(stage, evaluation), evaluation, config)
    reasons = objections(evaluation, test_digest, interval, config)
    verdict = _verdict(evaluation, test_digest, interval, reasons, config)
    if reasons:
        storage.write_bytes(f"{stage.run}/gate.refused.json", verdict.model_dump_json(indent=2).encode())
        raise GateRefused("; ".join(reasons))
    return verdict


def objections(
    evaluation: EvaluateRecord, test_digest: str, interval: tuple[float, float] | None, config: GateConfig
) -> list[str]:
    """Every reason against the challenger; empty where it may pass."""
    reasons = []
    value = evaluation.metrics.get(config.metric)
    if value is None:
        return [f"{config.metric} is undefined on the test set"]
    if value < config.minimum:
        reasons.append(f"{config.metric} {value:.3f} is below gate.minimum {config.minimum:g}")
    if evaluation.champion_version is None:
        return reasons
    if evaluation.champion_test_digest != test_digest:
        reasons.append("the test set is not the one that the champion was judged on")
    if interval and interval[0] < -config.margin:
        reasons.append(
            f"{config.metric} may be {-interval[0]:.3f} below the champion's "
            f"({config.confidence:.0%} interval {interval[0]:+.3f} .. {interval[1]:+.3f}); gate.margin is {config.margin:g}"
        )
    return reasons


def difference_interval(table: pd.DataFrame, evaluation: EvaluateRecord, config: GateConfig) -> tuple[float, float]:
    """Bootstrap interval of challenger minus champion, both on the same samples of patients."""
    labels = table["label"].to_numpy()
    rivals = [(probabilities_of(table, "challenger"), evaluation.threshold)]
    rivals.append((probabilities_of(table, "champion"), evaluation.champion_threshold or 0.5))
    differences = []
    for weights in resamples(patients_of(table), labels, config.bootstrap, config.seed):
        new, old = (resampled(labels, scores, threshold, 0.0, weights)[config.metric] for scores, threshold in rivals)
        differences.append(new - old)
    return percentile_interval(np.concatenate(differences), config.confidence)


def _test_table(stage: Stage, evaluation: EvaluateRecord) -> pd.DataFrame:
    table = pd.read_parquet(stage.local(evaluation.predictions))
    return table[table["split"] == "test"]


def _verdict(
    evaluation: EvaluateRecord, test_digest: str, interval: tuple[float, float] | None, reasons: list[str], config: GateConfig
) -> GateRecord:
    new, old = (found.get(config.metric) for found in (evaluation.metrics, evaluation.champion_metrics))
    value = "undefined" if new is None else f"{new:.3f}"
    against = f"champion {old:.3f}, difference at least {interval[0]:+.3f}" if interval else "no champion yet"
    return GateRecord(
        summary=f"{'refused' if reasons else 'passed'}: {config.metric} {value} (minimum {config.minimum:g}), {against}",
        verdict="refused" if reasons else "passed",
        metric=config.metric,
        challenger=new,
        champion=old,
        difference_low=interval[0] if interval else None,
        difference_high=interval[1] if interval else None,
        reasons=reasons,
        test_digest=test_digest,
    )
