"""The images: built and run by a real Docker engine and, where there is one, the trainer's as a pod of a real cluster.

A build takes minutes and gigabytes, so only `make test-images` asks for these tests.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import subprocess
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import cv_factory_ops
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import load
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.config.runtime import KubernetesRuntime, PodSettings
from cv_factory_ops.domain import Decoded, open_domain, to_uint16
from tests.bundles import IMAGE, free_port, png, write_bundle
from tests.conftest import TINY
from tests.kubernetes.conftest import until

ROOT = Path(__file__).parents[1]
TAG = os.environ.get("CVF_IMAGES_TAG", "")
LOAD_IMAGE = os.environ.get("CVF_LOAD_IMAGE", "")
RESTRICTED = ["--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none"]  # noqa: S108
USER = os.getuid() or 1000
"""Numeric user of containers that write to a folder of this machine."""
SCALE = {"training": TINY["training"] | {"processes_per_node": 2}}
EVERYWHERE = "0.0.0.0"  # noqa: S104 - in a container
COMMANDS = {
    "airflow": ["airflow", "api-server"],
    "trainer": ["cvf", "--help"],
    "inference": ["serve"],
    "gateway": ["cvf", "gateway", "--config", "/config/project.yaml", "--host", EVERYWHERE, "--port", "8000"],
    "monitoring": ["cvf", "exporter", "--config", "/config/project.yaml", "--host", EVERYWHERE, "--port", "9109"],
    "mlflow": ["mlflow", "server", "--host", EVERYWHERE, "--port", "5000"],
}
"""What each image does by default."""
HEAVY = {"airflow", "cv2", "cv_factory_ops", "evidently", "mlflow", "numpy", "torch"}
HOLDS = {
    "airflow": HEAVY,
    "trainer": HEAVY - {"airflow"},
    "inference": {"cv2", "cv_factory_ops", "numpy", "torch"},
    "gateway": {"cv2", "cv_factory_ops", "numpy"},
    "monitoring": {"cv_factory_ops"},
    "mlflow": {"mlflow", "numpy"},
}
"""Of the heavy modules and the project, those that each image has."""

pytestmark = pytest.mark.skipif(not TAG, reason="building images takes minutes; `make test-images` asks for it")


def docker(*arguments: str, given: str | None = None) -> str:
    """Standard output of a Docker command that must succeed."""
    result = subprocess.run(["docker", *arguments], input=given, capture_output=True, text=True)
    assert result.returncode == 0, f"docker {shlex.join(arguments)}: {result.stdout[-2000:]}{result.stderr[-4000:]}"
    return result.stdout


def build(checkout: Path, name: str, tag: str) -> str:
    make = ["make", "--no-print-directory", "-C", str(checkout), f"image-{name}", f"TAG={tag}"]
    result = subprocess.run(make, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout[-4000:]}{result.stderr[-4000:]}"
    return f"{os.environ.get('REGISTRY', '')}cv-factory-{name}:{tag}"


@cache
def built(name: str) -> str:
    """Full name of an image, freshly built from this checkout; without a Docker engine the test skips."""
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("no Docker engine answers: install docker.io or Docker Desktop and start it")
    return build(ROOT, name, TAG)


@pytest.fixture(scope="module", params=COMMANDS)
def name(request: pytest.FixtureRequest) -> str:
    """Of each image in turn, without what all have in common."""
    return str(request.param)


@pytest.fixture
def image() -> str:
    """The trainer's."""
    return built("trainer")


def inspect(image: str) -> dict[str, Any]:
    return json.loads(docker("image", "inspect", image))[0]


def python(image: str, code: str, *options: str) -> Any:
    """What a script prints as JSON in a container."""
    return json.loads(docker("run", "--rm", *RESTRICTED, *options, image, "python", "-c", code))


class Answer(NamedTuple):
    status: int
    content_type: str
    body: bytes


