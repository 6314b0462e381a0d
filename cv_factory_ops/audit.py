"""The history of a project's aliases: which version was ``champion`` when, by whom, why, on which evidence.

``<project>/audit/00000001.json`` and so on hold an :class:`Entry` each, with its digest. An entry names the digest of the one
before it, so one that was changed, taken out or put in is found by reading the objects alone (a hash chain, as in Haber &
Stornetta 1991). What a chain cannot show, that its newest entries are missing or were all made anew, is shown by a digest that
was noted elsewhere: each evidence bundle and each version's tag ``audit`` hold one.

An entry is created, never written again: by a hard link on file systems, by a conditional put on S3. Its number is therefore
taken once. A writer that comes second reads what the first has written, thinks again, and takes the next number: creating the
entry is what decides between two promotions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from cv_factory_ops import storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import ApproveRecord, Frozen

Alias = Literal["champion", "challenger", "previous"]
ALIASES: tuple[Alias, ...] = get_args(Alias)
Aliases = dict[Alias, int]
"""The version that each alias points at; an alias that points nowhere is left out."""
BEGINNING = "0" * 64
"""What the first entry names as the digest of the one before it."""


class Change(Frozen):
    """A move of aliases, and what it rests on."""

    action: Literal["registration", "promotion", "rollback"]
    who: str
    """A DAG run by the name of its directory, or a person's login on a machine."""
    why: str
    run: str
    """URI of the run that made the version."""
    version: int
    bundle_digest: str
    gate_digest: str
    """SHA-256 of the gate's record, see :func:`cv_factory_ops.stage.record_digest`."""
    evidence: str = ""
    """URI of the evidence bundle's archive; empty for a registration, which comes before it."""
    evidence_digest: str = ""
    """SHA-256 of that archive."""
    override: str = ""
    """Why a person let it pass though the gate had refused; empty where it had not."""
    approval: ApproveRecord | None = None
    """What a person answered before the rollout; None where nobody did."""
    approval_required: bool = False
    """Whether ``approval.enabled`` asked for one."""
    aliases: Aliases
    """All aliases after the move."""


class Entry(Frozen):
    """A change in its place in the history."""

    number: int
    """From 1."""
    time: datetime
    """UTC."""
    before: Aliases
    """All aliases before the move."""
    change: Change
    previous: str
    """Digest of the entry before this one."""
    digest: str = Field(default="", exclude=True)
    """SHA-256 of its JSON as it is stored, keys sorted, no white space. Beside the entry there, not in it."""


def head(config: ProjectConfig) -> Entry | None:
    """The newest entry; None before the first registration.

    Raises:
        DataError: it cannot be read, or was changed, or an earlier one is missing.
    """
    names = list(storage.listing(_folder(config)))
    if names and names[-1] != _name(len(names)):
        raise DataError(f"{_folder(config)}: {len(names)} entries, the last is {names[-1]}; `cvf audit verify` tells more")
    return _read(config, len(names)) if names else None


def entries(config: ProjectConfig) -> Iterator[Entry]:
    """The history, oldest first, each entry checked against the one before it.

    Raises:
        DataError: naming the first entry that is missing, was changed, or does not follow the one before it.
    """
    expected = BEGINNING
    for number, name in enumerate(storage.listing(_folder(config)), start=1):
        if name != _name(number):
            raise DataError(f"{_folder(config)}: entry {number} is broken: {_name(number)} is not there, but {name} is")
        entry = _read(config, number)
        if entry.previous != expected:
            raise DataError(f"{_uri(config, number)}: entry {number} is broken: it does not follow entry {number - 1}")
        yield entry
        expected = entry.digest


def champion(config: ProjectConfig) -> Change | None:
    """The newest change of the version that is champion, which names its bundle; None where the history knows no champion.

    Raises:
        DataError: as :func:`entries`.
    """
    changes = [entry.change for entry in entries(config)]
    version = changes[-1].aliases.get("champion") if changes else None
    return next((change for change in reversed(changes) if change.version == version), None)


