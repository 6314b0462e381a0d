"""Captured requests whose labels have arrived, or all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from cv_factory_ops import captures
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage


def captured_items(stage: Stage, labels: Mapping[str, str]) -> Iterator[Item | Refusal]:
    """The requests with a label, by their inference id, or all; the first of several with the same one."""
    seen: set[str] = set()
    for capture in captures.read(stage.config):
        if capture.inference_id not in labels and stage.config.data.unlabelled == "refuse":
            continue
        name, label = f"capture-{capture.inference_id}", labels.get(capture.inference_id, "")
        if name in seen:
            yield Refusal(name, "duplicate", "was captured before under the same inference id")
        elif label and label not in stage.config.labels:
            yield Refusal(name, "unknown_label", f"its late label is none of: {', '.join(stage.config.labels)}")
        else:
            yield Item(name, capture.request, label, content_type=capture.content_type, source="capture")
        seen.add(name)
