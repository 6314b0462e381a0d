"""The DAG files: how they load, how they are built, and each run for real by ``airflow dags test``."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_factory_airflow import run_uri
from cv_factory_ops import audit, storage
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.domain import DeidentificationConfig, open_domain
from cv_factory_ops.stage import STAGES, TRAINING, training_of
from cv_factory_ops.storage import path_of
from local.stack import MARK, sourced, stop
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
KINDS = ("training", "retraining", "drift_monitor", "batch_inference")
HEAVY = {"torch", "faiss", "evidently", "mlflow", "boto3", "botocore", "pandas", "numpy", "kubernetes", "sklearn", "sagemaker"}


@dataclass(frozen=True)
class LocalAirflow:
    """What a person has who sourced ``airflow.env``: an Airflow home, and a folder of projects."""

    home: Path
    environment: dict[str, str]

    @property
    def configs(self) -> Path:
        return self.home / "configs"

    def airflow(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self._run(str(Path(sys.executable).with_name("airflow")), *arguments)

    def python(self, script: str, *arguments: str, **environment: str) -> Any:
        """The JSON in the last line that a script prints."""
        ended = self._run(sys.executable, "-c", script, *arguments, **environment)
        assert ended.returncode == 0, ended.stderr[-3000:]
        return json.loads(ended.stdout.splitlines()[-1])

    def _run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=self.environment | environment, cwd=self.home, capture_output=True, text=True)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAirflow]:
    home = tmp_path_factory.mktemp("local")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    environment = sourced(
        {
            "CVF_HOME": str(home),
            "CVF_CONFIGS": str(home / "configs"),
            "CVF_PSEUDONYM_KEY": "a key for tests",
            "AWS_ENDPOINT_URL_SAGEMAKER": endpoint,
            "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint,
            MARK: str(home),
        }
    )
    local = LocalAirflow(home, environment)
    local.configs.mkdir()
    drift = {"drift": {"window": 20, "minimum": 10, "wait_minutes": 0.02}}
    tiny = TINY | drift | {"decision": {"cooldown_hours": 0, "minimum_labels": 0}}
    (local.configs / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    migrated = local.airflow("db", "migrate")
    assert migrated.returncode == 0, migrated.stderr[-3000:]
    yield local
    stop(home)


@pytest.fixture(scope="module")
def trained(local: LocalAirflow) -> subprocess.CompletedProcess[str]:
    """``airflow dags test tiny_training``: afterwards there are a champion and a live endpoint."""
    return local.airflow("dags", "test", "tiny_training", "--conf", '{"overrides": {"training.epochs": 1}}')


@pytest.fixture(scope="module")
def parsed(local: LocalAirflow) -> dict[str, Any]:
    """The project's own DAGs, as the DAG processor would see them."""
    found: dict[str, Any] = local.python(PARSE, CVF_CONFIGS=str(ROOT / "configs"))
    return found


def test_all_dag_files_load(parsed: dict[str, Any]) -> None:
    projects = [yaml.safe_load(file.read_text())["project"] for file in (ROOT / "configs").glob("*.yaml")]
    assert parsed["errors"] == {}
    assert sorted(parsed["dags"]) == sorted(f"{project}_{kind}" for project in projects for kind in KINDS)


def test_dag_files_import_nothing_heavy(parsed: dict[str, Any]) -> None:
    assert set(parsed["modules"]) & HEAVY == set()


@pytest.mark.parametrize("kind", ["training", "retraining"])
def test_training_is_the_chain_of_its_stages(parsed: dict[str, Any], kind: str) -> None:
    tasks = parsed["dags"][f"demo_{kind}"]["tasks"]
    assert _chain(tasks) == list(TRAINING)
    indexed = parsed["dags"][f"chest_xray_{kind}"]["tasks"]
    assert [name for name in _chain(indexed) if name in STAGES] == list(training_of(load(ROOT / "configs" / "chest_xray.yaml")))
    assert "index" in indexed
    captures = {"data.include_captures": True} if kind == "retraining" else None
    assert all(task["settings"] == captures for task in tasks.values())


def test_drift_monitor_waits_checks_decides_and_triggers(parsed: dict[str, Any]) -> None:
    monitor = parsed["dags"]["demo_drift_monitor"]
    names = ["wait_for_requests", "drift", "decide", "wants_retraining", "wait_for_end_of_quiet_hours", "retrain"]
    assert _chain(monitor["tasks"]) == names
    assert (monitor["tasks"]["drift"]["outlets"], monitor["params"]["why"]["value"]) == (["demo_drift_check"], "")
    assert parsed["dags"]["demo_retraining"]["tasks"]["promote"]["outlets"] == ["demo_champion"]
    assert (monitor["schedule"], monitor["catchup"]) == ("0 0 * * *", False)
    assert parsed["dags"]["demo_training"]["schedule"] is None


