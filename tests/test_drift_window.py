"""What a drift check reads and shows: late files, crashes, bounded memory, scanners, performance, and the page."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from scipy.stats import binomtest, chisquare

from cv_factory_ops import captures, registry, storage
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import load
from cv_factory_ops.config.drift import DriftConfig
from cv_factory_ops.domain import open_domain
from cv_factory_ops.drift import examples
from cv_factory_ops.drift.detect import compare, judge
from cv_factory_ops.drift.subgroups import groups_of, with_groups
from cv_factory_ops.drift.window import Sample, Window, consume, read_cursor, read_window
from cv_factory_ops.errors import ConfigError, Unavailable
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.records import DriftRecord, TrainRecord
from cv_factory_ops.stage import read_result, run_stage
from tests.capture_lines import capture_line
from tests.conftest import TINY
from tests.drift import KINDS, Project, project_in, promote, quiet, table


@pytest.fixture
def project(request: pytest.FixtureRequest, tmp_path: Path, tracking_uri: str) -> Project:
    return project_in(tmp_path, request.node.name, tracking_uri)


def rows(count: int, seed: int = 1) -> list[dict[str, str | float | None]]:
    return quiet(np.random.default_rng(seed), count)


def test_a_file_that_arrives_behind_a_newer_one_is_read_once(project: Project) -> None:
    project.capture(rows(60), place="2026/03/01/10/b.jsonl")
    assert project.check("r1").requests == 60
    project.capture(rows(20), place="2026/03/01/10/a.jsonl")
    project.capture(rows(30), place="2026/03/01/05/z.jsonl")
    project.capture(rows(10), place="2026/03/01/10/c.jsonl")
    second = project.check("r2")
    assert second.requests == 60, "both late ones, five hours and less behind, and the new one"
    assert (second.window_start.partition("#")[0], second.window_end.partition("#")[0]) == (
        "2026/03/01/10/AllTraffic/b.jsonl",
        "2026/03/01/10/AllTraffic/c.jsonl",
    )
    assert project.check("r3").requests == 0


def test_a_file_that_is_later_than_declared_is_not_read(project: Project) -> None:
    project.capture(rows(60), place="2026/03/02/01/a.jsonl")
    project.check("r1")
    project.capture(rows(20), place="2026/03/01/18/late.jsonl")
    project.capture(rows(21), place="2026/03/01/19/in-time.jsonl")
    assert project.check("r2").requests == 21
    cursor = read_cursor(project.config)
    assert cursor
    assert (cursor.end.floor, set(cursor.end.read)) == ("2026/03/01/19", {"2026/03/02/01/AllTraffic/a.jsonl"})


def test_a_file_that_grows_is_read_from_where_it_ended(project: Project) -> None:
    project.capture(rows(60), place="2026/03/01/10/a.jsonl")
    project.check("r1")
    file = storage.path_of(f"{captures.folder(project.config)}/{project.config.endpoint_name}/AllTraffic/2026/03/01/10/a.jsonl")
    assert file
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines + lines[:7]))
    assert project.check("r2").requests == 7


def test_files_of_the_same_name_from_two_variants_both_count(project: Project) -> None:
    project.capture(rows(60), place="2026/03/01/10/a.jsonl")
    root = storage.path_of(f"{captures.folder(project.config)}/{project.config.endpoint_name}")
    assert root
    (root / "AllTraffic").rename(root / "blue")
    project.capture(rows(30), place="2026/03/01/10/a.jsonl")
    assert project.check("r1").requests == 90


def test_a_line_that_is_still_being_written_is_read_when_it_is_whole(project: Project) -> None:
    project.capture(rows(60), place="2026/03/01/10/a.jsonl")
    file = storage.path_of(f"{captures.folder(project.config)}/{project.config.endpoint_name}/AllTraffic/2026/03/01/10/a.jsonl")
    assert file
    lines = file.read_bytes()
    last = lines.splitlines(keepends=True)[-1]
    file.write_bytes(lines[:-100])
    first = project.check("r1")
    assert (first.requests, first.quality.quarantined) == (59, 0)
    file.write_bytes(lines + lines.rstrip())
    second = project.check("r2")
    assert (second.requests, second.quality.quarantined) == (61, 0), (
        "the one that was cut off too; the last, without end, is whole"
    )
    file.write_bytes(lines + lines + last)
    assert project.check("r3").requests == 1


def test_hours_that_are_none_and_clocks_that_are_wrong(project: Project, caplog: pytest.LogCaptureFixture) -> None:
    project.capture(rows(60), place="2026/02/31/10/a.jsonl")
    project.capture(rows(60), place="2026/03/01/10/a.jsonl")
    project.capture(rows(5), place="2099/01/01/00/a.jsonl")
    assert project.check("r1").requests == 65
    assert "AllTraffic/2026/02/31/10/a.jsonl: skipped" in caplog.text
    today = datetime.now(UTC).strftime("%Y/%m/%d/%H")
    project.capture(rows(60), place=f"{today}/b.jsonl")
    assert project.check("r2").requests == 60


@pytest.mark.parametrize("where", ["file", "s3"])
def test_of_two_checks_one_moves_the_cursor(project: Project, request: pytest.FixtureRequest, where: str) -> None:
    """Both have seen the same cursor, at the very moment before they move it."""
    if where == "s3":
        project.config = project.config.model_copy(update={"storage": f"s3://{request.getfixturevalue('bucket')}/p"})
    uri = f"{project.config.root}/drift/cursor.json"
    assert storage.create_bytes(uri, b"0")
    assert storage.replace_bytes(uri, b"0", b"1")
    assert not storage.replace_bytes(uri, b"0", b"2")
    assert storage.read_bytes(uri) == b"1"
    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: storage.replace_bytes(uri, b"1", f"from {i}".encode()), range(8)))
    assert sum(done) == 1
    assert storage.read_bytes(uri) == f"from {done.index(True)}".encode()


def test_captures_are_not_taken_over_from_a_check_that_finishes_after_all(project: Project) -> None:
    project.capture(rows(60), place="2026/03/01/10/a.jsonl")
    slow = project.stage("r1")
    consume(slow, read_window(slow, project.digest, KINDS))
    other = project.stage("r2")
    taken_over = read_window(other, project.digest, KINDS)
    assert taken_over.requests == 60
    assert project.check("r1").requests == 60
    with pytest.raises(Unavailable, match="another drift check has moved it"):
        consume(other, taken_over)
    assert project.check("r2").requests == 0


def test_a_verdict_after_not_enough_data_stands(project: Project) -> None:
    project.capture(rows(10), place="2026/03/01/10/a.jsonl")
    assert project.check("r1").verdict == project.check("r1").verdict == "not enough data"
    project.capture(rows(60), place="2026/03/01/10/b.jsonl")
    found = project.check("r1")
    assert (found.verdict, found.requests) == ("no drift", 70)
    result = project.out("r1") / "result.json"
    written = result.stat().st_mtime_ns
    assert project.check("r1") == found
    assert result.stat().st_mtime_ns == written, "it was not checked again"


@pytest.mark.parametrize("where", ["file", "s3"])
def test_a_killed_check_takes_the_same_window_again(project: Project, request: pytest.FixtureRequest, where: str) -> None:
    if where == "s3":
        project.config = project.config.model_copy(update={"storage": f"s3://{request.getfixturevalue('bucket')}/p"})
    project.capture(rows(60), place="2026/03/01/10/b.jsonl")
    stage = project.stage("r1")
    first = read_window(stage, project.digest, KINDS)
    consume(stage, first)  # and kill -9: nothing was published
    project.capture(rows(20), place="2026/03/01/10/a.jsonl")
    project.capture(rows(30), place="2026/03/01/10/c.jsonl")
    again = read_window(stage, project.digest, KINDS)
    assert (again.requests, again.settled, again.end) == (60, True, first.end)
    assert pd.DataFrame(again.rows).equals(pd.DataFrame(first.rows))
    assert read_window(project.stage("r2"), project.digest, KINDS).requests == 110, "unless it never comes back"
    assert project.check("r1").requests == 60
    assert project.check("r2").requests == 50
    assert project.check("r1", force=True).requests == 60


def test_what_was_published_without_a_verdict_does_not_count_as_finished(project: Project) -> None:
    """A check without enough data is published; its second try moves the cursor and is killed."""
    project.capture(rows(10), place="2026/03/01/10/a.jsonl")
    assert project.check("r1").verdict == "not enough data"
    project.capture(rows(60), place="2026/03/01/10/b.jsonl")
    stage = project.stage("r1")
    consume(stage, read_window(stage, project.digest, KINDS))
    assert project.check("r2").requests == 70


def test_the_sample_is_uniform_and_the_same_for_a_run() -> None:
    kept = np.zeros(200)
    for seed in range(300):
        sample = Sample(20, str(seed))
        for number in range(200):
            sample.offer({}, str(number), number)
        kept[[number for _, _, number in sample.rows]] += 1
    assert kept.sum() == 300 * 20
    assert chisquare(kept).pvalue > 1e-3
    once, again = Sample(20, "run"), Sample(20, "run")
    for sample in (once, again):
        for number in range(200):
            sample.offer({}, "", number)
    assert once.rows == again.rows


def test_counts_cover_all_and_memory_does_not_grow_with_them(project: Project) -> None:
    settings = project.config.drift.model_copy(update={"sample": 100})
    project.config = project.config.model_copy(update={"drift": settings})
    ordinary = [row | {"metadata_kvp": None} if i % 4 == 0 else row | {"metadata_kvp": 80.0} for i, row in enumerate(rows(200))]
    for number in range(3):
        project.capture(ordinary, place=f"2026/03/01/10/{number}.jsonl")
    few, _ = peak(project, "r1")
    for number in range(3, 15):
        project.capture(ordinary, place=f"2026/03/01/10/{number}.jsonl")
    many, window = peak(project, "r2")
    assert (window.requests, window.sample.offered, len(window.rows)) == (3000, 3000, 100)
    assert window.quality.missing == {"metadata_kvp": 0.25}
    assert many < 1.3 * few, f"{few} bytes for 600 captures, {many} for 3,000"


def peak(project: Project, run: str) -> tuple[int, Window]:
    tracemalloc.start()
    window = read_window(project.stage(run), project.digest, KINDS)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most, window


def test_captures_of_sagemaker_itself_are_read(project: Project) -> None:
    """As https://docs.aws.amazon.com/sagemaker/latest/dg/model-monitor-data-capture.html has them, with a JSON answer."""
    answer = {
        "predictions": [{"label": "a", "score": 0.1, "scores": {"a": 0.9, "b": 0.1}, "features": rows(1)[0]}],
        "bundle_digest": project.digest,
    }
    line = {
        "captureData": {
            "endpointInput": {
                "observedContentType": "application/dicom",
                "mode": "INPUT",
                "data": "AAEC",
                "encoding": "BASE64",
            },
            "endpointOutput": {
                "observedContentType": "application/json",
                "mode": "OUTPUT",
                "data": json.dumps(answer),
                "encoding": "JSON",
            },
        },
        "eventMetadata": {"eventId": "aaaaaaaa-bbbb", "inferenceTime": "2026-02-14T17:25:49Z"},
        "eventVersion": "0",
    }
    project.capture_lines([json.dumps(line)], "2026/02/14/17/25-49-127-1e35b0e2-6b0e-4b2d-9f8a-0b8f3a0f1c52.jsonl")
    window = read_window(project.stage("r1"), project.digest, KINDS)
    assert (window.requests, window.quarantined, window.unreadable) == (1, 0, 0)


