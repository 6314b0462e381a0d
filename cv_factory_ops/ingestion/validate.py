"""The gate that each image passes in the process that decodes it: what it must be to be used, and its pixels stored."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops import storage
from cv_factory_ops.config.data import Decoding, ValidationConfig
from cv_factory_ops.domain import Decoded, Domain, open_domain
from cv_factory_ops.errors import CvFactoryError, DataError, Rejected
from cv_factory_ops.ingestion.decode import as_levels, decode
from cv_factory_ops.ingestion.manifest import Refusal, Row, StoredMask
from cv_factory_ops.ingestion.masks import read_mask
from cv_factory_ops.ingestion.pixels import PixelWriter, pixel_digest
from cv_factory_ops.ingestion.sources.boxes import checked
from cv_factory_ops.ingestion.sources.item import Item, Ref

SAMPLED_SIDE = 128
"""Rows and columns from which on not every one is looked at to tell whether an image is blank."""


@dataclass(frozen=True)
class Validation:
    """What a process that decodes has to know."""

    domain: str
    labels: list[str]
    decoding: Decoding
    rules: ValidationConfig
    folder: Path
    """Where the pixels are written."""


class Validated:
    """Decodes, checks and stores items."""

    def __init__(self, settings: Validation) -> None:
        self._settings = settings
        self._domain = open_domain(settings.domain)
        self._pixels = PixelWriter(settings.folder / f"pixels-{os.getpid()}-{os.urandom(4).hex()}.bin")

    def __call__(self, items: Sequence[Item]) -> list[list[Row | Refusal]]:
        """Of each item a row for each frame; where one cannot be used, a refusal. Their pixels are stored then."""
        results = [self._rows(item) for item in items]
        self._pixels.flush()
        return results

    def _rows(self, item: Item) -> list[Row | Refusal]:
        results: list[Row | Refusal] = []
        try:
            for image in frames(item, self._domain, self._settings.decoding):
                results.append(self._row(item, image))
        except Exception as error:
            results.append(refusal(item, error))
        return results

    def _row(self, item: Item, image: Decoded) -> Row | Refusal:
        id = frame_id(item, image, self._settings.decoding)
        labels = self._settings.labels
        label = labels.index(item.label) if item.label in labels else -1
        if item.label and label < 0:
            return Refusal(id, "unknown_label", f"its label is none of: {', '.join(labels)}")
        try:
            check(image, item.patient, self._settings.rules)
        except Rejected as error:
            return Refusal(id, error.code, str(error))
        pixels, mask, boxes = image.image, None, None
        if item.mask:
            try:
                classes = read_mask(item.mask.uri, self._domain, image, labels)
            except Rejected as error:
                return Refusal(id, error.code, str(error))
            levels = as_levels(classes)
            place = self._pixels.append(levels)
            counts = np.bincount(classes.ravel(), minlength=len(labels))
            mask = StoredMask(place, pixel_digest(levels), tuple(int(c) for c in np.flatnonzero(counts)))
            label = 1 + int(counts[1:].argmax()) if counts[1:].any() else 0
        if item.boxes is not None:
            try:
                boxes = checked(item.boxes, labels, pixels.shape)
            except Rejected as error:
                return Refusal(id, error.code, str(error))
            label = int(max(boxes, key=lambda box: (box[3] - box[1]) * (box[4] - box[2]))[0]) if boxes else 0
        row_spacing, column_spacing = image.spacing or (None, None)
        return Row(
            id=id,
            patient=item.patient or image.patient,
            study=image.study,
            instance=image.instance,
            label=label,
            split=item.split,
            source=item.source,
            review=item.review,
            digest=pixel_digest(pixels),
            rows=pixels.shape[0],
            columns=pixels.shape[1],
            channels=1 if pixels.ndim == 2 else pixels.shape[2],
            row_spacing=row_spacing,
            column_spacing=column_spacing,
            place=self._pixels.append(pixels),
            metadata=image.metadata,
            pseudo=labels.index(item.pseudo) if item.pseudo else -1,
            mask=mask,
            report=item.report,
            boxes=boxes,
        )


def frames(item: Item, domain: Domain, decoding: Decoding) -> Iterator[Decoded]:
    """The images of an item.

    Raises:
        Rejected: it cannot be decoded.
    """
    match item.content:
        case np.ndarray():
            return iter([Decoded(as_levels(item.content, decoding.color))])
        case Ref(uri=uri):
            return decode(storage.read_bytes(uri), item.content_type, domain, decoding)
        case content:
            return decode(content, item.content_type, domain, decoding)


def refusal(item: Item, error: Exception) -> Refusal:
    """Why an item cannot be used; what is not the item's fault (a store that does not answer, no memory) is raised again."""
    match error:
        case Rejected():
            return Refusal(item.id, error.code, str(error))
        case DataError():
            return Refusal(item.id, "unreadable", str(error))
        case CvFactoryError() | MemoryError():
            raise error
        case _:  # its own words may quote the item
            return Refusal(item.id, "undecodable", f"cannot be read ({type(error).__name__})")


def frame_id(item: Item, image: Decoded, decoding: Decoding) -> str:
    """The item's name; with the number of the frame, where each of several is an image of its own."""
    return item.id if image.frame is None or decoding.frames == "middle" else f"{item.id}#{image.frame:04d}"


def check(image: Decoded, patient: str, rules: ValidationConfig) -> None:
    """Accept an image that keeps all rules; ``patient`` is the pseudonym that its source gave.

    Raises:
        Rejected: ``missing``, ``not_allowed``, ``geometry``, ``blank``; messages name fields, and values only of allowed ones.
    """
    known = {"patient": patient or image.patient, "study": image.study, "spacing": image.spacing, **image.metadata}
    if missing := [name for name in rules.required if known.get(name) in (None, "")]:
        raise Rejected("missing", f"says no {', '.join(missing)}; required: {', '.join(rules.required)}")
    for name, allowed in rules.allowed.items():
        if str(known.get(name)) not in allowed:
            raise Rejected("not_allowed", f"{name} is none of those allowed: {', '.join(allowed)}")
    _check_geometry(image, rules)
    low, high = _extremes(image.image)
    if high - low < rules.blank * 65535:
        raise Rejected("blank", "shows nothing: nearly all of its pixels are the same")


def _check_geometry(image: Decoded, rules: ValidationConfig) -> None:
    short, long = sorted(image.image.shape[:2])
    if short < rules.min_side:
        raise Rejected("geometry", f"has a side of {short} pixels; allowed from {rules.min_side}")
    if long > rules.max_aspect * short:
        raise Rejected("geometry", f"has sides of {short} and {long} pixels; allowed ratio {rules.max_aspect:g}")
    least, most = rules.spacing_mm
    if image.spacing and not all(least <= spacing <= most for spacing in image.spacing):
        raise Rejected("geometry", f"has a pixel spacing outside of the plausible {least:g} .. {most:g} mm")


def _extremes(image: NDArray[np.uint16]) -> tuple[int, int]:
    """The 0.1 % and 99.9 % quantiles of intensity; of a large image, over every few rows and columns."""
    rows, columns = (1 + side // SAMPLED_SIDE for side in image.shape[:2])
    values = image[::rows, ::columns].ravel()
    low, high = int(0.001 * (values.size - 1)), int(np.ceil(0.999 * (values.size - 1)))
    found = np.partition(values, (low, high))
    return int(found[low]), int(found[high])
