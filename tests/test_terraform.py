"""The Terraform modules and templates, by Terraform itself and the AWS provider, and our AWS calls against their policies.

`make test-terraform` also tests and validates every module and template, makes the modules on moto's server, and asks
checkov.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from cv_factory_ops.config import load
from cv_factory_ops.deploy import shapes
from tests.helm import CHART, helm

ROOT = Path(__file__).parents[1]
TERRAFORM = ROOT / "terraform"
FOLDERS = sorted(str(file.parent.relative_to(TERRAFORM)) for file in TERRAFORM.glob("*/*/main.tf"))
ASKED_FOR = bool(os.environ.get("CVF_TEST_TERRAFORM"))
thorough = pytest.mark.skipif(not ASKED_FOR, reason="takes minutes; `make test-terraform` asks for it")

READS = {"read_bytes", "read_part", "exists", "read_lines", "listing", "sizes", "folders", "versions", "local"}
STORAGE, ROLLOUT, GATEWAY = (
    "cv_factory_ops/storage.py",
    "cv_factory_ops/deploy/sagemaker.py",
    "cv_factory_ops/gateway/endpoint.py",
)
RUNS: dict[str, dict[str, set[str] | None]] = {
    "airflow": {STORAGE: READS},
    "stages": {STORAGE: None},
    "rollout": {STORAGE: None, ROLLOUT: None},
    "gateway": {STORAGE: {"write_bytes"}, GATEWAY: None},
    "inference": {STORAGE: READS},
    "exporter": {STORAGE: READS},
}
"""Component -> the files with AWS calls that it runs, and which of their functions; None: all."""

OF_A_DRAFT = {"delete_tree"}
"""What other functions call for files of this machine alone."""

ACTIONS = {"s3:HeadObject": "s3:GetObject", "s3:ListObjectsV2": "s3:ListBucket"}
"""Operations that IAM knows by another name."""

HERE = "eu-central-1:123456789012"
PROJECT, OTHER = "arn:aws:s3:::storage/cv-factory/chest_xray", "arn:aws:s3:::storage/airflow-logs/one"
NAMED = "chest-xray-0123456789ab-01234567"
"""A model and its endpoint config, as `deploy` names them."""

Policy = list[dict[str, Any]]


def terraform(*arguments: str, cwd: Path, **environment: str) -> str:
    """What Terraform prints; it must end well."""
    command = [shutil.which("terraform") or "terraform", *arguments]
    ended = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=840)
    assert ended.returncode == 0, f"terraform {arguments[0]}: {ended.stdout[-6000:]}{ended.stderr[-2000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the modules and templates with the provider; skips where Terraform or the provider is not to be had."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not there: https://developer.hashicorp.com/terraform/install")
    copy = tmp_path_factory.mktemp("terraform") / "terraform"
    shutil.copytree(TERRAFORM, copy, ignore=shutil.ignore_patterns(".terraform*", "*.tfstate*"))
    ended = subprocess.run(["terraform", "init", "-backend=false"], cwd=copy, capture_output=True, text=True)
    if ended.returncode and "Failed to query available provider packages" in ended.stderr:
        pytest.skip("no registry and no mirror has the AWS provider: TF_CLI_CONFIG_FILE names a configuration with a mirror")
    assert ended.returncode == 0, ended.stderr
    return copy


@pytest.fixture(scope="module")
def factory(checkout: Path) -> dict[str, Any]:
    """The state of the template project_cv_factory, made by a mocked provider."""
    told = terraform("test", "-json", "-verbose", "-filter=tests/cv_factory.tftest.hcl", cwd=checkout)
    (state,) = (message["test_state"] for line in told.splitlines() if "test_state" in (message := json.loads(line)))
    return state


def resources(module: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield from module.get("resources", [])
    yield from chain.from_iterable(resources(child) for child in module.get("child_modules", []))


def policies(state: dict[str, Any]) -> dict[str, Policy]:
    """Statements of the roles of the components, by component; the execution role of chest_xray is `containers`."""
    found: dict[str, Policy] = {}
    for resource in resources(state["root_module"]):
        if resource["type"] == "aws_iam_role_policy":
            address = resource["address"]
            name = "containers" if address.startswith('module.endpoint["chest_xray"]') else str(resource.get("index", address))
            found[name] = json.loads(resource["values"]["policy"])["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def allows(policy: Policy, action: str, resource: str) -> bool:
    """Whether a statement allows an action on a resource, its conditions left out of account."""
    return any(
        statement["Effect"] == "Allow"
        and any(fnmatch.fnmatchcase(action, pattern) for pattern in listed(statement["Action"]))
        and any(fnmatch.fnmatchcase(resource, pattern) for pattern in listed(statement["Resource"]))
        for statement in policy
    )


@functools.cache
def all_services() -> set[str]:
    return set(boto3.Session().get_available_services())


@functools.cache
def operations(service: str) -> dict[str, str]:
    """Method of boto3's client -> operation."""
    return dict(boto3.client(service, region_name="eu-central-1").meta.method_to_api_mapping)


