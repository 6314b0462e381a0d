"""A finished first training of the tiny project, for tests of what comes after it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from cv_factory_ops.config import ProjectConfig, load
from tests.bundles import free_port
from tests.conftest import TINY


class Loop:
    """It lies in a home of its own; its endpoint stays up, see :func:`finished_loop`."""

    def __init__(self, home: Path, port: int, **sections: Any) -> None:
        self.home, self.path, self.run = home, home / "project.yaml", (home / "runs" / "first").as_uri()
        settings = {**TINY, **sections, "deploy": {"kind": "local", "url": f"http://127.0.0.1:{port}"}}
        self.path.write_text(yaml.safe_dump(settings))
        self.environment = {"CVF_HOME": str(home), "CVF_PSEUDONYM_KEY": "a key for tests"}

    @property
    def config(self) -> ProjectConfig:
        return load(self.path)

    def cvf(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cv_factory_ops.cli", *arguments]
        # MLflow itself leaves its address in the environment of a process that has logged a model.
        environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        return subprocess.run(command, env={**environment, **self.environment}, capture_output=True, text=True, timeout=600)


@contextmanager
def finished_loop(home: Path, **sections: Any) -> Iterator[Loop]:
    """All stages by ``cvf run``, onto a local endpoint of its own; ``sections`` replace those of the tiny project."""
    port, log = free_port(), home / "endpoint.log"
    command = [sys.executable, "-m", "cv_factory_ops.cli", "endpoint", "--state", str(home / "endpoint"), "--port", str(port)]
    with log.open("wb") as file:
        endpoint = subprocess.Popen([*command, "--files", str(home)], stdout=file, stderr=file)
    loop = Loop(home, port, **sections)
    try:
        done = loop.cvf("run", "--config", str(loop.path), "--run", loop.run)
        assert done.returncode == 0, done.stderr + log.read_text()
        yield loop
    finally:
        endpoint.terminate()
        endpoint.wait(30)
