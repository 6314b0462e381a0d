"""Detection: boxes from their annotations to a bundle's answers; mean average precision against pycocotools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from numpy.typing import NDArray
from starlette.testclient import TestClient

from cv_factory_ops import detection
from cv_factory_ops.answers import Answer, DetectedPrediction
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.config.evaluation import EvaluationConfig, GateConfig
from cv_factory_ops.config.explanations import GradCam
from cv_factory_ops.config.models import RetinaNet
from cv_factory_ops.config.preprocessing import CropStep, PadStep, PreprocessingConfig, ResizeStep, SpacingStep, Step
from cv_factory_ops.config.training import AugmentConfig, FineTuning, TrainingConfig
from cv_factory_ops.deploy import golden
from cv_factory_ops.detection import Found, Matched, anchors, candidates, matched, mean_average_precision, suppressed
from cv_factory_ops.domain import Decoded
from cv_factory_ops.engine import open_engine
from cv_factory_ops.errors import ConfigError, DataError
from cv_factory_ops.evaluation.detection import JudgedBoxes
from cv_factory_ops.evaluation.gate import difference_interval, differences
from cv_factory_ops.explainer import Explainer
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.ingestion.manifest import Boxes, as_boxes, read_manifest
from cv_factory_ops.models import Detector, build, freeze, stages
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing import shards
from cv_factory_ops.preprocessing.geometry import Geometry
from cv_factory_ops.preprocessing.preprocess import PREPARED
from cv_factory_ops.records import EvaluateRecord, GateRecord, RegisterRecord, Result, TrainRecord
from cv_factory_ops.serving.app import create_app
from cv_factory_ops.serving.settings import ServingSettings
from cv_factory_ops.stage import Stage, read_result, run_stage
from cv_factory_ops.training.data import Shard, augment_with_boxes, stacked
from cv_factory_ops.training.objectives import Detection, open_objective
from cv_factory_ops.training.validation import MapOfBoxes
from domain_medical import DOMAIN

FINDINGS: dict[str, Any] = {
    "project": "findings",
    "task": "detection",
    "labels": ["normal", "opacity"],
    "data": {"source": {"kind": "phantoms", "patients": 56, "image_size": 64, "seed": 3}},
    "splits": {"val": 0.25, "test": 0.2},
    "preprocessing": {"size": 32, "steps": [{"kind": "pad", "pixels": 68}]},
    "model": {"kind": "retinanet", "depth": 10, "width": 8, "anchors": [3, 6, 12]},
    "training": {
        "epochs": 28,
        "batch_size": 4,
        "processes_per_node": 2,
        "learning_rate": 0.005,
        "augment": {"shift": 0, "intensity": 0},
    },
    "evaluation": {"minimum": 2, "bootstrap": 100},
    "gate": {"metric": "map", "minimum": 0.02, "bootstrap": 100},
}
TINY = RetinaNet(depth=10, width=8, anchors=(4, 8, 16))
STILL = AugmentConfig(flip=False, shift=0, intensity=0)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks as small as these wait for threads more than they calculate."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def boxes(*rows: Sequence[float]) -> Boxes:
    return np.array(rows, np.float64).reshape(len(rows), -1) if rows else np.empty((0, 5))


# --- the network and what it learns from ---


@pytest.mark.parametrize("config", [TINY, RetinaNet(depth=50, width=8, small_input=False)])
def test_a_retinanet_answers_at_each_anchor_and_its_stages_hold_all_weights(config: RetinaNet) -> None:
    torch.manual_seed(0)
    network = build(config, 3, 0.4, 0.2).eval()
    outputs, embedding = network(torch.rand(2, 1, 64, 64))
    squares = anchors(config, 64)
    assert isinstance(network, Detector)
    assert outputs.shape == (2, len(squares), 4 + 2)
    assert detection.size_of(config, len(squares)) == 64
    assert embedding.shape == (2, network.features)
    assert float(outputs.detach()[..., 4:].sigmoid().mean()) == pytest.approx(0.01, abs=0.005), "at first nothing is found"
    owned = [id(weight) for stage in stages(network).values() for part in stage for weight in part.parameters()]
    assert sorted(owned) == sorted(id(weight) for weight in network.parameters())
    freeze(network, FineTuning(frozen=2))
    frozen = [name for name, stage in stages(network).items() if not next(stage[0].parameters()).requires_grad]
    assert frozen == ["stem", "layer1"]


def test_anchors_are_in_the_order_of_the_outputs() -> None:
    torch.manual_seed(1)
    network, squares, images = build(TINY, 2).eval(), anchors(TINY, 32), torch.rand(1, 1, 32, 32)
    with torch.inference_mode():
        outputs, maps = network(images)[0], network.backbone(images / network.std)[0]
        begin = 0
        for stride, side, features in zip(TINY.strides, TINY.anchors, maps, strict=True):
            logits = network.head.logits.cls_logits(network.head.logits.conv(features))  # type: ignore[union-attr, operator]
            count = 32 // stride
            assert logits.shape == (1, 1, count, count)
            row, column = count - 1, count // 4
            at = begin + row * count + column
            assert outputs[0, at, 4] == pytest.approx(float(logits[0, 0, row, column]), abs=1e-5)
            middle = (column + 0.5) * stride, (row + 0.5) * stride
            assert squares[at].tolist() == [*(each - side / 2 for each in middle), *(each + side / 2 for each in middle)]
            begin += count**2


def test_outputs_are_read_as_monai_writes_them() -> None:
    from monai.apps.detection.utils.box_coder import BoxCoder

    squares, truth = anchors(TINY, 32), np.array([[3.5, 4.25, 15, 20], [10, 2, 18, 9]], np.float32)
    chosen = [40, len(squares) - 4]
    output = np.full((len(squares), 6), -9, np.float32)
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    output[chosen, :4] = coder.encode_single(torch.from_numpy(truth), torch.from_numpy(squares[chosen])).numpy()
    output[chosen, 4:] = [[2, -9], [-9, 3]]
    found = candidates(output, squares, 32)
    assert found[:, 0].tolist() == [2, 1]
    assert found[:, 1:5] == pytest.approx(truth[::-1], abs=1e-4)
    assert found[:, 5] == pytest.approx([0.952574, 0.880797], abs=1e-6)


def test_overlapping_boxes_go_as_by_monai() -> None:
    from monai.data.box_utils import non_max_suppression

    generator = np.random.default_rng(2)
    low = generator.uniform(0, 40, (80, 2))
    corners = np.concatenate([low, low + generator.uniform(5, 25, (80, 2))], 1)
    scores = np.sort(generator.uniform(0.1, 1, 80))[::-1]
    found = np.concatenate([np.ones((80, 1)), corners, scores[:, None]], 1)
    for overlap in detection.OVERLAPS:
        expected = np.asarray(non_max_suppression(corners, scores.copy(), overlap))
        assert np.array_equal(suppressed(found, overlap), found[expected])
    found[::2, 0] = 2
    apart = np.concatenate([suppressed(found[found[:, 0] == number], 0.3) for number in (1, 2)])
    together = suppressed(found, 0.3)
    assert np.array_equal(together, apart[np.argsort(-apart[:, 5], kind="stable")])


def test_a_batch_without_boxes_teaches_all_weights() -> None:
    """DDP would wait for those that it does not reach."""
    torch.manual_seed(3)
    network = build(TINY, 2)
    objective = open_objective(TrainingConfig(augment=STILL), network, None, None)
    assert isinstance(objective, Detection)
    objective.loss(network, torch.rand(2, 1, 32, 32), torch.zeros(2, 1, 5)).backward()  # type: ignore[no-untyped-call]
    assert all(weight.grad is not None and bool(weight.grad.isfinite().all()) for weight in network.parameters())


def test_the_loss_falls_where_answers_are_right() -> None:
    torch.manual_seed(4)
    network = build(TINY, 2)
    objective = open_objective(TrainingConfig(augment=STILL), network, None, None)
    images, truth = torch.zeros(2, 1, 32, 32), torch.from_numpy(stacked([boxes([1, 8, 10, 18, 20]), boxes()]))
    images[0, 0, 10:20, 8:18] = 1
    optimizer, losses = torch.optim.Adam(network.parameters(), 0.01), []
    for _ in range(25):
        loss = objective.loss(network, images, truth)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3
    validation = MapOfBoxes(TINY, 2)
    rows = validation.rows(network(images)[0].detach(), truth)
    assert rows.shape == (2, validation.columns)
    assert validation.score(np.array([1, 0]), rows.numpy()) > 0.3
    broken = network(images)[0].detach()
    broken[1, 7, 2] = torch.nan
    assert validation.rows(broken, truth).isnan().any(1).tolist() == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        AugmentConfig(shift=0.2, intensity=0),
        AugmentConfig(flip=False, shift=0, zoom=0.6, intensity=0),
        AugmentConfig(shift=0.1, zoom=0.3, rotate=180, intensity=0),
    ],
)
def test_augmentation_moves_image_and_boxes_together(change: AugmentConfig) -> None:
    torch.manual_seed(5)
    images, truth = torch.zeros(24, 1, 60, 60), torch.tensor([1.0, 20, 25, 32, 37]).repeat(24, 2, 1)
    truth[:, 1] = 0
    y, x = np.ogrid[:60, :60]
    disc = torch.from_numpy((x - 25.5) ** 2 + (y - 30.5) ** 2 <= 36)
    images[:, 0] = disc.float()
    moved, with_them = augment_with_boxes(images, truth, change)
    assert not torch.equal(with_them[:, 0], truth[:, 0])
    assert (with_them[:, 1, 0] == 0).all(), "a row that is none stays none"
    for image, (number, left, top, right, bottom) in zip(moved[:, 0], with_them[:, 0].tolist(), strict=True):
        rows, columns = np.nonzero(image.numpy() > 0.5)
        shown = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert number == 1
        if change.rotate:  # the box around the turned box is up to the root of 2 as wide
            assert (left + right, top + bottom) == pytest.approx((shown[0] + shown[2], shown[1] + shown[3]), abs=2)
            assert shown[2] - shown[0] - 1.5 <= right - left <= 1.5 * (shown[2] - shown[0])
        else:
            assert [left, top, right, bottom] == pytest.approx(shown, abs=1)


def test_a_box_that_moves_out_is_none() -> None:
    torch.manual_seed(6)
    truth = torch.tensor([2.0, 0, 0, 6, 6]).repeat(64, 1, 1)
    moved = augment_with_boxes(torch.zeros(64, 1, 40, 40), truth, AugmentConfig(flip=False, shift=0.3, intensity=0))[1]
    assert set(moved[:, 0, 0].tolist()) == {0, 2}
    assert (moved[..., 1:] >= 0).all()
    kept = moved[moved[..., 0] > 0]
    assert (kept[:, 3:] > kept[:, 1:3]).all()


# --- where boxes lie ---


@pytest.mark.parametrize(
    "steps",
    [
        [PadStep()],
        [SpacingStep(mm=1.3), CropStep(mm=60), PadStep(pixels=90)],
        [ResizeStep(pixels=61, side="longer"), PadStep(mm=100), CropStep(pixels=57)],
    ],
)
def test_boxes_go_where_their_image_goes_and_back(steps: list[Step]) -> None:
    geometry = Geometry.of((110, 70), PreprocessingConfig(size=64, steps=steps), (0.7, 1.1))
    mask = np.zeros((110, 70), np.uint8)
    mask[40:70, 20:45] = 1
    truth = boxes([1, 20, 40, 45, 70])
    moved = geometry.prepare_boxes(truth)
    rows, columns = np.nonzero(geometry.prepare(mask))
    assert moved[0, 1:] == pytest.approx([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], abs=1)
    assert geometry.restore_boxes(moved) == pytest.approx(truth)


def test_a_box_that_is_cropped_away_goes_and_one_in_padding_is_not_answered() -> None:
    geometry = Geometry.of((60, 20), PreprocessingConfig(size=20, steps=[CropStep(pixels=40), PadStep(pixels=40)]))
    shown = geometry.prepare_boxes(boxes([1, 2, 0, 8, 9], [2, 2, 5, 8, 25], [1, 0, 20, 20, 30]))
    assert shown.tolist() == [[2, 6, 0, 9, 7.5], [1, 5, 5, 15, 10]], "one above, one cut"
    answered = geometry.restore_boxes(boxes([1, 0, 0, 4, 4, 0.9], [2, 4, 0, 6, 2, 0.8]))
    assert answered.tolist() == [[2, 0, 10, 2, 14, 0.8]]


# --- measures ---


def random_images(seed: int, count: int = 30, classes: int = 4) -> tuple[list[Boxes], list[Found]]:
    """True boxes, of which images may have none, and guesses around them and anywhere; some scores are equal."""
    generator, truths, found = np.random.default_rng(seed), list[Boxes](), list[Found]()
    for _ in range(count):
        number = int(generator.integers(0, 4))
        low = generator.integers(0, 60, (number, 2)).astype(float)
        sides = generator.integers(8, 30, (number, 2))
        kinds = generator.integers(1, classes, (number, 1)).astype(float)
        truths.append(np.concatenate([kinds, low, low + sides], 1))
        near = np.repeat(truths[-1], 3, 0)
        near[:, 1:] += generator.integers(-5, 6, (len(near), 4))
        low = generator.integers(0, 60, (3, 2)).astype(float)
        anywhere = np.concatenate([generator.integers(1, classes, (3, 1)), low, low + generator.integers(8, 30, (3, 2))], 1)
        guesses = np.concatenate([near, anywhere])
        guesses = guesses[(guesses[:, 3:] > guesses[:, 1:3]).all(1)]
        scores = np.sort(generator.choice(np.linspace(0.05, 1, 400), len(guesses), replace=False))[::-1]
        guesses = guesses[generator.permutation(len(guesses))]
        found.append(np.concatenate([guesses, scores[:, None]], 1))
    return truths, found


def by_pycocotools(truths: Sequence[Boxes], found: Sequence[Found], classes: int) -> dict[str, float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def of_coco(image: int, row: NDArray[np.float64]) -> dict[str, Any]:
        left, top, right, bottom = row[1:5].tolist()
        return {"image_id": image, "category_id": int(row[0]), "bbox": [left, top, right - left, bottom - top]}

    truth = COCO()
    annotations = [of_coco(image, row) for image, rows in enumerate(truths, 1) for row in rows]
    for number, each in enumerate(annotations, 1):
        each |= {"id": number, "area": each["bbox"][2] * each["bbox"][3], "iscrowd": 0}
    images = [{"id": image} for image in range(1, len(truths) + 1)]
    truth.dataset = {"images": images, "annotations": annotations, "categories": [{"id": c} for c in range(1, classes)]}
    truth.createIndex()
    guesses = [of_coco(image, row) | {"score": row[5]} for image, rows in enumerate(found, 1) for row in rows]
    evaluation = COCOeval(truth, truth.loadRes(guesses), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # thresholds, recalls, classes
    of_classes = {f"map_{c}": precision[:, :, c - 1] for c in range(1, classes)}
    values = {"map": precision, "map50": precision[0], **of_classes}
    return {name: float(each[each > -1].mean()) if (each > -1).any() else np.nan for name, each in values.items()}


@pytest.mark.parametrize("seed", range(4))
def test_mean_average_precision_is_that_of_pycocotools(seed: int) -> None:
    truths, found = random_images(seed)
    if seed == 3:
        truths = [rows[rows[:, 0] != 2] for rows in truths]  # a class without a true box counts for nothing
    images = [matched(truth, guesses, 4) for truth, guesses in zip(truths, found, strict=True)]
    ours = mean_average_precision(images, 4, np.ones((1, len(images))))
    assert {name: value[0] for name, value in ours.items()} == pytest.approx(by_pycocotools(truths, found, 4), nan_ok=True)


def test_a_sample_that_counts_images_twice_or_not_is_one_of_so_many_images() -> None:
    truths, found = random_images(7, 12)
    weights = np.random.default_rng(8).integers(0, 3, (3, 12))
    images = [matched(truth, guesses, 4) for truth, guesses in zip(truths, found, strict=True)]
    ours = mean_average_precision(images, 4, weights.astype(float))
    for sample, often in enumerate(weights):
        drawn = np.repeat(np.arange(12), often)
        expected = by_pycocotools([truths[i] for i in drawn], [found[i] for i in drawn], 4)
        assert {name: value[sample] for name, value in ours.items()} == pytest.approx(expected, nan_ok=True, abs=1e-9)


def test_nothing_true_is_undefined_and_nothing_found_is_zero() -> None:
    nothing, one = np.empty((0, 6)), boxes([1, 0, 0, 9, 9])
    empty = mean_average_precision([matched(boxes(), nothing, 2)], 2, np.ones((1, 1)))
    assert np.isnan([value[0] for value in empty.values()]).all()
    missed = mean_average_precision([matched(one, nothing, 2)], 2, np.ones((1, 1)))
    assert {name: value[0] for name, value in missed.items()} == {"map": 0, "map50": 0, "map_1": 0}


def test_ranks_exchange_matches_as_rows() -> None:
    truths, found = random_images(9, 5)
    images = [matched(truth, guesses, 4) for truth, guesses in zip(truths, found, strict=True)]
    back = [detection.from_row(row, 4) for row in detection.rows_of(images)]
    ours, theirs = (mean_average_precision(each, 4, np.ones((1, 5))) for each in (images, back))
    assert {name: value[0] for name, value in theirs.items()} == pytest.approx(
        {k: v[0] for k, v in ours.items()}, abs=1e-6, nan_ok=True
    )


def test_overlap_and_threshold_are_the_best_of_validation() -> None:
    truth = boxes([1, 0, 0, 10, 10], [1, 0, 6, 10, 16])  # share 4 of 16 rows
    found = np.array([[1, 0, 0, 10, 10, 0.9], [1, 0, 6, 10, 16, 0.8], [1, 40, 40, 50, 50, 0.3], [1, 0, 1, 10, 11, 0.2]])
    assert detection.chosen_overlap([truth], [found], 2) == 0.5, "of equal ones"
    shifted = np.array([[1, 0, 0, 10, 10, 0.9], [1, 0, 3, 10, 13, 0.8], [1, 0, 6, 10, 16, 0.7]])
    assert detection.chosen_overlap([truth], [shifted], 2) == 0.5
    assert len(suppressed(shifted, 0.5)) == 2
    hits = np.array([[True] * 10, [True] * 10, [False] * 10, [False] * 10])
    images = [Matched(np.ones(4, int), found[:, 5], hits, np.array([2]))]
    assert detection.chosen_threshold(images, 2) == pytest.approx(0.8)
    assert detection.chosen_threshold([Matched(np.ones(4, int), found[:, 5], ~hits & False, np.array([2]))], 2) == 0.5


def table() -> pd.DataFrame:
    """Five images of four patients; the challenger finds all, the champion misses the first patient's."""
    truth = [[1.0, 5, 5, 20, 20], [1.0, 8, 8, 30, 20], [2.0, 1, 1, 9, 12], [], [2.0, 3, 4, 15, 16]]
    right = [[*row, 0.9] if row else [] for row in truth]
    return pd.DataFrame(
        {
            "id": list("abcde"),
            "patient": ["p", "p", "q", "r", "s"],
            "label": [1, 1, 2, 0, 2],
            "boxes": truth,
            "challenger_boxes": right,
            "champion_boxes": [[], [], *right[2:]],
        }
    )


