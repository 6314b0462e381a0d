"""Which networks and settings are tried: ``search``."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from cv_factory_ops.config.training import NOT_SEARCHED
from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class Choice(Frozen):
    """One of several values."""

    kind: Literal["choice"] = "choice"
    values: list[Any] = Field(min_length=2)
    """Numbers, words, or whole sections: ``[{kind: small_cnn}, {kind: resnet, depth: 10}]``."""

    @property
    def ends(self) -> list[Any]:
        """What must be allowed, for all of it to be."""
        return self.values


class _Range(Frozen):
    low: float
    """Least value."""
    high: float
    """Greatest value."""

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low below high")
        return self

    @property
    def ends(self) -> list[Any]:
        """What must be allowed, for all of it to be."""
        return [self.low, self.high]


class Uniform(_Range):
    """A number between two others."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """A number between two others, its logarithm evenly spread: for learning rates and the like."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0)
    """Least value."""


class Integer(_Range):
    """A whole number between two others."""

    kind: Literal["integer"] = "integer"
    low: int
    """Least value."""
    high: int
    """Greatest value."""


Dimension = Annotated[Choice | Uniform | LogUniform | Integer, Field(discriminator="kind")]


class NoPruning(Frozen):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class MedianPruning(Frozen):
    """A trial ends whose best validation AUC so far lies below the median of what the complete ones had at that epoch."""

    kind: Literal["median"] = "median"
    startup_trials: int = Field(default=4, ge=1)
    """Trials that are complete before any is stopped."""
    warmup_epochs: int = Field(default=2, ge=0)
    """Epochs that every trial is given."""


class HalvingPruning(Frozen):
    """Successive halving, asynchronous (Li et al. 2020): after ``min_epochs``, ``factor`` times as many, and so on, only the
    best of those that came as far go on."""

    kind: Literal["successive_halving"] = "successive_halving"
    min_epochs: int = Field(default=1, ge=1)
    """Epochs that every trial is given."""
    factor: int = Field(default=3, ge=2)
    """One in so many goes on."""


Pruning = Annotated[NoPruning | MedianPruning | HalvingPruning, Field(discriminator="kind")]


class MetricRule(Frozen):
    """A limit to a metric on validation, at the operating point that ``calibration`` chooses."""

    kind: Literal["metric"] = "metric"
    metric: Literal["auc", "auprc", "accuracy", "sensitivity", "specificity", "ece", "brier"]
    """As evaluation has them."""
    at_least: float | None = None
    """This, ``at_most``, or both, must be given."""
    at_most: float | None = None
    """Above this value a trial is not taken."""

    @model_validator(mode="after")
    def _limited(self) -> MetricRule:
        if self.at_least is None and self.at_most is None:
            raise ValueError("at_least, at_most, or both")
        return self


class SizeRule(Frozen):
    """A limit to the number of weights."""

    kind: Literal["size"] = "size"
    parameters: int = Field(ge=1)
    """At most."""


class LatencyRule(Frozen):
    """A limit to the time that the network takes for one image: the median of several, on one CPU thread of the machine that
    trains."""

    kind: Literal["latency"] = "latency"
    milliseconds: float = Field(gt=0)
    """At most."""


Rule = Annotated[MetricRule | SizeRule | LatencyRule, Field(discriminator="kind")]


class BestTrial(Frozen):
    """The greatest validation AUC."""

    kind: Literal["best"] = "best"
    tolerance: Share = 0.0
    """How much of it may be given up for fewer weights: of those so close to the best, the smallest network is taken."""


class RuledTrial(Frozen):
    """The greatest validation AUC among the trials that keep to all rules. Where none does, the training fails as at a gate."""

    kind: Literal["rules"] = "rules"
    rules: list[Rule] = Field(min_length=1)
    """Each one of ``metric``, ``size``, ``latency``."""


class EnsembleOfTrials(Frozen):
    """Several of the best as one model: a weighted mean of their probabilities, by the weights that make the labels of
    validation most likely. Networks without weight are left out."""

    kind: Literal["ensemble"] = "ensemble"
    size: int = Field(default=5, ge=2)
    """Of the best, so many are candidates."""


Selection = Annotated[BestTrial | RuledTrial | EnsembleOfTrials, Field(discriminator="kind")]

MOST_PROBES = 256
"""Combinations of values above which they are not all checked when a project is loaded."""


class SearchConfig(Frozen):
    """AutoML: trainings with various settings, one after the other, of which the best becomes the bundle. See
    docs/training.md."""

    space: dict[str, Dimension] = Field(min_length=1)
    """What is varied: ``model`` or a setting below it, or one below ``training``, by its dotted name
    (``training.learning_rate``), and the values that it may take."""
    trials: int | None = Field(default=None, ge=1)
    """How many; this, ``minutes``, or both, must be given."""
    minutes: float | None = Field(default=None, gt=0)
    """Time for all of them: none begins after it, and the one that runs then ends after its epoch."""
    seed: int = 0
    """The same seed tries the same settings, unless it is the time that ends trials."""
    random_trials: int = Field(default=10, ge=1)
    """Trials at random before the sampler, a tree-structured Parzen estimator (Bergstra et al. 2011), learns from them."""
    pruning: Pruning = MedianPruning()
    """When a trial that promises little is given up: ``none``, ``median``, ``successive_halving``."""
    select: Selection = BestTrial()
    """What becomes the bundle: ``best``, ``rules``, ``ensemble``."""

    @field_validator("space")
    @classmethod
    def _about_what_is_learned(cls, space: dict[str, Dimension]) -> dict[str, Dimension]:
        for key in space:
            section, _, setting = key.partition(".")
            if section not in {"model", "training"} or key == "training" or setting in NOT_SEARCHED:
                raise ValueError(f"model, a setting below it, or one below training that changes the network; not {key}")
        return space

    @model_validator(mode="after")
    def _limited(self) -> SearchConfig:
        if self.trials is None and self.minutes is None:
            raise ValueError("trials, minutes, or both")
        return self

    def probes(self) -> Iterator[dict[str, Any]]:
        """Settings at the ends of the space: all combinations, or, where they are many, every end by itself."""
        ends = {key: dimension.ends for key, dimension in self.space.items()}
        if math.prod(map(len, ends.values())) <= MOST_PROBES:
            yield from (dict(zip(ends, values, strict=True)) for values in itertools.product(*ends.values()))
        else:
            first = {key: values[0] for key, values in ends.items()}
            yield from (first | {key: value} for key, values in ends.items() for value in values)
