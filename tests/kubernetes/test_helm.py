"""The chart on a real cluster: installed, asked, upgraded, rolled back, uninstalled. Its pods run this checkout."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import numpy as np
import pytest
import yaml

from cv_factory_ops.bundle import pack
from cv_factory_ops.config.project import MlflowConfig
from cv_factory_ops.config.serving import ApiKeys
from cv_factory_ops.gateway.keys import make_key
from local import cluster
from tests.bundles import npy
from tests.drift import Project, project_in, quiet
from tests.helm import CHART, helm, helm_binary, objects
from tests.kubernetes.conftest import until

NPY = {"content-type": "application/x-npy"}
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
SMALL = {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"cpu": "2", "memory": "2Gi"}}


@dataclass(frozen=True)
class Release:
    """An installed release named ``cvf`` of a project with a promoted champion."""

    api: Any
    namespace: str
    folder: Path
    project: Project
    key: str
    """Of a caller that the gateway lets in."""

    def url(self, component: str) -> str:
        spec = self.api.read_namespaced_service(f"cvf-cv-factory-{component}", self.namespace).spec
        return f"http://{spec.cluster_ip}:{spec.ports[0].port}"

    @property
    def manifest(self) -> dict[tuple[str, str], dict[str, Any]]:
        return objects(helm("get", "manifest", "cvf", "--namespace", self.namespace))

    def ask(self, key: str = "") -> httpx.Response:
        return httpx.post(f"{self.url('gateway')}/predict", content=npy(), headers=NPY | {"x-api-key": key}, timeout=60)

    def write_project(self, **gateway: Any) -> str:
        """The project's YAML with an access of the gateway; returns its path."""
        tree = self.project.config.model_dump(mode="json") | {"gateway": {"access": gateway}}
        (self.folder / "project.yaml").write_text(yaml.safe_dump(tree))
        return str(self.folder / "project.yaml")


