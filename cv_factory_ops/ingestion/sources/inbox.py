"""What remote sources have given, kept under the project's storage so that nothing is fetched twice.

A fetch that broke goes on where it stopped: what is here is not asked for again. An object appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.errors import Rejected
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, Ref

if TYPE_CHECKING:
    from cv_factory_ops.domain import DeidentificationConfig, Domain


class Inbox:
    """A folder of objects, each with a small JSON document beside it that says what the source said of it."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._names = {name.removesuffix(".json") for name in storage.listing(uri) if name.endswith(".json")}
        self._for_now: list[Refusal] = []

    def __len__(self) -> int:
        return len(self._names) + len(self._for_now)

    def __contains__(self, name: str) -> bool:
        """Whether the object, or the refusal of it, is here."""
        return name in self._names

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
        storage.write_bytes(f"{self.uri}/{name}", content)
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
        """:meth:`put`, but a study of the domain is de-identified first.

        Raises:
            Rejected: it cannot be de-identified, or there is nothing in it (``empty``).
        """
        if not content:
            raise Rejected("empty", "has no bytes")
        review = ""
        if domain.recognises(content) or content_type == domain.content_type:
            clean = domain.deidentify(content, settings)
            content, content_type, review = clean.content, domain.content_type, ",".join(clean.review)
        self.put(name, content, label=label, patient=patient, content_type=content_type, review=review)

    def relabel(self, name: str, label: str) -> None:
        """What the source says today of an object that is here already."""
        said = json.loads(storage.read_bytes(f"{self.uri}/{name}.json"))
        if said.get("label", label) != label:
            self._describe(name, said | {"label": label})

    def refuse(self, name: str, code: str, reason: str, *, for_now: bool = False) -> None:
        """An object that cannot be used and ends in quarantine. It is not fetched again, unless it is refused ``for_now``."""
        refusal = Refusal(name, code, reason)
        if for_now:
            self._for_now.append(refusal)
        else:
            self._describe(name, {"refused": asdict(refusal)})

    def items(self) -> Iterator[Item | Refusal]:
        """All objects and refusals, by name; then those refused for now."""
        for name in sorted(self._names):
            said = json.loads(storage.read_bytes(f"{self.uri}/{name}.json"))
            yield Refusal(**said["refused"]) if "refused" in said else Item(name, Ref(f"{self.uri}/{name}"), **said)
        yield from self._for_now

    def _describe(self, name: str, said: dict[str, object]) -> None:
        storage.write_bytes(f"{self.uri}/{name}.json", json.dumps(said).encode())
        self._names.add(name)
