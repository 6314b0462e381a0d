"""What a run reads: the source of the project's images, and weights that were learned elsewhere."""

from __future__ import annotations

import json
import os
import re
import socket
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar, assert_never

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig, as_uri
from cv_factory_ops.config.runtime import KubernetesRuntime
from cv_factory_ops.config.sources import (
    DicomWebSource,
    DimseSource,
    FileSource,
    HttpSource,
    KafkaSource,
    KafkaTopic,
    NpzSource,
    PhantomSource,
    ReceivedSource,
    VideoSource,
)
from cv_factory_ops.doctor.findings import QUESTION_SECONDS, CannotTell, Finding, fail, ok, warn
from cv_factory_ops.domain import open_domain
from cv_factory_ops.errors import ConfigError, DataError

Timed = TypeVar("Timed", DicomWebSource, DimseSource, HttpSource)
PORTS = {"rtsp": 554, "rtsps": 322, "http": 80, "https": 443}


def source(config: ProjectConfig) -> Iterator[Finding]:
    """Whether the source is there and lets us in; nothing of it is fetched."""
    match config.data.source:
        case PhantomSource():
            yield ok("source", "phantoms are generated")
        case FileSource() as given:
            yield from _files(config, given)
        case NpzSource() as given:
            yield _arrays(_here(config, given.path))
        case DicomWebSource() as given:
            yield _dicomweb(_impatient(given))
        case DimseSource() as given:
            yield _dimse(_impatient(given))
        case ReceivedSource() as given:
            yield _received(config, given)
        case HttpSource() as given:
            yield _http(_impatient(given).model_copy(update={"retries": 0}))
        case KafkaSource() as given:
            yield topic("source", given)
            if given.dead_letter_topic:
                yield topic("source.dead_letter", given.model_copy(update={"topic": given.dead_letter_topic}))
        case VideoSource() as given:
            yield _video(config, given)
        case other:
            assert_never(other)


def labels(config: ProjectConfig) -> Iterator[Finding]:
    """The table of labels, read to its end."""
    from cv_factory_ops.ingestion.labels import read_labels

    given = getattr(config.data.source, "labels", None)
    if not given or config.task != "classification":  # there the table names masks and patients
        return
    table = read_labels(_here(config, given), config.labels, open_domain(config.domain), config.data.report_column)
    yield ok("labels", f"{as_uri(given)}: {len(table.labels)} labels by {table.key}")


def weights(config: ProjectConfig) -> Iterator[Finding]:
    """Files that the network or the embedding begins with."""
    for name, section in (("model.weights", config.model), ("embedding.weights", config.embedding)):
        place = getattr(section, "weights", None)
        if place and place.startswith("hf://"):
            yield _on_the_hub(name, place)
        elif place:
            yield _object(name, _here(config, place))


def topic(name: str, wanted: KafkaTopic) -> Finding:
    """Whether the brokers answer, let us in and have the topic."""
    from confluent_kafka import Consumer, KafkaException

    from cv_factory_ops import kafka

    settings = {"group.id": "cvf-doctor", "allow.auto.create.topics": False, "socket.timeout.ms": int(QUESTION_SECONDS * 1000)}
    consumer = kafka.connect(Consumer, wanted, settings)
    try:
        found = consumer.list_topics(wanted.topic, timeout=min(wanted.timeout, QUESTION_SECONDS)).topics[wanted.topic]
        if found.error:
            raise KafkaException(found.error)
    except KafkaException as error:
        raise kafka.explained(error.args[0], wanted) from None
    finally:
        consumer.close()
    return ok(name, f"{wanted.bootstrap_servers}: topic {wanted.topic} has {len(found.partitions)} partitions")


def reaches(host: str, port: int) -> str:
    """Empty where something listens there, else why not."""
    try:
        with socket.create_connection((host, port), timeout=QUESTION_SECONDS):
            return ""
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno and error.errno > 0 else type(error).__name__


def _here(config: ProjectConfig, path: str) -> str:
    """The URI of a path, where this machine can see it."""
    if isinstance(config.runtime, KubernetesRuntime) and "://" not in path:
        raise CannotTell(f"{path} lies on a volume of the pods; `cvf doctor` in a pod that has it sees it")
    return as_uri(path)


def _object(name: str, uri: str) -> Finding:
    if storage.exists(uri):
        return ok(name, f"{uri} is there")
    return fail(name, f"{uri}: is not there", "bring it there, or change the path")


def _files(config: ProjectConfig, given: FileSource) -> Iterator[Finding]:
    for name, place in (("source", given.path), ("source.masks", given.masks), ("source.boxes", given.boxes)):
        if place:
            uri = _here(config, place)
            if not storage.exists(uri) and next(_some(uri), None) is None:
                yield fail(name, f"{uri}: holds no files", "bring the images there, or change the path")
            else:
                yield ok(name, f"{uri} is there")


def _some(uri: str) -> Iterator[str]:
    """Names below a URI, without listing all of a large folder first."""
    if path := storage.path_of(uri):
        return (str(found) for found in path.rglob("*") if found.is_file())
    return storage.listing(uri)


def _arrays(uri: str) -> Finding:
    path = storage.path_of(uri)
    if path is None:
        return _object("source", uri)
    try:
        with zipfile.ZipFile(path) as file:
            names = {Path(name).stem for name in file.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"{uri}: is no .npz file ({type(error).__name__})") from None
    lacking = sorted({f"{split}_{part}" for split in ("train", "val", "test") for part in ("images", "labels")} - names)
    if lacking:
        return fail("source", f"{uri}: lacks {', '.join(lacking)}", "the MedMNIST layout is needed")
    return ok("source", f"{uri} has all its arrays")


