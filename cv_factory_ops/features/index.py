"""The index of a bundle: a store with what is said of it, and who is most like somebody in it.

index.json   for which bundle it was made, how, and the kinds of its metadata
store/       the files of a store that keeps files
encoder/     the model of a cross-encoder, where there is one
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from cv_factory_ops.answers import Neighbour
from cv_factory_ops.config.retrieval import CrossEncoderReranker, RetrievalConfig
from cv_factory_ops.domain import Kind, Metadata
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.features.retrievers import Query, Retriever
from cv_factory_ops.features.stores import Between, Filter, Match, Value, VectorStore, open_store
from cv_factory_ops.records import Frozen

MANIFEST, STORE, ENCODER = "index.json", "store", "encoder"
MOST = 100
"""Similar studies that may be asked for at a time."""
MOST_LOOKED_AT = 5000
"""Images that are looked at for them: so much work a request may cause."""
TEXT = "text"
"""Name of words to look for, beside the names of filters."""
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
    """Of this build, and of its collection where the store is a server: what is served is never changed in place."""
    dimensions: int
    count: int
    metadata: dict[str, Kind]
    """What a search can be narrowed by."""


def filters(given: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of filters as they are typed, ``label:normal``; :meth:`Index.where` knows which there are.

    Raises:
        Rejected: code ``filter``: one has no colon.
    """
    pairs = [each.partition(":") for each in given]
    if not all(separator for _, separator, _ in pairs):
        raise Rejected("filter", "a filter is a name and a value, as in label:normal")
    return [(name, value) for name, _, value in pairs]


class Index:
    """An open index. Not changed by use."""

    def __init__(self, manifest: IndexManifest, store: VectorStore, retrieval: RetrievalConfig) -> None:
        self.manifest, self.store = manifest, store
        self._retriever = Retriever(store, retrieval)

    @classmethod
    def open(cls, folder: Path, bundle_digest: str) -> Index:
        """The index of a bundle.

        Raises:
            DataError: there is none, it was made for another bundle, or is damaged.
            ConfigError, Unavailable: its store cannot be opened.
        """
        manifest = require_made_for(folder, bundle_digest)
        store = open_store(manifest.retrieval.store, folder / STORE, manifest.name, manifest.dimensions)
        try:
            if (found := store.count()) != manifest.count:
                written = f"not {manifest.count} as it was written"
                raise DataError(f"{folder}: holds {found} vectors, {written}; run `cvf index --force`")
            return cls(manifest, store, _with_encoder(manifest.retrieval, folder))
        except BaseException:
            store.close()
            raise

    def similar(
        self,
        vector: NDArray[np.float32],
        k: int | None = None,
        where: Filter | None = None,
        metadata: Metadata | None = None,
        patient: str = "",
        text: str = "",
    ) -> list[Neighbour]:
        """Those most like a vector (dimensions,), most similar first, one of each patient and none of ``patient``; ``k`` or,
        without a number, ``retrieval.k``. A hybrid search looks for the words of the ``metadata`` and of the ``text`` as well.

        Where the ``MOST_LOOKED_AT`` most similar images are of so few patients, there are less.

        Raises:
            Rejected: code ``text``: a text is given, and the index compares vectors alone.
        """
        if text and not self._retriever.reads_words:
            raise Rejected("text", "this index is searched by vectors alone: a text needs `retriever: {kind: hybrid}`")
        wanted = k or self.manifest.retrieval.k
        words = " ".join([*(value for value in (metadata or {}).values() if isinstance(value, str)), text])
        asked = 2 * wanted
        while True:
            found = self._retriever.retrieve(Query(vector, words.strip(), where), asked)
            kept = _one_a_patient(found, patient)
            if len(kept) >= wanted or len(found) < asked or asked >= MOST_LOOKED_AT:
                return [_neighbour(match) for match in kept[:wanted]]
            asked = min(2 * asked, MOST_LOOKED_AT)

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
            if not value or not value.isprintable():  # which what is left of bytes that are no text is not
                raise Rejected("filter", f"{name}: {value[:40]!r} given; allowed: words that can be printed")
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
        if not all(bound is None or math.isfinite(bound) for bound in bounds):
            raise ValueError
    except ValueError:
        raise Rejected("filter", f"{name}: {value[:40]!r} given; allowed: a number, or two as in 40..65") from None
    return Between(bounds[0], bounds[1])


def _with_encoder(retrieval: RetrievalConfig, folder: Path) -> RetrievalConfig:
    """With the cross-encoder that lies in the index, wherever that has come to lie."""
    if not isinstance(retrieval.reranker, CrossEncoderReranker):
        return retrieval
    return retrieval.model_copy(update={"reranker": retrieval.reranker.model_copy(update={"path": str(folder / ENCODER)})})


def _one_a_patient(found: Sequence[Match], without: str) -> list[Match]:
    """The first image of each patient but one; images whose patient is not known each count."""
    seen, kept = {without} - {""}, []
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
