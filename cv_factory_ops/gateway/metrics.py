"""What the gateway counts, for Prometheus. Labels are names of ours alone: routes, codes, states."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST

from cv_factory_ops.server import LATENCY_BUCKETS

CIRCUIT = {"closed": 0, "half_open": 1, "open": 2}


class Metrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Histogram(
            "cvf_gateway_request_seconds",
            "Time from a request's head to its answer",
            ("route", "status"),
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self.in_flight = Gauge("cvf_gateway_in_flight", "Requests in hand", registry=self._registry)
        self.errors = Counter("cvf_gateway_errors", "Refusals and failures by their code", ("code",), registry=self._registry)
        self.tries = Histogram(
            "cvf_gateway_endpoint_seconds",
            "Time of one try of the endpoint",
            ("outcome",),
            buckets=LATENCY_BUCKETS,
            registry=self._registry,
        )
        self.retries = Counter("cvf_gateway_retries", "Tries after the first one of a request", registry=self._registry)
        self.circuit = Gauge(
            "cvf_gateway_circuit_state", "Of the endpoint: 0 closed, 1 half open, 2 open", registry=self._registry
        )
        self.labels = Counter("cvf_gateway_labels", "Late labels that were stored", registry=self._registry)

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
