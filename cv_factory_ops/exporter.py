"""Drift, decisions, trainings and champion of projects for Prometheus: what their stored records say when it asks
(``cvf exporter``), or pushed to a Pushgateway where a stage ``decide`` ends.

Labels are names of ours, of features and of metrics alone, never words from the headers of images as groups and categories have
them; and the number of series of a project is bounded.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from prometheus_client import CollectorRegistry, generate_latest, push_to_gateway
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, basic_auth_handler, default_handler
from prometheus_client.registry import Collector

from cv_factory_ops import audit, notify, trained
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.notifications import PushgatewayConfig
from cv_factory_ops.drift.decisions import Decision, outcome, read, stored_uris
from cv_factory_ops.errors import CvFactoryError, DataError
from cv_factory_ops.records import DriftRecord, GateRecord, Record, Result, TrainRecord, public_name
from cv_factory_ops.stage import read_result

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response

    from cv_factory_ops.stage import Stage

log = logging.getLogger("cvf")
R = TypeVar("R", bound=Record)

MOST_FEATURES = 200
"""Features of a project that are told of: those with the clearest drift."""
PUSH_SECONDS = 10.0
VERDICTS = ("drift", "no drift", "not enough data")
OUTCOMES = ("open", "done", "refused")
GATE = ("passed", "refused")
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "cvf_project_readable": ("1 where the project's records could be read, else 0", ()),
    "cvf_drift_last_check_timestamp_seconds": ("When the last drift check was decided on", ()),
    "cvf_drift_verdict": ("1 at the last check's verdict, 0 at the others", ("verdict",)),
    "cvf_drift_requests": ("Requests of the last check's window", ()),
    "cvf_drift_alpha": ("False-alarm rate of a check, all features together", ()),
    "cvf_drift_features_drifted": ("Features that the last check found drifted", ()),
    "cvf_drift_feature_p_value": ("p-value of a feature, not of its groups, at the last check", ("feature",)),
    "cvf_drift_captures_left_out": ("Captures of the last window that could not be watched", ("reason",)),
    "cvf_model_performance": ("The champion's at the last check with a verdict", ("metric", "basis")),
    "cvf_model_performance_low": ("Lower end of its interval", ("metric", "basis")),
    "cvf_model_performance_high": ("Upper end of its interval", ("metric", "basis")),
    "cvf_model_performance_reference": ("The same of the test set or, estimated, of the drift reference", ("metric", "basis")),
    "cvf_model_performance_reference_low": ("Lower end of the reference's interval", ("metric", "basis")),
    "cvf_model_champion_info": ("The version that is champion", ("version", "digest")),
    "cvf_model_champion_since_timestamp_seconds": ("When it became champion", ()),
    "cvf_decisions_total": ("Decisions to retrain or to keep the model", ("answer", "trigger", "stopped_by")),
    "cvf_decision_new_labels": ("Labelled captures since the last retraining was decided", ()),
    "cvf_decision_cooldown_until_timestamp_seconds": ("End of the cooldown", ()),
    "cvf_retraining_decided_timestamp_seconds": ("When the last retraining was decided", ()),
    "cvf_retraining_outcome": ("1 at what came of it, 0 at the others", ("outcome",)),
    "cvf_training_last_success_timestamp_seconds": ("When the last training ended well", ()),
    "cvf_training_seconds": ("Wall time of its last try", ()),
    "cvf_training_epochs": ("Epochs that it took", ()),
    "cvf_training_images_per_second": ("Its speed, all processes together", ()),
    "cvf_training_processes": ("Its processes", ()),
    "cvf_training_validation": ("Its best on the validation split", ("metric",)),
    "cvf_training_gate": ("1 at the gate's verdict on it, 0 at the other; none before the gate", ("verdict",)),
    "cvf_training_test": ("Of challenger and champion on the locked test set", ("metric", "model")),
}
"""Meaning and labels, beside ``project``, of each metric."""
Samples = Iterator[tuple[str, tuple[str, ...], float]]
"""Name, values of the labels, value."""


class Projects(Collector):
    """The metrics of some projects, as their records are at each question."""

    def __init__(self, configs: Sequence[ProjectConfig]) -> None:
        self._projects = [_Project(config) for config in configs]
        self._lock = threading.Lock()

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        families = {name: _family(name) for name in FAMILIES}
        with self._lock:
            for project in self._projects:
                for name, labels, value in project.samples():
                    families[name].add_metric([project.name, *labels], value)
        return families.values()


class _Project:
    """What a project's records say. A decision is read once, as it does not change."""

    def __init__(self, config: ProjectConfig) -> None:
        self.name, self._config = config.project, config
        self._seen: set[str] = set()
        self._decided: Counter[tuple[str, str, str]] = Counter()
        self._last: Decision | None = None
        self._retraining: Decision | None = None
        self._judged: Decision | None = None
        """The last one on a check that had enough data."""
        self._checks: dict[tuple[str, str], DriftRecord | None] = {}
        """Of the last decision, and of that one, by run and digest."""

    def samples(self) -> Samples:
        try:
            self._read_decisions()
            yield from [
                *self._drift_samples(),
                *self._decision_samples(),
                *_champion_samples(self._config),
                *_training_samples(self._config),
            ]
            yield "cvf_project_readable", (), 1
        except CvFactoryError as error:
            log.warning("project %s: %s", self.name, error)
            yield "cvf_project_readable", (), 0

    def _read_decisions(self) -> None:
        for uri in stored_uris(self._config):
            if uri not in self._seen:
                self._last = decision = read(uri)
                self._retraining = decision if decision.retrain else self._retraining
                self._judged = decision if decision.verdict != "not enough data" else self._judged
                self._decided["retrain" if decision.retrain else "keep", decision.trigger, decision.stopped_by] += 1
                self._seen.add(uri)
        known = self._checks
        needed = [_check_of(decision) for decision in (self._last, self._judged) if decision]
        self._checks = {check: known[check] if check in known else _drift_record(check[0]) for check in needed}

    def _drift_samples(self) -> Samples:
        if last := self._last:
            yield "cvf_drift_last_check_timestamp_seconds", (), last.time.timestamp()
            yield from (("cvf_drift_verdict", (name,), float(last.verdict == name)) for name in VERDICTS)
            yield "cvf_drift_requests", (), last.requests
            yield "cvf_drift_features_drifted", (), len(last.drifted)
            if drift := self._checks[_check_of(last)]:
                yield "cvf_drift_alpha", (), drift.alpha
                yield from _feature_samples(drift)
        if self._judged and (measured := self._checks[_check_of(self._judged)]):
            yield from _performance_samples(measured)

    def _decision_samples(self) -> Samples:
        yield from (("cvf_decisions_total", labels, count) for labels, count in self._decided.items())
        if last := self._last:
            yield "cvf_decision_new_labels", (), last.new_labels
            if last.cooldown_until:
                yield "cvf_decision_cooldown_until_timestamp_seconds", (), last.cooldown_until.timestamp()
        if retraining := self._retraining:
            yield "cvf_retraining_decided_timestamp_seconds", (), retraining.time.timestamp()
            came = outcome(retraining)
            yield from (("cvf_retraining_outcome", (name,), float(came == name)) for name in OUTCOMES)