def _impatient(given: Timed) -> Timed:
    return given.model_copy(update={"timeout": min(given.timeout, QUESTION_SECONDS)})


def _dicomweb(given: DicomWebSource) -> Finding:
    import httpx

    from cv_factory_ops.ingestion.sources import pacs
    from cv_factory_ops.ingestion.sources.dicomweb import DicomWeb
    from cv_factory_ops.ingestion.sources.downloads import authorization

    pacs.check_query(given.query)
    with httpx.Client(timeout=given.timeout, headers=authorization(given)) as client:
        return _matches(given.url, next(DicomWeb(given, client).studies(), None), "QIDO-RS")


def _dimse(given: DimseSource) -> Finding:
    from cv_factory_ops.ingestion.sources import pacs
    from cv_factory_ops.ingestion.sources.dimse import Dimse

    pacs.check_query(given.query)
    peer = Dimse(given)
    peer.echo()
    return ok("source", f"{peer.place} answers C-ECHO and offers C-FIND and {given.retrieve.upper().replace('_', '-')}")


def _matches(place: str, study: str | None, request: str) -> Finding:
    if study is None:
        return fail("source", f"{place} answers {request}, no study matches", "change data.source.query")
    return ok("source", f"{place} answers {request} with studies")


def _received(config: ProjectConfig, given: ReceivedSource) -> Finding:
    from cv_factory_ops.ingestion.sources import inbox_uri
    from cv_factory_ops.ingestion.sources.inbox import Inbox

    if count := len(Inbox(inbox_uri(config, given))):
        return ok("source", f"{count} objects have been received")
    return fail("source", "nothing has been received yet", "`cvf receive` takes studies; send some")


def _http(given: HttpSource) -> Finding:
    import httpx

    from cv_factory_ops.errors import Rejected
    from cv_factory_ops.ingestion.sources.downloads import Downloads, Status
    from cv_factory_ops.ingestion.sources.http import MAX_PAGE, at

    with httpx.Client(timeout=given.timeout, follow_redirects=True) as client:
        downloads = Downloads(client, given)
        place = f"{downloads.start.scheme}://{downloads.start.netloc.decode().rpartition('@')[2]}"
        try:
            page = json.loads(downloads.get(downloads.start, MAX_PAGE)[0])
        except Status as error:
            denied = error.status in {401, 403}
            cure = "check the value of data.source.authorization_env" if denied else "check data.source.url"
            return fail("source", f"{place}: {'denies access' if denied else error} ({error.status})", cure)
        except (ValueError, RecursionError, Rejected):
            return fail("source", f"{place}: the first page is not JSON", "check data.source.url")
    items = at(page, given.items, f"{place}: items")
    if not isinstance(items, list) or not items:
        return fail("source", f"{place}: the first page lists nothing at {given.items!r}", "check data.source.items")
    return ok("source", f"{place}: the first page lists {len(items)} items")


def _video(config: ProjectConfig, given: VideoSource) -> Finding:
    if "://" not in given.path or given.path.startswith(("file://", "s3://")):
        uri = _here(config, given.path)
        return ok("source", f"{uri} is there") if storage.exists(uri) or next(_some(uri), None) else _object("source", uri)
    lacking = [name for name in re.findall(r"\$\{(\w+)\}", given.path) if not os.environ.get(name)]
    if lacking:
        return fail("source", f"{', '.join(lacking)}: not set, the stream's address needs it", "set it where stages run")
    parts = urllib.parse.urlsplit(os.path.expandvars(given.path))
    try:
        host, port = parts.hostname or "", parts.port or PORTS.get(parts.scheme, 554)
    except ValueError:  # its message holds a piece of the password
        return fail("source", "the stream's address cannot be read", "percent-encode what its password has of / # @ : ?")
    if reason := reaches(host, port):
        return fail("source", f"the camera at {host}:{port} does not answer ({reason})", "check address and network")
    return warn("source", f"{host}:{port} answers; whether it streams shows in ingestion only")


def _on_the_hub(name: str, place: str) -> Finding:
    """Asked for its metadata only; not reaching the hub is no proof, the file may be in the cache."""
    from cv_factory_ops.weights import HUB_URI

    given = HUB_URI.fullmatch(place)
    if not given:
        raise ConfigError(f"{name}: {place}: allowed is hf://owner/repository/file or hf://owner/repository@revision/file")
    try:
        from huggingface_hub import HfApi, errors, try_to_load_from_cache
    except ImportError:
        raise ConfigError(f"{place}: needs huggingface_hub: pip install 'cv-factory[hub]'") from None
    if isinstance(try_to_load_from_cache(given["repository"], given["file"], revision=given["revision"]), str):
        return ok(name, f"{place} is in this machine's cache")
    try:
        found = HfApi().file_exists(given["repository"], given["file"], revision=given["revision"])
    except errors.HFValidationError:
        found = False
    except Exception as error:  # whatever its HTTP client raises
        raise CannotTell(f"{place}: the hub does not answer ({type(error).__name__})") from None
    return ok(name, f"{place} is there") if found else fail(name, f"{place}: is not there, or HF_TOKEN does not open it")
