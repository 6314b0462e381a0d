"""What a container counts, for Prometheus. Labels are names of ours and of the bundle alone: codes, kinds, labels, digests."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST

from cv_factory_ops.answers import Prediction
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.server import LATENCY_BUCKETS

_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_SCORES = tuple(i / 10 for i in range(1, 11))


class Metrics:
    """The metrics of one container, in a registry of their own."""

    def __init__(self, bundle: Bundle, engine: str) -> None:
        self._registry = registry = CollectorRegistry()
        self.seconds = Histogram(
            "cvf_serving_request_seconds",
            "Time from a request's head to its answer",
            ("kind", "status"),
            buckets=LATENCY_BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("cvf_serving_in_flight", "Requests in hand", registry=registry)
        self.errors = Counter("cvf_serving_errors", "Refusals and failures by their code", ("code",), registry=registry)
        self.batches = Histogram(
            "cvf_serving_batch_images", "Images that the network answered at a time", buckets=_BATCHES, registry=registry
        )
        self.scores = Histogram("cvf_serving_score", "Scores of answers", ("label",), buckets=_SCORES, registry=registry)
        self.abstained = Counter("cvf_serving_abstained", "Answers less certain than the bundle demands", registry=registry)
        described = {"project": bundle.manifest.project, "digest": bundle.digest, "engine": engine}
        Info("cvf_serving_model", "The bundle that answers", registry=registry).info(described)

    def count(self, predictions: Sequence[Prediction]) -> None:
        """Answers that were given."""
        for prediction in predictions:
            self.scores.labels(prediction.label).observe(prediction.score)
            if prediction.abstained:
                self.abstained.inc()

    def text(self) -> bytes:
        """Prometheus' text format."""
        return generate_latest(self._registry)
