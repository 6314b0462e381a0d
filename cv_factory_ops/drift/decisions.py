"""What decisions say, and where they lie: ``<project>/decisions/<UTC time>-<run>.json`` holds one, ``....retrain.json`` one to
retrain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

from pydantic import ValidationError

from cv_factory_ops import refusals, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import Frozen

RETRAIN = ".retrain.json"


class Considered(Frozen):
    """A trigger, and what it found."""

    trigger: Literal["drift", "performance", "age", "volume", "manual"]
    asks: bool
    """Whether it asks for a retraining."""
    told: str
    """What it found, for people."""
    value: float | None = None
    """What was held against the limit; None where there was nothing to hold."""
    limit: float | None = None
    signs: list[str] = []
    """What it rests on, where it asks: drifted features, metrics."""


class Rule(Frozen):
    """What may stop a retraining that is asked for."""

    rule: Literal["cooldown", "labels", "duplicate", "budget"]
    allows: bool
    told: str


class Decision(Frozen):
    """Why a model is trained anew, or is not."""

    time: datetime
    """When it was made, UTC."""
    project: str
    run: str
    """URI of the run of the drift check."""
    verdict: Literal["drift", "no drift", "not enough data"]
    retrain: bool
    reason: str
    """One sentence for people."""
    drifted: dict[str, float]
    """Drifted feature -> p-value."""
    requests: int
    """Requests of the drift check's window."""
    new_labels: int
    """Captured studies whose labels arrived after the last decision to retrain."""
    cooldown_until: datetime | None
    """No retraining before this time, UTC; None where there has been none yet."""
    bundle_digest: str
    """The champion that was watched."""
    drift_digest: str = ""
    """SHA-256 of the drift check's record as JSON: what it was made from."""
    trigger: str = ""
    """The first that asked; empty where none did."""
    considered: list[Considered] = []
    """All triggers that are configured, or a person's wish."""
    rules: list[Rule] = []
    """All rules, in the order in which they are asked."""
    stopped_by: str = ""
    """The first rule that did not allow it; empty where it was not asked for, or is done."""
    not_before: datetime | None = None
    """When the retraining may begin, UTC: at once, or at the end of the quiet hours; None where there is none."""
    retraining: str = ""
    """URI of the retraining's run; empty where there is none."""
    who: str = ""
    """The person who asked for it; empty where a trigger did."""


def keep(config: ProjectConfig, decision: Decision) -> str:
    """Store a decision; returns its URI."""
    ending = RETRAIN if decision.retrain else ".json"
    uri = f"{_folder(config)}/{stamp(decision.time)}-{_run_name(decision.run)}{ending}"
    storage.write_bytes(uri, decision.model_dump_json(indent=2).encode())
    return uri


def retrainings(config: ProjectConfig) -> Iterator[Decision]:
    """The decisions to retrain, newest first."""
    return (read(uri) for uri in reversed(stored_uris(config)) if uri.endswith(RETRAIN))


def next_retraining(config: ProjectConfig, now: datetime) -> tuple[str, str]:
    """What `cvf retrain` has to do: the URI of the run of the last retraining that was decided, empty where there is nothing to
    do now; and why, for people."""
    last = next(retrainings(config), None)
    if last is None:
        return "", "no retraining has been decided"
    told = f"the retraining that was decided at {minute(last.time)}"
    match outcome(last):
        case "done":
            return "", f"{told} is done"
        case "refused":
            refused = refusals.refusal_of(last.retraining)
            return "", f"{told} was refused" + (f" by stage {refused.stage}: {refused.reason}" if refused else "")
        case "open" if last.not_before and now < last.not_before:
            return "", f"{told} may not begin before {minute(last.not_before)}"
        case "open":
            return last.retraining, told


def outcome(decision: Decision) -> Literal["open", "done", "refused"]:
    """What has come of a retraining, by what its run holds."""
    if storage.exists(f"{decision.retraining}/promote/result.json"):
        return "done"
    return "refused" if refusals.is_refused(decision.retraining) else "open"


def _folder(config: ProjectConfig) -> str:
    return f"{config.root}/decisions"


def stored_uris(config: ProjectConfig) -> list[str]:
    """All decisions, oldest first."""
    return [f"{_folder(config)}/{name}" for name in storage.listing(_folder(config)) if name.endswith(".json")]


def stored_uri(config: ProjectConfig, run: str) -> str | None:
    """The newest decision of a run."""
    endings = (f"-{_run_name(run)}.json", f"-{_run_name(run)}{RETRAIN}")
    return next((uri for uri in reversed(stored_uris(config)) if uri.endswith(endings)), None)


def read(uri: str) -> Decision:
    try:
        return Decision.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise DataError(f"{uri}: is not a decision; wrong at {error.errors()[0]['loc']}") from None


def _run_name(run: str) -> str:
    """The run's last name in letters that every file system takes, and a digest that keeps two runs apart."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", run.rsplit("/", 1)[1])[:80]
    return f"{name}-{storage.text_digest(run)[:8]}"


def stamp(time: datetime) -> str:
    """Sortable; the names of late labels begin with the same."""
    return time.strftime("%Y%m%dT%H%M%S%f")


def minute(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")
