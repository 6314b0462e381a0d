"""Test AUC and accuracy on PneumoniaMNIST with the default configuration, over seeds.

    python benchmarks/pneumoniamnist.py pneumoniamnist.npz [--seeds 0 1 2]

Runs `cvf ingest preprocess train evaluate` of configs/pneumoniamnist.yaml for each seed in a temporary home and prints a table.
Beside it: ResNet-18 at 28 px of the MedMNIST v2 paper, AUC .944, accuracy .854 (Yang et al. 2023, Scientific Data, Table 3).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

CONFIG = Path(__file__).parents[1] / "configs" / "pneumoniamnist.yaml"


def measure(data: Path, seed: int) -> dict[str, float]:
    """Metrics of one seed and the seconds of all four stages."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as home:
        for stage in ("ingest", "preprocess", "train", "evaluate"):
            command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", str(CONFIG), "--run", f"{home}/run"]
            command += ["--set", f"data.source.path={data}", "--set", f"training.seed={seed}"]
            result = subprocess.run(
                command, env={**os.environ, "CVF_HOME": home}, stdout=subprocess.PIPE, text=True, check=True
            )
        record = json.loads(result.stdout.splitlines()[-1])["record"]
    return {**record["metrics"], "threshold": record["threshold"], "seconds": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    rows = [(seed, measure(options.data.resolve(), seed)) for seed in options.seeds]
    print("| seed | test AUC | accuracy | sensitivity | specificity | threshold | minutes |\n|---|---|---|---|---|---|---|")
    for seed, row in rows:
        numbers = " | ".join(f"{row[name]:.3f}" for name in ("auc", "accuracy", "sensitivity", "specificity", "threshold"))
        print(f"| {seed} | {numbers} | {row['seconds'] / 60:.1f} |")
    for name in ("auc", "accuracy"):
        print(f"mean {name} {statistics.mean(row[name] for _, row in rows):.3f}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
