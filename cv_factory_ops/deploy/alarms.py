"""CloudWatch, as far as a rollout needs it: the endpoints' own metrics, and alarms on them.

Alarms are declared by PutMetricAlarm at the local endpoint's address, as at AWS, on the metrics of the namespace
``AWS/SageMaker`` with the dimensions ``EndpointName`` and ``VariantName``
(https://docs.aws.amazon.com/sagemaker/latest/dg/monitoring-cloudwatch.html). A period is counted back from now, not from the
full minute, and may be a second; metrics are kept in memory, for an hour.
"""

from __future__ import annotations

import json
import operator
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import numpy as np

from cv_factory_ops import storage
from cv_factory_ops.deploy.shelf import ACCOUNT, REGION, Item, ServiceError, required

NAMESPACE = "AWS/SageMaker"
METRICS = ("Invocations", "Invocation4XXErrors", "Invocation5XXErrors", "InvocationModelErrors", "ModelLatency")
KEPT_SECONDS = 3600
STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "Sum": sum,
    "Average": statistics.fmean,
    "Minimum": min,
    "Maximum": max,
    "SampleCount": len,
}
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "GreaterThanThreshold": operator.gt,
    "GreaterThanOrEqualToThreshold": operator.ge,
    "LessThanThreshold": operator.lt,
    "LessThanOrEqualToThreshold": operator.le,
}
ALLOWED = {"MetricName": METRICS, "ComparisonOperator": COMPARISONS, "Namespace": (NAMESPACE,)}
Source = tuple[str, str, str]
"""Metric, endpoint, variant."""


