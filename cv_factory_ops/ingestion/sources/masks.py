"""The masks of images that lie in files: which one is whose."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri
from cv_factory_ops.config.sources import FileSource, PhantomSource, Source
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import DataError
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, Ref

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

MISSING = ("mask_missing", "has no mask")


@dataclass(frozen=True)
class Masks:
    """Where masks lie: those that the table names, and else the one of the same path in the folder."""

    folder: str
    """URI."""
    files: set[str]
    """Those in the folder, relative to it."""
    named: Mapping[str, str] = field(default_factory=dict)
    """Path of an image -> path of its mask, relative to the folder."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Path of an image -> pseudonym of its patient, where the table says it."""

    @property
    def hidden(self) -> set[str]:
        """URIs of files that are no images, wherever they lie."""
        return {storage.join(self.folder, name) for name in self.files | set(self.named.values())}

    def given_to(self, items: Iterable[Item | Refusal]) -> Iterator[Item | Refusal]:
        """Items with their masks; those without one are refused, and so are rows of the table without an image."""
        seen: set[str] = set()
        for item in items:
            if isinstance(item, Refusal):
                seen.add(item.item)
                yield item
                continue
            seen.add(item.id)
            if name := self._of(item.id):
                mask = Ref(storage.join(self.folder, name))
                yield replace(item, mask=mask, patient=self.patients.get(item.id) or item.patient)
            else:
                yield Refusal(item.id, *MISSING)
        for name in sorted({*self.named, *self.patients} - seen):
            yield Refusal(name, "label_without_image", "has a row in the table of labels, but no file")

    def _of(self, image: str) -> str | None:
        if found := self.named.get(image):
            return found
        stem = posixpath.splitext(image)[0]
        return next((name for name in (f"{stem}{ending}" for ending in ENDINGS) if name in self.files), None)


ENDINGS = (".png", ".npy", ".dcm")
"""Of masks; an image may have any."""


def open_masks(stage: Stage, source: Source, table_uri: str) -> Masks:
    """The masks of a source.

    Raises:
        DataError: the table is none, or the folder of masks is empty.
    """
    from cv_factory_ops.ingestion.labels import read_files

    match source:
        case PhantomSource():
            folder = storage.join(table_uri.rpartition("/")[0], "masks")
            return Masks(folder, set(storage.listing(folder)))
        case FileSource():
            folder, files = as_uri(source.masks or source.path), set[str]()
            if source.masks and not (files := set(storage.listing(folder))):
                raise DataError(f"{folder}: holds no masks")
            rows = read_files(table_uri) if table_uri else {}
            named = {name: row["mask"] for name, row in rows.items() if row.get("mask")}
            patients = {name: pseudonym(row["patient"], "patient") for name, row in rows.items() if row.get("patient")}
            return Masks(folder, files, named, patients)
        case _:
            raise TypeError(f"{source.kind} has no masks: the configuration refuses it")
