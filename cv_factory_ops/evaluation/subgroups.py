"""The challenger on parts of the locked test set, by what the metadata say of patient and scanner."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from cv_factory_ops.config.evaluation import EvaluationConfig
from cv_factory_ops.domain import Domain
from cv_factory_ops.evaluation.bootstrap import Measured
from cv_factory_ops.groups import group_of, in_order, names
from cv_factory_ops.records import Subgroup

LESS_IS_BETTER = ("hd95",)


def subgroups(
    judged: Measured, metadata: pd.DataFrame, domain: Domain, config: EvaluationConfig
) -> dict[str, dict[str, Subgroup]]:
    """Counts of every group, and metrics of those with enough patients; metadata that no image has are left out.

    ``metadata``: the rows that were judged, with their columns ``meta_<name>``.

    Raises:
        ConfigError: ``evaluation.subgroups`` names something else.
    """
    found = {}
    for name in names(domain, config.subgroups, "evaluation.subgroups"):
        column = metadata.get(f"meta_{name}")
        if column is not None and column.notna().any():
            bands = domain.subgroups.get(name, {})
            groups = group_of(column, bands)
            found[name] = {value: _subgroup(judged.only(groups == value), config) for value in in_order(groups, bands)}
    return found


def is_worse(group: Subgroup, metrics: Mapping[str, float], name: str) -> bool:
    """Whether the whole interval of a group lies on the wrong side of the value of all images."""
    if name not in group.intervals or name not in metrics:
        return False
    low, high = group.intervals[name]
    return low > metrics[name] if name in LESS_IS_BETTER else high < metrics[name]


def _subgroup(judged: Measured, config: EvaluationConfig) -> Subgroup:
    patients = len(np.unique(judged.patients))
    if patients < config.minimum:
        return Subgroup(images=len(judged), patients=patients)
    return Subgroup(images=len(judged), patients=patients, metrics=judged.metrics, intervals=judged.intervals(config))
