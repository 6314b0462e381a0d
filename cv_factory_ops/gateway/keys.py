"""API keys: made once, kept as salted digests, known again in constant time."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from typing import NamedTuple

from cv_factory_ops.config import home
from cv_factory_ops.config.serving import Access, ApiKeys
from cv_factory_ops.errors import ConfigError

log = logging.getLogger("cvf")

NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
KEY = re.compile(r"cvf_([a-z][a-z0-9-]{0,39})_[A-Za-z0-9_-]{43}")


class Digest(NamedTuple):
    """A line of the file of keys."""

    salt: bytes
    digest: bytes


def make_key(access: Access, name: str) -> str:
    """Make a key for a caller of that name, and let it in by a new line in the file; returns the key, which is kept nowhere.

    Where the lines are in an environment variable, the line to add there comes after the key.

    Raises:
        ConfigError: keys are not what lets callers in; no such name is allowed; or there is a key of that name.
    """
    if not isinstance(access, ApiKeys):
        raise ConfigError(f"gateway.access.kind: {access.kind} given; allowed with keys: api_keys")
    if not NAME.fullmatch(name):
        raise ConfigError(f"{name!r} given; allowed: a name of up to 40 small letters, digits and hyphens")
    key, salt = f"cvf_{name}_{secrets.token_urlsafe(32)}", secrets.token_bytes(16)
    line = json.dumps({"name": name, "salt": salt.hex(), "digest": _digest(key, salt).hex()})
    if access.env:
        return f"{key}\n{line}"
    path = home() / access.file
    text = path.read_text(encoding="ascii") if path.exists() else ""
    if name in _parsed(text, str(path)):
        raise ConfigError(f"{path}: has a key of the name {name}; take its line out first")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="ascii") as file:
        file.write(line + "\n" if text.endswith("\n") or not text else f"\n{line}\n")  # editors may leave a last line open
    return key


def _digest(key: str, salt: bytes) -> bytes:
    """SHA-256 once: nobody guesses 256 random bits, so a digest that is dear to compute would protect only guessable keys."""
    return hashlib.sha256(salt + key.encode()).digest()


class KeyRing:
    """The keys that are let in; the file is read again when it changes."""

    def __init__(self, access: ApiKeys) -> None:
        """
        Raises:
            ConfigError: there are no keys, or they cannot be read.
        """
        self._access, self._path = access, home() / access.file
        self._seen: tuple[int, ...] = ()
        self._digests: dict[str, Digest] = {}
        self._read()
        if not self._digests:
            raise ConfigError(f"{access.env or self._path}: holds no keys; `cvf gateway-key` makes them")

    async def caller(self, key: str) -> str | None:
        """The name of the key's owner; None where it is not let in."""
        try:
            self._read()
        except ConfigError as error:  # who cannot be asked lets nobody in
            if self._digests:
                log.error("gateway: %s", error)
            self._digests, self._seen = {}, ()
        found = KEY.fullmatch(key)
        if not found or (kept := self._digests.get(found[1])) is None:
            return None
        return found[1] if hmac.compare_digest(_digest(key, kept.salt), kept.digest) else None

    def _read(self) -> None:
        if self._access.env:
            if not self._digests:
                self._digests = _parsed(os.environ.get(self._access.env, ""), self._access.env)
            return
        try:
            status = self._path.stat()
            seen = (status.st_mtime_ns, status.st_size, status.st_ino)
            if seen != self._seen:
                self._digests = _parsed(self._path.read_text(encoding="ascii"), str(self._path))
                self._seen = seen
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{self._path}: cannot be read; `cvf gateway-key` makes keys") from None


def _parsed(lines: str, place: str) -> dict[str, Digest]:
    try:
        items = [json.loads(line) for line in lines.splitlines() if line.strip()]
        found = {str(item["name"]): Digest(bytes.fromhex(item["salt"]), bytes.fromhex(item["digest"])) for item in items}
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{place}: is not as `cvf gateway-key` writes it") from None
    return found