ASK = """
import base64, json, sys
from http.client import HTTPConnection
port, method, path, headers, body = json.load(sys.stdin)
connection = HTTPConnection("127.0.0.1", port, timeout=120)
connection.request(method, path, base64.b64decode(body), headers)
answer = connection.getresponse()
print(json.dumps([answer.status, answer.headers.get("content-type", ""), base64.b64encode(answer.read()).decode()]))
"""


class Container:
    """A service in a container without a network: it is asked from inside."""

    def __init__(self, name: str, port: int) -> None:
        self._name, self._port = name, port

    def ask(self, path: str, body: bytes = b"", method: str = "", **headers: str) -> Answer:
        """Names of headers with ``_`` for ``-``."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        question = [self._port, method or ("POST" if body else "GET"), path, named, base64.b64encode(body).decode()]
        answer = json.loads(docker("exec", "--interactive", self._name, "python", "-c", ASK, given=json.dumps(question)))
        return Answer(answer[0], answer[1], base64.b64decode(answer[2]))

    def run(self, *command: str) -> str:
        return docker("exec", self._name, *command)

    def logs(self) -> str:
        result = subprocess.run(["docker", "logs", self._name], capture_output=True, text=True)
        return result.stdout + result.stderr

    def healthy(self) -> bool:
        state = json.loads(docker("inspect", self._name))[0]["State"]
        assert state["Running"], self.logs()
        return bool(state["Health"]["Status"] == "healthy")


@contextmanager
def running(image: str, port: int, *options: str, command: tuple[str, ...] = (), seconds: float = 240) -> Iterator[Container]:
    """A container that its own health check calls healthy. When it is told to stop, it must do so before it is killed."""
    name = f"cvf-images-{uuid.uuid4().hex[:8]}"
    docker("run", "--detach", "--name", name, "--health-interval", "1s", *RESTRICTED, *options, image, *command)
    container = Container(name, port)
    try:
        until(container.healthy, seconds)
        yield container
        docker("stop", "--time", "30", name)
        assert json.loads(docker("inspect", name))[0]["State"]["ExitCode"] != 137, f"killed:\n{container.logs()}"
    finally:
        docker("rm", "--force", "--volumes", name)


AWS = ("AWS_DEFAULT_REGION=eu-central-1", "AWS_ACCESS_KEY_ID=a-key", "AWS_SECRET_ACCESS_KEY=a-secret")
NO_ENDPOINT = [f"--env={setting}" for setting in (*AWS, "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME=http://127.0.0.1:9")]
"""Settings of a gateway whose endpoint does not answer."""


@pytest.fixture
def config_folder(project: Callable[..., Path], home: Path) -> Path:
    """A folder with ``project.yaml``, for ``/config``, readable and writable by the user of the images."""
    folder = home / "config"
    folder.mkdir()
    deploy = {"kind": "sagemaker", "image": "cv-factory-inference", "role_arn": "arn:aws:iam::123456789012:role/none"}
    shutil.copy(project(deploy=deploy, gateway={"access": {"kind": "api_keys", "file": "/config/keys.jsonl"}}), folder)
    os.chown(folder, USER, USER)
    return folder


def test_it_runs_as_a_user_without_rights_on_a_read_only_root(name: str) -> None:
    image = built(name)
    assert docker("run", "--rm", *RESTRICTED, image, "id", "-u").strip() == "1000"
    writable = "import json, os; print(json.dumps([p for p in os.environ['PATH'].split(':') if os.access(p, os.W_OK)]))"
    assert json.loads(docker("run", "--rm", image, "python", "-c", writable)) == []
    if "cv_factory_ops" in HOLDS[name]:
        assert docker("run", "--rm", *RESTRICTED, image, "cvf", "--version") == f"cvf {cv_factory_ops.__version__}\n"


def test_the_image_says_what_it_is(name: str) -> None:
    config = inspect(built(name))["Config"]
    labels = {key.removeprefix("org.opencontainers.image."): value for key, value in config["Labels"].items()}
    assert (labels["title"], labels["version"]) == (f"cv-factory-{name}", cv_factory_ops.__version__)
    assert all(labels[key] for key in ("description", "source", "licenses"))
    assert f"CVF_GIT_SHA={labels['revision']}" in config["Env"]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == ("1000:1000", None, COMMANDS[name])
    assert config["Healthcheck"]["Test"][0] == "CMD"


def test_nothing_is_left_of_the_build_nor_of_other_images(name: str) -> None:
    code = """