@pytest.fixture(scope="module")
def project(api: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A project with a promoted champion and some captures, its MLflow where pods reach it."""
    helm_binary()
    folder = tmp_path_factory.mktemp("chart")
    found = project_in(folder, "chart", f"sqlite:///{folder}/mlflow.db")
    found.capture(quiet(np.random.default_rng(1), 12))
    with cluster.mlflow_server(folder) as url:
        mlflow = MlflowConfig(tracking_uri=url)
        yield dataclasses.replace(found, config=found.config.model_copy(update={"mlflow": mlflow}))


@pytest.fixture(scope="module")
def release(api: Any, namespace: str, s3_server: str, project: Project) -> Iterator[Release]:
    key, line = make_key(ApiKeys(env="X"), "viewer").splitlines()
    folder = Path(project.config.storage).parent
    found = Release(api, namespace, folder, project, key)
    put_secret(api, namespace, "cvf", KEYS)
    put_secret(api, namespace, "gateway-keys", {"gateway-keys.jsonl": line})
    (folder / "values.yaml").write_text(yaml.safe_dump(values(found, upload(found, s3_server), s3_server)))
    subprocess.run(["chown", "-R", "1000:1000", folder], check=True)
    access = {"kind": "api_keys", "file": "/etc/cv-factory/keys/gateway-keys.jsonl"}
    settings = ("--values", str(folder / "values.yaml"), "--set-file", f"project={found.write_project(**access)}")
    try:
        helm("install", "cvf", str(CHART), "--namespace", namespace, *settings, "--wait", "--timeout", "6m")
        yield found
    except AssertionError as error:
        pytest.fail(f"{error}\n{told_by_pods(api, namespace)}")
    finally:
        helm("uninstall", "cvf", "--namespace", namespace, "--wait", "--timeout", "3m")
    assert helm("list", "--all", "--namespace", namespace, "--short") == ""
    until(lambda: api.list_namespaced_pod(namespace, label_selector="app.kubernetes.io/instance=cvf").items == [])


def told_by_pods(api: Any, namespace: str) -> str:
    """The last line of each pod that is not ready, and what the cluster says of it."""
    told = []
    for pod in api.list_namespaced_pod(namespace).items:
        if not all(state.ready for state in pod.status.container_statuses or []):
            with suppress(Exception):
                told.append(f"{pod.metadata.name}: {log_of(api, namespace, pod.metadata.name)[-400:]}")
    told += [f"{event.involved_object.name}: {event.message}" for event in api.list_namespaced_event(namespace).items]
    return "\n".join(told[-40:])


def log_of(api: Any, namespace: str, pod: str) -> str:
    log: str = api.read_namespaced_pod_log(pod, namespace, _preload_content=False).data.decode()  # else it is bytes' repr
    return log


def put_secret(api: Any, namespace: str, name: str, content: dict[str, str]) -> None:
    api.create_namespaced_secret(namespace, {"metadata": {"name": name}, "stringData": content})


def upload(release: Release, s3_server: str) -> str:
    """The champion's archive on S3, as a rollout leaves it; returns its URI."""
    pack(release.folder / "bundle", release.folder / "model.tar.gz")
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    s3, name = boto3.client("s3", endpoint_url=s3_server, **keys), f"models/{release.project.digest}/model.tar.gz"
    s3.create_bucket(Bucket="chart")
    s3.upload_file(str(release.folder / "model.tar.gz"), "chart", name)
    return f"s3://chart/{name}"


def values(release: Release, model: str, s3_server: str) -> dict[str, Any]:
    """Everything switched on, small, with this checkout mounted into a bare image."""
    pod = cluster.runtime(release.namespace, release.folder)["pod"]
    mounts = [(f"host-{i}", volume["host"], volume["path"]) for i, volume in enumerate(pod["volumes"])]
    repository, _, tag = cluster.IMAGE.rpartition(":")
    own = {"image": {"repository": repository, "tag": tag}, "resources": SMALL}
    # The cluster has no DNS; Kubernetes fills in where the service is.
    endpoint = "http://$(CVF_CV_FACTORY_ENDPOINT_SERVICE_HOST):8765"
    env = pod["env"] | {"AWS_ENDPOINT_URL_S3": s3_server, "AWS_DEFAULT_REGION": "us-east-1", "LOGNAME": "cvf"}
    scaled = {"autoscaling": {"enabled": True, "minReplicas": 1}, "podDisruptionBudget": {"enabled": True}}
    ingress = {"ingress": {"enabled": True, "host": "cv.example"}}
    return {
        "storage": str(release.folder / "storage"),
        "mlflow": {"trackingUri": release.project.config.mlflow.tracking_uri},
        "existingSecret": "cvf",
        "env": env | {"OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL_SAGEMAKER": endpoint},
        "extraVolumes": [{"name": name, "hostPath": {"path": host}} for name, host, _ in mounts],
        "extraVolumeMounts": [{"name": name, "mountPath": path} for name, _, path in mounts],
        "gateway": own | scaled | ingress | {"keysSecret": "gateway-keys"},
        "inference": own | {"enabled": True, "model": {"uri": model}},
        "endpoint": own | {"enabled": True, "persistence": {"enabled": False}},
        "exporter": own,
        "drift": own | {"enabled": True},
        "retraining": own | {"enabled": True},
        "batch": own | {"enabled": True},
        "networkPolicy": {"enabled": True},
    }


def roll_out(release: Release) -> None:
    """The champion on the endpoint, as the stage ``deploy`` has it made, but without golden studies."""
    keys = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    control = boto3.client("sagemaker", endpoint_url=release.url("endpoint"), **keys)
    name = release.project.config.endpoint_name
    container = {"Image": "cv-factory", "ModelDataUrl": f"s3://chart/models/{release.project.digest}/model.tar.gz"}
    control.create_model(ModelName=name, PrimaryContainer=container, ExecutionRoleArn="arn:aws:iam::000000000000:role/local")
    variant = {"VariantName": "AllTraffic", "ModelName": name, "InitialInstanceCount": 1, "InstanceType": "ml.m5.large"}
    control.create_endpoint_config(EndpointConfigName=name, ProductionVariants=[variant])
    control.create_endpoint(EndpointName=name, EndpointConfigName=name)
    until(lambda: control.describe_endpoint(EndpointName=name)["EndpointStatus"] != "Creating")
    assert control.describe_endpoint(EndpointName=name)["EndpointStatus"] == "InService"


def test_what_was_installed_answers_its_own_test(release: Release) -> None:
    told = helm("test", "cvf", "--namespace", release.namespace, "--timeout", "3m")
    assert told.count("Phase:          Succeeded") == 4, told


def test_the_bundle_is_fetched_from_s3_with_the_secret_and_served(release: Release) -> None:
    answer = httpx.post(f"{release.url('inference')}/invocations", content=npy(), headers=NPY, timeout=60)
    assert answer.json()["bundle_digest"] == release.project.digest


def test_the_exporter_tells_of_the_project(release: Release) -> None:
    told = httpx.get(f"{release.url('exporter')}/metrics", timeout=60).text
    assert f'cvf_project_readable{{project="{release.project.config.project}"}} 1.0' in told


def test_objects_have_the_versions_that_the_cluster_knows(release: Release) -> None:
    from kubernetes import client

    served = {
        f"{group.name}/{version.version}" for group in client.ApisApi().get_api_versions().groups for version in group.versions
    }
    used = {kind: item["apiVersion"] for (kind, _), item in release.manifest.items()}
    assert used["CronJob"] == ("batch/v1" if "policy/v1" in served else "batch/v1beta1")
    assert used["PodDisruptionBudget"] == ("policy/v1" if "policy/v1" in served else "policy/v1beta1")
    assert used["HorizontalPodAutoscaler"] == ("autoscaling/v2" if "autoscaling/v2" in served else "autoscaling/v2beta2")


def run_job(release: Release, component: str) -> str:
    """Run what a CronJob would run, now; returns its log."""
    from kubernetes import client

    spec = release.manifest[("CronJob", component)]["spec"]["jobTemplate"]["spec"]
    name, batch = f"{component}-now", client.BatchV1Api()
    batch.create_namespaced_job(release.namespace, {"metadata": {"name": name}, "spec": spec})
    until(lambda: (status := batch.read_namespaced_job(name, release.namespace).status).succeeded or status.failed)
    [pod, *_] = release.api.list_namespaced_pod(release.namespace, label_selector=f"job-name={name}").items
    log = log_of(release.api, release.namespace, pod.metadata.name)
    assert batch.read_namespaced_job(name, release.namespace).status.succeeded, log
    batch.delete_namespaced_job(name, release.namespace, propagation_policy="Foreground")
    return log


def test_the_drift_job_checks_and_decides(release: Release) -> None:
    told = [json.loads(line) for line in run_job(release, "drift").splitlines() if line.startswith("{")]
    assert [item["stage"] for item in told] == ["drift", "decide"]
    assert told[0]["record"]["verdict"] == "not enough data"
    assert told[1]["run"] == f"{release.project.config.root}/runs/cron.drift-now"


def test_the_retraining_job_has_nothing_to_do_before_a_decision(release: Release) -> None:
    assert "nothing to do: no retraining has been decided" in run_job(release, "retraining")


def test_the_gateway_asks_the_endpoint_and_another_project_replaces_its_pods(release: Release) -> None:
    roll_out(release)
    assert release.ask().status_code == 401
    answer = until(lambda: (asked := release.ask(release.key)).status_code == 200 and asked)
    assert answer.json()["bundle_digest"] == release.project.digest

    place = ("cvf", "--namespace", release.namespace)
    project = release.write_project(kind="open")
    helm("upgrade", place[0], str(CHART), *place[1:], "--reuse-values", "--set-file", f"project={project}", "--wait")
    until(lambda: release.ask().status_code == 200)
    helm("rollback", *place, "1", "--wait")
    until(lambda: release.ask().status_code == 401)
    history = json.loads(helm("history", *place, "--output", "json"))
    assert [(item["revision"], item["status"]) for item in history] == [(1, "superseded"), (2, "superseded"), (3, "deployed")]