def test_drift_of_one_scanner_is_found_and_told(project: Project) -> None:
    shifted = [
        row | {"image_sharpness": float(row["image_sharpness"] or 0) - 0.9} if row["metadata_manufacturer"] == "Beta" else row
        for row in rows(400)
    ]
    project.capture(shifted)
    record = project.check("r1")
    beta, alpha = (record.groups["manufacturer"][name] for name in ("Beta", "Alpha"))
    assert beta.p_values["image_sharpness"] < 1e-6 < 1e-2 < alpha.p_values["image_sharpness"]
    counts = pd.Series([row["metadata_manufacturer"] for row in shifted]).value_counts(normalize=True)
    assert beta.share == pytest.approx(counts["Beta"], abs=1e-6)
    assert record.groups["manufacturer"]["others"].p_values == {}, "too few to be tested"
    assert "Gamma" not in record.groups["manufacturer"], "too few in the reference to be told"
    assert any(name.partition(" @ ")[0] == "image_sharpness" for name in record.drifted)
    page = (project.out("r1") / "index.html").read_text()
    assert "image_sharpness, p = " in page
    assert "too few to be tested" in page


@pytest.mark.proof
def test_quiet_windows_with_groups_alarm_no_more_often_than_declared() -> None:
    alpha, windows, rng = 0.1, 200, np.random.default_rng(8)
    domain, settings, alarms, tested = open_domain("medical"), DriftConfig(), 0, 0
    for _ in range(windows):
        comparison = compare(table(quiet(rng, 80)), table(quiet(rng, 80)), KINDS, alpha)
        whole = with_groups(comparison, groups_of(comparison, domain, settings))
        tested += len(whole.kinds) - len(comparison.kinds)
        alarms += bool(judge(whole).drifted)
    assert tested > 4 * windows
    assert binomtest(alarms, windows, alpha, alternative="greater").pvalue > 0.01, f"{alarms} of {windows}"


