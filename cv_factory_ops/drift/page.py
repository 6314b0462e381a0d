"""``index.html`` of a drift check: one page, without anything that a browser would have to load, that says what was found."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cv_factory_ops.drift import examples, picture

if TYPE_CHECKING:
    from cv_factory_ops.bundle import Bundle
    from cv_factory_ops.drift.detect import Comparison, Verdict
    from cv_factory_ops.drift.window import Window
    from cv_factory_ops.records import DriftRecord, WatchedGroup
    from cv_factory_ops.registry import Champion
    from cv_factory_ops.stage import Stage

FEATURES = 12
"""Features in the table, the clearest first."""
TITLES = {"accuracy": "accuracy", "auc": "AUROC", "sensitivity": "sensitivity", "specificity": "specificity"}
PICTURES = ("drift.png", "embedding.png", "examples.png")


def draw(stage: Stage, model: Champion, bundle: Bundle, window: Window, comparison: Comparison, verdict: Verdict) -> str:
    """Write the pictures into the stage's folder; returns why images are not shown, in words."""
    picture.draw(comparison, verdict, stage.out / "drift.png")
    picture.draw_embedding(comparison, stage.out / "embedding.png")
    feature, count = _telling_feature(bundle, verdict), stage.config.drift.example_images
    if not feature or not count:
        return ""
    sides = {
        "reference": examples.of_reference(stage, model, bundle.reference()[feature], count),
        "window": examples.of_window(stage, bundle, window, pd.DataFrame(window.rows)[feature], count),
    }
    picture.draw_examples(sides, feature, stage.out / "examples.png")
    return examples.reasons(list(sides.values()))


def write(stage: Stage, record: DriftRecord, window: Window, comparison: Comparison, verdict: Verdict, left_out: str) -> None:
    """Write the page beside the pictures that :func:`draw` has drawn."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = pages.get_template("page.html.jinja").render(
        project=stage.config.project,
        record=record,
        images=len(comparison.window),
        answers=window.sample.offered,
        features=_features(comparison, verdict),
        threshold=f"{verdict.threshold:.1g}",
        limit=verdict.threshold,
        clearest=_clearest,
        titles=TITLES,
        pictures={name: _inline(stage.out / name) for name in PICTURES if (stage.out / name).exists()},
        left_out=left_out,
    )
    (stage.out / "index.html").write_text(html, encoding="utf-8")


def _telling_feature(bundle: Bundle, verdict: Verdict) -> str:
    """The number that drifted most, or that comes nearest to it; empty where the bundle has none."""
    numbers = [name for name, kind in bundle.manifest.features.items() if kind == "number" and name in verdict.p_values]
    return min(numbers, key=lambda name: verdict.p_values[name], default="")


def _features(comparison: Comparison, verdict: Verdict) -> list[dict[str, Any]]:
    chosen = sorted(verdict.p_values, key=lambda name: (verdict.p_values[name], name))[:FEATURES]
    return [
        {
            "name": name,
            "p": f"{verdict.p_values[name]:.2g}",
            "drifted": name in verdict.drifted,
            "reference": _told(comparison.reference[name], comparison.kinds[name]),
            "window": _told(comparison.window[name], comparison.kinds[name]),
        }
        for name in chosen
    ]


def _told(values: pd.Series, kind: str) -> str:
    present = values.dropna()
    if not len(present):
        return "none"
    if kind == "number":
        low, middle, high = present.quantile([0.05, 0.5, 0.95])
        return f"{middle:.4g} ({low:.4g} to {high:.4g})"
    shares = present.value_counts(normalize=True)
    return ", ".join(f"{name} {share:.0%}" for name, share in shares.head(3).items()) + (", ..." if len(shares) > 3 else "")


def _clearest(group: WatchedGroup) -> str:
    if not group.p_values:
        return "all images" if group.share == group.reference_share == 1 else "too few to be tested"
    name = min(group.p_values, key=lambda name: group.p_values[name])
    return f"{name}, p = {group.p_values[name]:.2g}"


def _inline(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
