"""``cvf doctor`` against real stores and services: each check passes where the thing is there, and fails where it is not.

Two answers of AWS are played here, which moto does not give: SageMaker's quotas and IAM's simulation of policies.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
from confluent_kafka import Consumer
from pynetdicom import AE, evt

from cv_factory_ops import cli, storage
from cv_factory_ops.config import load
from cv_factory_ops.config.deploy import SageMakerDeploy
from cv_factory_ops.config.runtime import PodSettings
from cv_factory_ops.doctor import checkup, cluster, endpoint, findings, machine
from cv_factory_ops.doctor.findings import Check, Finding, carried_out, ok
from cv_factory_ops.errors import ConfigError
from tests.conftest import TINY

Project = Callable[..., Path]
ACCOUNT, REGION = "123456789012", "us-east-1"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/serving"
IMAGE = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/inference:1"
SECRET = "hunter2-is-the-secret"  # noqa: S105
FIND, GET = "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.5.1.4.1.2.2.3"
VERIFICATION = "1.2.840.10008.1.1"
Handler = Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes]]


def found(path: Path, *names: str) -> dict[str, Finding]:
    """The findings of the named checks, by their own names."""
    config = load(path)
    wanted = [check for check in checkup.checks(config) if check.name in names]
    assert len(wanted) == len(names), [check.name for check in checkup.checks(config)]
    return {finding.name: finding for check in wanted for finding in carried_out(check, config)}


def status(path: Path, *names: str) -> dict[str, str]:
    return {name: finding.status for name, finding in found(path, *names).items()}


@contextmanager
def server(answer: Handler) -> Iterator[str]:
    """Address of an HTTP server that answers so."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            code, content = answer(self, body)
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_PUT = do_DELETE = do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def test_a_project_that_has_everything_passes(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    deploy = {"kind": "local", "url": f"http://127.0.0.1:{free_port()}"}
    training = TINY["training"] | {"processes_per_node": 1}
    path = project(deploy=deploy, training=training)
    assert cli.main(["doctor", "--config", str(path)]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last.endswith(" 0 fail")
    assert {line.split()[0] for line in lines} <= {"ok", "warn"}
    assert len(lines) > 12


def test_what_is_missing_is_told_with_its_mend_and_exit_code_2(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    path = project(domain="botany", storage="s3://nowhere/at-all")
    assert cli.main(["doctor", "--config", str(path), "--json"]) == ConfigError.exit_code
    told = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert told["domain"]["status"] == "fail"
    assert "installed: medical" in told["domain"]["found"]
    assert told["domain"]["mend"]
    assert told["source"]["status"] == "ok", "one failure hides no other check"


def test_a_check_that_hangs_or_breaks_is_never_ok(project: Project) -> None:
    config = load(project())

    def hangs(_: Any) -> Iterator[Finding]:
        yield ok("slow.first", "came in time")
        time.sleep(60)
        yield ok("slow", "late")

    def breaks(_: Any) -> Iterator[Finding]:
        raise RuntimeError(SECRET)
        yield

    late = carried_out(Check("slow", hangs), config, patience=0.2)
    assert [(finding.name, finding.status) for finding in late] == [("slow.first", "ok"), ("slow", "warn")]
    [broken] = carried_out(Check("broken", breaks), config)
    assert broken.status == "warn"
    assert SECRET not in str(broken)


def test_packages_that_are_missing_or_too_old_are_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project(model={"kind": "resnet", "weights": "hf://owner/repository/file"})
    assert status(path, "software") == {"software": "ok", "software.hub": "ok"}
    given = ["numpy>=999", 'no-such-package>=1; extra == "hub"', 'other>=1; extra == "vertex"']
    monkeypatch.setattr(machine, "requires", lambda _: given)
    told = found(path, "software")
    assert {finding.status for finding in told.values()} == {"fail"}
    assert "needed is >=999" in told["software"].found
    assert told["software.hub"].found == "no-such-package is not installed"
    assert told["software.hub"].mend == "pip install 'cv-factory[hub]'"


def test_extras_follow_from_the_settings(project: Project) -> None:
    http = {"kind": "http", "url": "http://127.0.0.1/"}
    vertex = {"kind": "vertex", "google_project": "p", "location": "europe-west4", "staging": "gs://b/p", "image": "i"}
    assert machine.extras(load(project())) == []
    assert machine.extras(load(project(data={"source": http}, deploy=vertex))) == ["vertex", "deidentify"]
    assert machine.extras(load(project(data={"source": http}, deidentification={"pixels": "trust"}))) == []


def test_more_processes_than_cores_are_a_warning(project: Project) -> None:
    few = TINY["training"] | {"processes_per_node": 1, "threads": 1}
    assert status(project(training=few), "processors") == {"processors": "ok"}
    assert status(project(training=few | {"threads": 4096}), "processors") == {"processors": "warn"}
    assert status(project(training=few | {"processes_per_node": 100_000}), "memory")["memory"] == "warn"


def test_free_memory_is_what_the_control_group_leaves(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  8000000 kB\nMemAvailable:  4000000 kB\n")
    assert machine.free_memory(meminfo, tmp_path) == 4_000_000 * 1024
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.stat").write_text("anon 60\ninactive_file 40\n")
    for limit, left in (("max\n", 4_000_000 * 1024), ("1100\n", 1040)):
        (tmp_path / "memory.max").write_text(limit)
        assert machine.free_memory(meminfo, tmp_path) == left


def test_a_full_disk_fails(project: Project, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = project()
    monkeypatch.setenv("CVF_STORAGE", str(small_disk("2m")))
    assert status(path, "disk")["disk.storage"] == "fail"


def test_variables_that_the_settings_name_must_be_set(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = [
        {"kind": "slack", "url_env": "CVF_T_SLACK"},
        {"kind": "webhook", "url": "http://h.example", "secret_env": "CVF_T_KEY"},
    ]
    source = {"kind": "http", "url": "http://127.0.0.1/", "authorization_env": "CVF_T_AUTH"}
    jwt = {"kind": "jwt", "issuer": "i", "audience": "a", "key_env": "CVF_T_JWT"}
    path = project(notifications=hooks, data={"source": source}, gateway={"access": jwt})
    names = {"CVF_T_SLACK": "fail", "CVF_T_KEY": "fail", "CVF_T_AUTH": "fail", "CVF_T_JWT": "warn"}
    told = found(path, "environment")
    assert {name.partition(".")[2]: finding.status for name, finding in told.items()} == {"CVF_PSEUDONYM_KEY": "ok", **names}
    assert "data.source.authorization_env" in told["environment.CVF_T_AUTH"].found
    for name in names:
        monkeypatch.setenv(name, SECRET)
    told = found(path, "environment")
    assert {finding.status for finding in told.values()} == {"ok"}
    assert SECRET not in "".join(map(str, told.values()))


def test_pods_must_be_given_the_variables(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVF_T_SLACK", SECRET)
    hooks = [{"kind": "slack", "url_env": "CVF_T_SLACK"}]

    def told(**pod: Any) -> dict[str, str]:
        runtime = {"kind": "kubernetes", "pod": {"image": "i", **pod}}
        return status(project(notifications=hooks, runtime=runtime), "environment")

    assert told() == {"environment.CVF_PSEUDONYM_KEY": "fail", "environment.CVF_T_SLACK": "fail"}
    assert set(told(env_from_secrets=["all"]).values()) == {"warn"}, "which keys the Secret has was not looked at"
    one = {"secret": "s", "key": "k"}
    key = {"secret_env": {"CVF_PSEUDONYM_KEY": one}}
    assert told(**key)["environment.CVF_PSEUDONYM_KEY"] == "ok"
    runtime = {"kind": "kubernetes", "pod": {"image": "i"}, "stages": {"train": key, "ingest": key}}
    lacking = {"environment.CVF_PSEUDONYM_KEY": "fail"}
    assert status(project(runtime=runtime), "environment") == lacking, "predict needs it as well"
    assert told(secret_env={"CVF_T_SLACK": one}) == {"environment.CVF_PSEUDONYM_KEY": "fail", "environment.CVF_T_SLACK": "ok"}


def test_a_key_of_one_machine_is_not_enough_for_a_store_of_many(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CVF_PSEUDONYM_KEY")
    assert status(project(), "environment") == {"environment.CVF_PSEUDONYM_KEY": "ok"}
    assert status(project(storage="s3://b/p"), "environment") == {"environment.CVF_PSEUDONYM_KEY": "warn"}


STORED = {"storage.write": "ok", "storage.create": "ok", "storage.replace": "ok", "storage.delete": "ok"}


def test_a_folder_is_a_store(project: Project, home: Path) -> None:
    assert status(project(), "storage") == STORED
    assert list((home / "var" / "storage" / "tiny").iterdir()) == [], "nothing is left behind"


def test_a_folder_that_is_none_fails(project: Project, home: Path) -> None:
    (home / "file").write_text("")
    assert status(project(storage=str(home / "file")), "storage") == {"storage": "fail"}


def test_s3_with_conditional_writes_is_a_store(project: Project, bucket: str) -> None:
    assert status(project(storage=f"s3://{bucket}/p"), "storage") == STORED
    assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket=bucket), "nothing is left behind"
    missing = found(project(storage=f"s3://{bucket}-not/p"), "storage")
    assert missing["storage"].status == "fail"
    assert "the bucket does not exist" in missing["storage"].found


def test_s3_without_conditional_writes_fails(
    project: Project, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        headers = {name: value for name, value in request.headers.items() if not name.lower().startswith("if-")}
        answer = httpx.request(request.command, s3_server + request.path, headers=headers, content=body)
        return answer.status_code, answer.content

    with server(forward) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        storage._s3.cache_clear()
        told = found(project(storage=f"s3://{bucket}/p"), "storage")
    assert told["storage.create"].status == "fail"
    assert "If-None-Match is not heeded" in told["storage.create"].found


def test_an_s3_that_refuses_conditional_writes_is_told_by_its_code(
    project: Project, bucket: str, s3_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        if request.headers.get("If-Match"):
            return 501, b"<Error><Code>NotImplemented</Code><Message>no</Message></Error>"
        answer = httpx.request(request.command, s3_server + request.path, headers=dict(request.headers), content=body)
        return answer.status_code, answer.content

    with server(forward) as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", address)
        told = found(project(storage=f"s3://{bucket}/p"), "storage")["storage.replace"]
    assert (told.status, told.found) == ("fail", "a conditional write (If-Match) was answered with NotImplemented")


def test_an_s3_that_is_silent_fails_before_patience_ends(
    project: Project, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(findings, "QUESTION_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{silent.getsockname()[1]}")
        told = found(project(storage=f"s3://{bucket}/p"), "storage")["storage"]
    assert (told.status, "Read timeout" in told.found) == ("fail", True), told


def test_an_mlflow_that_does_not_answer_fails(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    url = f"http://user:{SECRET}@127.0.0.1:{free_port()}"
    told = found(project(mlflow={"tracking_uri": url}), "mlflow")
    assert told["mlflow"].status == "fail"
    assert SECRET not in str(told)


def test_an_mlflow_of_another_major_version_fails() -> None:
    from mlflow import __version__

    from cv_factory_ops.doctor.stores import _version

    versions = {"ok": __version__, "warn": f"{__version__.split('.')[0]}.0.0", "fail": "2.9.1"}
    for expected, version in versions.items():
        with server(lambda *_, version=version: (200, version.encode())) as url:
            assert _version(url).status == expected
    with server(lambda *_: (401, b"")) as url:
        assert _version(url).status == "warn"


def test_files_of_the_source_and_their_labels(project: Project, home: Path) -> None:
    source = {"kind": "files", "path": str(home / "images"), "labels": str(home / "labels.csv")}
    path = project(data={"source": source})
    (home / "images").mkdir()
    assert status(path, "source", "labels") == {"source": "fail", "labels": "fail"}
    (home / "images" / "a.png").write_bytes(b"")
    (home / "labels.csv").write_text("file,label\na.png,normal\n")
    assert status(path, "source", "labels") == {"source": "ok", "labels": "ok"}
    (home / "labels.csv").write_text("file,label\na.png,unheard of\n")
    assert status(path, "source", "labels") == {"source": "ok", "labels": "fail"}


def test_a_prefix_of_s3_as_source(project: Project, bucket: str) -> None:
    source = {"kind": "files", "path": f"s3://{bucket}/images", "labels": f"s3://{bucket}/labels.csv"}
    path = project(data={"source": source})
    assert status(path, "source", "labels") == {"source": "fail", "labels": "fail"}
    boto3.client("s3").put_object(Bucket=bucket, Key="images/1.png", Body=b"")
    boto3.client("s3").put_object(Bucket=bucket, Key="labels.csv", Body=b"file,label\n1.png,normal\n")
    assert status(path, "source", "labels") == {"source": "ok", "labels": "ok"}


def test_arrays_of_the_source(project: Project, home: Path) -> None:
    path = project(data={"source": {"kind": "npz", "path": str(home / "a.npz")}})
    assert status(path, "source") == {"source": "fail"}
    names = [f"{split}_{part}" for split in ("train", "val", "test") for part in ("images", "labels")]
    np.savez(home / "a.npz", **{name: np.zeros(1) for name in names[1:]})
    assert "lacks train_images" in found(path, "source")["source"].found
    np.savez(home / "a.npz", **{name: np.zeros(1) for name in names})
    assert status(path, "source") == {"source": "ok"}


def test_paths_of_pods_cannot_be_told_from_here(project: Project) -> None:
    source = {"kind": "files", "path": "/data/images", "labels": "/data/labels.csv"}
    path = project(data={"source": source}, runtime={"kind": "kubernetes", "pod": {"image": "i"}})
    assert status(path, "source", "labels") == {"source": "warn", "labels": "warn"}


def test_an_http_api_as_source(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(request: BaseHTTPRequestHandler, _: bytes) -> tuple[int, bytes]:
        if request.headers.get("Authorization") != SECRET:
            return 401, b""
        return 200, json.dumps({"items": [{"id": 1}], "nothing": []}).encode()

    monkeypatch.setenv("CVF_T_AUTH", "wrong")
    with server(answer) as url:
        source = {"kind": "http", "url": url, "authorization_env": "CVF_T_AUTH"}
        denied = found(project(data={"source": source}), "source")["source"]
        assert (denied.status, "denies access" in denied.found) == ("fail", True)
        monkeypatch.setenv("CVF_T_AUTH", SECRET)
        assert status(project(data={"source": source}), "source") == {"source": "ok"}
        assert status(project(data={"source": source | {"items": "nothing"}}), "source") == {"source": "fail"}
        assert status(project(data={"source": source | {"items": "elsewhere"}}), "source") == {"source": "fail"}
    assert status(project(data={"source": source}), "source") == {"source": "fail"}, "it is gone"


def test_a_pacs_by_dicomweb(project: Project, home: Path) -> None:
    study = [{"0020000D": {"vr": "UI", "Value": ["1.2.3"]}}]

    def answer(request: BaseHTTPRequestHandler, _: bytes) -> tuple[int, bytes]:
        return 200, json.dumps(study if "offset=0" in request.path and "PatientID=none" not in request.path else []).encode()

    with server(answer) as url:
        source = {"kind": "dicomweb", "url": url, "labels": str(home / "labels.csv")}
        assert status(project(data={"source": source}), "source") == {"source": "ok"}
        none = source | {"query": {"PatientID": "none"}}
        assert "no study matches" in found(project(data={"source": none}), "source")["source"].found
    assert status(project(data={"source": source}), "source") == {"source": "fail"}


def test_a_pacs_by_dimse(project: Project, home: Path) -> None:
    def pacs(*offered: str) -> tuple[AE, int]:
        ae, port = AE("PACS"), free_port()
        for name in offered:
            ae.add_supported_context(name)
        ae.require_called_aet = True
        ae.start_server(("127.0.0.1", port), block=False, evt_handlers=[(evt.EVT_C_ECHO, lambda _: 0x0000)])
        return ae, port

    def told(port: int, **given: Any) -> Finding:
        source = {"kind": "dimse", "host": "127.0.0.1", "port": port, "called_ae_title": "PACS", "labels": "l.csv", **given}
        return found(project(data={"source": source}), "source")["source"]

    ae, port = pacs(VERIFICATION, FIND, GET)
    assert told(port).status == "ok"
    assert "rejects the association" in told(port, called_ae_title="OTHER").found
    assert "does not offer" in told(port, retrieve="c_move").found
    ae.shutdown()
    assert (told(port).status, "cannot be reached" in told(port).found) == ("fail", True)


def test_kafka_topics(project: Project, brokers: str, topic: str) -> None:
    source = {"kind": "kafka", "bootstrap_servers": brokers, "topic": topic, "group": "g", "timeout": 5}
    path = project(data={"source": source}, batch={"publish": {"bootstrap_servers": brokers, "topic": f"{topic}-out"}})
    assert "is not there" in found(path, "source")["source"].found
    for name in (topic, f"{topic}-out"):  # the mock cluster makes topics for who lets it
        reader = Consumer({"bootstrap.servers": brokers, "group.id": "g", "log_level": 0, "allow.auto.create.topics": True})
        reader.list_topics(name, timeout=10)
        reader.close()
    assert status(path, "source", "topics") == {"source": "ok", "batch.publish": "ok"}
    nobody = source | {"bootstrap_servers": f"127.0.0.1:{free_port()}", "timeout": 1}
    assert status(project(data={"source": nobody}), "source") == {"source": "fail"}
    secret = source | {"settings_env": "CVF_T_KAFKA"}
    assert "CVF_T_KAFKA is not set" in found(project(data={"source": secret}), "source")["source"].found


def test_a_camera(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = "rtsp://${CVF_T_CAMERA}@127.0.0.1:" + str(listener.getsockname()[1]) + "/s"
    path = project(data={"source": {"kind": "video", "path": address, "labels": "l.csv"}})
    assert "CVF_T_CAMERA: not set" in found(path, "source")["source"].found
    monkeypatch.setenv("CVF_T_CAMERA", f"user:{SECRET}")
    told = found(path, "source")["source"]
    assert (told.status, SECRET in str(told)) == ("warn", False), "that it listens is no proof that it streams"
    listener.close()
    assert status(path, "source") == {"source": "fail"}
    monkeypatch.setenv("CVF_T_CAMERA", "user:hunter2/is")
    told = found(path, "source")["source"]
    assert (told.status, "hunter2" in str(told)) == ("fail", False)
    assert "cannot be read" in told.found


def test_weights_by_path_and_from_the_hub(project: Project, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project(model={"kind": "resnet", "weights": "w.safetensors"})
    assert status(path, "weights") == {"model.weights": "fail"}
    (home / "w.safetensors").write_bytes(b"")
    assert status(path, "weights") == {"model.weights": "ok"}
    assert status(project(), "weights") == {}
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda *_, **__: False)
    assert status(project(model={"kind": "resnet", "weights": "hf://o/r/f"}), "weights") == {"model.weights": "fail"}


def test_the_local_endpoint(project: Project) -> None:
    def told(url: str) -> str:
        return status(project(deploy={"kind": "local", "url": url}), "deploy.local")["deploy.local"]

    assert told(f"http://127.0.0.1:{free_port()}") == "ok"
    with server(lambda *_: (200, b"somebody else")) as url:
        assert told(url) == "fail"
    assert told("http://127.1.2.3:9") == "fail", "another machine, as far as the stage is concerned"


@pytest.fixture
def aws(bucket: str, s3_server: str, project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A project that is deployed to SageMaker, as moto has it; keywords replace settings of ``deploy``."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)

    def write(**deploy: Any) -> Path:
        settings = {"kind": "sagemaker", "image": IMAGE, "role_arn": ROLE, **deploy}
        return project(deploy=settings, storage=f"s3://{bucket}/p")

    return write


@contextmanager
def role(service: str) -> Iterator[None]:
    iam = boto3.client("iam")
    trust = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}],
    }
    iam.create_role(RoleName="serving", AssumeRolePolicyDocument=json.dumps(trust))
    yield
    iam.delete_role(RoleName="serving")


def test_aws_identity_and_role(aws: Callable[..., Path]) -> None:
    assert "role serving is not there" in found(aws(), "deploy.role")["deploy.role"].found
    with role("ec2.amazonaws.com"):
        assert "does not let SageMaker assume it" in found(aws(), "deploy.role")["deploy.role"].found
    with role("sagemaker.amazonaws.com"):
        assert status(aws(), "deploy.identity", "deploy.role") == {"deploy.identity": "ok", "deploy.role": "ok"}
    assert status(aws(role_arn="serving"), "deploy.role") == {"deploy.role": "fail"}
    other = ROLE.replace(ACCOUNT, "210987654321")
    assert status(aws(role_arn=other), "deploy.identity")["deploy.identity.account"] == "warn"


def test_aws_without_credentials_fails(aws: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    told = found(aws(), "deploy.identity")["deploy.identity"]
    assert (told.status, "no AWS credentials" in told.found) == ("fail", True)
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "no AWS region" in found(aws(), "deploy.identity")["deploy.identity"].found


def test_an_aws_profile_of_nobody_fails(aws: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    told = found(aws(), "deploy.identity", "deploy.rights")
    assert {(finding.status, "no AWS credentials" in finding.found) for finding in told.values()} == {("fail", True)}


def test_aws_that_refuses_the_question_is_a_warning(aws: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = b"<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>"
    with server(lambda *_: (403, refusal)) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_IAM", url)
        told = found(aws(), "deploy.role")["deploy.role"]
    assert (told.status, told.found) == ("warn", "cannot be told: this account may not ask GetRole")


def test_aws_rights_by_simulation(aws: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    denied: list[str] = []
    places: dict[str, str] = {}
    user = f"arn:aws:iam::{ACCOUNT}:user/deployer"

    def simulate(_: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        given = httpx.QueryParams(body.decode())
        asked = [text for name, text in given.multi_items() if name.startswith("ActionNames")]
        places.update({f"{action} on {given['ResourceArns.member.1']}": "" for action in asked})
        rows = "".join(
            f"<member><EvalActionName>{action}</EvalActionName>"
            f"<EvalDecision>{'implicitDeny' if action in denied else 'allowed'}</EvalDecision></member>"
            for action in asked
        )
        result = f"<SimulatePrincipalPolicyResult><EvaluationResults>{rows}</EvaluationResults></SimulatePrincipalPolicyResult>"
        return 200, f"<SimulatePrincipalPolicyResponse>{result}</SimulatePrincipalPolicyResponse>".encode()

    def identity(*_: Any) -> tuple[int, bytes]:
        result = f"<GetCallerIdentityResult><Arn>{user}</Arn><Account>{ACCOUNT}</Account></GetCallerIdentityResult>"
        return 200, f"<GetCallerIdentityResponse>{result}</GetCallerIdentityResponse>".encode()

    with server(simulate) as iam, server(identity) as sts:
        monkeypatch.setenv("AWS_ENDPOINT_URL_IAM", iam)
        monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sts)
        assert status(aws(), "deploy.rights") == {"deploy.rights": "ok"}
        arn = f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:"
        assert f"sagemaker:InvokeEndpoint on {arn}endpoint/tiny" in places, "a role of Terraform's may ask no other endpoint"
        assert f"sagemaker:CreateEndpointConfig on {arn}endpoint-config/tiny-any" in places
        assert f"sagemaker:CreateModel on {arn}model/tiny-any" in places
        assert f"iam:PassRole on {ROLE}" in places
        denied += ["iam:PassRole", "sagemaker:UpdateEndpoint"]
        told = found(aws(), "deploy.rights")["deploy.rights"]
    assert (told.status, told.found) == ("fail", f"{user} may not: sagemaker:UpdateEndpoint, iam:PassRole")


def test_aws_image(aws: Callable[..., Path]) -> None:
    ecr = boto3.client("ecr")
    assert "is not in ECR" in found(aws(), "deploy.image")["deploy.image"].found
    ecr.create_repository(repositoryName="inference")
    assert status(aws(), "deploy.image") == {"deploy.image": "fail"}, "no such tag"
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": {}, "layers": []}
    ecr.put_image(repositoryName="inference", imageManifest=json.dumps(manifest), imageTag="1")
    told = found(aws(), "deploy.image")["deploy.image"]
    assert (told.status, "sha256:" in told.found) == ("ok", True)
    assert status(aws(image="docker.io/inference:1"), "deploy.image") == {"deploy.image": "fail"}
    assert status(aws(image=IMAGE.replace(REGION, "eu-west-1")), "deploy.image") == {"deploy.image": "fail"}


def test_aws_quota(aws: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    quotas = {"Quotas": [{"QuotaName": "ml.m5.large for endpoint usage", "Value": 4.0}]}
    with server(lambda *_: (200, json.dumps(quotas).encode())) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS", url)
        assert status(aws(), "deploy.quota") == {"deploy.quota": "ok"}
        three = {"kind": "realtime", "instance_count": 3}
        told = found(aws(inference=three), "deploy.quota")["deploy.quota"]
        assert (told.status, "up to 6" in told.found) == ("fail", True)
        assert status(aws(inference={"instance_type": "ml.g5.xlarge", "kind": "realtime"}), "deploy.quota") == {
            "deploy.quota": "warn"
        }
    monkeypatch.delenv("AWS_ENDPOINT_URL_SERVICE_QUOTAS")
    assert status(aws(), "deploy.quota") == {"deploy.quota": "warn"}, "moto has no such answer, which is no ok"


def test_most_instances_of_a_rollout() -> None:
    def most(rollout: dict[str, Any], **inference: Any) -> int:
        settings = {"image": IMAGE, "role_arn": ROLE, "rollout": rollout, "inference": {"kind": "realtime", **inference}}
        return endpoint.instances(SageMakerDeploy.model_validate(settings))

    assert most({"kind": "all_at_once"}, instance_count=2) == 4
    assert most({"kind": "all_at_once"}, instance_count=1, autoscaling={"most": 5, "target": 10}) == 10
    assert most({"kind": "canary", "percent": 10}, instance_count=10) == 20


def test_aws_endpoint_of_somebody_else(aws: Callable[..., Path]) -> None:
    client = boto3.client("sagemaker")
    assert status(aws(), "deploy.endpoint") == {"deploy.endpoint": "ok"}
    client.create_model(ModelName="m", ExecutionRoleArn=ROLE, PrimaryContainer={"Image": IMAGE})
    variant = {"VariantName": "v", "ModelName": "m", "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    client.create_endpoint_config(EndpointConfigName="c", ProductionVariants=[variant])
    arn = client.create_endpoint(EndpointName="tiny", EndpointConfigName="c")["EndpointArn"]
    try:
        assert status(aws(), "deploy.endpoint") == {"deploy.endpoint": "fail"}
        client.add_tags(ResourceArn=arn, Tags=[{"Key": "project", "Value": "tiny"}])
        assert status(aws(), "deploy.endpoint") == {"deploy.endpoint": "ok"}
    finally:
        client.delete_endpoint(EndpointName="tiny")


def test_aws_storage_key_and_network(aws: Callable[..., Path], project: Project, home: Path) -> None:
    assert status(aws(), "deploy.storage", "deploy.kms", "deploy.vpc") == {"deploy.storage": "ok"}
    settings = {"kind": "sagemaker", "image": IMAGE, "role_arn": ROLE}
    assert status(project(deploy=settings), "deploy.storage") == {"deploy.storage": "fail"}
    boto3.client("s3").create_bucket(Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    far = found(project(deploy=settings, storage="s3://far/p"), "deploy.storage")["deploy.storage"]
    assert (far.status, "eu-west-1" in far.found) == ("fail", True)
    key = boto3.client("kms").create_key()["KeyMetadata"]["KeyId"]
    assert status(aws(kms_key=key), "deploy.kms") == {"deploy.kms": "ok"}
    boto3.client("kms").disable_key(KeyId=key)
    assert status(aws(kms_key=key), "deploy.kms") == {"deploy.kms": "fail"}
    assert status(aws(kms_key="00000000-0000-0000-0000-000000000000"), "deploy.kms") == {"deploy.kms": "fail"}
    ec2 = boto3.client("ec2")
    subnet = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    group = ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]
    assert status(aws(vpc={"subnets": [subnet], "security_groups": [group]}), "deploy.vpc") == {"deploy.vpc": "ok"}
    assert status(aws(vpc={"subnets": ["subnet-0"], "security_groups": [group]}), "deploy.vpc") == {"deploy.vpc": "fail"}


def test_clouds_that_do_not_let_us_in_fail(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    monkeypatch.setenv("CLOUDSDK_CONFIG", "/nowhere")
    vertex = {"kind": "vertex", "google_project": "p", "location": "europe-west4", "staging": "gs://b/p", "image": "i"}
    assert status(project(deploy=vertex), "deploy.vertex") == {"deploy.vertex": "fail"}


def test_notifications_are_reached_but_not_sent(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    hooks = [{"kind": "slack", "url_env": "CVF_T_SLACK"}]
    mail = {"kind": "email", "host": "127.0.0.1", "port": free_port(), "sender": "a@b.example", "recipients": ["c@d.example"]}
    path = project(notifications=[*hooks, mail])
    assert status(path, "notifications") == {"notifications.0": "fail", "notifications.1": "warn"}

    def answer(request: BaseHTTPRequestHandler, _: bytes) -> tuple[int, bytes]:
        asked.append(request.path)
        return 200, b""

    with server(answer) as url:
        monkeypatch.setenv("CVF_T_SLACK", f"{url}/{SECRET}")
        told = found(path, "notifications")
    assert told["notifications.0"].status == "ok"
    assert asked == []
    assert SECRET not in str(told)


def test_pushgateway_and_gateway(project: Project, home: Path) -> None:
    with server(lambda *_: (200, b"")) as url:
        path = project(pushgateway={"url": url})
        assert status(path, "pushgateway", "gateway") == {"pushgateway": "ok", "gateway": "warn"}
    assert status(path, "pushgateway") == {"pushgateway": "warn"}
    assert cli.main(["gateway-key", "--config", str(path), "viewer"]) == 0
    assert status(path, "gateway") == {"gateway": "ok"}
    assert status(project(gateway={"access": {"kind": "open"}}), "gateway") == {"gateway": "warn"}


def test_a_cluster_that_is_not_there_fails(project: Project, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(home / "none"))
    path = project(runtime={"kind": "kubernetes", "pod": {"image": "i"}})
    assert status(path, "cluster", "software", "processors", "memory") == {"cluster": "fail", "software": "warn"}


def node(taint: tuple[str, str, str] | None = None, **more: Any) -> Any:
    """A node as the cluster describes one: two processors, and what more it has."""
    from kubernetes import client

    allocatable = {"cpu": "2", "memory": "8Gi", "pods": "3"} | more
    taints = [client.V1Taint(key=taint[0], value=taint[1], effect=taint[2])] if taint else None
    meta = client.V1ObjectMeta(labels={"kind": "small"})
    return client.V1Node(
        metadata=meta, spec=client.V1NodeSpec(taints=taints), status=client.V1NodeStatus(allocatable=allocatable)
    )


GPU_TAINT = ("nvidia.com/gpu", "present", "NoSchedule")
TAINT = ("team", "radiology", "NoExecute")
TOLERATED = [{"key": "team", "operator": "Equal", "value": "radiology"}]
ROOM: dict[str, tuple[dict[str, Any], int, list[Any], str]] = {
    "fits": ({"requests": {"cpu": "1"}}, 2, [node()], "ok"),
    "nothing is asked for": ({"requests": {}}, 3, [node()], "ok"),
    "too small": ({"requests": {"cpu": "3"}}, 1, [node()], "fail"),
    "too few, which an autoscaler mends": ({"requests": {"cpu": "1"}}, 3, [node()], "warn"),
    "no GPU yet, which an autoscaler mends": ({"gpus": 1}, 1, [node()], "warn"),
    "no such label yet": ({"node_selector": {"kind": "large"}}, 1, [node()], "warn"),
    "too few GPUs": ({"gpus": 2}, 1, [node(**{"nvidia.com/gpu": "1"})], "fail"),
    "the GPU's own taint": ({"gpus": 1}, 1, [node(GPU_TAINT, **{"nvidia.com/gpu": "1"})], "warn"),
    "the GPU's own taint, tolerated": (
        {"gpus": 1, "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]},
        1,
        [node(GPU_TAINT, **{"nvidia.com/gpu": "1"})],
        "ok",
    ),
    "a taint": ({}, 1, [node(TAINT)], "fail"),
    "a taint, tolerated": ({"tolerations": TOLERATED}, 1, [node(TAINT)], "ok"),
    "a taint of another value": ({"tolerations": TOLERATED}, 1, [node(("team", "other", "NoExecute"))], "fail"),
    "everything is tolerated": ({"tolerations": [{"operator": "Exists"}]}, 1, [node(TAINT)], "ok"),
    "a taint that only prefers": ({}, 1, [node(("team", "other", "PreferNoSchedule"))], "ok"),
}


@pytest.mark.parametrize("case", ROOM)
def test_room_is_what_the_scheduler_would_find(case: str) -> None:
    pod, count, nodes, expected = ROOM[case]
    told = cluster.room("stages", PodSettings.model_validate({"image": "i", **pod}), count, nodes)
    assert told.status == expected, told


def test_a_silent_cluster_is_asked_once(project: Project, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "QUESTION_SECONDS", 0.3)
    connections: list[Any] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        kubeconfig = {"clusters": [{"name": "c", "cluster": {"server": address}}], "users": [{"name": "u", "user": {}}]}
        kubeconfig |= {"contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}], "current-context": "x"}
        (home / "kubeconfig").write_text(json.dumps(kubeconfig))
        monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(home / "kubeconfig"))
        path = project(runtime={"kind": "kubernetes", "pod": {"image": "i"}})
        told = found(path, "cluster", "cluster.namespace", "cluster.rights", "cluster.named", "cluster.room")
        silent.settimeout(0.5)
        with suppress(TimeoutError):
            while True:
                connections.append(silent.accept()[0])
    assert [(finding.name, finding.status) for finding in told.values()] == [("cluster", "fail")]
    assert len(connections) == 1, "neither is it asked again, nor about anything else"
    for connection in connections:
        connection.close()


def test_what_pods_cannot_see_fails(project: Project) -> None:
    key = {"CVF_PSEUDONYM_KEY": {"secret": "s", "key": "k"}}
    runtime = {"kind": "kubernetes", "pod": {"image": "i", "secret_env": key}}
    config = load(project(runtime=runtime))
    [check] = [check for check in checkup.checks(config) if check.name == "cluster.reach"]
    [refused] = carried_out(check, config)
    assert (refused.status, "lies on no volume of the pods" in refused.found) == ("fail", True)
    elsewhere = {"storage": "s3://b/p", "mlflow": {"tracking_uri": "http://mlflow.example"}}
    told = found(project(runtime=runtime, **elsewhere), "cluster.reach")["cluster.reach"]
    assert (told.status, told.found.startswith("deploy, verify, promote: deploy.url")) == ("fail", True)
    url = {"kind": "local", "url": "http://endpoint.cv:8765"}
    assert status(project(runtime=runtime, deploy=url, **elsewhere), "cluster.reach") == {"cluster.reach": "ok"}


def test_the_command_ends_although_a_service_hangs(project: Project, home: Path) -> None:
    """A left-behind thread does not hold the process up: MLflow's port accepts and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = os.environ | {"MLFLOW_HTTP_REQUEST_TIMEOUT": "1", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        command = [sys.executable, "-m", "cv_factory_ops.cli", "doctor", "--config", str(project(mlflow={"tracking_uri": url}))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == ConfigError.exit_code
    assert "fail  mlflow  " in done.stdout
    assert "Traceback" not in done.stderr
