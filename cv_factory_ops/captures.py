"""Captured requests and the labels that arrive later: the memory that drift checks and retraining read.

Captures are SageMaker's data-capture JSON Lines, under ``<project>/captures/<endpoint>/<variant>/<yyyy/mm/dd/hh>/``
(https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-data-capture.html). Late labels are JSON Lines under
``<project>/labels/``, joined to a capture by its inference id.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig

log = logging.getLogger("cvf")

PROBE = "verify-"
"""Inference ids of the platform's own test requests begin with this; :func:`read` leaves those out."""


@dataclass(frozen=True)
class Capture:
    """One request with its answer."""

    position: str
    """Sortable place in the log, ``yyyy/mm/dd/hh/<file>#<line>``: reading ``after`` it goes on behind it."""
    inference_id: str
    time: str
    content_type: str
    request: bytes
    answer: bytes


def folder(config: ProjectConfig) -> str:
    """URI below which a project's captures lie (SageMaker adds endpoint, variant and hour)."""
    return f"{config.root}/captures"


def encode(
    *, event_id: str, inference_id: str, time: datetime, request: bytes, content_type: str, answer: bytes, answer_type: str
) -> str:
    """One line of a capture file, without the line break."""
    body = {
        "captureData": {
            "endpointInput": _side("INPUT", request, content_type),
            "endpointOutput": _side("OUTPUT", answer, answer_type),
        },
        "eventMetadata": {
            "eventId": event_id,
            "inferenceId": inference_id,
            "inferenceTime": time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
        "eventVersion": "0",
    }
    return json.dumps(body, separators=(",", ":"))


def read(config: ProjectConfig, after: str = "") -> Iterator[Capture]:
    """Captures of the project's endpoint behind a position, oldest first; broken lines are skipped with a warning."""
    root = f"{folder(config)}/{config.endpoint_name}"
    names = {name.partition("/")[2]: name for name in storage.listing(root) if name.endswith(".jsonl")}
    file_of_cursor = after.partition("#")[0]
    for place in sorted(names):
        if place < file_of_cursor:
            continue
        for number, line in enumerate(storage.read_bytes(f"{root}/{names[place]}").splitlines()):
            position = f"{place}#{number:06d}"
            if position > after and (capture := _decode(position, line)) and not capture.inference_id.startswith(PROBE):
                yield capture


def add_labels(config: ProjectConfig, labels: Mapping[str, str]) -> str:
    """Store late labels, ``{inference id: label}``; returns the URI of the new file."""
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    lines = [json.dumps({"inference_id": key, "label": label}) for key, label in labels.items()]
    uri = f"{config.root}/labels/{name}-{secrets.token_hex(4)}.jsonl"  # several gateways may store at the same moment
    storage.write_bytes(uri, ("\n".join(lines) + "\n").encode())
    return uri


def read_labels(config: ProjectConfig, after: str = "") -> dict[str, str]:
    """Late labels, ``{inference id: label}``; a later file corrects an earlier one, broken lines are skipped with a warning.

    ``after`` is a UTC time like ``20260131T235959000000``: only labels that arrived later are read.
    """
    root = f"{config.root}/labels"
    labels: dict[str, str] = {}
    for name in storage.listing(root, after):
        for number, line in enumerate(storage.read_bytes(f"{root}/{name}").splitlines(), start=1):
            try:
                item = json.loads(line)
                labels[str(item["inference_id"])] = str(item["label"])
            except (ValueError, KeyError, TypeError):
                log.warning("labels/%s line %d: skipped, not a label record", name, number)
    return labels


def _side(mode: str, content: bytes, content_type: str) -> dict[str, str]:
    is_text = content_type.partition(";")[0] in {"application/json", "text/csv"}
    data = content.decode() if is_text else base64.b64encode(content).decode("ascii")
    encoding = {"application/json": "JSON", "text/csv": "CSV"}.get(content_type.partition(";")[0], "BASE64")
    return {"observedContentType": content_type, "mode": mode, "data": data, "encoding": encoding}


def _decode(position: str, line: bytes) -> Capture | None:
    try:
        item = json.loads(line)
        sides, event = item["captureData"], item["eventMetadata"]
        return Capture(
            position=position,
            inference_id=event.get("inferenceId") or event["eventId"],
            time=event["inferenceTime"],
            content_type=sides["endpointInput"]["observedContentType"],
            request=_content(sides["endpointInput"]),
            answer=_content(sides["endpointOutput"]),
        )
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        log.warning("capture %s: skipped, not a capture record (%s)", position, type(error).__name__)
        return None


def _content(side: Mapping[str, Any]) -> bytes:
    data: str = side["data"]
    return base64.b64decode(data, validate=True) if side["encoding"] == "BASE64" else data.encode()