def test_metrics_have_intervals_over_patients_and_the_gate_compares_on_the_same_ones(findings: Findings) -> None:
    manifest = findings.bundle.manifest.model_copy(update={"labels": ["none", "nodule/left", "mass"]})
    judged = JudgedBoxes.of(table(), "champion", manifest)
    assert judged.metrics == {"map": 0.5, "map50": 0.5, "map_nodule_left": 0, "map_mass": 1}
    assert judged.only(np.array([False, False, True, True, True])).metrics == {"map": 1, "map50": 1, "map_mass": 1}
    assert judged.intervals(EvaluationConfig(bootstrap=100))["map"] == (0.5, 0.5)
    assert judged.mistakes.tolist() == [1, 1, 0, 0, 0]
    record = EvaluateRecord.model_construct(threshold=0.5, champion_threshold=0.5)
    config = GateConfig(metric="map", bootstrap=100)
    assert differences(table(), record, config, np.ones((1, 5))) == pytest.approx([0.5])
    assert difference_interval(table(), record, config) == (0.5, 0.5)


# --- configuration ---


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"kind": "unet"}}, "model.kind: retinanet where task is detection"),
        ({"task": "classification", "gate": {}}, "model.kind: another than retinanet where task is classification"),
        ({"gate": {"metric": "dice"}}, "gate.metric: map where task is detection"),
        ({"gate": {"metric": "map", "sensitivity": 0.5}}, "gate.sensitivity and gate.specificity: 0"),
        ({"gate": {"metric": "map", "calibration_error": 0.1}}, "gate.calibration_error: 1"),
        ({"data": {"source": {"kind": "npz", "path": "x.npz"}}}, "data.source.kind: files or phantoms"),
        ({"data": {"source": {"kind": "files", "path": "x"}}}, "data.source.boxes: annotations"),
        ({"data": {**FINDINGS["data"], "include_captures": True}}, "data.include_captures: false"),
        ({"training": {"objective": {"kind": "contrastive"}}}, "training.objective: supervised or fine_tuning"),
        ({"training": {"augment": {"mixup": 0.2}}}, "without mixup and cutmix"),
        ({"training": {"augment": {"cutmix": 0.2}}}, "without mixup and cutmix"),
        ({"training": {"class_weights": True}}, "training.class_weights: false"),
        ({"training": {"label_smoothing": 0.1}}, "training.label_smoothing: 0"),
        ({"calibration": {"abstain": 0.1}}, "calibration.abstain: 0"),
        ({"preprocessing": {"size": 36}}, "preprocessing.size 36: a multiple of 8 for model.kind retinanet"),
        ({"preprocessing": {"size": 8}}, "preprocessing.size 8: at least 16 for model.kind retinanet"),
        ({"search": {"trials": 2, "space": {"training.learning_rate": {"kind": "choice", "values": [0.1, 0.2]}}}}, "no search"),
        ({"model": {"kind": "retinanet", "anchors": [4, 8, -1]}}, "model.retinanet.anchors.2: -1 given"),
    ],
)
def test_what_a_detection_cannot_be_is_one_line(home: Path, sections: dict[str, Any], expected: str) -> None:
    (home / "project.yaml").write_text(yaml.safe_dump({**FINDINGS, **sections}))
    with pytest.raises(ConfigError) as refused:
        load(home / "project.yaml")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


