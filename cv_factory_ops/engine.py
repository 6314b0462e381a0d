"""What runs a bundle's network to serve answers and to index images: OpenVINO, compiled from the bundle's weights when it is
loaded, or PyTorch.

``benchmarks/engines.py`` is why. The bundle stays the only source: nothing that was compiled is ever stored.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from cv_factory_ops.bundle import Bundle
from cv_factory_ops.models import Classifier
from cv_factory_ops.predictor import Network

if TYPE_CHECKING:
    from openvino import Core, InferRequest, Model

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
    """One batch at a time, on all threads: the soonest answer."""
    beside: Network
    """Up to :attr:`lanes` batches at a time, which share the threads: the most answers."""
    lanes: int


def open_engine(bundle: Bundle, name: EngineName, threads: int, lanes: int = 1) -> Engine:
    """The engine that is asked for. Where OpenVINO cannot run a network as PyTorch does, PyTorch does, and a warning says so.

    PyTorch's own threads are as many as it needs: one beside OpenVINO, which has its own.
    """
    network = bundle.network()
    if name == "openvino":
        torch.set_num_threads(1)
        try:
            engine = OpenVino(network, _shape(bundle), threads, lanes)
            _check([engine, engine.beside] if lanes > 1 else [engine], network, _shape(bundle))
            return Engine("openvino", engine, engine.beside, lanes)
        except Exception as error:  # of a converter for all networks there are, so any kind
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            log.warning("engine: OpenVINO cannot run this network, PyTorch does, which is slower (%s)", reason)
    torch.set_num_threads(threads)
    return Engine("torch", network, network, 1)


class OpenVino:
    """A network compiled by OpenVINO in float32: an image's answer does not depend on those it is batched with.

    A call has all threads, and others wait for its end. Up to ``lanes`` calls of :meth:`beside` share the threads, and none of
    them waits for another.
    """

    def __init__(self, network: Classifier, shape: tuple[int, int, int], threads: int, lanes: int = 1) -> None:
        """``shape``: channels, height and width of an image."""
        model = _converted(network, shape)
        self._alone = _requests(model, threads, 1)
        self._beside = _requests(model, threads, lanes) if lanes > 1 else self._alone

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _answered(self._alone, images)

    def beside(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As a call, with a share of the threads."""
        return _answered(self._beside, images)


def _answered(free: SimpleQueue[InferRequest], images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    request = free.get()
    try:
        logits, embedding = request.infer([images.numpy()], share_inputs=True).values()
    finally:
        free.put(request)
    return torch.from_numpy(logits), torch.from_numpy(embedding)


def _converted(network: Classifier, shape: tuple[int, int, int]) -> Model:
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
    return cast("Model", model)


def _requests(model: Model, threads: int, lanes: int) -> SimpleQueue[InferRequest]:
    """Of the compiled model, as many as calculate at a time."""
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": lanes,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        "ENABLE_CPU_PINNING": False,  # decoding runs beside it
    }
    compiled = _core().compile_model(model, "CPU", settings)
    free: SimpleQueue[InferRequest] = SimpleQueue()
    for _ in range(lanes):
        free.put(compiled.create_infer_request())
    return free


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


def _check(engines: Sequence[Network], network: Classifier, shape: tuple[int, int, int]) -> None:
    """Accept engines that answer noise as the network does.

    Raises:
        ArithmeticError: one does not.
    """
    images = torch.from_numpy(np.random.default_rng(0).random((2, *shape), dtype=np.float32))
    with torch.inference_mode():
        expected = network(images)
    for engine in engines:
        for ours, theirs in zip(engine(images), expected, strict=True):
            difference = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6))
            if not difference <= TOLERANCE:
                raise ArithmeticError(f"its answers differ from PyTorch's by {difference:.1e}; allowed are {TOLERANCE:.0e}")


def _shape(bundle: Bundle) -> tuple[int, int, int]:
    size = bundle.manifest.preprocessing.size
    return bundle.manifest.channels, size, size
