"""The boxes of images that lie in files: annotations in the format of COCO (https://cocodataset.org/#format-data)."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri
from cv_factory_ops.config.sources import FileSource, PhantomSource, Source
from cv_factory_ops.domain import pseudonym
from cv_factory_ops.errors import DataError, Rejected
from cv_factory_ops.ingestion.manifest import Refusal
from cv_factory_ops.ingestion.sources.item import Item, RawBox

MISSING = ("boxes_missing", "is none of the images of the annotations")
BEYOND = 0.5
"""Pixels by which a box may reach over the edge, where annotations were rounded; it is cut there."""
LARGEST = 1e9
"""A coordinate, in pixels."""


@dataclass(frozen=True)
class Annotations:
    """What is in which image."""

    uri: str
    """Of the file."""
    boxes: Mapping[str, tuple[RawBox, ...]]
    """By the path of the image; of an image without any, none."""
    patients: Mapping[str, str] = field(default_factory=dict)
    """Path of an image -> pseudonym of its patient, where the table of labels says it."""

    @property
    def hidden(self) -> set[str]:
        """URIs of files that are no images."""
        return {self.uri}

    def given_to(self, items: Iterable[Item | Refusal]) -> Iterator[Item | Refusal]:
        """Items with their boxes; those that are not annotated are refused, and so are annotations without an image."""
        seen: set[str] = set()
        for item in items:
            if isinstance(item, Refusal):
                seen.add(item.item)
                yield item
                continue
            seen.add(item.id)
            if (found := self.boxes.get(item.id)) is None:
                yield Refusal(item.id, *MISSING)
            else:
                yield replace(item, boxes=found, patient=self.patients.get(item.id) or item.patient)
        for name in sorted({*self.boxes, *self.patients} - seen):
            yield Refusal(name, "label_without_image", "is annotated, but there is no file")


def open_annotations(source: Source, table_uri: str) -> Annotations:
    """The boxes of a source.

    Raises:
        DataError: there are no annotations, or they are not in the format of COCO; or the table of labels is none.
    """
    from cv_factory_ops.ingestion.labels import read_files

    match source:
        case PhantomSource():
            return read_annotations(storage.join(table_uri.rpartition("/")[0], "boxes.json"))
        case FileSource(boxes=str(boxes)):
            rows = read_files(table_uri) if table_uri else {}
            patients = {name: pseudonym(row["patient"], "patient") for name, row in rows.items() if row["patient"]}
            return replace(read_annotations(as_uri(boxes)), patients=patients)
        case _:
            raise TypeError(f"{source.kind} has no boxes: the configuration refuses it")


def read_annotations(uri: str) -> Annotations:
    """
    Raises:
        DataError: it is not there, or is not in the format of COCO; messages name places, not what stands there.
    """
    try:
        content = json.loads(storage.read_bytes(uri).decode("utf-8-sig"))
        images, annotations, categories = (list(content[name]) for name in ("images", "annotations", "categories"))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise DataError(f"{uri}: is not JSON in the format of COCO: lists of images, annotations, categories") from None
    found: dict[str, list[RawBox]] = {}
    names, files = dict[Any, str](), dict[Any, str]()
    at = "categories"
    try:
        names = {each["id"]: str(each["name"]) for each in categories}
        for number, each in enumerate(images):
            at = f"images[{number}]"
            name = posixpath.normpath(each["file_name"]).lstrip("/")
            if name in found or each["id"] in files:
                raise DataError(f"{uri}: {at}: has the file_name or id of an image before it")
            files[each["id"]], found[name] = name, []
        for number, each in enumerate(annotations):
            at = f"annotations[{number}]"
            box = RawBox(names.get(each["category_id"], ""), each["bbox"], bool(each.get("iscrowd")))
            found[files[each["image_id"]]].append(box)
    except (KeyError, TypeError, AttributeError):
        raise DataError(f"{uri}: {at}: is not in the format of COCO, or of an image that is not listed") from None
    return Annotations(uri, {name: tuple(boxes) for name, boxes in found.items()})


def checked(boxes: Sequence[RawBox], labels: Sequence[str], shape: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Rows of :data:`cv_factory_ops.ingestion.manifest.Boxes` of an image of that shape, sorted; the class is an index into
    ``labels``, of which the first is no category.

    Raises:
        Rejected: ``box_category``: it is none of the labels; ``box_shape``: it is no box, or without an area;
            ``box_outside``: it reaches beyond the image; ``box_crowd``: it stands for several.
    """
    return tuple(sorted(_checked(box, labels, shape) for box in boxes))


def _checked(box: RawBox, labels: Sequence[str], shape: Sequence[int]) -> tuple[float, ...]:
    if box.category not in labels[1:]:
        raise Rejected("box_category", f"has a box whose category is none of: {', '.join(labels[1:])}")
    if box.is_crowd:
        raise Rejected("box_crowd", "has a box around several things (iscrowd); each needs one of its own")
    if not (isinstance(box.bbox, list) and len(box.bbox) == 4 and all(_is_number(value) for value in box.bbox)):
        raise Rejected("box_shape", "has a box that is not four finite numbers: left, top, width, height")
    left, top, width, height = map(float, box.bbox)
    if not (width > 0 and height > 0):
        raise Rejected("box_shape", f"has a box of {width:g} x {height:g} pixels; allowed are sides above 0")
    rows, columns = shape[0], shape[1]
    right, bottom = left + width, top + height
    if min(left, top) < -BEYOND or right > columns + BEYOND or bottom > rows + BEYOND:
        given = f"{left:g}, {top:g} to {right:g}, {bottom:g}"
        raise Rejected("box_outside", f"has a box from {given}, which reaches beyond its {columns} x {rows} pixels")
    cut = (max(left, 0.0), max(top, 0.0), min(right, float(columns)), min(bottom, float(rows)))
    if not (cut[2] > cut[0] and cut[3] > cut[1]):
        raise Rejected("box_outside", "has a box that lies on the edge of the image, outside of it")
    return (float(labels.index(box.category)), *cut)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST  # NaN is not
