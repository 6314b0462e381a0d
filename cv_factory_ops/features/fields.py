"""Metadata under names, and with words, that every engine takes: letters, digits and ``_``.

``{"patient age": 61, "view": "PA/AP"}`` becomes ``{"n_patient_20age": 61.0, "w_view": "PA_2fAP"}``: nothing in a filter needs
quotes, so nothing can break out of one, and a name may hold a word in one item and a number in another.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote

from cv_factory_ops.errors import DataError
from cv_factory_ops.features.checks import is_value
from cv_factory_ops.features.stores import Between, Filter, Value


@dataclass(frozen=True, slots=True)
class Clause:
    """What one field must be. A field that is missing is none of it."""

    field: str
    operator: Literal["in", "==", ">=", "<="]
    operand: tuple[str, ...] | float
    """Words where the operator is ``in``, else a number."""


def plain(text: str) -> str:
    """Letters and digits of ASCII as they are, ``_`` doubled, each other byte of the text's UTF-8 as ``_`` and two hexadecimal
    digits; no text at all as one ``_``, for some engines do not find what is empty."""
    return "".join(map(_plain, text.encode())) or "_"


def _plain(byte: int) -> str:
    letter = chr(byte)
    return letter if letter.isascii() and letter.isalnum() else "__" if letter == "_" else f"_{byte:02x}"


def original(text: str) -> str:
    """What :func:`plain` was given."""
    return "" if text == "_" else "_".join(unquote(part.replace("_", "%")) for part in text.split("__"))


def fields(metadata: Mapping[str, Value]) -> dict[str, str | float]:
    """Words as ``w_<name>``, numbers as ``n_<name>``."""
    return {
        f"{'w' if isinstance(value, str) else 'n'}_{plain(name)}": plain(value) if isinstance(value, str) else float(value)
        for name, value in metadata.items()
    }


def metadata_of(fields: Mapping[str, object]) -> dict[str, Value]:
    """What :func:`fields` was given; other fields are left out."""
    metadata: dict[str, Value] = {}
    for field, value in fields.items():
        if field.startswith("w_") and isinstance(value, str):
            metadata[original(field[2:])] = original(value)
        elif field.startswith("n_") and isinstance(value, (int, float)):
            metadata[original(field[2:])] = float(value)
    return metadata


def clauses(where: Filter) -> list[Clause]:
    """A filter in terms of :func:`fields`.

    Raises:
        DataError: it asks for something else than words, a finite number or numbers between two, or by a name that is no text.
    """
    found: list[Clause] = []
    for name, wanted in where.items():
        if not is_value(name):
            raise DataError(f"filter {name!a}: is no text of Unicode")
        word, number = f"w_{plain(name)}", f"n_{plain(name)}"
        match wanted:
            case str() if is_value(wanted):
                found.append(Clause(word, "in", (plain(wanted),)))
            case Between(low, high) if all(bound is None or math.isfinite(bound) for bound in (low, high)):
                found.append(Clause(number, ">=", float(-sys.float_info.max if low is None else low)))
                found += [] if high is None else [Clause(number, "<=", float(high))]
            case int() | float() if is_value(wanted):
                found.append(Clause(number, "==", float(wanted)))
            case [*words] if all(isinstance(each, str) and is_value(each) for each in words):
                found.append(Clause(word, "in", tuple(plain(str(each)) for each in words)))
            case _:
                raise DataError(f"filter {name}: must be a word, a list of words, a finite number, or finite ones between two")
    return found
