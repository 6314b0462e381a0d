"""Stage ``drift``: Evidently shows the captured requests beside the champion's reference; whether they drifted is decided
by :mod:`cv_factory_ops.drift.detect` and, over many checks, :mod:`cv_factory_ops.drift.sequential`.

Beside the verdict: how well the champion answers (:mod:`cv_factory_ops.drift.performance`), what could not be read, every group
of images by itself (:mod:`cv_factory_ops.drift.subgroups`), and a page that shows it all (:mod:`cv_factory_ops.drift.page`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import Kind, open_domain
from cv_factory_ops.drift.window import Window, consume, fingerprint, read_window
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import DriftRecord, Performance, SlowDriftState, public_name
from cv_factory_ops.registry import Champion, champion, evaluation_of, keep_files
from cv_factory_ops.stage import read_result

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.drift.detect import Comparison, Verdict
    from cv_factory_ops.drift.subgroups import Group
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")


def run(stage: Stage) -> DriftRecord:
    """Judge the captures that no check has consumed; write report, pictures and page; move the cursor.

    A window below ``drift.minimum`` is not judged and not consumed: its captures count next time.

    Raises:
        DataError: there is no champion to compare with, or its bundle has no usable reference.
        Unavailable: another check of the project has finished meanwhile.
    """
    model = _champion(stage.config)
    bundle = Bundle.load(stage.local(model.bundle))
    window = read_window(stage, model.bundle_digest, bundle.manifest.features, _classes(bundle))
    if window.requests < stage.config.drift.minimum:
        return _not_enough(stage, model, window)
    comparison, verdict, groups = _judge(stage, bundle, window)
    record = _found(stage, model, window, verdict, groups, _performance(stage.config, model, bundle, window))
    _show(stage, record, model, bundle, window, comparison, verdict)
    consume(stage, window)
    return record


def write_report(comparison: Comparison, verdict: Verdict, folder: Path) -> None:
    """Evidently's ``report.html`` and ``report.json`` of the columns with values on both sides, with our p-values and threshold
    as its tests."""
    snapshot = _snapshot(comparison, verdict)
    snapshot.save_html(str(folder / "report.html"))
    snapshot.save_json(str(folder / "report.json"))


def _champion(config: ProjectConfig) -> Champion:
    if found := champion(config):
        return found
    raise DataError(f"project {config.project}: has no champion to compare with; train and promote a model first")


def _judge(stage: Stage, bundle: Bundle, window: Window) -> tuple[Comparison, Verdict, list[Group]]:
    import pandas as pd

    from cv_factory_ops.drift import sequential
    from cv_factory_ops.drift.detect import compare, judge, sampled
    from cv_factory_ops.drift.subgroups import groups_of, with_groups

    kinds, settings = bundle.manifest.features, stage.config.drift
    features = pd.DataFrame(window.rows, columns=list(kinds))
    features.to_parquet(stage.out / "features.parquet", index=False)
    comparison = compare(sampled(_reference(bundle, kinds), settings.sample), features, kinds, settings.alpha)
    groups = groups_of(comparison, open_domain(bundle.manifest.domain), settings)
    grouped = with_groups(comparison, groups)
    verdict = judge(grouped)
    slow = sequential.advance(_state_before(window, bundle.digest), comparison, settings, verdict.drifted)
    verdict, comparison = replace(verdict, slow=slow, slowly=sequential.drifted(slow, settings)), grouped
    write_report(comparison, verdict, stage.out)
    return comparison, verdict, groups


def _state_before(window: Window, bundle_digest: str) -> SlowDriftState | None:
    """What the test of slow drift goes on from: the last finished check's, unless that one watched another champion."""
    if not window.previous:
        return None
    try:
        record = DriftRecord.model_validate(read_result(window.previous, DriftRecord.stage).record)
    except (DataError, ValidationError) as error:
        log.warning("slow drift: begins anew, the check before this one cannot be read (%s)", type(error).__name__)
        return None
    return record.slow if record.bundle_digest == bundle_digest else None


def _classes(bundle: Bundle) -> list[str]:
    """What late labels may be; none of a segmentation, whose labels are masks."""
    return bundle.manifest.labels if bundle.manifest.task == "classification" else []


def _performance(config: ProjectConfig, model: Champion, bundle: Bundle, window: Window) -> list[Performance]:
    """Measured where labels have arrived, also for answers of earlier windows, and estimated."""
    import numpy as np

    from cv_factory_ops.drift.answers import labelled
    from cv_factory_ops.drift.performance import estimated, measured

    found = list[Performance]()
    labels, probabilities = labelled(config, window.answers, window.end.last, window.previous, model.bundle_digest)
    if len(labels):
        found += measured(labels, probabilities, bundle.manifest, evaluation_of(config, model.run_id))
    scores = np.array([row.get("score", np.nan) for row in window.rows], dtype=np.float64)
    if "score" in bundle.manifest.features:
        found += estimated(scores, bundle.reference()["score"].to_numpy(np.float64), bundle.manifest)
    return found


def _show(
    stage: Stage, record: DriftRecord, model: Champion, bundle: Bundle, window: Window, comparison: Comparison, verdict: Verdict
) -> None:
    """Pictures and page, in the stage's folder and in the champion's MLflow run."""
    from cv_factory_ops.drift import page

    left_out = page.draw(stage, model, bundle, window, comparison, verdict)
    page.write(stage, record, window, comparison, verdict, left_out)
    names = ("index.html", "report.html", "report.json", *page.PICTURES)
    keep_files(stage.config, model.run_id, stage.out, names, f"drift/{stage.run.rsplit('/', 1)[1]}")


