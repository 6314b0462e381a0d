"""``docker-compose.yaml``: what Compose reads in it and, with ``make test-compose``, the loop on the containers that it starts.

No registry is asked: ``tests/compose`` holds stand-ins for the public images.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import cv_factory_ops
from cv_factory_ops.config import load
from cv_factory_ops.config.serving import ApiKeys
from cv_factory_ops.gateway.keys import KeyRing
from cv_factory_ops.stage import STAGES
from local.compose_env import write
from local.consumer import Study, make_studies
from local.stack import Airflow, _free_port
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
STAND_INS = ROOT / "tests" / "compose" / "docker-compose.test.yaml"
PORTS = {"AIRFLOW": 8080, "MLFLOW": 5000, "GATEWAY": 8000, "PROMETHEUS": 9090, "ALERTMANAGER": 9093, "GRAFANA": 3000}
WINDOW = 60
PROJECT = TINY | {
    "data": {"source": {"kind": "phantoms", "patients": 160, "image_size": 64, "seed": 7}},
    "training": TINY["training"] | {"epochs": 8},
    "drift": {"window": WINDOW, "minimum": 30, "alpha": 0.01, "wait_minutes": 1},
    "decision": {"cooldown_hours": 0, "minimum_labels": 20},
}

pytestmark = pytest.mark.skipif(
    shutil.which("docker") is None or subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0,
    reason="needs Docker with its plugin Compose: https://docs.docker.com/compose/install/",
)


@dataclass
class Composed:
    """The project as Compose sees it with some files, an ``.env`` and further variables."""

    files: list[Path]
    env_file: Path
    variables: dict[str, str]
    key: str = ""
    """A caller's, for the gateway."""

    def compose(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        files = [part for file in self.files for part in ("--file", str(file))]
        command = ["docker", "compose", *files, "--env-file", str(self.env_file), "--profile", "monitoring", *arguments]
        return subprocess.run(command, cwd=ROOT, env=os.environ | self.variables, capture_output=True, text=True)

    def told(self, *arguments: str) -> str:
        """Standard output of what must succeed."""
        done = self.compose(*arguments)
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-6000:]}"
        return done.stdout

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.variables[f'{name}_PORT']}"

    def secrets(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.env_file.read_text().splitlines())

    def secret(self, name: str) -> str:
        return self.secrets()[name]


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Composed:
    """``docker-compose.yaml`` alone."""
    env_file = tmp_path_factory.mktemp("env") / ".env"
    return Composed([ROOT / "docker-compose.yaml"], env_file, {}, write(env_file, "consumer"))


@pytest.fixture(scope="module")
def services(composed: Composed) -> dict[str, dict[str, Any]]:
    return dict(json.loads(composed.told("config", "--format", "json"))["services"])


def test_every_service_runs_with_few_rights_and_within_limits(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert int(service["mem_limit"]) > 0, name
        assert service["pids_limit"] > 0, name
        assert service.get("privileged", False) is False, name
    assert {name: service["cap_add"] for name, service in services.items() if "cap_add" in service} == {"volumes": ["CHOWN"]}


def test_nothing_is_published_but_on_this_machine_and_nothing_without_a_login(services: dict[str, dict[str, Any]]) -> None:
    published = {
        name: [port["host_ip"] for port in service["ports"]] for name, service in services.items() if "ports" in service
    }
    assert {address for addresses in published.values() for address in addresses} == {"127.0.0.1"}
    assert set(published) == {"airflow-api-server", "mlflow", "gateway", "prometheus", "alertmanager", "grafana"}


def test_no_argument_of_what_runs_on_holds_a_secret(services: dict[str, dict[str, Any]], composed: Composed) -> None:
    """Every user of the host sees arguments."""
    for name, service in services.items():
        command = " ".join(service.get("command") or [])
        assert not any(secret in command for secret in composed.secrets().values()), name
        assert "$" not in command.partition("exec ")[2], f"{name}: the shell puts a variable into the arguments"


def test_what_runs_on_tells_its_health_and_every_image_has_a_version(services: dict[str, dict[str, Any]]) -> None:
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"volumes", "airflow-init"}
    tags = {name: service["image"].rpartition(":")[2] for name, service in services.items()}
    assert "latest" not in tags.values()
    assert all(tag[0].isdigit() or tag[:2] in {"v3", "v0"} for tag in tags.values()), tags
    ours = {tags[name] for name, service in services.items() if service["image"].startswith("cv-factory-")}
    assert ours == {cv_factory_ops.__version__}


