"""How far a retraining recovers from a changed acquisition, by the labels that have arrived, from scratch or from the champion.

    python -m benchmarks.retraining [--data pneumoniamnist.npz] [--seeds 0 1 2] [--labels 50 200]

For each seed: the training of configs/demo.yaml (or configs/pneumoniamnist.yaml) with its rollout to the local endpoint; a
consumer sends studies of the changed acquisition there; then the stages `ingest preprocess train` of a retraining, for each
number of labels that have arrived and each arrangement. Prints accuracy and AUROC, with 95% bootstrap intervals over
studies, on as many further studies of that acquisition, which nothing was trained on or chosen by, and seconds of `train`.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cv_factory_ops.config import load
from cv_factory_ops.deploy.local import stop
from cv_factory_ops.stage import TRAINING, run_stage
from local.consumer import Study, make_studies, send, tell_labels
from local.recovery import Recovered, recovery

CONFIGS = Path(__file__).parents[1] / "configs"
ARRANGEMENTS = {
    "from scratch": [],
    "warm start": ["training.warm_start=champion"],
    "warm start, answers of 0.95 as labels": ["training.warm_start=champion", "data.pseudo_labels=0.95"],
}


def measure(path: Path, settings: list[str], labels: list[int]) -> Iterator[tuple[str, float, Mapping[str, Recovered]]]:
    """What was arranged, seconds of `train`, and what it is worth; in a home of its own."""
    home = Path(os.environ["CVF_HOME"])
    config, first = load(path, settings), (home / "runs" / "first").as_uri()
    for stage in TRAINING:
        run_stage(stage, config, first)
    shifted, unseen = (make_studies(config, max(labels), kind, first) for kind in ("shifted", "unseen"))
    send(config, shifted, "shifted")
    before = home / "runs" / "first" / "train" / "bundle"
    for count, more in zip(labels, _steps(shifted, labels), strict=True):
        tell_labels(config, more)
        for name, arrangement in ARRANGEMENTS.items():
            run = home / "runs" / f"{count}-{'-'.join(arrangement) or 'scratch'}"
            own = load(path, [*settings, "data.include_captures=true", *arrangement])
            seconds = [run_stage(stage, own, run.as_uri()).seconds for stage in ("ingest", "preprocess", "train")][-1]
            yield f"{count} labels, {name}", seconds, recovery(config, before, run / "train" / "bundle", unseen)


def _steps(studies: list[Study], counts: list[int]) -> Iterator[list[Study]]:
    """The studies whose labels arrive next, up to each of these counts."""
    for start, end in zip([0, *counts], counts, strict=False):
        yield studies[start:end]


def _settings(data: Path | None, seed: int, url: str) -> list[str]:
    given = [f"training.seed={seed}", f'deploy={{"kind": "local", "url": "{url}"}}']
    if data is None:
        return [*given, f"data.source.seed={7 + 10 * seed}", f"splits.seed={seed}"]
    return [*given, f"data.source.path={data}", "data.source.reserve=0.15"]


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="PneumoniaMNIST; phantoms without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--labels", type=int, nargs="+", default=[50, 200])
    options = parser.parse_args()
    path = CONFIGS / ("pneumoniamnist.yaml" if options.data else "demo.yaml")
    print("| seed | retraining | accuracy before | after | gain | AUROC before | after | gain | seconds |\n|" + "---|" * 9)
    for seed in options.seeds:
        url = f"http://127.0.0.1:{_free_port()}"
        with tempfile.TemporaryDirectory() as home:
            os.environ |= {"CVF_HOME": home, "CVF_PSEUDONYM_KEY": "phantoms", "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url}
            os.environ.pop("MLFLOW_TRACKING_URI", None)  # MLflow sets it, to the home before
            try:
                settings = _settings(options.data and options.data.resolve(), seed, url)
                for name, seconds, found in measure(path, settings, sorted(options.labels)):
                    cells = " | ".join(cell for metric in ("accuracy", "auc") for cell in found[metric].cells)
                    print(f"| {seed} | {name} | {cells} | {seconds:.0f} |", flush=True)
            finally:
                stop(Path(home) / "var" / "endpoint")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