def _feature_samples(drift: DriftRecord) -> Samples:
    tested = drift.p_values | drift.drifted
    known = {name: p for name, p in tested.items() if public_name(name) == name}
    for name in sorted(known, key=lambda name: (known[name], name))[:MOST_FEATURES]:
        yield "cvf_drift_feature_p_value", (name,), known[name]
    quality = drift.quality
    counts = {"foreign": quality.foreign, "unreadable": quality.unreadable, "quarantined": quality.quarantined}
    for reason, count in (counts | {"refused": sum(quality.refused.values())}).items():
        yield "cvf_drift_captures_left_out", (reason,), count


def _performance_samples(drift: DriftRecord) -> Samples:
    for found in drift.performance:
        labels = (found.metric, "estimated" if found.estimated else "measured")
        yield "cvf_model_performance", labels, found.value
        yield "cvf_model_performance_low", labels, found.low
        yield "cvf_model_performance_high", labels, found.high
        if found.reference is not None:
            yield "cvf_model_performance_reference", labels, found.reference
        if found.reference_low is not None:
            yield "cvf_model_performance_reference_low", labels, found.reference_low


def _champion_samples(config: ProjectConfig) -> Samples:
    """By the history, which is what MLflow's aliases are a copy of."""
    entries = list(audit.entries(config))
    moves = [entry for entry in entries if entry.change.aliases.get("champion") != entry.before.get("champion")]
    if moves and (version := moves[-1].change.aliases.get("champion")):
        digest = next((entry.change.bundle_digest for entry in entries if entry.change.version == version), "")
        yield "cvf_model_champion_info", (str(version), digest), 1
        yield "cvf_model_champion_since_timestamp_seconds", (), moves[-1].time.timestamp()


