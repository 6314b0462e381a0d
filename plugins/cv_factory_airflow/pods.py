"""A stage in Kubernetes: one pod, or one pod a node of a training, and still one Airflow task.

``StagePods`` is a KubernetesPodOperator: making the pod, following it, deferral, re-entry, callbacks and retried API calls are
the provider's. It adds the further nodes (owned by the first pod, so nothing outlives it), one verdict over all of them, lost
pods that start again, and one name for a task's pods, so that a second try can only ever find the first one's.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, cast

from airflow.providers.cncf.kubernetes.kubernetes_helper_functions import KubernetesApiException, generic_api_retry
from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.providers.cncf.kubernetes.triggers.pod import KubernetesPodTrigger
from airflow.providers.cncf.kubernetes.utils.pod_manager import PodLaunchTimeoutException, PodManager
from airflow.sdk.exceptions import AirflowException, AirflowFailException, AirflowTaskTimeout
from airflow.triggers.base import TriggerEvent
from kubernetes.client import (
    ApiException,
    ApisApi,
    CustomObjectsApi,
    V1DeleteOptions,
    V1EnvVar,
    V1OwnerReference,
    V1Pod,
    V1Preconditions,
)
from kubernetes.config import ConfigException
from kubernetes_asyncio import client as async_client
from urllib3.exceptions import HTTPError

from cv_factory_airflow.gang import (
    GONE,
    WAITING_SINCE,
    Ending,
    Limits,
    NotStarted,
    Watch,
    check_start,
    ending_of,
    node_of,
    tag,
    waiting_since,
)
from cv_factory_airflow.manifest import LABEL, manifest
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.runtime import KubernetesRuntime
from cv_factory_ops.reach import require_reachable

if TYPE_CHECKING:
    from airflow.sdk import Context
    from airflow.triggers.base import BaseTrigger

LOOK_SECONDS = 1.0
"""Between two looks at the pods."""
GROUP = "kueue.x-k8s.io"
WORK = f"{LABEL}work"
"""Annotation: digest of what the pods do, so that a pod of other settings is not taken for this task's."""
MOST_ERRORS = 20
Method = TypeVar("Method", bound=Callable[..., Any])
ENDED = {"success", "failed", "skipped", "upstream_failed", "removed", "restarting"}
"""States that a person gives a running task. Any other one is Airflow's, which has lost sight of this worker and will retry."""


def patiently(method: Method) -> Method:
    """Ask again where the API server does not answer at once, for as long as the provider does."""
    return cast("Method", generic_api_retry(method))  # type: ignore[no-untyped-call]


