"""A rollout made step by step from here, for services that split an endpoint's traffic between deployments and do no more.

The new deployment comes beside the old one without traffic, is given its share as ``deploy.rollout`` says, and the old one
goes when the new one has kept all of the traffic for ``bake_seconds``. Whoever watches takes a rollout back by taking the new
deployment's traffic away, by hand or from an alert: the stage finds that, brings the old traffic back, and fails.

All that a retry has to know lies at the endpoint: deployments, their traffic, and three tags: the two that are written first,
and the share last given, which is written with the traffic in one change.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, assert_never

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.deploy import AllAtOnceRollout, CanaryRollout, LinearRollout, Rollout
from cv_factory_ops.deploy.rollout import BEFORE, IN_SERVICE, SERVES, Busy, Release, RolledOut, Serving, settled
from cv_factory_ops.errors import ConfigError, CvFactoryError, DataError, Unavailable

log = logging.getLogger("cvf")

GIVEN = "given-share"
"""Tag of an endpoint: percent of the traffic that the rollout has last given; where less is found, somebody took it away."""
WATCH_SECONDS = 5.0
"""How often a rollout that waits looks whether its traffic is still there."""
TO_HIDE = 300
"""Characters of a model's refusal that are told."""


class Seen(NamedTuple):
    """An endpoint at one moment."""

    shares: dict[str, int]
    """Percent of the traffic, by deployment, of those that can serve."""
    broken: set[str]
    """Deployments that cannot, and are only there to be removed."""
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

    def config_name(self, packed_digest: str) -> str:
        """Name of the deployment of a bundle by the settings of now; other settings are another deployment."""

    def look(self) -> Seen | None:
        """The endpoint; None where there is none, or one whose creation has failed."""

    def create(self, tags: Mapping[str, str], deadline: float) -> None:
        """Make the endpoint, in place of one whose creation has failed."""

    def tag(self, tags: Mapping[str, str], deadline: float) -> None:
        """Write these tags and the project's settings of an endpoint, keep other tags; nothing is changed where all is so."""

    def upload(self, name: str, release: Release, deadline: float) -> None:
        """Have the service know the model that the deployment of that name serves, where it does not yet."""

    def add(self, name: str, deadline: float) -> None:
        """Deploy the model of that name, without traffic.

        Raises:
            DataError: also where the service does not have the model any more.
        """

    def remove(self, name: str, deadline: float) -> None:
        """Remove a deployment that has no traffic; none there is fine."""

    def split(self, shares: Mapping[str, int], tags: Mapping[str, str], deadline: float) -> None:
        """Percent of the traffic, by deployment, of 100 together, and tags, in one change; others get no traffic."""

    def invoke(self, body: bytes, content_type: str) -> bytes: ...


class ShiftingDeployer:
    """See :class:`cv_factory_ops.deploy.rollout.Deployer`."""

    def __init__(self, config: ProjectConfig, endpoint: SplittingEndpoint) -> None:
        self._name, self._settings, self._endpoint = config.endpoint_name, config.deploy, endpoint

    def roll_out(self, release: Release) -> RolledOut:
        name, deadline = self._endpoint.config_name(release.bundle.packed_digest), self._deadline()
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
        with self._endpoint.explained():
            seen = self._endpoint.look()
        if seen and seen.shares.get(config_name) == 100 and seen.tags.get(SERVES) != config_name:
            return  # and another rollout has begun
        log.warning("deploy: endpoint %s goes back to %s", self._name, config_name)
        self._bring(config_name, AllAtOnceRollout(), self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self._settings.timeout

    def _bring(self, name: str, rollout: Rollout, deadline: float) -> str | None:
        """Have the deployment of that name serve; returns the one that served before."""
        with self._endpoint.explained():
            seen = self._begin(name, deadline)
        previous = seen.tags[BEFORE] or None
        old = _carrying(seen.shares, name) or (previous if previous in seen.shares else None)
        try:
            with self._endpoint.explained():
                self._replace(name, old, seen, rollout, deadline)
        except Unavailable:
            raise
        except CvFactoryError as error:
            outcome = self._take_back(name, old)
            raise type(error)(f"endpoint {self._name}: the rollout of {name} failed, {outcome}: {error}") from None
        return previous

    def _begin(self, name: str, deadline: float) -> Seen:
        """What is there, once nothing is in progress; its tags are the rollout's, which are left at the endpoint."""
        seen = self._settled(deadline)
        if seen is None:
            log.info("deploy: creating endpoint %s", self._name)
            tags = {SERVES: name, BEFORE: "", GIVEN: "0"}
            self._endpoint.create(tags, deadline)
            return Seen({}, set(), "", tags)
        tags = {SERVES: name, BEFORE: _carrying(seen.shares, name) or "", GIVEN: str(seen.shares.get(name, 0))}
        if seen.tags.get(SERVES) == name:  # of an earlier try
            tags = {tag: seen.tags.get(tag, value) for tag, value in tags.items()}
        self._endpoint.tag(tags, deadline)
        return seen._replace(tags=tags)

    def _replace(self, name: str, old: str | None, seen: Seen, rollout: Rollout, deadline: float) -> None:
        """Deploy it where it is not yet, give it the traffic, remove all others."""
        share, given = seen.shares.get(name, 0), int(seen.tags[GIVEN])
        if old and share < given:  # while nobody watched
            raise _taken_away(share, given)
        if name not in seen.shares:
            log.info("deploy: endpoint %s gets %s beside %s", self._name, name, old or "nothing")
            self._endpoint.add(name, deadline)
        self._shift(name, old, share, rollout, deadline)
        for other in sorted({*seen.shares, *seen.broken} - {name}):
            self._endpoint.remove(other, deadline)

    def _shift(self, name: str, old: str | None, share: int, rollout: Rollout, deadline: float) -> None:
        """From the share that it has already, to all."""
        for step in steps(rollout) if old else [100]:
            if step < share:
                continue
            if step > share:
                log.info("deploy: endpoint %s gives %s %d percent of the traffic", self._name, name, step)
                shares = {name: step, **({old: 100 - step} if old and step < 100 else {})}
                self._endpoint.split(shares, {GIVEN: str(step)}, deadline)
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
                raise _taken_away(found if seen else 0, share)

    def _take_back(self, name: str, old: str | None) -> str:
        """The old traffic again, without the new deployment, within a time of its own; says what came of it."""
        deadline = self._deadline()
        try:
            with self._endpoint.explained():
                self._settled(deadline)
                if old:
                    self._endpoint.split({old: 100}, {}, deadline)
                self._endpoint.remove(name, deadline)
                self._endpoint.tag({GIVEN: "0"}, deadline)  # only now: a retry after a kill takes it back, too
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


def _taken_away(found: int, given: int) -> DataError:
    return DataError(f"its traffic was taken away: {found} percent instead of {given}")


def _pause(rollout: Rollout) -> int:
    return 0 if isinstance(rollout, AllAtOnceRollout) else rollout.wait_seconds
