"""Captured requests whose labels have arrived, or all of them; where it is configured, with the champion's answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cv_factory_ops import audit, captures
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item

if TYPE_CHECKING:
    from cv_factory_ops.config import ProjectConfig
    from cv_factory_ops.stage import Stage


def captured_items(stage: Stage, labels: Mapping[str, str]) -> Iterator[Item | Refusal]:
    """The requests with a label, by their inference id, or with an answer that may stand in for one, or all; the first of
    several with the same id."""
    seen: set[str] = set()
    config, champion = stage.config, _champion_digest(stage.config)
    for capture in captures.read(config):
        name, label = f"capture-{capture.inference_id}", labels.get(capture.inference_id, "")
        pseudo = "" if label else answered(capture, config, champion)
        if not label and not pseudo and config.data.unlabelled == "refuse":
            continue
        if name in seen:
            yield Refusal(name, "duplicate", "was captured before under the same inference id")
        elif label and label not in config.labels:
            yield Refusal(name, "unknown_label", f"its late label is none of: {', '.join(config.labels)}")
        else:
            yield Item(name, capture.request, label, content_type=capture.content_type, source="capture", pseudo=pseudo)
        seen.add(name)


def answered(capture: captures.Capture, config: ProjectConfig, champion: str) -> str:
    """The champion's answer, where its calibrated probability is at least ``data.pseudo_labels`` and it was not withheld.

    Empty where it is not, where another bundle has answered, or for several images at once.
    """
    least = config.data.pseudo_labels
    if least is None or not champion:
        return ""
    try:
        answer = json.loads(capture.answer)
        (prediction,) = answer["predictions"]
        label, ours = prediction["label"], answer["bundle_digest"] == champion
        sure = prediction["scores"][label] >= least and not prediction.get("abstained")
    except (ValueError, KeyError, TypeError, AttributeError):
        return ""
    return label if ours and sure and label in config.labels else ""


def _champion_digest(config: ProjectConfig) -> str:
    """Of the present champion's bundle; empty where there is none, or its answers are not asked for."""
    champion = audit.champion(config) if config.data.pseudo_labels is not None else None
    return champion.bundle_digest if champion else ""