def test_each_dag_is_bounded_and_tagged(parsed: dict[str, Any]) -> None:
    for name, dag in parsed["dags"].items():
        assert dag["max_active_runs"] == 1
        assert {"demo", "cv-factory"} <= set(dag["tags"]) or not name.startswith("demo_")
        assert dag["doc"]
        for task in dag["tasks"].values():
            assert task["retries"] == 2
            assert 0 < task["timeout"] <= 24 * 3600


def test_trigger_form_offers_config_data_runtime_and_overrides(parsed: dict[str, Any]) -> None:
    for name, dag in parsed["dags"].items():
        form = dag["params"]
        assert Path(form["config"]["value"]).is_file(), name
        assert form["data"] == {"value": None, "type": ["null", "string"], "enum": None}
        assert form["runtime"] == {"value": "process", "type": "string", "enum": ["process"]}
        assert form["overrides"]["type"] == "object"


def test_links_and_pages_are_registered(local: LocalAirflow) -> None:
    plugins = json.loads(local.airflow("plugins", "--output", "json").stdout)
    assert [plugin["name"] for plugin in plugins] == ["cv_factory"]
    assert "decisions" in str(plugins[0]["external_views"])


def test_broken_project_leaves_the_others_alone(local: LocalAirflow) -> None:
    broken = local.configs / "broken.yaml"
    broken.write_text("project: broken\nlabels: [a, b]\ndata: {source: {kind: floppy}}\n")
    try:
        found = local.python(PARSE)
    finally:
        broken.unlink()
    assert sorted(found["dags"]) == sorted(f"tiny_{kind}" for kind in KINDS)
    assert [Path(file).name for file in found["errors"]] == ["broken_projects.py"]
    (error,) = found["errors"].values()
    assert f"{broken}: data.source.kind: 'floppy' given; allowed: 'phantoms'" in error


def test_second_file_of_a_project_is_reported_and_left_out(local: LocalAirflow) -> None:
    second = local.configs / "tiny_again.yaml"
    second.write_text((local.configs / "tiny.yaml").read_text())
    try:
        found = local.python(PARSE)
    finally:
        second.unlink()
    assert sorted(found["dags"]) == sorted(f"tiny_{kind}" for kind in KINDS)
    assert {dag["params"]["config"]["value"] for dag in found["dags"].values()} == {str(local.configs / "tiny.yaml")}
    (error,) = found["errors"].values()
    assert f"{second}: project: 'tiny' given, which {local.configs / 'tiny.yaml'} has" in error


def test_training_dag_runs(local: LocalAirflow, trained: subprocess.CompletedProcess[str]) -> None:
    assert trained.returncode == 0, trained.stdout[-5000:]
    assert _published(local, "training") == set(TRAINING)


@pytest.mark.parametrize(
    ("kind", "stages"), [pytest.param("retraining", TRAINING, marks=pytest.mark.proof), ("batch_inference", ("predict",))]
)
def test_dag_runs_after_a_training(
    local: LocalAirflow, trained: subprocess.CompletedProcess[str], kind: str, stages: tuple[str, ...]
) -> None:
    ended = local.airflow("dags", "test", f"tiny_{kind}")
    assert ended.returncode == 0, ended.stdout[-5000:]
    assert _published(local, kind) == set(stages)


def test_drift_monitor_without_requests_says_so(local: LocalAirflow, trained: subprocess.CompletedProcess[str]) -> None:
    monitored = local.python(MONITOR, "2026-01-01")
    record = monitored["drift"]
    assert record["verdict"] == "not enough data"
    assert monitored["tasks"]["retrain"] == "skipped"
    assert monitored["triggered"] == {}