# --- sources ---


def files_project(home: Path, **source: Any) -> ProjectConfig:
    data = {"source": {"kind": "files", "path": "images", **source}, "max_quarantined": 0.9}
    labels = {"labels": ["none", "nodule", "mass"], "splits": {"val": 0.3, "test": 0.3}}
    (home / "files.yaml").write_text(yaml.safe_dump({**FINDINGS, "data": data, **labels}))
    return load(home / "files.yaml")


def write_images(home: Path, names: Sequence[str]) -> None:
    (home / "images").mkdir(exist_ok=True)
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).integers(0, 256, (30, 40)).astype(np.uint8)
        (home / "images" / name).write_bytes(cv2.imencode(".png", noise)[1].tobytes())


def coco(images: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    categories = [{"id": 7, "name": "nodule"}, {"id": 3, "name": "mass"}, {"id": 9, "name": "tube"}]
    listed = [{"id": number, "file_name": name} for number, name in enumerate(images)]
    annotations = [{"image_id": number, **each} for number, name in enumerate(images) for each in images[name]]
    return {"images": listed, "annotations": annotations, "categories": categories}


NODULE = {"category_id": 7, "bbox": [4, 5, 10, 8]}
MASS = {"category_id": 3, "bbox": [10.5, 12, 20, 17.5]}


def test_boxes_are_read_from_coco_and_bad_ones_are_refused_with_a_reason(home: Path) -> None:
    nan, infinite = float("nan"), float("inf")
    good: dict[str, list[dict[str, Any]]] = {f"{i}.png": [NODULE, MASS] for i in range(8)}
    good["negative.png"] = []
    good["rounded.png"] = [{"category_id": 7, "bbox": [-0.3, 0, 40.4, 30]}]
    bad = {
        "outside.png": ({"category_id": 7, "bbox": [35, 5, 10, 8]}, "box_outside"),
        "before.png": ({"category_id": 7, "bbox": [-4, 5, 10, 8]}, "box_outside"),
        "flat.png": ({"category_id": 7, "bbox": [4, 5, 0, 8]}, "box_shape"),
        "inverted.png": ({"category_id": 7, "bbox": [4, 5, 10, -8]}, "box_shape"),
        "nan.png": ({"category_id": 7, "bbox": [4, nan, 10, 8]}, "box_shape"),
        "infinite.png": ({"category_id": 7, "bbox": [4, 5, infinite, 8]}, "box_shape"),
        "short.png": ({"category_id": 7, "bbox": [4, 5, 10]}, "box_shape"),
        "words.png": ({"category_id": 7, "bbox": ["4", 5, 10, 8]}, "box_shape"),
        "tube.png": ({"category_id": 9, "bbox": [4, 5, 10, 8]}, "box_category"),
        "unnamed.png": ({"category_id": 1, "bbox": [4, 5, 10, 8]}, "box_category"),
        "crowd.png": ({**NODULE, "iscrowd": 1}, "box_crowd"),
    }
    images = {**good, **{name: [NODULE, each] for name, (each, _) in bad.items()}}
    write_images(home, [*images, "strange.png"])
    (home / "images" / "boxes.json").write_text(json.dumps(coco({**images, "gone.png": []})))
    (home / "table.csv").write_text("file,patient\n" + "".join(f"{name},P{i}\n" for i, name in enumerate(good)))
    config = files_project(home, boxes="images/boxes.json", labels="table.csv")
    run_stage("ingest", config, (home / "run").as_uri())
    lines = (home / "run" / "ingest" / "quarantine.jsonl").read_text().splitlines()
    refused = {each["item"]: each for each in map(json.loads, lines)}
    expected = {name: code for name, (_, code) in bad.items()}
    expected |= {"strange.png": "boxes_missing", "gone.png": "label_without_image"}
    assert {name: each["code"] for name, each in refused.items()} == expected
    assert refused["outside.png"]["reason"] == "has a box from 35, 5 to 45, 13, which reaches beyond its 40 x 30 pixels"
    manifest = read_manifest(home / "run" / "ingest").set_index("id")
    assert set(manifest.index) == set(good)
    found = dict(zip(manifest.index, as_boxes(manifest["boxes"]), strict=True))
    assert found["0.png"].tolist() == [[1, 4, 5, 14, 13], [2, 10.5, 12, 30.5, 29.5]]
    assert found["negative.png"].shape == (0, 5)
    assert found["rounded.png"].tolist() == [[1, 0, 0, 40, 30]]
    assert (manifest.loc["0.png", "label"], manifest.loc["negative.png", "label"]) == (2, 0), "that of the largest box"
    assert (manifest["patient"] != "").all()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[]", "is not JSON in the format of COCO"),
        ("{", "is not JSON in the format of COCO"),
        (json.dumps({"images": [], "annotations": []}), "is not JSON in the format of COCO"),
        (json.dumps(coco({"a.png": [{"category_id": 7}]})), r"annotations\[0\]: is not in the format"),
        (json.dumps({**coco({}), "annotations": [{**NODULE, "image_id": 4}]}), r"annotations\[0\]: .* not listed"),
        (json.dumps({**coco({}), "images": [{"id": 1, "file_name": "a"}] * 2}), r"images\[1\]: has the file_name or id"),
        (json.dumps({**coco({}), "categories": [{"id": []}]}), "categories: is not in the format"),
    ],
)
def test_annotations_that_are_none_stop_ingestion_in_one_line(home: Path, content: str, expected: str) -> None:
    write_images(home, ["a.png"])
    (home / "boxes.json").write_text(content)
    with pytest.raises(DataError, match=expected) as refused:
        run_stage("ingest", files_project(home, boxes="boxes.json"), (home / "run").as_uri())
    assert "\n" not in str(refused.value)


