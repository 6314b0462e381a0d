"""The requests of each scanner, view and age band, watched by themselves: a drift of one of them drowns in all the others.

What is tested of a group are further columns of the one comparison, ``<feature> @ <metadata>=<value>``: so the declared
false-alarm rate holds over all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.drift.detect import Comparison, number_scores
from cv_factory_ops.groups import MISSING, group_of, in_order, names
from cv_factory_ops.metrics import Mask
from cv_factory_ops.records import WatchedGroup

if TYPE_CHECKING:
    from cv_factory_ops.domain import Domain

WATCHED = ("score", "entropy", "embedding_0", "embedding_1", "image_mean", "image_std", "image_noise", "image_sharpness")
"""Features that are tested of each group. More of them would make every one need more evidence."""
LEAST = 20
"""Rows of a group that either side must have, if it is spread over both as all rows are, for it to be tested."""


@dataclass(frozen=True)
class Group:
    """The rows of one value or band, on both sides."""

    metadata: str
    value: str
    reference: Mask
    window: Mask

    @property
    def title(self) -> str:
        return f"{self.metadata.removeprefix('metadata_')}={self.value}"


def groups_of(comparison: Comparison, domain: Domain, config: DriftConfig) -> list[Group]:
    """Every group that either side has, in the order in which a person would look for it.

    Raises:
        ConfigError: ``drift.subgroups`` names something else.
    """
    found = []
    for name in names(domain, config.subgroups, "drift.subgroups"):
        column = f"metadata_{name}"
        if column in comparison.kinds:
            sides = [side[column].replace(MISSING, None) for side in (comparison.reference, comparison.window)]
            bands = domain.subgroups.get(name, {})
            groups = group_of(pd.concat(sides, ignore_index=True), bands)
            reference, window = groups[: len(sides[0])], groups[len(sides[0]) :]
            found += [Group(column, value, reference == value, window == value) for value in in_order(groups, bands)]
    return found


def with_groups(comparison: Comparison, groups: list[Group]) -> Comparison:
    """The comparison with the columns of each group that is large enough and not all of the rows. That depends on both samples
    taken together, not on which row is in which: the test stays exact."""
    both = pd.concat([comparison.reference, comparison.window], ignore_index=True)
    share = min(len(comparison.reference), len(comparison.window)) / len(both)
    columns: dict[str, pd.Series] = {}
    for group in groups:
        rows = np.concatenate([group.reference, group.window])
        if rows.sum() * share >= LEAST and not rows.all():
            for feature in (name for name in WATCHED if name in comparison.kinds):
                columns[f"{feature} @ {group.title}"] = both[feature].where(rows)
    whole, size = pd.concat([both, pd.DataFrame(columns)], axis=1), len(comparison.reference)
    return replace(
        comparison,
        reference=whole[:size],
        window=whole[size:].reset_index(drop=True),
        kinds=comparison.kinds | dict.fromkeys(columns, "number"),
        scores={**comparison.scores, **{name: number_scores(column.to_numpy()) for name, column in columns.items()}},
    )


def telling(drifted: Mapping[str, float]) -> dict[str, float]:
    """Without the groups of features that drifted as a whole, which say the same again."""
    return {name: p for name, p in drifted.items() if (of := name.partition(" @ ")[0]) == name or of not in drifted}


def watched(groups: list[Group], p_values: Mapping[str, float]) -> dict[str, dict[str, WatchedGroup]]:
    """The table of all groups, by metadata and value; ``p_values`` of the comparison that :func:`with_groups` has made."""
    table: dict[str, dict[str, WatchedGroup]] = {}
    for group in groups:
        tested = {name: p_values[f"{name} @ {group.title}"] for name in WATCHED if f"{name} @ {group.title}" in p_values}
        table.setdefault(group.metadata.removeprefix("metadata_"), {})[group.value] = WatchedGroup(
            images=int(group.window.sum()),
            share=round(float(np.mean(group.window)), 6),
            reference_share=round(float(np.mean(group.reference)), 6),
            p_values=tested,
        )
    return table