import json, shutil
from importlib.util import find_spec
from pathlib import Path
print(json.dumps({
    "programs": [name for name in ("gcc", "g++", "cc", "c++", "clang", "nvcc", "ld", "make", "git") if shutil.which(name)],
    "compilers": [str(path) for root in ("/usr", "/opt") for name in ("cc1", "cc1plus") for path in Path(root).rglob(name)],
    "caches": [str(path) for path in map(Path, ("/root/.cache", "/tmp/.cache", "/build", "/project")) if path.exists()],
    "repositories": [str(path) for path in Path("/opt").rglob(".git")],
    "path files": [str(path) for path in Path("/opt").rglob("trees.pth")],
    "modules": [name for name in ("pip", "tests", "pytest", "moto", "cyclonedx_py") if find_spec(name)],
    "heavy": [name for name in HEAVY if find_spec(name)],
}))
"""
    found = python(built(name), code.replace("HEAVY", repr(sorted(HEAVY))), "--user", "0", "--cap-add", "DAC_READ_SEARCH")
    assert set(found.pop("heavy")) == HOLDS[name]
    assert not any(found.values()), found


def installed(image: str) -> dict[str, str]:
    """Normalised names and versions of an image's Python packages, without the project."""
    code = "import json, sysconfig, importlib.metadata as m; "
    code += "print(json.dumps({d.name: d.version for d in m.distributions(path=[sysconfig.get_path('purelib')])}))"
    found = {_normal(name): version for name, version in python(image, code).items()}
    assert found.pop("cv-factory", cv_factory_ops.__version__) == cv_factory_ops.__version__
    return found


def _normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def test_every_package_is_the_locks(name: str) -> None:
    lock = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    locked = {_normal(name): version for name, version in lock.items()}
    # The build of PyTorch (+cpu, +cu130) and what only a GPU build brings along are the user's choice by TORCH_INDEX.
    found = installed(built(name)).items()
    differing = {package: version for package, version in found if locked.get(package) != version.partition("+")[0]}
    assert [package for package in differing if not package.startswith(("nvidia-", "cuda-", "triton"))] == []


def test_the_bill_of_materials_is_cyclonedx_and_lists_what_is_there(name: str) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    image = built(name)
    text = docker("run", "--rm", *RESTRICTED, image, "cat", "/opt/venv/share/sbom/image.cdx.json")
    document = json.loads(text)
    assert JsonStrictValidator(SchemaVersion.from_version(document["specVersion"])).validate_str(text) is None
    assert document["metadata"]["component"]["name"] == f"cv-factory-{name}"
    debian = [item for item in document["components"] if item.get("purl", "").startswith("pkg:deb/")]
    others = {_normal(item["name"]): item["version"] for item in document["components"] if item not in debian}
    assert others == installed(image)
    listed = docker("run", "--rm", *RESTRICTED, image, "dpkg-query", "-W", "-f", "${Package} ${Version}\n").splitlines()
    assert sorted(f"{item['name']} {item['version']}" for item in debian) == sorted(listed)


def test_a_trainers_container_tells_its_health(image: str) -> None:
    with running(image, 0, "--init", command=("sleep", "600")):
        assert inspect(image)["Config"]["Healthcheck"]["Test"] == ["CMD", "cvf", "--version"]


