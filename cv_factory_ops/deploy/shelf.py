"""What every service of the local endpoint shares: errors as AWS clients parse them, and resources that survive kill -9."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.errors import ConfigError

REGION, ACCOUNT = "us-east-1", "000000000000"
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")
Item = dict[str, Any]
Place = Callable[[str, str], None]
"""Refuses the URI in a field of a request, see :func:`places`."""


class ServiceError(Exception):
    """An error in the form that AWS clients parse."""

    def __init__(self, message: str, code: str = "ValidationException", status: int = 400, details: Item | None = None) -> None:
        super().__init__(message)
        self.code, self.status, self.details = code, status, details or {}


class Shelf:
    """The resources of one kind: a JSON file each, written atomically."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._folder, self._kind = folder / kind, kind
        self._items: dict[str, Item] = {path.stem: json.loads(path.read_bytes()) for path in self._folder.glob("*.json")}

    def __iter__(self) -> Iterator[Item]:
        return iter(list(self._items.values()))

    def arn(self, name: str) -> str:
        return f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:{self._kind}/{name}"

    def get(self, name: str) -> Item:
        if name not in self._items:
            raise ServiceError(f'Could not find {self._title} "{self.arn(name)}".')
        return self._items[name]

    def add(self, name: str, item: Item) -> str:
        """Store a new resource; returns its ARN."""
        require_name(f"{self._kind}Name", name)
        if name in self._items:
            raise ServiceError(f'Cannot create already existing {self._title} "{self.arn(name)}".')
        self.save(name, {**item, "CreationTime": time.time()})
        return self.arn(name)

    def save(self, name: str, item: Item) -> None:
        storage.write_bytes((self._folder / f"{name}.json").resolve().as_uri(), json.dumps(item, indent=2).encode())
        self._items[name] = item

    def remove(self, name: str) -> None:
        self.get(name)
        (self._folder / f"{name}.json").unlink(missing_ok=True)
        del self._items[name]

    @property
    def _title(self) -> str:
        return {"endpoint-config": "endpoint configuration"}.get(self._kind, self._kind)


def required(given: Item, field: str) -> Any:
    """A field of a request.

    Raises:
        ServiceError: it is missing or empty.
    """
    if not given.get(field):
        raise ServiceError(f"1 validation error detected: Value null at '{field}' failed: Member must not be null")
    return given[field]


def require_name(field: str, name: str) -> None:
    """
    Raises:
        ServiceError: it is no name that SageMaker takes, and so none for a file.
    """
    if not NAME.fullmatch(name):
        raise ServiceError(f"Value {name[:80]!r} at '{field}' must satisfy regular expression {NAME.pattern}")


def places(folders: Sequence[Path]) -> Place:
    """What refuses a place that the server must not read or write for a caller, who may be anybody on this machine: a
    ``file://`` outside of the folders, and what is neither that nor ``s3://``."""

    def require(field: str, uri: str) -> None:
        try:
            path = storage.path_of(uri)
        except ConfigError:
            raise ServiceError(f"{field} must be s3://bucket/key, or file:// on this machine", "ValidationError") from None
        if path and not any(path.resolve().is_relative_to(folder) for folder in folders):
            allowed = ", ".join(map(str, folders))
            line = f"{field}: {uri} given; allowed on this machine: below {allowed}; `cvf endpoint --files` allows more"
            raise ServiceError(line, "ValidationError")

    return require


def without(item: Item, *fields: str) -> Item:
    return {name: value for name, value in item.items() if name not in fields}
