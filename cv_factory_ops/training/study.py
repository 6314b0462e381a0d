"""What a search tries next and which of its trials it gives up, by Optuna.

A study is no more than its finished trials, each a small object on shared storage. For every question it is built anew from
them, and the sampler is seeded anew for every trial: so the answer depends on the finished trials alone, and a search that was
killed goes on as if it had not been. Optuna's own storages do not give that: its sampler starts its random numbers again, a
journal file cannot be appended to on S3 and is spoilt by half a line, and SQLite is not safe on network folders.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, assert_never

from cv_factory_ops import storage
from cv_factory_ops.config.search import (
    Choice,
    HalvingPruning,
    Integer,
    LogUniform,
    MedianPruning,
    NoPruning,
    Pruning,
    SearchConfig,
    Uniform,
)
from cv_factory_ops.records import Frozen

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner

TRIES = 50
"""Times that settings are drawn which no trial has had yet, before the space counts as exhausted."""


Params = dict[str, int | float]
"""What was drawn, by setting; of a choice, the place of the value."""


State = Literal["complete", "pruned", "failed"]


class Trial(Frozen):
    """A finished trial."""

    number: int
    """From 0, in the order in which they ran."""
    params: Params
    state: State
    reason: str = ""
    """Why it was given up, or has failed."""
    seconds: float
    """That it took, all tries together."""
    mlflow_run_id: str
    history: list[float] = []
    """Validation AUC of each epoch; of a failed trial none."""
    parameters: int = 0
    """Weights of the network."""
    images_per_second: float = 0.0
    world_size: int = 0

    @property
    def val_auc(self) -> float:
        """The best epoch's, which is kept."""
        return max(self.history)

    @property
    def best_epoch(self) -> int:
        return self.history.index(self.val_auc) + 1


class Trying(Frozen):
    """What the ranks of a trial are told of its search."""

    mlflow_run_id: str
    search: SearchConfig
    params: Params
    earlier: list[Trial]
    seconds_left: float | None
    """Of the whole search, None without a limit."""


def settings_of(search: SearchConfig, params: Params) -> dict[str, Any]:
    """The values of the settings, by dotted name."""
    return {key: d.values[int(params[key])] if isinstance(d, Choice) else params[key] for key, d in search.space.items()}


def told(value: Any) -> str:
    """A value of a setting, for people."""
    if isinstance(value, dict):
        return " ".join([str(value["kind"])] * ("kind" in value) + [f"{k} {told(v)}" for k, v in value.items() if k != "kind"])
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def draw(search: SearchConfig, trials: Sequence[Trial]) -> Params | None:
    """What the next trial tries; None where the space has nothing else: the same settings would give the same network."""
    study, known = _study(search, trials), [trial.params for trial in trials]
    for attempt in range(TRIES):
        study.sampler = _sampler(search, len(trials), attempt)
        params = study.ask(_distributions(search)).params
        if params not in known:
            return params
    return None


class Prospects:
    """Whether a trial may still become one of the best."""

    def __init__(self, trying: Trying) -> None:
        self._trying = trying
        self._study = _study(trying.search, trying.earlier)
        self._study.enqueue_trial(trying.params)
        self._trial = self._study.ask(_distributions(trying.search))
        self._epochs = 0

    def verdict(self, history: Sequence[float], seconds: float) -> str:
        """Why the trial is given up after these validation AUCs and seconds; empty where it goes on.

        A search ends with a model: until one trial is complete, none is given up.
        """
        left, epoch = self._trying.seconds_left, len(history)
        if not epoch or not any(trial.state == "complete" for trial in self._trying.earlier):
            return ""
        if left is not None and seconds >= left:
            return f"the search's time was over in epoch {epoch}"
        hopeless = False
        while self._epochs < epoch:
            self._epochs += 1
            self._trial.report(history[self._epochs - 1], self._epochs)
            hopeless = self._trial.should_prune()
        return f"{self._trying.search.pruning.kind}: too little promise in epoch {epoch}" if hopeless else ""


def read_trials(folder: str) -> list[Trial]:
    """The finished trials of a study, in their order."""
    names = [name for name in storage.listing(folder) if name.endswith(".json")]
    return [Trial.model_validate_json(storage.read_bytes(f"{folder}/{name}")) for name in names]


def _study(search: SearchConfig, trials: Sequence[Trial]) -> Study:
    optuna = _optuna()
    study: Study = optuna.create_study(direction="maximize", pruner=_pruner(search.pruning))
    for trial in trials:
        study.enqueue_trial(trial.params)
        again = study.ask(_distributions(search))
        for epoch, value in enumerate(trial.history, 1):
            again.report(value, epoch)
            if isinstance(search.pruning, HalvingPruning):
                again.should_prune()  # which also notes how far the trial has come
        if trial.state == "complete":
            study.tell(again, trial.val_auc)
        else:  # also a failed one: as the worst of all, where the sampler would not learn from Optuna's own failed ones
            study.tell(again, state=optuna.trial.TrialState.PRUNED)
    return study


def _distributions(search: SearchConfig) -> dict[str, BaseDistribution]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    found: dict[str, BaseDistribution] = {}
    for key, dimension in search.space.items():
        match dimension:
            case Choice():
                found[key] = CategoricalDistribution(range(len(dimension.values)))
            case Uniform() | LogUniform():
                found[key] = FloatDistribution(dimension.low, dimension.high, log=isinstance(dimension, LogUniform))
            case Integer():
                found[key] = IntDistribution(dimension.low, dimension.high)
            case _:
                assert_never(dimension)
    return found


def _pruner(config: Pruning) -> BasePruner:
    pruners = _optuna().pruners
    match config:
        case NoPruning():
            found: BasePruner = pruners.NopPruner()
        case MedianPruning():
            found = pruners.MedianPruner(config.startup_trials, config.warmup_epochs)
        case HalvingPruning():
            found = pruners.SuccessiveHalvingPruner(config.min_epochs, config.factor)
        case _:
            assert_never(config)
    return found


def _sampler(search: SearchConfig, number: int, attempt: int) -> Any:
    seed = int(storage.text_digest(f"{search.seed} {number} {attempt}")[:8], 16)
    return _optuna().samplers.TPESampler(n_startup_trials=search.random_trials, seed=seed)


@cache
def _optuna() -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
