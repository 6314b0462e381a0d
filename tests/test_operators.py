"""The operators with real stage processes, the sensor with real capture files, the pages over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.parse import unquote

import httpx
import psutil
import pytest

from cv_factory_airflow import run_uri
from cv_factory_ops import captures, storage
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.records import Cursor, Reading
from tests.capture_lines import capture_line
from tests.conftest import TINY
from tests.records import put
from tests.test_decide import checked

RUN = SimpleNamespace(dag_id="tiny_training", run_id="manual__2026-01-01T00:00:00+00:00")
CONTEXT = {"dag_run": RUN}
READING = Reading()
SECRET = "very-secret-key"  # noqa: S105
SLOW = '{"data.source.patients": 300}'


@pytest.fixture(scope="module", autouse=True)
def airflow_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Airflow writes its configuration where this points at its first import."""
    os.environ.setdefault("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))


@pytest.fixture
def operators(airflow_home: None) -> ModuleType:
    import cv_factory_airflow.operators

    return cv_factory_airflow.operators


@pytest.fixture
def stage(operators: ModuleType, project: Callable[..., Path]) -> Callable[..., Any]:
    """``stage("Ingest", overrides=...)``: that stage's operator on the tiny project, as its templates would be rendered."""

    def build(name: str, **arguments: Any) -> Any:
        given = {"config": str(project()), "data": "", "overrides": "{}", "runtime": "process"} | arguments
        return getattr(operators, f"{name}Operator")(task_id=name.lower(), **given)

    return build


def test_a_stage_returns_its_record_and_is_not_repeated(stage: Callable[..., Any]) -> None:
    record = stage("Ingest").execute(CONTEXT)
    again = stage("Ingest").execute(CONTEXT)
    assert record["accepted"] > 0
    assert record["summary"]
    assert again == record


def test_log_lines_of_the_stage_reach_the_task_log(stage: Callable[..., Any], capfd: pytest.CaptureFixture[str]) -> None:
    record = stage("Ingest").execute(CONTEXT)
    assert record["summary"] in "".join(capfd.readouterr())


def test_wrong_setting_is_not_retried_and_names_what_is_allowed(operators: ModuleType, stage: Callable[..., Any]) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"training\.epochs: 0 given; allowed: greater than or equal to 1"):
        stage("Train", overrides='{"training.epochs": 0}').execute(CONTEXT)
    with pytest.raises(AirflowFailException, match="allowed is a JSON object"):
        stage("Train", overrides="[1]").execute(CONTEXT)
    with pytest.raises(AirflowFailException, match="runtime: 'mars' given; allowed: process"):
        stage("Train", runtime="mars").execute(CONTEXT)