def services(tree: ast.Module) -> set[str]:
    """Services whose clients a file makes."""
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute))
    names = {ast.unparse(call.args[0]).strip("'") for call in calls if call.func.attr == "client" and call.args}  # type: ignore[attr-defined]
    return names & all_services()


def calls_of(file: str, functions: set[str] | None) -> set[str]:
    """`service:Operation` of the AWS calls of a file, of some functions and of what these call in it."""
    tree = ast.parse((ROOT / file).read_text())
    inside = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    asked = [inside[name] for name in functions] if functions else [tree]
    words: set[str] = set()
    seen: set[str] = set()
    while asked:
        for node in ast.walk(asked.pop()):
            if isinstance(node, ast.Name) and node.id in inside and node.id not in seen | OF_A_DRAFT:
                seen.add(node.id)
                asked.append(inside[node.id])
            if isinstance(node, ast.Attribute):
                words.add(node.attr)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get_paginator":
                words.add(ast.literal_eval(node.args[0]))
    found = {
        f"{service.removesuffix('-runtime')}:{operation}"
        for service in services(tree)
        for method, operation in operations(service).items()
        if method in words
    }
    transfers = {"upload_file": {"s3:PutObject", "s3:AbortMultipartUpload"}, "download_file": {"s3:HeadObject", "s3:GetObject"}}
    return found.union(*(added for word, added in transfers.items() if word in words))


def subjects_of(action: str, component: str) -> list[str]:
    """Resources that an action is asked about while `chest_xray` is worked on."""
    sagemaker = f"arn:aws:sagemaker:{HERE}"
    config, endpoint = f"{sagemaker}:endpoint-config/{NAMED}", f"{sagemaker}:endpoint/chest-xray"
    match action:
        case "s3:ListBucket":
            return ["arn:aws:s3:::storage"]
        case "sagemaker:CreateModel" | "sagemaker:DescribeModel":
            return [f"{sagemaker}:model/{NAMED}"]
        case "sagemaker:CreateEndpointConfig" | "sagemaker:DescribeEndpointConfig":
            return [config]
        case "sagemaker:CreateEndpoint" | "sagemaker:UpdateEndpoint":
            return [config, endpoint]
        case "sagemaker:AddTags":
            return [f"{sagemaker}:model/{NAMED}", config, endpoint]
        case "application-autoscaling:DescribeScalableTargets":
            return ["*"]
    match action.partition(":")[0]:
        case "s3":
            return [f"{PROJECT}/{'labels' if component == 'gateway' else 'runs'}/one.json"]
        case "sagemaker":
            return [endpoint]
        case "cloudwatch":
            return [f"arn:aws:cloudwatch:{HERE}:alarm:cvf/chest-xray/Invocation5XXErrors/01234567"]
        case "application-autoscaling":
            return [f"arn:aws:application-autoscaling:{HERE}:scalable-target/0123456789abcdef"]
    raise AssertionError(f"{action}: say here which resource it is asked about")


def test_everything_is_formatted() -> None:
    if shutil.which("terraform") is None:
        pytest.skip("terraform is not there: https://developer.hashicorp.com/terraform/install")
    terraform("fmt", "-check", "-recursive", "-diff", cwd=TERRAFORM)


