"""The challenger on parts of the locked test set, by what the metadata say of patient and scanner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from cv_factory_ops.config import EvaluationConfig
from cv_factory_ops.domain import Domain
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.evaluation.bootstrap import Measured
from cv_factory_ops.records import Subgroup

UNKNOWN, OTHERS = "not known", "others"
LESS_IS_BETTER = ("hd95",)
MOST = 8
"""Values of a category that are groups of their own, the most frequent ones; the others are one group together."""


def subgroups(
    judged: Measured, metadata: pd.DataFrame, domain: Domain, config: EvaluationConfig
) -> dict[str, dict[str, Subgroup]]:
    """Counts of every group, and metrics of those with enough patients; metadata that no image has are left out.

    ``metadata``: the rows that were judged, with their columns ``meta_<name>``.

    Raises:
        ConfigError: ``evaluation.subgroups`` names something else.
    """
    found = {}
    for name in names(domain, config):
        column = metadata.get(f"meta_{name}")
        if column is not None and column.notna().any():
            bands = domain.subgroups.get(name, {})
            groups = group_of(column, bands)
            found[name] = {value: _subgroup(judged.only(groups == value), config) for value in _in_order(groups, bands)}
    return found


def names(domain: Domain, config: EvaluationConfig) -> list[str]:
    """The metadata that make groups.

    Raises:
        ConfigError: one of them is unknown, or a number without bands.
    """
    allowed = [name for name, kind in domain.metadata.items() if kind == "category" or name in domain.subgroups]
    chosen = list(domain.subgroups) if config.subgroups is None else config.subgroups
    if unknown := [name for name in chosen if name not in allowed]:
        raise ConfigError(f"evaluation.subgroups: {unknown[0]!r} given; allowed: {', '.join(allowed)}")
    return chosen


def group_of(values: pd.Series, bands: Mapping[str, float]) -> NDArray[np.str_]:
    """(N,) the value, or with bands (lower bounds by name, ascending) the name of the band."""
    if not bands:
        frequent = values.value_counts().index[:MOST]
        return np.asarray(values.where(values.isna() | values.isin(frequent), OTHERS).fillna(UNKNOWN), dtype=str)
    numbers = values.to_numpy(float)
    place = np.searchsorted(list(bands.values()), numbers, side="right")  # 0 is below the lowest, NaN above all
    groups: NDArray[np.str_] = np.array([UNKNOWN, *bands])[np.where(np.isnan(numbers), 0, place)]
    return groups


def is_worse(group: Subgroup, metrics: Mapping[str, float], name: str) -> bool:
    """Whether the whole interval of a group lies on the wrong side of the value of all images."""
    if name not in group.intervals or name not in metrics:
        return False
    low, high = group.intervals[name]
    return low > metrics[name] if name in LESS_IS_BETTER else high < metrics[name]


def _in_order(groups: NDArray[np.str_], bands: Mapping[str, float]) -> list[str]:
    """Bands from the lowest, values from the most frequent one; then the others, and those that are not known."""
    values, counts = np.unique(groups, return_counts=True)
    place = {str(value): bands.get(value, -count) for value, count in zip(values, counts, strict=True)}
    return sorted(place, key=lambda value: (value == UNKNOWN, value == OTHERS, place[value]))


def _subgroup(judged: Measured, config: EvaluationConfig) -> Subgroup:
    patients = len(np.unique(judged.patients))
    if patients < config.minimum:
        return Subgroup(images=len(judged), patients=patients)
    return Subgroup(images=len(judged), patients=patients, metrics=judged.metrics, intervals=judged.intervals(config))