def verify(config: ProjectConfig, noted: str = "") -> list[Entry]:
    """The whole history, once it has been found unbroken; ``noted`` is the digest of an entry that it must hold.

    Raises:
        DataError: naming the first broken entry, or that the noted one is gone.
    """
    found = list(entries(config))
    if noted and all(entry.digest != noted for entry in found):
        why = "the history was cut off or made anew, or `storage` is another"
        raise DataError(f"{_folder(config)}: no entry has digest {noted}; {why}")
    return found


def append(config: ProjectConfig, aliases: Aliases, propose: Callable[[Aliases], Change | None]) -> Entry | None:
    """Append the change that ``propose`` makes of the aliases before it; it gives None where nothing is to be done, and raises
    where nothing may be. It is asked again when another writer was first.

    ``aliases``: what they are where the history is empty. Returns the newest entry.
    """
    while True:
        last = head(config)
        before = last.change.aliases if last else aliases
        change = propose(before)
        if change is None:
            return last
        number, previous = (last.number + 1, last.digest) if last else (1, BEGINNING)
        entry = Entry(number=number, time=datetime.now(UTC), before=before, change=change, previous=previous)
        content = entry.model_dump(mode="json")
        digest = _digest(content)
        if storage.create_bytes(_uri(config, number), json.dumps({"entry": content, "digest": digest}, indent=1).encode()):
            return entry.model_copy(update={"digest": digest})


def table(found: list[Entry]) -> str:
    """The history for people, an entry a line."""
    rows = [("no", "time (UTC)", "action", "version", "moves", "who", "why", "gate", "digest")]
    rows += [
        (
            str(entry.number),
            f"{entry.time:%Y-%m-%d %H:%M:%S}",
            entry.change.action,
            str(entry.change.version),
            _moves(entry),
            entry.change.who,
            _reason(entry.change),
            entry.change.gate_digest[:12],
            entry.digest[:12],
        )
        for entry in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _moves(entry: Entry) -> str:
    before, after = entry.before, entry.change.aliases
    names = sorted(before.keys() | after.keys())
    return ", ".join(f"{n} {before.get(n, '-')}>{after.get(n, '-')}" for n in names if before.get(n) != after.get(n))


def _reason(change: Change) -> str:
    parts = [change.why, f"OVERRIDE: {change.override}" if change.override else ""]
    parts.append(f"approved by {change.approval.who}" if change.approval else "")
    return " ".join("; ".join(part for part in parts if part).split())  # a line break in a reason must not look like an entry


def stored(config: ProjectConfig, number: int) -> dict[str, Any]:
    """What the object of an entry holds: ``entry``, whatever version wrote it, and its ``digest``.

    Raises:
        DataError: it cannot be read, or was changed.
    """
    uri = _uri(config, number)
    try:
        content: dict[str, Any] = json.loads(storage.read_bytes(uri))
        sound = content["digest"] == _digest(content["entry"]) and content["entry"]["number"] == number
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{uri}: entry {number} is broken: it cannot be read") from None
    if not sound:
        raise DataError(f"{uri}: entry {number} is broken: it was changed after it was written")
    return content


def _read(config: ProjectConfig, number: int) -> Entry:
    content = stored(config, number)
    try:
        entry = Entry.model_validate(content["entry"], extra="ignore")  # fields of a later version, or gone by now
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise DataError(f"{_uri(config, number)}: entry {number} is broken: it cannot be read, wrong is {place}") from None
    return entry.model_copy(update={"digest": content["digest"]})


def _digest(entry: dict[str, Any]) -> str:
    """Of the JSON itself, not of what today's code makes of it: a field more or less must not break older histories."""
    return storage.text_digest(json.dumps(entry, sort_keys=True, separators=(",", ":")))


def _folder(config: ProjectConfig) -> str:
    return f"{config.root}/audit"


def _name(number: int) -> str:
    return f"{number:08d}.json"


def _uri(config: ProjectConfig, number: int) -> str:
    return f"{_folder(config)}/{_name(number)}"
