"""The serving processes behind an endpoint: one a production variant, restarted when it dies, drained before it is stopped."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import shutil
import socket
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from cv_factory_ops import bundle, storage
from cv_factory_ops.errors import CvFactoryError

log = logging.getLogger("cvf")

STARTUP_SECONDS = 120
"""How long a container may take to answer /ping where its variant does not say."""
INVOCATION_SECONDS = 60
"""SageMaker's limit for an answer."""
LONGEST_INVOCATION_SECONDS = 3600
"""Its limit for an answer that nobody waits for, of an asynchronous endpoint."""
STOP_SECONDS = 15


class NotHealthy(Exception):
    """A serving process did not come up; the message is the FailureReason."""


class TooSlow(Exception):
    """A container took longer than it may for an answer."""


class Fleet:
    """The processes of one deployment: a snapshot of an endpoint configuration and its models."""

    def __init__(self, deployment: Mapping[str, Any], folder: Path) -> None:
        self.capture: Mapping[str, Any] | None = deployment["DataCaptureConfig"]
        self.asynchronous: Mapping[str, Any] | None = deployment.get("AsyncInferenceConfig")
        self.variants = {spec["VariantName"]: Variant(spec, folder) for spec in deployment["Variants"]}

    async def start(self) -> None:
        """Return when every variant answers /ping.

        Raises:
            NotHealthy: one does not; the others may run.
        """
        try:
            outcomes = await asyncio.gather(*(variant.start() for variant in self.variants.values()), return_exceptions=True)
        except asyncio.CancelledError:
            await self.stop()
            raise
        for failure in (outcome for outcome in outcomes if isinstance(outcome, BaseException)):
            raise failure

    def choose(self, name: str | None) -> Variant | None:
        """The variant of that name, or one by weight; None where there is none of that name."""
        if name is not None:
            return self.variants.get(name)
        variants = list(self.variants.values())
        return random.SystemRandom().choices(variants, [variant.weight or 1e-9 for variant in variants])[0]

    def weigh(self, weights: Mapping[str, float]) -> None:
        """Share the traffic otherwise, from the next request on."""
        for name, weight in weights.items():
            self.variants[name].weight = weight

    async def drain(self) -> None:
        """Stop once the requests in hand are answered; no new ones may come."""
        await asyncio.gather(*(variant.drain() for variant in self.variants.values()))

    async def stop(self) -> None:
        await asyncio.gather(*(variant.stop() for variant in self.variants.values()))


class Variant:
    """One serving process (``cvf serve``) of a model, on a free port of this machine."""

    def __init__(self, spec: Mapping[str, Any], folder: Path) -> None:
        self.name: str = spec["VariantName"]
        self.weight: float = spec["InitialVariantWeight"]
        self._spec = spec
        self._folder = folder / f"{self.name}-{uuid.uuid4().hex[:12]}"
        self._healthy = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._in_hand = 0
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._url = ""
        limits = httpx.Limits(max_connections=None, keepalive_expiry=30)
        # No proxies and no certificates to load: it only ever talks to this machine, without TLS.
        self._client = httpx.AsyncClient(timeout=LONGEST_INVOCATION_SECONDS, limits=limits, trust_env=False, verify=False)  # noqa: S501

    async def start(self) -> None:
        """Fetch the model, start its process, wait for /ping, and keep it running from then on.

        Raises:
            NotHealthy: the model cannot be had, the process ended or did not answer in time.
        """
        try:
            await asyncio.to_thread(self._fetch)
        except CvFactoryError as error:
            raise NotHealthy(f"Failed to load the model data of production variant {self.name}: {error}") from None
        await self._launch()
        self._keeper = asyncio.create_task(self._keep_running())

    async def invoke(self, body: bytes, headers: Mapping[str, str], seconds: float | None = None) -> httpx.Response:
        """The container's answer, within so many seconds or the service's own limit.

        Raises:
            NotHealthy: the process is not there, and did not come back in time.
            TooSlow: it took too long.
            httpx.TransportError: it went away.
        """
        limit = INVOCATION_SECONDS if seconds is None else seconds
        self._in_hand += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(limit):
                await self._healthy.wait()
                return await self._client.post(f"{self._url}/invocations", content=body, headers=dict(headers))
        except TimeoutError:
            if self._healthy.is_set():
                raise TooSlow from None
            raise NotHealthy(f"variant {self.name} is not healthy") from None
        finally:
            self._in_hand -= 1
            if self._in_hand == 0:
                self._idle.set()

    async def metrics(self) -> str:
        """What the container tells Prometheus; empty where it does not answer at once."""
        try:
            return (await self._client.get(f"{self._url}/metrics", timeout=2)).raise_for_status().text
        except (httpx.HTTPError, RuntimeError):  # RuntimeError: it is being stopped
            return ""

    async def drain(self) -> None:
        await self._idle.wait()
        await self.stop()

    async def stop(self) -> None:
        """End the process (SIGTERM, then SIGKILL) and remove its files."""
        if self._keeper:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
        await self._end()
        await self._client.aclose()
        await asyncio.to_thread(shutil.rmtree, self._folder, ignore_errors=True)

    def _fetch(self) -> None:
        archive = storage.local(self._spec["ModelDataUrl"], self._folder / "download")
        bundle.unpack(archive, self._folder / "model")
        shutil.rmtree(self._folder / "download", ignore_errors=True)

    async def _launch(self) -> None:
        port = _free_port()
        address = ("--host", "127.0.0.1", "--port", str(port))
        # A session of its own: Ctrl-C in the server's terminal must not end it before its requests are answered. It ends
        # with its standard input, which the kernel closes however the server ends.
        with (self._folder / "log").open("wb") as errors:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "cv_factory_ops.cli", "serve", "--model", str(self._folder / "model"), *address),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "OMP_NUM_THREADS": "1", **self._spec["Environment"], "CVF_EXIT_WITH_STDIN": "1"},
                start_new_session=True,
            )
        self._url = f"http://127.0.0.1:{port}"
        seconds = self._spec.get("ContainerStartupHealthCheckTimeoutInSeconds", STARTUP_SECONDS)
        try:
            await asyncio.wait_for(self._until_healthy(), seconds)
        except TimeoutError:
            raise NotHealthy(self._reason(f"did not answer /ping within {seconds} s")) from None

    async def _until_healthy(self) -> None:
        while self._process and self._process.returncode is None:
            with contextlib.suppress(httpx.TransportError):
                if (await self._client.get(f"{self._url}/ping", timeout=2)).is_success:
                    self._healthy.set()
                    return
            await asyncio.sleep(0.05)
        raise NotHealthy(self._reason("ended before it answered"))

    def _reason(self, what: str) -> str:
        lines = (self._folder / "log").read_text(errors="replace").strip().splitlines()
        says = f": {lines[-1][:400]}" if lines else ""
        return f"The primary container for production variant {self.name} did not pass the ping health check: it {what}{says}"

    async def _keep_running(self) -> None:
        """Start the process again whenever it ends by itself."""
        pause = 0.5
        while self._process:
            code = await self._process.wait()
            self._healthy.clear()
            log.warning("variant %s: its serving process ended with code %s; starting another one", self.name, code)
            await asyncio.sleep(pause)
            try:
                await self._launch()
                pause = 0.5
            except (NotHealthy, OSError) as error:  # OSError: no disk space, memory or file handle for now
                log.warning("variant %s: %s", self.name, error)
                await self._end()
                pause = min(2 * pause, 30)

    async def _end(self) -> None:
        self._healthy.clear()
        if self._process and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
