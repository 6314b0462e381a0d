"""Drift check, decision and retraining by a schedule that is not Airflow's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from cv_factory_ops import cli, stage
from cv_factory_ops.config import load
from cv_factory_ops.drift.decisions import retrainings
from cv_factory_ops.records import IngestRecord
from tests.conftest import TINY
from tests.drift import Project, project_in, quiet
from tests.helm import CHART, rendered
from tests.records import put
from tests.test_decide import checked

SCRIPT = CHART / "files" / "drift.sh"


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The job of the chart's drift check."""
    found = rendered(CHART / "ci" / "production-values.yaml", "--kube-version", "1.32")
    spec = found[("CronJob", "drift")]["spec"]["jobTemplate"]["spec"]
    assert isinstance(spec, dict)
    return spec


def run_as_is(command: list[str], project: Project, home: Path) -> subprocess.CompletedProcess[str]:
    """A job's command where nothing can be written to, its variables set to places of this test."""
    (home / "demo.yaml").write_text(yaml.safe_dump(project.config.model_dump(mode="json")))
    places = {"PROJECT": str(home / "demo.yaml"), "CVF_STORAGE": project.config.storage, "JOB": "demo-drift-29400015"}
    places |= {"RUNS": f"{project.config.storage}/{project.config.project}/runs", "CVF_HOME": str(home)}
    places |= {"MLFLOW_TRACKING_URI": project.config.mlflow.tracking_uri, "CVF_PSEUDONYM_KEY": "a key for tests"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        command,
        cwd="/proc",  # not writable, for root neither
        env={name: os.environ[name] for name in os.environ if not name.startswith("CVF_")}
        | places
        | {"PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_chart_s_drift_check_runs_as_it_is(home: Path) -> None:
    project = project_in(home, "demo", f"sqlite:///{home}/mlflow.db")
    project.capture(quiet(np.random.default_rng(1), 12))
    ended = run_as_is(["sh", "-euc", SCRIPT.read_text()], project, home)
    assert ended.returncode == 0, ended.stderr
    drift, decide = ended.stdout.splitlines()
    assert json.loads(drift)["record"]["verdict"] == "not enough data"
    decided = json.loads(decide)
    assert decided["record"]["retrain"] is False
    assert decided["run"] == f"{project.config.root}/runs/cron.demo-drift-29400015"
    ended = run_as_is(["cvf", "retrain", "--config", str(home / "demo.yaml")], project, home)
    assert ended.stdout == "nothing to do: no retraining has been decided\n"


def test_the_chart_gives_the_drift_check_its_variables_and_a_folder_that_can_be_written_to(job: dict[str, Any]) -> None:
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    given = {variable["name"]: variable.get("value") for variable in container["env"]}
    assert container["command"] == ["sh", "-euc", SCRIPT.read_text()]
    assert set(re.findall(r"\$([A-Z]+)", SCRIPT.read_text())) <= set(given)
    assert given["RUNS"] == "s3://imaging/cv-factory/chest_xray/runs"
    assert container["securityContext"]["readOnlyRootFilesystem"]
    empty = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert given["CVF_HOME"] in {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in empty}


def test_a_home_that_cannot_be_written_to_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "project.yaml").write_text(yaml.safe_dump(TINY))
    monkeypatch.setenv("CVF_HOME", "/proc")
    given = ["--config", str(tmp_path / "project.yaml"), "--run", "s3://bucket/run"]
    assert cli.main(["decide", *given]) in {3, 75}
    told = capsys.readouterr().err
    assert "/proc/var/work" in told
    assert "CVF_HOME" in told
    assert "unexpected" not in told


def test_exit_codes_that_end_the_job_are_those_that_a_retry_would_not_change(job: dict[str, Any]) -> None:
    rules = job["podFailurePolicy"]["rules"]
    assert [(rule["action"], rule["onExitCodes"]["values"]) for rule in rules] == [("FailJob", [2, 3, 4])]


def test_a_decided_retraining_runs_the_stages_with_captured_studies(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stage, "training_of", lambda _: ("ingest",))
    (home / "project.yaml").write_text(yaml.safe_dump(TINY))
    given = ["--config", str(home / "project.yaml")]
    put((home / "r1").as_uri(), checked())
    assert cli.main(["decide", *given, "--run", str(home / "r1"), "--why", "new scanner", "--by", "mara"]) == 0
    record = json.loads(capsys.readouterr().out)["record"]
    assert cli.main(["retrain", *given]) == 0
    (decision,) = retrainings(config := load(home / "project.yaml"))
    assert decision.retraining == f"{config.root}/runs/tiny_retraining.{record['retraining']}"
    assert capsys.readouterr().out.endswith(f": {decision.retraining}\n")
    ingested = IngestRecord.model_validate(stage.read_result(decision.retraining, "ingest").record)
    assert ingested.splits["train"] > 0
    with_captures = config.model_copy(update={"data": config.data.model_copy(update={"include_captures": True})})
    before = stage.read_result(decision.retraining, "ingest")
    assert stage.run_stage("ingest", with_captures, decision.retraining) == before, "made with captured studies, it stands"
