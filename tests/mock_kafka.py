"""librdkafka's mock cluster (``test.mock.num.brokers``) in a process of its own, which can end as brokers do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Self

CLUSTER = """
import sys
from confluent_kafka import Producer

owner = Producer({"test.mock.num.brokers": 2, "log_level": 0})
print(",".join(f"{broker.host}:{broker.port}" for broker in owner.list_topics(timeout=10).brokers.values()), flush=True)
sys.stdin.read()
"""


class MockCluster:
    """A cluster of two brokers, which makes topics of four partitions as they are asked for, in a ``with`` block."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.bootstrap_servers = self._process.stdout.readline().strip()
        assert self.bootstrap_servers, "the mock cluster did not start"
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def freeze(self) -> None:
        """Connections stay, nobody answers."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def kill(self) -> None:
        """All brokers are gone."""
        self._process.kill()
        self._process.communicate()
