"""Where images come from: phantoms, files, arrays, captured requests. Each source streams items, one in memory at a time."""

from __future__ import annotations

import csv
import fcntl
import io
import json
import logging
import posixpath
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import numpy as np
from numpy.typing import NDArray

import cv_factory_ops
from cv_factory_ops import captures, storage
from cv_factory_ops.config import FileSource, NpzSource, PhantomSource, as_uri
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")


@dataclass(frozen=True)
class Item:
    """One image as its source gives it."""

    id: str
    content: bytes | NDArray[np.uint8]
    """A file's bytes, or an array of (rows, columns)."""
    label: str
    content_type: str | None = None
    patient: str = ""
    """Pseudonym, where the source itself says whose image it is."""
    split: str = ""
    """The split that the source fixes, if any."""
    source: str = "base"


@dataclass(frozen=True)
class Opened:
    """A source that is ready to be read."""

    total: int
    """Items to expect, for the progress."""
    items: Iterator[Item | Refusal]


def open_base(stage: Stage) -> Opened:
    """The configured source.

    Raises:
        DataError: it is not there, empty, or its labels are wrong.
    """
    match stage.config.data.source:
        case PhantomSource() as source:
            uri = _phantoms(stage, source)
            return _files(uri, f"{uri}/labels.csv", stage.config.labels)
        case FileSource() as source:
            return _files(as_uri(source.path), as_uri(source.labels), stage.config.labels)
        case NpzSource() as source:
            return _npz(source, stage.config.labels)
        case source:
            assert_never(source)


def open_captures(stage: Stage) -> Opened:
    """Captured requests whose labels have arrived; those without are not refused, only not yet of use."""
    labels = captures.read_labels(stage.config)
    return Opened(len(labels), _captured(stage, labels))


def fingerprint(stage: Stage) -> str:
    """Digest of what the sources would read now: names and versions, not contents."""
    places: list[str] = []
    match stage.config.data.source:
        case FileSource() as source:
            places = [as_uri(source.path), as_uri(source.labels)]
        case NpzSource() as source:
            places = [as_uri(source.path)]
    if stage.config.data.include_captures:
        places += [captures.folder(stage.config), f"{stage.config.root}/labels"]
    versions = [list(storage.versions(place)) for place in places]
    return storage.text_digest(json.dumps(versions))


def _phantoms(stage: Stage, source: PhantomSource) -> str:
    """URI of the generated studies: made once for the same settings, complete or not there at all."""
    config = stage.config
    settings = [cv_factory_ops.__version__, config.domain, config.labels, source.model_dump(mode="json")]
    name = storage.text_digest(json.dumps(settings))[:16]
    folder = (storage.path_of(config.root) or stage.workspace) / "phantoms"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            log.info("ingest: generating phantoms of %d patients", source.patients)
            draft = folder / f".{name}"
            shutil.rmtree(draft, ignore_errors=True)
            stage.domain.generate(
                draft, patients=source.patients, image_size=source.image_size, seed=source.seed, labels=config.labels
            )
            draft.rename(folder / name)
    return (folder / name).as_uri()


def _files(uri: str, labels_uri: str, allowed: list[str]) -> Opened:
    table = _read_labels(labels_uri, allowed)
    folder = storage.path_of(uri)
    if folder is not None and not folder.is_dir():
        raise DataError(f"{uri}: is not there" if not folder.exists() else f"{uri}: is not a directory")
    hidden = {labels_uri.removeprefix(f"{uri}/")}
    names = [name for name in storage.listing(uri) if name not in hidden and not posixpath.basename(name).startswith(".")]
    if not names:
        raise DataError(f"{uri}: holds no files; expected are images")
    return Opened(len(names), _labelled_files(uri, names, table))


