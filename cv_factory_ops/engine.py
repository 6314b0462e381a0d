"""What runs a bundle's network to serve answers and to index images: OpenVINO, compiled from the bundle's weights when it is
loaded, or PyTorch.

``benchmarks/engines.py`` is why. The bundle stays the only source: nothing that was compiled is ever stored.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.models import Classifier
from cv_factory_ops.predictor import Network

if TYPE_CHECKING:
    from openvino import CompiledModel, Core

log = logging.getLogger("cvf")

TOLERANCE = 1e-3
"""Largest difference of logits and embedding, relative to their largest magnitude, from PyTorch's: both calculate in float32,
in another order."""


EngineName = Literal["openvino", "torch"]


@dataclass(frozen=True)
class Engine:
    """What runs the network."""

    name: EngineName
    network: Network


def open_engine(bundle: Bundle, name: EngineName, threads: int) -> Engine:
    """The engine that is asked for. Where OpenVINO cannot run a network as PyTorch does, PyTorch does, and a warning says so.

    PyTorch's own threads are as many as it needs: one beside OpenVINO, which has its own.
    """
    network = bundle.network()
    if name == "openvino":
        torch.set_num_threads(1)
        try:
            return Engine("openvino", _checked(OpenVino(network, _shape(bundle), threads), network, _shape(bundle)))
        except Exception as error:  # of a converter for all networks there are, so any kind
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            log.warning("engine: OpenVINO cannot run this network, PyTorch does, which is slower (%s)", reason)
    torch.set_num_threads(threads)
    return Engine("torch", network)


class OpenVino:
    """A network compiled by OpenVINO in float32: an image's answer does not depend on those it is batched with.

    One thread at a time calculates; others wait.
    """

    def __init__(self, network: Classifier, shape: tuple[int, int, int], threads: int) -> None:
        """``shape``: channels, height and width of an image."""
        self._request = _compiled(network, shape, threads).create_infer_request()
        self._lock = threading.Lock()

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self._lock:
            logits, embedding = self._request.infer([images.numpy()], share_inputs=True).values()
        return torch.from_numpy(logits), torch.from_numpy(embedding)


def _compiled(network: Classifier, shape: tuple[int, int, int], threads: int) -> CompiledModel:
    """The frontend is asked directly: ``openvino.convert_model`` does the same, and reports its use."""
    openvino = _openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    with warnings.catch_warnings():  # the frontend traces, which PyTorch calls deprecated
        warnings.simplefilter("ignore")
        frontend = FrontEndManager().load_by_framework("pytorch")
        decoder = TorchScriptPythonDecoder(network, example_input=torch.zeros(2, *shape))  # OpenVINO keeps no reference
        model = frontend.convert(frontend.load(decoder))
    model.reshape({model.inputs[0]: openvino.PartialShape([-1, *shape])})
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # decoding runs beside it
    }
    return _core().compile_model(model, "CPU", settings)


@cache
def _core() -> Core:
    """OpenVINO for the life of the process.

    Its CPU plugin gives the thread that loads it another signal stack (sigaltstack), and frees that from whichever thread drops
    the last reference: after it the first signal would kill the process, be it the SIGTERM that asks it to drain.
    """
    return cast("Core", _openvino().Core())


def _openvino() -> Any:
    """The module, without its telemetry: importing it would report to Google Analytics from beside people's studies."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino


def _checked(engine: OpenVino, network: Classifier, shape: tuple[int, int, int]) -> OpenVino:
    """The engine, if it answers noise as the network does.

    Raises:
        ArithmeticError: it does not.
    """
    images = torch.from_numpy(np.random.default_rng(0).random((2, *shape), dtype=np.float32))
    with torch.inference_mode():
        expected = network(images)
    for ours, theirs in zip(engine(images), expected, strict=True):
        difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
        if not difference <= TOLERANCE:
            raise ArithmeticError(f"its answers differ from PyTorch's by {difference:.1e}; allowed are {TOLERANCE:.0e}")
    return engine


def _shape(bundle: Bundle) -> tuple[int, int, int]:
    size = bundle.manifest.preprocessing.size
    return bundle.manifest.channels, size, size
