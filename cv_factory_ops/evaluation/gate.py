"""Stage ``gate``: may the challenger be registered?

Every :class:`Criterion` is a row of the verdict, also those that passed. The record is published in either case; a verdict that
refuses ends the stage with exit code 4 afterwards.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_factory_ops import protocol, registry
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config.evaluation import GateConfig, SubgroupRule
from cv_factory_ops.evaluation.bootstrap import Interval, patients_of, percentile_interval, resamples
from cv_factory_ops.evaluation.gate_picture import draw
from cv_factory_ops.evaluation.tasks import sampled
from cv_factory_ops.evaluation.unseen import unseen
from cv_factory_ops.groups import group_of
from cv_factory_ops.records import Criterion, EvaluateRecord, GateRecord, IngestRecord, TrainRecord

if TYPE_CHECKING:
    from cv_factory_ops.domain import Domain
    from cv_factory_ops.stage import Stage


def run(stage: Stage) -> GateRecord:
    """Judge on the locked test set; the verdict, its table and its picture go to the MLflow run as well."""
    evaluation, ingest, train = stage.read(EvaluateRecord), stage.read(IngestRecord), stage.read(TrainRecord)
    config, table = stage.config.gate, _test_table(stage, evaluation)
    interval = None
    if evaluation.champion_version is not None and config.metric in evaluation.metrics:
        interval = difference_interval(table, evaluation, config)
    criteria = judge(evaluation, ingest.test_digest, interval, config)
    if config.subgroups:
        fewest = stage.config.evaluation.minimum
        criteria += list(in_subgroups(config.subgroups, evaluation, table, stage.domain, fewest, config))
    criteria += list(unseen(stage, Bundle.load(stage.local(train.bundle)).manifest.test_digest, evaluation.champion_version))
    verdict = _verdict(evaluation, ingest.test_digest, interval, criteria, config).model_copy(update={"links": train.links})
    (stage.out / "criteria.json").write_text(json.dumps([row.model_dump(mode="json") for row in criteria], indent=1))
    draw(verdict, config.confidence).savefig(stage.out / "criteria.png", dpi=120)
    protocol.keep(stage.config, stage.out / protocol.FOLDER)
    _log(stage, train.mlflow_run_id, verdict)
    return verdict


def judge(evaluation: EvaluateRecord, test_digest: str, interval: Interval | None, config: GateConfig) -> list[Criterion]:
    """What is asked of the whole test set.

    ``interval``: of the difference to the champion; None where there is no champion, or the metric is undefined.
    """
    criteria = [_at_least(config.metric, config.minimum, evaluation, "gate.minimum")]
    if interval:
        new, old = (found[config.metric] for found in (evaluation.metrics, evaluation.champion_metrics))
        criteria.append(non_inferior(config.metric, config.margin, new - old, interval, config.confidence, "gate.margin"))
    if config.sensitivity:
        criteria.append(_at_least("sensitivity", config.sensitivity, evaluation, "gate.sensitivity"))
    if config.specificity:
        criteria.append(_at_least("specificity", config.specificity, evaluation, "gate.specificity"))
    if config.calibration_error < 1:
        criteria.append(_calibrated(config.calibration_error, evaluation))
    if evaluation.champion_version is not None:
        criteria.append(_same_test_set(evaluation.champion_test_digest == test_digest))
    return criteria


def in_subgroups(
    rule: SubgroupRule, evaluation: EvaluateRecord, table: pd.DataFrame, domain: Domain, fewest: int, config: GateConfig
) -> Iterator[Criterion]:
    """What is asked of each group; ``table`` is the locked test set with its metadata, ``fewest`` the patients of a group that
    is judged."""
    measured = evaluation.subgroups
    if not measured:
        reason = "no metadata of the test set makes a group"
        yield Criterion(name=f"{rule.metric} in subgroups", rule="at least", limit=rule.minimum, passed=None, reason=reason)
    for name, groups in measured.items():
        owners = group_of(table[f"meta_{name}"], domain.subgroups.get(name, {}))
        for value, group in groups.items():
            title = f"{rule.metric}, {name.replace('_', ' ')} {value}"
            if rule.metric not in group.metrics:
                few = f"{group.patients} patients, {fewest} are needed" if group.patients < fewest else "it is undefined there"
                yield Criterion(name=title, rule="at least", limit=rule.minimum, passed=None, reason=f"not judged: {few}")
                continue
            found, interval = group.metrics[rule.metric], group.intervals.get(rule.metric)
            yield at_least(title, rule.minimum, found, interval, "gate.subgroups.minimum")
            if evaluation.champion_version is not None and rule.margin < 1:
                yield _non_inferior_in(title, table[owners == value], evaluation, rule, config)


def _non_inferior_in(
    title: str, rows: pd.DataFrame, evaluation: EvaluateRecord, rule: SubgroupRule, config: GateConfig
) -> Criterion:
    """The challenger against the champion in one group."""
    own = config.model_copy(update={"metric": rule.metric})
    values = differences(rows, evaluation, own, np.ones((1, len(rows))))
    interval = difference_interval(rows, evaluation, own)
    return non_inferior(title, rule.margin, float(values[0]), interval, config.confidence, "gate.subgroups.margin")


def at_least(name: str, limit: float, value: float | None, interval: Interval | None, setting: str) -> Criterion:
    """The value itself is held against the limit; an undefined one does not pass."""
    reason = f"{name} is undefined on the test set" if value is None else ""
    if value is not None and value < limit:
        reason = f"{name} {value:.3f} is below {setting} {limit:g}"
    low, high = interval or (None, None)
    return Criterion(name=name, rule="at least", limit=limit, value=value, low=low, high=high, passed=not reason, reason=reason)


def non_inferior(name: str, margin: float, difference: float, interval: Interval, confidence: float, setting: str) -> Criterion:
    """The lower end of the interval of challenger minus champion is at least minus the margin."""
    low, high = interval
    reason = ""
    if not low >= -margin:  # NaN does not pass
        reason = (
            f"{name} may be {-low:.3f} below the champion's "
            f"({confidence:.0%} interval {low:+.3f} .. {high:+.3f}); {setting} is {margin:g}"
        )
    return Criterion(
        name=f"{name} - champion's",
        rule="at least",
        limit=-margin,
        value=round(difference, 6),
        low=low,
        high=high,
        passed=not reason,
        reason=reason,
    )


def difference_interval(table: pd.DataFrame, evaluation: EvaluateRecord, config: GateConfig) -> Interval:
    """Bootstrap interval of challenger minus champion, both on the same samples of patients."""
    labels = table["label"].to_numpy()
    blocks = resamples(patients_of(table), labels, config.bootstrap, config.seed)
    found = [differences(table, evaluation, config, weights) for weights in blocks]
    return percentile_interval(np.concatenate(found), config.confidence)


def differences(
    table: pd.DataFrame, evaluation: EvaluateRecord, config: GateConfig, weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(B,) challenger minus champion in each of B samples; ``weights``: (B, N)."""
    rivals = (("challenger", evaluation.threshold), ("champion", evaluation.champion_threshold or 0.5))
    new, old = (sampled(table, who, threshold, weights)[config.metric] for who, threshold in rivals)
    difference: NDArray[np.float64] = new - old
    return difference