def test_a_service_waits_for_what_it_needs(services: dict[str, dict[str, Any]]) -> None:
    waits = {
        name: {on: need["condition"] for on, need in service.get("depends_on", {}).items()}
        for name, service in services.items()
    }
    assert waits["mlflow"] == {"postgres": "service_healthy", "s3": "service_healthy"}
    assert waits["airflow-api-server"] == {"airflow-init": "service_completed_successfully"}
    assert {"mlflow", "endpoint", "s3", "airflow-api-server"} <= set(waits["airflow-scheduler"])
    assert {need for needs in waits.values() for need in needs.values()} <= {
        "service_healthy",
        "service_completed_successfully",
    }


def test_without_secrets_compose_says_how_to_make_them(tmp_path: Path, composed: Composed) -> None:
    (tmp_path / "empty").touch()
    refused = Composed(composed.files, tmp_path / "empty", {}).compose("config", "--quiet")
    assert refused.returncode != 0
    assert "run make env" in refused.stderr


def test_secrets_are_their_owners_alone_and_are_not_made_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "local.compose_env", "--file", str(tmp_path / ".env")]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    before = (tmp_path / ".env").read_text()
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert stat.S_IMODE((tmp_path / ".env").stat().st_mode) == 0o600
    assert (again.returncode, (tmp_path / ".env").read_text()) == (1, before)
    assert made.stdout.split()[-1] not in before
    ignored = subprocess.run(["git", "check-ignore", "--no-index", ".env"], cwd=ROOT, capture_output=True)
    assert ignored.returncode in {0, 128}  # 128: no repository, in an export of the sources