class CloudWatch:
    """Metrics and alarms of one server."""

    def __init__(self, state: Path) -> None:
        self._path = state / "alarms.json"
        self._alarms: dict[str, Item] = json.loads(self._path.read_bytes()) if self._path.exists() else {}
        self._samples: defaultdict[Source, deque[tuple[float, float]]] = defaultdict(deque)
        self.operations: dict[str, Callable[[Item], Awaitable[Item]]] = {
            "PutMetricAlarm": self._put_metric_alarm,
            "DescribeAlarms": self._describe_alarms,
            "DeleteAlarms": self._delete_alarms,
            "SetAlarmState": self._set_alarm_state,
        }

    def record(self, endpoint: str, variant: str, status: int | None, seconds: float) -> None:
        """One invocation: the container's status (None: it gave no answer) and how long it took."""
        values = {
            "Invocations": 1.0,
            "Invocation4XXErrors": float(status is not None and 400 <= status < 500),
            "Invocation5XXErrors": float(status is not None and status >= 500),
            "InvocationModelErrors": float(status is None or not 200 <= status < 300),
            "ModelLatency": seconds * 1e6,
        }
        now = time.time()
        for metric, value in values.items():
            samples = self._samples[metric, endpoint, variant]
            samples.append((now, value))
            while samples[0][0] < now - KEPT_SECONDS:
                samples.popleft()

    def require(self, names: Iterable[str]) -> None:
        """
        Raises:
            ServiceError: there is no alarm of one of the names.
        """
        if missing := [name for name in names if name not in self._alarms]:
            raise ServiceError(f"Could not find alarm {', '.join(missing)}")

    def raised(self, names: Iterable[str]) -> str:
        """The alarms in ALARM with their reasons, in one line; empty where there is none. A deleted one is silent."""
        states = {name: self._state(self._alarms[name]) for name in names if name in self._alarms}
        return "; ".join(f"{name}: {reason}" for name, (state, reason) in states.items() if state == "ALARM")

    async def _put_metric_alarm(self, given: Item) -> Item:
        name = required(given, "AlarmName")
        if "Metrics" in given:
            raise ServiceError("Metrics: the local endpoint knows alarms on one metric only")
        for field, allowed in ALLOWED.items():
            if required(given, field) not in allowed:
                raise ServiceError(f"Value {given[field]!r} at '{field}' must be one of {', '.join(allowed)}")
        for field in ("Period", "EvaluationPeriods"):
            required(given, field)
        if "Threshold" not in given or not (given.get("Statistic") in STATISTICS or given.get("ExtendedStatistic")):
            raise ServiceError("Threshold and one of Statistic and ExtendedStatistic are needed")
        self._alarms[name] = {**given, "AlarmConfigurationUpdatedTimestamp": time.time()}
        self._save()
        return {}

    async def _describe_alarms(self, given: Item) -> Item:
        prefix, names = given.get("AlarmNamePrefix", ""), given.get("AlarmNames")
        found = [
            _described(alarm, *self._state(alarm))
            for name, alarm in sorted(self._alarms.items())
            if name.startswith(prefix) and (names is None or name in names)
        ]
        wanted = given.get("StateValue")
        return {"MetricAlarms": [alarm for alarm in found if wanted in (None, alarm["StateValue"])], "CompositeAlarms": []}

    async def _delete_alarms(self, given: Item) -> Item:
        for name in required(given, "AlarmNames"):
            self._alarms.pop(name, None)
        self._save()
        return {}

    async def _set_alarm_state(self, given: Item) -> Item:
        """A state by hand, as for a rehearsal; the next evaluation, a period later, goes by the metric again."""
        name = required(given, "AlarmName")
        if name not in self._alarms:
            raise ServiceError(f"Could not find alarm {name}", "ResourceNotFound", 404)
        until = time.time() + self._alarms[name]["Period"]
        self._alarms[name]["ByHand"] = [required(given, "StateValue"), required(given, "StateReason"), until]
        self._save()
        return {}

    def _save(self) -> None:
        storage.write_bytes(self._path.resolve().as_uri(), json.dumps(self._alarms, indent=2).encode())

    def _state(self, alarm: Item) -> tuple[str, str]:
        """State and its reason, now.

        An alarm that treats missing data as ``missing`` or ``ignore`` goes by the periods that have data.
        """
        value, reason, until = alarm.get("ByHand", ("", "", 0))
        if until > time.time():
            return value, reason
        points = self._points(alarm)
        known = [point for point in points if point is not None]
        missing = alarm.get("TreatMissingData", "missing")
        if not known and missing in {"missing", "ignore"}:
            return "INSUFFICIENT_DATA", "no datapoints"
        compare, threshold = COMPARISONS[alarm["ComparisonOperator"]], alarm["Threshold"]
        breaching = sum(missing == "breaching" if point is None else compare(point, threshold) for point in points)
        needed = alarm.get("DatapointsToAlarm", alarm["EvaluationPeriods"])
        told = ", ".join(f"{point:g}" for point in known) or "none"
        reason = f"{alarm['MetricName']} {told} against the threshold {threshold:g} ({alarm['ComparisonOperator']})"
        return ("ALARM" if breaching >= needed else "OK"), reason

    def _points(self, alarm: Item) -> list[float | None]:
        """The statistic of each evaluated period, the latest first; None where it has no data."""
        dimensions = {item["Name"]: item["Value"] for item in alarm.get("Dimensions", [])}
        source = (alarm["MetricName"], dimensions.get("EndpointName", ""), dimensions.get("VariantName", ""))
        now, period = time.time(), alarm["Period"]
        periods: list[list[float]] = [[] for _ in range(alarm["EvaluationPeriods"])]
        for at, value in reversed(self._samples[source]):
            if (index := int((now - at) / period)) >= len(periods):
                break
            periods[index].append(value)
        return [_statistic(alarm, values) if values else None for values in periods]


def _statistic(alarm: Item, values: list[float]) -> float:
    if extended := alarm.get("ExtendedStatistic"):
        return float(np.percentile(values, float(extended.removeprefix("p"))))
    return STATISTICS[alarm["Statistic"]](values)


def _described(alarm: Item, state: str, reason: str) -> Item:
    arn = f"arn:aws:cloudwatch:{REGION}:{ACCOUNT}:alarm:{alarm['AlarmName']}"
    shown = {name: value for name, value in alarm.items() if name not in {"ByHand", "Tags"}}
    return {**shown, "AlarmArn": arn, "StateValue": state, "StateReason": reason, "StateUpdatedTimestamp": time.time()}
