"""The trials of a search: which comes next, and what is kept of each.

Below ``<run>/checkpoints/trials/<study>/`` lie ``<number>.json`` (:class:`Trial`) of each finished trial, with
``<number>.safetensors`` of the complete ones, and ``<number>.pt``, the checkpoint of the one in progress: so a search that was
killed goes on where it was. The budget and the selection may change meanwhile; what is tried may not.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

from cv_factory_ops import registry, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.search import SearchConfig
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.training.study import Params, State, Trial, Trying, draw, read_trials, settings_of, told
from cv_factory_ops.training.train import Assignment, checkpoints

log = logging.getLogger("cvf")

FAILURES = 3
"""Trials that may fail before any is complete."""
STATUS = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}
"""MLflow's, of a trial's run."""


class Trials:
    """Those of a study. Rank 0 adds to them; the launcher does where the ranks have failed."""

    def __init__(self, assignment: Assignment, config: SearchConfig) -> None:
        self.assignment, self.config = assignment, config
        tried = config.model_dump_json(exclude={"trials", "minutes", "select"})
        self.study = storage.text_digest(assignment.inputs_digest + tried)[:12]
        self.folder = f"{checkpoints(assignment.run)}/trials/{self.study}"
        self.finished = read_trials(self.folder)
        self.client = registry.connect(assignment.config)
        with registry.explained("search"):
            self.run_id = registry.open_run(self.client, assignment.config, assignment.run)
        self.begun = time.monotonic()

    @property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.finished if trial.state == "complete"]

    @property
    def seconds(self) -> float:
        """That the finished ones took."""
        return sum(trial.seconds for trial in self.finished)

    @property
    def seconds_left(self) -> float | None:
        """Of the budget, None without a limit."""
        return None if self.config.minutes is None else 60 * self.config.minutes - self.seconds

    def are_enough(self) -> bool:
        """Whether the budget is spent. It is not before a trial is complete: a search ends with a model.

        Raises:
            ConfigError: the first trials have all failed.
        """
        if not self.complete:
            if len(self.finished) >= FAILURES:
                self.give_up()
            return False
        most, left = self.config.trials, self.seconds_left
        return (most is not None and len(self.finished) >= most) or (left is not None and left <= 0)

    def give_up(self) -> None:
        """End a search without a complete trial. What was wrong may be a setting that the study's name does not hold, so
        nothing of it is kept.

        Raises:
            ConfigError: in any case.
        """
        storage.delete_tree(self.folder)
        count, reason = len(self.finished), self.finished[-1].reason
        raise ConfigError(f"search: all {count} trials have failed; the last: {reason}")

    def next(self) -> Assignment | None:
        """What the ranks train next, or go on with; None where the budget is spent, or nothing else is left to try."""
        params = None if self.are_enough() else draw(self.config, self.finished)
        if params is None:
            return None
        self._in_progress.write_text(json.dumps(params))
        number, self.begun = len(self.finished), time.monotonic()
        log.info("trial %d: %s", number, self.told(params))
        trying = Trying(
            search=self.config,
            params=params,
            earlier=self.finished,
            seconds_left=self.seconds_left,
            mlflow_run_id=self._open_run(number),
        )
        changed = {
            "config": self.config_of(params),
            "trying": trying,
            "checkpoint": self.uri(number, "pt"),
            "inputs_digest": storage.text_digest(f"{self.study} {params}"),
        }
        return self.assignment.model_copy(update=changed)

    def keep(self) -> None:
        """Keep what the ranks have made of the trial in progress."""
        outcome, weights = self.assignment.take_outcome(), self.assignment.weights
        if not outcome.given_up:
            storage.upload_file(weights, self.uri(len(self.finished), "safetensors"))
        weights.unlink()
        found = outcome.model_dump(include={"history", "parameters", "images_per_second", "world_size"})
        seconds = outcome.earlier_seconds + time.monotonic() - self.begun
        self._finish("pruned" if outcome.given_up else "complete", outcome.given_up, seconds, **found)

    def fail(self, error: ConfigError, seconds: float) -> None:
        """Keep of the trial in progress that its settings cannot be trained with, ``seconds`` after the ranks were launched.

        Raises:
            ConfigError: no trial was in progress: the error is none of its settings.
        """
        before, self.finished = self.seconds, read_trials(self.folder)
        if not self._in_progress.exists():
            raise error
        self._finish("failed", str(error), seconds - (self.seconds - before))

    def config_of(self, params: Params) -> ProjectConfig:
        """The project of a trial.

        Raises:
            ConfigError: its settings do not go together.
        """
        return self.assignment.config.with_settings(settings_of(self.config, params))

    def uri(self, number: int, ending: str) -> str:
        """Where a trial's file lies."""
        return f"{self.folder}/{number:04}.{ending}"

    def told(self, params: Params) -> str:
        """Settings, for people."""
        return ", ".join(f"{key} {told(value)}" for key, value in settings_of(self.config, params).items())

    @property
    def _in_progress(self) -> Path:
        return self.assignment.out / "trial.json"

    def _open_run(self, number: int) -> str:
        place = f"{self.assignment.run}/{self.study}/trial-{number:03}"
        with registry.explained("search"):
            return registry.open_run(self.client, self.assignment.config, place, parent=self.run_id)

    def _finish(self, state: State, reason: str, seconds: float, **found: Any) -> None:
        number, params = len(self.finished), json.loads(self._in_progress.read_text())
        run_id, seconds = self._open_run(number), round(seconds, 3)
        trial = Trial(number=number, params=params, state=state, reason=reason, seconds=seconds, mlflow_run_id=run_id, **found)
        with registry.explained("search"):
            self.client.set_tag(run_id, "cvf.reason", reason)
            self.client.set_terminated(run_id, STATUS[state])
        storage.write_bytes(self.uri(number, "json"), trial.model_dump_json().encode())
        storage.delete_tree(self.uri(number, "pt"))
        self._in_progress.unlink()
        self.finished.append(trial)
        log.info("%s", self._line(trial))

    def _line(self, trial: Trial) -> str:
        """What a trial has found, and how long the search will still take."""
        best, budget, left = max(self.complete, key=lambda each: each.val_auc, default=None), self.config.trials, []
        if self.seconds_left is not None:
            left.append(self.seconds_left)
        if budget:
            left.append((budget - len(self.finished)) * self.seconds / len(self.finished))
        what = f"{trial.state}: {trial.reason}" if trial.reason else f"validation AUC {trial.val_auc:.4f}"
        return (
            f"trial {trial.number}: {what}; "
            + (f"best {best.val_auc:.4f} of trial {best.number}; " if best else "")
            + f"{len(self.finished)}{f' of {budget}' if budget else ''} trials, {max(min(left), 0):.0f} s left"
        )
