"""Stage ``decide``: whether a model is trained anew; every decision, also every no, is stored and explained.

Triggers ask for a retraining, rules may stop it, a person is never stopped. A retried run finds its own decision again, unless
that was a no and the drift check has found something else since.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, assert_never
from zoneinfo import ZoneInfo

from cv_factory_ops import audit, captures, refusals, storage
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.drift import AgeTrigger, DriftTrigger, PerformanceTrigger, QuietHours, Trigger, VolumeTrigger
from cv_factory_ops.drift.decisions import Considered, Decision, Rule, keep, minute, read, retrainings, stamp, stored_uri
from cv_factory_ops.records import DecideRecord, DriftRecord, Performance, feature_of
from cv_factory_ops.stage import read_result

if TYPE_CHECKING:
    from cv_factory_ops.stage import Order, Stage

BUDGET_DAYS = 30


@dataclass(frozen=True)
class Case:
    """What a decision is made from."""

    config: ProjectConfig
    drift: DriftRecord
    now: datetime
    past: list[Decision]
    """Earlier decisions to retrain, newest first."""
    new_labels: int
    """Labelled captures since the newest of them."""

    @property
    def last(self) -> Decision | None:
        return self.past[0] if self.past else None

    @property
    def labels_told(self) -> str:
        since = f"since the last retraining was decided at {minute(self.last.time)}" if self.last else "so far"
        return f"{self.new_labels} labelled studies have arrived {since}"


def run(stage: Stage) -> DecideRecord:
    """Decide once for this run, and once for each person who gives a reason for it; store the decision.

    Raises:
        DataError: an earlier decision cannot be read.
    """
    uri, drift = stored_uri(stage.config, stage.run), stage.read(DriftRecord)
    decision = read(uri) if uri else None
    if uri is None or decision is None or not _stands(decision, drift, stage.order):
        decision = decide(stage.config, stage.run, drift, datetime.now(UTC), stage.order)
        uri = keep(stage.config, decision)
    told = f"asked for by {decision.who}" if decision.who else decision.reason  # a person's own words stay in the storage
    return DecideRecord(
        summary=f"{'retrain' if decision.retrain else 'do not retrain'}: {told}",
        retrain=decision.retrain,
        reason=decision.reason,
        decision=uri,
        trigger=decision.trigger,
        retraining=decision.retraining.rpartition("_retraining.")[2],
        not_before=decision.not_before,
    )


def decide(config: ProjectConfig, run: str, drift: DriftRecord, now: datetime, order: Order | None = None) -> Decision:
    """Retrain where a trigger asks for it and no rule stops it, or where a person orders it."""
    past = list(retrainings(config))
    case = Case(config, drift, now, past, count_new_labels(config, past[0].time if past else None))
    considered = [_manual(order)] if order else [_consider(trigger, case) for trigger in config.decision.triggers]
    asking = [item for item in considered if item.asks]
    rules = [_cooldown(case), _labels(case), _duplicate(case, asking), _budget(case)]
    stopped = next((rule for rule in rules if not rule.allows), None) if asking and not order else None
    retrain = bool(asking) and stopped is None
    trigger = asking[0].trigger if asking else ""
    begin = now if order else quiet_until(config.decision.quiet_hours, now)
    cooldown = timedelta(hours=config.decision.cooldown_hours)
    return Decision(
        time=now,
        project=config.project,
        run=run,
        verdict=drift.verdict,
        retrain=retrain,
        reason=_reason(case, considered, stopped, begin, order),
        drifted=drift.drifted,
        requests=drift.requests,
        new_labels=case.new_labels,
        cooldown_until=now + cooldown if retrain else (case.last.time + cooldown if case.last else None),
        bundle_digest=drift.bundle_digest,
        drift_digest=_digest(drift),
        trigger=trigger,
        considered=considered,
        rules=rules,
        stopped_by=stopped.rule if stopped else "",
        not_before=begin if retrain else None,
        retraining=_retraining_uri(config, trigger, run, now) if retrain else "",
        who=order.who if order else "",
    )


def count_new_labels(config: ProjectConfig, since: datetime | None) -> int:
    """Captured studies whose labels have arrived since then (None: ever)."""
    return len(captures.captured(config, captures.read_labels(config, after=stamp(since) if since else "")))


def quiet_until(quiet: QuietHours | None, now: datetime) -> datetime:
    """The end of the quiet hours that a time lies in, or that time itself, UTC."""
    if quiet is None:
        return now
    local = now.astimezone(ZoneInfo(quiet.time_zone))
    clock, over_midnight = local.time().replace(tzinfo=None), quiet.end < quiet.start
    is_quiet = (clock >= quiet.start or clock < quiet.end) if over_midnight else quiet.start <= clock < quiet.end
    if not is_quiet:
        return now
    day = local.date() + timedelta(days=1) if over_midnight and clock >= quiet.start else local.date()
    end = datetime.combine(day, quiet.end, local.tzinfo)
    return end.replace(fold=local.fold).astimezone(UTC)  # in the hour that autumn repeats, the end lies in the same round


def _consider(trigger: Trigger, case: Case) -> Considered:
    match trigger:
        case DriftTrigger():
            drift = case.drift
            asks, smallest = drift.verdict == "drift", min(drift.drifted.values(), default=None)
            signs = sorted(set(map(feature_of, drift.drifted))) if asks else []
            return Considered(trigger="drift", asks=asks, told=drift.summary, value=smallest, limit=drift.alpha, signs=signs)
        case PerformanceTrigger():
            return _consider_performance(trigger, case.drift.performance)
        case AgeTrigger():
            return _consider_age(trigger, case)
        case VolumeTrigger(labels=limit):
            told = f"{case.labels_told} (decision.triggers.volume.labels is {limit})"
            return Considered(trigger="volume", asks=case.new_labels >= limit, told=told, value=case.new_labels, limit=limit)
        case _:
            assert_never(trigger)


def _consider_performance(trigger: PerformanceTrigger, known: list[Performance]) -> Considered:
    """A measurement goes before an estimate. It asks where the metric is surely too low, the whole interval below the limit:
    the lower end alone would ask whenever labels are few."""
    usable = [item for item in known if item.metric == trigger.metric and (trigger.estimated or not item.estimated)]
    found = min(usable, key=lambda item: item.estimated, default=None)
    if found is None:
        told = f"{trigger.metric} is not known"
        return Considered(trigger="performance", asks=False, told=told, limit=trigger.minimum)
    asks = found.high < trigger.minimum
    basis = "estimated" if found.estimated else f"by {found.labelled} late labels"
    told = (
        f"{found.metric} {found.value:.3f} ({found.low:.3f} .. {found.high:.3f}, {basis}), upper end "
        f"{'below' if asks else 'not below'} {trigger.minimum:g}"
    )
    signs: list[str] = [found.metric] if asks else []
    return Considered(trigger="performance", asks=asks, told=told, value=found.high, limit=trigger.minimum, signs=signs)


def _consider_age(trigger: AgeTrigger, case: Case) -> Considered:
    entries = audit.entries(case.config)
    since = next((entry.time for entry in entries if entry.change.bundle_digest == case.drift.bundle_digest), None)
    if since is None:
        return Considered(trigger="age", asks=False, told="the champion's age is not known", limit=trigger.days)
    age = (case.now - since) / timedelta(days=1)
    told = f"the champion is {age:.1f} days old (decision.triggers.age.days is {trigger.days:g})"
    return Considered(trigger="age", asks=age >= trigger.days, told=told, value=round(age, 3), limit=trigger.days)


def _manual(order: Order) -> Considered:
    return Considered(trigger="manual", asks=True, told=f"{order.who} asks for it: {order.why}")


def _cooldown(case: Case) -> Rule:
    if case.last is None:
        return Rule(rule="cooldown", allows=True, told="no retraining has been decided so far")
    hours = case.config.decision.cooldown_hours
    free_at = case.last.time + timedelta(hours=hours)
    allows = case.now >= free_at
    told = (
        f"a retraining was decided at {minute(case.last.time)} and the cooldown of {hours:g} h "
        f"{'lasted' if allows else 'lasts'} until {minute(free_at)}"
    )
    return Rule(rule="cooldown", allows=allows, told=told)


def _labels(case: Case) -> Rule:
    needed = case.config.decision.minimum_labels
    if case.new_labels < needed:
        return Rule(rule="labels", allows=False, told=f"only {case.labels_told}; at least {needed} are needed")
    return Rule(rule="labels", allows=True, told=f"{case.labels_told} ({needed} needed)")


def _duplicate(case: Case, asking: list[Considered]) -> Rule:
    """One retraining for one cause: of the same champion, only new evidence or new data lead to another one."""
    known = [decision for decision in case.past if decision.bundle_digest == case.drift.bundle_digest]
    if not known or any(_is_new(item, known) for item in asking):
        return Rule(rule="duplicate", allows=True, told="no retraining of this champion was decided for this cause")
    needed, last = case.config.decision.repeat_labels, known[0]
    refused = refusals.refusal_of(last.retraining)
    outcome = f"which was refused ({refused.reason})" if refused else "whose champion has not changed since"
    told = f"a retraining was decided for the same cause at {minute(last.time)}, {outcome}"
    told += f"; {case.labels_told}, {needed} are needed for another one"
    return Rule(rule="duplicate", allows=case.new_labels >= needed, told=told)


def _is_new(item: Considered, known: list[Decision]) -> bool:
    """Whether no such trigger has led to a retraining of this champion, or most of its signs are others than then: features
    that come and go at the edge of the threshold are no news."""
    if item.trigger == "volume":
        return True
    then = [past for decision in known for past in decision.considered if past.trigger == item.trigger and past.asks]
    seen = {sign for past in then for sign in past.signs}
    return not then or len(set(item.signs) - seen) > len(item.signs) / 2


def _budget(case: Case) -> Rule:
    budget = case.config.decision.budget
    if budget is None:
        return Rule(rule="budget", allows=True, told="no budget is set")
    recent = [decision for decision in case.past if case.now - decision.time < timedelta(days=BUDGET_DAYS)]
    minutes = sum(map(_minutes, recent)) if budget.minutes else 0.0
    told = f"{len(recent)} retrainings were decided in the last {BUDGET_DAYS} days"
    told += f", {budget.runs} are allowed" if budget.runs else ""
    told += f"; their training took {minutes:.1f} minutes, {budget.minutes:g} are allowed" if budget.minutes else ""
    spent = (budget.runs is not None and len(recent) >= budget.runs) or (
        budget.minutes is not None and minutes >= budget.minutes
    )
    return Rule(rule="budget", allows=not spent, told=told)


def _minutes(decision: Decision) -> float:
    """That the training of a retraining took; 0 where it is not done."""
    if not storage.exists(f"{decision.retraining}/train/result.json"):
        return 0.0
    return read_result(decision.retraining, "train").seconds / 60


def _reason(case: Case, considered: list[Considered], stopped: Rule | None, begin: datetime, order: Order | None) -> str:
    if order:
        return considered[0].told
    asking = [item.told for item in considered if item.asks]
    if not asking:
        return "; ".join(item.told for item in considered) or f"{case.drift.summary}; no trigger is set"
    if stopped:
        return f"{'; '.join(asking)}, but {stopped.told}"
    waiting = [f"it begins after the quiet hours, at {minute(begin)}"] if begin > case.now else []
    return "; ".join([*asking, _labels(case).told, *waiting])


def _stands(decision: Decision, drift: DriftRecord, order: Order | None) -> bool:
    """Whether a decision was made for this person and this reason; or, where nobody asks, from this drift check. One to retrain
    is never made twice for a run."""
    if order:
        return decision.who == order.who and decision.reason == _manual(order).told
    return decision.retrain or decision.drift_digest == _digest(drift)


def _digest(drift: DriftRecord) -> str:
    return storage.text_digest(drift.model_dump_json())


def _retraining_uri(config: ProjectConfig, trigger: str, run: str, now: datetime) -> str:
    """Where the DAG run of this name, or `cvf retrain`, leaves its results."""
    name = f"{trigger}__{now:%Y%m%dT%H%M%S}-{storage.text_digest(run)[:8]}"
    return f"{config.root}/runs/{config.project}_retraining.{name}"
