"""A rollout made step by step from here, for services that split an endpoint's traffic between deployments and do no more.

The new deployment comes beside the old one without traffic, is given its share as ``deploy.rollout`` says, and the old one
goes when the new one has kept all of the traffic for ``bake_seconds``. Whoever watches takes a rollout back by taking the new
deployment's traffic away, by hand or from an alert: the stage finds that, brings the old traffic back, and fails.

All that a retry has to know lies at the endpoint: deployments, their traffic, and two tags that are written first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, assert_never

from cv_factory_ops.config import AllAtOnceRollout, CanaryRollout, LinearRollout, ProjectConfig, Rollout
from cv_factory_ops.deploy.rollout import BEFORE, IN_SERVICE, SERVES, Busy, Release, RolledOut, Serving, settled
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable

log = logging.getLogger("cvf")

WATCH_SECONDS = 5.0
"""How often a rollout that waits looks whether its traffic is still there."""
TO_HIDE = 300
"""Characters of a model's refusal that are told."""


class Seen(NamedTuple):
    """An endpoint at one moment."""

    shares: dict[str, int]
    """Percent of the traffic, by deployment, of those that can serve."""
    in_progress: str
    """The service's word for what is being changed; empty where nothing is."""
    tags: dict[str, str]


class SplittingEndpoint(Protocol):
    """The project's endpoint on a service that splits traffic; methods that change something wait until it is done.

    They raise what the service's clients raise, :class:`~cv_factory_ops.errors.DataError` where a change has failed for good,
    and :class:`~cv_factory_ops.errors.Unavailable` where it is not done by the deadline.
    """

    def explained(self) -> AbstractContextManager[None]:
        """Turns what the service's clients raise into errors of ours."""

    def config_name(self, bundle_digest: str) -> str:
        """Name of the deployment of a bundle by the settings of now; other settings are another deployment."""

    def look(self) -> Seen | None:
        """The endpoint; None where there is none."""

    def create(self, tags: Mapping[str, str], deadline: float) -> None: ...

    def tag(self, tags: Mapping[str, str], deadline: float) -> None:
        """Write these tags, keep others."""

    def upload(self, name: str, release: Release, deadline: float) -> None:
        """Have the service know the model that the deployment of that name serves, where it does not yet."""

    def add(self, name: str, deadline: float) -> None:
        """Deploy the model of that name, without traffic."""

    def remove(self, name: str, deadline: float) -> None:
        """Remove a deployment that has no traffic; none there is fine."""

    def split(self, shares: Mapping[str, int], deadline: float) -> None:
        """Percent of the traffic, by deployment, of 100 together; others get none."""

    def invoke(self, body: bytes, content_type: str) -> bytes: ...