def _at_least(metric: str, limit: float, evaluation: EvaluateRecord, setting: str) -> Criterion:
    return at_least(metric, limit, evaluation.metrics.get(metric), evaluation.intervals.get("test", {}).get(metric), setting)


def _calibrated(limit: float, evaluation: EvaluateRecord) -> Criterion:
    value, (low, high) = evaluation.metrics.get("ece"), evaluation.intervals.get("test", {}).get("ece", (None, None))
    reason = "ece is undefined on the test set" if value is None else ""
    if value is not None and value > limit:
        reason = f"ece {value:.3f} is above gate.calibration_error {limit:g}"
    return Criterion(name="ece", rule="at most", limit=limit, value=value, low=low, high=high, passed=not reason, reason=reason)


def _same_test_set(same: bool) -> Criterion:
    reason = "" if same else "the test set is not the one that the champion was judged on"
    name = "test set other than the champion's"
    return Criterion(name=name, rule="at most", limit=0, value=float(not same), passed=same, reason=reason)


def _test_table(stage: Stage, evaluation: EvaluateRecord) -> pd.DataFrame:
    table = pd.read_parquet(stage.local(evaluation.predictions))
    return table[table["split"] == "test"].reset_index(drop=True)


def _verdict(
    evaluation: EvaluateRecord, test_digest: str, interval: Interval | None, criteria: list[Criterion], config: GateConfig
) -> GateRecord:
    new, old = (found.get(config.metric) for found in (evaluation.metrics, evaluation.champion_metrics))
    value = "undefined" if new is None else f"{new:.3f}"
    against = f"champion {old:.3f}, difference at least {interval[0]:+.3f}" if interval else "no champion yet"
    reasons = [row.reason for row in criteria if row.passed is False]
    asked, left = len(criteria), sum(row.passed is None for row in criteria)
    told = f"{asked - left - len(reasons)} of {asked} criteria met" + (f", {left} not judged" if left else "")
    verdict: Literal["passed", "refused"] = "refused" if reasons else "passed"
    return GateRecord(
        summary=f"{verdict}: {config.metric} {value} (minimum {config.minimum:g}), {against}; {told}",
        verdict=verdict,
        metric=config.metric,
        challenger=new,
        champion=old,
        difference_low=interval[0] if interval else None,
        difference_high=interval[1] if interval else None,
        reasons=reasons,
        criteria=criteria,
        test_digest=test_digest,
    )


def _log(stage: Stage, run_id: str, verdict: GateRecord) -> None:
    client = registry.connect(stage.config)
    with registry.explained("gate"):
        for path in sorted(stage.out.glob("criteria.*")):
            client.log_artifact(run_id, str(path), "gate")
        client.set_tag(run_id, "cvf.gate", verdict.verdict)
