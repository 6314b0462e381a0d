"""The stage contract, through `cvf` processes on a real (tiny) ingest and preprocess."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cv_factory_ops.config import load
from cv_factory_ops.errors import DataError, Unavailable
from cv_factory_ops.records import IngestRecord, PreprocessRecord
from cv_factory_ops.stage import STAGES, read_result, run_stage

Project = Callable[..., Path]


def cvf(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cv_factory_ops.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_stage_prints_its_result_and_leaves_only_what_it_published(project: Project, home: Path) -> None:
    done = cvf("ingest", "--config", project(), "--run", home / "run")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    stored = json.loads((home / "run" / "ingest" / "result.json").read_text())
    assert printed == stored
    record = IngestRecord.model_validate(printed["record"])
    assert record.accepted == sum(record.splits.values())
    assert sorted(item.name for item in (home / "run").iterdir() if item.is_dir()) == ["ingest"]


def test_unchanged_inputs_are_not_worked_on_again(project: Project, home: Path) -> None:
    config, run = load(project()), (home / "run").as_uri()
    run_stage("ingest", config, run)
    first = run_stage("preprocess", config, run)
    shard = home / "run" / "preprocess" / "train-00000.npy"
    written = shard.stat().st_ino
    assert run_stage("preprocess", config, run) == first
    assert shard.stat().st_ino == written
    run_stage("preprocess", config, run, force=True)
    assert shard.stat().st_ino != written


def test_a_changed_setting_works_again_where_it_matters(project: Project, home: Path) -> None:
    run = (home / "run").as_uri()
    ingested = run_stage("ingest", load(project()), run)
    smaller = load(project(preprocessing={"size": 16}))
    assert run_stage("ingest", smaller, run) == ingested
    record = PreprocessRecord.model_validate(run_stage("preprocess", smaller, run).record)
    assert "16 x 16" in record.summary


def test_a_stage_without_its_predecessor_says_what_to_run(project: Project, home: Path) -> None:
    failed = cvf("preprocess", "--config", project(), "--run", home / "run")
    assert failed.returncode == 3
    assert "run `cvf ingest` with the same --config and --run first" in failed.stderr
    assert "Traceback" not in failed.stderr


def test_kill_9_leaves_no_half_result_and_a_retry_finishes(project: Project, home: Path) -> None:
    path = project(data={"source": {"kind": "phantoms", "patients": 400, "image_size": 128, "seed": 1}})
    command = [sys.executable, "-m", "cv_factory_ops.cli", "ingest", "--config", str(path), "--run", str(home / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = home / "run" / ".ingest.work"
    deadline = time.monotonic() + 60
    while not work.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (home / "run" / "ingest").exists()
    retried = cvf(*command[3:])
    assert retried.returncode == 0, retried.stderr
    assert not work.exists()
    phantoms = home / "var" / "storage" / "tiny" / "phantoms"
    assert len([item for item in phantoms.iterdir() if not item.name.startswith(".")]) == 1


def test_a_second_start_waits_for_the_first_and_returns_its_result(project: Project, home: Path) -> None:
    arguments = ["ingest", "--config", str(project()), "--run", str(home / "run")]
    command = [sys.executable, "-m", "cv_factory_ops.cli", *arguments]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0][0] == outputs[1][0]  # the seconds too: the work was done once
    assert sum("nothing has changed" in errors for _, errors in outputs) == 1


def test_results_of_another_version_are_refused(home: Path) -> None:
    (home / "run" / "ingest").mkdir(parents=True)
    (home / "run" / "ingest" / "result.json").write_text('{"stage": "ingest"}')
    with pytest.raises(DataError, match="written by another version"):
        read_result((home / "run").as_uri(), "ingest")


def test_a_full_disk_may_be_tried_again(project: Project, home: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("200k")
    with pytest.raises(Unavailable, match="no space left on the disk"):
        run_stage("ingest", load(project()), (disk / "run").as_uri())
    failed = cvf("ingest", "--config", project(), "--run", disk / "run")
    assert failed.returncode == 75
    assert "Traceback" not in failed.stderr
    assert not (disk / "run" / "ingest").exists()


def test_preprocessing_on_a_full_disk_is_one_line(project: Project, home: Path, small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("2m")
    path = project(preprocessing={"size": 512})
    assert cvf("ingest", "--config", path, "--run", disk / "run").returncode == 0
    failed = cvf("preprocess", "--config", path, "--run", disk / "run")
    assert failed.returncode == 75, failed.stderr
    assert "no space left on the disk" in failed.stderr
    assert not (disk / "run" / "preprocess").exists()


def test_what_is_published_anew_on_s3_is_read_anew(project: Project, bucket: str) -> None:
    run = f"s3://{bucket}/runs/2"
    run_stage("ingest", load(project()), run)
    first = PreprocessRecord.model_validate(run_stage("preprocess", load(project()), run).record)
    fewer = load(project(data={"source": {"kind": "phantoms", "patients": 48, "image_size": 48, "seed": 3}}))
    run_stage("ingest", fewer, run)
    second = PreprocessRecord.model_validate(run_stage("preprocess", fewer, run).record)
    assert sum(second.counts.values()) < sum(first.counts.values())


def test_a_run_on_s3_ends_with_its_result(project: Project, bucket: str) -> None:
    config, run = load(project()), f"s3://{bucket}/runs/1"
    run_stage("ingest", config, run)
    result = run_stage("preprocess", config, run)
    assert read_result(run, "preprocess") == result
    assert run_stage("preprocess", config, run) == result


def test_help_names_every_stage_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, cv_factory_ops.cli as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'evidently', 'boto3', 'pandas', 'numpy', 'airflow', 'sagemaker', 'pydicom'}\n"
        "print('heavy:', sorted(heavy & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.endswith("heavy: []\n")
    assert all(name in shown for name in STAGES)


def test_unexpected_errors_are_one_line_with_the_place_of_the_traceback(project: Project, home: Path) -> None:
    (home / "run").write_text("a file where a folder should be")
    failed = cvf("ingest", "--config", project(), "--run", home / "run")
    assert failed.returncode not in (0, -signal.SIGSEGV)
    assert "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1
    assert os.path.exists(home / "run")


@pytest.mark.parametrize("as_process_1", [False, True])
def test_sigterm_ends_a_stage_with_one_line_and_a_retry_finishes(project: Project, home: Path, as_process_1: bool) -> None:
    stopped, stage = start_long_ingest(project, home, as_process_1)
    os.kill(stage, signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 75, errors
    assert errors.splitlines()[-1] == "cvf ingest: interrupted; a retry goes on from what is stored"
    assert "Traceback" not in errors
    assert not (home / "run" / "ingest").exists()
    assert not (home / "run" / ".ingest.work").exists()
    retried = cvf("ingest", "--config", project(), "--run", home / "run")
    assert retried.returncode == 0, retried.stderr


def test_sigint_ends_a_stage_without_a_word(project: Project, home: Path) -> None:
    stopped, stage = start_long_ingest(project, home, as_process_1=False)
    os.kill(stage, signal.SIGINT)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 130
    assert "Traceback" not in errors
    assert not (home / "run" / "ingest").exists()


def test_sigterm_ends_a_stage_that_a_call_into_c_keeps_from_listening() -> None:
    code = (
        "import hashlib, cv_factory_ops.cli as cli\n"
        "with cli._ended_by_sigterm('ingest'):\n"
        "    while True:\n"
        "        try: print('ready', flush=True), hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
        "        except BaseException: pass"
    )
    busy = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert busy.stdout is not None
    busy.stdout.readline()
    busy.terminate()
    _, errors = busy.communicate(timeout=60)
    assert busy.returncode == 75
    assert errors == "cvf ingest: interrupted; a retry goes on from what is stored\n"


def start_long_ingest(project: Project, home: Path, as_process_1: bool) -> tuple[subprocess.Popen[str], int]:
    """An ingest that takes a while, at work, and its process id; as process 1 of a namespace of its own, as in a container."""
    path = project(data={"source": {"kind": "phantoms", "patients": 400, "image_size": 128, "seed": 1}})
    command = [sys.executable, "-m", "cv_factory_ops.cli", "ingest", "--config", str(path), "--run", str(home / "run")]
    if as_process_1:
        if subprocess.run(["unshare", "--pid", "--fork", "true"], capture_output=True).returncode:
            pytest.skip("a process namespace needs root")
        command = ["unshare", "--pid", "--fork", *command]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (home / "run" / ".ingest.work").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-P", str(started.pid)], capture_output=True, text=True).stdout.split()
    return started, int(children[0]) if as_process_1 else started.pid


def test_a_stage_that_a_program_has_run_leaves_its_signals_as_they_were() -> None:
    code = (
        "import os, signal, time, cv_factory_ops.cli as cli\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('my own'))\n"
        "print(cli.main(['ingest', '--config', 'missing.yaml', '--run', 'run']))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(2 * cli.GRACE_SECONDS)\n"
        "print('goes on')"
    )
    program = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert program.stdout.splitlines() == ["2", "my own", "goes on"], program.stderr
