"""The stage ``evaluate`` on a real training: numbers, intervals, subgroups, pictures and cards, and what goes to MLflow."""

from __future__ import annotations

import base64
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve

from cv_factory_ops import registry
from cv_factory_ops.bundle import Bundle, BundleManifest, Pca
from cv_factory_ops.calibration import fit_temperature, operating_point, tempered
from cv_factory_ops.config import load
from cv_factory_ops.config.evaluation import CalibrationConfig, EvaluationConfig, SensitivityPoint
from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.domain import Decoded, open_domain, to_uint16
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.evaluation import cards, pictures
from cv_factory_ops.evaluation.bootstrap import Judged
from cv_factory_ops.evaluation.subgroups import subgroups
from cv_factory_ops.groups import group_of
from cv_factory_ops.models import build
from cv_factory_ops.predictor import Predictor, infer
from cv_factory_ops.preprocessing.shards import Images, open_split, read_rows
from cv_factory_ops.records import EvaluateRecord, IngestRecord, Result, Subgroup, TrainRecord
from cv_factory_ops.stage import read_result, run_stage
from cv_factory_ops.training.release import calibrate
from tests.bundles import IMAGE
from tests.bundles import write_bundle as write_tiny_bundle
from tests.conftest import TINY

INTENDED = "For *tests*.\n\nNot for <script>alert(1)</script> | people."


