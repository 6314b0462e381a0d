"""The closed loop on one machine, through DAG runs that a real Airflow scheduler executes: ``make demo``."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.errors import CvFactoryError, DataError
from cv_factory_ops.stage import STAGES
from local.stack import CHECKOUT, Stack, stop

if TYPE_CHECKING:
    from local.recovery import Recovered

HOME = CHECKOUT / "var" / "demo"
SHOWN = {"running", "success", "failed", "up_for_retry", "deferred", "skipped"}
STAGE_LINE = re.compile(r"\d\d:\d\d:\d\d (.+)")
"""What ``cvf`` itself logs, among Airflow's lines in a task's log."""
TITLES = {"auc": "AUC", "accuracy": "accuracy"}
console = Console(highlight=False)


@dataclass
class Demo:
    """One run of the demo: the stack it talks to, the project, and what has come of it so far."""

    stack: Stack
    config: ProjectConfig
    conf: dict[str, Any]
    """Parameters of each DAG run, as a person would enter them in the trigger form."""
    dag_runs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[str, str, float, str]] = field(default_factory=list)
    """DAG, stage, seconds, what came of it."""

    def dag(self, name: str) -> str:
        return f"{self.config.project}_{name}"

    def run_dag(self, name: str, run_id: str, *, triggered: bool = False) -> dict[str, dict[str, Any]]:
        """Trigger a DAG (or follow one that is triggered already) to its end; returns the record of each stage.

        Raises:
            DataError: the DAG run failed.
        """
        dag_id = self.dag(name)
        console.print(f"\n[bold]{dag_id}[/bold] {run_id}")
        if not triggered:
            self.stack.airflow.trigger(dag_id, self.conf, run_id)
        started = time.monotonic()
        logs = self.stack.home / "airflow" / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}"
        state = self.stack.airflow.wait(dag_id, run_id, Progress(logs).show)
        seconds = round(time.monotonic() - started, 1)
        self.dag_runs.append({"dag_id": dag_id, "run_id": run_id, "state": state, "seconds": seconds})
        tasks = self.stack.airflow.tasks(dag_id, run_id)
        if state != "success":
            failed = [task for task, now in tasks.items() if now == "failed"]
            page = f"{self.stack.addresses['airflow']}/dags/{dag_id}/runs/{run_id}"
            raise DataError(f"{dag_id}: task {', '.join(failed)} failed; its log is at {page}")
        return {
            task: record for task, now in tasks.items() if now == "success" and (record := self._record(name, run_id, task))
        }

    def _record(self, name: str, run_id: str, task: str) -> dict[str, Any] | None:
        """The stage's record, noted for the table; None for tasks that are no stage."""
        if task not in STAGES:
            return None
        value = dict(self.stack.airflow.xcom(self.dag(name), run_id, task))
        duration = self.stack.airflow.task_seconds(self.dag(name), run_id, task)
        self.rows.append((self.dag(name), task, duration, str(value["summary"])))
        return value


