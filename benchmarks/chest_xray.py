"""Pediatric chest X-rays at 224 px with few labelled images: what two cores can learn in minutes.

    python -m benchmarks.chest_xray images.tar [--train 600] [--seeds 0]

``images.tar`` holds ``train`` and ``test`` with a folder of JPEG files for each label (Kermany, Zhang & Goldbaum 2018, Mendeley
Data rscbjbr9sj, CC BY 4.0). Children are told apart by the numbers in the file names, and split by the platform: no child is on
two sides, which the published split does not promise. ``--train`` images are drawn for all three splits together, as many of
each label.

For each seed the same network learns (1) from the labels alone, (2) by SupCon, and (3) by fine-tuning what (2) has learned;
rows say the locked test set's metrics with intervals over patients.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

LABELS = {"NORMAL": "normal", "PNEUMONIA": "pneumonia"}
AUGMENT = {"rotate": 10, "zoom": 0.2, "shift": 0.08, "intensity": 0.2}
PROJECT: dict[str, Any] = {
    "project": "chest_xray",
    "labels": list(LABELS.values()),
    "data": {"source": {"kind": "files", "path": "images", "labels": "labels.csv"}},
    "splits": {"val": 0.2, "test": 0.3},
    "preprocessing": {"size": 224},
    "model": {"kind": "resnet", "depth": 10, "small_input": False},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "supervised": {"epochs": 12, "batch_size": 16, "ema": 0.9, "augment": AUGMENT},
    "supcon": {
        "epochs": 8,
        "batch_size": 16,
        "objective": {"kind": "contrastive", "method": "supcon"},
        "augment": {**AUGMENT, "zoom": 0.5, "intensity": 0.4},
    },
    "fine_tuning": {
        "epochs": 6,
        "batch_size": 16,
        "learning_rate": 5e-4,
        "ema": 0.9,
        "augment": AUGMENT,
        "objective": {"kind": "fine_tuning", "decay": 0.5},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("images", type=Path)
    parser.add_argument("--train", type=int, default=600, help="images that are drawn, of all splits together")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print("| seed | training | train, val, test | test AUC | accuracy | sensitivity | specificity | minutes |")
    print("|---|---|---|---|---|---|---|---|")
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            measure(options.images, options.train, seed, Path(folder))
    print(f"\ntorch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores")


def measure(archive: Path, count: int, seed: int, home: Path) -> None:
    write_images(archive, count, seed, home)
    learned = home / "supcon.safetensors"
    for name, training in TRAININGS.items():
        settings = PROJECT | {"training": {**training, "seed": seed, "processes_per_node": 2}}
        if name == "fine_tuning":
            settings["model"] = PROJECT["model"] | {"weights": str(learned)}
        (home / "project.yaml").write_text(yaml.safe_dump(settings))
        started = time.monotonic()
        stages = {stage: run_stage(stage, home) for stage in ("ingest", "preprocess", "train", "evaluate")}
        if name == "supcon":
            learned.write_bytes((home / "run" / "train" / "bundle" / "model.safetensors").read_bytes())
        row(seed, name, stages, time.monotonic() - started)


def write_images(archive: Path, count: int, seed: int, home: Path) -> None:
    """Unpack as many images of each label, drawn by the seed, and write their table."""
    lines = ["file,label,patient"]
    with tarfile.open(archive) as tar:
        members = {folder: [m for m in tar.getmembers() if f"/{folder}/" in m.name and m.isfile()] for folder in LABELS}
        for folder, found in members.items():
            found.sort(key=lambda member: member.name)
            drawn = np.random.default_rng(seed).choice(len(found), count // len(LABELS), replace=False)
            for i in drawn:
                file = tar.extractfile(found[i])
                target = home / "images" / folder / Path(found[i].name).name
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read() if file else b"")
                lines.append(f"{folder}/{target.name},{LABELS[folder]},{child(target.name)}")
    (home / "labels.csv").write_text("\n".join(lines) + "\n")


def child(name: str) -> str:
    """``person12_bacteria_47.jpeg`` -> ``person12``; ``NORMAL2-IM-0381-0001.jpeg`` -> ``IM-0381``"""
    found = re.search(r"person\d+|IM-\d+", name)
    return found[0] if found else name


def run_stage(stage: str, home: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "cv_factory_ops.cli", stage, "--config", f"{home}/project.yaml", "--run", f"{home}/run"]
    environment = os.environ | {"CVF_HOME": str(home), "CVF_PSEUDONYM_KEY": "benchmark"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    record: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])["record"]
    return record


def row(seed: int, name: str, stages: dict[str, dict[str, Any]], seconds: float) -> None:
    counts, metrics = stages["preprocess"]["counts"], stages["evaluate"]["metrics"]
    low, high = stages["evaluate"]["intervals"]["test"]["auc"]
    numbers = [f"{metrics[key]:.3f}" for key in ("accuracy", "sensitivity", "specificity")]
    images = ", ".join(str(counts[split]) for split in ("train", "val", "test"))
    cells = [str(seed), name, images, f"{metrics['auc']:.3f} ({low:.3f} .. {high:.3f})", *numbers, f"{seconds / 60:.1f}"]
    print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