def test_each_split_needs_a_box_of_each_category_and_the_same_image_the_same_boxes(home: Path) -> None:
    names = [f"{i}.png" for i in range(8)]
    write_images(home, names)
    (home / "images" / "copy.png").write_bytes((home / "images" / "7.png").read_bytes())
    (home / "boxes.json").write_text(json.dumps(coco({**{name: [NODULE] for name in names}, "copy.png": [MASS]})))
    with pytest.raises(DataError, match="the train split has no images of 'mass'"):
        run_stage("ingest", files_project(home, boxes="boxes.json"), (home / "run").as_uri())
    (home / "boxes.json").write_text(json.dumps(coco({**{name: [NODULE, MASS] for name in names}, "copy.png": [MASS]})))
    run_stage("ingest", files_project(home, boxes="boxes.json"), (home / "again").as_uri())
    [refused] = map(json.loads, (home / "again" / "ingest" / "quarantine.jsonl").read_text().splitlines())
    assert refused["code"] == "conflicting_label"
    assert refused["reason"].endswith("but other boxes")


# --- from end to end ---


class Findings(NamedTuple):
    """A finished training of phantoms, by two processes."""

    home: Path
    config: ProjectConfig
    run: str

    @property
    def bundle(self) -> Bundle:
        return Bundle.load(self.home / "run" / "train" / "bundle")

    @property
    def phantoms(self) -> Path:
        [folder] = (path for path in (self.home / "var" / "storage" / "findings" / "phantoms").iterdir() if path.is_dir())
        return folder


