"""Files under ``file://`` and ``s3://`` URIs: atomic writes, whole trees, digests.

A written object appears whole or not at all: on a file system by rename after fsync, on S3 because an upload (multipart
from 8 MiB) only becomes visible when it is complete.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import urllib.parse
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from io import BufferedReader
from pathlib import Path
from typing import Any

from cv_factory_ops.errors import ConfigError, DataError, Unavailable

_patience: ContextVar[float | None] = ContextVar("patience", default=None)


def path_of(uri: str) -> Path | None:
    """The local path of a ``file://`` URI, None for ``s3://``.

    Raises:
        ConfigError: any other scheme.
    """
    parts = urllib.parse.urlsplit(uri)
    match parts.scheme:
        case "file":
            return Path(urllib.parse.unquote(parts.path))
        case "s3":
            return None
        case _:
            raise ConfigError(f"{uri}: scheme {parts.scheme or 'none'!r} given; allowed: file://, s3://")


def join(uri: str, name: str) -> str:
    """The URI of an object by its name below another, whatever characters a file's name has."""
    return f"{uri}/{name if uri.startswith('s3://') else urllib.parse.quote(name)}"


def read_bytes(uri: str) -> bytes:
    """The content of one object.

    Raises:
        DataError: there is no such object or bucket.
        Unavailable: the store does not answer.
    """
    with _explained(uri):
        if path := path_of(uri):
            return path.read_bytes()
        bucket, key = _bucket_key(uri)
        content: bytes = _s3().get_object(Bucket=bucket, Key=key)["Body"].read()
        return content


def read_part(uri: str, start: int, count: int) -> bytes:
    """So many bytes of one object, from a byte on that it has.

    Raises:
        DataError, Unavailable: as :func:`read_bytes`.
    """
    with _explained(uri), _opened(uri, start) as file:
        return file.read(count)


def write_bytes(uri: str, content: bytes) -> None:
    """Write one object, atomically."""
    with _explained(uri):
        if path := path_of(uri):
            _write_file(path, content)
        else:
            bucket, key = _bucket_key(uri)
            _s3().put_object(Bucket=bucket, Key=key, Body=content)


def create_bytes(uri: str, content: bytes) -> bool:
    """Write one object where there is none yet, atomically; False, and nothing is changed, where there is another one.

    Of several writers exactly one is told True: a hard link is made once (unlike ``O_EXCL``, it shows no half-written file
    after a crash), and S3 compares by ``If-None-Match``.
    """
    with _explained(uri):
        if path := path_of(uri):
            return _create_file(path, content)
        bucket, key = _bucket_key(uri)
        from botocore.exceptions import ClientError

        try:
            _s3().put_object(Bucket=bucket, Key=key, Body=content, IfNoneMatch="*")
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code == "ConditionalRequestConflict":  # another writer is at it at this very moment
                return create_bytes(uri, content)
            if code != "PreconditionFailed":
                raise
            return read_bytes(uri) == content  # our own, where the answer to a first attempt was lost
        return True


