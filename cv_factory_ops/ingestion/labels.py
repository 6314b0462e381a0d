"""The table of labels: which label an image has, found by its file or by the identifiers of its study."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from cv_factory_ops import storage
from cv_factory_ops.domain import Domain, pseudonym
from cv_factory_ops.errors import DataError
from cv_factory_ops.features.words import report_words
from cv_factory_ops.ingestion.manifest import Refusal, Row
from cv_factory_ops.ingestion.sources.item import Item

Key = Literal["file", "study", "instance"]
KEYS: tuple[Key, ...] = ("file", "study", "instance")
COLUMNS = "label, one of file, study, instance, and optionally patient"
LONGEST_REPORT = 20_000
"""Characters of a report's words: what every store takes with an item."""


@dataclass(frozen=True)
class Label:
    """A row of the table."""

    line: int
    """From 1, as an editor counts; in JSON the number of the object."""
    label: str
    patient: str
    """Pseudonym, or empty."""
    report: str = ""
    """Words, see :func:`cv_factory_ops.features.words.report_words`; empty where there is none, or none is asked for."""


@dataclass(frozen=True)
class LabelTable:
    """Labels by one kind of key."""

    key: Key
    labels: Mapping[str, Label]
    """By file: its path; by study or instance: the identifier as it is, and its pseudonym."""

    def of_file(self, name: str) -> Label | None:
        """The label of a file, or of the nearest folder (archive, video) above it that has one; ``.`` is above all."""
        while name.strip("/"):
            if found := self.labels.get(name):
                return found
            name = posixpath.dirname(name)
        return self.labels.get(".")

    def of_row(self, row: Row) -> Label | None:
        """The label of a decoded image, by its study or instance."""
        return self.labels.get(row.study if self.key == "study" else row.instance)

    def unused(self, used: set[int]) -> Iterator[Refusal]:
        """Refusals of the rows that nothing was found for; ``used`` are the lines of the others."""
        names = {label.line: name for name, label in self.labels.items()}
        for line in sorted(names.keys() - used):
            item = names[line] if self.key == "file" else f"labels line {line}"  # an identifier does not leave the table
            yield Refusal(item, "label_without_image", f"has a row in the table of labels, but no {self.key}")


UNLABELLED = ("unlabelled", "has no row in the table of labels")


def label_files(items: Iterable[Item | Refusal], table: LabelTable, *, keep: bool) -> Iterator[Item | Refusal]:
    """Items with their labels by file, before they are read; then the rows of the table that no file was found for.

    Those without a label are refused, or kept without one.
    """
    used: set[int] = set()
    for item in items:
        found = table.of_file(item.item if isinstance(item, Refusal) else item.id)
        if found:
            used.add(found.line)
        if isinstance(item, Refusal):
            yield item
        elif found:
            yield replace(item, label=found.label, patient=found.patient or item.patient, report=found.report)
        else:
            yield item if keep else Refusal(item.id, *UNLABELLED)
    yield from table.unused(used)


def read_labels(uri: str, allowed: list[str], domain: Domain, report_column: str | None = None) -> LabelTable:
    """Read a table of labels, and reports where a column is named; messages name lines, not cells, which may identify.

    Raises:
        DataError: it is not there, or is not such a table.
    """
    columns, rows = _rows(uri)
    key: Key | None = next((name for name in KEYS if name in columns), None)
    if key is None or "label" not in columns:
        lacking = [*(["label"] if "label" not in columns else []), *([] if key else ["file, study or instance"])]
        raise DataError(f"{uri}: column {' and '.join(lacking)} is missing; needed: {COLUMNS}")
    if report_column and report_column not in columns:
        raise DataError(f"{uri}: column {report_column} is missing, which data.report_column names")
    table: dict[str, Label] = {}
    for line, row in rows:
        name, label, patient = (_text(row.get(column), f"{uri}: line {line}: {column}") for column in (key, "label", "patient"))
        if not name:
            raise DataError(f"{uri}: line {line}: {key} is empty")
        name = posixpath.normpath(name).lstrip("/") if key == "file" else name
        if label not in allowed:
            raise DataError(f"{uri}: line {line}: the label is none of those allowed: {', '.join(allowed)}")
        if name in table:
            raise DataError(f"{uri}: line {line}: this {key} has a row already")
        report = _report(row.get(report_column), f"{uri}: line {line}: {report_column}") if report_column else ""
        found = Label(line, label, pseudonym(patient, "patient") if patient else "", report)
        table[name] = found
        if key != "file":
            table.setdefault(domain.remapped(name), found)
    return LabelTable(key, table)


def read_files(uri: str) -> dict[str, dict[str, str]]:
    """What a table says of images with masks or boxes, by ``file``: ``mask`` and ``patient``, each empty where it does not.

    Raises:
        DataError: it is not there, or is not such a table.
    """
    columns, rows = _rows(uri)
    if "file" not in columns or not columns & {"mask", "patient"}:
        raise DataError(f"{uri}: needed beside masks or boxes: column file, and mask, patient, or both")
    table: dict[str, dict[str, str]] = {}
    for line, row in rows:
        cells = {column: _text(row.get(column), f"{uri}: line {line}: {column}") for column in ("file", "mask", "patient")}
        name, mask = (posixpath.normpath(cells[path]).lstrip("/") if cells[path] else "" for path in ("file", "mask"))
        if not name or name in table:
            raise DataError(f"{uri}: line {line}: " + ("this file has a row already" if name else "file is empty"))
        if mask.startswith(".."):
            raise DataError(f"{uri}: line {line}: the mask lies outside of the folder of masks")
        table[name] = {"mask": mask, "patient": cells["patient"]}
    return table


def _report(cell: Any, place: str) -> str:
    words = report_words(_text(cell, place))
    if len(words) > LONGEST_REPORT:
        raise DataError(f"{place} has words of {len(words)} characters; allowed are {LONGEST_REPORT}")
    return words


def _text(cell: Any, place: str) -> str:
    if isinstance(cell, dict | list | float | bool):
        raise DataError(f"{place} is neither a text nor a whole number")
    return "" if cell is None else str(cell).strip()


def _rows(uri: str) -> tuple[set[str], list[tuple[int, Mapping[str, Any]]]]:
    """The names of the columns; the rows with their lines."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
        if uri.endswith(".json"):
            objects = json.loads(text)
            if not isinstance(objects, list) or not all(isinstance(row, dict) for row in objects):
                raise ValueError
            return set().union(*objects), list(enumerate(objects, start=1))
        reader = csv.DictReader(io.StringIO(text))
        return set(reader.fieldnames or ()), [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error):
        raise DataError(f"{uri}: is not a CSV table in UTF-8") from None
    except ValueError:
        raise DataError(f"{uri}: is not a JSON list of objects in UTF-8") from None
