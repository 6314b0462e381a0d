"""After a rollout: golden studies are answered as the evaluation answered them, or the endpoint goes back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cv_factory_ops import captures, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.deploy import golden
from cv_factory_ops.deploy.local import stop
from cv_factory_ops.domain import open_domain
from cv_factory_ops.errors import DataError
from cv_factory_ops.evaluation.evaluate import predict_splits
from cv_factory_ops.ingestion.decode import decode_one, instances
from cv_factory_ops.ingestion.manifest import read_images, read_manifest
from cv_factory_ops.records import EvaluateRecord, RegisterRecord, Result
from cv_factory_ops.stage import Stage
from tests.bundles import free_port, write_bundle
from tests.records import put_judged
from tests.test_deploy import deploy, verify


def published(run: str, stage: str, record: RegisterRecord | EvaluateRecord) -> None:
    """A record as its stage would publish it."""
    result = Result(stage=stage, run=run, inputs_digest="", seconds=0, record=record.model_dump(mode="json"))
    storage.write_bytes(f"{run}/{stage}/result.json", result.model_dump_json().encode())


def evaluated(config: ProjectConfig, run: str, bundle: Bundle, shift: float = 0.0) -> Stage:
    """The run with the bundle registered, and with an evaluation of it whose probabilities are off by ``shift``."""
    folder = storage.path_of(run)
    assert folder is not None
    stage = Stage("evaluate", config, run, folder)
    table = predict_splits(stage, {"challenger": bundle})
    table[["challenger_0", "challenger_1"]] += [shift, -shift]
    (folder / "evaluate").mkdir(exist_ok=True)
    table.to_parquet(folder / "evaluate" / "predictions.parquet")
    numbers: dict[str, Any] = {f"{name}metrics": {} for name in ("", "champion_", "recent_", "champion_recent_")}
    no_champion = dict.fromkeys(("champion_version", "champion_test_digest", "champion_threshold"))
    uri = stage.uri("predictions.parquet")
    record = EvaluateRecord(summary="", predictions=uri, threshold=0.5, pictures=[], **numbers, **no_champion)
    published(run, "evaluate", record)
    register = RegisterRecord(
        summary="",
        model_name="tiny",
        model_version=1,
        mlflow_run_id="0",
        bundle=bundle.path.as_uri(),
        bundle_digest=bundle.digest,
    )
    published(run, "register", register)
    put_judged(run, bundle.path.as_uri(), bundle.digest)
    return stage


def with_steps(bundle: Bundle, steps: list[dict[str, Any]]) -> Bundle:
    """The same bundle with other preprocessing."""
    path = bundle.path / "bundle.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"preprocessing": manifest["preprocessing"] | {"steps": steps}}))
    return Bundle.load(bundle.path)


def test_golden_studies_decide_whether_a_rollout_stays(project: Callable[..., Path], run: str, home: Path) -> None:
    settings = {"kind": "local", "url": f"http://127.0.0.1:{free_port()}", "timeout": 90, "golden": {"studies": 5}}
    config = load(project(deploy=settings))
    good, bad = (write_bundle(home / name, seed) for seed, name in enumerate(("good", "bad")))
    try:
        evaluated(config, run, good)
        first = deploy(config, run)
        record = verify(config, run)
        assert record.golden_studies == 5
        assert record.largest_difference is not None
        assert record.largest_difference < 1e-5, "the server is the evaluation's own code, on the same pixels"

        evaluated(config, run, bad, shift=0.01)
        second = deploy(config, run)
        assert second.previous_config_name == first.endpoint_config_name
        reason = rf"golden study 1: .* the evaluation says .*; the endpoint was put back to {first.endpoint_config_name}"
        with pytest.raises(DataError, match=reason):
            verify(config, run)
        with pytest.raises(DataError, match=rf"silent rollback: .* serves endpoint config {first.endpoint_config_name}"):
            verify(config, run)

        assert list(captures.read(config)) == [], "drift checks leave golden studies out"
        tolerant = load(project(deploy=settings | {"golden": {"studies": 5, "tolerance": 0.02}}))
        deploy(tolerant, run)
        assert verify(tolerant, run).golden_studies == 5
    finally:
        stop(home / "var" / "endpoint")


def test_golden_studies_are_the_test_sets_own_pixels(project: Callable[..., Path], run: str, home: Path) -> None:
    """As PNG, and as JSON with the spacing where a step needs it: the container decodes what ingestion had decoded."""
    folder = storage.path_of(f"{run}/ingest")
    assert folder is not None
    manifest = read_manifest(folder)
    tests = set(manifest.loc[manifest["split"] == "test", "id"])
    pixels = {row_id: image.tobytes() for row_id, image in read_images(folder) if row_id in tests}
    steps = {"png": [], "json": [{"kind": "spacing", "mm": 1.0}], "cropped": [{"kind": "crop", "mm": 20}]}
    for name, chosen in steps.items():
        bundle = with_steps(write_bundle(home / name, 1), chosen)
        config = load(project(deploy={"kind": "local", "golden": {"studies": 6}}))
        stage = evaluated(config, run, bundle)
        studies = golden.studies(stage, name)
        assert golden.studies(stage, name) == studies, "kept, and the same"
        assert len({study.body for study in studies}) == 6
        for study in studies:
            if name == "png":
                decoded = decode_one(study.body, study.content_type, open_domain("medical"), config.decoding)
            else:
                [decoded] = instances(study.body, config.decoding)
                assert decoded.spacing in set(zip(manifest["row_spacing"], manifest["column_spacing"], strict=True))
            assert decoded.image.astype(np.uint16).tobytes() in pixels.values()
    content = storage.read_bytes(f"{config.root}/models/png/golden.npz")
    for patient in pd.unique(manifest["patient"]):
        assert str(patient).encode() not in content, "no pseudonym is sent"


def test_an_answer_is_held_against_every_probability() -> None:
    study = golden.Study(b"", "image/png", [0.25, 0.75])

    def answer(*scores: float) -> bytes:
        return json.dumps({"predictions": [{"scores": dict(zip("ab", scores, strict=False))}]}).encode()

    assert golden.require_answer(study, 1, answer(0.2495, 0.7505), ["a", "b"], 0.001) == pytest.approx(0.0005)
    for wrong in (answer(0.26, 0.74), answer(0.25), b"{}", b"no JSON", answer(float("nan"), 0.75)):
        with pytest.raises(DataError, match="golden study 1: "):
            golden.require_answer(study, 1, wrong, ["a", "b"], 0.001)


def test_without_an_evaluation_only_the_digest_counts(project: Callable[..., Path], home: Path) -> None:
    config = load(project())
    assert golden.studies(Stage("verify", config, (home / "runs" / "empty").as_uri(), home), "digest") == []
    assert not storage.exists(f"{config.root}/models/digest/golden.npz"), "a later run may have one"
