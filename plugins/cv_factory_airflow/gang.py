"""The pods of one task seen as one thing: whether all have started, whether it is over, and why it ended.

Nothing here asks the cluster; the task and the triggerer hand over what they have read. A pod may be the model of either of
the two Kubernetes clients.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from airflow.providers.cncf.kubernetes.utils.pod_manager import (
    PodLaunchTimeoutException,
    detect_pod_terminate_early_issues,
    parse_log_line,
)

from cv_factory_airflow.manifest import LABEL

LINGER_SECONDS = 30
"""How long the first pod may take to notice that another one is gone."""
WAITING_SINCE = f"{LABEL}waiting-since"
"""Annotation: Unix time since which the task waits for room."""
LOST_CODES = {75, 137, 143}
"""Try again; SIGKILL; SIGTERM."""


class NotStarted(PodLaunchTimeoutException):
    """Pods do not start; the argument is ``room``, ``start``, ``broken``, or ``retreat`` (some have room, others not)."""


@dataclass(frozen=True)
class Limits:
    """How many pods there must be, and how long they may take to start."""

    nodes: int
    schedule_timeout: int
    startup_timeout: int
    patience: int


@dataclass(frozen=True)
class Ending:
    """How a pod ended."""

    node: int
    code: int | None
    """Exit code; None where the container never ran or the pod is gone."""
    reason: str
    """Kubernetes' own word: ``Error``, ``OOMKilled``, ``Evicted``, ..."""
    message: str
    """The last lines of its log, or Kubernetes' explanation."""
    at: datetime

    @property
    def lost(self) -> bool:
        """Whether the same again may end better."""
        return self.reason != "DeadlineExceeded" and (self.code is None or self.code in LOST_CODES)

    @property
    def rank(self) -> tuple[int, bool, datetime]:
        """The smallest tells the reason: what a stage knew, what killed a pod, what surprised it, and last who lost a peer;
        of equals the one that speaks for itself, and the first."""
        if self.code in {2, 3, 4}:
            severity = 0
        elif self.code == 75:
            severity = 4 if "lost a peer" in self.message else 3
        else:
            severity = 1 if self.lost else 2
        return severity, re.search(r"^cvf \w+: node \d+: ", self.message, re.MULTILINE) is not None, self.at

    def lines(self, stage: str) -> list[str]:
        """The reason, as the lines that a process of the stage would have ended with."""
        told = self.message.strip().splitlines()
        if self.code in {None, 137, 143} or self.reason == "DeadlineExceeded":
            words = " ".join(told[-1:]) if self.code is None else ""
            return [f"cvf {stage}: node {self.node}: the pod was ended: {self.reason}" + (f": {words}" if words else "")]
        return told or [f"cvf {stage}: node {self.node}: exit code {self.code} and no word"]


GONE = Ending(0, None, "Gone", "deleted, or its machine went away", datetime.max.replace(tzinfo=UTC))


def node_of(pod: Any) -> int:
    """Which node of the gang a pod is."""
    return int(pod.metadata.labels[f"{LABEL}node"])


def ending_of(pod: Any) -> Ending | None:
    """How a pod ended, None while it has not. Reads the models of both Kubernetes clients."""
    status = pod.status
    now, name = datetime.now(UTC), pod.metadata.labels[f"{LABEL}stage"]
    overdue = pod.metadata.deletion_timestamp and now - pod.metadata.deletion_timestamp > timedelta(seconds=LINGER_SECONDS)
    if overdue and status.phase not in {"Failed", "Succeeded"}:
        return Ending(node_of(pod), None, "NodeLost", "it was told to end and does not; its machine may be gone", now)
    containers = [item for item in status.container_statuses or [] if item.name == name]  # a mesh adds its own
    terminated = next((item.state.terminated for item in containers if item.state.terminated), None)
    if terminated is None and status.phase not in {"Failed", "Succeeded"}:
        return None
    if terminated is None:
        return Ending(node_of(pod), None, status.reason or status.phase, status.message or "", now)
    reason = status.reason or terminated.reason or ""
    code = None if status.reason == "Evicted" else terminated.exit_code
    return Ending(
        node_of(pod),
        code,
        reason,
        (status.message if code is None else terminated.message) or "",
        terminated.finished_at or now,
    )


def check_start(pods: Iterable[Any], limits: Limits) -> bool:
    """Whether all pods of a gang have started, or one has already ended.

    The times are counted from the pods' own marks, so that a restarted watcher goes on counting.

    Raises:
        NotStarted: they have not, and waiting longer has no use.
    """
    pods = list(pods)
    if len(pods) < limits.nodes or any(ending_of(pod) for pod in pods):
        return True
    now = datetime.now(UTC)
    times = [_scheduled_at(pod) for pod in pods]
    if placed := [at for at in times if at]:
        if len(placed) == len(pods):
            return _check_containers(pods, now - max(placed) > timedelta(seconds=limits.startup_timeout))
        newest = max(pod.metadata.creation_timestamp for pod in pods)
        if now - newest > timedelta(seconds=limits.patience):
            raise NotStarted("retreat")
    if now.timestamp() - min(map(waiting_since, pods)) > limits.schedule_timeout:
        raise NotStarted("room")
    return False


def _check_containers(pods: list[Any], late: bool) -> bool:
    if all(pod.status.phase == "Running" for pod in pods):
        return True
    if any(detect_pod_terminate_early_issues(pod) for pod in pods):
        raise NotStarted("broken")
    if late:
        raise NotStarted("start")
    return False


def waiting_since(pod: Any) -> float:
    """Unix time since which the task of a pod waits for room."""
    return float(pod.metadata.annotations[WAITING_SINCE])


def _scheduled_at(pod: Any) -> datetime | None:
    conditions = pod.status.conditions or []
    return next(
        (item.last_transition_time for item in conditions if item.type == "PodScheduled" and item.status == "True"), None
    )


class Watch:
    """What a watcher of a gang keeps in mind; the same in the task and in the triggerer."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes
        self.broken_since: float | None = None
        self._read_until: dict[int, datetime] = {}
        self._read_at: dict[int, float] = {}

    def over(self, pods: Iterable[Any]) -> bool:
        """Whether the first pod has ended, or has gone on for too long after another one failed or went away."""
        found = {node_of(pod): pod for pod in pods}
        if 0 not in found or ending_of(found[0]):
            return True
        endings = [ending_of(found[node]) if node in found else GONE for node in range(1, self.nodes)]
        if not any(ending and ending.code != 0 for ending in endings):
            return False
        self.broken_since = self.broken_since or time.monotonic()
        return time.monotonic() - self.broken_since > LINGER_SECONDS

    def seconds_to_read(self, node: int) -> int | None:
        """How far back a pod's log must be read, by this machine's clock alone; None is all of it."""
        read_at, self._read_at[node] = self._read_at.get(node), time.monotonic()
        return None if read_at is None or node not in self._read_until else int(time.monotonic() - read_at) + 5

    def new_lines(self, node: int, lines: Iterable[str]) -> Iterator[str]:
        """The lines that were not there before; the stage's record is left out, it is the XCom."""
        since = self._read_until.get(node)
        for line in lines:
            at, message = parse_log_line(line)
            if at is None or (since is not None and at <= since):
                continue
            self._read_until[node] = at
            if message and not message.startswith('{"stage":'):
                yield message


def tag(stage: str, node: int) -> str:
    """What a line of a node's log begins with."""
    return f"{stage} node {node}" if node else stage