def test_the_key_that_is_printed_opens_the_gateway(composed: Composed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", composed.secret("CVF_GATEWAY_KEYS").strip("'"))
    ring = KeyRing(ApiKeys(env="KEYS"))
    assert asyncio.run(ring.caller(composed.key)) == "consumer"
    assert asyncio.run(ring.caller(f"cvf_consumer_{'x' * 43}")) is None


# ---- the containers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(composed: Composed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Composed]:
    """The started project, on ports of its own, with a small project to train; volumes and containers go with it."""
    if not os.environ.get("CVF_COMPOSE"):
        pytest.skip("starting the containers takes minutes; `make test-compose` asks for it")
    configs = tmp_path_factory.mktemp("configs")
    configs.chmod(0o755)
    (configs / "tiny.yaml").write_text(yaml.safe_dump(PROJECT))
    variables = {f"{name}_PORT": str(_free_port(port)) for name, port in PORTS.items()}
    variables |= {"CVF_CONFIGS": str(configs), "CVF_PROJECT": "tiny", "COMPOSE_PROJECT_NAME": "cvf-compose-test"}
    stack = Composed([*composed.files, STAND_INS], composed.env_file, variables, composed.key)
    stack.told("build", "postgres", "s3", "prometheus", "alertmanager")
    try:
        started = stack.compose("up", "--no-build", "--wait")
        assert started.returncode == 0, started.stderr[-3000:] + stack.compose("logs", "--tail", "30").stdout[-20000:]
        yield stack
    finally:
        stack.compose("down", "--volumes", "--timeout", "20")


@pytest.fixture(scope="module")
def token(running: Composed) -> str:
    """Of Airflow's administrator."""
    login = {"username": "admin", "password": running.secret("AIRFLOW_ADMIN_PASSWORD")}
    return str(httpx.post(f"{running.url('AIRFLOW')}/auth/token", json=login).json()["access_token"])


@pytest.mark.timeout(3600)  # with the start
def test_all_services_are_healthy(running: Composed) -> None:
    found = {line["Service"]: line for line in map(json.loads, running.told("ps", "--all", "--format", "json").splitlines())}
    ended = {name: line["ExitCode"] for name, line in found.items() if line["State"] == "exited"}
    assert ended == {"volumes": 0, "airflow-init": 0}
    assert {line["Health"] for name, line in found.items() if name not in ended} == {"healthy"}


def test_nobody_comes_in_without_a_login(running: Composed) -> None:
    assert httpx.get(f"{running.url('AIRFLOW')}/api/v2/dags").status_code == 401
    assert httpx.get(f"{running.url('MLFLOW')}/api/2.0/mlflow/registered-models/search").status_code == 401
    assert httpx.post(f"{running.url('GATEWAY')}/predict", content=b"").status_code == 401
    environment = ["--env", f"PGPASSWORD={running.secret('AIRFLOW_DB_PASSWORD')}"]
    psql = ["psql", "--host", "127.0.0.1", "--username", "airflow", "--command", "SELECT 1", "--dbname"]
    assert running.compose("exec", *environment, "postgres", *psql, "airflow").returncode == 0
    assert "permission denied" in running.compose("exec", *environment, "postgres", *psql, "mlflow").stderr


def test_nobody_sees_a_secret_among_the_processes(running: Composed) -> None:
    shown = running.told("top")
    assert "mlflow server" in shown
    assert [name for name, secret in running.secrets().items() if secret in shown] == []


def test_no_program_writes_into_its_image(running: Composed) -> None:
    for service in ("airflow-scheduler", "mlflow", "endpoint", "gateway", "exporter", "postgres", "s3"):
        assert "Read-only file system" in running.compose("exec", service, "touch", "/usr/local/bin/new").stderr, service
        assert running.told("exec", service, "id", "-u").strip() != "0", service


@pytest.mark.timeout(7200)
def test_the_loop_goes_round(running: Composed, token: str) -> None:
    config, airflow = load(Path(running.variables["CVF_CONFIGS"]) / "tiny.yaml"), Airflow(running.url("AIRFLOW"), token)
    first = run_dag(airflow, "training", airflow.trigger("tiny_training", run_id="first"))
    assert answered(running, make_studies(config, WINDOW, "ordinary", ""))[0][1] == first["register"]["bundle_digest"]
    quiet = run_dag(airflow, "drift_monitor", airflow.trigger("tiny_drift_monitor", run_id="quiet"))
    assert quiet["drift"]["verdict"] == "no drift"

    shifted = make_studies(config, 2 * WINDOW, "shifted", "")
    ids = [inference_id for inference_id, _ in answered(running, shifted)]
    labels = {inference_id: study.label for inference_id, study in zip(ids, shifted, strict=True)}
    assert ask(running, "/feedback", json={"labels": labels}).json() == {"stored": 2 * WINDOW}
    drifted = run_dag(airflow, "drift_monitor", airflow.trigger("tiny_drift_monitor", run_id="shifted"))
    assert drifted["drift"]["verdict"] == "drift"
    assert drifted["decide"]["retrain"]

    second = run_dag(airflow, "retraining", drifted["decide"]["retraining"])
    assert answered(running, shifted[:1])[0][1] == second["register"]["bundle_digest"] != first["register"]["bundle_digest"]
    champion = {"name": "tiny", "alias": "champion"}
    login = ("admin", running.secret("MLFLOW_ADMIN_PASSWORD"))
    found = httpx.get(f"{running.url('MLFLOW')}/api/2.0/mlflow/registered-models/alias", params=champion, auth=login).json()
    assert found["model_version"]["version"] == str(second["register"]["model_version"]) == "2"
    page = httpx.get(f"{running.url('AIRFLOW')}/cv-factory/decisions", headers={"Authorization": f"Bearer {token}"}).text
    assert drifted["decide"]["reason"].split(";")[0] in page


def test_prometheus_hears_the_services_and_reaches_alertmanager(running: Composed) -> None:
    api = f"{running.url('PROMETHEUS')}/api/v1"
    targets = httpx.get(f"{api}/targets").json()["data"]["activeTargets"]
    assert {target["labels"]["job"]: target["health"] for target in targets} == dict.fromkeys(
        ("gateway", "inference", "exporter"), "up"
    )
    managers = httpx.get(f"{api}/alertmanagers").json()["data"]["activeAlertmanagers"]
    assert [manager["url"] for manager in managers] == ["http://alertmanager:9093/api/v2/alerts"]
    champion = httpx.get(f"{api}/query", params={"query": "cvf_model_champion_info"}).json()["data"]["result"]
    assert [found["metric"]["project"] for found in champion] == ["tiny"]


def run_dag(airflow: Airflow, name: str, run_id: str) -> dict[str, dict[str, Any]]:
    """What each stage of a DAG run has returned, once it has ended well."""
    dag_id = f"tiny_{name}"
    assert airflow.wait(dag_id, run_id) == "success", airflow.tasks(dag_id, run_id)
    done = [task for task, state in airflow.tasks(dag_id, run_id).items() if state == "success" and task in STAGES]
    return {stage: airflow.xcom(dag_id, run_id, stage) for stage in done}


def ask(running: Composed, path: str, **request: Any) -> httpx.Response:
    headers = {"X-API-Key": running.key, **request.pop("headers", {})}
    return httpx.post(f"{running.url('GATEWAY')}{path}", headers=headers, timeout=60, **request).raise_for_status()


def answered(running: Composed, studies: list[Study]) -> list[tuple[str, str]]:
    """Inference id and bundle of the gateway's answer to each study."""

    def answer(study: Study) -> tuple[str, str]:
        told = ask(running, "/predict", content=study.body, headers={"Content-Type": study.content_type}).json()
        return told["inference_id"], told["bundle_digest"]

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(answer, studies))
