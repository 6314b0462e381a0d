"""Files below a directory or an ``s3://`` prefix, in archives, and those that a DICOMDIR names; and generated phantoms."""

from __future__ import annotations

import fcntl
import logging
import lzma
import posixpath
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import cv_factory_ops
from cv_factory_ops import storage
from cv_factory_ops.config.sources import PhantomSource
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, Opened, Ref

if TYPE_CHECKING:
    from cv_factory_ops.domain import Domain
    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_MEMBER = 1 << 30
"""Bytes above which a file in an archive is refused before it is unpacked."""
INDEX = "DICOMDIR"


def phantoms(stage: Stage, source: PhantomSource) -> str:
    """URI of the generated studies: made once for the same settings, complete or not there at all."""
    config = stage.config
    settings: list[object] = [cv_factory_ops.__version__, config.domain, config.labels, source.model_dump(mode="json")]
    places = {"segmentation": "masks", "detection": "boxes"}.get(config.task)
    settings += [places] if places else []
    name = storage.text_digest(repr(settings))[:16]
    folder = (storage.path_of(config.root) or stage.workspace) / "phantoms"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / name).exists():
            log.info("ingest: generating phantoms of %d patients", source.patients)
            draft = folder / f".{name}"
            shutil.rmtree(draft, ignore_errors=True)
            stage.domain.generate(
                draft,
                patients=source.patients,
                image_size=source.image_size,
                seed=source.seed,
                labels=config.labels,
                masks=places == "masks",
                boxes=places == "boxes",
            )
            draft.rename(folder / name)
    return (folder / name).as_uri()


def open_files(uri: str, stage: Stage, hidden: Collection[str] = ()) -> Opened:
    """The files of a directory, prefix, archive or DICOMDIR; ``hidden`` are the URIs of those among them that are no images.

    Raises:
        DataError: it is not there, or holds no files.
    """
    names = _names(uri, stage.domain, hidden)
    if not names:
        raise DataError(f"{uri}: holds no files; expected are images")
    items = (item for name in names for item in _unpacked(uri, name, stage))
    return Opened(len(names), items)


def _names(uri: str, domain: Domain, hidden: Collection[str]) -> list[str]:
    """Files relative to ``uri``; the empty name is ``uri`` itself."""
    path = storage.path_of(uri)
    if path is not None and not path.exists():
        raise DataError(f"{uri}: is not there")
    if storage.exists(uri):
        if uri.lower().endswith(ARCHIVES):
            return [""]
        if (listed := domain.listed(storage.read_bytes(uri))) is not None:
            return [f"../{name}" for name in listed]
        raise DataError(f"{uri}: is a file; allowed: a directory, a {INDEX}, or an archive ({', '.join(ARCHIVES)})")
    return [name for name in storage.listing(uri) if storage.join(uri, name) not in hidden and not _is_no_image(name)]


def _is_no_image(name: str) -> bool:
    base = posixpath.basename(name)
    return base.startswith(".") or base == INDEX or name.startswith("__MACOSX/")


def _unpacked(uri: str, name: str, stage: Stage) -> Iterator[Item | Refusal]:
    if not (name or uri).lower().endswith(ARCHIVES):
        relative = name.removeprefix("../")
        folder = posixpath.dirname(uri) if relative != name else uri
        yield Item(relative, Ref(storage.join(folder, relative)))
        return
    prefix = f"{name}/" if name else ""
    try:
        for member, size, file in _members(stage.local(storage.join(uri, name) if name else uri)):
            if size > MAX_MEMBER:
                yield Refusal(prefix + member, "too_large", f"has {size} bytes; allowed in an archive are {MAX_MEMBER}")
            elif not _is_no_image(member):
                yield Item(prefix + member, file.read(MAX_MEMBER))
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        yield Refusal(name or posixpath.basename(uri), "truncated", f"is not a whole, plain archive ({type(error).__name__})")


def _members(path: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each file of an archive, one open at a time."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as file:
                        yield member.filename.lstrip("/"), member.file_size, file
        return
    with tarfile.open(path, "r|*") as tar:
        for entry in tar:
            if entry.isfile() and (content := tar.extractfile(entry)):
                yield posixpath.normpath(entry.name).lstrip("/"), entry.size, content