def test_drift_triggers_one_retraining_even_when_repeated(
    local: LocalAirflow, trained: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    _send_the_same_study(local, tmp_path, times=20)
    first, again = local.python(MONITOR, "2026-01-02"), local.python(MONITOR, "2026-01-02")
    assert first["drift"]["verdict"] == "drift"
    assert set(first["tasks"].values()) == {"success"}
    name, conf = first["decide"]["retraining"], {"overrides": {"drift.minimum": 5}, "data": None}
    assert first["triggered"] == {name: conf}
    assert again["triggered"] == first["triggered"]
    assert again["decide"] == first["decide"]
    told = {"verdict": "drift", "requests": 20, "bundle_digest": first["drift"]["bundle_digest"]}
    assert told.items() <= first["event"].items()
    assert again["tasks"] == first["tasks"] | {"retrain": "skipped"}


@pytest.fixture(scope="module")
def guarded(local: LocalAirflow, trained: subprocess.CompletedProcess[str]) -> Iterator[ProjectConfig]:
    """The project ``guarded``, in which a person must agree. What comes before the gate is that of ``tiny``."""
    path = local.configs / "guarded.yaml"
    tree = yaml.safe_load((local.configs / "tiny.yaml").read_text())
    path.write_text(yaml.safe_dump(tree | {"project": "guarded", "approval": {"enabled": True, "assignees": ["mara"]}}))
    root = local.home / "var" / "storage"
    (first,) = (root / "tiny" / "runs").glob("tiny_training.*")
    for day in ("2026-03-01", "2026-03-02"):
        run = path_of(run_uri((root / "guarded").as_uri(), "guarded_training", f"manual__{day}T00:00:00+00:00"))
        assert run is not None
        for stage in ("ingest", "preprocess", "train", "evaluate"):
            shutil.copytree(first / stage, run / stage)
            result = run / stage / "result.json"
            result.write_text(result.read_text().replace(str(first), str(run)))
    yield load(path, [f"storage={root}"])  # wherever the home of a test is
    path.unlink()


@pytest.mark.proof
def test_a_rejected_rollout_stops_with_the_cause_and_changes_nothing(local: LocalAirflow, guarded: ProjectConfig) -> None:
    ended = local.python(ASKED, "2026-03-01", "Reject", "too few men", **LOGINS)
    assert ended["statuses"] == {"otto": 403, "mara": 200}, "only those may answer who were named"
    assert "auc" in ended["question"]["body"]
    assert ended["question"]["subject"] == "Roll out version 1 of guarded?"
    states = ended["states"]
    assert (states["ask_approval"], states["approve"], states["deploy"]) == ("success", "failed", "upstream_failed")
    assert "the rollout was rejected by mara: too few men" in ended["log"]
    history = [entry.change for entry in audit.verify(guarded)]
    assert [change.action for change in history] == ["registration"], "no promotion, and nothing was deployed"
    assert "guarded" not in ended["endpoints"]


@pytest.mark.proof
def test_an_approved_rollout_has_the_approval_in_history_and_evidence(local: LocalAirflow, guarded: ProjectConfig) -> None:
    ended = local.python(ASKED, "2026-03-02", "Approve", "enough of each sex", **LOGINS)
    assert set(ended["states"].values()) == {"success"}, ended["states"]
    change = audit.verify(guarded)[-1].change
    assert (change.action, change.approval.who, change.approval.note) == ("promotion", "mara", "enough of each sex")
    assert change.who == f"run {change.run.rsplit('/', 1)[1]}"
    assert change.who.startswith("run guarded_training.manual__2026-03-02")
    with zipfile.ZipFile(BytesIO(storage.read_bytes(change.evidence))) as archive:
        kept = json.loads(archive.read("3-impact-assessment/approval.json"))
    assert (kept["who"], kept["approved"], kept["note"]) == ("mara", True, "enough of each sex")
    assert "guarded" in ended["endpoints"]


def _published(local: LocalAirflow, kind: str) -> set[str]:
    """Stages with a result in the one run of a DAG."""
    (run,) = (local.home / "var" / "storage" / "tiny" / "runs").glob(f"tiny_{kind}.*")
    return {result.parent.name for result in run.glob("*/result.json")}


def _send_the_same_study(local: LocalAirflow, folder: Path, times: int) -> None:
    """Requests that are nothing like the reference, as they are all alike, sent as any consumer would."""
    import boto3

    domain = open_domain("medical")
    domain.generate(folder, patients=8, image_size=48, seed=99, labels=list(TINY["labels"]))
    study = domain.deidentify(min(folder.rglob("*.dcm")).read_bytes(), DeidentificationConfig(pixels="trust")).content
    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    client = boto3.client("sagemaker-runtime", endpoint_url=local.environment["AWS_ENDPOINT_URL_SAGEMAKER"], **keys)
    for _ in range(times):
        client.invoke_endpoint(EndpointName="tiny", ContentType=domain.content_type, Body=study)
    captured = local.home / "var" / "storage" / "tiny" / "captures"
    deadline = time.monotonic() + 30
    while sum(len(file.read_bytes().splitlines()) for file in captured.rglob("*.jsonl")) < times:
        assert time.monotonic() < deadline, "the endpoint has not captured the requests"
        time.sleep(0.2)


def _chain(tasks: dict[str, Any]) -> list[str]:
    """Task ids from the one without an upstream to the one without a downstream; every task has at most one of each."""
    (current,) = set(tasks) - {after for task in tasks.values() for after in task["downstream"]}
    names = [current]
    while following := tasks[names[-1]]["downstream"]:
        assert len(following) == 1
        names += following
    assert len(names) == len(tasks)
    return names


PARSE = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
bag = DagBag()
def task(item):
    return {
        "downstream": sorted(item.downstream_task_ids),
        "retries": item.retries,
        "timeout": item.execution_timeout.total_seconds(),
        "settings": getattr(item, "settings", None),
        "outlets": [asset.name for asset in item.outlets],
    }
def param(item):
    return {"value": item.value, "type": item.schema["type"], "enum": item.schema.get("enum")}
def dag(item):
    return {
        "tasks": {each.task_id: task(each) for each in item.tasks},
        "params": {name: param(item.params.get_param(name)) for name in item.params},
        "schedule": getattr(item.timetable, "expression", None),
        "catchup": item.catchup,
        "tags": sorted(item.tags),
        "max_active_runs": item.max_active_runs,
        "doc": item.doc_md,
    }
modules = sorted({name.partition(".")[0] for name in sys.modules})
print()
dags = {name: dag(each) for name, each in bag.dags.items()}
print(json.dumps({"dags": dags, "errors": bag.import_errors, "modules": modules}))
"""

LOGINS = {"AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "False"}
"""Where everybody is an admin, Airflow lets everybody answer."""

ASKED = """
import io, json, logging, os, sys, threading, time
from datetime import datetime
from airflow.api_fastapi.app import create_app
from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from fastapi.testclient import TestClient
day, choice, note = sys.argv[1:]
run_id, dag_id = f"manual__{day}T00:00:00+00:00", "guarded_training"
DagBundlesManager().sync_bundles_to_db()
bag = DagBag()
sync_bag_to_db(bag, "dags-folder", None)
app = create_app(apps="core")
task = f"/api/v2/dags/{dag_id}/dagRuns/{run_id}/taskInstances/ask_approval"
found = {"statuses": {}}
def browser(user):
    token = app.state.auth_manager.generate_jwt(SimpleAuthManagerUser(username=user, role="admin"))
    return TestClient(app, headers={"Authorization": f"Bearer {token}"})
def answer():
    mara = browser("mara")
    while mara.get(task).json().get("state") != "awaiting_input":
        time.sleep(0.5)
    found["question"] = mara.get(f"{task}/-1/hitlDetails").json()
    given = {"chosen_options": [choice], "params_input": {"note": note}}
    for user in ("otto", "mara"):
        found["statuses"][user] = browser(user).patch(f"{task}/-1/hitlDetails", json=given).status_code
threading.Thread(target=answer, daemon=True).start()
when = datetime.fromisoformat(day + "T00:00:00+00:00")
stdout, sys.stdout = sys.stdout, io.StringIO()
run = bag.dags[dag_id].test(run_after=when, logical_date=when, mark_success_pattern="ingest|preprocess|train|evaluate")
log, sys.stdout = sys.stdout.getvalue(), stdout
import boto3
keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
client = boto3.client("sagemaker", endpoint_url=os.environ["AWS_ENDPOINT_URL_SAGEMAKER"], **keys)
found["endpoints"] = [item["EndpointName"] for item in client.list_endpoints()["Endpoints"]]
found["states"] = {each.task_id: str(each.state) for each in run.get_task_instances()}
found["log"] = log[-20000:]
print()
print(json.dumps(found))
"""

MONITOR = """
import json, sys
from datetime import datetime
from sqlalchemy import select
from airflow.dag_processing.bundles.manager import DagBundlesManager
from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
from airflow.models.asset import AssetEvent, AssetModel
from airflow.models.dagrun import DagRun
from airflow.utils.session import create_session
DagBundlesManager().sync_bundles_to_db()
bag = DagBag()
sync_bag_to_db(bag, "dags-folder", None)
when = datetime.fromisoformat(sys.argv[1] + "T00:00:00+00:00")
run = bag.dags["tiny_drift_monitor"].test(run_after=when, logical_date=when, run_conf={"overrides": {"drift.minimum": 5}})
tasks = {each.task_id: each for each in run.get_task_instances()}
with create_session() as session:
    runs = session.scalars(select(DagRun).where(DagRun.dag_id == "tiny_retraining", DagRun.run_id.like("drift%"))).all()
    triggered = {each.run_id: {name: each.conf[name] for name in ("overrides", "data")} for each in runs}
    events = select(AssetEvent).join(AssetModel, AssetModel.id == AssetEvent.asset_id).order_by(AssetEvent.id.desc())
    event = session.scalars(events.where(AssetModel.name == "tiny_drift_check")).first()
    extra = event and event.extra
states = {name: str(each.state) for name, each in tasks.items()}
records = {name: tasks[name].xcom_pull(task_ids=name) for name in ("drift", "decide")}
print()
print(json.dumps({"tasks": states, "triggered": triggered, "event": extra} | records))
"""