def test_unknown_subgroups_are_refused(project: Project) -> None:
    settings = project.config.drift.model_copy(update={"subgroups": ["scanner"]})
    project.config = project.config.model_copy(update={"drift": settings})
    project.capture(rows(60))
    with pytest.raises(ConfigError, match=r"drift\.subgroups: 'scanner' given; allowed: modality, manufacturer"):
        project.check("r1")


def test_labels_that_arrive_after_their_window_measure_the_champion(project: Project) -> None:
    def measured(name: str) -> tuple[float, int] | None:
        found = [each for each in project.check(name).performance if each.metric == "accuracy" and not each.estimated]
        return (found[0].value, found[0].labelled) if found else None

    def label(window: int, answers: int, wrong: int) -> None:
        """Each was answered as 0.9 a."""
        names = [f"study-{window}-{i}" for i in range(answers)]
        captures.add_labels(project.config, {name: "b" if i < wrong else "a" for i, name in enumerate(names)})

    project.capture(rows(60), place="2026/03/01/10/0.jsonl")
    assert measured("r1") is None
    label(0, 20, wrong=10)
    project.capture(rows(60), place="2026/03/20/10/0.jsonl")
    label(1, 20, wrong=2)
    assert measured("r2") == (28 / 40, 40)
    label(0, 21, wrong=10)
    assert measured("r2") == (28 / 40, 40), "a verdict stands"
    project.capture(rows(60), place="2026/03/20/11/0.jsonl")
    assert measured("r3") == (pytest.approx(29 / 41), 41)
    project.capture(rows(60), place="2026/04/05/10/0.jsonl")
    assert measured("r4") == (18 / 20, 20), "the first window is too long ago"
    storage.delete_tree(f"{project.runs}/r3/drift")
    label(4, 30, wrong=0)
    project.capture(rows(60), place="2026/04/05/11/0.jsonl")
    assert measured("r5") == (1.0, 30), "behind a check that is gone nothing is known"