class Progress:
    """Prints a DAG run as it goes: the changes of its tasks' states, and between them what the stages log.

    :param logs: folder of the run in Airflow's logs, ``task_id=<task>/attempt=<n>.log`` with a JSON object a line
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self._states: dict[str, str] = {}
        self._read: Counter[Path] = Counter()

    def show(self, states: dict[str, str]) -> None:
        """What is new, given the present state of each task."""
        for task, state in states.items():
            before = self._states.get(task)
            if before == "running":
                for line in self._new_lines(task):
                    console.print(f"    {line}", style="dim", markup=False, soft_wrap=True)
            if state != before and state in SHOWN:
                console.print(f"  {time.strftime('%H:%M:%S')}  {task:<18} {state}")
        self._states = states

    def _new_lines(self, task: str) -> Iterator[str]:
        for log in sorted(self.logs.glob(f"task_id={task}/attempt=*.log")):
            with log.open("rb") as file:
                file.seek(self._read[log])
                complete, found, _ = file.read().rpartition(b"\n")
            self._read[log] += len(complete + found)
            for line in complete.splitlines():
                if own := STAGE_LINE.fullmatch(str(json.loads(line).get("event"))):
                    yield own[1]


def run(stack: Stack, config: ProjectConfig, conf: dict[str, Any]) -> dict[str, Any]:
    """The whole loop; returns the summary."""
    from local.consumer import make_studies, send, tell_labels
    from local.recovery import recovery

    demo, started, window = Demo(stack, config, conf), time.monotonic(), config.drift.window
    training = demo.run_dag("training", "demo_1")
    run_directory = training["train"]["bundle"].removesuffix("/train/bundle")

    console.print(f"\nA consumer sends {window} ordinary studies")
    ordinary = make_studies(config, window, "ordinary", run_directory)
    send(config, ordinary, "ordinary")
    quiet = demo.run_dag("drift_monitor", "demo_quiet")

    console.print(f"\nA consumer sends {2 * window} studies of a changed acquisition; the labels of all studies arrive")
    shifted = make_studies(config, 2 * window, "shifted", run_directory)
    send(config, shifted, "shifted")
    tell_labels(config, ordinary + shifted)
    drifted = demo.run_dag("drift_monitor", "demo_shifted")
    if not drifted["decide"]["retrain"]:
        raise DataError(f"no retraining was decided: {drifted['decide']['reason']}")
    retraining = demo.run_dag("retraining", drifted["decide"]["retraining"], triggered=True)
    unseen = make_studies(config, 2 * window, "unseen", run_directory)
    recovered = recovery(config, _path(training["train"]["bundle"]), _path(retraining["train"]["bundle"]), unseen)
    summary = _summary(demo, training, quiet, drifted, retraining, time.monotonic() - started)
    _show_recovery(recovered, len(unseen))
    return summary | {"recovery": {"studies": len(unseen)} | {name: found.model_dump() for name, found in recovered.items()}}


def _summary(
    demo: Demo,
    training: dict[str, Any],
    quiet: dict[str, Any],
    drifted: dict[str, Any],
    retraining: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    from cv_factory_ops import registry

    champion = registry.champion(demo.config)
    if champion is None:
        raise DataError("the loop ended without a champion")
    _tables(demo, training, retraining)
    return {
        "training": {
            "model_version": training["register"]["model_version"],
            "test_auc": training["evaluate"]["metrics"].get("auc"),
            "bundle_digest": training["register"]["bundle_digest"],
        },
        "endpoint": live_endpoint(demo.config),
        "normal": _drift_summary(quiet),
        "shifted": _drift_summary(drifted) | {"report": drifted["drift"]["report"]},
        "retraining": {
            "dag_run_id": demo.dag_runs[-1]["run_id"],
            "model_version": retraining["register"]["model_version"],
            "gate": retraining["gate"]["verdict"],
            "bundle_digest": retraining["register"]["bundle_digest"],
        },
        "champion": {"model_version": champion.version, "bundle_digest": champion.bundle_digest},
        "dag_runs": demo.dag_runs,
        "seconds": round(seconds, 1),
    }


def live_endpoint(config: ProjectConfig) -> dict[str, str]:
    """What the endpoint says of itself, asked anew."""
    from cv_factory_ops.deploy.verify import live

    found = live(config)
    return {"name": found.endpoint_name, "status": found.status, "bundle_digest": found.bundle_digest}


def _drift_summary(records: dict[str, Any]) -> dict[str, Any]:
    drift = records["drift"]
    return {"drift": drift["verdict"] == "drift", "reason": drift["summary"], "requests": drift["requests"]}


def _tables(demo: Demo, training: dict[str, Any], retraining: dict[str, Any]) -> None:
    table = Table(title="The loop", title_justify="left", pad_edge=False)
    for column in ("DAG", "stage", "seconds", "what came of it"):
        table.add_column(column, justify="right" if column == "seconds" else "left", overflow="fold")
    before = ""
    for dag, stage, seconds, summary in demo.rows:
        table.add_row("" if dag == before else dag, stage, f"{seconds:.1f}", summary)
        before = dag
    console.print("\n", table)
    evaluation = retraining["evaluate"]
    was, now = evaluation["champion_recent_metrics"], evaluation["recent_metrics"]
    both = [f"{title} {was[name]:.3f} -> {now[name]:.3f}" for name, title in TITLES.items() if name in was and name in now]
    if both:
        console.print(f"\nOn held-out new studies, before -> after retraining: {', '.join(both)}")
    console.print("\nPictures")
    for path in [*training["evaluate"]["pictures"], *evaluation["pictures"]]:
        console.print(f"  {_relative(path)}", soft_wrap=True)


def _show_recovery(recovered: dict[str, Recovered], studies: int) -> None:
    title = f"On {studies} further studies of the changed acquisition, never trained on"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for column in ("", "before retraining", "after", "gain (95% intervals)"):
        table.add_column(column)
    for name, found in recovered.items():
        table.add_row(TITLES[name], *found.cells)
    console.print("\n", table)


def _path(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def _relative(uri: str) -> str:
    path = _path(uri)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m local.demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="a MedMNIST .npz: the loop on real images (configs/pneumoniamnist.yaml)")
    parser.add_argument("--keep", action="store_true", help="leave the services running")
    options = parser.parse_args()
    name = "pneumoniamnist" if options.data else "demo"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends like Ctrl-C: the services stop with the demo
    try:
        conf = _conf(options.data)
        return _run_on_stack(CHECKOUT / "configs" / f"{name}.yaml", conf, options.keep)
    except CvFactoryError as error:
        print(f"demo: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _conf(data: Path | None) -> dict[str, Any]:
    if data is None:
        return {}
    if not data.is_file():
        raise DataError(f"{data}: is not there; DATA is the path of a MedMNIST .npz file")
    return {"data": str(data.resolve()), "overrides": {"data.source.reserve": 0.15}}


def _run_on_stack(path: Path, conf: dict[str, Any], keep: bool) -> int:
    stop(HOME)
    shutil.rmtree(HOME, ignore_errors=True)
    # Splits follow pseudonyms: with a fixed key every demo has the same ones. Phantoms have nothing to hide.
    os.environ.setdefault("CVF_PSEUDONYM_KEY", "phantoms")
    stack = Stack(HOME, console.print)
    console.print("[bold]Starting Airflow, MLflow and the endpoint[/bold]")
    stack.start()
    try:
        os.environ.update(stack.environment)
        overrides = {"data.source.path": conf["data"], **conf["overrides"]} if conf else {}
        config = load(path, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
        summary = run(stack, config, conf)
        (HOME / "summary.json").write_text(json.dumps(summary, indent=2), encoding="utf-8")
        console.print(f"  {_relative(summary['shifted']['report'])}  (drift report)", soft_wrap=True)
        console.print(f"\nSummary  {_relative((HOME / 'summary.json').as_uri())}")
        console.print(f"Airflow  {stack.addresses['airflow']}/dags", soft_wrap=True)
        console.print(f"MLflow   {stack.addresses['mlflow']}/#/models/{config.project}", soft_wrap=True)
        console.print(
            "These pages are up until `make down`." if keep else "Everything is stopped now; KEEP=1 keeps the pages up."
        )
        return 0
    except BaseException:
        keep = False
        raise
    finally:
        if not keep:
            stack.stop()


if __name__ == "__main__":
    sys.exit(main())