class ShiftingDeployer:
    """See :class:`cv_factory_ops.deploy.rollout.Deployer`."""

    def __init__(self, config: ProjectConfig, endpoint: SplittingEndpoint) -> None:
        self._name, self._settings, self._endpoint = config.endpoint_name, config.deploy, endpoint

    def roll_out(self, release: Release) -> RolledOut:
        name, deadline = self._endpoint.config_name(release.bundle.digest), self._deadline()
        with self._endpoint.explained():
            self._endpoint.upload(name, release, deadline)
        previous = self._bring(name, self._settings.rollout, deadline)
        return RolledOut(name, name, previous)

    def serving(self) -> Serving | None:
        with self._endpoint.explained():
            seen = self._endpoint.look()
        if seen is None:
            return None
        name = _carrying(seen.shares)
        is_whole = name is not None and seen.shares[name] == 100
        return Serving(seen.in_progress or (IN_SERVICE if is_whole else "without one model for all traffic"), name or "")

    def invoke(self, body: bytes, content_type: str) -> bytes:
        with self._endpoint.explained():
            return self._endpoint.invoke(body, content_type)

    def put_back(self, config_name: str) -> None:
        log.warning("deploy: endpoint %s goes back to %s", self._name, config_name)
        self._bring(config_name, AllAtOnceRollout(), self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout

    def _bring(self, name: str, rollout: Rollout, deadline: float) -> str | None:
        """Have the deployment of that name serve; returns the one that served before."""
        with self._endpoint.explained():
            shares, previous = self._begin(name, deadline)
        old = _carrying(shares, name)
        try:
            with self._endpoint.explained():
                if name not in shares:
                    log.info("deploy: endpoint %s gets %s beside %s", self._name, name, old or "nothing")
                    self._endpoint.add(name, deadline)
                self._shift(name, old, shares.get(name, 0), rollout, deadline)
                for other in sorted(set(shares) - {name}):
                    self._endpoint.remove(other, deadline)
        except Unavailable:
            raise
        except CvFactoryError as error:
            outcome = self._take_back(name, old, deadline)
            raise type(error)(f"endpoint {self._name}: the rollout of {name} failed, {outcome}: {error}") from None
        return previous

    def _begin(self, name: str, deadline: float) -> tuple[dict[str, int], str | None]:
        """Shares of what is there, once nothing is in progress, and what served before; names are left at the endpoint."""
        seen = self._settled(deadline)
        if seen is None:
            log.info("deploy: creating endpoint %s", self._name)
            self._endpoint.create({SERVES: name, BEFORE: ""}, deadline)
            return {}, None
        if seen.tags.get(SERVES) == name:
            return seen.shares, seen.tags.get(BEFORE) or None
        previous = _carrying(seen.shares, name)
        self._endpoint.tag({SERVES: name, BEFORE: previous or ""}, deadline)
        return seen.shares, previous

    def _shift(self, name: str, old: str | None, share: int, rollout: Rollout, deadline: float) -> None:
        """From the share that it has already, to all."""
        for step in steps(rollout) if old else [100]:
            if step < share:
                continue
            if step > share:
                log.info("deploy: endpoint %s gives %s %d percent of the traffic", self._name, name, step)
                self._endpoint.split({name: step, **({old: 100 - step} if old and step < 100 else {})}, deadline)
            if old:
                self._watch(name, step, rollout.bake_seconds if step == 100 else _pause(rollout), deadline)

    def _watch(self, name: str, share: int, seconds: float, deadline: float) -> None:
        """
        Raises:
            DataError: somebody has taken its traffic away.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, WATCH_SECONDS))
            seen = self._settled(deadline)
            if seen is None or (found := seen.shares.get(name, 0)) < share:
                raise DataError(f"its traffic was taken away: {found if seen else 0} percent instead of {share}")

    def _take_back(self, name: str, old: str | None, deadline: float) -> str:
        """The old traffic again, without the new deployment; says what came of it."""
        try:
            with self._endpoint.explained():
                if old:
                    self._endpoint.split({old: 100}, deadline)
                self._endpoint.remove(name, deadline)
        except CvFactoryError as error:
            return f"and it could not be taken back ({error})"
        return f"it went back to {old}" if old else "nothing serves"

    def _settled(self, deadline: float) -> Seen | None:
        return settled(self._endpoint.look, lambda seen: seen.in_progress if seen else "", f"endpoint {self._name}", deadline)


def steps(rollout: Rollout) -> list[int]:
    """Percent of the traffic that the new deployment gets, one after the other."""
    match rollout:
        case AllAtOnceRollout():
            return [100]
        case CanaryRollout(percent=percent):
            return [percent, 100]
        case LinearRollout(percent=percent):
            return [min(percent * number, 100) for number in range(1, math.ceil(100 / percent) + 1)]
        case _ as unknown:
            assert_never(unknown)


def refusal(subject: str, status: int, text: str) -> CvFactoryError:
    """What an HTTP answer other than 2xx to an invocation means; ``status`` is the container's where the service tells it."""
    told = f"{subject}: the model refused ({status}): {' '.join(text.split())[:TO_HIDE]}"
    match status:
        case 401 | 403:
            return ConfigError(f"{subject}: may not be invoked ({status}) with these credentials")
        case 404 | 408 | 429 | 502 | 504:
            return Unavailable(f"{subject}: gives no answer for now ({status})")
        case 503:
            return Busy(told)
        case _:
            return DataError(told)


def _carrying(shares: Mapping[str, int], besides: str = "") -> str | None:
    """The deployment that has the most traffic; None where none has any."""
    others = {name: share for name, share in shares.items() if name != besides and share}
    return max(others, key=lambda name: others[name]) if others else None


def _pause(rollout: Rollout) -> int:
    return 0 if isinstance(rollout, AllAtOnceRollout) else rollout.wait_seconds
