"""Where images come from: phantoms, files, arrays, a PACS, an HTTP API, Kafka, video, captured requests.

Each source streams items, one in memory at a time. A remote one is first fetched into the project's inbox, object by object,
and read from there.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import TYPE_CHECKING, assert_never

from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig, as_uri
from cv_factory_ops.config.sources import (
    DicomWebSource,
    DimseSource,
    FileSource,
    HttpSource,
    KafkaSource,
    NpzSource,
    PhantomSource,
    ReceivedSource,
    Source,
    VideoSource,
)
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.sources.boxes import Annotations, open_annotations
from cv_factory_ops.ingestion.sources.inbox import Inbox
from cv_factory_ops.ingestion.sources.item import Item as Item
from cv_factory_ops.ingestion.sources.item import Opened as Opened
from cv_factory_ops.ingestion.sources.item import Ref as Ref
from cv_factory_ops.ingestion.sources.masks import Masks, open_masks

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

Remote = DicomWebSource | DimseSource | ReceivedSource | HttpSource | KafkaSource | VideoSource

PLACE = {
    "dicomweb": ("url", "query", "modalities"),
    "dimse": ("host", "port", "called_ae_title", "query", "modalities"),
    "received": (),
    "http": ("url", "items", "id", "image"),
    "kafka": ("bootstrap_servers", "topic", "group"),
    "video": ("path", "every_seconds"),
}
"""The settings that say what a remote source holds: where only others change, what was fetched stays of use."""


def open_base(stage: Stage, *, with_labels: bool = True) -> Opened:
    """The configured source; a remote one has given everything by then.

    Raises:
        DataError: it is not there, empty, or its labels are wrong.
        Unavailable: a server does not answer; what it has given is kept.
    """
    from cv_factory_ops.ingestion.labels import label_files, read_labels

    source = stage.config.data.source
    table_uri = _label_table(stage, source)
    places = _open_places(stage, source, table_uri)
    opened = _open(stage, source, table_uri, places)
    if places:
        return replace(opened, items=places.given_to(opened.items)) if with_labels else opened
    if not with_labels or not table_uri:
        return opened
    table = read_labels(table_uri, stage.config.labels, stage.domain, stage.config.data.report_column)
    if table.key == "file":
        keep = stage.config.data.unlabelled == "keep"
        return replace(opened, items=label_files(opened.items, table, keep=keep))
    return replace(opened, table=table)


def _open_places(stage: Stage, source: Source, table_uri: str) -> Masks | Annotations | None:
    """Where things are in the images; None where a project learns only that they are."""
    match stage.config.task:
        case "classification":
            return None
        case "segmentation":
            return open_masks(stage, source, table_uri)
        case "detection":
            return open_annotations(source, table_uri)
        case task:
            assert_never(task)


def _label_table(stage: Stage, source: Source) -> str:
    """URI of the source's table of labels; empty where the source says labels itself."""
    if isinstance(source, PhantomSource):
        from cv_factory_ops.ingestion.sources import files

        return f"{files.phantoms(stage, source)}/labels.csv"
    return as_uri(source.labels) if not isinstance(source, NpzSource | HttpSource | KafkaSource) and source.labels else ""


def _open(stage: Stage, source: Source, table_uri: str, places: Masks | Annotations | None) -> Opened:
    from cv_factory_ops.ingestion.sources import arrays, files

    hidden = {table_uri} | (places.hidden if places else set())
    match source:
        case PhantomSource():
            return files.open_files(table_uri.rpartition("/")[0], stage, hidden)
        case FileSource():
            return files.open_files(as_uri(source.path), stage, hidden)
        case NpzSource():
            return arrays.open_npz(source, stage)
        case _:
            inbox = Inbox(inbox_uri(stage.config, source))
            fetch(source, inbox, stage)
            return Opened(len(inbox), inbox.items())


def fetch(source: Remote, inbox: Inbox, stage: Stage) -> None:
    """Bring what a remote source holds, and the inbox does not have yet, into the inbox."""
    match source:
        case DicomWebSource():
            from cv_factory_ops.ingestion.sources import dicomweb

            dicomweb.fetch_studies(source, inbox, stage.domain, stage.config.deidentification)
        case DimseSource():
            from cv_factory_ops.ingestion.sources import dimse

            dimse.fetch_studies(source, inbox, stage.domain, stage.config.deidentification)
        case ReceivedSource():
            if not len(inbox):
                raise DataError(f"{inbox.uri}: nothing has been received yet; `cvf receive` fills it")
        case HttpSource():
            from cv_factory_ops.ingestion.sources.http import fetch_images

            fetch_images(source, inbox, stage.domain, stage.config.deidentification)
        case KafkaSource():
            from cv_factory_ops.ingestion.sources.kafka import fetch_messages

            fetch_messages(source, inbox, stage.domain, stage.config.deidentification)
        case VideoSource():
            from cv_factory_ops.ingestion.sources.video import fetch_frames

            fetch_frames(source, inbox)
        case _:
            assert_never(source)


def inbox_uri(config: ProjectConfig, source: Remote) -> str:
    """Where a remote source's objects are kept; what was de-identified by other settings is not read."""
    settings = source.model_dump(mode="json", include=set(PLACE[source.kind]))
    if not isinstance(source, VideoSource):  # frames are not de-identified, and those of a stream cannot be fetched again
        settings["deidentification"] = config.deidentification.model_dump(mode="json")
    return f"{config.root}/inbox/{source.kind}-{storage.text_digest(json.dumps(settings, sort_keys=True))[:12]}"


def open_captures(stage: Stage) -> Opened:
    """Captured requests whose labels have arrived, or all; those without are not refused, only not yet of use. What came after
    the run was pinned (:func:`fingerprint`) is left to the next one."""
    from cv_factory_ops.ingestion.sources import captured

    pin = captured.read_pin(stage.run)
    labels = captures.read_labels(stage.config, until=pin.labels_until)
    return Opened(len(labels), captured.captured_items(stage.config, labels, pin))


def fingerprint(stage: Stage) -> str:
    """Digest of what the sources would read now: names and versions, not contents. A remote source is always asked anew; what
    was captured is pinned at the run's first start."""
    places: list[str] = []
    asked = ""
    match stage.config.data.source:
        case PhantomSource():
            pass
        case FileSource() as source:
            places = [as_uri(place) for place in (source.path, source.labels, source.masks, source.boxes) if place]
        case NpzSource() as source:
            places = [as_uri(source.path)]
        case _:
            asked = str(time.time_ns())
    if stage.config.data.include_captures:
        from cv_factory_ops.ingestion.sources import captured

        asked += captured.pinned(stage).model_dump_json()
    versions = [list(storage.versions(place)) for place in places]
    return storage.text_digest(json.dumps(versions) + asked)
