"""Clients that each send their next request when the last one is answered.

    python -m benchmarks.load PORT PATH BODY TYPE CLIENTS SECONDS      # SIGTERM ends it earlier

Servers and clients share the processors, so this is one process with one thread that sends the same bytes again and again and
reads no more of an answer than its status and its length. It prints what it has seen as JSON, with its own processor time.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

HOST = "127.0.0.1"
LONGEST_ANSWER = 60.0
"""Seconds."""


@dataclass
class Seen:
    """What all clients have seen together."""

    latencies: list[float] = field(default_factory=list)
    """Seconds of each request that was answered by 200."""
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0
    cpu: float = 0.0
    """Processor time of this process."""


class Client:
    """One connection, opened again where it breaks."""

    def __init__(self, port: int, request: bytes, seen: Seen) -> None:
        self._port, self._request, self._seen = port, request, seen
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def run(self, until: float, stopped: asyncio.Event) -> None:
        while time.perf_counter() < until and not stopped.is_set():
            sent = time.perf_counter()
            try:
                async with asyncio.timeout(LONGEST_ANSWER):
                    status, answer = await self._ask()
            except (OSError, EOFError, TimeoutError) as error:
                self._failed(f"{type(error).__name__} {error}")
                await asyncio.sleep(0.05)
                continue
            if status == 200:
                self._seen.latencies.append(time.perf_counter() - sent)
            else:
                self._failed(f"{status} {answer[:200]!r}")
        self._close()

    async def _ask(self) -> tuple[int, bytes]:
        self._streams = self._streams or await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = re.search(rb"content-length: *(\d+)", head)
        if length is None:
            raise OSError("an answer without its length")
        answer = await reader.readexactly(int(length[1]))
        if b"connection: close" in head:
            self._close()
        return int(head.split(b" ", 2)[1]), answer

    def _failed(self, reason: str) -> None:
        self._seen.failures.append(reason)
        self._close()

    def _close(self) -> None:
        if self._streams:
            self._streams[1].close()
        self._streams = None


def request(path: str, body: bytes, content_type: str) -> bytes:
    """As it goes over the wire."""
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def load(port: int, content: bytes, clients: int, seconds: float) -> Seen:
    """The load of so many clients for so long, or until SIGTERM."""
    seen, stopped = Seen(), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    began, used = time.perf_counter(), time.process_time()
    await asyncio.gather(*(Client(port, content, seen).run(began + seconds, stopped) for _ in range(clients)))
    seen.seconds, seen.cpu = time.perf_counter() - began, time.process_time() - used
    return seen


def main() -> None:
    port, path, body, content_type, clients, seconds = sys.argv[1:]
    content = request(path, Path(body).read_bytes(), content_type)
    print(json.dumps(asdict(asyncio.run(load(int(port), content, int(clients), float(seconds))))))


if __name__ == "__main__":
    main()