def test_late_labels_measure_the_champion(project: Project) -> None:
    project.capture(rows(60))  # each answered as 0.9 a
    captures.add_labels(project.config, {f"study-0-{i}": "b" if i < 15 else "a" for i in range(50)})
    captures.add_labels(project.config, {"never captured": "a", "study-0-59": "no label of this project"})
    record = project.check("r1")
    (accuracy,) = [found for found in record.performance if found.metric == "accuracy" and not found.estimated]
    assert (accuracy.value, accuracy.labelled) == (35 / 50, 50)
    assert accuracy.low < 0.7 < accuracy.high
    assert {found.metric for found in record.performance if found.estimated} == {
        "accuracy",
        "auc",
        "sensitivity",
        "specificity",
    }
    assert "measured on 50 labels" in (project.out("r1") / "index.html").read_text()


@dataclass
class Trained:
    """A champion that was trained, with requests that it has answered."""

    home: Path
    project: Project
    record: DriftRecord

    @property
    def page(self) -> str:
        return (self.project.out("check") / "index.html").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    home = tmp_path_factory.mktemp("trained")
    settings = TINY | {"calibration": {"abstain": 0.1}, "deidentification": {"pixels": "trust"}, "drift": {"minimum": 20}}
    (home / "project.yaml").write_text(yaml.safe_dump(settings))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(home))
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        config, run = load(home / "project.yaml"), (home / "run").as_uri()
        for name in ("ingest", "preprocess", "train", "evaluate"):
            run_stage(name, config, run)
        train = TrainRecord.model_validate(read_result(run, "train").record)
        bundle = Bundle.load(home / "run" / "train" / "bundle")
        promote(config, bundle, train.mlflow_run_id, run)
        project = Project(config, bundle.digest, (home / "runs").as_uri())
        ask(project, bundle, home / "new")
        yield Trained(home, project, project.check("check"))


