"""Which engine runs a network fastest on processors: `python -m benchmarks.engines [--threads 2] [--rounds 15] [--compile]`.

ResNet-18 of one channel at 224 px, float32, 1 and 16 images: PyTorch (eager, channels last, `torch.compile` with
``--compile``), ONNX Runtime (``pip install onnx onnxscript onnxruntime``) and OpenVINO.
All are loaded first and then take turns, two forwards each of which the second counts, so that what else the machine does meets
them alike. ``cpu`` is user and system time of the process a forward, which others disturb less than the clock; ``load`` is
from the network in memory to the first answer; ``difference`` the greatest one from PyTorch's logits and embedding.
"""

from __future__ import annotations

import argparse
import io
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cv_factory_ops.config.models import ResNet
from cv_factory_ops.engine import OpenVino
from cv_factory_ops.models import Classifier, build

SIZE, BATCHES = 224, (1, 16)
Images = NDArray[np.float32]
Forward = Callable[[Images], tuple[NDArray[np.float32], NDArray[np.float32]]]


@dataclass
class Contender:
    """An engine that is loaded, and what it was measured to take."""

    name: str
    forward: Forward
    load: float
    wall: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in BATCHES})
    cpu: dict[int, list[float]] = field(default_factory=lambda: {size: [] for size in BATCHES})

    def measure(self, images: Images) -> None:
        time.sleep(0.05)  # threads of the one before spin for a while
        self.forward(images)
        started, used = time.perf_counter(), time.process_time()
        self.forward(images)
        self.wall[len(images)].append(time.perf_counter() - started)
        self.cpu[len(images)].append(time.process_time() - used)


def eager(network: Classifier, memory_format: torch.memory_format = torch.contiguous_format) -> Forward:
    network = network.to(memory_format=memory_format)

    def forward(images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        with torch.inference_mode():
            logits, embedding = network(torch.from_numpy(images).contiguous(memory_format=memory_format))
        return logits.numpy(), embedding.numpy()

    return forward


def compiled(network: Classifier) -> Forward:
    return eager(torch.compile(network, dynamic=True))  # type: ignore[arg-type]


def onnx_runtime(network: Classifier, threads: int) -> Forward:
    import onnxruntime

    target = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    example = torch.zeros(2, 1, SIZE, SIZE)
    torch.onnx.export(network, (example,), target, dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(target.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {session.get_inputs()[0].name: images})


def openvino(network: Classifier, threads: int) -> Forward:
    engine = OpenVino(network, (1, SIZE, SIZE), threads)

    def forward(images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        logits, embedding = engine(torch.from_numpy(images))
        return logits.numpy(), embedding.numpy()

    return forward


def loaded(name: str, load: Callable[[Classifier], Forward]) -> Contender:
    network = new_network()
    started = time.perf_counter()
    forward = load(network)
    forward(images_of(1))
    took = time.perf_counter() - started
    for size in BATCHES:
        forward(images_of(size))
    return Contender(name, forward, took)


def new_network() -> Classifier:
    torch.manual_seed(0)
    return build(ResNet(depth=18, small_input=False), 2, 0.5, 0.25, 1, SIZE).eval()


def images_of(count: int) -> Images:
    return np.random.default_rng(count).random((count, 1, SIZE, SIZE), dtype=np.float32)


def difference(contender: Contender, reference: Contender) -> float:
    pairs = [
        (ours, theirs)
        for size in BATCHES
        for ours, theirs in zip(contender.forward(images_of(size)), reference.forward(images_of(size)), strict=True)
    ]
    return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def report(contenders: list[Contender]) -> None:
    print("| engine | 1 image, p50 | cpu | 16 images, p50 | images/s | cpu an image | load | difference |")
    print("|---|---|---|---|---|---|---|---|")
    for found in contenders:
        one, many = (statistics.median(found.wall[size]) for size in BATCHES)
        cpu_one, cpu_many = (statistics.median(found.cpu[size]) for size in BATCHES)
        print(
            f"| {found.name} | {one * 1e3:.1f} ms | {cpu_one * 1e3:.1f} ms | {many * 1e3:.0f} ms | {16 / many:.1f} "
            f"| {cpu_many / 16 * 1e3:.1f} ms | {found.load:.1f} s | {difference(found, contenders[0]):.1e} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which needs a C++ compiler")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    loads: dict[str, Callable[[Classifier], Any]] = {
        "PyTorch eager": eager,
        "PyTorch channels last": lambda network: eager(network, torch.channels_last),
        **({"torch.compile": compiled} if options.compile else {}),
        "ONNX Runtime": lambda network: onnx_runtime(network, options.threads),
        "OpenVINO": lambda network: openvino(network, options.threads),
    }
    contenders = [loaded(name, load) for name, load in loads.items()]
    for _ in range(options.rounds):
        for size in BATCHES:
            for contender in contenders:
                contender.measure(images_of(size))
    print(f"{platform.machine()}, {options.threads} threads, {options.rounds} rounds, PyTorch {torch.__version__}")
    report(contenders)


if __name__ == "__main__":
    main()
