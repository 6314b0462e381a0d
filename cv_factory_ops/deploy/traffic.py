"""Blue/green deployment: how the traffic goes from the fleet that serves to the one that is to replace it.

https://docs.aws.amazon.com/sagemaker/latest/dg/deployment-guardrails-blue-green.html
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from cv_factory_ops.deploy.shelf import Item, ServiceError, required
from cv_factory_ops.deploy.variants import Fleet

LIMIT_SECONDS = 8 * 3600
"""``MaximumExecutionTimeoutInSeconds`` where it is not given: its maximum."""


@dataclass(frozen=True)
class Policy:
    """A ``DeploymentConfig``. Seconds may be fractions here; AWS takes whole ones."""

    shares: tuple[float, ...] = (1.0,)
    """Of the traffic that the new fleet is given, step by step; the last is 1."""
    wait_seconds: float = 0
    """Between two steps."""
    bake_seconds: float = 0
    """After the last step; only then is the old fleet gone."""
    limit_seconds: float = LIMIT_SECONDS
    """For the whole deployment."""
    alarms: tuple[str, ...] = ()
    """Names of alarms; the first in ALARM ends the deployment and brings the old fleet back."""

    @classmethod
    def of(cls, given: Item | None, instances: int) -> Policy:
        """The policy that a ``DeploymentConfig`` asks for, over a fleet of so many instances.

        Raises:
            ServiceError: it is not allowed.
        """
        if not given:
            return cls()
        if "RollingUpdatePolicy" in given:
            raise ServiceError("RollingUpdatePolicy: the local endpoint knows BlueGreenUpdatePolicy only")
        blue_green = given.get("BlueGreenUpdatePolicy") or {"TrafficRoutingConfiguration": {"Type": "ALL_AT_ONCE"}}
        routing = required(blue_green, "TrafficRoutingConfiguration")
        alarms = (given.get("AutoRollbackConfiguration") or {}).get("Alarms", [])
        policy = cls(
            shares=_shares(routing, instances),
            wait_seconds=_seconds(routing, "WaitIntervalInSeconds"),
            bake_seconds=_seconds(blue_green, "TerminationWaitInSeconds"),
            limit_seconds=blue_green.get("MaximumExecutionTimeoutInSeconds", LIMIT_SECONDS),
            alarms=tuple(required(alarm, "AlarmName") for alarm in alarms),
        )
        if policy.limit_seconds <= policy.bake_seconds + policy.wait_seconds * (len(policy.shares) - 1):
            raise ServiceError("MaximumExecutionTimeoutInSeconds must be larger than the waits of the deployment together")
        return policy


@dataclass
class Traffic:
    """What serves an endpoint: the fleet in service and, while one is being replaced, the new one with its share."""

    blue: Fleet
    green: Fleet | None = None
    share: float = 0.0

    def choose(self) -> Fleet:
        """The fleet for one request."""
        if self.green and random.SystemRandom().random() < self.share:
            return self.green
        return self.blue


def _shares(routing: Item, instances: int) -> tuple[float, ...]:
    match required(routing, "Type"):
        case "ALL_AT_ONCE":
            return (1.0,)
        case "CANARY":
            return (_size(routing, "CanarySize", instances, 0.01), 1.0)
        case "LINEAR":
            step = _size(routing, "LinearStepSize", instances, 0.1)
            return (*(step * number for number in range(1, int(1 / step) + 1) if step * number < 0.999), 1.0)
        case kind:
            raise ServiceError(f"Value {kind!r} at 'Type' must be one of ALL_AT_ONCE, CANARY, LINEAR")


def _size(routing: Item, field: str, instances: int, least: float) -> float:
    size = required(routing, field)
    share: float = required(size, "Value") / (instances if required(size, "Type") == "INSTANCE_COUNT" else 100)
    if not least <= share <= 0.5:
        raise ServiceError(f"{field} must be {100 * least:.0f} to 50 percent of the fleet, {100 * share:.0f} given")
    return share


def _seconds(given: Item, field: str) -> float:
    seconds: float = given.get(field, 0)
    if not 0 <= seconds <= 3600:
        raise ServiceError(f"Value {seconds} at '{field}' must be between 0 and 3600")
    return seconds
