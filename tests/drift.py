"""A project with a promoted champion and captures as the endpoint writes them, for the tests of drift."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import Bundle, BundleManifest, Pca, missing_to_nan
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.data import DataConfig
from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.config.project import MlflowConfig
from cv_factory_ops.config.sources import NpzSource
from cv_factory_ops.domain import Kind
from cv_factory_ops.records import DriftRecord, Result
from cv_factory_ops.stage import Stage, run_stage
from tests.capture_lines import capture_line

KINDS: dict[str, Kind] = {
    "image_mean": "number",
    "image_sharpness": "number",
    "metadata_kvp": "number",
    "metadata_manufacturer": "category",
    "metadata_photometric": "category",
    "score": "number",
}


def quiet(rng: np.random.Generator, size: int) -> list[dict[str, str | float | None]]:
    """Features of ordinary studies."""
    return [
        {
            "image_mean": float(rng.normal(0.5, 0.1)),
            "image_sharpness": float(rng.normal(-4, 0.5)),
            "metadata_kvp": None if rng.random() < 0.1 else float(rng.choice([80.0, 110.0, 125.0])),
            "metadata_manufacturer": str(rng.choice(["Alpha", "Beta", "Gamma"], p=[0.6, 0.38, 0.02])),
            "metadata_photometric": "MONOCHROME2",
            "score": float(rng.beta(2, 5)),
        }
        for _ in range(size)
    ]


def table(rows: list[dict[str, str | float | None]]) -> pd.DataFrame:
    return pd.DataFrame([missing_to_nan(row, KINDS) for row in rows])


@dataclass
class Project:
    """A project with a promoted champion, and the hand that writes its captures."""

    config: ProjectConfig
    digest: str
    runs: str
    written: int = 0

    def capture(self, rows: list[dict[str, str | float | None]], digest: str = "", place: str = "") -> None:
        """One capture file, one line a request; ``place``: its hour and name."""
        predictions = [{"label": "a", "score": 0.1, "scores": {"a": 0.9, "b": 0.1}, "features": row} for row in rows]
        answers = [{"predictions": [prediction], "bundle_digest": digest or self.digest} for prediction in predictions]
        self.capture_answers([json.dumps(answer).encode() for answer in answers], place)

    def capture_answers(self, answers: list[bytes], place: str = "") -> None:
        lines = [capture_line(f"study-{self.written}-{i}", answer=answer) for i, answer in enumerate(answers)]
        self.capture_lines(lines, place)

    def capture_lines(self, lines: list[str], place: str = "") -> None:
        folder = f"{captures.folder(self.config)}/{self.config.endpoint_name}/AllTraffic"
        place = place or f"2026/03/01/10/{self.written:03d}.jsonl"
        storage.write_bytes(f"{folder}/{place}", ("\n".join(lines) + "\n").encode())
        self.written += 1

    def check(self, name: str, *, force: bool = False) -> DriftRecord:
        result: Result = run_stage("drift", self.config, f"{self.runs}/{name}", force=force)
        return DriftRecord.model_validate(result.record)

    def stage(self, name: str) -> Stage:
        path = storage.path_of(f"{self.runs}/{name}")
        assert path is not None
        return Stage("drift", self.config, path.as_uri(), path)

    def out(self, name: str) -> Path:
        path = storage.path_of(f"{self.runs}/{name}/drift")
        assert path is not None
        return path


def project_in(folder: Path, name: str, tracking_uri: str, **drift: Any) -> Project:
    """A new project below a folder, its champion's reference 150 ordinary studies."""
    config = ProjectConfig(
        project=f"{name.partition('[')[0].lower()[:30].rstrip('_')}_{storage.text_digest(str(folder))[:6]}",
        labels=["a", "b"],
        storage=str(folder / "storage"),
        data=DataConfig(source=NpzSource(path="none.npz")),
        mlflow=MlflowConfig(tracking_uri=tracking_uri),
        drift=DriftConfig(minimum=50, alpha=0.01, **drift),
    )
    bundle = write_bundle(folder / "bundle", table(quiet(np.random.default_rng(0), 150)))
    promote(config, bundle)
    return Project(config, bundle.digest, (folder / "runs").as_uri())


def write_bundle(path: Path, reference: pd.DataFrame) -> Bundle:
    from cv_factory_ops.models import build

    manifest = BundleManifest(
        project="test",
        domain="medical",
        labels=["a", "b"],
        model=SmallCnn(width=4),
        preprocessing=PreprocessingConfig(size=8),
        mean=0.5,
        std=0.2,
        threshold=0.5,
        features=KINDS,
        data_digest="",
        test_digest="",
        code_version="0",
        git_sha="",
    )
    return Bundle.write(path, manifest, build(SmallCnn(width=4), 2), Pca(np.zeros(16), np.eye(2, 16)), reference)


def promote(config: ProjectConfig, bundle: Bundle, run_id: str = "", run: str = "") -> None:
    """A registered version under the alias champion, tagged as the stage ``register`` tags it."""
    from cv_factory_ops.registry import RUN_TAG, connect

    client = connect(config)
    client.create_registered_model(config.project)
    tags = {"bundle": bundle.path.as_uri(), "bundle_digest": bundle.digest, "test_digest": "", RUN_TAG: run}
    version = client.create_model_version(config.project, bundle.path.as_uri(), run_id or None, tags)
    client.set_registered_model_alias(config.project, "champion", version.version)