def ask(project: Project, bundle: Bundle, folder: Path) -> None:
    """Answer new, de-identified studies, and label half of them."""
    config, domain, predictor = project.config, open_domain("medical"), Predictor(bundle)
    domain.generate(folder, patients=30, image_size=48, seed=99, labels=config.labels)
    lines, labels = [], dict(pd.read_csv(folder / "labels.csv").to_numpy())
    for file in sorted(labels):
        content = domain.deidentify((folder / file).read_bytes(), config.deidentification).content
        (study,) = domain.decode(content, config.decoding)
        lines.append(capture_line(file, content, predictor.answer([study]).model_dump_json().encode()))
    project.capture_lines(lines)
    captures.add_labels(config, dict(sorted(labels.items())[::2]))


@pytest.fixture
def in_its_home(trained: Trained, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVF_HOME", str(trained.home))


def test_answers_have_the_features_of_the_reference(trained: Trained) -> None:
    bundle = Bundle.load(trained.home / "run" / "train" / "bundle")
    kinds, window = bundle.manifest.features, pd.read_parquet(trained.project.out("check") / "features.parquet")
    assert set(window) == set(bundle.reference()) == set(kinds)
    assert {"image_noise", "image_saturated", "metadata_manufacturer", "embedding_0", "embedding_residual", "entropy"} <= set(
        kinds
    )
    assert kinds["abstained"] == "category"
    assert set(window["abstained"]) <= {"yes", "no"}
    assert (bundle.reference()["abstained"] == "yes").mean() == pytest.approx(0.1, abs=0.07)
    assert window["embedding_residual"].gt(0).all()
    assert not window.isna().any().any()


def test_the_residual_is_what_the_components_leave(trained: Trained) -> None:
    bundle = Bundle.load(trained.home / "run" / "train" / "bundle")
    pca, embedding = bundle.pca(), np.random.default_rng(0).random((5, 16), dtype=np.float32)
    projected = pca.transform(embedding)
    rest = embedding - pca.mean - projected @ pca.components
    assert pca.residual(embedding, projected) == pytest.approx(np.linalg.norm(rest, axis=1))


def test_labels_of_the_window_are_held_against_the_locked_test_set(trained: Trained, in_its_home: None) -> None:
    measured = {found.metric: found for found in trained.record.performance if not found.estimated}
    evaluation = read_result((trained.home / "run").as_uri(), "evaluate").record
    assert {found.labelled for found in measured.values()} == {22}
    for metric, found in measured.items():
        assert found.reference == pytest.approx(evaluation["metrics"][metric], abs=1e-6)
        assert found.reference_low == pytest.approx(evaluation["intervals"]["test"][metric][0], abs=1e-6)


def test_the_page_shows_everything_and_loads_nothing(trained: Trained) -> None:
    page = trained.page
    assert page.count('src="data:image/png;base64,') == 3
    assert "src=" not in page.replace('src="data:', "")
    for told in ("The clearest differences", "How well the champion answers", "manufacturer", "age years", "Data quality"):
        assert told in page
    assert "not shown" not in page
    assert page.count("<h2>") == 6


def test_no_identifier_is_on_the_page(trained: Trained) -> None:
    manifest = pd.read_parquet(trained.home / "run" / "ingest" / "manifest.parquet")
    names = [*manifest["patient"], *manifest["id"], *(path.name for path in (trained.home / "new").rglob("*.dcm"))]
    assert len(names) > 60
    assert not [name for name in names if name and name in trained.page]


def test_page_and_report_are_in_the_mlflow_run(trained: Trained, in_its_home: None) -> None:
    client = registry.connect(trained.project.config)
    run_id = TrainRecord.model_validate(read_result((trained.home / "run").as_uri(), "train").record).mlflow_run_id
    kept = {item.path for item in client.list_artifacts(run_id, "drift/check")}
    assert kept == {f"drift/check/{name}" for name in KEPT}


KEPT = ("index.html", "report.html", "report.json", "drift.png", "embedding.png", "examples.png")


def test_reference_images_are_those_of_the_rows(trained: Trained, in_its_home: None) -> None:
    """The mean intensity of each image shown is what the bundle's reference says of its row."""
    stage, model = trained.project.stage("check"), registry.champion(trained.project.config)
    bundle = Bundle.load(trained.home / "run" / "train" / "bundle")
    assert model
    shown = examples.of_reference(stage, model, bundle.reference()["image_mean"], 4)
    assert len(shown.images) == 4
    assert [image.mean() / 65535 for image in shown.images] == pytest.approx(shown.values, abs=1e-5)
    assert shown.values == sorted(shown.values)


def test_an_image_that_nobody_has_looked_at_is_not_shown(
    trained: Trained, in_its_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where text shall be looked for and the library that finds it is missing."""
    from domain_medical import burned_in

    stage = trained.project.stage("check")
    screened = stage.config.deidentification.model_copy(update={"pixels": "screen"})
    object.__setattr__(stage, "config", stage.config.model_copy(update={"deidentification": screened}))
    monkeypatch.setattr(burned_in, "can_screen", lambda: False)
    bundle = Bundle.load(trained.home / "run" / "train" / "bundle")
    window = read_window(stage, bundle.digest, bundle.manifest.features)
    shown = examples.of_window(stage, bundle, window, pd.DataFrame(window.rows)["image_mean"], 4)
    assert shown.images == []
    assert examples.reasons([shown]) == "4 not shown: should be looked at first: not_screened"


@pytest.mark.parametrize("kind", ["image/png", "application/json"])
def test_an_image_that_text_is_not_looked_for_in_is_not_shown(
    trained: Trained, in_its_home: None, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Text is looked for in studies alone."""
    content = BytesIO()
    if kind == "image/png":
        Image.new("L", (48, 48), 99).save(content, "PNG")
    else:
        content.write(json.dumps({"instances": [[[0.5] * 48] * 48]}).encode())
    capture = captures.Capture("", "", "", kind, content.getvalue(), b"")
    monkeypatch.setattr(captures, "at", lambda config, position: capture)
    stage, bundle = trained.project.stage("check"), Bundle.load(trained.home / "run" / "train" / "bundle")
    window = read_window(stage, bundle.digest, bundle.manifest.features)
    values = pd.DataFrame(window.rows)["image_mean"]
    assert len(examples.of_window(stage, bundle, window, values, 4).images) == 4, "where images are trusted"
    for pixels in ("screen", "declared"):
        settings = stage.config.deidentification.model_copy(update={"pixels": pixels})
        object.__setattr__(stage, "config", stage.config.model_copy(update={"deidentification": settings}))
        shown = examples.of_window(stage, bundle, window, values, 4)
        assert shown.images == []
        assert "not shown: only studies are looked through for text" in examples.reasons([shown])


def test_a_storage_that_does_not_answer_costs_a_picture_and_no_check(
    trained: Trained, in_its_home: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, bundle = trained.project.stage("check"), Bundle.load(trained.home / "run" / "train" / "bundle")
    window = read_window(stage, bundle.digest, bundle.manifest.features)

    def hiccup(config: object, position: str) -> None:
        raise Unavailable("s3://bucket/key: S3 answered SlowDown")

    monkeypatch.setattr(captures, "at", hiccup)
    shown = examples.of_window(stage, bundle, window, pd.DataFrame(window.rows)["image_mean"], 4)
    assert examples.reasons([shown]) == "4 not shown: its capture cannot be read any more"


def test_of_the_reference_only_the_images_that_are_shown_are_read(
    trained: Trained, in_its_home: None, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, model = trained.project.stage("check"), registry.champion(trained.project.config)
    assert model
    values = Bundle.load(trained.home / "run" / "train" / "bundle").reference()["image_mean"]
    there = examples.of_reference(stage, model, values, 4)
    storage.upload_tree(trained.home / "run" / "preprocess", f"s3://{bucket}/run/preprocess")
    monkeypatch.setattr(registry, "run_of", lambda config, version: f"s3://{bucket}/run")
    before = set(stage.workspace.rglob("*"))
    copied = examples.of_reference(stage, model, values, 4)
    assert [image.tolist() for image in copied.images] == [image.tolist() for image in there.images]
    assert set(stage.workspace.rglob("*")) == before, "nothing is left on the disk"


def test_without_example_images_the_page_has_none(project: Project) -> None:
    settings = project.config.drift.model_copy(update={"example_images": 0})
    project.config = project.config.model_copy(update={"drift": settings})
    project.capture(rows(60))
    project.check("r1")
    assert not (project.out("r1") / "examples.png").exists()
    assert "None: drift.example_images is 0." in (project.out("r1") / "index.html").read_text()


def test_requests_that_cannot_be_decoded_are_told_on_the_page(project: Project) -> None:
    project.capture(rows(60))  # their requests are no studies
    project.check("r1")
    assert "the champion&#39;s prepared images cannot be reached" in (project.out("r1") / "index.html").read_text()
