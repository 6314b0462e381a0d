"""Stage ``decide``: whether a drift leads to a retraining; every decision, also every no, is stored and explained.

``<project>/decisions/<UTC time>-<run>.json`` holds one :class:`Decision`; a retried run finds its own again.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import DecideRecord, DriftRecord, Frozen

if TYPE_CHECKING:
    from cv_factory_ops.stage import Stage


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


def run(stage: Stage) -> DecideRecord:
    """Decide once for this run, and store the decision.

    Raises:
        DataError: an earlier decision cannot be read.
    """
    uri = _stored_uri(stage.config, stage.run)
    if uri is None:
        decision = decide(stage.config, stage.run, stage.read(DriftRecord), datetime.now(UTC))
        uri = f"{_folder(stage.config)}/{_stamp(decision.time)}-{_run_name(stage.run)}.json"
        storage.write_bytes(uri, decision.model_dump_json(indent=2).encode())
    else:
        decision = _read(uri)
    answer = "retrain" if decision.retrain else "do not retrain"
    return DecideRecord(summary=f"{answer}: {decision.reason}", retrain=decision.retrain, reason=decision.reason, decision=uri)


def decide(config: ProjectConfig, run: str, drift: DriftRecord, now: datetime) -> Decision:
    """Retrain when there is drift, the last retraining is long enough ago, and enough labels have arrived since."""
    last = last_retraining(config)
    cooldown = timedelta(hours=config.decision.cooldown_hours)
    free_at = last.time + cooldown if last else None
    new_labels = count_new_labels(config, last.time if last else None)
    retrain, reason = _judge(config, drift, new_labels, last, free_at, now)
    return Decision(
        time=now,
        project=config.project,
        run=run,
        verdict=drift.verdict,
        retrain=retrain,
        reason=reason,
        drifted=drift.drifted,
        requests=drift.requests,
        new_labels=new_labels,
        cooldown_until=now + cooldown if retrain else free_at,
        bundle_digest=drift.bundle_digest,
    )


def last_retraining(config: ProjectConfig) -> Decision | None:
    """The latest decision to retrain."""
    decisions = (_read(uri) for uri in reversed(_stored_uris(config)))
    return next((decision for decision in decisions if decision.retrain), None)


def count_new_labels(config: ProjectConfig, since: datetime | None) -> int:
    """Captured studies whose labels have arrived since then (None: ever)."""
    labels = captures.read_labels(config, after=_stamp(since) if since else "")
    if not labels:
        return 0
    return len(labels.keys() & {capture.inference_id for capture in captures.read(config)})


def _judge(
    config: ProjectConfig, drift: DriftRecord, new_labels: int, last: Decision | None, free_at: datetime | None, now: datetime
) -> tuple[bool, str]:
    if drift.verdict != "drift":
        return False, drift.summary
    if last and free_at and now < free_at:
        return False, (
            f"{drift.summary}, but a retraining was decided at {_minute(last.time)} and the cooldown of "
            f"{config.decision.cooldown_hours:g} h lasts until {_minute(free_at)}"
        )
    since = f"since the last retraining was decided at {_minute(last.time)}" if last else "so far"
    labels = f"{new_labels} labelled studies have arrived {since}"
    if new_labels < config.decision.minimum_labels:
        return False, f"{drift.summary}, but only {labels}; at least {config.decision.minimum_labels} are needed"
    return True, f"{drift.summary}; {labels} ({config.decision.minimum_labels} needed)"


def _folder(config: ProjectConfig) -> str:
    return f"{config.root}/decisions"


def _stored_uris(config: ProjectConfig) -> list[str]:
    """All decisions, oldest first."""
    return [f"{_folder(config)}/{name}" for name in storage.listing(_folder(config)) if name.endswith(".json")]


def _stored_uri(config: ProjectConfig, run: str) -> str | None:
    ending = f"-{_run_name(run)}.json"
    return next((uri for uri in _stored_uris(config) if uri.endswith(ending)), None)


def _read(uri: str) -> Decision:
    try:
        return Decision.model_validate_json(storage.read_bytes(uri))
    except ValidationError as error:
        raise DataError(f"{uri}: is not a decision; wrong at {error.errors()[0]['loc']}") from None


def _run_name(run: str) -> str:
    """The run's last name in letters that every file system takes, and a digest that keeps two runs apart."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", run.rsplit("/", 1)[1])[:80]
    return f"{name}-{storage.text_digest(run)[:8]}"


def _stamp(time: datetime) -> str:
    """Sortable; the names of late labels begin with the same."""
    return time.strftime("%Y%m%dT%H%M%S%f")


def _minute(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")