def test_every_variable_and_output_is_typed_and_described() -> None:
    for file in TERRAFORM.rglob("*.tf"):
        for kind, name, body in re.findall(r'^(variable|output) "(\w+)" \{\n(.*?)^\}', file.read_text(), re.S | re.M):
            assert re.search(r"^  description += \S", body, re.M), f"{file}: {kind} {name} is not described"
            assert kind == "output" or re.search(r"^  type += \w", body, re.M), f"{file}: {name} has no type"


def test_every_file_that_asks_aws_belongs_to_a_component() -> None:
    """But `cvf doctor`: a person runs it, with a login of their own, and what it may not ask it says."""
    files = chain.from_iterable(
        (ROOT / folder).rglob("*.py") for folder in ("cv_factory_ops", "domain_medical", "plugins", "dags")
    )
    texts = {str(file.relative_to(ROOT)): file.read_text() for file in files}
    asking = {name for name, text in texts.items() if ".client(" in text and services(ast.parse(text))}
    asking = {name for name in asking if not name.startswith("cv_factory_ops/doctor/")}
    assert asking == set(chain.from_iterable(RUNS.values()))


@pytest.mark.parametrize("component", RUNS)
def test_a_component_may_do_what_its_code_does(component: str, factory: dict[str, Any]) -> None:
    policy = policies(factory)[component]
    calls = set().union(*(calls_of(file, functions) for file, functions in RUNS[component].items()))
    assert calls, "no call was found"
    for action in {ACTIONS.get(call, call) for call in calls}:
        for resource in subjects_of(action, component):
            assert allows(policy, action, resource), f"{component} may not do {action} on {resource}"


def test_a_component_may_do_nothing_beside_it(factory: dict[str, Any]) -> None:
    roles = policies(factory)
    record, endpoint = f"{PROJECT}/runs/one/record.json", f"arn:aws:sagemaker:{HERE}:endpoint"
    refused = [
        ("airflow", "s3:PutObject", record),
        ("exporter", "s3:PutObject", record),
        ("inference", "s3:DeleteObject", record),
        ("gateway", "s3:GetObject", f"{PROJECT}/labels/one.jsonl"),
        ("gateway", "s3:PutObject", record),
        ("gateway", "sagemaker:UpdateEndpoint", f"{endpoint}/chest-xray"),
        ("stages", "s3:GetObject", OTHER),
        ("stages", "sagemaker:UpdateEndpoint", f"{endpoint}/chest-xray"),
        ("stages", "s3:PutObject", "arn:aws:s3:::hospital/chest/one.dcm"),
        ("rollout", "sagemaker:UpdateEndpoint", f"{endpoint}/somebody-elses"),
        ("rollout", "iam:PassRole", "arn:aws:iam::123456789012:role/administrator"),
        ("rollout", "cloudwatch:DeleteAlarms", f"arn:aws:cloudwatch:{HERE}:alarm:cv-factory-dev-chest-xray-errors"),
        ("containers", "s3:GetObject", record),
        ("containers", "s3:PutObject", f"{PROJECT}/models/0123/model.tar.gz"),
        ("mlflow", "s3:GetObject", record),
        ("ci-images", "ecr:BatchDeleteImage", "arn:aws:ecr:eu-central-1:123456789012:repository/one"),
    ]
    assert [case for case in refused if allows(roles[case[0]], case[1], case[2])] == []


def test_the_containers_and_whoever_passes_their_role(factory: dict[str, Any]) -> None:
    roles = policies(factory)
    assert allows(roles["rollout"], "iam:PassRole", "arn:aws:iam::123456789012:role/cv-factory-dev-chest-xray")
    assert allows(roles["containers"], "s3:GetObject", f"{PROJECT}/models/0123/model.tar.gz")
    for place in ("captures/chest-xray/AllTraffic/2026/03/01/06/one.jsonl", "async/out/one.out", "async/failed/one.out"):
        assert allows(roles["containers"], "s3:PutObject", f"{PROJECT}/{place}")


def test_every_allowed_action_is_one_that_aws_has(factory: dict[str, Any]) -> None:
    """Against botocore's models; a misspelt action would be a right that nobody has."""
    no_operation = {"s3:ListBucket", "iam:PassRole"}  # rights that are named otherwise than operations
    clients = {"sagemaker": ["sagemaker", "sagemaker-runtime"], "cloudwatch": ["cloudwatch"]}
    statements = chain.from_iterable(policies(factory).values())
    actions = set(chain.from_iterable(listed(statement["Action"]) for statement in statements))
    for action in actions - no_operation:
        prefix, _, operation = action.partition(":")
        known = set(chain.from_iterable(operations(service).values() for service in clients.get(prefix, [prefix])))
        assert operation in known, f"{action}: AWS has no such operation"
    assert len(actions) > 40


