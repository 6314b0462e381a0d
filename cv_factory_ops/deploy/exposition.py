"""One page of metrics for all containers of an endpoint server: Prometheus cannot reach their ports, which come and go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST as CONTENT_TYPE_LATEST
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from cv_factory_ops.deploy.traffic import Traffic
from cv_factory_ops.deploy.variants import Variant

Place = tuple[str, str, str]
"""Endpoint, fleet (``blue`` serves, ``green`` is to replace it), variant."""


async def exposition(traffic: Mapping[str, Traffic]) -> bytes:
    """What the containers tell, each sample with the labels ``endpoint``, ``fleet`` and ``variant``; a container that does not
    answer is left out."""
    containers = dict(_containers(traffic))
    pages = await asyncio.gather(*(variant.metrics() for variant in containers.values()))
    registry = CollectorRegistry()
    registry.register(_Merged({place: page for place, page in zip(containers, pages, strict=True) if page}))
    return generate_latest(registry)


def _containers(traffic: Mapping[str, Traffic]) -> Iterable[tuple[Place, Variant]]:
    for endpoint, shared in traffic.items():
        for colour, fleet in (("blue", shared.blue), ("green", shared.green)):
            for name, variant in (fleet.variants if fleet else {}).items():
                yield (endpoint, colour, name), variant


class _Merged(Collector):
    """Families of many pages, each told once."""

    def __init__(self, pages: Mapping[Place, str]) -> None:
        self._pages = pages

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for place, page in self._pages.items():
            labels = dict(zip(("endpoint", "fleet", "variant"), place, strict=True))
            for found in text_string_to_metric_families(page):
                family = families.setdefault(found.name, Metric(found.name, found.documentation, found.type))
                for sample in found.samples:
                    family.add_sample(sample.name, sample.labels | labels, sample.value)
        return families.values()
