"""How a container serves: from its environment, as SageMaker and Kubernetes hand it over."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, ValidationError

from cv_factory_ops.errors import ConfigError
from cv_factory_ops.records import Frozen

VARIABLES = {
    "CVF_ENGINE": "engine",
    "OMP_NUM_THREADS": "threads",
    "CVF_BATCH_SIZE": "batch_size",
    "CVF_BATCH_WAIT_MS": "batch_wait_ms",
    "CVF_MOST_IN_FLIGHT": "most_in_flight",
    "CVF_MOST_IMAGES": "most_images",
}


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class ServingSettings(Frozen):
    """Read from the environment; what is not set there has these defaults."""

    engine: Literal["openvino", "torch"] = "openvino"
    """What runs the network; the default is the fastest of those measured in ``benchmarks/engines.py``."""
    threads: int = Field(default_factory=_processors, ge=1, le=1024)
    """Threads of the network, and of decoding; the processors that this process may use. A container with a CPU quota should
    set it: the quota is not seen."""
    batch_size: int = Field(default=16, ge=1, le=1024)
    """Most images that the network answers at a time."""
    batch_wait_ms: float = Field(default=2.0, ge=0, le=1000)
    """Longest that an image waits for others that are being decoded; nothing waits where none is."""
    most_in_flight: int = Field(default=256, ge=1)
    """Requests in hand above which others are refused as ``busy``: together with the largest body it bounds memory."""
    most_images: int = Field(default=256, ge=1)
    """Images of one request."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> ServingSettings:
        """The settings that this process was started with.

        Raises:
            ConfigError: a variable has a value that is not allowed.
        """
        given = {field: environment[name] for name, field in VARIABLES.items() if environment.get(name)}
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            name = next(name for name, field in VARIABLES.items() if field == first["loc"][0])
            raise ConfigError(f"{name}: {str(first['input'])[:40]!r} given; {first['msg'].lower()}") from None
