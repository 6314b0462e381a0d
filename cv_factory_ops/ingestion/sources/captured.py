"""Captured requests whose labels have arrived, or all of them; where it is configured, with the champion's answers.

A run learns from what there was at its first start, whatever comes by the endpoint, and whoever becomes champion, until it is
done: ``<run>/captured.json`` holds the :class:`Pin`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cv_factory_ops import audit, captures, storage
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item
from cv_factory_ops.records import Frozen, Reading

if TYPE_CHECKING:
    from cv_factory_ops.config import ProjectConfig
    from cv_factory_ops.stage import Stage


class Pin(Frozen):
    """Which captured requests a run learns from."""

    captures: Reading
    """How far they reached."""
    labels_until: str
    """Name of the newest file of late labels; empty where there were none."""
    champion_digest: str
    """Of the bundle whose answers may stand in for labels; empty where there was no champion."""


def pinned(stage: Stage) -> Pin:
    """What is pinned for this run; at its first start, and where it is forced, what there is now.

    Raises:
        DataError: the history of the champions is broken, or the pin cannot be read.
    """
    if stage.force or not storage.exists(_pin_uri(stage.run)):
        storage.write_bytes(_pin_uri(stage.run), _present(stage.config).model_dump_json().encode())
    return read_pin(stage.run)


def read_pin(run: str) -> Pin:
    """What was pinned for a run.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    try:
        return Pin.model_validate_json(storage.read_bytes(_pin_uri(run)))
    except ValidationError:
        raise DataError(f"{_pin_uri(run)}: is not what a run may learn from; `cvf ingest --force` makes it anew") from None


def _present(config: ProjectConfig) -> Pin:
    champion, labels = audit.champion(config), storage.listing(captures.labels_folder(config))
    return Pin(
        captures=captures.extent(config),
        labels_until=max(labels, default=""),
        champion_digest=champion.bundle_digest if champion else "",
    )


def _pin_uri(run: str) -> str:
    return f"{run}/captured.json"


def captured_items(config: ProjectConfig, labels: Mapping[str, str], pin: Pin) -> Iterator[Item | Refusal]:
    """The requests with a label, by their inference id, or with an answer that may stand in for one, or all; the first of
    several with the same id."""
    seen: set[str] = set()
    for capture in captures.read(config, until=pin.captures):
        name, label = f"capture-{capture.inference_id}", labels.get(capture.inference_id, "")
        pseudo = "" if label else answered(capture, config, pin.champion_digest)
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