def test_no_role_may_do_everything_or_touch_everything(factory: dict[str, Any]) -> None:
    """`*` as a resource only for actions that know no other; all others name theirs."""
    unnamed = {
        "application-autoscaling:DescribeScalableTargets",
        "cloudwatch:PutMetricData",
        "ecr:GetAuthorizationToken",
    }
    looks = re.compile(r"(autoscaling|ec2):(Describe|Get)\w+$")
    for name, policy in policies(factory).items():
        for statement in policy:
            actions = set(listed(statement["Action"]))
            assert not any("*" in action for action in actions), f"{name}: {actions}"
            if "*" in listed(statement["Resource"]):
                assert {action for action in actions if not looks.match(action)} <= unnamed, f"{name}: {actions}"


def test_the_outputs_are_settings_of_a_project(
    factory: dict[str, Any], project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CVF_STORAGE", raising=False)
    outputs = {name: output["value"] for name, output in factory["outputs"].items()}
    deploy = outputs["deploy"]["chest_xray"]
    deploy["image"] += ":0.1.0"
    deploy["vpc"]["subnets"], deploy["vpc"]["security_groups"] = ["subnet-1", "subnet-2"], ["sg-1"]
    config = load(project(project="chest_xray", deploy=deploy, storage=outputs["storage"]))
    model = shapes.model(config, "one", f"{config.root}/models/0123/model.tar.gz")
    assert model["ExecutionRoleArn"] == "arn:aws:iam::123456789012:role/cv-factory-dev-chest-xray"
    assert config.root == "s3://storage/cv-factory/chest_xray"
    assert config.endpoint_name == "chest-xray"


def test_the_outputs_are_values_of_the_chart(factory: dict[str, Any]) -> None:
    """Helm holds them against the chart's schema in the next test."""
    values = yaml.safe_load(factory["outputs"]["helm_values"]["value"]["chest_xray"])
    assert values["image"]["registry"] == "123456789012.dkr.ecr.eu-central-1.amazonaws.com/cv-factory-dev"


def test_the_charts_service_accounts_are_those_that_the_roles_trust(factory: dict[str, Any], tmp_path: Path) -> None:
    values = yaml.safe_load(factory["outputs"]["helm_values"]["value"]["chest_xray"])
    on = {name: values[name] | {"enabled": True} for name in ("gateway", "exporter", "drift", "batch", "retraining")}
    on["inference"] = values["inference"] | {"enabled": True, "model": {"uri": "s3://storage/model.tar.gz"}}
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(values | on))
    settings = ["--namespace", "cv-factory", "--values", str(tmp_path / "values.yaml")]
    settings += ["--set-file", f"project={ROOT / 'configs' / 'demo.yaml'}"]
    rendered = yaml.safe_load_all(helm("template", "chest-xray", str(CHART), *settings))
    accounts = {item["metadata"]["name"] for item in rendered if item and item["kind"] == "ServiceAccount"}
    components = {"drift": "stages", "batch": "stages", "retraining": "rollout"}
    trusted = {name: trust(factory, name) for name in RUNS}
    assert len(accounts) == len(on)
    for account in accounts:
        component = account.rpartition("-")[2]
        assert f"system:serviceaccount:cv-factory:{account}" in trusted[components.get(component, component)]


def trust(state: dict[str, Any], component: str) -> list[str]:
    """Whose tokens the role of a component is taken with."""
    address = f'module.iam.aws_iam_role.this["{component}"]'
    (role,) = (resource for resource in resources(state["root_module"]) if resource["address"] == address)
    (statement,) = json.loads(role["values"]["assume_role_policy"])["Statement"]
    assert statement["Action"] == "sts:AssumeRoleWithWebIdentity"
    (subjects,) = (names for key, names in statement["Condition"]["StringEquals"].items() if key.endswith(":sub"))
    return list(subjects)