def _labelled_files(uri: str, names: list[str], table: dict[str, tuple[str, str]]) -> Iterator[Item | Refusal]:
    for name in names:
        if name not in table:
            yield Refusal(name, "unlabelled", "has no row in the table of labels")
            continue
        label, patient = table[name]
        yield Item(name, storage.read_bytes(f"{uri}/{name}"), label, patient=patient)
    for name in sorted(table.keys() - set(names)):
        yield Refusal(name, "label_without_image", "has a row in the table of labels, but no file")


def _read_labels(uri: str, allowed: list[str]) -> dict[str, tuple[str, str]]:
    """``{file: (label, pseudonym of the patient or "")}``; messages name lines, not cells, which may identify."""
    try:
        reader = csv.DictReader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig")))
        rows = list(reader)
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{uri}: is not a CSV table in UTF-8") from None
    if lacking := {"file", "label"} - set(reader.fieldnames or ()):
        raise DataError(f"{uri}: column {', '.join(sorted(lacking))} is missing; allowed: file, label and optionally patient")
    table: dict[str, tuple[str, str]] = {}
    for line, row in enumerate(rows, start=2):
        name, label, patient = (posixpath.normpath(row["file"] or ""), row["label"], (row.get("patient") or "").strip())
        if label not in allowed:
            raise DataError(f"{uri}: line {line}: the label is none of those allowed: {', '.join(allowed)}")
        if name in table:
            raise DataError(f"{uri}: line {line}: this file has a row already")
        table[name] = (label, pseudonym(patient, "patient") if patient else "")
    return table


def _npz(source: NpzSource, allowed: list[str]) -> Opened:
    uri = as_uri(source.path)
    try:
        with np.load(io.BytesIO(storage.read_bytes(uri)), allow_pickle=False) as arrays:
            # Test and validation first: an image that they share with train is theirs (the official PneumoniaMNIST has 8).
            parts = {split: (arrays[f"{split}_images"], arrays[f"{split}_labels"]) for split in ("test", "val", "train")}
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{uri}: {error.args[0]}; expected: <split>_images and <split>_labels of train, val, test") from None
    except Exception as error:
        raise DataError(f"{uri}: is not a usable .npz file ({type(error).__name__})") from None
    for split, (images, labels) in parts.items():
        if images.ndim != 3 or images.dtype != np.uint8:
            raise DataError(f"{uri}: {split}_images is {images.dtype} {images.shape}; allowed: uint8, N x rows x columns")
        if labels.shape not in {(len(images),), (len(images), 1)} or labels.dtype.kind not in "iu":
            raise DataError(f"{uri}: {split}_labels is {labels.dtype} {labels.shape}; allowed: integers, {len(images)} x 1")
        if wrong := set(labels.ravel().tolist()) - set(range(len(allowed))):
            raise DataError(f"{uri}: {split}_labels holds {min(wrong)}; allowed: 0..{len(allowed) - 1} ({', '.join(allowed)})")
    total = sum(len(images) for images, _ in parts.values())
    return Opened(total, _array_items(parts, allowed))


def _array_items(
    parts: dict[str, tuple[NDArray[np.uint8], NDArray[np.integer]]], allowed: list[str]
) -> Iterator[Item | Refusal]:
    for split, (images, labels) in parts.items():
        for i, (image, label) in enumerate(zip(images, labels.ravel(), strict=True)):
            yield Item(f"{split}-{i:06d}", image, allowed[label], split=split)


def _captured(stage: Stage, labels: dict[str, str]) -> Iterator[Item | Refusal]:
    seen: set[str] = set()
    for capture in captures.read(stage.config):
        if capture.inference_id not in labels:
            continue
        name, label = f"capture-{capture.inference_id}", labels[capture.inference_id]
        if name in seen:
            yield Refusal(name, "duplicate", "was captured before under the same inference id")
        elif label not in stage.config.labels:
            yield Refusal(name, "unknown_label", f"its late label is none of: {', '.join(stage.config.labels)}")
        else:
            yield Item(name, capture.request, label, content_type=capture.content_type, source="capture")
        seen.add(name)
