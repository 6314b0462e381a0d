"""How long all DAG files take to parse, against one hello-world DAG: ``python -m benchmarks.dag_parsing [--runs 15]``.

Three ratios, each of medians over runs that alternate between the two folders:

- ``process that parses``: the life of one interpreter that imports Airflow and parses the folder, as ``airflow dags list``
  or a worker does. This is the figure with a target: at most 1.3.
- ``first parse in it``: the part of that life in which the folder is parsed. It pays for every import that Airflow has not
  made already: the configuration's models and the providers' operators on our side, nothing on the other.
- ``DAG processor's children``: a process that has loaded Airflow, its plugins and the files' ``airflow`` imports, as the DAG
  processor has, forks a child a file that parses and serializes it; the sum over the children. It grows with files and
  projects, so the number of both is printed.
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
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELLO = """
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

with DAG("hello_world"):
    EmptyOperator(task_id="hello")
"""

PARSE = """
import json, sys, time
from airflow.dag_processing.dagbag import DagBag
started = time.perf_counter()
bag = DagBag(sys.argv[1])
seconds = time.perf_counter() - started
assert bag.dags and not bag.import_errors, bag.import_errors
print()
print(json.dumps({"parse": seconds, "dags": len(bag.dags)}))
"""

FORK = """
import json, os, sys, time
from pathlib import Path
from airflow import plugins_manager
from airflow.dag_processing.dagbag import DagBag
from airflow.dag_processing.processor import _pre_import_airflow_modules, _serialize_dags
import structlog
log = structlog.get_logger()
plugins_manager._get_plugins()
seconds = 0.0
for file in sorted(Path(sys.argv[1]).glob("*.py")):
    _pre_import_airflow_modules(str(file), log)
    started = time.perf_counter()
    if (child := os.fork()) == 0:
        bag = DagBag(str(file), load_op_links=False)
        dags, errors = _serialize_dags(bag, log)
        os._exit(1 if errors or bag.import_errors else 0)
    assert os.waitpid(child, 0)[1] == 0, file
    seconds += time.perf_counter() - started
print()
print(json.dumps({"forked": seconds}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        hello, environment = _prepare(Path(folder))
        measured: dict[str, dict[str, list[float]]] = {"hello": {}, "ours": {}}
        for _ in range(runs):
            for name, dags in (("hello", hello), ("ours", ROOT / "dags")):
                for key, value in _measure(dags, environment).items():
                    measured[name].setdefault(key, []).append(value)
    _print(measured, runs)


def _prepare(folder: Path) -> tuple[Path, dict[str, str]]:
    hello = folder / "hello"
    hello.mkdir()
    (hello / "hello.py").write_text(HELLO)
    environment = os.environ | {
        "AIRFLOW_HOME": str(folder / "airflow"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__LOGGING__LOGGING_LEVEL": "WARNING",
        "CVF_CONFIGS": str(ROOT / "configs"),
    }
    airflow = str(Path(sys.executable).with_name("airflow"))
    subprocess.run([airflow, "db", "migrate"], env=environment, check=True, capture_output=True)
    return hello, environment


def _measure(dags: Path, environment: dict[str, str]) -> dict[str, float]:
    started = time.perf_counter()
    first = _last_line(PARSE, dags, environment)
    whole = time.perf_counter() - started
    return first | {"whole": whole} | _last_line(FORK, dags, environment)


def _last_line(script: str, dags: Path, environment: dict[str, str]) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(dags)], env=environment, capture_output=True, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _print(measured: dict[str, dict[str, list[float]]], runs: int) -> None:
    labels = {
        "whole": "process that parses",
        "parse": "first parse in it",
        "forked": "DAG processor's children",
    }
    dags, files = measured["ours"]["dags"][0], len(list((ROOT / "dags").glob("*.py")))
    print(
        f"Airflow {version('apache-airflow')}, Python {platform.python_version()}, {os.cpu_count()} cores, {runs} runs, medians"
    )
    print(f"ours: {dags:.0f} DAGs in {files} files; hello: 1 DAG in 1 file\n")
    print(f"{'':<28}{'hello':>10}{'ours':>10}{'ratio':>8}")
    for key, label in labels.items():
        hello, ours = (statistics.median(measured[name][key]) for name in ("hello", "ours"))
        print(f"{label:<28}{hello * 1e3:>7.0f} ms{ours * 1e3:>7.0f} ms{ours / hello:>8.2f}")


if __name__ == "__main__":
    main()
