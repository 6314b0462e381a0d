"""What remote sources have given, kept under the project's storage so that nothing is fetched twice.

A fetch that broke goes on where it stopped: what is here is not asked for again. An object appears whole or not at all.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.decode import without_metadata
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, Ref

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain

PASSING = {"identified", "too_large"}
"""Codes of refusals that another limit, or a library that is installed later, may change."""


class Inbox:
    """A folder of objects, each with a small JSON document beside it that says what the source said of it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._names = {name.removesuffix(".json") for name in storage.listing(uri) if name.endswith(".json")}
        self._for_now: dict[str, Refusal] = {}

    def __len__(self) -> int:
        return len(self._names) + len(self._for_now)

    def __contains__(self, name: str) -> bool:
        """Whether the object, or the refusal of it, is here."""
        return name in self._names or name in self._for_now

    def put(
        self,
        name: str,
        content: bytes,
        *,
        label: str = "",
        patient: str = "",
        content_type: str | None = None,
        review: str = "",
    ) -> None:
        """Store an object of that name (a relative path); nothing in it may identify a person, ``patient`` is a pseudonym."""
        storage.write_bytes(storage.join(self.uri, name), content)
        self._describe(name, {"label": label, "patient": patient, "content_type": content_type, "review": review})

    def receive(
        self,
        name: str,
        content: bytes,
        domain: Domain,
        settings: DeidentificationConfig,
        *,
        label: str = "",
        patient: str = "",
        content_type: str | None = None,
    ) -> None:
        """:meth:`put`, but a study of the domain is de-identified first, and of a picture or array only the pixels are kept.

        Raises:
            Rejected: it cannot be de-identified, there is nothing in it (``empty``), or it is nothing of these: a code of
                :func:`without_metadata`.
        """
        if not content:
            raise Rejected("empty", "has no bytes")
        review = ""
        if domain.recognises(content) or content_type == domain.content_type:
            clean = domain.deidentify(content, settings)
            content, content_type, review = clean.content, domain.content_type, ",".join(clean.review)
        else:
            content, content_type = without_metadata(content)
        self.put(name, content, label=label, patient=patient, content_type=content_type, review=review)

    def retell(self, name: str, label: str, patient: str) -> None:
        """What the source says today of an object that is here already; a patient who was known stays known."""
        said = json.loads(storage.read_bytes(storage.join(self.uri, f"{name}.json")))
        today = said | {"label": label, "patient": patient or said.get("patient", "")}
        if "refused" not in said and today != said:
            self._describe(name, today)

    def folders(self, name: str) -> set[str]:
        """The folders of objects that lie straight below a folder."""
        found = {posixpath.dirname(below) for below in self._names}
        return {folder for folder in found if posixpath.dirname(folder) == name}

    def forget(self, folder: str) -> None:
        """Remove everything below a folder."""
        storage.delete_tree(storage.join(self.uri, folder))
        self._names = {name for name in self._names if not name.startswith(f"{folder}/")}

    def refuse(self, name: str, code: str, reason: str, *, for_now: bool = False) -> None:
        """An object that cannot be used and ends in quarantine. It is not fetched again, unless it is refused ``for_now``."""
        refusal = Refusal(name, code, reason)
        if for_now:
            self._for_now[name] = refusal
        else:
            self._describe(name, {"refused": asdict(refusal)})

    def items(self) -> Iterator[Item | Refusal]:
        """All objects and refusals, by name; then those refused for now."""
        for name in sorted(self._names):
            said = json.loads(storage.read_bytes(storage.join(self.uri, f"{name}.json")))
            yield Refusal(**said["refused"]) if "refused" in said else Item(name, Ref(storage.join(self.uri, name)), **said)
        yield from self._for_now.values()

    def _describe(self, name: str, said: dict[str, object]) -> None:
        storage.write_bytes(storage.join(self.uri, f"{name}.json"), json.dumps(said).encode())
        self._names.add(name)