@pytest.fixture(scope="module")
def findings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Findings]:
    home = tmp_path_factory.mktemp("findings")
    path, run = home / "project.yaml", (home / "run").as_uri()
    path.write_text(yaml.safe_dump(FINDINGS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(home))
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        config = load(path)
        for stage in ("ingest", "preprocess", "train", "evaluate", "gate"):
            run_stage(stage, config, run)
        yield Findings(home, config, run)


def test_a_phantoms_box_is_around_its_opacity_and_lies_in_the_shards(findings: Findings) -> None:
    content = json.loads((findings.phantoms / "boxes.json").read_text())
    assert [each["name"] for each in content["categories"]] == ["opacity"]
    manifest = read_manifest(findings.home / "run" / "ingest")
    healthy = manifest["label"] == 0
    assert 0.3 < healthy.mean() < 0.7
    assert all((len(rows) == 0) == none for rows, none in zip(as_boxes(manifest["boxes"]), healthy, strict=True))
    folder = findings.home / "run" / "preprocess"
    for split in ("train", "val", "test"):
        rows, shard = shards.read_rows(folder, split), Shard.open(folder, split)
        geometry = Geometry.of((64, 64), findings.config.preprocessing)
        assert shard.boxes is not None
        for truth, prepared, padded in zip(as_boxes(rows["boxes"]), as_boxes(rows[PREPARED]), shard.boxes, strict=True):
            assert np.array_equal(prepared, geometry.prepare_boxes(truth))
            assert padded[padded[:, 0] > 0] == pytest.approx(prepared)
        images, targets = shard.batch(np.array([1, 0]))
        assert targets.shape == (2, 1, 5)
        for image, (number, left, top, right, bottom) in zip(images[:, 0], targets[:, 0].tolist(), strict=True):
            if number:
                inside = image[round(top) : round(bottom), round(left) : round(right)]
                assert inside.mean() > image.mean(), "an opacity is brighter than what is around it"


def test_the_network_learns_to_find_the_opacities_and_the_gate_judges_map(findings: Findings) -> None:
    train = TrainRecord.model_validate(read_result(findings.run, "train").record)
    record = EvaluateRecord.model_validate(read_result(findings.run, "evaluate").record)
    gate = GateRecord.model_validate(read_result(findings.run, "gate").record)
    assert (train.val_auc, train.val_dice, train.world_size) == (None, None, 2)
    assert train.val_map is not None
    assert train.val_map > 0.04
    assert set(record.metrics) == set(record.intervals["test"]) == {"map", "map50"}
    assert (gate.metric, gate.challenger, gate.verdict) == ("map", record.metrics["map"], "passed")
    assert set(record.subgroups["sex"]["F"].metrics) <= {"map", "map50"}
    assert {Path(name).stem for name in record.pictures} >= {"learning_curves", "precision_recall", "errors", "data"}
    table = pd.read_parquet(findings.home / "run" / "evaluate" / "predictions.parquet")
    table = table[table["split"] == "test"]
    expected = by_pycocotools(as_boxes(table["boxes"]), as_boxes(table["challenger_boxes"], 6), 2)
    assert record.metrics == pytest.approx({name: expected[name] for name in ("map", "map50")}, abs=1e-6)


def test_the_model_card_tells_map_and_holds_no_image(findings: Findings) -> None:
    card = (findings.home / "run" / "evaluate" / "model_card.md").read_text()
    assert "one of normal, opacity for each box in an image" in card
    assert "| mAP at IoU 0.5 | " in card
    assert "Boxes answered | from a score of" in card
    assert "![precision recall](precision_recall.png)" in card
    assert "errors.png" not in card
    assert "Temperature" not in card


def test_the_predictor_answers_in_pixels_of_the_image_as_evaluation_measured_it(findings: Findings) -> None:
    predictor, folder = Predictor(findings.bundle), findings.home / "run"
    manifest = predictor.manifest
    table = pd.read_parquet(folder / "evaluate" / "predictions.parquet").set_index("id")
    answered = 0
    for row_id, found in zip(table.index, as_boxes(table["challenger_boxes"], 6), strict=True):
        given = decode_one((findings.phantoms / str(row_id)).read_bytes(), None, DOMAIN, manifest.decoding)
        [answer] = predictor.answer([given]).predictions
        assert isinstance(answer, DetectedPrediction)
        sure = found[found[:, 5] >= manifest.threshold]
        corners = [[box.left, box.top, box.right, box.bottom, box.score] for box in answer.boxes]
        assert np.array(corners).reshape(-1, 5) == pytest.approx(sure[:, 1:], abs=0.01)
        assert answer.label == ("opacity" if len(sure) else "normal")
        assert answer.score == answer.scores["opacity"] == pytest.approx(found[:, 5].max(initial=0), abs=1e-5)
        assert set(answer.features) >= set(manifest.features)
        answered += len(answer.boxes)
    assert answered
    assert answer.features["boxes"] == len(answer.boxes)


def test_an_answer_comes_back_from_json_as_what_it_is(findings: Findings) -> None:
    predictor = Predictor(findings.bundle)
    image = np.random.default_rng(7).integers(0, 65536, (50, 41)).astype(np.uint16)
    answer = predictor.answer([Decoded(image)])
    again = Answer.model_validate_json(answer.model_dump_json())
    assert again == answer
    assert isinstance(again.predictions[0], DetectedPrediction)


def test_the_bundle_says_how_boxes_are_chosen_and_has_a_reference_for_drift(findings: Findings) -> None:
    bundle = findings.bundle
    assert bundle.manifest.task == "detection"
    assert bundle.manifest.overlap in detection.OVERLAPS
    assert 0.05 <= bundle.manifest.threshold < 1
    assert "overlap" not in bundle.manifest.model_copy(update={"overlap": None}).model_dump(), (
        "other tasks' bundles say nothing"
    )
    reference = bundle.reference()
    assert set(reference) == set(bundle.manifest.features) >= {"score", "boxes", "embedding_0"}
    rows = shards.read_rows(findings.home / "run" / "preprocess", "val")
    given = decode_one((findings.phantoms / str(rows["id"][0])).read_bytes(), None, DOMAIN, bundle.manifest.decoding)
    served = Predictor(bundle).answer([given]).predictions[0].features
    assert reference.iloc[0][["score", "boxes"]].to_dict() == pytest.approx(
        {k: served[k] for k in ("score", "boxes")}, abs=1e-5
    )


def test_golden_studies_hold_the_scores_that_an_endpoint_must_answer(findings: Findings, tmp_path: Path) -> None:
    bundle = findings.bundle
    names = {"model_name": "findings", "model_version": 1, "mlflow_run_id": "0"}
    record = RegisterRecord(summary="", bundle=bundle.path.as_uri(), bundle_digest=bundle.digest, **names)
    result = Result(stage="register", run="", inputs_digest="", seconds=0, record=record.model_dump(mode="json"))
    (findings.home / "run" / "register").mkdir()
    (findings.home / "run" / "register" / "result.json").write_text(result.model_dump_json())
    config = findings.config.model_copy(update={"storage": (tmp_path / "storage").as_uri()})
    studies = golden.studies(Stage("verify", config, findings.run, tmp_path), bundle.digest)
    assert len(studies) == 8
    assert open_engine(bundle, "openvino", 1).name == "openvino"
    with TestClient(create_app(bundle.path, ServingSettings(threads=1))) as endpoint:
        for study in studies:
            answer = endpoint.post("/invocations", content=study.body, headers={"content-type": study.content_type})
            assert golden.require_answer(study, 1, answer.content, config.labels, 0.001) <= 0.001, "by another engine"
        headers = {"accept": DOMAIN.content_type, "content-type": DOMAIN.content_type}
        identified = next(findings.phantoms.glob("*.dcm")).read_bytes()
        given = DOMAIN.deidentify(identified, DeidentificationConfig(pixels="trust")).content
        refused = endpoint.post("/invocations", content=given, headers=headers)
    assert (refused.status_code, refused.json()["code"]) == (406, "accept")
    wrong = study._replace(probabilities=[each + 0.01 for each in study.probabilities])
    with pytest.raises(DataError, match="golden study 1: the endpoint answers normal"):
        golden.require_answer(wrong, 1, answer.content, config.labels, 0.001)


def test_an_explanation_of_boxes_is_refused_in_words(findings: Findings) -> None:
    explainer = Explainer(Predictor(findings.bundle))
    with pytest.raises(ConfigError, match="a detection shows by its boxes where it sees what"):
        explainer.answer([Decoded(np.full((32, 32), 9, np.uint16))], GradCam())
