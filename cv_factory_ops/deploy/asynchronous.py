"""Asynchronous inference: requests whose input lies on storage, kept on disk until their answer lies there too.

A request is accepted once its file is written; a server that comes back after a crash goes on with what is left, so an
answer may be computed, and written, twice.
https://docs.aws.amazon.com/sagemaker/latest/dg/async-inference-how-it-works.html
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from cv_factory_ops import storage
from cv_factory_ops.deploy.shelf import Item, Place, ServiceError
from cv_factory_ops.errors import CvFactoryError

log = logging.getLogger("cvf")

CONCURRENT = 4
"""Requests of an endpoint in hand at a time, where ``MaxConcurrentInvocationsPerInstance`` is not given."""
TIME_TO_LIVE, TIMEOUT = 6 * 3600, 900
"""Seconds that a request may wait, and that its answer may take, where it does not say."""
RETRY_SECONDS = 5
PREFIX = "x-amzn-sagemaker-"
PASSED_ON = ("content-type", "accept", "custom-attributes")
Invoke = Callable[[str, bytes, dict[str, str], float], Awaitable[bytes]]
"""Endpoint, body, headers, seconds -> the answer."""


class AsyncRequests:
    """The requests of all endpoints, each a file below ``folder`` until it is answered."""

    def __init__(self, folder: Path, invoke: Invoke, require_place: Place) -> None:
        self._folder, self._invoke, self._require_place = folder, invoke, require_place
        self._places: dict[str, asyncio.Semaphore] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> None:
        """Go on with what the last server left, oldest first."""
        for path in sorted(self._folder.glob("*.json")):
            self.start(json.loads(path.read_bytes()))

    async def close(self) -> None:
        """Leave off; what is not answered stays on disk."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def keep(self, endpoint: str, config: Mapping[str, Item], headers: Mapping[str, str]) -> Item:
        """Write a request to disk; returns it, for :meth:`start`, with the places of answer and failure.

        Raises:
            ServiceError: it names no input that may be read, or the endpoint no place for outputs.
        """
        given = {name.removeprefix(PREFIX): value for name, value in headers.items() if name.startswith(PREFIX)}
        self._require_place("InputLocation", given.get("inputlocation", ""))
        output = config.get("OutputConfig", {})
        if not output.get("S3OutputPath"):
            raise ServiceError(f"Endpoint {endpoint}: its AsyncInferenceConfig names no S3OutputPath", "ValidationError")
        request_id = str(uuid.uuid4())
        request: Item = {
            "Endpoint": endpoint,
            "InferenceId": given.get("inference-id") or request_id,
            "InputLocation": given["inputlocation"],
            "OutputLocation": f"{output['S3OutputPath'].rstrip('/')}/{request_id}.out",
            "Headers": {_header(name): given[name] for name in PASSED_ON if name in given},
            "Expires": time.time() + float(given.get("requestttlseconds", TIME_TO_LIVE)),
            "Timeout": float(given.get("invocationtimeoutseconds", TIMEOUT)),
            "Concurrent": config.get("ClientConfig", {}).get("MaxConcurrentInvocationsPerInstance", CONCURRENT),
        }
        if failures := output.get("S3FailurePath"):
            request["FailureLocation"] = f"{failures.rstrip('/')}/{request_id}-error.out"
        request["File"] = f"{time.time_ns()}-{request_id}.json"
        storage.write_bytes((self._folder / request["File"]).resolve().as_uri(), json.dumps(request).encode())
        return request

    def start(self, request: Item) -> None:
        """Work on a request that is on disk."""
        task = asyncio.create_task(self._serve(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, request: Item) -> None:
        """Answer one request, however long its storage is out of reach."""
        places = self._places.setdefault(request["Endpoint"], asyncio.Semaphore(request["Concurrent"]))
        async with places:
            location, content = await self._outcome(request)
            while location:
                try:
                    await asyncio.to_thread(storage.write_bytes, location, content)
                    break
                except CvFactoryError as error:
                    log.warning("async: %s", error)
                    await asyncio.sleep(RETRY_SECONDS)
            (self._folder / request["File"]).unlink()

    async def _outcome(self, request: Item) -> tuple[str, bytes]:
        """Where to write what; an empty place where failures are not wanted."""
        try:
            if time.time() > request["Expires"]:
                raise ServiceError("The request was not processed within RequestTTLSeconds")
            body = await asyncio.to_thread(storage.read_bytes, request["InputLocation"])
            answer = await self._invoke(request["Endpoint"], body, request["Headers"], request["Timeout"])
        except (ServiceError, CvFactoryError) as error:
            log.warning("async: endpoint %s: a request failed (%s)", request["Endpoint"], type(error).__name__)
            return request.get("FailureLocation", ""), str(error).encode()
        return request["OutputLocation"], answer


def _header(name: str) -> str:
    """The container's header of a header of the request."""
    return f"{PREFIX}{name}" if name == "custom-attributes" else name