def test_data_error_is_not_retried_and_is_one_line(stage: Callable[..., Any]) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException) as caught:
        stage("Preprocess").execute(CONTEXT)
    assert str(caught.value).startswith("cvf preprocess: ")
    assert "run `cvf ingest`" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unavailable_service_is_retried(stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    for name, value in {
        "CVF_STORAGE": "s3://nowhere",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AirflowException, match="S3 answered") as caught:
        stage("Preprocess").execute(CONTEXT)
    assert not isinstance(caught.value, AirflowFailException)


def test_strongest_setting_comes_last(operators: ModuleType) -> None:
    fixed = {"data.include_captures": True, "splits.seed": 1}
    assert operators.form_settings("a b", '{"splits.seed": 2}', fixed) == [
        "data.include_captures=true",
        "splits.seed=2",
        'data.source.path="a b"',
    ]


def test_a_run_directory_is_safe_and_unlike_any_other() -> None:
    assert run_uri("s3://b/p", "p_training", "manual-1") == "s3://b/p/runs/p_training.manual-1"
    colons, pluses = run_uri("file:///p", "d", "a:b"), run_uri("file:///p", "d", "a+b")
    assert colons != pluses
    assert run_uri("file:///p", "d", "../../etc").count("/") == len(["file:", "", "", "p", "runs", "x"]) - 1
    assert run_uri("file:///p", "d", "x" * 150 + ":").endswith(run_uri("file:///p", "d", "x" * 150 + ":")[-8:])


def test_kill_stops_everything_that_the_stage_started(stage: Callable[..., Any]) -> None:
    from airflow.sdk.exceptions import AirflowException

    operator, started = stage("Ingest", overrides=SLOW), list[psutil.Process]()
    threading.Thread(target=_kill_when_reading, args=(operator, started), daemon=True).start()
    with pytest.raises(AirflowException, match="interrupted; a retry goes on"):
        operator.execute(CONTEXT)
    assert len(started) > 1
    _until(lambda: not any(map(_lives, started)))


def test_retry_after_kill_9_of_the_worker_joins_the_running_stage(
    stage: Callable[..., Any], home: Path, project: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    root = load(project()).root
    folder = Path(run_uri(root, RUN.dag_id, RUN.run_id).removeprefix("file://"))
    worker = subprocess.Popen([sys.executable, "-c", WORKER, str(project()), SLOW], cwd=home)
    _until(lambda: (folder / ".ingest.work").exists())
    left_alone = psutil.Process(worker.pid).children()[0]
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert left_alone.is_running()

    record = stage("Ingest", overrides=SLOW).execute(CONTEXT)
    log = "".join(capfd.readouterr())
    assert "already running for this run; waiting for it" in log
    assert "nothing has changed" in log
    assert json.loads((folder / "ingest" / "result.json").read_text())["record"] == record
    assert [item.name for item in folder.iterdir() if item.is_dir()] == ["ingest"]


def test_credentials_of_the_connection_reach_the_process_and_no_log(
    stage: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from airflow.sdk.exceptions import AirflowException

    extra = json.dumps({"region_name": "eu-west-1", "endpoint_url": "http://127.0.0.1:9"})
    connection = {"conn_type": "aws", "login": "AKIAEXAMPLE", "password": SECRET, "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_HOSPITAL", json.dumps(connection))
    monkeypatch.setenv("AWS_SESSION_TOKEN", "of another account")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("CVF_STORAGE", "s3://nowhere")
    operator = stage("Preprocess", aws_conn_id="hospital")
    given = operator._aws_environment()
    assert given["AWS_SECRET_ACCESS_KEY"] == SECRET
    assert (given["AWS_DEFAULT_REGION"], given["AWS_SESSION_TOKEN"]) == ("eu-west-1", "")
    with pytest.raises(AirflowException) as caught:
        operator.execute(CONTEXT)
    assert SECRET not in "".join(capfd.readouterr()) + str(caught.value)


def test_count_agrees_with_what_the_library_reads(
    airflow_home: None, project: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cv_factory_airflow.sensors import CaptureLog

    monkeypatch.setenv("CVF_STORAGE", str(home / "röntgen & more"))
    config = load(project())
    _capture(config.root, "v1/2026/01/01/00/a.jsonl", 3)
    _capture(config.root, "v2/2026/01/01/00/a.jsonl", 2)
    _capture(config.root, "v1/2026/01/01/09/a.jsonl", 4)
    _capture(config.root, "v1/2026/01/01/09/c.jsonl", 5, inference_id=f"{captures.PROBE}1")
    _capture(config.root, "v1/a.jsonl", 6)
    _capture(config.root, "v1/2026/02/31/09/a.jsonl", 7)

    def counts(start: Reading, end: Reading | None = None) -> tuple[int, int]:
        read = [
            capture
            for file, first, last in captures.unread(config, start, end)
            for _, capture in captures.read_file(config, file, first, last)
            if capture
        ]
        return CaptureLog(f"{config.root}/captures/tiny", start, end).count(), len(read)

    assert counts(Reading()) == (9, 9)
    read: dict[str, int] = {}
    for file, first, last in captures.unread(config, Reading()):
        for behind, _ in captures.read_file(config, file, first, last):
            read[file] = behind
            ours, theirs = counts(before := Reading().advanced(read, late_hours=6))
            assert ours == theirs, before
    assert counts(before) == (0, 0)
    _capture(config.root, "v3/2026/01/01/08/late.jsonl", 2)
    _capture(config.root, "v3/2026/01/01/01/too-late.jsonl", 7)
    assert counts(before) == (2, 2)
    assert counts(Reading(), before) == (16, 16), "a window that is read again ends where it ended, but for files too late"


def test_sensor_finds_the_window_as_the_stage_does(airflow_home: None, project: Callable[..., Path]) -> None:
    from cv_factory_airflow.sensors import check_window
    from cv_factory_ops.drift.window import _bounds, read_cursor
    from cv_factory_ops.stage import Stage

    config = load(project())
    start, end = Reading(read={"2026/01/01/00/v/a.jsonl": 9}), Reading(read={"2026/01/01/00/v/b.jsonl": 7})
    this, other = f"{config.root}/runs/this", f"{config.root}/runs/other"

    def both(run: str) -> tuple[Reading, Reading | None]:
        found = check_window(config.root, run)
        assert found == _bounds(Stage("drift", config, run, Path()), read_cursor(config))[:2]
        return found

    assert both(this) == (Reading(), None)
    cursor = Cursor(run=this, start=start, end=end).model_dump_json().encode()
    storage.write_bytes(f"{config.root}/drift/cursor.json", cursor)
    assert both(this) == (start, end), "killed, its window is settled"
    assert both(other) == (start, None), "that check never finished: its captures are the next one's"
    storage.write_bytes(f"{this}/drift/result.json", b"{}")
    assert both(other) == (start, None), "what it had published before was no verdict"
    storage.write_bytes(f"{this}/drift/window.json", cursor)
    assert both(this) == (start, end)
    assert both(other) == (end, None)
    newer = Cursor(run=other, start=end, end=end).model_dump_json().encode()
    storage.write_bytes(f"{config.root}/drift/cursor.json", newer)
    assert both(this) == (start, end), "a finished check keeps its window"


def test_counting_lists_nothing_before_the_floor_and_sees_new_files(
    airflow_home: None, project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cv_factory_airflow.sensors import CaptureLog

    config, listed = load(project()), list[str]()
    for day in range(1, 29):
        _capture(config.root, f"v/2026/01/{day:02d}/00/a.jsonl", 1)
    log = CaptureLog(f"{config.root}/captures/tiny", Reading(floor="2026/01/28/00"))
    files = type(log.folder.fs)
    ls = files.ls

    def noted(files: object, path: str, **kwargs: Any) -> Any:
        listed.append(path.rsplit("/", 1)[1])
        return ls(files, path, **kwargs)

    monkeypatch.setattr(files, "ls", noted)
    assert log.count() == 1
    assert listed == ["tiny", "v", "2026", "01", "28", "00"]
    _capture(config.root, "v/2026/01/28/07/a.jsonl", 4)
    assert log.count() == 5


def test_a_broken_cursor_is_one_line(airflow_home: None, project: Callable[..., Path]) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from cv_factory_airflow.sensors import check_window

    root = load(project()).root
    storage.write_bytes(f"{root}/drift/cursor.json", b"{}")
    with pytest.raises(AirflowFailException, match=r"drift/cursor\.json: is not a cursor; expected the fields"):
        check_window(root, f"{root}/runs/this")


def test_sensor_does_not_wait_for_a_full_window(operators: ModuleType, project: Callable[..., Path]) -> None:
    from airflow.sdk.exceptions import TaskDeferred

    from cv_factory_airflow.sensors import CaptureWindowSensor

    path = project(drift={"window": 3, "minimum": 2, "wait_minutes": 0.001})
    sensor = CaptureWindowSensor(task_id="wait", config=str(path), data="", overrides="{}")
    _capture(load(path).root, "v/2026/01/01/00/a.jsonl", 2)
    with pytest.raises(TaskDeferred) as deferred:
        sensor.execute(CONTEXT)
    assert _event(deferred.value.trigger) == {"requests": 2}, "the deadline passes, the drift stage decides what that means"
    _capture(load(path).root, "v/2026/01/01/00/b.jsonl", 1)
    assert sensor.execute(CONTEXT) == {"requests": 3}


def test_sensor_waits_for_the_window_of_the_trigger_form(operators: ModuleType, project: Callable[..., Path]) -> None:
    from airflow.sdk.exceptions import AirflowFailException, TaskDeferred

    from cv_factory_airflow.sensors import CaptureWindowSensor

    def sensor(overrides: str) -> Any:
        return CaptureWindowSensor(task_id="wait", config=str(path), data="", overrides=overrides)

    path = project(drift={"window": 3, "minimum": 2})
    _capture(load(path).root, "v/2026/01/01/00/a.jsonl", 3)
    assert set(CaptureWindowSensor.template_fields) >= {"data", "overrides"}
    assert sensor("{}").execute(CONTEXT) == {"requests": 3}
    with pytest.raises(TaskDeferred) as deferred:
        sensor('{"drift.window": 20}').execute(CONTEXT)
    assert deferred.value.trigger.window == 20
    with pytest.raises(AirflowFailException, match=r"drift\.window: 0 given"):
        sensor('{"drift.window": 0}').execute(CONTEXT)


def test_probes_are_not_counted_in_either_spelling(airflow_home: None, project: Callable[..., Path]) -> None:
    from cv_factory_airflow.sensors import CaptureLog

    root = load(project()).root
    _capture(root, "v/2026/01/01/00/a.jsonl", 3)
    _capture(root, "v/2026/01/01/00/b.jsonl", 2, inference_id=f"{captures.PROBE}1")
    file = Path(root.removeprefix("file://")) / "captures" / "tiny" / "v/2026/01/01/00/b.jsonl"
    spaced = "".join(json.dumps(json.loads(line)) + "\n" for line in file.read_text().splitlines())
    file.with_name("c.jsonl").write_text(spaced)
    assert CaptureLog(f"{root}/captures/tiny", Reading()).count() == 3


def test_trigger_fires_when_the_window_fills(airflow_home: None, project: Callable[..., Path]) -> None:
    root = load(project()).root
    trigger = _trigger(f"{root}/captures/tiny", window=4)
    threading.Timer(0.3, _capture, (root, "v/2026/01/01/00/a.jsonl", 3)).start()
    threading.Timer(0.6, _capture, (root, "v/2026/01/01/00/a.jsonl", 4)).start()
    assert _event(trigger) == {"requests": 4}


def test_captures_on_s3_are_counted(airflow_home: None, bucket: str) -> None:
    import boto3

    from cv_factory_airflow.sensors import CaptureLog

    client = boto3.client("s3")
    client.put_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/00/a.jsonl", Body=b"{}\n{}\n{}\n")
    client.put_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/00/b.jsonl", Body=b"{}\n")
    assert _event(_trigger(f"s3://{bucket}/p/captures/e", window=4)) == {"requests": 4}
    log = CaptureLog(f"s3://{bucket}/p/captures/e", Reading())
    assert log.count() == 4
    client.put_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/01/c.jsonl", Body=b"{}\n")
    client.put_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/00/b.jsonl", Body=b"{}\n{}\n")
    assert log.count() == 6, "a new file, and one that has grown"
    client.delete_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/01/c.jsonl")
    client.put_object(Bucket=bucket, Key="p/captures/e/v/2026/01/01/00/b.jsonl", Body=b"{}\n")
    read = Reading(read={"2026/01/01/00/v/a.jsonl": 3})
    assert _event(_trigger(f"s3://{bucket}/p/captures/e", window=3, start=read)) == {"requests": 3}


def test_a_reason_of_the_trigger_form_is_a_decision_that_the_page_explains(
    stage: Callable[..., Any], project: Callable[..., Path]
) -> None:
    from cv_factory_airflow import pages

    config = load(project())
    run = run_uri(config.root, RUN.dag_id, RUN.run_id)
    put(run, checked())
    automatic = stage("Decide").execute(CONTEXT)
    record = stage("Decide", why="<b>new</b> scanner", by="mara").execute(CONTEXT)
    assert (automatic["retrain"], record["retrain"], record["trigger"]) == (False, True, "manual")
    page = pages._section(config)
    newest, oldest = (page.partition("</tr>")[2].split("<tr>"))[1:]
    assert "<td>mara<td>retrain<td>mara asks for it: &lt;b&gt;new&lt;/b&gt; scanner" in newest
    assert f"run <code>tiny_retraining.{record['retraining']}</code>" in newest
    assert "<td>drift<td>keep the model: labels<td>" in oldest
    assert "<b>labels</b> does not allow: only 0 labelled studies have arrived so far; at least 20 are needed" in oldest


def test_the_page_reads_the_last_decisions_only_and_survives_a_broken_one(airflow_home: None, home: Path) -> None:
    from cv_factory_airflow import pages

    config = ProjectConfig.model_validate(TINY)
    for minute in range(pages.DECISIONS_SHOWN + 5):
        content = {"time": f"2026-03-01T00:{minute:02d}:00Z", "reason": f"reason {minute}", "considered": [], "run": "r"}
        uri = f"{config.root}/decisions/20260301T00{minute:02d}00000000-r.json"
        storage.write_bytes(uri, b"{" if minute == 0 else json.dumps(content).encode())
    for minute, broken in ((22, b"[]"), (23, b'{"considered": [{"asks": true}]}'), (24, b"no JSON")):
        storage.write_bytes(f"{config.root}/decisions/20260301T00{minute:02d}00000000-r.json", broken)
    page = pages._section(config)
    assert page.count("-r.json is not a decision") == 3
    assert [f"reason {minute}<" in page for minute in (4, 5, 21)] == [False, True, True]


def test_pages_need_a_login(airflow_home: None) -> None:
    from cv_factory_airflow.plugin import Pages

    async def status(path: str) -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=Pages()), base_url="http://airflow") as client:
            return (await client.get(path)).status_code

    assert asyncio.run(status("/decisions")) == 401
    assert asyncio.run(status("/report?uri=file:///etc/passwd")) == 401


def test_reports_outside_a_root_are_refused(airflow_home: None, home: Path) -> None:
    from cv_factory_airflow.pages import _is_below

    root = home / "storage" / "tiny"
    root.mkdir(parents=True)
    (root / "link").symlink_to(home)
    uri = root.as_uri()
    assert _is_below(f"{uri}/runs/x/drift/report.html", uri)
    assert _is_below("s3://bucket/tiny/runs/x/report.html", "s3://bucket/tiny")
    for outside in (
        f"{uri}2/report.html",
        f"{uri}/../other/report.html",
        f"{uri}/%2e%2e/other/report.html",
        f"{uri}/link/secret.html",
        "file:///etc/passwd",
        "s3://bucket/tiny/../other/report.html",
        "s3://other/tiny/report.html",
    ):
        assert not _is_below(outside, uri), outside
        assert not _is_below(outside, "s3://bucket/tiny"), outside


WORKER = """
import sys
from types import SimpleNamespace
from cv_factory_airflow.operators import IngestOperator
run = SimpleNamespace(dag_id="tiny_training", run_id="manual__2026-01-01T00:00:00+00:00")
operator = IngestOperator(task_id="ingest", config=sys.argv[1], data="", overrides=sys.argv[2], runtime="process")
operator.execute({"dag_run": run})
"""


def _capture(root: str, name: str, lines: int, inference_id: str = "i") -> None:
    file = Path(unquote(root.removeprefix("file://"))) / "captures" / "tiny" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    line = capture_line(inference_id, b"", time=datetime.now(UTC))
    file.write_text((line + "\n") * lines)


def _trigger(place: str, window: int, start: Reading = READING) -> Any:
    """A trigger as the triggerer makes it: from what it serialized."""
    from airflow.sdk.module_loading import import_string

    from cv_factory_airflow.triggers import CaptureWindowTrigger

    path, arguments = CaptureWindowTrigger(place, start, window, time.time() + 20, poll_seconds=0.1).serialize()
    return import_string(path)(**json.loads(json.dumps(arguments)))


def _event(trigger: Any) -> dict[str, int]:
    async def first() -> dict[str, int]:
        return dict((await anext(aiter(trigger.run()))).payload)

    return asyncio.run(first())


def _kill_when_reading(operator: Any, started: list[psutil.Process]) -> None:
    """Once the stage has processes of its own; ``started`` is told it and them."""
    _until(lambda: operator._process is not None and bool(psutil.Process(operator._process.pid).children()))
    process = psutil.Process(operator._process.pid)
    started += [process, *process.children(recursive=True)]
    operator.on_kill()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)
