"""InvokeEndpoint, real or local, for an event loop: tried again within a budget, left alone while it is not there.

boto3 in a thread: side by side with a signing ``httpx`` client and with ``aiobotocore`` it took 0.1 to 0.2 ms more a request
(p50 of 300, 150 kB) and needs nothing that is not here already; ``benchmarks/gateway.py`` measures the whole.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.deploy.sagemaker import session
from cv_factory_ops.gateway.metrics import CIRCUIT, Metrics
from cv_factory_ops.server import Refused

SERVING = {"InService", "Updating", "SystemUpdating", "RollingBack"}
"""States of an endpoint in which it answers."""
READY_SECONDS = 5.0
"""How long a description of the endpoint is believed."""
THROTTLED = {"ThrottlingException", "Throttling", "TooManyRequestsException"}
CODE = re.compile(r"[a-z_]{1,40}")


class Reply(NamedTuple):
    """What the model answered."""

    body: bytes
    content_type: str


class NoAnswer(Refused):
    """The endpoint has not answered this try."""

    def __init__(self, status: int, code: str, message: str, *, retriable: bool, outage: bool) -> None:
        super().__init__(status, code, message)
        self.retriable = retriable
        """Another try may help, and does no harm."""
        self.outage = outage
        """It speaks for an endpoint that is not there, rather than for one that is busy."""


class Breaker:
    """Opens after so many tries in a row without an answer; then, after a while, one request tries for all (half open).

    M. Nygard, Release It!, 2nd edition, section 5.2. For one event loop: no lock.
    """

    def __init__(self, failures: int, open_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed, self._open_seconds, self._clock = failures, open_seconds, clock
        self._failures, self._opened, self._is_probing = 0, 0.0, False

    @property
    def state(self) -> str:
        """``closed``, ``half_open`` or ``open``."""
        if self._failures < self._allowed:
            return "closed"
        return "open" if self._clock() < self._opened + self._open_seconds else "half_open"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Around a try: any answer, also a refusal, closes the circuit.

        Raises:
            NoAnswer: ``circuit_open``: nothing is tried.
        """
        state = self.state
        is_probe = state == "half_open"
        if state == "open" or (is_probe and self._is_probing):
            raise NoAnswer(503, "circuit_open", "the endpoint has not answered for a while", retriable=False, outage=False)
        self._is_probing = self._is_probing or is_probe
        try:
            yield
        except NoAnswer as error:
            if error.outage:
                self._failures, self._opened = self._failures + 1, self._clock()
            raise
        except Refused:
            self._failures = 0
            raise
        else:
            self._failures = 0
        finally:
            self._is_probing = self._is_probing and not is_probe