class Evaluated:
    """A run that was trained and evaluated, in a home of its own."""

    def __init__(self, home: Path) -> None:
        self.home, self.run, self.out = home, (home / "run").as_uri(), home / "run" / "evaluate"
        settings = {
            **TINY,
            "data": {"source": {"kind": "phantoms", "patients": 100, "image_size": 48, "seed": 3}},
            "splits": {"val": 0.25, "test": 0.4},
            "calibration": {"operating_point": {"kind": "sensitivity", "at_least": 0.8}, "abstain": 0.2},
            "evaluation": {"bootstrap": 200, "minimum": 12, "intended_use": INTENDED},
        }
        self.path = home / "project.yaml"
        self.path.write_text(yaml.safe_dump(settings))

    @property
    def record(self) -> EvaluateRecord:
        return EvaluateRecord.model_validate(read_result(self.run, "evaluate").record)

    @property
    def bundle(self) -> Bundle:
        return Bundle.load(self.home / "run" / "train" / "bundle")

    @property
    def predictions(self) -> pd.DataFrame:
        return pd.read_parquet(self.out / "predictions.parquet")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluated]:
    found = Evaluated(tmp_path_factory.mktemp("evaluated"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(found.home))
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for name in ("ingest", "preprocess", "train", "evaluate"):
            run_stage(name, load(found.path), found.run)
        yield found


@pytest.fixture(autouse=True)
def in_its_home(evaluated: Evaluated, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVF_HOME", str(evaluated.home))


def judged(classes: int, count: int = 300, skill: float = 1.5, seed: int = 0, **changes: Any) -> Judged:
    """Answers of a model that knows something; two images a patient."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    logits = generator.standard_normal((count, classes))
    logits[np.arange(count), labels] += skill
    shares = np.exp(logits)
    manifest = BundleManifest(
        project="made",
        domain="medical",
        labels=["normal", "opacity"] if classes == 2 else [f"finding {i}" for i in range(classes)],
        model=SmallCnn(),
        preprocessing=PreprocessingConfig(size=16),
        mean=0.5,
        std=0.25,
        threshold=0.4,
        features={},
        data_digest="",
        test_digest="",
        code_version="0",
        git_sha="",
    ).model_copy(update=changes)
    return Judged(labels, shares / shares.sum(1, keepdims=True), np.arange(count) // 2, manifest)


def test_the_record_says_what_scikit_learn_finds_in_the_predictions(evaluated: Evaluated) -> None:
    test, record = evaluated.predictions.query("split == 'test'"), evaluated.record
    labels, scores = test["label"], test["challenger_1"].astype(float)
    answers = (scores >= evaluated.bundle.manifest.threshold).astype(int)
    assert record.metrics["auc"] == pytest.approx(reference.roc_auc_score(labels, scores), abs=1e-6)
    assert record.metrics["auprc"] == pytest.approx(reference.average_precision_score(labels, scores), abs=1e-6)
    assert record.metrics["accuracy"] == pytest.approx(reference.accuracy_score(labels, answers), abs=1e-6)
    assert record.metrics["sensitivity"] == pytest.approx(reference.recall_score(labels, answers), abs=1e-6)
    assert record.metrics["brier"] == pytest.approx(reference.brier_score_loss(labels, scores), abs=1e-6)
    for name, (low, high) in record.intervals["test"].items():
        assert low <= high
        assert name == "ece" or low <= record.metrics[name] <= high
    assert set(record.intervals["test"]) == set(record.metrics)


def test_the_mlflow_run_holds_metrics_intervals_pictures_and_cards(evaluated: Evaluated) -> None:
    client, record = registry.connect(load(evaluated.path)), evaluated.record
    run = client.get_run(TrainRecord.model_validate(read_result(evaluated.run, "train").record).mlflow_run_id)
    assert run.info.status == "FINISHED"
    for name, value in record.metrics.items():
        assert run.data.metrics[f"test_{name}"] == value
        assert (run.data.metrics[f"test_{name}_low"], run.data.metrics[f"test_{name}_high"]) == record.intervals["test"][name]
    logged = {item.path.removeprefix("evaluation/") for item in client.list_artifacts(run.info.run_id, "evaluation")}
    drawn = {uri.rsplit("/", 1)[1] for uri in record.pictures}
    written = {"model_card.md", "model_card.html", "data_card.md", "data_card.html", "subgroups.json"}
    assert logged == drawn | written
    assert (
        json.loads((evaluated.out / "subgroups.json").read_text())["sex"]["F"]["images"] == record.subgroups["sex"]["F"].images
    )


def test_what_was_chosen_on_validation_is_in_the_bundle_and_fits_validation_alone(evaluated: Evaluated) -> None:
    manifest, shards = evaluated.bundle.manifest, evaluated.home / "run" / "preprocess"
    labels = read_rows(shards, "val")["label"].to_numpy()
    plain, _ = infer(evaluated.bundle.network(), open_split(shards, "val"))
    calibrated, _ = infer(evaluated.bundle.network(), open_split(shards, "val"), temperature=manifest.temperature)
    assert manifest.temperature == pytest.approx(fit_temperature(labels, plain), rel=1e-4)
    losses = [reference.log_loss(labels, (p / p.sum(1, keepdims=True, dtype=float))) for p in (calibrated, plain)]
    assert losses[0] < losses[1]
    assert reference.recall_score(labels, calibrated[:, 1] >= manifest.threshold) >= 0.8
    sure = np.abs(np.log(calibrated[:, 1] / calibrated[:, 0]) - np.log(manifest.threshold / (1 - manifest.threshold)))
    withheld = sure < np.log(manifest.abstention / (1 - manifest.abstention))
    assert withheld.mean() == pytest.approx(0.2, abs=0.05)


def test_predictor_reference_and_evaluation_give_the_same_probabilities(evaluated: Evaluated) -> None:
    shards, predictor = evaluated.home / "run" / "preprocess", Predictor(evaluated.bundle)
    assert evaluated.bundle.manifest.temperature != 1
    test = evaluated.predictions.query("split == 'test'")
    probabilities, _ = predictor.forward(open_split(shards, "test")[:])
    assert np.array_equal(probabilities[:, 1], test["challenger_1"].to_numpy(np.float32))
    val = read_rows(shards, "val")
    first = np.flatnonzero(~val["patient"].duplicated())
    scores = predictor.forward(open_split(shards, "val")[first])[0][:, 1]
    assert np.allclose(evaluated.bundle.reference()["score"], scores, atol=2e-6)
    study = next((evaluated.home / "var" / "storage" / "tiny" / "phantoms").glob(f"*/{test['id'].iloc[0]}"))
    (decoded,) = open_domain("medical").decode(study.read_bytes(), evaluated.bundle.manifest.decoding)
    answer = predictor.answer([decoded]).predictions[0]
    assert answer.score == pytest.approx(test["challenger_1"].iloc[0], abs=1e-5)


def test_an_answer_near_the_threshold_is_marked_as_abstained(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle", seed=1)
    score = Predictor(bundle).answer([Decoded(to_uint16(IMAGE))]).predictions[0].score
    near, far = score + 0.01, 0.5 * score
    for threshold, abstained in ((near, True), (far, False)):
        manifest = bundle.manifest.model_copy(update={"threshold": threshold, "abstention": 0.55})
        answer = Predictor(Bundle(bundle.path, manifest)).answer([Decoded(to_uint16(IMAGE))]).predictions[0]
        assert answer.abstained is abstained
        assert answer.label == ("opacity" if score >= threshold else "normal")
    assert not Predictor(bundle).answer([Decoded(to_uint16(IMAGE))]).predictions[0].abstained


def test_each_choice_is_made_with_those_before_it_in_use() -> None:
    made = judged(2, skill=1.0)
    sharp = tempered(made.probabilities, 0.4)
    config = CalibrationConfig(operating_point=SensitivityPoint(at_least=0.9), abstain=0.1)
    temperature, threshold, abstention = calibrate(made.labels, sharp, config)
    calibrated = tempered(sharp, temperature)
    assert temperature > 2
    assert threshold == operating_point(made.labels, calibrated, config.operating_point)
    assert 0.5 < abstention < 0.7
    assert calibrate(made.labels, sharp, CalibrationConfig(temperature=False))[0] == 1.0
    assert calibrate(*_three(), CalibrationConfig())[1:] == (0.5, 0.0)


def _three() -> tuple[Any, Any]:
    made = judged(3)
    return made.labels, made.probabilities


def test_subgroups_are_counted_and_measured_alone(evaluated: Evaluated) -> None:
    test, found = evaluated.predictions.query("split == 'test'"), evaluated.record.subgroups
    assert list(found) == ["sex", "age_years", "manufacturer", "model_name", "view_position"]
    for name, groups in found.items():
        assert sum(group.images for group in groups.values()) == len(test), name
    women = test[test["meta_sex"] == "F"]
    assert found["sex"]["F"].patients == women["patient"].nunique()
    assert found["sex"]["F"].metrics["auc"] == pytest.approx(
        reference.roc_auc_score(women["label"], women["challenger_1"]), abs=1e-6
    )
    old = test[test["meta_age_years"] >= 65]
    assert found["age_years"]["65+"].images == len(old)
    sizes = {group.patients: group for groups in found.values() for group in groups.values()}
    assert all(bool(group.metrics) == (patients >= 12) for patients, group in sizes.items())
    low, high = found["sex"]["F"].intervals["auc"]
    assert high - low > evaluated.record.intervals["test"]["auc"][1] - evaluated.record.intervals["test"]["auc"][0]


def test_small_rare_and_unknown_groups_are_told_apart() -> None:
    ages = pd.Series([0.5, 17.9, 18, 39.9, 40, 65, 89, np.nan, -1])
    bands = {"0-17": 0, "18-39": 18, "40-64": 40, "65+": 65}
    expected = ["0-17", "0-17", "18-39", "18-39", "40-64", "65+", "65+", "not known", "not known"]
    assert group_of(ages, bands).tolist() == expected
    makers = [f"maker {i}" for i in range(9)]
    names = pd.Series([maker for i, maker in enumerate(makers) for _ in range(30 - i)] + [None] * 4)
    made = judged(2, count=len(names))
    found = subgroups(made, pd.DataFrame({"meta_manufacturer": names}), open_domain("medical"), EvaluationConfig(minimum=12))
    assert list(found) == ["manufacturer"]
    assert list(found["manufacturer"]) == [*makers[:8], "others", "not known"]
    assert found["manufacturer"]["not known"] == Subgroup(images=4, patients=2)
    assert "auc" in found["manufacturer"]["maker 0"].intervals


def test_unknown_subgroups_are_refused_with_what_is_allowed(evaluated: Evaluated) -> None:
    config = EvaluationConfig(subgroups=["sex", "kvp"])
    with pytest.raises(ConfigError, match=r"evaluation.subgroups: 'kvp' given; allowed: modality, .*, age_years"):
        subgroups(judged(2), pd.DataFrame(), open_domain("medical"), config)
    with pytest.raises(ConfigError, match=r"calibration.operating_point.kind: 'recall' given; allowed: 'youden', 'sensi"):
        load(evaluated.path, ["calibration.operating_point={kind: recall}"])


def test_every_picture_is_a_png_that_shows_something(evaluated: Evaluated) -> None:
    names = [uri.rsplit("/", 1)[1] for uri in evaluated.record.pictures]
    expected = ["learning_curves", "roc", "precision_recall", "confusion_matrix", "reliability", "errors", "data", "subgroups"]
    assert [name.removesuffix(".png") for name in names if name.removesuffix(".png") in expected] == expected
    for name in names:
        image = imread(evaluated.out / name)
        assert min(image.shape[:2]) > 200
        assert image[..., :3].std() > 0.05, name


@pytest.mark.parametrize("classes", [2, 3, 26])
def test_pictures_are_drawn_for_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    config, made = EvaluationConfig(bootstrap=100), judged(classes, temperature=1.7)
    images = Images([np.random.default_rng(0).integers(0, 65535, (len(made), 8, 8, 3)).astype(np.uint16)])
    rows = pd.DataFrame({"split": "train", "label": made.labels})
    rows.loc[:9, ["split", "label"]] = "unlabelled", -1
    names = made.manifest.labels
    figures = [
        pictures.roc({"challenger": made, "champion": judged(classes, skill=0.5)}, config),
        pictures.precision_recall({"challenger": made}, config),
        pictures.confusion(made),
        pictures.reliability(made, config),
        pictures.errors(made, images),
        pictures.data(rows, names, {name: images[np.arange(i, i + 2)] for i, name in enumerate(names[:4])}),
        pictures.forest(Subgroup(images=9, patients=9, metrics=made.metrics, intervals=made.intervals(config)), {}, 0.95),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png", dpi=40)
        assert imread(tmp_path / f"{i}.png")[..., :3].std() > 0.01


def test_curves_and_their_numbers_are_those_of_scikit_learn() -> None:
    made = judged(2)
    drawn = pictures.roc({"challenger": made}, EvaluationConfig(bootstrap=100)).axes[0]
    false_rate, true_rate, _ = reference.roc_curve(made.labels, made.probabilities[:, 1], drop_intermediate=False)
    line = next(line for line in drawn.lines if str(line.get_label()).startswith("challenger"))
    assert np.allclose(line.get_xdata(), false_rate)
    assert np.allclose(line.get_ydata(), true_rate)
    area = reference.roc_auc_score(made.labels, made.probabilities[:, 1])
    assert str(line.get_label()).startswith(f"challenger: AUC {area:.3f} (")
    (band,) = drawn.collections
    reached = band.get_paths()[0].vertices
    assert reached[:, 1].min() >= 0
    assert reached[:, 1].max() <= 1


def test_the_reliability_diagram_is_that_of_scikit_learn_before_and_after() -> None:
    made = judged(2, temperature=2.0)
    axes = pictures.reliability(made, EvaluationConfig(bootstrap=100)).axes[0]
    before, after = axes.lines[1:]
    sharper = made.probabilities**2
    sharper /= sharper.sum(1, keepdims=True)
    for line, scores in ((before, sharper), (after, made.probabilities)):
        shares, places = calibration_curve(made.labels, scores[:, 1], n_bins=10)
        assert np.allclose(line.get_xdata(), places)
        assert np.allclose(line.get_ydata(), shares)
    assert str(after.get_label()) == f"at temperature 2.00, calibration error {made.metrics['ece']:.3f}"


def test_the_gallery_begins_with_the_worst_error_and_names_no_image(evaluated: Evaluated) -> None:
    made = judged(3)
    images = Images([np.zeros((len(made), 8, 8), np.uint16)])
    axes = pictures.errors(made, images).axes
    of_truth = made.probabilities[np.arange(len(made)), made.labels]
    worst = int(of_truth.argmin())
    first = axes[0].get_title(loc="left")
    assert first == (
        f"1. truth: finding {made.labels[worst]}, {of_truth[worst]:.2g}\nanswer: finding {made.probabilities[worst].argmax()}"
    )
    assert len(axes) == 12


def test_an_epoch_that_was_repeated_is_drawn_once_and_the_kept_one_is_marked() -> None:
    history = {"train_loss": {1: 0.9, 3: 0.4, 2: 0.5}, "val_auc": {1: 0.6, 2: 0.8, 3: 0.7}}
    loss, auc = pictures.learning_curves(history, best_epoch=2).axes
    assert loss.lines[0].get_xdata().tolist() == [1, 2, 3]
    assert auc.lines[0].get_ydata().tolist() == [0.6, 0.8, 0.7]
    assert auc.lines[1].get_xdata() == [2, 2]


def test_subgroups_are_drawn_where_they_lie_and_red_where_they_are_worse() -> None:
    everything = Subgroup(images=90, patients=60, metrics={"auc": 0.9}, intervals={"auc": (0.85, 0.95)})
    worse = Subgroup(images=30, patients=20, metrics={"auc": 0.7}, intervals={"auc": (0.6, 0.8)})
    small = Subgroup(images=3, patients=2)
    figure = pictures.forest(everything, {"sex": {"F": everything, "M": worse, "O": small}}, 0.95)
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all (90 images)", "sex", "F (90)", "M (30)"]
    points = {(float(line.get_xdata()[0]), line.get_color()) for line in axes.lines if line.get_marker() == "o"}
    assert points == {(0.9, "0.2"), (0.7, pictures.COLOURS[1])}


def test_cards_name_no_one(evaluated: Evaluated) -> None:
    manifest = pd.read_parquet(evaluated.home / "run" / "ingest" / "manifest.parquet")
    names = {name for column in ("id", "patient", "study", "instance", "digest") for name in manifest[column] if name}
    assert len(names) > 300
    for card in cards.NAMES:
        page = re.sub(r'src="data:[^"]*"', "", (evaluated.out / f"{card}.html").read_text())
        for text in (page, (evaluated.out / f"{card}.md").read_text()):
            assert [name for name in names if name in text] == []


def test_pages_are_self_contained_and_escape_what_they_are_given(evaluated: Evaluated) -> None:
    for card in cards.NAMES:
        page = (evaluated.out / f"{card}.html").read_text()
        embedded = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)
        assert len(embedded) == page.count("<img")
        drawn = {path.read_bytes() for path in evaluated.out.glob("*.png")}
        galleries = {(evaluated.out / name).read_bytes() for name in cards.GALLERIES}
        shown = {base64.b64decode(image) for image in embedded}
        assert shown == (set() if card == "data_card" else drawn - galleries)  # no image of a patient leaves with a card
        assert "<script" not in page
        assert re.findall(r'(?:src|href)="(?!data:)', page) == []
    page = (evaluated.out / "model_card.html").read_text()
    assert "For <em>tests</em>." in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; | people." in page


def test_the_model_card_tells_numbers_limits_and_digests(evaluated: Evaluated) -> None:
    text, record = (evaluated.out / "model_card.md").read_text(), evaluated.record
    low, high = record.intervals["test"]["auc"]
    assert f"| AUROC | {record.metrics['auc']:.3f} ({low:.3f} to {high:.3f}) |" in text
    assert evaluated.bundle.digest in text
    train = TrainRecord.model_validate(read_result(evaluated.run, "train").record)
    assert train.mlflow_run_id in text
    counts = pd.read_parquet(evaluated.home / "run" / "ingest" / "manifest.parquet").query("split == 'test'")
    by_label = counts["label"].value_counts()
    assert f"| `test` | {len(counts)} | {counts['patient'].nunique()} | {by_label[0]} | {by_label[1]} |" in text
    small = [
        f"{name.replace('_', ' ')} {value} ({group.patients})"
        for name, groups in record.subgroups.items()
        for value, group in groups.items()
        if not group.metrics
    ]
    assert small
    assert f"Too few patients for numbers: {', '.join(small)}." in text
    assert "chosen by `sensitivity` (at least 0.8)" in text
    assert "No newly captured studies have been measured" in text


def test_settings_and_names_are_plain_text_in_a_card() -> None:
    assert cards._settings(SmallCnn(width=8)) == "`small_cnn` (width 8, dropout 0.1)"
    told = cards.html(f"| a |\n| --- |\n| {cards._plain('<b> | *x* _y_ & [z](q)')} |\n", Path(), [])
    assert html.unescape(re.findall("<td>(.*?)</td>", told)[0]) == "<b> | *x* _y_ & [z](q)"


def test_three_labels_a_champion_and_no_metadata_are_evaluated_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bundles of random weights, of which one becomes the champion."""
    monkeypatch.setenv("CVF_HOME", str(home))
    images = np.random.default_rng(0).integers(0, 255, (90, 20, 20)).astype(np.uint8)
    splits = {"train": slice(0, 30), "val": slice(30, 60), "test": slice(60, 90)}
    arrays = {f"{split}_images": images[rows] for split, rows in splits.items()}
    arrays |= {f"{split}_labels": np.arange(30)[:, None] % 3 for split in splits}
    np.savez(home / "data.npz", **arrays)
    settings = {**TINY, "labels": ["a|b", "c*d", "e"], "data": {"source": {"kind": "npz", "path": str(home / "data.npz")}}}
    settings |= {"preprocessing": {"size": 16}, "evaluation": {"bootstrap": 100}}
    (home / "project.yaml").write_text(yaml.safe_dump(settings))
    config, run = load(home / "project.yaml"), (home / "run").as_uri()
    for name in ("ingest", "preprocess"):
        run_stage(name, config, run)
    bundle = _random_bundle(home / "run" / "train" / "bundle", config.labels)
    client = registry.connect(config)
    run_id = registry.open_run(client, config, run)
    for name in ("train_loss", "val_auc"):
        client.log_metric(run_id, name, 0.5, step=1)
    _publish_training(home / "run" / "train", bundle, run, run_id)
    tags = {"bundle": bundle.path.as_uri(), "bundle_digest": bundle.digest, "test_digest": "t"}
    client.create_registered_model("tiny")
    version = client.create_model_version("tiny", bundle.path.as_uri(), run_id, tags)
    client.set_registered_model_alias("tiny", "champion", version.version)
    record = EvaluateRecord.model_validate(run_stage("evaluate", config, run).record)
    test = pd.read_parquet(home / "run" / "evaluate" / "predictions.parquet")
    scores = test[[f"challenger_{i}" for i in range(3)]].to_numpy()
    expected = reference.roc_auc_score(test["label"], scores, multi_class="ovr")
    assert record.metrics["auc"] == pytest.approx(expected, abs=1e-6)
    assert (record.champion_version, record.champion_metrics) == (1, record.metrics)
    assert record.subgroups == {}
    assert not (home / "run" / "evaluate" / "subgroups.png").exists()
    page = (home / "run" / "evaluate" / "model_card.html").read_text()
    assert "<th>a|b</th>" in page
    assert "one of a|b, c*d, e for an image" in page
    assert "30 images say no patient" not in page
    assert "90 images say no patient" in page
    assert "<th>champion on it</th>" in page


def _random_bundle(path: Path, labels: list[str]) -> Bundle:
    manifest = judged(2, labels=labels, threshold=0.5, temperature=2.0).manifest
    network = build(manifest.model, 3, manifest.mean, manifest.std)
    return Bundle.write(path, manifest, network, Pca(np.zeros(64), np.eye(2, 64)), pd.DataFrame({"score": [0.5]}))


def _publish_training(folder: Path, bundle: Bundle, run: str, run_id: str) -> None:
    record = TrainRecord(
        summary="",
        bundle=bundle.path.as_uri(),
        bundle_digest=bundle.digest,
        mlflow_run_id=run_id,
        epochs=1,
        best_epoch=1,
        val_auc=0.5,
        images_per_second=1.0,
        world_size=1,
    )
    result = Result(stage="train", run=run, inputs_digest="", seconds=0.0, record=record.model_dump())
    (folder / "result.json").write_text(result.model_dump_json())


@pytest.mark.parametrize(
    ("counted", "told"),
    [
        ({}, "9 images are captured requests"),  # a record of before they were counted
        ({"late_labels": 9, "pseudo_labels": 0}, "9 images are captured requests (9 have late labels)"),
        ({"late_labels": 4, "pseudo_labels": 0}, "9 images are captured requests (4 have late labels, 5 no label)"),
    ],
)
def test_the_data_card_says_of_captures_what_was_counted(counted: dict[str, int], told: str) -> None:
    numbers = {"accepted": 9, "quarantined": 0, "to_review": 0, "captured": 9}
    record = IngestRecord(summary="", splits={}, quarantine_reasons={}, data_digest="", test_digest="", **numbers, **counted)
    assert cards._captured(record) == told
