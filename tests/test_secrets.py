"""MLflow behind its own login, and credentials that come from AWS Secrets Manager by Airflow's backend: used, and in no log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import boto3
import httpx
import pytest
import yaml
from mlflow import MlflowClient

from cv_factory_ops.doctor.stores import _artifacts
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.records import RegisterRecord
from cv_factory_ops.stage import read_result, run_stage
from local.stack import answers, mlflow_command
from tests.conftest import TINY, copy_run
from tests.test_doctor import found, free_port
from tests.test_promotion import World

ADMIN, TRAINER, READER = (
    ("admin", "the admin's long password"),
    ("trainer", "the trainer's password"),
    ("reader", "reader's password"),
)
BACKEND = "airflow.providers.amazon.aws.secrets.secrets_manager.SecretsManagerBackend"
WORKER = """
import sys
from types import SimpleNamespace
from airflow.sdk.exceptions import AirflowFailException
from cv_factory_airflow.operators import IngestOperator, PredictOperator

given = {"config": sys.argv[1], "data": "", "overrides": "{}", "runtime": "process"}
given |= {"aws_conn_id": "hospital", "mlflow_conn_id": sys.argv[2] or None}
run = SimpleNamespace(dag_id="tiny_training", run_id="manual__1")
print(IngestOperator(task_id="ingest", **given).execute({"dag_run": run})["summary"])
try:
    PredictOperator(task_id="predict", **given).execute({"dag_run": run})
except AirflowFailException as error:
    print("failed:", error)
"""


class Guarded(NamedTuple):
    """An MLflow that asks for a login."""

    url: str

    def ask(self, path: str, body: dict[str, str]) -> None:
        httpx.post(f"{self.url}/api/2.0/mlflow/{path}", json=body, auth=ADMIN, timeout=30).raise_for_status()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """``mlflow server --app-name basic-auth``, with an account that may write, and one that may only read."""
    pytest.importorskip("flask_wtf", reason="needs Flask-WTF: pip install 'mlflow[auth]'")
    folder, port = tmp_path_factory.mktemp("guarded"), free_port()
    settings = {"default_permission": "READ", "database_uri": f"sqlite:///{folder}/users.db", "admin_username": ADMIN[0]}
    settings |= {"authorization_function": "mlflow.server.auth:authenticate_request_basic_auth"}
    (folder / "auth.ini").write_text("[mlflow]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items()))
    environment = os.environ | {
        "MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for tests",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    command = [*mlflow_command("127.0.0.1", port, folder), "--app-name", "basic-auth"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    guarded = Guarded(f"http://127.0.0.1:{port}")
    deadline = time.monotonic() + 120
    while not answers(f"{guarded.url}/health"):
        assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        time.sleep(0.3)
    for name, password in (TRAINER, READER):
        guarded.ask("users/create", {"username": name, "password": password})
    yield guarded
    os.killpg(server.pid, signal.SIGTERM)
    try:
        server.wait(timeout=20)
    except subprocess.TimeoutExpired:  # its workers wait for requests that nobody ends any more
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.fixture
def login(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Point this process at the server, as somebody or nobody."""

    def as_user(name: str = "", password: str = "") -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", guarded.url)
        for variable, value in (("MLFLOW_TRACKING_USERNAME", name), ("MLFLOW_TRACKING_PASSWORD", password)):
            monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable, raising=False)

    return as_user