def _reference(bundle: Bundle, kinds: dict[str, Kind]) -> pd.DataFrame:
    try:
        reference = bundle.reference()
    except (OSError, ValueError) as error:
        raise DataError(f"{bundle.path / 'reference.parquet'}: cannot be read ({type(error).__name__})") from None
    if absent := [name for name in kinds if name not in reference]:
        raise DataError(f"{bundle.path / 'reference.parquet'}: lacks the columns {', '.join(absent)} of bundle.json")
    if reference[list(kinds)].isna().all(axis=None):
        raise DataError(f"{bundle.path / 'reference.parquet'}: has no values; there is nothing to compare with")
    return reference


def _snapshot(comparison: Comparison, verdict: Verdict) -> Any:
    """Evidently's snapshot of the testable columns, its own verdict set to ours: one drifted column is drift."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        kinds = {_without_markup(name): kind for name, kind in comparison.testable.items()}
        definition = DataDefinition(
            numerical_columns=[name for name, kind in kinds.items() if kind == "number"],
            categorical_columns=[name for name, kind in kinds.items() if kind == "category"],
        )
        sides = [
            Dataset.from_pandas(_inert(side[list(comparison.testable)]), data_definition=definition)
            for side in (comparison.window, comparison.reference)
        ]
        preset = DataDriftPreset(
            columns=list(kinds),
            method=_calibrated_test({_without_markup(name): p for name, p in verdict.p_values.items()}),
            threshold=verdict.threshold,
            drift_share=1 / len(kinds),
        )
        return Report([preset]).run(*sides)


def _inert(side: pd.DataFrame) -> pd.DataFrame:
    """The same columns without markup: Evidently puts names and categories into its page's script as they are."""
    texts = side.select_dtypes("object")
    return side.assign(**texts.map(_without_markup, na_action="ignore")).rename(columns=_without_markup)


def _without_markup(text: str) -> str:
    return text.replace("<", "\u2039")  # looks the same and opens no tag


def _calibrated_test(p_values: Mapping[str, float]) -> str:
    """Register our verdict with Evidently as a test: it asks for the p-value of a column's values, and is told the column's."""
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    def test(reference: pd.Series[Any], window: pd.Series[Any], kind: ColumnType, threshold: float) -> tuple[float, bool]:
        p = p_values[str(reference.name)]
        return p, p <= threshold

    name = "calibrated score test p_value"
    register_stattest(StatTest(name, name, [ColumnType.Numerical, ColumnType.Categorical]), test)
    return name


def _not_enough(stage: Stage, model: Champion, window: Window) -> DriftRecord:
    minimum = stage.config.drift.minimum
    summary = (
        f"not enough data: {window.requests} of at least {minimum} requests, "
        f"{minimum - window.requests} more are needed{window.left_out}"
    )
    return DriftRecord(summary=summary, verdict="not enough data", drifted={}, report=None, **_common(stage, model, window))


def _found(
    stage: Stage, model: Champion, window: Window, verdict: Verdict, groups: list[Group], performance: list[Performance]
) -> DriftRecord:
    from cv_factory_ops.drift.subgroups import telling, watched

    report = stage.uri("index.html")
    return DriftRecord(
        summary=_in_words(verdict, window, performance),
        links={"report": report, "evidently": stage.uri("report.html")},
        verdict="drift" if verdict.drifted or verdict.slowly else "no drift",
        drifted=telling(verdict.drifted) | {f"{name} (slowly)": p for name, p in verdict.slowly.items()},
        p_values=dict(verdict.p_values),
        slow=verdict.slow,
        report=report,
        performance=performance,
        groups=watched(groups, verdict.p_values),
        **_common(stage, model, window),
    )


def _common(stage: Stage, model: Champion, window: Window) -> dict[str, Any]:
    return {
        "requests": window.requests,
        "window_start": window.start.last,
        "window_end": window.end.last,
        "quality": window.quality,
        "alpha": stage.config.drift.alpha,
        "bundle_digest": model.bundle_digest,
        "asked": fingerprint(stage),
    }


def _in_words(verdict: Verdict, window: Window, performance: list[Performance]) -> str:
    from cv_factory_ops.drift.subgroups import telling

    over = f"{window.requests} requests{window.left_out}{''.join(map(_worse, performance))}"
    found = []
    if drifted := telling(verdict.drifted):
        features = sum(" @ " not in name for name in verdict.p_values)  # groups are of these
        found.append(f"drift in {len(drifted)} of {features} features ({_first(drifted)})")
    if verdict.slowly and verdict.slow:
        found.append(f"slow drift in {len(verdict.slowly)} ({_first(verdict.slowly)}) over {verdict.slow.windows} windows")
    if found:
        return f"{' and '.join(found)} over {over}"
    name, smallest = min(verdict.p_values.items(), key=lambda item: item[1])
    return f"no drift: smallest p {smallest:.2g} ({public_name(name)}), threshold {verdict.threshold:.1g}, {over}"


def _first(drifted: Mapping[str, float]) -> str:
    """The three clearest, of a feature's groups or categories the clearest one, by names that messages may hold."""
    clearest: dict[str, float] = {}
    for name, p in drifted.items():
        clearest.setdefault(public_name(name), p)
    told = ", ".join(f"{name} p={p:.1g}" for name, p in list(clearest.items())[:3])
    return told + (", ..." if len(clearest) > 3 else "")


def _worse(found: Performance) -> str:
    if not found.is_worse:
        return ""
    how = "estimated" if found.estimated else f"on {found.labelled} labels"
    return f"; {found.metric} {found.value:.3f} {how}, was {found.reference:.3f}"