class StageEnded(AirflowException):
    """The stage's own failure: its exit code and its last lines."""

    def __init__(self, code: int, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.code = code
        self.lines = lines


class Lost(StageEnded):
    """Pods went away, or ended with a word that says to try again."""


class Interrupted(BaseException):
    """SIGTERM: not an ``Exception``, so that nothing on the way to :meth:`StagePods.run` takes it for an error."""


def pod_name(project: str, stage: str, *task: str) -> str:
    """The name of a task's first pod: the same in every try, and for no other task of any Airflow."""
    return f"cvf-{project.replace('_', '-')[:28].rstrip('-')}-{stage}-{_digest(*task)}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]


class Manager(PodManager):
    """The provider's, but for one wait: a pod is over when its stage is, whatever else a mesh has put into it."""

    def await_pod_completion(self, pod: V1Pod, *_: Any, **__: Any) -> V1Pod:
        return self.read_pod(pod)


class StagePods(KubernetesPodOperator):
    """Run a stage in pods.

    :param stage: name of the stage; also that of the container
    :param project: the project with all overrides
    :param yaml: the project's file, which the pods are given
    :param run: URI of the run directory
    :param command: what the pods run; the project is :data:`~cv_factory_airflow.manifest.PROJECT_FILE` to them
    :param context: of the task
    """

    def __init__(
        self, *, stage: str, project: ProjectConfig, yaml: str, run: str, command: list[str], context: Context, **kwargs: Any
    ) -> None:
        runtime = cast("KubernetesRuntime", project.runtime)
        require_reachable(project, runtime, stage, run)
        ti = context["ti"]
        name = pod_name(project.project, stage, run, ti.dag_id, ti.run_id, ti.task_id, str(ti.map_index))
        owner = {"dag": ti.dag_id, "run": str(ti.run_id)}
        timeout = kwargs.get("execution_timeout")
        super().__init__(
            kubernetes_conn_id=runtime.kubernetes_conn_id,
            namespace=runtime.namespace,
            pod_template_dict=manifest(project, runtime, stage, name, command, yaml, owner),
            random_name_suffix=False,
            labels={f"{LABEL}gang": name, f"{LABEL}node": "0"},
            base_container_name=stage,
            termination_message_policy="FallbackToLogsOnError",
            active_deadline_seconds=int(timeout.total_seconds()) if timeout else None,
            log_pod_spec_on_failure=False,
            poll_interval=LOOK_SECONDS,
            deferrable=runtime.deferrable and not _under_dags_test(),
            **kwargs,
        )
        self.stage = stage
        self.run_uri = run
        self.runtime = runtime
        self.gang = name
        self.work = _digest(*command, yaml, runtime.pod_of(stage).image)
        nodes = project.training.nodes if stage == "train" else 1
        patience = runtime.schedule_timeout if runtime.queue else runtime.gang_patience
        self.limits = Limits(nodes, runtime.schedule_timeout, runtime.startup_timeout, patience)
        self.waiting_since = time.time()
        self.restarts = 0
        self.retreats = 0
        self.watch = Watch(nodes)
        self.watching = False
        self.stopped = False

    def run(self, context: Context, event: dict[str, Any] | None = None) -> None:
        """Run the stage to its end; with an ``event`` of the trigger, go on after it.

        Raises:
            TaskDeferred: the triggerer takes over.
            StageEnded: the stage failed.
            AirflowException: the pods could not be started.
        """
        self.watching = True
        try:
            self._run_until_told(context, event)
        except ApiException as error:
            raise AirflowException(f"{_words(error)}; a retry rejoins what runs") from None
        except HTTPError as error:
            raise AirflowException(f"Kubernetes: does not answer ({type(error).__name__}); a retry rejoins what runs") from None
        except ConfigException as error:
            raise AirflowFailException(f"Kubernetes: {error} Set KUBECONFIG or connection {self.kubernetes_conn_id}") from None
        finally:
            self.watching = False

    def on_kill(self) -> None:
        """Airflow's SIGTERM: leave the watch; :meth:`run` then asks whether the task was cancelled or its worker is going."""
        if self.watching:
            self.watching, self.stopped = False, True
            raise Interrupted

    def _run_until_told(self, context: Context, event: dict[str, Any] | None) -> None:
        """Who cancels the task, or its time, removes the pods; a worker that must go leaves them to the retry."""
        try:
            self._run(context, event)
        except (AirflowTaskTimeout, KeyboardInterrupt):
            self._remove()
            raise
        except Interrupted:
            if _task_state(context) in ENDED:
                self._remove()
            raise AirflowException(f"cvf {self.stage}: this worker is told to stop; a retry rejoins what still runs") from None

    def _run(self, context: Context, event: dict[str, Any] | None) -> None:
        while True:
            try:
                if event is not None:
                    self.trigger_reentry(context, event)
                elif self.deferrable:
                    self.execute_async(context)
                else:
                    self.execute_sync(context)
                return
            except Lost as lost:
                if self.restarts >= self.runtime.restarts:
                    raise
                self.restarts += 1
                self.waiting_since = time.time()
                self.log.warning("%s; starting again (%d of %d)", lost, self.restarts, self.runtime.restarts)
                time.sleep(min(5 * 2**self.restarts, 60) if self.restarts > 1 else 0)
            except NotStarted:
                self.retreats += 1
                pause = min(5 * 2**self.retreats, 120)
                self.log.info("not all pods have room; none waits with resources in hand; next try in %d s", pause)
                time.sleep(pause)
            event = self.pod = self.pod_request_obj = self.remote_pod = None
            self.watch = Watch(self.limits.nodes)

    def build_pod_request_obj(self, context: Context | None = None, *, dry_run: bool = False) -> V1Pod:
        pod = super().build_pod_request_obj(context, dry_run=dry_run)
        pod.metadata.annotations |= {WAITING_SINCE: str(int(self.waiting_since)), WORK: self.work}
        if self.limits.nodes > 1:
            _set_env(pod, "PET_NODE_RANK", "0")
        if self.runtime.queue:
            self._require_queue(pod.metadata.namespace, self.runtime.queue)
            pod.metadata.labels[f"{GROUP}/pod-group-name"] = self.gang
            pod.metadata.annotations[f"{GROUP}/pod-group-total-count"] = str(self.limits.nodes)
        return pod

    @cached_property
    def pod_manager(self) -> PodManager:
        return Manager(kube_client=self.client, callbacks=self.callbacks)

    def get_or_create_pod(self, pod_request_obj: V1Pod, context: Context) -> V1Pod:
        """The first pod of the gang: the one that an earlier try has left running or well ended, or a new one."""
        self.namespace = pod_request_obj.metadata.namespace
        try:
            first = self._left_by_an_earlier_try() or self._create(pod_request_obj)
            if ending_of(first):
                self._repeat_log(first)  # nobody watched it end
            else:
                for node in range(1, self.limits.nodes):
                    self._create_node(pod_request_obj, first, node)
        except ApiException as error:
            raise explained(error) from None
        return first

    def await_pod_start(self, pod: V1Pod) -> None:
        try:
            while not check_start(self._pods(), self.limits):
                time.sleep(LOOK_SECONDS)
        except NotStarted as problem:
            self._give_up(str(problem))

    def await_pod_completion(self, pod: V1Pod) -> None:
        """Repeat the logs of all nodes until the stage is over; unlike the provider's stream, no line twice."""
        while True:
            pods = self._pods()
            for each in pods:
                self._repeat_log(each)
            if self.watch.over(pods):
                break
            time.sleep(LOOK_SECONDS)
        if not any(ending_of(each) for each in pods if node_of(each) == 0):
            raise AirflowException("the gang is broken")  # cleanup says why

    def cleanup(
        self,
        pod: V1Pod,
        remote_pod: V1Pod,
        xcom_result: dict[str, Any] | None = None,
        context: Context | None = None,
    ) -> None:
        """Remove what has ended, and say how. What still runs is left for the retry: then the watcher failed, not the stage."""
        if self.pod is None or self.stopped or isinstance(sys.exc_info()[1], AirflowTaskTimeout):
            return
        found = {node_of(each): each for each in self._pods()}
        if not self.watch.over(found.values()):
            return
        endings = [self._ending(found.get(node), node) for node in range(self.watch.nodes)]
        self._remove()
        if endings[0] and endings[0].code == 0:
            return
        reason = min((ending for ending in endings if ending and ending.code != 0), key=lambda ending: ending.rank)
        kind = Lost if reason.lost else StageEnded
        raise kind(75 if reason.lost else reason.code or 1, reason.lines(self.stage))

    def convert_config_file_to_dict(self) -> None:
        """Send the triggerer this worker's way to the cluster: the provider would send ``KUBECONFIG`` beside what the
        connection names, which its trigger refuses, and nothing where the worker runs in the cluster."""
        hook: Any = self.hook
        if hook.is_in_cluster:
            self.in_cluster = True
        elif not (hook.conn_extras.get("kube_config_path") or hook.conn_extras.get("kube_config")):
            super().convert_config_file_to_dict()  # type: ignore[no-untyped-call]

    def defer(self, *, trigger: BaseTrigger, **kwargs: Any) -> None:  # type: ignore[override]
        """The provider's trigger watches one pod; ours watches the gang."""
        _, arguments = trigger.serialize()
        arguments["trigger_kwargs"] |= {"restarts": self.restarts, "retreats": self.retreats}
        super().defer(trigger=GangTrigger(gang=self.gang, limits=vars(self.limits), **arguments), **kwargs)

    def trigger_reentry(self, context: Context, event: dict[str, Any]) -> None:
        self.restarts = event.get("restarts", self.restarts)
        self.retreats = event.get("retreats", self.retreats)
        self.namespace = event["namespace"]
        self.get_logs = False  # the trigger has repeated them
        found = {node_of(pod): pod for pod in self._pods()}
        self.pod = found.get(0)
        self.waiting_since = min(map(waiting_since, found.values()), default=self.waiting_since)
        match event["status"]:
            case "timeout":
                self._give_up(event["message"])
            case "success" if self.pod is None:
                return
            case "success":
                super().trigger_reentry(context, event)
            case "error" if self.pod is not None and not ending_of(self.pod):
                self._wait_on(context, event)
            case _:
                self.pod = self.pod or V1Pod()
                self.watch.broken_since = -math.inf
                self.cleanup(self.pod, self.pod, context=context)
                raise AirflowException(f"cvf {self.stage}: the triggerer stopped watching ({event['message']})")

    def _wait_on(self, context: Context, event: dict[str, Any]) -> None:
        """The triggerer could not look, the pods run: it looks again, so many times that an outage of minutes costs nothing."""
        errors = event.get("errors", 0) + 1
        if errors > MOST_ERRORS:
            raise AirflowException(f"cvf {self.stage}: the triggerer cannot watch the pods: {event['message']}")
        self.log.warning("the triggerer could not look after the pods: %s", event["message"])
        self.trigger_kwargs = {"errors": errors}
        self.invoke_defer_method(context=context)

    def _left_by_an_earlier_try(self) -> V1Pod | None:
        """The first pod that is there; None where there is none, or once one that has failed or did other work is gone."""
        first = self._read(self.gang)
        if first is None:
            return None
        same = (first.metadata.annotations or {}).get(WORK) == self.work
        if same and first.metadata.deletion_timestamp is None and first.status.phase != "Failed":
            self.log.info("rejoining pod %s, which an earlier try has started (%s)", self.gang, first.status.phase)
            self.waiting_since = waiting_since(first)
            return first
        self.log.info("an earlier try has left pod %s; a new one takes its place", self.gang)
        self._remove()
        return None

    def _create_node(self, request: V1Pod, first: V1Pod, node: int) -> None:
        pod = copy.deepcopy(request)
        pod.metadata.name = f"{self.gang}-{node}"
        pod.metadata.labels[f"{LABEL}node"] = str(node)
        owner = V1OwnerReference(api_version="v1", kind="Pod", name=self.gang, uid=first.metadata.uid)
        pod.metadata.owner_references = [owner]
        _set_env(pod, "PET_NODE_RANK", str(node))
        _set_env(pod, "CVF_GANG", first.metadata.uid)
        found = self._read(pod.metadata.name)
        if found and found.metadata.owner_references[0].uid == first.metadata.uid:
            return
        if found:
            self._delete(found)
            self._await_gone([found])
        self._create(pod)

    def _create(self, pod: V1Pod) -> V1Pod:
        """Create a pod; one that is already there is ours, because only this task makes this name."""
        try:
            return self._post(pod)
        except ApiException as error:
            if error.status == 409 and (found := self._read(pod.metadata.name)):
                return found
            if pod.metadata.name != self.gang:
                self._remove()
            raise

    @patiently
    def _post(self, pod: V1Pod) -> V1Pod:
        return self.client.create_namespaced_pod(pod.metadata.namespace, pod)

    def _give_up(self, problem: str) -> None:
        """Remove pods that did not start.

        Raises:
            NotStarted: some had room, others not: try again later.
            AirflowException: with the words of Kubernetes.
        """
        words = ""
        try:
            with suppress(ApiException, HTTPError):  # without a right to read events, the pods must still go
                words = "; ".join(dict.fromkeys(filter(None, map(self._waits_for, self._pods()))))
        finally:
            self._remove()
            self.pod = None
        if problem == "retreat" and time.time() - self.waiting_since < self.limits.schedule_timeout:
            raise NotStarted(problem)
        match problem:
            case "room" | "retreat":
                line = f"no room for {self._count()} within {self.limits.schedule_timeout} s (runtime.schedule_timeout)"
            case "start":
                line = (
                    f"{self._count()} with room, not started within {self.limits.startup_timeout} s (runtime.startup_timeout)"
                )
            case "broken":
                line = f"{self._count()} cannot start"
            case other:
                line = other
        raise AirflowException(f"cvf {self.stage}: {line}" + (f": {words}" if words else ""))

    def _count(self) -> str:
        return f"{self.limits.nodes} pod{'s' if self.limits.nodes > 1 else ''}"

    def _waits_for(self, pod: V1Pod) -> str:
        """Why a pod has not started, in the words of the scheduler, of the container's state or of the last warning."""
        for condition in pod.status.conditions or []:
            if condition.type == "PodScheduled" and condition.status != "True":
                return str(condition.message or condition.reason or "")
        waiting = [item.state.waiting for item in pod.status.container_statuses or [] if item.state.waiting]
        told = [f"{item.reason}: {' '.join(item.message.split())}" for item in waiting if item.message]
        if told or pod.status.phase == "Running":
            return "".join(told[:1])
        events = self.client.list_namespaced_event(
            self.namespace, field_selector=f"involvedObject.uid={pod.metadata.uid}"
        ).items
        warnings = [event for event in events if event.type == "Warning" and event.message]
        last = max(warnings, key=lambda event: event.last_timestamp or event.metadata.creation_timestamp, default=None)
        return f"{last.reason}: {' '.join(last.message.split())}" if last else ""

    def _ending(self, pod: V1Pod | None, node: int) -> Ending | None:
        return ending_of(pod) if pod else replace(GONE, node=node)

    @patiently
    def _repeat_log(self, pod: V1Pod) -> None:
        node = node_of(pod)
        try:
            log = self.client.read_namespaced_pod_log(
                pod.metadata.name,
                self.namespace,
                container=self.stage,
                timestamps=True,
                since_seconds=self.watch.seconds_to_read(node),
                _preload_content=False,
            )
        except ApiException:  # its container has not started, or is gone
            return
        for line in self.watch.new_lines(node, log.data.decode(errors="replace").splitlines()):
            self.log.info("[%s] %s", tag(self.stage, node), line)

    def _require_queue(self, namespace: str, queue: str) -> None:
        """Kueue leaves pods of an unknown queue waiting for ever."""
        groups = {group.name: group for group in ApisApi(self.client.api_client).get_api_versions().groups}
        if GROUP not in groups:
            raise AirflowFailException(f"runtime.queue: {queue!r} given; this cluster has no Kueue")
        version = groups[GROUP].preferred_version.version
        try:
            found = CustomObjectsApi(self.client.api_client).list_namespaced_custom_object(
                GROUP, version, namespace, "localqueues"
            )
        except ApiException as error:
            if error.status == 403:  # no right to look: let Kueue judge
                return
            raise
        known = sorted(item["metadata"]["name"] for item in found["items"])
        if queue not in known:
            allowed = ", ".join(known) or "none is there"
            raise AirflowFailException(f"runtime.queue: {queue!r} given; allowed in namespace {namespace}: {allowed}")

    @patiently
    def _pods(self) -> list[V1Pod]:
        found = self.client.list_namespaced_pod(self.namespace, label_selector=f"{LABEL}gang={self.gang}").items
        return sorted(found, key=node_of)

    @patiently
    def _read(self, name: str) -> V1Pod | None:
        try:
            return self.client.read_namespaced_pod(name, self.namespace)
        except ApiException as error:
            if error.status != 404:
                raise
            return None

    def _remove(self) -> None:
        """Delete the gang and wait until it is gone: nothing of it works on when the next one starts."""
        if not self.namespace:
            return
        pods = self._pods()
        for pod in pods:
            self._delete(pod)
        self._await_gone(pods)

    @patiently
    def _delete(self, pod: V1Pod) -> None:
        try:
            self.client.delete_namespaced_pod(pod.metadata.name, self.namespace, body=deletion_of(pod))
        except ApiException as error:
            if error.status not in {404, 409}:
                raise

    def _await_gone(self, pods: list[V1Pod]) -> None:
        """Wait for deleted pods. One that has ended goes at once when it is deleted again; its kubelet may take a minute."""
        patience = max((pod.spec.termination_grace_period_seconds or 0 for pod in pods), default=0) + 60
        deadline = time.monotonic() + patience
        while left := [found for pod in pods if (found := self._still_there(pod))]:
            if time.monotonic() > deadline:
                raise AirflowException(
                    f"pod {left[0].metadata.name} does not end within {patience} s; is its machine gone? Delete it by --force"
                )
            for pod in left:
                if pod.status.phase in {"Succeeded", "Failed"}:
                    self._delete(pod)
            time.sleep(0.2)

    def _still_there(self, pod: V1Pod) -> V1Pod | None:
        found = self._read(pod.metadata.name)
        return found if found and found.metadata.uid == pod.metadata.uid else None


class GangTrigger(KubernetesPodTrigger):
    """The provider's trigger, looking at all pods of a gang.

    :param gang: label that the pods share
    :param limits: fields of :class:`Limits`
    """

    def __init__(self, *, gang: str, limits: dict[str, int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.gang = gang
        self.limits = limits
        self.watch = Watch(limits["nodes"])

    def serialize(self) -> tuple[str, dict[str, Any]]:
        _, arguments = super().serialize()
        return f"{__name__}.{type(self).__name__}", {**arguments, "gang": self.gang, "limits": self.limits}

    async def _wait_for_pod_start(self) -> Any:
        while not check_start(await self._pods(), Limits(**self.limits)):
            await asyncio.sleep(self.poll_interval)
        return None

    async def _wait_for_container_completion(self) -> TriggerEvent:
        while True:
            self._check_deadline()
            pods = await self._pods()
            for pod in pods:
                await self._repeat_log(pod)
            if self.watch.over(pods):
                ending = next((ending_of(pod) for pod in pods if node_of(pod) == 0), None)
                return self._event("success" if ending and ending.code == 0 else "failed")
            await asyncio.sleep(self.poll_interval)

    async def on_kill(self) -> None:
        """A person ended the task: delete every pod of the gang, not the first alone, whose others would wait for its end."""
        if not self._fired_event:
            for pod in await self._pods():
                await self._delete(pod)

    def _event(self, status: str) -> TriggerEvent:
        event = {"status": status, "namespace": self.pod_namespace, "name": self.pod_name, "message": "", **self.trigger_kwargs}
        return TriggerEvent(event)  # type: ignore[no-untyped-call]

    def _check_deadline(self) -> None:
        deadline = self.trigger_kwargs.get("_execution_deadline")
        if deadline is not None and time.time() >= deadline:
            raise PodLaunchTimeoutException("stopped at the task's execution_timeout")

    @patiently
    async def _pods(self) -> list[Any]:
        try:
            async with self.hook.get_conn() as connection:
                api = async_client.CoreV1Api(connection)
                found = await api.list_namespaced_pod(self.pod_namespace, label_selector=f"{LABEL}gang={self.gang}")
        except TimeoutError as error:  # the provider would take it for the end of the task's time
            raise KubernetesApiException("no answer in time") from error
        return sorted(found.items, key=node_of)

    @patiently
    async def _delete(self, pod: Any) -> None:
        async with self.hook.get_conn() as connection:
            api = async_client.CoreV1Api(connection)
            try:
                await api.delete_namespaced_pod(pod.metadata.name, self.pod_namespace, body=deletion_of(pod))
            except async_client.ApiException as error:
                if error.status not in {404, 409}:
                    raise

    async def _repeat_log(self, pod: Any) -> None:
        name, node = pod.metadata.name, node_of(pod)
        try:
            log = await self.hook.read_logs(
                name, self.pod_namespace, self.base_container_name, self.watch.seconds_to_read(node)
            )
        except async_client.ApiException:  # its container has not started, or is gone
            return
        for line in self.watch.new_lines(node, log):
            self.log.info("[%s] %s", tag(self.base_container_name, node), line)


def deletion_of(pod: V1Pod) -> V1DeleteOptions:
    """Delete this very pod, not one that has taken its name since."""
    options = V1DeleteOptions(preconditions=V1Preconditions(uid=pod.metadata.uid))
    if pod.status.phase == "Pending":  # nothing runs in it, and an older kubelet takes a minute to notice that it should go
        options.grace_period_seconds = 0
    return options


def explained(error: ApiException) -> AirflowException:
    """Why pods could not be created; a wrong setting or a missing right is not tried again."""
    words = _words(error)
    lasting = error.status in {400, 403, 404, 422} and "exceeded quota" not in words
    return AirflowFailException(words) if lasting else AirflowException(words)


def _words(error: ApiException) -> str:
    """The API server's own words, in one line."""
    words = str(error.reason)
    with suppress(ValueError, TypeError, AttributeError, KeyError):
        words = json.loads(error.body)["message"]
    return f"Kubernetes: {' '.join(words.split())}"


def _set_env(pod: V1Pod, name: str, value: str) -> None:
    container = pod.spec.containers[0]
    container.env = [item for item in container.env or [] if item.name != name] + [V1EnvVar(name=name, value=value)]


def _under_dags_test() -> bool:
    """``dag.test()`` runs tasks in its own process and has no triggerer."""
    from airflow.sdk.execution_time import task_runner

    return type(getattr(task_runner, "SUPERVISOR_COMMS", None)).__name__ == "InProcessSupervisorComms"


def _task_state(context: Context) -> str | None:
    """What Airflow's API server says of this task; ``running`` where it cannot be asked: then nothing is removed."""
    ti: Any = context["ti"]
    ask: Callable[..., dict[str, dict[str, str | None]]] = ti.get_task_states
    with suppress(Exception):
        states = ask(dag_id=ti.dag_id, task_ids=[ti.task_id], run_ids=[ti.run_id], map_index=ti.map_index)
        return next(iter(states.get(ti.run_id, {}).values()), "removed")
    return "running"
