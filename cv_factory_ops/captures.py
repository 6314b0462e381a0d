"""Captured requests and the labels that arrive later: the memory that drift checks and retraining read.

Captures are SageMaker's data-capture JSON Lines, under ``<project>/captures/<endpoint>/<variant>/<yyyy/mm/dd/hh>/``
(https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-data-capture.html). Late labels are JSON Lines under
``<project>/labels/``, joined to a capture by its inference id.

Captures are read as a stream: one line is held at a time, and of a file only what was not read before.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.records import Reading, is_hour

log = logging.getLogger("cvf")

PROBE = "verify-"
"""Inference ids of the platform's own test requests begin with this; :func:`read` leaves those out."""


@dataclass(frozen=True)
class Capture:
    """One request with its answer."""

    position: str
    """Its place in the log, ``yyyy/mm/dd/hh/<variant>/<file>#<byte>``."""
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


def skip(position: str, reason: str) -> None:
    """A line that is no capture is passed over with a warning."""
    log.warning("capture %s: skipped, not a capture record (%s)", position, reason)


def read(config: ProjectConfig, broken: Callable[[str, str], None] = skip, until: Reading | None = None) -> Iterator[Capture]:
    """All captures of the project's endpoint, oldest file first, without the platform's own test requests.

    ``broken`` is told position and reason of each line that is no capture; ``until``: what came later is not looked at.
    """
    for file, start, end in unread(config, Reading(), until):
        for _, capture in read_file(config, file, start, end, broken):
            if capture:
                yield capture


def captured(config: ProjectConfig, inference_ids: Iterable[str]) -> set[str]:
    """Those of these ids that requests were captured with. The newest files are read first, and no more of them than needed to
    find all; of a line only the id is decoded."""
    missing = {name for name in inference_ids if not name.startswith(PROBE)}
    found: set[str] = set()
    for file, _ in reversed(_files(config, "")) if missing else ():
        for _, line in storage.read_lines(_uri(config, file)):
            found |= missing & {_inference_id(line)}
            if found == missing:
                return found
    return found


def unread(config: ProjectConfig, since: Reading, until: Reading | None = None) -> Iterator[tuple[str, int, int]]:
    """Files that have more than was read, oldest first: name, first byte to read and the one to end before; ``until``: what
    came later is not looked at."""
    for file, size in _files(config, since.floor):
        start, end = since.of(file), min(size, until.of(file)) if until else size
        if start < end:
            yield file, start, end


def read_file(
    config: ProjectConfig, file: str, start: int, end: int, broken: Callable[[str, str], None] = skip
) -> Iterator[tuple[int, Capture | None]]:
    """Each line of a file, from one byte to another: the byte behind it, and its capture; None of a broken one or a probe.

    A last line without its end is left to the next time, unless it is whole: it may still be written.
    """
    for offset, line in storage.read_lines(_uri(config, file), start):
        if offset >= end or not (line.endswith(b"\n") or _is_json(line)):
            return
        capture = _decode(f"{file}#{offset}", line, broken) if line.strip() else None
        yield offset + len(line), None if capture is None or capture.inference_id.startswith(PROBE) else capture


def at(config: ProjectConfig, position: str) -> Capture | None:
    """The capture at a position; None where there is none any more.

    Raises:
        DataError: its file is gone.
    """
    file, _, offset = position.partition("#")
    _, line = next(storage.read_lines(_uri(config, file), int(offset)), (0, b""))
    return _decode(position, line, skip)


def extent(config: ProjectConfig) -> Reading:
    """How far the captures reach now."""
    return Reading(read=dict(_files(config, "")))


def add_labels(config: ProjectConfig, labels: Mapping[str, str]) -> str:
    """Store late labels, ``{inference id: label}``; returns the URI of the new file."""
    name = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    lines = [json.dumps({"inference_id": key, "label": label}) for key, label in labels.items()]
    uri = f"{labels_folder(config)}/{name}-{secrets.token_hex(4)}.jsonl"  # several gateways may store at the same moment
    storage.write_bytes(uri, ("\n".join(lines) + "\n").encode())
    return uri


def labels_folder(config: ProjectConfig) -> str:
    """URI below which a project's late labels lie; the names of the files begin with the time that they arrived at."""
    return f"{config.root}/labels"


def read_labels(config: ProjectConfig, after: str = "", until: str | None = None) -> dict[str, str]:
    """Late labels, ``{inference id: label}``; a later file corrects an earlier one, broken lines are skipped with a warning.

    ``after`` is a UTC time like ``20260131T235959000000``: only labels that arrived later are read. ``until``: the name of the
    last file to read.
    """
    root = labels_folder(config)
    labels: dict[str, str] = {}
    for name in storage.listing(root, after):
        if until is not None and name > until:
            break
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


def _files(config: ProjectConfig, floor: str) -> list[tuple[str, int]]:
    """Names, ``yyyy/mm/dd/hh/<variant>/<file>``, and sizes of all capture files of an hour and later, sorted."""
    root = f"{folder(config)}/{config.endpoint_name}"
    found = []
    for variant in storage.folders(root):
        for name, size in storage.sizes(f"{root}/{variant}", floor):
            hour, _, file = name.rpartition("/")
            if is_hour(hour) and file.endswith(".jsonl"):
                found.append((f"{hour}/{variant}/{file}", size))
            elif file.endswith(".jsonl"):
                log.warning("captures/%s/%s/%s: skipped, not in a folder yyyy/mm/dd/hh", config.endpoint_name, variant, name)
    return sorted(found)


def _uri(config: ProjectConfig, file: str) -> str:
    hour, variant, name = file.rsplit("/", 2)
    return storage.join(f"{folder(config)}/{config.endpoint_name}", f"{variant}/{hour}/{name}")


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _decode(position: str, line: bytes, broken: Callable[[str, str], None]) -> Capture | None:
    try:
        item = json.loads(line)
        sides, event = item["captureData"], item["eventMetadata"]
        return Capture(
            position=position,
            inference_id=_id_of(event),
            time=event["inferenceTime"],
            content_type=sides["endpointInput"]["observedContentType"],
            request=_content(sides["endpointInput"]),
            answer=_content(sides["endpointOutput"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
        broken(position, type(error).__name__)
        return None


def _inference_id(line: bytes) -> str:
    """Of a capture's line; empty where it has none. Within a body, which is a string, the quotes are escaped."""
    event = line[line.rfind(b'"eventMetadata"') :].partition(b":")[2]
    try:
        return _id_of(json.JSONDecoder().raw_decode(event.decode().lstrip())[0])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def _id_of(event: Mapping[str, Any]) -> str:
    return str(event.get("inferenceId") or event["eventId"])


def _content(side: Mapping[str, Any]) -> bytes:
    data: str = side["data"]
    return base64.b64decode(data, validate=True) if side["encoding"] == "BASE64" else data.encode()
