"""Groups of images by what the metadata say of patient and scanner: what models are measured on, and watched by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.domain import Domain
from cv_factory_ops.errors import ConfigError

if TYPE_CHECKING:
    import pandas as pd

MISSING, UNKNOWN, OTHERS = "missing", "not known", "others"
TOLD = 5
"""Rows of the reference that have a value, for it to be told: what few images say, or only those of clients, may be a name."""
MOST = 8
"""Values of a category that are groups of their own, the most frequent ones; the others are one group together."""


def names(domain: Domain, chosen: Sequence[str] | None, setting: str) -> list[str]:
    """The metadata that make groups: those of the setting, or the domain's own.

    Raises:
        ConfigError: one of them is unknown, or a number without bands.
    """
    allowed = [name for name, kind in domain.metadata.items() if kind == "category" or name in domain.subgroups]
    wanted = list(domain.subgroups if chosen is None else chosen)
    if unknown := [name for name in wanted if name not in allowed]:
        raise ConfigError(f"{setting}: {unknown[0]!r} given; allowed: {', '.join(allowed)}")
    return wanted


def told(values: pd.Series, reference: pd.Series) -> pd.Series:
    """The values as they may be shown: those that the reference has :data:`TOLD` times or more; the rest are the others."""
    counts = reference.value_counts()
    return values.where(values.isna() | values.isin([MISSING, *counts.index[counts >= TOLD]]), OTHERS)


def group_of(values: pd.Series, bands: Mapping[str, float]) -> NDArray[np.str_]:
    """(N,) the value, or with bands (lower bounds by name, ascending) the name of the band."""
    if not bands:
        counts = values[values != OTHERS].value_counts().sort_index()
        frequent = counts.sort_values(ascending=False, kind="stable").index[:MOST]
        return np.asarray(values.where(values.isna() | values.isin(frequent), OTHERS).fillna(UNKNOWN), dtype=str)
    numbers = values.to_numpy(float)
    place = np.searchsorted(list(bands.values()), numbers, side="right")  # 0 is below the lowest, NaN above all
    groups: NDArray[np.str_] = np.array([UNKNOWN, *bands])[np.where(np.isnan(numbers), 0, place)]
    return groups


def in_order(groups: NDArray[np.str_], bands: Mapping[str, float]) -> list[str]:
    """Bands from the lowest, values from the most frequent one; then the others, and those that are not known."""
    values, counts = np.unique(groups, return_counts=True)
    place = {str(value): bands.get(value, -count) for value, count in zip(values, counts, strict=True)}
    return sorted(place, key=lambda value: (value == UNKNOWN, value == OTHERS, place[value]))
