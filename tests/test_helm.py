"""The chart and the values for other charts, as helm and the checkers of Kubernetes' objects see them; no cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import cv_factory_ops
from cv_factory_ops.config import load
from tests.helm import CHART, helm, refusal, rendered

SETS = ("minimal", "full", "production", "kind")
VALUES = CHART.parent / "values"
UNCHECKED = {
    "CKV_K8S_35": "secrets are variables, because boto3 and MLflow read them there",
    "CKV_K8S_15": "Always is for tags that move; these do not, and `production` pulls by digest",
    "CKV_K8S_40": "the images' user is 1000, with whom volumes are shared; any other will do, and `production` has one",
    "CKV_K8S_43": "digests are known once images are pushed; `production` has them",
}
"""Checks of checkov that not every set passes, and why."""


def ci(name: str) -> Path:
    return CHART / "ci" / f"{name}-values.yaml"


def tool(name: str) -> str:
    """Path of a checker in this environment or on the path; without it the test skips."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not there: pip install {name} into an environment of its own, and put it on the PATH")
    return found


def test_chart_images_and_package_have_one_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == cv_factory_ops.__version__


def test_schema_and_values_name_the_same_settings() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def named(node: dict[str, Any]) -> set[str]:
        node = schema["definitions"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        below = node.get("properties", {})
        return {f"{name}.{child}" for name in below for child in named(below[name])} | set(below)

    def given(values: Any) -> set[str]:
        if not isinstance(values, dict):
            return set()
        return {f"{name}.{child}" for name in values for child in given(values[name])} | set(values)

    free = re.compile(r"^(.*\.)?(resources|podSecurityContext|containerSecurityContext)\.")
    values = {name for name in given(yaml.safe_load((CHART / "values.yaml").read_text())) if not free.match(name)}
    assert {name for name in named(schema) if not free.match(name)} - values == {"global"}
    assert values <= named(schema)


@pytest.mark.parametrize("name", SETS)
def test_helm_finds_no_fault(name: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART), "--values", str(ci(name)))


@pytest.mark.parametrize("name", SETS)
def test_the_project_in_it_is_one_that_the_library_takes(name: str, tmp_path: Path) -> None:
    (tmp_path / "project.yaml").write_text(yaml.safe_load(ci(name).read_text())["project"])
    load(tmp_path / "project.yaml")


@pytest.mark.parametrize("version", ["1.27", "1.32", "1.37"])
@pytest.mark.parametrize("name", SETS)
def test_objects_are_what_that_kubernetes_takes(name: str, version: str, tmp_path: Path) -> None:
    checker, manifest = tool("kubernetes-validate"), tmp_path / "manifest.yaml"
    manifest.write_text(helm("template", "cvf", str(CHART), "--values", str(ci(name)), "--kube-version", version))
    ended = subprocess.run([checker, "-k", version, "--strict", str(manifest)], capture_output=True, text=True)
    told = [line for line in (ended.stdout + ended.stderr).splitlines() if not line.startswith("INFO")]
    assert [line for line in told if "kind ServiceMonitor" not in line] == []
    assert ended.returncode == 0


def test_checkov_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    checker = tool("checkov")
    for name in ("full", "production"):  # what the others lack is switched on in these
        text = helm("template", "cvf", str(CHART), "--namespace", "cv", "--skip-tests", "--values", str(ci(name)))
        (tmp_path / f"{name}.yaml").write_text(text)
    options = ("--framework", "kubernetes", "--skip-download", "--compact", "--quiet", "--output", "json")
    ended = subprocess.run([checker, "--directory", str(tmp_path), *options], capture_output=True, text=True, timeout=300)
    report = json.loads(ended.stdout)
    failed = {(check["check_id"], Path(check["file_path"]).stem) for check in report["results"]["failed_checks"]}
    assert {check for check, _ in failed} == set(UNCHECKED)
    assert {check for check, name in failed if name == "production"} == {"CKV_K8S_35"}
    assert report["summary"]["passed"] > 500


@pytest.mark.parametrize("name", SETS)
def test_every_pod_is_restricted_and_named_secrets_only(name: str) -> None:
    """Pod Security Standards, profile `restricted`."""
    for (kind, _), item in rendered(ci(name)).items():
        assert kind not in {"Secret", "Role", "ClusterRole"}
        for pod in pods_of(item):
            assert pod["automountServiceAccountToken"] is False
            assert pod["securityContext"]["runAsNonRoot"]
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
            for container in pod["containers"] + pod.get("initContainers", []):
                context = container["securityContext"]
                assert context["readOnlyRootFilesystem"]
                assert not context["allowPrivilegeEscalation"]
                assert context["capabilities"] == {"drop": ["ALL"]}
                assert {"requests", "limits"} == set(container["resources"])