@thorough
def test_modules_and_templates_keep_what_they_promise(checkout: Path) -> None:
    """With a mocked provider."""
    runs = sum(len(re.findall(r"^run ", file.read_text(), re.M)) for file in TERRAFORM.glob("tests/*.tftest.hcl"))
    assert f"Success! {runs} passed, 0 failed." in terraform("test", "-no-color", cwd=checkout)


@thorough
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_module_and_template_is_valid_by_itself(folder: str, checkout: Path) -> None:
    terraform("init", "-backend=false", cwd=checkout / folder)
    assert json.loads(terraform("validate", "-json", cwd=checkout / folder))["valid"]


@pytest.fixture(scope="module")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which AWS is a moto server of its own, with AWS's managed policies."""
    log = (tmp_path_factory.mktemp("moto") / "log").open("w+")
    command = [sys.executable, "-c", MOTO]
    server = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"MOTO_IAM_LOAD_MANAGED_POLICIES": "true"})
    deadline = time.monotonic() + 120
    while not (found := re.search(r"http://127\.0\.0\.1:\d+", Path(log.name).read_text())):
        assert server.poll() is None, Path(log.name).read_text()
        assert time.monotonic() < deadline, "moto does not start"
        time.sleep(0.2)
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    yield {"AWS_ENDPOINT_URL": found[0], "AWS_MAX_ATTEMPTS": "2", "TF_IN_AUTOMATION": "1", **keys}
    server.terminate()
    server.wait(timeout=20)


MOTO = """
import signal
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("http://127.0.0.1:%d" % server.get_host_and_port()[1], flush=True)
signal.pause()
"""


@thorough
def test_modules_are_made_and_destroyed_on_moto(checkout: Path, moto: dict[str, str]) -> None:
    terraform("init", "-backend=false", "-test-directory=tests/moto", cwd=checkout)
    told = terraform("test", "-no-color", "-test-directory=tests/moto", cwd=checkout, **moto)
    assert "9 passed, 0 failed" in told, told
    aws = clients(moto)
    assert [bucket["Name"] for bucket in aws("s3").list_buckets()["Buckets"] if "cv-factory" in bucket["Name"]] == []
    assert aws("eks", region_name="eu-central-1").list_clusters()["clusters"] == []
    assert [role["RoleName"] for role in aws("iam").list_roles()["Roles"] if "cv-factory" in role["RoleName"]] == []


def clients(moto: dict[str, str]) -> Callable[..., Any]:
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
    return functools.partial(boto3.client, **{"region_name": "us-east-1", "endpoint_url": moto["AWS_ENDPOINT_URL"], **keys})


@thorough
@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_every_environment_is_planned_with_its_state_in_s3(environment: str, checkout: Path, moto: dict[str, str]) -> None:
    template, bucket = checkout / "templates" / "project_cv_factory", f"state-{environment}"
    s3 = clients(moto)("s3")
    s3.create_bucket(Bucket=bucket)
    place = ["-reconfigure", f"-backend-config=envs/{environment}.s3.tfbackend"]
    moved = [f"-backend-config={name}" for name in (f"bucket={bucket}", "region=us-east-1")]
    terraform("init", "-input=false", *place, *moved, cwd=template, **moto)
    account = ["-var", "account_id=123456789012"]
    told = terraform(
        "plan", "-no-color", "-input=false", f"-var-file=envs/{environment}.tfvars", *account, cwd=template, **moto
    )
    assert re.search(r"Plan: 1\d\d to add, 0 to change, 0 to destroy", told), told[-2000:]
    target = ["-target=module.logs.aws_s3_bucket.this", "-auto-approve", "-input=false"]
    terraform("apply", *target, f"-var-file=envs/{environment}.tfvars", *account, cwd=template, **moto)
    (item,) = s3.list_objects_v2(Bucket=bucket)["Contents"]
    assert item["Key"] == f"cv-factory/{environment}.tfstate", "the state lies elsewhere, or its lock is left"


@thorough
def test_checkov_finds_nothing() -> None:
    if (checkov := shutil.which("checkov")) is None:
        pytest.skip("checkov is not there: pip install checkov, into an environment of its own")
    command = [checkov, "--directory", str(TERRAFORM), "--framework", "terraform", "--skip-download", "--compact", "--quiet"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-6000:]