@pytest.mark.proof
def test_a_version_is_registered_by_an_account_that_may(
    guarded: Guarded, login: Callable[..., None], prepared: Path, tmp_path: Path
) -> None:
    login(*TRAINER)
    copy_run(prepared, tmp_path)
    world = World(tmp_path)
    world.path.write_text(world.path.read_text().replace("project: tiny", "project: registered"))
    run = world.run()
    run_stage("register", world.config, run)
    record = RegisterRecord.model_validate(read_result(run, "register").record)
    assert record.model_version == 1
    assert MlflowClient(guarded.url).get_model_version("registered", "1").run_id == record.mlflow_run_id

    other = world.run()
    login()
    with pytest.raises(ConfigError, match="denies access; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        run_stage("register", world.config, other)
    done = world.cvf("register", "--run", other)
    assert done.returncode == ConfigError.exit_code
    assert done.stderr.splitlines()[-1].startswith("cvf register: MLflow at http://127.0.0.1:")
    assert "Traceback" not in done.stderr

    login(*READER)
    done = world.cvf("register", "--run", other)
    assert done.returncode == ConfigError.exit_code, "a missing right is not tried again"
    assert "PERMISSION_DENIED" in done.stderr.splitlines()[-1]


def test_the_doctor_tells_who_may_write(login: Callable[..., None], project: Callable[..., Path]) -> None:
    path = project(project="examined")
    login()
    assert "denies access" in found(path, "mlflow")["mlflow"].found
    login(*TRAINER)
    written = found(path, "mlflow")
    assert {finding.status for finding in written.values()} == {"ok"}
    assert {"mlflow.reach", "mlflow.version", "mlflow.write", "mlflow.artifacts", "mlflow.model"} == set(written)
    login(*READER)
    told = found(path, "mlflow")
    assert (told["mlflow.reach"].status, told["mlflow"].status) == ("ok", "fail")
    assert "PERMISSION_DENIED" in told["mlflow"].found
    assert READER[1] not in str(told)


def test_artifacts_on_the_servers_own_disk_are_told(
    guarded: Guarded, login: Callable[..., None], project: Callable[..., Path]
) -> None:
    login(*TRAINER)
    MlflowClient(guarded.url).create_experiment("misplaced", artifact_location="file:///only/on/the/server")
    told = found(project(project="misplaced"), "mlflow")["mlflow.artifacts"]
    assert (told.status, "only the server has" in told.found) == ("warn", True), "this server is this machine"
    assert _artifacts("http://mlflow.example", "/mlruns/1").status == "fail"
    assert _artifacts("http://mlflow.example", "s3://bucket/1").status == "ok"


def test_secrets_manager_gives_the_stages_their_credentials_and_no_log_holds_them(
    guarded: Guarded, s3_server: str, tmp_path: Path
) -> None:
    key, secret = "AKIAHOSPITAL", "the secret key of the hospital"
    connections = {
        "hospital": {
            "conn_type": "aws",
            "login": key,
            "password": secret,
            "extra": {"region_name": "us-east-1", "endpoint_url": s3_server},
        },
        "models": {"conn_type": "http", "host": guarded.url, "login": TRAINER[0], "password": TRAINER[1]},
        "nobody": {"conn_type": "http", "host": guarded.url},
    }
    vault = {
        "region_name": "us-east-1",
        "endpoint_url": s3_server,
        "aws_access_key_id": "vault",
        "aws_secret_access_key": "reader",
    }
    manager = boto3.client("secretsmanager", **vault)
    for name, connection in connections.items():
        manager.create_secret(Name=f"cvf/connections/{name}", SecretString=json.dumps(connection))
    boto3.client("s3", **vault).create_bucket(Bucket="hospital")
    config = tmp_path / "project.yaml"
    config.write_text(yaml.safe_dump(TINY | {"project": "vaulted", "storage": "s3://hospital/p"}))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "AIRFLOW"))} | {
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__SECRETS__BACKEND": BACKEND,
        "AIRFLOW__SECRETS__BACKEND_KWARGS": json.dumps({"connections_prefix": "cvf/connections", "region_name": "us-east-1"}),
        # who reads the vault is the worker's own role; moto looks at no signature
        "AWS_ENDPOINT_URL_SECRETS_MANAGER": s3_server,
        "AWS_ACCESS_KEY_ID": "worker",
        "AWS_SECRET_ACCESS_KEY": "of the worker",
        "AWS_EC2_METADATA_DISABLED": "true",
        # the worker's own login of another MLflow, which this one must not be told
        "MLFLOW_TRACKING_USERNAME": TRAINER[0],
        "MLFLOW_TRACKING_PASSWORD": TRAINER[1],
    }

    def work(mlflow_connection: str) -> str:
        command = [sys.executable, "-c", WORKER, str(config), mlflow_connection]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        output = done.stdout + done.stderr
        assert done.returncode == 0, output[-3000:]
        for given in (secret, TRAINER[1]):
            assert given not in output
        return done.stdout

    told = work("models")
    assert boto3.client("s3", **vault).list_objects_v2(Bucket="hospital")["KeyCount"] > 0
    assert "failed: cvf predict: " in told
    assert "denies access" not in told, "the login was the connection's"
    assert "denies access; set MLFLOW_TRACKING_USERNAME" in work("nobody")