class RetryBudget:
    """Retries that requests together may cause, as a share of them, with some in hand to begin with (gRPC's proposal A6)."""

    MOST = 10.0

    def __init__(self, share: float) -> None:
        self._share, self._left = share, self.MOST if share else 0.0

    def earn(self) -> None:
        """A request comes."""
        self._left = min(self.MOST, self._left + self._share)

    def spend(self) -> bool:
        """Whether there is a retry left, which then is gone."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Endpoint:
    """The project's endpoint."""

    def __init__(self, config: ProjectConfig, metrics: Metrics) -> None:
        """
        Raises:
            ConfigError: no AWS region is set.
            Unavailable: the local endpoint cannot be started.
        """
        gateway, aws = config.gateway, session(config)
        once: Any = {"total_max_attempts": 1}  # the retries are ours: botocore's know no budget
        settings = Config(
            retries=once,
            connect_timeout=3,
            read_timeout=gateway.timeout,
            max_pool_connections=gateway.in_flight,
            parameter_validation=False,
        )
        self._runtime = aws.client("sagemaker-runtime", config=settings)
        self._control = aws.client("sagemaker", config=Config(retries=once, connect_timeout=3, read_timeout=3))
        self._name, self._attempts, self._metrics = config.endpoint_name, gateway.attempts, metrics
        self._budget = RetryBudget(gateway.retry_share)
        self._threads = ThreadPoolExecutor(gateway.in_flight, thread_name_prefix="invoke")
        self._describer = ThreadPoolExecutor(1, thread_name_prefix="describe")  # else it waits behind slow answers
        self._timeout, self._places = gateway.timeout, asyncio.Semaphore(gateway.in_flight)
        self._described, self._status = -READY_SECONDS, ""
        self.breaker = Breaker(gateway.failures, gateway.open_seconds)

    async def invoke(self, body: bytes, content_type: str, inference_id: str, accept: str, more: str = "") -> Reply:
        """The model's answer; ``more`` is what it shall come with, ``explain=<method>`` or ``similar=<number>``.

        Raises:
            Refused: as the model refuses; of class :class:`NoAnswer` where there is no answer.
        """
        request = {"EndpointName": self._name, "Body": body, "ContentType": content_type, "Accept": accept}
        request |= {"InferenceId": inference_id} | ({"CustomAttributes": more} if more else {})
        self._budget.earn()
        tries = AsyncRetrying(
            stop=stop_after_attempt(self._attempts),
            wait=wait_random_exponential(multiplier=0.05, max=1),
            retry=retry_if_exception(self._may_try_again),
            reraise=True,
        )
        reply: Reply = await tries(self._try, request)
        return reply

    async def status(self) -> str:
        """Of the endpoint, as SageMaker tells it: ``InService`` and so on; ``unreachable`` where nobody tells."""
        if time.monotonic() >= self._described + READY_SECONDS:
            self._status = await asyncio.get_running_loop().run_in_executor(self._describer, self._describe)
            self._described = time.monotonic()
        return self._status

    def close(self) -> None:
        """Let what is under way end."""
        self._threads.shutdown()
        self._describer.shutdown()

    async def _try(self, request: dict[str, Any]) -> Reply:
        """Once there is room: a try that waited in a thread's queue would not notice that the circuit opens."""
        try:
            async with asyncio.timeout(self._timeout):
                await self._places.acquire()
        except TimeoutError:
            raise Refused(503, "busy", "other studies keep the endpoint busy; try again later") from None
        try:
            return await self._try_now(request)
        finally:
            self._places.release()

    async def _try_now(self, request: dict[str, Any]) -> Reply:
        started, outcome = time.perf_counter(), "answered"
        try:
            with self.breaker.watching():
                return await asyncio.get_running_loop().run_in_executor(self._threads, self._invoke, request)
        except Refused as error:
            outcome = error.code if isinstance(error, NoAnswer) else "refused"
            raise
        finally:
            self._metrics.tries.labels(outcome).observe(time.perf_counter() - started)
            self._metrics.circuit.set(CIRCUIT[self.breaker.state])

    def _may_try_again(self, error: BaseException) -> bool:
        if not (isinstance(error, NoAnswer) and error.retriable and self._budget.spend()):
            return False
        self._metrics.retries.inc()
        return True

    def _invoke(self, request: dict[str, Any]) -> Reply:
        try:
            answer = self._runtime.invoke_endpoint(**request)
            return Reply(answer["Body"].read(), answer["ContentType"])
        except ClientError as error:
            raise _explained(error) from None
        except ReadTimeoutError:
            raise NoAnswer(504, "timeout", "the endpoint took too long", retriable=False, outage=True) from None
        except (EndpointConnectionError, ConnectionClosedError, ConnectTimeoutError):
            raise NoAnswer(503, "unreachable", "the endpoint cannot be reached", retriable=True, outage=True) from None
        except BotoCoreError as error:
            raise _misconfigured(type(error).__name__) from None

    def _describe(self) -> str:
        try:
            return str(self._control.describe_endpoint(EndpointName=self._name)["EndpointStatus"])
        except ClientError as error:
            return "missing" if "could not find" in str(error).lower() else "unreachable"
        except BotoCoreError:
            return "unreachable"


def _explained(error: ClientError) -> Refused:
    """https://docs.aws.amazon.com/sagemaker/latest/APIReference/API_runtime_InvokeEndpoint.html, "Errors"."""
    answer: Any = error.response
    code, status = answer["Error"].get("Code", ""), answer["ResponseMetadata"]["HTTPStatusCode"]
    if code == "ModelError":
        return _of_the_model(int(answer.get("OriginalStatusCode") or 0), str(answer.get("OriginalMessage", "")))
    if code in THROTTLED or status == 429:
        return NoAnswer(503, "throttled", "the endpoint has too much to do; try again later", retriable=True, outage=False)
    if status >= 500:
        return NoAnswer(503, "unavailable", "the endpoint is not ready", retriable=True, outage=True)
    if "not found" in str(error).lower():
        return NoAnswer(503, "no_endpoint", "there is no such endpoint yet", retriable=False, outage=False)
    return _misconfigured(code)


def _of_the_model(status: int, message: str) -> Refused:
    """What the container said; its words are passed on where they are a refusal of ours, which quotes no values."""
    if status == 0:  # SageMaker's own way to say that its minute is over
        return NoAnswer(504, "timeout", "the endpoint took too long", retriable=False, outage=True)
    try:
        told = json.loads(message)
        code, reason = str(told["code"]), str(told["error"])
    except (ValueError, KeyError, TypeError):
        code, reason = "", ""
    if (400 <= status < 500 or status == 503) and CODE.fullmatch(code):
        return Refused(status, code, reason)
    return Refused(502, "model_error", "the model has failed")


def _misconfigured(kind: str) -> NoAnswer:
    reason = f"the gateway may not ask the endpoint ({kind[:60]})"
    return NoAnswer(502, "misconfigured", reason, retriable=False, outage=False)