def pods_of(item: dict[str, Any]) -> list[dict[str, Any]]:
    match item["kind"]:
        case "Pod":
            return [item["spec"]]
        case "Deployment" | "StatefulSet":
            return [item["spec"]["template"]["spec"]]
        case "CronJob":
            return [item["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
        case _:
            return []


def test_everything_but_gateway_and_exporter_is_off_by_default() -> None:
    found = rendered(ci("minimal"), "--skip-tests")
    assert {name for kind, name in found if kind in {"Deployment", "StatefulSet", "CronJob"}} == {"gateway", "exporter"}
    assert {kind for kind, _ in found} == {"ConfigMap", "ServiceAccount", "Service", "Deployment"}


def test_another_project_replaces_the_pods(tmp_path: Path) -> None:
    values = yaml.safe_load(ci("minimal").read_text())
    (tmp_path / "changed.yaml").write_text(yaml.safe_dump(values | {"project": values["project"] + "tags: [new]\n"}))
    before, after = (
        rendered(file)[("Deployment", "gateway")]["spec"]["template"] for file in (ci("minimal"), tmp_path / "changed.yaml")
    )
    assert before["metadata"]["annotations"] != after["metadata"]["annotations"]
    assert before["spec"] == after["spec"]


def test_policies_let_in_the_release_and_whom_the_values_name() -> None:
    found = rendered(ci("production"), "--skip-tests")
    policies = {name: item["spec"] for (kind, name), item in found.items() if kind == "NetworkPolicy"}
    assert set(policies) == {"gateway", "exporter", "drift"}
    addresses = rendered(ci("production"))[("Ingress", "gateway")]["metadata"]["annotations"]
    assert addresses["alb.ingress.kubernetes.io/target-type"] == "ip", "its default, instance, needs a NodePort"
    assert addresses["alb.ingress.kubernetes.io/healthcheck-path"] == "/healthz", "its default, /, is no route of the gateway"
    assert json.loads(addresses["alb.ingress.kubernetes.io/listen-ports"]) == [{"HTTPS": 443}]
    assert "ingress" not in policies["drift"], "nobody may reach a job"
    assert [list(peer) for peer in policies["gateway"]["ingress"][0]["from"]] == [
        ["podSelector"],
        ["ipBlock"],
        ["namespaceSelector"],
    ]
    assert [rule["ports"][0]["port"] for rule in policies["drift"]["egress"] if "ports" in rule] == [53, 443, 6379]


def test_the_endpoint_which_has_no_login_is_open_to_whom_it_names_alone() -> None:
    found = rendered(
        ci("full"), "--skip-tests", "--set-json", 'networkPolicy.endpointFrom=[{"ipBlock":{"cidr":"10.1.0.0/16"}}]'
    )
    [rule] = found[("NetworkPolicy", "endpoint")]["spec"]["ingress"]
    assert [list(peer) for peer in rule["from"]] == [["podSelector"], ["ipBlock"]]


def test_the_service_monitor_names_targets_as_the_alerts_do() -> None:
    """With the operator's default the job is the name of the Service."""
    found = rendered(ci("full"), "--skip-tests")
    monitor = found[("ServiceMonitor", "")]["spec"]
    [chosen] = monitor["selector"]["matchExpressions"]
    services = [item["metadata"]["labels"] for (kind, _), item in found.items() if kind == "Service"]
    jobs = {labels[monitor["jobLabel"]] for labels in services if labels[chosen["key"]] in chosen["values"]}
    assert jobs == {"gateway", "inference", "endpoint", "exporter"}
    alerts = (CHART.parents[1] / "docker/monitoring/alerts.yaml").read_text()
    assert {job for names in re.findall(r'job=~?"([\w|]+)"', alerts) for job in names.split("|")} == jobs
    [scraped] = monitor["endpoints"]
    assert {"action": "labeldrop", "regex": "endpoint"} in scraped["relabelings"], "else ours would be exported_endpoint"
    assert {"action": "replace", "targetLabel": "release", "replacement": "cvf"} in scraped["relabelings"]


def test_names_that_yaml_takes_for_something_else_stay_names() -> None:
    names = (
        "--set-string",
        "fullnameOverride=true,existingSecret=1e3,exporter.serviceAccount.name=no",
        "--set",
        "env.SIZE=1000000",
    )
    text = helm("template", "2024", str(CHART), "--namespace", "1", "--values", str(ci("full")), *names)
    for item in filter(None, yaml.safe_load_all(text)):
        assert {type(value) for value in item["metadata"]["labels"].values()} == {str}
        assert item["metadata"]["namespace"] == "1"
        assert isinstance(item["metadata"]["name"], str)
        for pod in pods_of(item):
            assert isinstance(pod["serviceAccountName"], str)
            [container] = pod["containers"]
            assert container["envFrom"] == [{"secretRef": {"name": "1e3"}}]
            assert {"name": "SIZE", "value": "1000000"} in container["env"]


@pytest.mark.parametrize(
    "name", ["db_password", "BASIC_AUTH", "GH_PAT", "SSH_KEY_DATA", "HOOK_KEY", "AWS_SESSION_TOKEN", "CLIENT_SECRET"]
)
def test_what_a_secret_would_be_called_is_no_plain_variable(name: str) -> None:
    assert name in refusal("template", "cvf", str(CHART), "--values", str(ci("minimal")), "--set", f"env.{name}=x")


def test_where_a_secret_lies_is_no_secret() -> None:
    paths = ",".join(f"env.{name}=/x" for name in ("AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE", "PATH"))
    assert "/x" in helm("template", "cvf", str(CHART), "--values", str(ci("minimal")), "--set", paths)


def test_a_release_that_no_service_can_be_named_after_is_refused() -> None:
    told = refusal("template", "3d", str(CHART), "--values", str(ci("minimal")))
    assert 'fullnameOverride: services cannot be named "3d-cv-factory"' in told


def test_metrics_and_health_are_not_let_in_from_outside() -> None:
    [rule] = rendered(ci("full"))[("Ingress", "gateway")]["spec"]["rules"]
    assert not {"/", "/metrics", "/healthz", "/readyz"} & {path["path"] for path in rule["http"]["paths"]}


WRONG = {
    "a password in a variable": ("env.SMTP_PASSWORD=x", "SMTP_PASSWORD"),
    "a password in an address": ("env.PROXY=http://me:word@proxy", "PROXY"),
    "a login in MLflow's address": ("mlflow.trackingUri=https://me:word@mlflow", "trackingUri"),
    "a setting that there is not": ("gateway.replicas=2", "replicas"),
    "a relative storage": ("storage=var/storage", "storage"),
    "no project": ("project=", "project: give the project's YAML: --set-file project=configs/demo.yaml"),
    "a project that is no YAML": ("project=[", "project: is not YAML"),
    "keys that are nowhere": ("project=project: demo", 'gateway.access.file is "var/gateway-keys.jsonl", which no pod has'),
    "no model": ("inference.enabled=true", "inference.model: give one of uri and existingClaim"),
    "a component that is taken away": ("retraining=null", "retraining"),
    "an account that is taken away": ("gateway.serviceAccount=null", "serviceAccount"),
    "an open endpoint": ("endpoint.service.type=LoadBalancer", "endpoint"),
    "a schedule that is none": ("drift.schedule=often", "schedule"),
    "more pods than the most": (
        "gateway.autoscaling.enabled=true,gateway.autoscaling.minReplicas=9",
        "gateway.autoscaling: minReplicas is more than maxReplicas",
    ),
    "nothing to scale by": (
        "gateway.autoscaling.enabled=true,gateway.resources.requests.cpu=null",
        "gateway.autoscaling: goes by the request of cpu, and resources.requests.cpu is not given",
    ),
    "no host": ("gateway.ingress.enabled=true", "gateway.ingress.host: give the name under which callers know the gateway"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_before_anything_is_installed(case: str) -> None:
    setting, told = WRONG[case]
    refused = refusal("template", "cvf", str(CHART), "--values", str(ci("minimal")), "--set", setting)
    assert told in refused
    assert "nil pointer" not in refused


@pytest.mark.parametrize(
    ("chart", "files"),
    [
        ("airflow", ["airflow"]),
        ("airflow", ["airflow", "airflow-git-sync"]),
        ("mlflow", ["mlflow"]),
        ("milvus", ["milvus"]),
    ],
)
def test_other_charts_take_our_values(chart: str, files: list[str], tmp_path: Path) -> None:
    """Their own schema and templates, and for charts without a schema the names in their own values."""
    folder = Path(os.environ.get("CVF_CHARTS", "/nowhere")) / chart
    if not folder.is_dir():
        pytest.skip(f"the chart is not there: helm pull --untar, and set CVF_CHARTS to the folder that holds {chart}/")
    text = helm("template", "x", str(folder), *(part for name in files for part in ("--values", str(VALUES / f"{name}.yaml"))))
    known = yaml.safe_load((folder / "values.yaml").read_text())
    if not (folder / "values.schema.json").exists():
        assert list(unknown(yaml.safe_load((VALUES / f"{files[0]}.yaml").read_text()), known)) == []
    assert "/entrypoint" not in text
    if importlib.util.find_spec("kubernetes_validate") or shutil.which("kubernetes-validate"):
        (tmp_path / "manifest.yaml").write_text(text)
        command = [tool("kubernetes-validate"), "--strict", "--quiet", str(tmp_path / "manifest.yaml")]
        assert subprocess.run(command, capture_output=True).returncode == 0


def unknown(given: dict[str, Any], known: Any, path: str = "") -> Any:
    """Names that are given and not known; an empty mapping takes any."""
    for name, value in given.items():
        if not isinstance(known, dict) or name not in known:
            yield f"{path}{name}"
        elif isinstance(value, dict) and known[name]:
            yield from unknown(value, known[name], f"{path}{name}.")