def replace_bytes(uri: str, expected: bytes, content: bytes) -> bool:
    """Write one object where it still holds what is expected, atomically; False, and nothing is changed, where it does not.

    Of several writers that expect the same exactly one is told True: on a file system they lock a file beside it, which the
    kernel frees however they end; S3 compares by ``If-Match``.
    """
    with _explained(uri):
        if path := path_of(uri):
            with path.with_name(f".{path.name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.read_bytes() != expected:
                    return False
                _write_file(path, content)
                return True
        return _replace_on_s3(*_bucket_key(uri), expected, content)


def exists(uri: str) -> bool:
    """Whether there is an object at exactly this URI."""
    with _explained(uri):
        if path := path_of(uri):
            return path.is_file()
        bucket, key = _bucket_key(uri)
        from botocore.exceptions import ClientError

        try:
            _s3().head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if error.response["Error"]["Code"] in {"404", "NoSuchKey"}:
                return False
            raise
        return True


def read_lines(uri: str, start: int = 0) -> Iterator[tuple[int, bytes]]:
    """Lines of one object from a byte on that it has, each with its line break, where it has one, and with the byte that it
    starts at; one line is held at a time.

    Raises:
        DataError, Unavailable: as :func:`read_bytes`.
    """
    with _explained(uri), _opened(uri, start) as file:
        for line in file:
            yield start, line
            start += len(line)


def listing(uri: str, after: str = "") -> Iterator[str]:
    """Names of all objects below a directory or prefix, relative to it, sorted, those greater than ``after``.

    Drafts that a killed writer has left on a file system (see :func:`write_bytes`) are not listed.
    """
    return (name for name, _ in sizes(uri, after))


def sizes(uri: str, after: str = "") -> Iterator[tuple[str, int]]:
    """As :func:`listing`, each name with the object's bytes."""
    with _explained(uri):
        if path := path_of(uri):
            files = (item for item in path.rglob("*") if item.is_file() and not item.name.startswith("."))
            found = sorted((name, item) for item in files if (name := str(item.relative_to(path))) > after)
            yield from ((name, item.stat().st_size) for name, item in found)
        else:
            bucket, key = _bucket_key(uri)
            yield from _s3_sizes(bucket, f"{key}/", after)


def folders(uri: str) -> list[str]:
    """Names of the folders directly below a directory or prefix, sorted."""
    with _explained(uri):
        if path := path_of(uri):
            return sorted(item.name for item in path.iterdir() if item.is_dir()) if path.is_dir() else []
        bucket, key = _bucket_key(uri)
        pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{key}/", Delimiter="/")
        return [item["Prefix"][len(key) + 1 : -1] for page in pages for item in page.get("CommonPrefixes", [])]


def versions(uri: str) -> Iterator[tuple[str, str]]:
    """Names and marks of change (size and time, or ETag) of an object, or of all objects below a directory or prefix."""
    with _explained(uri):
        if path := path_of(uri):
            for item in [path] if path.is_file() else sorted(path.rglob("*")):
                if item.is_file():
                    yield str(item.relative_to(path)), f"{item.stat().st_size} {item.stat().st_mtime_ns}"
            return
        bucket, key = _bucket_key(uri)
        for page in _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key):
            for item in page.get("Contents", []):
                if item["Key"] == key or item["Key"].startswith(f"{key}/"):
                    yield item["Key"][len(key) + 1 :], item["ETag"]


def upload_tree(folder: Path, uri: str, last: str | None = None) -> None:
    """Copy a folder's files below a URI; ``last`` names the file that is written after all others."""
    names = sorted(str(item.relative_to(folder)) for item in folder.rglob("*") if item.is_file())
    for name in sorted(names, key=lambda item: item == last):
        upload_file(folder / name, join(uri, name))


def upload_file(path: Path, uri: str) -> None:
    """Copy one local file to a URI, atomically; large files go to S3 in parts."""
    with _explained(uri):
        if target := path_of(uri):
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = _draft(target)
            try:
                with path.open("rb") as source, draft.open("wb") as copy:
                    shutil.copyfileobj(source, copy, 1024 * 1024)
                    copy.flush()
                    os.fsync(copy.fileno())
                os.replace(draft, target)
            except BaseException:
                draft.unlink(missing_ok=True)
                raise
        else:
            bucket, key = _bucket_key(uri)
            _s3().upload_file(str(path), bucket, key)


def local(uri: str, below: Path) -> Path:
    """A local path with the content of a file or tree: the path itself for ``file://``, a copy under ``below`` for S3.

    Raises:
        DataError: there is nothing at that URI.
    """
    with _explained(uri):
        if path := path_of(uri):
            if not path.exists():
                raise DataError(f"{uri}: is not there")
            return path
        # Named by what it holds: what is published anew under the same URI is fetched anew.
        target = below / text_digest(f"{uri} {list(versions(uri))}")[:16] / uri.rsplit("/", 1)[1]
        if not target.exists():
            _download(uri, target)
        return target


def delete_tree(uri: str) -> None:
    """Remove a tree or an object; nothing there is fine."""
    with _explained(uri):
        if path := path_of(uri):
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        else:
            bucket, key = _bucket_key(uri)
            for name in ["", *(f"/{below}" for below in _s3_names(bucket, f"{key}/"))]:
                _s3().delete_object(Bucket=bucket, Key=key + name)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_digest(text: str) -> str:
    """SHA-256 of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def tree_digest(folder: Path, without: str = "") -> str:
    """SHA-256 over the sorted relative names and SHA-256 digests of a folder's files, but those in its folder ``without``."""
    files = {item.relative_to(folder): item for item in sorted(folder.rglob("*")) if item.is_file()}
    return text_digest(
        "".join(f"{name.as_posix()} {sha256(item)}\n" for name, item in files.items() if name.parts[0] != without)
    )


