"""The index of a bundle: a store with what is said of it, and who is most like somebody in it.

index.json   for which bundle it was made, how, and the kinds of its metadata
store/       the files of a store that keeps files
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cv_factory_ops.answers import Neighbour
from cv_factory_ops.config import RetrievalConfig
from cv_factory_ops.domain import Kind, Metadata
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.features.retrievers import Query, Retriever
from cv_factory_ops.features.stores import Between, Filter, Match, Value, VectorStore, open_store
from cv_factory_ops.records import Frozen

MANIFEST, STORE = "index.json", "store"
MOST = 100
"""Similar studies that may be asked for at a time."""
OWN: Mapping[str, Kind] = {
    "label": "category",
    "patient": "category",
    "study": "category",
    "split": "category",
    "position": "number",
}
"""Names beside the domain's metadata; ``position`` is that of the image in its split's shards."""
NOT_FILTERED = {"split", "position"}


class IndexManifest(Frozen):
    """``index.json``."""

    format: Literal[1] = 1
    bundle_digest: str
    retrieval: RetrievalConfig
    name: str
    """Of the collection, where the store is a server."""
    dimensions: int
    count: int
    metadata: dict[str, Kind]
    """What a search can be narrowed by."""


class Index:
    """An open index. Not changed by use."""

    def __init__(self, manifest: IndexManifest, store: VectorStore) -> None:
        self.manifest, self.store = manifest, store
        self._retriever = Retriever(store, manifest.retrieval)

    @classmethod
    def open(cls, folder: Path, bundle_digest: str) -> Index:
        """The index of a bundle.

        Raises:
            DataError: there is none, it was made for another bundle, or is damaged.
            ConfigError, Unavailable: its store cannot be opened.
        """
        manifest = require_made_for(folder, bundle_digest)
        store = open_store(manifest.retrieval.store, folder / STORE, manifest.name, manifest.dimensions)
        if store.count() != manifest.count:
            found = store.count()
            store.close()
            raise DataError(f"{folder}: holds {found} vectors, not {manifest.count} as it was written; run `cvf index --force`")
        return cls(manifest, store)

    def similar(
        self, vector: NDArray[np.float32], k: int = 0, where: Filter | None = None, metadata: Metadata | None = None
    ) -> list[Neighbour]:
        """Those most like a vector (dimensions,), nearest first, one of each patient; ``k`` or, where it is 0,
        ``retrieval.k``. A hybrid search looks for the words of the ``metadata`` as well."""
        wanted, text = k or self.manifest.retrieval.k, " ".join(v for v in (metadata or {}).values() if isinstance(v, str))
        asked, found = 2 * wanted, list[Match]()
        while True:
            found = self._retriever.retrieve(Query(vector, text, where), asked)
            nearest = _one_a_patient(found)
            if len(nearest) >= wanted or len(found) < asked:
                return [_neighbour(match) for match in nearest[:wanted]]
            asked *= 2

    def where(self, given: Sequence[tuple[str, str]]) -> Filter:
        """A filter from names and values as people write them: ``label opacity``; of a number ``40..65``, ``40..``, ``..65``
        or ``40``. A name that is given several times admits any of its words.

        Raises:
            Rejected: code ``filter``: an unknown name, or no number where there should be one.
        """
        allowed = {name: kind for name, kind in self.manifest.metadata.items() if name not in NOT_FILTERED}
        words, found = dict[str, list[str]](), dict[str, Value | Sequence[str] | Between]()
        for name, value in given:
            if name not in allowed:
                raise Rejected("filter", f"a filter by {name[:40]!r} given; allowed: {', '.join(sorted(allowed))}")
            if allowed[name] == "number":
                found[name] = _between(name, value)
            else:
                words.setdefault(name, []).append(value)
        return {**found, **words}

    def close(self) -> None:
        self._retriever.close()
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_made_for(folder: Path, bundle_digest: str) -> IndexManifest:
    """What is said of the index of this bundle.

    Raises:
        DataError: there is none, or it was made for another bundle.
    """
    manifest = read_manifest(folder)
    if manifest.bundle_digest != bundle_digest:
        made = manifest.bundle_digest[:12]
        raise DataError(f"{folder}: was made for bundle {made}, not for {bundle_digest[:12]}; run `cvf index` for that one")
    return manifest


def read_manifest(folder: Path) -> IndexManifest:
    """What is said of an index.

    Raises:
        DataError: there is none, or it is of another version.
    """
    try:
        return IndexManifest.model_validate_json((folder / MANIFEST).read_bytes())
    except OSError:
        raise DataError(f"{folder}: is no index; {MANIFEST} is missing") from None
    except ValidationError:
        raise DataError(f"{folder / MANIFEST}: was written by another version; run `cvf index --force`") from None


def _between(name: str, value: str) -> Between:
    low, separator, high = value.partition("..")
    try:
        bounds = [float(bound) if bound else None for bound in ((low, high) if separator else (low, low))]
    except ValueError:
        raise Rejected("filter", f"{name}: {value[:40]!r} given; allowed: a number, or two as in 40..65") from None
    return Between(bounds[0], bounds[1])


def _one_a_patient(found: Sequence[Match]) -> list[Match]:
    """The nearest image of each patient; images whose patient is not known each count."""
    seen, kept = set[str](), []
    for match in found:
        patient = str(match.item.metadata.get("patient", ""))
        if patient and patient in seen:
            continue
        seen.add(patient)
        kept.append(match)
    return kept


def _neighbour(match: Match) -> Neighbour:
    more = {name: value for name, value in match.item.metadata.items() if name not in OWN}
    own = {name: str(match.item.metadata.get(name, "")) for name in ("label", "patient", "study")}
    return Neighbour(id=match.item.id, distance=round(match.distance, 6), metadata=more, **own)
