"""A training from its data to a verified champion, by `cvf` alone: real MLflow (SQLite) and a real local endpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pytest

from cv_factory_ops import registry, storage
from cv_factory_ops.config import load
from cv_factory_ops.errors import DataError
from cv_factory_ops.evaluation.gate import judge
from cv_factory_ops.promotion import locked_test
from cv_factory_ops.records import Criterion, EvaluateRecord, GateRecord, PredictRecord, PromoteRecord, RegisterRecord
from cv_factory_ops.stage import TRAINING, read_result, run_stage
from tests.bundles import free_port
from tests.loop import Loop, finished_loop


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loop]:
    with finished_loop(tmp_path_factory.mktemp("loop")) as found:
        yield found


@pytest.fixture(autouse=True)
def in_its_home(loop: Loop, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in loop.environment.items():
        monkeypatch.setenv(name, value)


def reasons(criteria: list[Criterion]) -> list[str]:
    return [row.reason for row in criteria if row.passed is False]


def test_the_first_training_ends_with_version_1_as_champion(loop: Loop) -> None:
    champion = registry.champion(loop.config)
    registered = RegisterRecord.model_validate(read_result(loop.run, "register").record)
    assert champion is not None
    assert champion.version == registered.model_version == 1
    assert champion.bundle_digest == registered.bundle_digest
    version = registry.connect(loop.config).get_model_version("tiny", "1")
    assert {"bundle", "bundle_digest", "data_digest", "test_digest", "git_sha", "cvf.run"} <= set(version.tags)
    locked = json.loads(storage.read_bytes(locked_test(loop.config)))["digests"]
    manifest = pd.read_parquet(loop.home / "runs" / "first" / "ingest" / "manifest.parquet")
    assert set(locked) == set(manifest.loc[manifest["split"] == "test", "digest"])


def test_the_mlflow_run_holds_params_metrics_and_pictures(loop: Loop) -> None:
    client = registry.connect(loop.config)
    registered = RegisterRecord.model_validate(read_result(loop.run, "register").record)
    run = client.get_run(registered.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["training.epochs"] == "2"
    assert {"train_loss", "val_auc", "test_auc", "test_accuracy"} <= set(run.data.metrics)
    assert {item.path for item in client.list_artifacts(registered.mlflow_run_id, "evaluation")} == {
        *(f"evaluation/{card}.{kind}" for card in ("model_card", "data_card") for kind in ("md", "html")),
        *(f"evaluation/{name}.png" for name in ("learning_curves", "roc", "precision_recall", "confusion_matrix")),
        *(f"evaluation/{name}.png" for name in ("reliability", "errors", "explanations", "data")),
        "evaluation/subgroups.json",
    }


def test_repeating_any_stage_makes_no_second_version(loop: Loop) -> None:
    for name in ("register", "deploy", "verify", "promote"):
        run_stage(name, loop.config, loop.run, force=True)
    versions = registry.connect(loop.config).search_model_versions("name = 'tiny'")
    assert [int(version.version) for version in versions] == [1]
    promoted = PromoteRecord.model_validate(read_result(loop.run, "promote").record)
    assert promoted.previous_version is None


def test_a_challenger_is_compared_with_the_champion_on_the_same_images(loop: Loop) -> None:
    run = (loop.home / "runs" / "second").as_uri()
    config = load(loop.path, ["training.seed=5", "preprocessing.size=24"])
    for name in ("ingest", "preprocess", "train", "evaluate", "gate"):
        run_stage(name, config, run)
    evaluation = EvaluateRecord.model_validate(read_result(run, "evaluate").record)
    first = EvaluateRecord.model_validate(read_result(loop.run, "evaluate").record)
    assert evaluation.champion_version == 1
    assert evaluation.champion_metrics == pytest.approx(first.metrics)  # though the champion was prepared at another size
    verdict = GateRecord.model_validate(read_result(run, "gate").record)
    assert verdict.champion == first.metrics["auc"]
    assert verdict.difference_low is not None
    assert verdict.difference_high is not None
    assert verdict.difference_low <= verdict.challenger - verdict.champion <= verdict.difference_high


def test_a_refused_challenger_leaves_its_verdict_and_exit_code_4(loop: Loop) -> None:
    run = loop.home / "runs" / "refused"
    shutil.copytree(
        loop.home / "runs" / "first", run, ignore=lambda _, names: [n for n in names if n in {"gate", "checkpoints"}]
    )
    refused = loop.cvf("gate", "--config", str(loop.path), "--run", str(run), "--set", "gate.minimum=1.0")
    assert refused.returncode == 4
    assert "is below gate.minimum 1" in refused.stderr
    verdict = GateRecord.model_validate(read_result(run.as_uri(), "gate").record)
    assert verdict.verdict == "refused"
    assert (run / "gate" / "criteria.png").stat().st_size > 0
    again = loop.cvf("gate", "--config", str(loop.path), "--run", str(run), "--set", "gate.minimum=1.0")
    assert (again.returncode, "nothing has changed" in again.stderr) == (4, True), "the stored refusal is one as well"
    assert loop.cvf("register", "--config", str(loop.path), "--run", str(run)).returncode == 4


def test_another_test_set_is_refused(loop: Loop) -> None:
    record = EvaluateRecord.model_validate(read_result(loop.run, "evaluate").record)
    known = {"champion_version": 1, "champion_test_digest": "other", "champion_metrics": record.metrics}
    rival = record.model_copy(update=known)
    assert reasons(judge(rival, "this", (0.0, 0.1), loop.config.gate)) == [
        "the test set is not the one that the champion was judged on"
    ]
    worse = reasons(judge(rival, "other", (-0.3, 0.1), loop.config.gate.model_copy(update={"margin": 0.02})))
    assert len(worse) == 1
    assert "gate.margin is 0.02" in worse[0]


def test_changed_data_cannot_replace_the_locked_test_set(loop: Loop) -> None:
    changed = load(loop.path, ["data.source.seed=99"])
    with pytest.raises(DataError, match="locked test set are missing"):
        run_stage("ingest", changed, (loop.home / "runs" / "changed").as_uri())


def test_the_alias_stays_when_the_endpoint_serves_something_else(loop: Loop) -> None:
    run = loop.home / "runs" / "rolled_back"
    shutil.copytree(loop.home / "runs" / "first", run, ignore=lambda _, names: [name for name in names if name == "promote"])
    verified = run / "verify" / "result.json"
    result = json.loads(verified.read_text())
    result["record"]["bundle_digest"] = "0" * 64
    verified.write_text(json.dumps(result))
    failed = loop.cvf("promote", "--config", str(loop.path), "--run", str(run))
    assert failed.returncode == 3
    assert "the alias stays where it is" in failed.stderr


def test_a_batch_is_predicted_and_what_cannot_be_read_is_listed(loop: Loop, tmp_path: Path) -> None:
    source = next((loop.home / "var" / "storage" / "tiny" / "phantoms").glob("*/00000_0.dcm")).parent
    for path in sorted(source.glob("*.dcm"))[:5]:
        shutil.copy(path, tmp_path)
    (tmp_path / "cut.dcm").write_bytes((tmp_path / "00000_0.dcm").read_bytes()[:900])
    (tmp_path / "notes.txt").write_text("not a study")
    config = load(loop.path, [f"batch.path={tmp_path}"])
    record = PredictRecord.model_validate(run_stage("predict", config, (loop.home / "runs" / "batch").as_uri()).record)
    assert (record.predicted, record.quarantined) == (5, 2)
    lines = (loop.home / "runs" / "batch" / "predict" / "predictions.jsonl").read_text().splitlines()
    assert all(set(json.loads(line)["scores"]) == {"normal", "opacity"} for line in lines)
    assert len(lines) == 5


def test_the_gate_refuses_what_is_undefined(loop: Loop) -> None:
    record = EvaluateRecord.model_validate(read_result(loop.run, "evaluate").record)
    broken = record.model_copy(update={"metrics": {"accuracy": 1.0}, "champion_version": None})
    assert reasons(judge(broken, "t", None, loop.config.gate)) == ["auc is undefined on the test set"]
    run = loop.home / "runs" / "undefined"
    shutil.copytree(loop.home / "runs" / "first", run, ignore=lambda _, names: [name for name in names if name == "gate"])
    evaluated = run / "evaluate" / "result.json"
    result = json.loads(evaluated.read_text())
    del result["record"]["metrics"]["auc"]
    evaluated.write_text(json.dumps(result))
    refused = loop.cvf("gate", "--config", str(loop.path), "--run", str(run))
    assert refused.returncode == 4, refused.stderr
    assert "auc undefined" in GateRecord.model_validate(read_result(run.as_uri(), "gate").record).summary


def test_a_challenger_that_was_compared_with_an_older_champion_is_refused(loop: Loop) -> None:
    run = loop.home / "runs" / "overtaken"
    shutil.copytree(
        loop.home / "runs" / "first", run, ignore=lambda _, names: [n for n in names if n in {"register", "promote"}]
    )
    failed = loop.cvf("register", "--config", str(loop.path), "--run", str(run))
    assert failed.returncode == 4
    assert "champion is now version 1, the gate compared with none" in failed.stderr


def test_mlflow_models_serve_answers_like_the_endpoint(loop: Loop) -> None:
    registered = RegisterRecord.model_validate(read_result(loop.run, "register").record)
    source = registry.connect(loop.config).get_model_version("tiny", str(registered.model_version)).source
    port = free_port()
    command = [
        Path(sys.executable).with_name("mlflow"),
        "models",
        "serve",
        "-m",
        source,
        "-p",
        str(port),
        "--env-manager",
        "local",
    ]
    environment = {**os.environ, **loop.environment, "MLFLOW_TRACKING_URI": registry.tracking_uri(loop.config)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # as in an activated environment
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    image = np.tile(np.linspace(0, 1, 32, dtype=np.float32), (32, 1))
    try:
        _await(f"http://127.0.0.1:{port}/ping")
        body = {"inputs": [image.tolist()]}
        answer = httpx.post(f"http://127.0.0.1:{port}/invocations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        from cv_factory_ops.bundle import Bundle
        from cv_factory_ops.domain import Decoded, to_uint16
        from cv_factory_ops.predictor import Predictor

        predictor = Predictor(Bundle.load(storage.local(registered.bundle, loop.home)))
        [ours] = predictor.answer([Decoded(to_uint16(image))]).predictions
        assert answer.json()["predictions"][0]["score"] == pytest.approx(ours.score, abs=1e-5)
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


@pytest.mark.proof
def test_kill_9_of_any_stage_and_a_retry_end_with_one_run_and_one_version(loop: Loop) -> None:
    run = loop.home / "runs" / "killed"
    arguments = ["--config", str(loop.path), "--run", str(run), "--set", "training.seed=11"]
    for name in TRAINING:
        for delay in (0.4, 1.6):
            command = [sys.executable, "-m", "cv_factory_ops.cli", name, *arguments]
            process = subprocess.Popen(
                command, env={**os.environ, **loop.environment}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        done = loop.cvf(name, *arguments)
        assert done.returncode == 0, done.stderr
    client = registry.connect(loop.config)
    experiment = client.get_experiment_by_name("tiny").experiment_id
    runs = client.search_runs([experiment], f"tags.`{registry.RUN_TAG}` = '{run.as_uri()}'")
    versions = [v for v in client.search_model_versions("name = 'tiny'") if v.tags[registry.RUN_TAG] == run.as_uri()]
    champion = registry.champion(loop.config)
    assert len(runs) == len(versions) == 1
    assert champion is not None
    assert champion.version == int(versions[0].version)
    assert [item.name for item in run.iterdir() if item.name.endswith((".work", ".old"))] == []


def test_no_identity_leaves_the_studies_themselves(loop: Loop) -> None:
    kept = [path for path in loop.home.rglob("*") if path.is_file() and "phantoms" not in path.parts]
    identifying = (b"PHANTOM-", b"PHANTOM^", b"Phantom Street")
    assert len(kept) > 20
    assert [path for path in kept if any(word in path.read_bytes() for word in identifying)] == []
    manifest = pd.read_parquet(loop.home / "runs" / "first" / "ingest" / "manifest.parquet")
    assert manifest["patient"].str.fullmatch("[0-9a-f]{24}").all()


def _await(url: str, seconds: float = 90) -> None:
    import time

    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(url, timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.3)
    raise AssertionError(f"{url} does not answer")
