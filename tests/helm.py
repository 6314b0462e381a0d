"""The helm binary and what it makes of the chart."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

CHART = Path(__file__).parents[1] / "helm" / "cv-factory"


def helm_binary() -> str:
    """Path of helm; without it the test skips."""
    found = os.environ.get("HELM") or shutil.which("helm")
    if not found:
        pytest.skip("helm is not there: https://helm.sh/docs/intro/install; or set HELM to its path")
    return found


def helm(*arguments: str) -> str:
    """What ``helm`` prints; it must end well."""
    ended = subprocess.run([helm_binary(), *arguments], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, f"helm {arguments[0]}: {ended.stderr}{ended.stdout}"
    return ended.stdout


def refusal(*arguments: str) -> str:
    """What ``helm`` prints to standard error where it must not end well."""
    ended = subprocess.run([helm_binary(), *arguments], capture_output=True, text=True, timeout=600)
    assert ended.returncode != 0, ended.stdout
    return ended.stderr


def objects(manifest: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The objects of a release ``cvf`` by kind and name, without the release's and the chart's name before it."""
    items = [item for item in yaml.safe_load_all(manifest) if item]
    return {(item["kind"], item["metadata"]["name"].removeprefix("cvf-cv-factory").lstrip("-")): item for item in items}


def rendered(values: Path, *arguments: str) -> dict[tuple[str, str], dict[str, Any]]:
    """What the chart makes of values."""
    return objects(helm("template", "cvf", str(CHART), "--namespace", "cv", "--values", str(values), *arguments))
