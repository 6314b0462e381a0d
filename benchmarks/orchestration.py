"""What the scheduler adds to a training, stage by stage: ``python -m benchmarks.orchestration [--runs 3] [--config FILE]``.

A stack runs the training DAG and a DAG of as many tasks that do nothing, alternately. Printed a stage: the training's wall
time minus the seconds that its stages worked, minus the wall time of a task that does nothing. What is left is starting a
stage's interpreter, its imports and its end. The target is below 1.5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from cv_factory_airflow import run_uri
from cv_factory_ops.config import load
from cv_factory_ops.stage import TRAINING, read_result
from local.stack import CHECKOUT, Stack

NOOP = f"""
from airflow.sdk import DAG, BaseOperator, chain

class Nothing(BaseOperator):
    def execute(self, context):
        return {{}}

with DAG("nothing", schedule=None, is_paused_upon_creation=False):
    chain(*(Nothing(task_id=f"task_{{number}}") for number in range({len(TRAINING)})))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--config", type=Path, default=CHECKOUT / "configs" / "demo.yaml")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _prepare(Path(folder), options.config)
        with Stack(Path(folder) / "stack") as stack:
            os.environ["CVF_STORAGE"] = stack.environment["CVF_STORAGE"]
            figures = [_measure(stack, options.config, number) for number in range(options.runs)]
    _print(figures)


def _prepare(folder: Path, config: Path) -> None:
    """One project, and the DAG that does nothing in a bundle of its own."""
    for name in ("configs", "nothing"):
        (folder / name).mkdir()
    shutil.copy(config, folder / "configs")
    (folder / "nothing" / "nothing.py").write_text(NOOP)
    bundles = [
        {
            "name": name,
            "classpath": "airflow.dag_processing.bundles.local.LocalDagBundle",
            "kwargs": {"path": str(path), "refresh_interval": 5},
        }
        for name, path in (("dags-folder", CHECKOUT / "dags"), ("nothing", folder / "nothing"))
    ]
    os.environ["AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_CONFIG_LIST"] = json.dumps(bundles)
    os.environ["CVF_CONFIGS"] = str(folder / "configs")


def _measure(stack: Stack, config: Path, number: int) -> dict[str, float]:
    project = load(config)
    dag_id = f"{project.project}_training"
    nothing = _wall_seconds(stack, "nothing", f"nothing-{number}")
    wall = _wall_seconds(stack, dag_id, f"training-{number}")
    run = run_uri(project.root, dag_id, f"training-{number}")
    work = sum(read_result(run, stage).seconds for stage in TRAINING)
    return {"wall": wall, "work": work, "nothing": nothing, "added": (wall - work - nothing) / len(TRAINING)}


def _wall_seconds(stack: Stack, dag_id: str, run_id: str) -> float:
    stack.airflow.trigger(dag_id, run_id=run_id)
    state = stack.airflow.wait(dag_id, run_id)
    run: dict[str, Any] = next(each for each in stack.airflow.dag_runs(dag_id) if each["dag_run_id"] == run_id)
    if state != "success":
        raise SystemExit(f"{dag_id} {run_id}: {state}")
    return (datetime.fromisoformat(run["end_date"]) - datetime.fromisoformat(run["start_date"])).total_seconds()


def _print(figures: list[dict[str, float]]) -> None:
    print(f"\n{'run':<8}{'wall':>9}{'stages':>9}{'nothing':>9}{'added a stage':>16}")
    for number, figure in enumerate(figures):
        print(
            f"{number:<8}{figure['wall']:>7.1f} s{figure['work']:>7.1f} s{figure['nothing']:>7.1f} s{figure['added']:>14.2f} s"
        )
    noop = statistics.median(figure["nothing"] for figure in figures) / len(TRAINING)
    added = statistics.median(figure["added"] for figure in figures)
    print(f"{os.cpu_count()} cores: a task that does nothing {noop:.2f} s; a stage adds {added:.2f} s to that and its work")


if __name__ == "__main__":
    main()
