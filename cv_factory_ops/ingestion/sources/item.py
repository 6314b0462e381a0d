"""One image as its source gives it: what every source yields."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.ingestion.manifest import Refusal

if TYPE_CHECKING:
    from cv_factory_ops.ingestion.labels import LabelTable


@dataclass(frozen=True, slots=True)
class Ref:
    """A file that the process which decodes it reads by itself."""

    uri: str


@dataclass(frozen=True, slots=True)
class RawBox:
    """An annotation of COCO."""

    category: str
    """Its name; empty where the annotations do not name it."""
    bbox: Any
    """Meant to be [left, top, width, height] in pixels."""
    is_crowd: bool


@dataclass(frozen=True, slots=True)
class Item:
    """One file or array; a file may hold several frames."""

    id: str
    content: bytes | NDArray[np.uint8] | Ref
    """A file's bytes, an array of (rows, columns) or (rows, columns, 3), or where the file lies."""
    label: str = ""
    """Empty where only the file's own identifiers lead to its label."""
    patient: str = ""
    """Pseudonym, where the source itself says whose image it is."""
    content_type: str | None = None
    split: str = ""
    """The split that the source fixes, if any."""
    source: str = "base"
    pseudo: str = ""
    """The champion's answer, where it may stand in for a label."""
    mask: Ref | None = None
    """Of a segmentation: where the classes of its pixels lie."""
    boxes: tuple[RawBox, ...] | None = None
    """Of a detection: as the annotations have them, not checked."""
    review: str = ""
    """Why a person should look at it: codes of the domain's de-identification, by commas."""
    report: str = ""
    """Words of its report."""


@dataclass(frozen=True)
class Opened:
    """A source that is ready to be read."""

    total: int | None
    """Items to expect, for the progress; None where that is not known before."""
    items: Iterator[Item | Refusal]
    table: LabelTable | None = None
    """Labels by what only decoding tells: the identifiers of a study or instance."""
