"""The local stack: real services, a scheduler that runs DAGs, pages in the web UI, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from cv_factory_ops.config import load
from cv_factory_ops.errors import Unavailable
from local.consumer import Study, send
from local.demo import Progress
from local.stack import MARK, Airflow, Stack, _free_port, _processes_of, stop
from tests.conftest import TINY

REPORT = "<html><script>document.title = 'drift'</script></html>"


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    (folder / "configs").mkdir()
    tiny = TINY | {"drift": {"window": 20, "minimum": 10, "wait_minutes": 0.02}}
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_CONFIGS", str(folder / "configs"))
        with Stack(folder / "home") as running:
            yield running
    assert list(_processes_of(folder / "home")) == []
    assert not (folder / "home" / "stack.json").exists()


def test_every_service_answers_on_this_machine_only(stack: Stack) -> None:
    health = stack.airflow.health()
    assert {health[part]["status"] for part in ("metadatabase", "scheduler", "triggerer", "dag_processor")} == {"healthy"}
    assert httpx.get(f"{stack.addresses['mlflow']}/health").is_success
    record = json.loads((stack.home / "stack.json").read_text())
    assert record["addresses"] == stack.addresses
    assert set(record["pids"]) == {"mlflow", "endpoint", "api-server", "scheduler", "dag-processor", "triggerer"}
    listening = {
        conn.laddr.ip for process in _processes_of(stack.home) for conn in process.net_connections("inet") if not conn.raddr
    }
    assert listening == {"127.0.0.1"}


def test_scheduler_runs_a_dag_and_does_not_retry_a_wrong_setting(stack: Stack) -> None:
    seen: list[dict[str, str]] = []
    run = stack.airflow.trigger("tiny_training", {"overrides": {"training.epochs": 0}}, run_id="wrong-1")
    state = stack.airflow.wait("tiny_training", run, seen.append, timeout=120)
    assert (run, state) == ("wrong-1", "failed")
    assert seen[-1]["ingest"] == "failed"
    assert "up_for_retry" not in {states.get("ingest") for states in seen}
    assert [item["state"] for item in stack.airflow.dag_runs("tiny_training")] == ["failed"]


def test_triggerer_lets_the_drift_check_go_on_after_its_deadline(stack: Stack) -> None:
    run = stack.airflow.trigger("tiny_drift_monitor", run_id="nothing-captured")
    stack.airflow.wait("tiny_drift_monitor", run, timeout=120)
    assert stack.airflow.tasks("tiny_drift_monitor", run)["wait_for_requests"] == "success"
    assert stack.airflow.xcom("tiny_drift_monitor", run, "wait_for_requests") == {"requests": 0}


def test_unknown_dag_is_one_clear_line(stack: Stack) -> None:
    with pytest.raises(Unavailable, match="nonsense: no such DAG; import errors: none"):
        stack.airflow.await_dag("nonsense", timeout=0)


def test_pages_show_decisions_and_reports(stack: Stack) -> None:
    root = stack.home / "storage" / "tiny"
    run = (root / "runs" / "some.run").as_uri()
    (root / "runs" / "some.run" / "drift").mkdir(parents=True)
    (root / "runs" / "some.run" / "drift" / "report.html").write_text(REPORT)
    (root / "decisions").mkdir(parents=True, exist_ok=True)
    decision = {"time": "2026-01-02T03:04:05Z", "verdict": "drift", "retrain": True, "reason": "a <b> & c", "run": run}
    (root / "decisions" / "1.json").write_text(json.dumps(decision))
    with httpx.Client(base_url=f"{stack.addresses['airflow']}/cv-factory") as client:
        page = client.get("/decisions").text
        report = client.get("/report", params={"uri": f"{run}/drift/report.html"})
        outside = client.get("/report", params={"uri": (stack.home / "secrets.json").as_uri()})
        missing = client.get("/report", params={"uri": f"{run}/drift/other.html"})
    assert "Time (UTC)" in page
    assert "<td>2026-01-02 03:04<td>" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert report.text == REPORT
    assert "sandbox" in report.headers["content-security-policy"]
    assert (outside.status_code, missing.status_code) == (403, 404)


def test_a_second_start_of_the_same_home_ends_what_the_first_left(tmp_path: Path) -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    ours = subprocess.Popen(sleep, env=os.environ | {MARK: str(tmp_path)}, start_new_session=True)
    foreign = subprocess.Popen(sleep, env=os.environ | {MARK: str(tmp_path / "other")}, start_new_session=True)
    try:
        stop(tmp_path)
        assert ours.poll() is not None
        assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_service_that_cannot_start_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "airflow").mkdir()
    (tmp_path / "airflow" / "airflow.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(Unavailable, match="migration: ended with exit code 1"):
        Stack(tmp_path, report=lambda _: None).start()
    assert list(_processes_of(tmp_path)) == []


def test_stack_that_does_not_answer_is_one_clear_line_whatever_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as proxy, socket.socket() as taken:
        for each in (proxy, taken):
            each.bind(("127.0.0.1", 0))
        proxy.listen()
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        airflow = Airflow(f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(Unavailable, match="ConnectError; is the stack up"):
            airflow.await_dag("tiny_training")


def test_endpoint_that_does_not_answer_is_one_clear_line(project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(Unavailable, match=r"^endpoint tiny: Could not connect[^\n]*$"):
        send(load(project()), [Study("i", "application/dicom", b"", "normal")], "studies")


def test_progress_shows_new_lines_of_the_stage_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "task_id=train" / "attempt=1.log"
    log.parent.mkdir()
    events = ["Filling up the DagBag", "10:00:01 epoch 1/2: loss [0.5]", "10:00:02 epoch 2/2: loss 0.1"]
    first, second, third = (json.dumps({"event": event, "level": "info"}) + "\n" for event in events)
    progress = Progress(tmp_path)
    progress.show({"train": "running", "evaluate": ""})
    log.write_text(first + second + third[:9])
    progress.show({"train": "running", "evaluate": ""})
    log.write_text(first + second + third)
    progress.show({"train": "success", "evaluate": "running"})
    progress.show({"train": "success", "evaluate": "running"})
    assert [" ".join(re.sub(r"^  [0-9:]{8} ", "", line).split()) for line in capsys.readouterr().out.splitlines()] == [
        "train running",
        "epoch 1/2: loss [0.5]",
        "epoch 2/2: loss 0.1",
        "train success",
        "evaluate running",
    ]


def test_a_taken_port_is_passed_over() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_port(port) > port