def _training_samples(config: ProjectConfig) -> Samples:
    """Of the last training that ended well; none in the moment between its end and its record."""
    if (last := trained.last(config)) and (found := _record(TrainRecord, last.run)):
        result, training = found
        yield "cvf_training_last_success_timestamp_seconds", (), last.time.timestamp()
        yield "cvf_training_seconds", (), result.seconds
        yield "cvf_training_epochs", (), training.epochs
        yield "cvf_training_images_per_second", (), training.images_per_second
        yield "cvf_training_processes", (), training.world_size
        for metric, value in (("auc", training.val_auc), ("dice", training.val_dice), ("map", training.val_map)):
            if value is not None:
                yield "cvf_training_validation", (metric,), value
        if judged := _record(GateRecord, last.run):
            yield from _gate_samples(judged[1])


def _gate_samples(gate: GateRecord) -> Samples:
    yield from (("cvf_training_gate", (name,), float(gate.verdict == name)) for name in GATE)
    for model, value in (("challenger", gate.challenger), ("champion", gate.champion)):
        if value is not None:
            yield "cvf_training_test", (gate.metric, model), value


def _check_of(decision: Decision) -> tuple[str, str]:
    return decision.run, decision.drift_digest


def _drift_record(run: str) -> DriftRecord | None:
    """None where the decision alone can tell the verdict."""
    found = _record(DriftRecord, run)
    return found[1] if found else None


def _record(kind: type[R], run: str) -> tuple[Result, R] | None:
    """A stage's record in its envelope; None where the stage has not run, the run is gone, or is of another version."""
    try:
        result = read_result(run, kind.stage)
        return result, kind.model_validate(result.record)
    except (DataError, ValueError):
        return None


def _family(name: str) -> GaugeMetricFamily | CounterMetricFamily:
    meaning, labels = FAMILIES[name]
    kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
    return kind(name, meaning, labels=("project", *labels))


def create_app(configs: Sequence[ProjectConfig]) -> Starlette:
    """``GET /metrics`` of these projects."""
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    registry = CollectorRegistry()
    registry.register(Projects(configs))

    def metrics(_: Request) -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    def ping(_: Request) -> Response:
        return PlainTextResponse("fine")

    return Starlette(routes=[Route("/metrics", metrics), Route("/ping", ping)])


def serve(configs: Sequence[ProjectConfig], host: str, port: int) -> None:
    """Serve until SIGTERM.

    Raises:
        Unavailable: the port is taken.
    """
    from cv_factory_ops.server import listen, run

    with listen(host, port) as listener:
        run(create_app(configs), listener)


def push(stage: Stage) -> None:
    """Leave the project's metrics at its Pushgateway; what fails, or takes longer than :data:`PUSH_SECONDS`, is a warning."""
    if gateway := stage.config.pushgateway:
        failed = notify.failures({"pushgateway": partial(_push, stage.config, gateway)}, PUSH_SECONDS)
        for why in failed.values():
            log.warning("pushgateway: metrics were not pushed: %s", why)


def _push(config: ProjectConfig, gateway: PushgatewayConfig) -> None:
    registry = CollectorRegistry()
    registry.register(Projects([config]))
    handler = default_handler
    if gateway.user and gateway.password_env:
        password = notify.environment(gateway.password_env)
        handler = partial(basic_auth_handler, username=gateway.user, password=password)
    push_to_gateway(
        gateway.url, job="cvf", registry=registry, grouping_key={"project": config.project}, timeout=5, handler=handler
    )