def test_a_change_of_code_replaces_one_small_layer(
    image: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    rows = [
        line.split("\t")
        for line in docker("history", "--human=false", "--format", "{{.Size}}\t{{.CreatedBy}}", image).splitlines()
    ]
    layers = [(int(size), " ".join(command.split())[:90]) for size, command in rows if size != "0"]
    with capsys.disabled():
        print(f"\n{image}: {sum(size for size, _ in layers) / 1e6:.0f} MB")
        print("\n".join(f"  {size / 1e6:8.1f} MB  {command}" for size, command in layers))
    assert layers[0][0] < 5e6

    for name in ("cv_factory_ops", "domain_medical", "plugins", "docker"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("pyproject.toml", "requirements.lock", "README.md", ".dockerignore", "Makefile"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "cv_factory_ops" / "__init__.py").open("a") as file:
        file.write("# changed\n")
    changed = build(tmp_path, "trainer", f"test-{uuid.uuid4().hex[:8]}")
    request.addfinalizer(lambda: docker("image", "rm", changed))
    before, after = inspect(image)["RootFS"]["Layers"], inspect(changed)["RootFS"]["Layers"]
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_images_share_their_large_layers() -> None:
    layers = {name: inspect(built(name))["RootFS"]["Layers"] for name in ("trainer", "airflow", "inference")}
    sizes = [
        line for line in docker("history", "--human=false", "--format", "{{.Size}}", built("trainer")).split() if line != "0"
    ]
    assert len(layers["trainer"]) == len(sizes) or "an empty layer counts"
    assert layers["airflow"][: len(layers["trainer"]) - 1] == layers["trainer"][:-1]
    assert len(set(layers["inference"]) & set(layers["trainer"])) >= 3


def test_phantoms_become_a_bundle(image: str, project: Callable[..., Path], home: Path) -> None:
    file = project(**SCALE)
    os.chown(home, USER, USER)
    for stage in ("ingest", "preprocess", "train"):
        folder = ["--volume", f"{home}:/data", "--env", "CVF_HOME=/data", "--user", str(USER)]
        command = ["cvf", stage, "--config", f"/data/{file.name}", "--run", "/data/run"]
        result = json.loads(docker("run", "--rm", *RESTRICTED, *folder, image, *command))
    assert "2 processes" in result["record"]["summary"]
    assert Bundle.load(home / "run" / "train" / "bundle").digest == result["record"]["bundle_digest"]


def study() -> bytes:
    """A de-identified DICOM study: an MR slice of pydicom's test data."""
    from pydicom.data import get_testdata_file

    path = get_testdata_file("MR_small.dcm")
    assert isinstance(path, str)
    return open_domain("medical").deidentify(Path(path).read_bytes(), DeidentificationConfig(pixels="trust")).content


@pytest.mark.parametrize("engine", ["openvino", "torch"])
def test_the_inference_image_keeps_sagemakers_contract(home: Path, engine: str) -> None:
    from cv_factory_ops.predictor import Predictor

    bundle = write_bundle(home / "bundle", seed=1)
    mounted = ["--volume", f"{bundle.path}:/opt/ml/model:ro", "--env", f"CVF_ENGINE={engine}"]
    with running(built("inference"), 8080, *mounted, command=("serve",)) as container:
        assert container.ask("/ping").status == 200
        answer = json.loads(container.ask("/invocations", png(), content_type="image/png").body)
        (expected,) = Predictor(bundle).answer([Decoded(to_uint16(IMAGE))]).predictions
        assert answer["bundle_digest"] == bundle.digest
        assert answer["predictions"][0]["score"] == pytest.approx(expected.score, abs=0.01)
        for method in ("grad_cam", "integrated_gradients", "lime", "shap"):
            asked = {"content_type": "image/png", "X_Amzn_SageMaker_Custom_Attributes": f"explain={method}"}
            assert container.ask("/invocations", png(), **asked).status == 200, container.logs()
        report = container.ask("/invocations", study(), content_type="application/dicom", accept="application/dicom")
        assert (report.status, report.content_type) == (200, "application/dicom")
        assert container.ask("/metrics").status == 200


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it ends its own `docker compose up`
def test_sagemakers_local_mode_starts_the_inference_image(home: Path) -> None:
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode:
        pytest.skip("SageMaker's local mode needs docker compose")
    local_session = pytest.importorskip("sagemaker.core.local.local_session")
    import boto3

    bundle, name = write_bundle(home / "bundle", seed=2), f"cvf-images-{uuid.uuid4().hex[:8]}"
    boto = boto3.Session("a-key", "a-secret", region_name="eu-central-1")
    session = local_session.LocalSession(boto)
    session.config = {"local": {"serving_port": free_port(), "container_root": str(home)}}
    client, runtime = session.sagemaker_client, session.sagemaker_runtime_client
    container = {"Image": built("inference"), "ModelDataUrl": f"file://{bundle.path}", "Environment": {}}
    client.create_model(name, container)
    variant = {"ModelName": name, "VariantName": "one", "InstanceType": "local", "InitialInstanceCount": 1}
    client.create_endpoint_config(name, [variant])
    client.create_endpoint(name, name)
    try:
        until(lambda: client.describe_endpoint(name)["EndpointStatus"] == "InService", 240)
        answer = runtime.invoke_endpoint(png(), name, ContentType="image/png")
        assert json.loads(answer["Body"].read())["bundle_digest"] == bundle.digest
    finally:
        client.delete_endpoint(name)
        left = docker("ps", "--all", "--quiet", "--filter", f"volume={bundle.path}").split()
        docker("rm", "--force", *left)
        subprocess.run(["docker", "network", "rm", "sagemaker-local"], capture_output=True)  # unless another endpoint is on it


def test_the_gateway_lets_in_who_shows_a_key(config_folder: Path) -> None:
    image, config = built("gateway"), ["--volume", f"{config_folder}:/config", "--user", str(USER)]
    made = docker(
        "run", "--rm", *RESTRICTED, *config, image, "cvf", "gateway-key", "--config", "/config/project.yaml", "viewer"
    )
    with running(image, 8000, *config, *NO_ENDPOINT) as container:
        assert container.ask("/healthz").status == 200
        assert container.ask("/predict", png(), content_type="image/png").status == 401
        asked = {"content_type": "application/dicom", "X_API_Key": made.split()[-1]}
        refused = container.ask("/predict", b"no study", **asked)
        assert refused.status == 400, refused


def test_a_gateway_that_deidentifies_reads_compressed_studies(config_folder: Path) -> None:
    """What only such a gateway imports is there: it decodes the study, and then finds no endpoint."""
    from pydicom.data import get_testdata_file

    project = yaml.safe_load((config_folder / "project.yaml").read_text())
    project["gateway"] = {"deidentify": True, "access": {"kind": "open"}}
    project |= {"deidentification": {"pixels": "trust"}}
    (config_folder / "project.yaml").write_text(yaml.safe_dump(project))
    settings = ["--volume", f"{config_folder}:/config:ro", "--env", "CVF_PSEUDONYM_KEY=a key for tests"]
    with running(built("gateway"), 8000, *settings, *NO_ENDPOINT) as container:
        for file in ("JPEG2000.dcm", "MR_small_jpeg_ls_lossless.dcm", "MR_small_RLE.dcm", "MR_small.dcm"):
            path = get_testdata_file(file)
            assert isinstance(path, str)
            answer = container.ask("/predict", Path(path).read_bytes(), content_type="application/dicom")
            assert answer.status in {502, 503}, (file, answer)


def test_the_exporter_tells_of_its_project(config_folder: Path) -> None:
    with running(
        built("monitoring"), 9109, "--volume", f"{config_folder}:/config:ro", "--env", "CVF_STORAGE=/tmp"
    ) as container:
        assert 'cvf_project_readable{project="tiny"} 1.0' in container.ask("/metrics").body.decode()


def test_mlflow_asks_for_a_login() -> None:
    login = base64.b64encode(b"admin:a password of tests").decode()
    secrets = ["MLFLOW_AUTH_ADMIN_PASSWORD=a password of tests", "MLFLOW_FLASK_SERVER_SECRET_KEY=a key for tests"]
    command = (*COMMANDS["mlflow"], "--app-name", "basic-auth")
    search = "/api/2.0/mlflow/experiments/search?max_results=1"
    with running(built("mlflow"), 5000, *(f"--env={secret}" for secret in secrets), command=command) as container:
        assert container.ask("/health").status == 200
        assert container.ask(search).status == 401
        assert json.loads(container.ask(search, Authorization=f"Basic {login}").body)["experiments"]
        assert container.run("python", "-c", "import boto3, psycopg2; print('there')") == "there\n"


def test_airflow_serves_and_parses_every_dag(home: Path) -> None:
    code = "import json; from airflow.dag_processing.dagbag import DagBag; bag = DagBag(); "
    code += "print(); print(json.dumps([sorted(bag.dags), bag.import_errors]))"
    writable = ["--tmpfs", "/opt/airflow"]
    command = ("sh", "-c", "airflow db migrate && exec airflow api-server --workers 1")
    with running(built("airflow"), 8080, *writable, command=command, seconds=500) as container:
        assert "3.3.2" in container.run("airflow", "version")
        dags, errors = json.loads(container.run("python", "-c", code).splitlines()[-1])
        assert errors == {}
        projects = [yaml.safe_load(path.read_text())["project"] for path in (ROOT / "configs").glob("*.yaml")]
        assert {f"{project}_training" for project in projects} <= set(dags)
        plugins = container.run("airflow", "plugins", "--output", "json")
        assert "cv_factory" in plugins


@pytest.fixture
def restricted_namespace(image: str) -> Iterator[tuple[Any, str]]:
    """The cluster's API and a namespace that refuses pods which the policy ``restricted`` forbids (from 1.23 on)."""
    if not LOAD_IMAGE:
        pytest.skip("set KUBECONFIG to a cluster and CVF_LOAD_IMAGE to the command that copies an image to it")
    from kubernetes import client, config

    config.load_kube_config()
    subprocess.run([*shlex.split(LOAD_IMAGE), image], check=True, capture_output=True)
    core, name = client.CoreV1Api(), f"cvf-images-{uuid.uuid4().hex[:8]}"
    core.create_namespace({"metadata": {"name": name, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}})
    until(lambda: any(account.metadata.name == "default" for account in core.list_namespaced_service_account(name).items))
    yield core, name
    core.delete_namespace(name)


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_a_pod_trains_under_the_restricted_policy(
    image: str, restricted_namespace: tuple[Any, str], project: Callable[..., Path]
) -> None:
    from cv_factory_airflow.manifest import PROJECT_FILE, manifest

    (core, namespace), file = restricted_namespace, project(**SCALE)
    pod = PodSettings(image=image, requests={"cpu": "100m", "memory": "256Mi"})
    runtime = KubernetesRuntime(pod=pod, namespace=namespace)
    stages = (f"cvf {stage} --config {PROJECT_FILE} --run /tmp/run" for stage in ("ingest", "preprocess", "train"))
    command = ["sh", "-c", " && ".join(stages)]
    owner = {"dag": "tiny_training", "run": "manual__1"}
    body = manifest(load(file), runtime, "train", "trainer", command, file.read_text(), owner)
    core.create_namespaced_pod(namespace, body)
    phase = until(lambda: _ended(core.read_namespaced_pod_status("trainer", namespace)), seconds=300)
    # Read raw: the client decodes a log to the text of a bytes literal.
    log = core.read_namespaced_pod_log("trainer", namespace, _preload_content=False).data.decode()
    assert phase == "Succeeded", log
    record = json.loads(next(line for line in log.splitlines() if line.startswith('{"stage":"train"')))["record"]
    assert "2 processes" in record["summary"]


def _ended(pod: Any) -> str | None:
    return pod.status.phase if pod.status.phase in {"Succeeded", "Failed"} else None
