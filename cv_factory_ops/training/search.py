"""Stage ``train`` of a project with ``search``: trials, one after the other, and the bundle of what is chosen of them."""

from __future__ import annotations

import csv
import time
from typing import TYPE_CHECKING

import torch

from cv_factory_ops import registry
from cv_factory_ops.config.search import SearchConfig
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.metrics import auc
from cv_factory_ops.models import Classifier
from cv_factory_ops.records import TrainRecord
from cv_factory_ops.training import search_picture
from cv_factory_ops.training.data import Shard
from cv_factory_ops.training.release import write_bundle
from cv_factory_ops.training.selection import Candidate, Chosen, choose
from cv_factory_ops.training.study import Trial, settings_of, told
from cv_factory_ops.training.train import assign, launch_alone, record
from cv_factory_ops.training.trials import Trials
from cv_factory_ops.weights import read_weights

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage

CURVES = ("train_loss", "val_auc", "images_per_second")
"""Metrics of epochs that the search's run shows of its best trial, as that of a training does."""


def run(stage: Stage, config: SearchConfig) -> TrainRecord:
    """Try until the budget is spent, then make the bundle.

    Raises:
        ConfigError: the first trials have all failed.
        GateRefused: no trial keeps to the rules of ``select``.
    """
    assignment = assign(stage, stage.out)
    trials = Trials(assignment, config)
    while not trials.are_enough():
        started = time.monotonic()
        try:
            launch_alone(assignment)  # once for all trials; one that fails by its settings ends the ranks
            break
        except ConfigError as error:
            trials.fail(error, time.monotonic() - started)
    return _release(stage, Trials(assignment, config))


def _release(stage: Stage, trials: Trials) -> TrainRecord:
    if not trials.complete:
        trials.give_up()
    torch.set_num_threads(stage.config.training.threads)
    val = Shard.open(trials.assignment.shards, "val")
    chosen = choose(_candidates(trials, val), trials.config.select, stage.config.calibration)
    write_bundle(trials.assignment, chosen.network, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    best = chosen.candidates[0].trial
    val_auc = best.val_auc if len(chosen.candidates) == 1 else auc(val.labels, chosen.probabilities)
    page = _log(trials, chosen, val_auc)
    return record(
        stage,
        page,
        summary=f"{_counts(trials.finished)}: {_described(trials, chosen)}, validation AUC {val_auc:.3f}",
        mlflow_run_id=trials.run_id,
        epochs=len(best.history),
        best_epoch=best.best_epoch,
        val_auc=round(val_auc, 6),
        images_per_second=best.images_per_second,
        world_size=best.world_size,
    )


def _candidates(trials: Trials, val: Shard) -> list[Candidate]:
    def load(trial: Trial) -> Classifier:
        network = trials.assignment.model_copy(update={"config": trials.config_of(trial.params)}).new_network()
        network.load_state_dict(read_weights(trials.uri(trial.number, "safetensors")).tensors)
        return network.eval()

    return [Candidate(trial, trials.config_of(trial.params), load, val) for trial in trials.complete]


def _counts(trials: list[Trial]) -> str:
    states = [trial.state for trial in trials]
    others = [f"{states.count(state)} {state}" for state in ("pruned", "failed") if state in states]
    return f"{len(states)} trial{'s' if len(states) > 1 else ''}" + (f" ({', '.join(others)})" if others else "")


def _described(trials: Trials, chosen: Chosen) -> str:
    members = [candidate.trial for candidate in chosen.candidates]
    if len(members) == 1:
        return f"trial {members[0].number} with {trials.told(members[0].params)}"
    return "the mean of " + ", ".join(f"trial {t.number} ({w:.2f})" for t, w in zip(members, chosen.weights, strict=True))


def _log(trials: Trials, chosen: Chosen, val_auc: float) -> str:
    """Add to the search's run what a training's shows, of the weightiest trial, and the account of all; returns its page."""
    from mlflow.entities import Metric

    client, run_id, best = trials.client, trials.run_id, chosen.candidates[0].trial
    _write_table(trials, chosen)
    numbers = [candidate.trial.number for candidate in chosen.candidates]
    search_picture.draw(trials.config, trials.finished, numbers, trials.assignment.out / "search.png")
    with registry.explained("search"):
        registry.log_params(client, run_id, _params(trials, chosen))
        points = [point for name in CURVES for point in client.get_metric_history(best.mlflow_run_id, name)]
        client.log_batch(run_id, [*points, Metric("chosen_val_auc", val_auc, int(time.time() * 1000), 0)])
        for name in ("trials.csv", "search.png"):
            client.log_artifact(run_id, str(trials.assignment.out / name), "search")
        return registry.run_page(client, run_id)


def _params(trials: Trials, chosen: Chosen) -> dict[str, object]:
    """The search, and the settings that all of its chosen trials share."""
    first, *others = [registry.settings(candidate.config) for candidate in chosen.candidates]
    shared = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    searched = registry.flat({"search": trials.config.model_dump(mode="json")})
    return shared | searched | {"data_digest": trials.assignment.data_digest}


def _write_table(trials: Trials, chosen: Chosen) -> None:
    """``trials.csv``: a row a trial, with its weight in the bundle."""
    weights = dict(zip((each.trial.number for each in chosen.candidates), chosen.weights, strict=True))
    measured = ["val_auc", "best_epoch", "epochs", "parameters", "seconds"]
    with (trials.assignment.out / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["trial", "state", "weight", *measured, *trials.config.space, "reason"])
        for trial in trials.finished:
            best = [trial.val_auc, trial.best_epoch] if trial.history else ["", ""]
            values = [told(value) for value in settings_of(trials.config, trial.params).values()]
            numbers = [*best, len(trial.history), trial.parameters, trial.seconds]
            table.writerow([trial.number, trial.state, weights.get(trial.number, 0), *numbers, *values, trial.reason])