def _draft(target: Path) -> Path:
    """A name beside the target that no other writer has: in two pods, two processes may have the same number."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}")


def _write_file(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _create_file(path: Path, content: bytes) -> bool:
    draft = _draft(path)
    _write_file(draft, content)
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the name too must outlive a loss of power
    finally:
        os.close(folder)
    return True


def _replace_on_s3(bucket: str, key: str, expected: bytes, content: bytes) -> bool:
    from botocore.exceptions import ClientError

    found = _s3().get_object(Bucket=bucket, Key=key)
    present: bytes = found["Body"].read()
    if present != expected:
        return present == content  # our own, where the answer to a first attempt was lost
    try:
        _s3().put_object(Bucket=bucket, Key=key, Body=content, IfMatch=found["ETag"])
    except ClientError as error:
        if error.response["Error"]["Code"] not in {"PreconditionFailed", "ConditionalRequestConflict"}:
            raise
        return bool(_s3().get_object(Bucket=bucket, Key=key)["Body"].read() == content)
    return True


def _download(uri: str, target: Path) -> None:
    bucket, key = _bucket_key(uri)
    draft = _draft(target)
    if exists(uri):
        draft.parent.mkdir(parents=True, exist_ok=True)
        _s3().download_file(bucket, key, str(draft))
    else:
        names = list(_s3_names(bucket, key + "/"))
        if not names:
            raise DataError(f"{uri}: is not there")
        for name in names:
            file = draft / name
            file.parent.mkdir(parents=True, exist_ok=True)
            _s3().download_file(bucket, f"{key}/{name}", str(file))
    try:
        os.replace(draft, target)
    except OSError:  # another process of this machine was first
        delete_tree(draft.as_uri())


def _bucket_key(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")  # not by urlsplit: a key may hold ? and #
    return bucket, key.lstrip("/")


@contextmanager
def _opened(uri: str, start: int) -> Iterator[BufferedReader]:
    if path := path_of(uri):
        with path.open("rb") as file:
            file.seek(start)
            yield file
        return
    bucket, key = _bucket_key(uri)
    body = _s3().get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-")["Body"]
    with BufferedReader(body, 1 << 20) as file:
        yield file


def _s3_names(bucket: str, prefix: str) -> Iterator[str]:
    return (name for name, _ in _s3_sizes(bucket, prefix))


def _s3_sizes(bucket: str, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
    pages = _s3().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix, StartAfter=prefix + after)
    for page in pages:
        for item in page.get("Contents", []):
            yield item["Key"][len(prefix) :], item["Size"]


@contextmanager
def impatient(seconds: float) -> Iterator[None]:
    """Have S3 asked twice at most, with so many seconds for each answer; else one that is silent is waited for five minutes."""
    before = _patience.set(seconds)
    _s3.cache_clear()
    try:
        yield
    finally:
        _patience.reset(before)
        _s3.cache_clear()


@cache
def _s3() -> Any:
    import boto3
    from botocore.config import Config

    if (seconds := _patience.get()) is None:
        return boto3.client("s3")
    patience = Config(connect_timeout=seconds, read_timeout=seconds, retries={"total_max_attempts": 2})
    return boto3.client("s3", config=patience)


@contextmanager
def _explained(uri: str) -> Iterator[None]:
    """Turn what file systems and S3 raise into one line of ours."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DataError(f"{uri}: is not there") from None
    except OSError as error:
        raise explained_os_error(error, uri) from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"botocore", "boto3", "s3transfer"}:
            raise
        raise _explained_aws_error(error, uri) from None


def explained_os_error(error: OSError, place: str) -> DataError | Unavailable:
    """Disk full and the like may pass (75); a missing permission does not (3)."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return Unavailable(f"{place}: no space left on the disk; free some and try again")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return DataError(f"{place}: {os.strerror(error.errno).lower()}")
    return Unavailable(f"{place}: {error.strerror or error}")


def _explained_aws_error(error: Exception, uri: str) -> DataError | Unavailable | ConfigError:
    response: dict[str, Any] = getattr(error, "response", {})
    code = str(response.get("Error", {}).get("Code", ""))
    match code:
        case "NoSuchBucket":
            return DataError(f"{uri}: the bucket does not exist")
        case "404" | "NoSuchKey":
            return DataError(f"{uri}: is not there")
        case "403" | "AccessDenied" | "InvalidAccessKeyId" | "SignatureDoesNotMatch":
            return DataError(f"{uri}: access is denied; check the credentials and the bucket policy")
    if type(error).__name__ in {"NoCredentialsError", "NoRegionError", "PartialCredentialsError"}:
        return ConfigError(f"{uri}: {error}; set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION, or a profile")
    return Unavailable(f"{uri}: S3 answered {code or type(error).__name__}")
