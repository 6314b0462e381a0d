"""Stage ``drift``: Evidently compares the captured requests with the champion's reference; the verdict is in its p-values."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.domain import Kind
from cv_factory_ops.drift.window import Window, consume, read_window
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import DriftRecord
from cv_factory_ops.registry import Champion, champion

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.drift.detect import Comparison, Verdict
    from cv_factory_ops.stage import Stage


def run(stage: Stage) -> DriftRecord:
    """Judge the captures behind the cursor; write the report and the picture; move the cursor.

    A window below ``drift.minimum`` is not judged and not consumed: its captures count next time.

    Raises:
        DataError: there is no champion to compare with, or its bundle has no usable reference.
        Unavailable: another check of the project has finished meanwhile.
    """
    model = _champion(stage.config)
    bundle = Bundle.load(stage.local(model.bundle))
    window = read_window(stage, model.bundle_digest, bundle.manifest.features)
    if window.requests < stage.config.drift.minimum:
        return _not_enough(stage, model, window)
    verdict = _judge(stage, bundle, window)
    consume(stage, window)
    return _found(stage, model, window, verdict)


def evidently_verdict(comparison: Comparison, folder: Path) -> Verdict:
    """Let Evidently test every column; ``report.html`` and ``report.json`` appear in the folder.

    Columns without a value on either side are not in Evidently's report and count as undecided, p = 1.
    """
    from cv_factory_ops.drift.detect import Verdict

    snapshot = _snapshot(comparison)
    snapshot.save_html(str(folder / "report.html"))
    snapshot.save_json(str(folder / "report.json"))
    metrics = [metric for metric in snapshot.dict()["metrics"] if metric["config"]["type"].endswith(":ValueDrift")]
    found = {metric["config"]["column"]: float(metric["value"]) for metric in metrics}
    return Verdict(dict.fromkeys(comparison.kinds, 1.0) | found, comparison.threshold)


def _champion(config: ProjectConfig) -> Champion:
    if found := champion(config):
        return found
    raise DataError(f"project {config.project}: has no champion to compare with; train and promote a model first")


def _judge(stage: Stage, bundle: Bundle, window: Window) -> Verdict:
    import pandas as pd

    from cv_factory_ops.drift.detect import compare
    from cv_factory_ops.drift.picture import draw

    kinds = bundle.manifest.features
    features = pd.DataFrame(window.rows, columns=list(kinds))
    features.to_parquet(stage.out / "features.parquet", index=False)
    comparison = compare(_reference(bundle, kinds), features, kinds, stage.config.drift.alpha)
    verdict = evidently_verdict(comparison, stage.out)
    draw(comparison, verdict, stage.out / "drift.png")
    return verdict


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


def _snapshot(comparison: Comparison) -> Any:
    """Evidently's snapshot of the testable columns, its own verdict set to ours: one drifted column is drift."""
    os.environ.setdefault("DO_NOT_TRACK", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from evidently import DataDefinition, Dataset, Report
        from evidently.presets import DataDriftPreset

        kinds = comparison.testable
        definition = DataDefinition(
            numerical_columns=[name for name, kind in kinds.items() if kind == "number"],
            categorical_columns=[name for name, kind in kinds.items() if kind == "category"],
        )
        sides = [
            Dataset.from_pandas(side[list(kinds)], data_definition=definition)
            for side in (comparison.window, comparison.reference)
        ]
        preset = DataDriftPreset(
            columns=list(kinds),
            num_method="ks",
            cat_method=_category_test(),
            threshold=comparison.threshold,
            drift_share=1 / len(kinds),
        )
        return Report([preset]).run(*sides)


def _category_test() -> str:
    """Register our test of categories with Evidently: its own takes the reference's shares for the truth."""
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType

    from cv_factory_ops.drift.detect import category_p_value

    def test(reference: pd.Series[str], window: pd.Series[str], kind: ColumnType, threshold: float) -> tuple[float, bool]:
        p = category_p_value(reference, window, threshold)
        return p, p <= threshold

    name = "chi-square, Monte Carlo p_value"
    register_stattest(StatTest(name, name, [ColumnType.Categorical]), test)
    return name


def _not_enough(stage: Stage, model: Champion, window: Window) -> DriftRecord:
    minimum = stage.config.drift.minimum
    summary = (
        f"not enough data: {window.requests} of at least {minimum} requests, "
        f"{minimum - window.requests} more are needed{window.left_out}"
    )
    return DriftRecord(summary=summary, verdict="not enough data", drifted={}, report=None, **_common(stage, model, window))


def _found(stage: Stage, model: Champion, window: Window, verdict: Verdict) -> DriftRecord:
    report = stage.uri("report.html")
    return DriftRecord(
        summary=_in_words(verdict, window),
        links={"report": report},
        verdict="drift" if verdict.drifted else "no drift",
        drifted=verdict.drifted,
        report=report,
        **_common(stage, model, window),
    )


def _common(stage: Stage, model: Champion, window: Window) -> dict[str, Any]:
    return {
        "requests": window.requests,
        "window_start": window.start,
        "window_end": window.end,
        "alpha": stage.config.drift.alpha,
        "bundle_digest": model.bundle_digest,
    }


def _in_words(verdict: Verdict, window: Window) -> str:
    over = f"{window.requests} requests{window.left_out}"
    if drifted := verdict.drifted:
        first = ", ".join(f"{name} p={p:.1g}" for name, p in list(drifted.items())[:3])
        more = ", ..." if len(drifted) > 3 else ""
        return f"drift in {len(drifted)} of {len(verdict.p_values)} features ({first}{more}) over {over}"
    name, smallest = min(verdict.p_values.items(), key=lambda item: item[1])
    return f"no drift: smallest p {smallest:.2g} ({name}), threshold {verdict.threshold:.1g}, {over}"
