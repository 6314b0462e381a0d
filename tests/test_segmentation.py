"""Segmentation: masks from their files to a bundle's answers; measures against scipy and scikit-learn, masks against DICOM."""

from __future__ import annotations

import io
import json
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import highdicom
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import f1_score
from starlette.testclient import TestClient
from torch.nn import functional

from cv_factory_ops import segmentation
from cv_factory_ops.answers import SegmentedPrediction
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.config import ProjectConfig, load
from cv_factory_ops.config.data import DeidentificationConfig
from cv_factory_ops.config.evaluation import EvaluationConfig, GateConfig
from cv_factory_ops.config.models import Unet
from cv_factory_ops.config.preprocessing import CropStep, PadStep, PreprocessingConfig, ResizeStep, SpacingStep, Step
from cv_factory_ops.config.training import AugmentConfig, FineTuning, TrainingConfig
from cv_factory_ops.deploy import golden
from cv_factory_ops.domain import Decoded, Decoding
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.evaluation.gate import difference_interval, differences
from cv_factory_ops.evaluation.segmentation import JudgedMasks, dice_and_hd95
from cv_factory_ops.explainer import Explainer
from cv_factory_ops.ingestion import manifest as stored
from cv_factory_ops.ingestion.decode import decode_one
from cv_factory_ops.ingestion.manifest import read_manifest, read_masks
from cv_factory_ops.models import Segmenter, build, freeze, stages
from cv_factory_ops.predictor import Predictor
from cv_factory_ops.preprocessing import preprocess, shards
from cv_factory_ops.preprocessing.geometry import Geometry, Mask
from cv_factory_ops.preprocessing.pipeline import prepare
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.records import EvaluateRecord, GateRecord, PreprocessRecord, RegisterRecord, Result, TrainRecord
from cv_factory_ops.serving.app import create_app
from cv_factory_ops.serving.settings import ServingSettings
from cv_factory_ops.stage import Stage, read_result, run_stage
from cv_factory_ops.training.data import Shard, augment_with_masks
from cv_factory_ops.training.objectives import Segmentation, open_objective
from cv_factory_ops.training.validation import DiceOfMasks
from domain_medical import DOMAIN

LESIONS: dict[str, Any] = {
    "project": "lesions",
    "task": "segmentation",
    "labels": ["background", "opacity"],
    "data": {"source": {"kind": "phantoms", "patients": 48, "image_size": 64, "seed": 3}},
    "splits": {"val": 0.25, "test": 0.25},
    "preprocessing": {"size": 32, "steps": [{"kind": "pad", "pixels": 80}]},
    "model": {"kind": "unet", "width": 8, "levels": 3},
    "training": {"epochs": 8, "batch_size": 8, "processes_per_node": 1, "learning_rate": 0.01},
    "evaluation": {"minimum": 2, "bootstrap": 100},
    "gate": {"metric": "dice", "minimum": 0.3, "bootstrap": 100},
}


LABELS = ["background", "nodule", "mass"]
"""Of the sources' tests."""


def disc(rows: int, columns: int, middle: tuple[float, float], radius: float) -> Mask:
    y, x = np.ogrid[:rows, :columns]
    return ((y - middle[0]) ** 2 + (x - middle[1]) ** 2 <= radius**2).astype(np.uint8)


def png(mask: NDArray[Any]) -> bytes:
    return bytes(cv2.imencode(".png", mask)[1])


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# --- the network and what it learns from ---


def test_a_unet_is_monais_and_its_stages_hold_all_weights() -> None:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    network = build(Unet(width=4, levels=4), 3, 0.4, 0.2, 1).eval()
    images = torch.rand(2, 1, 32, 32)
    logits, embedding = network(images)
    assert isinstance(network, Segmenter)
    assert logits.shape == (2, 3, 32, 32)
    assert embedding.shape == (2, network.features) == (2, 32)
    pixels = UNet.forward(network.backbone, (images - 0.4) / 0.2)
    assert torch.equal(logits, network.head(pixels))
    owned = [id(weight) for stage in stages(network).values() for part in stage for weight in part.parameters()]
    assert sorted(owned) == sorted(id(weight) for weight in network.parameters())
    freeze(network, FineTuning(frozen=2))
    assert [name for name, stage in stages(network).items() if not next(stage[0].parameters()).requires_grad] == [
        "down1",
        "down2",
    ]


def test_the_loss_is_dice_of_the_batch_without_background_and_cross_entropy() -> None:
    torch.manual_seed(1)
    network = build(Unet(width=4, levels=2), 3)
    still = AugmentConfig(flip=False, shift=0, intensity=0)
    weights = torch.tensor([0.5, 1.0, 2.0])
    images, masks = torch.rand(4, 1, 16, 16), torch.randint(0, 3, (4, 16, 16))
    objective = open_objective(TrainingConfig(augment=still), network, weights, None)
    assert isinstance(objective, Segmentation)
    loss = float(objective.loss(network, images, masks).detach())
    logits = network(images)[0].detach()
    shares, truth = logits.softmax(1).numpy(), np.eye(3)[masks.numpy()].transpose(0, 3, 1, 2)
    overlap, total = (shares * truth).sum((0, 2, 3)), (shares + truth).sum((0, 2, 3))
    dice = (1 - 2 * overlap / total)[1:] * weights.numpy()[1:]
    assert loss == pytest.approx(dice.mean() + float(functional.cross_entropy(logits, masks, weights)), abs=1e-4)


def test_rare_classes_weigh_as_much_as_their_pixels_are_few() -> None:
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[0, 0] = 1
    shard = Shard(shards.Images([np.zeros((3, 4, 4), np.uint16)]), np.array([1, 0, 0]), shards.Images([masks]))
    assert shard.class_counts(3).tolist() == [44, 4, 0]
    images, targets = shard.batch(np.array([2, 0]))
    assert images.shape == (2, 1, 4, 4)
    assert targets.dtype == torch.int64
    assert np.array_equal(targets.numpy(), masks[[2, 0]])


@pytest.mark.parametrize(
    "change", [AugmentConfig(shift=0.3, intensity=0), AugmentConfig(flip=False, shift=0, rotate=90, zoom=1, intensity=0)]
)
def test_augmentation_moves_image_and_mask_together(change: AugmentConfig) -> None:
    torch.manual_seed(2)
    masks = torch.from_numpy(np.stack([disc(48, 48, (12, 30), 8) * 2 for _ in range(16)])).long()
    images = (masks == 2).float()[:, None]
    moved, with_them = augment_with_masks(images, masks, 3, change)
    assert not torch.equal(with_them, masks)
    assert set(with_them.unique().tolist()) == {0, 2}
    assert torch.equal(moved[:, 0] > 0.5, with_them == 2)


def test_intensities_change_the_image_alone() -> None:
    torch.manual_seed(3)
    masks, images = torch.randint(0, 2, (4, 16, 16)), torch.rand(4, 1, 16, 16)
    still = AugmentConfig(flip=False, shift=0, intensity=0.5, noise=0.2)
    changed, same = augment_with_masks(images, masks, 2, still)
    assert torch.equal(same, masks)
    assert not torch.equal(changed, images)


def test_validation_is_the_mean_dice_of_each_class() -> None:
    generator = np.random.default_rng(4)
    truth, logits = generator.integers(0, 3, (6, 12, 12)), generator.normal(size=(6, 3, 12, 12)).astype(np.float32)
    truth[0], logits[0, 0] = 0, 9  # nothing to find, nothing found
    validation = DiceOfMasks(3)
    rows = validation.rows(torch.from_numpy(logits), torch.from_numpy(truth)).numpy()
    expected = [f1_score(truth[i].ravel(), logits[i].argmax(0).ravel(), labels=[1, 2], average=None) for i in range(1, 6)]
    assert rows.shape == (6, validation.columns)
    assert validation.score(np.zeros(6, np.int64), rows) == pytest.approx(np.mean(expected), abs=1e-6)
    logits[3, 1, 2, 2] = np.nan
    rows = validation.rows(torch.from_numpy(logits), torch.from_numpy(truth)).numpy()
    assert np.isnan(rows).any(1).tolist() == [False, False, False, True, False, False]


# --- where pixels lie ---


@pytest.mark.parametrize(
    "steps",
    [
        [PadStep()],
        [SpacingStep(mm=1.3), CropStep(mm=60), PadStep(pixels=90)],
        [ResizeStep(pixels=70), CropStep(pixels=50)],
        [ResizeStep(pixels=61, side="longer"), PadStep(mm=100), CropStep(pixels=57)],
    ],
)
def test_a_mask_goes_where_its_image_goes(steps: list[Step]) -> None:
    config, spacing, mask = PreprocessingConfig(size=64, steps=steps), (0.7, 1.1), disc(110, 70, (48, 30), 22)
    geometry = Geometry.of((110, 70), config, spacing)
    image = prepare(mask.astype(np.uint16) * np.uint16(65535), config, spacing)
    moved = geometry.prepare(mask)
    inside, outside = ndimage.binary_erosion(image > 32768), ndimage.binary_dilation(image > 32768)
    assert moved[inside].all()
    assert not moved[~outside].any()
    seen = geometry.restore(np.ones((64, 64), np.uint8))
    back = geometry.restore(moved)
    assert f1_score((mask & seen).ravel(), back.ravel()) > 0.95
    assert not back[seen == 0].any()


def test_crop_and_pad_move_masks_exactly() -> None:
    mask = np.random.default_rng(5).integers(0, 3, (20, 13)).astype(np.uint8)
    geometry = Geometry.of((20, 13), PreprocessingConfig(size=16, steps=[CropStep(pixels=16), PadStep(pixels=16)]))
    expected = np.pad(mask[2:18], ((0, 0), (1, 2)))
    assert np.array_equal(geometry.prepare(mask), expected)
    kept = np.zeros_like(mask)
    kept[2:18] = mask[2:18]
    assert np.array_equal(geometry.restore(geometry.prepare(mask)), kept)


def test_a_step_in_mm_needs_the_spacing() -> None:
    with pytest.raises(Rejected, match="no pixel spacing"):
        Geometry.of((20, 20), PreprocessingConfig(size=16, steps=[SpacingStep(mm=1)]))


@pytest.mark.parametrize("shape", [(64, 32), (50, 41), (9, 20)])
def test_an_answer_is_of_the_images_pixels_and_not_of_padding(shape: tuple[int, int]) -> None:
    geometry = Geometry.of(shape, PreprocessingConfig(size=32, steps=[PadStep()]))
    logits = np.random.default_rng(8).normal(size=(3, 32, 32)) * 2
    logits[:2] += np.array([-1, 9])[:, None, None] * (geometry.prepare(np.ones(shape, np.uint8)) == 0)
    probabilities = (np.exp(logits) / np.exp(logits).sum(0)).astype(np.float32)
    answer = segmentation.segmented(probabilities, ["none", "a", "b"], geometry, None, {})
    of_pixels = np.stack([geometry.restore((of_class * 255).astype(np.uint8)) for of_class in probabilities]) / 255
    mask = segmentation.mask_of(answer)
    counts = np.bincount(mask.ravel(), minlength=3)
    assert mask.shape == shape
    assert answer.label == ["none", "a", "b"][1 + int(counts[1:].argmax())]
    assert [answer.regions[label].area for label in "ab"] == counts[1:].tolist()
    assert answer.features["foreground"] == pytest.approx((mask > 0).mean(), abs=1e-6)
    assert answer.score == pytest.approx(of_pixels.max(0)[mask > 0].mean(), abs=1 / 255)
    assert list(answer.scores.values()) == pytest.approx(of_pixels.mean((1, 2)), abs=1 / 255)
    assert answer.regions["b"].confidence == pytest.approx(of_pixels[2][mask == 2].mean(), abs=1 / 255)


def test_a_class_that_only_padding_shows_is_not_found() -> None:
    geometry = Geometry.of((64, 32), PreprocessingConfig(size=32, steps=[PadStep()]))
    probabilities = np.zeros((2, 32, 32), np.float32)
    probabilities[0, :, 8:24] = probabilities[1, :, :8] = probabilities[1, :, 24:] = 1
    answer = segmentation.segmented(probabilities, ["none", "a"], geometry, (0.5, 2.0), {})
    assert (answer.label, answer.score, answer.features["foreground"]) == ("none", 1, 0)
    assert answer.regions["a"].model_dump() == {"area": 0, "unit": "mm2", "confidence": None}


# --- measures ---


def hausdorff_95(truth: NDArray[np.bool_], answer: NDArray[np.bool_], spacing: tuple[float, float]) -> float:
    """By distance transforms from edge to edge."""
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (truth, answer)]
    directed = [ndimage.distance_transform_edt(~a, sampling=spacing)[b] for a, b in (edges, edges[::-1])]
    return float(max(np.percentile(distances, 95) for distances in directed))


def test_dice_and_hausdorff_are_those_of_other_libraries() -> None:
    generator = np.random.default_rng(6)
    for _ in range(12):
        shape, spacing = (
            tuple(generator.integers(24, 60, 2)),
            (float(generator.uniform(0.2, 2)), float(generator.uniform(0.2, 2))),
        )
        fields = (ndimage.gaussian_filter(generator.standard_normal(shape), 4) for _ in range(2))
        truth, answer = (np.digitize(field, np.quantile(field, [0.6, 0.8])).astype(np.uint8) for field in fields)
        dice, distance = dice_and_hd95(truth, answer, 3, spacing)
        assert dice == pytest.approx(f1_score(truth.ravel(), answer.ravel(), labels=[1, 2], average=None), abs=1e-6)
        assert distance == pytest.approx([hausdorff_95(truth == c, answer == c, spacing) for c in (1, 2)], rel=1e-5)


def test_measures_of_empty_masks_are_as_documented() -> None:
    empty, full = np.zeros((30, 40), np.uint8), disc(30, 40, (10, 10), 5)
    diagonal = math.hypot(30 * 0.5, 40 * 2.0)
    for truth, answer in ((full, empty), (empty, full)):
        dice, distance = dice_and_hd95(truth, answer, 2, (0.5, 2.0))
        assert (dice[0], distance[0]) == (0, pytest.approx(diagonal))
    assert np.isnan(dice_and_hd95(empty, empty, 2, (0.5, 2.0))).all()
    dice, distance = dice_and_hd95(full, full, 2, None)
    assert dice[0] == 1
    assert np.isnan(distance[0])


def table() -> pd.DataFrame:
    """Five images of four patients, two classes; the challenger is better in the first."""
    nan = np.nan
    return pd.DataFrame(
        {
            "id": list("abcde"),
            "patient": ["p", "p", "q", "r", "s"],
            "label": [1, 1, 2, 0, 2],
            "challenger_dice_1": [0.9, 0.8, nan, nan, 0.7],
            "challenger_dice_2": [nan, nan, 0.5, 0.0, 0.25],
            "challenger_hd95_1": [1.0, 2.0, nan, nan, 3.0],
            "challenger_hd95_2": [nan, nan, 4.0, 50.0, 6.0],
            "champion_dice_1": [0.6, 0.5, nan, nan, 0.4],
            "champion_dice_2": [nan, nan, 0.5, nan, 0.25],
            "champion_hd95_1": [1.0, 2.0, nan, nan, 3.0],
            "champion_hd95_2": [nan, nan, 4.0, nan, 6.0],
        }
    )


def test_metrics_are_means_over_images_then_classes_with_intervals_over_patients(lesions: Lesions) -> None:
    manifest = lesions.bundle.manifest.model_copy(update={"labels": ["background", "nodule/left", "mass"]})
    judged = JudgedMasks.of(table(), "challenger", manifest)
    assert judged.metrics == {
        "dice": 0.525,
        "dice_nodule_left": 0.8,
        "dice_mass": 0.25,
        "hd95": 11.0,
        "hd95_nodule_left": 2.0,
        "hd95_mass": 20.0,
    }
    assert judged.of_images.tolist() == [0.9, 0.8, 0.5, 0.0, pytest.approx(0.475)]
    low, high = judged.intervals(EvaluationConfig(bootstrap=200))["dice_nodule_left"]
    assert 0.7 <= low < 0.8 < high <= 0.9
    few = judged.only(np.array([True, True, False, False, False]))
    assert few.metrics == {"dice_nodule_left": 0.85, "hd95_nodule_left": 1.5}, "Dice lacks a class"


def test_the_gate_compares_dice_on_the_same_patients() -> None:
    record = EvaluateRecord.model_construct(threshold=0.5, champion_threshold=0.5)
    config = GateConfig(metric="dice", bootstrap=100)
    whole = differences(table(), record, config, np.ones((1, 5)))
    assert whole == pytest.approx([(0.8 + 0.25) / 2 - (0.5 + 0.375) / 2])
    low, high = difference_interval(table(), record, config)
    assert low <= whole[0] <= high


# --- configuration ---


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"model": {"kind": "small_cnn"}}, "model.kind: unet where task is segmentation"),
        ({"task": "classification"}, "model.kind: another than unet where task is classification"),
        ({"gate": {"metric": "auc"}}, "gate.metric: dice where task is segmentation"),
        ({"data": {"source": {"kind": "npz", "path": "x.npz"}}}, "data.source.kind: files or phantoms"),
        ({"data": {"source": {"kind": "files", "path": "x"}}}, "data.source.masks, or a table with a column mask"),
        ({"training": {"objective": {"kind": "contrastive"}}}, "training.objective: supervised or fine_tuning"),
        ({"training": {"augment": {"mixup": 0.2}}}, "without mixup and cutmix"),
        ({"preprocessing": {"size": 30}}, "preprocessing.size 30: a multiple of 4 for model.levels 3"),
        ({"model": {"kind": "unet", "levels": 6}}, "preprocessing.size 32: at least 64 for model.kind unet"),
        ({"calibration": {"abstain": 0.1}}, "calibration.abstain: 0"),
    ],
)
def test_what_a_segmentation_cannot_be_is_one_line(home: Path, sections: dict[str, Any], expected: str) -> None:
    (home / "project.yaml").write_text(yaml.safe_dump({**LESIONS, **sections}))
    with pytest.raises(ConfigError, match=expected):
        load(home / "project.yaml")


# --- sources ---


def files_project(home: Path, **source: Any) -> ProjectConfig:
    data = {"source": {"kind": "files", "path": "images", **source}, "max_quarantined": 0.9}
    path = home / "files.yaml"
    labels = {"labels": LABELS, "splits": {"val": 0.3, "test": 0.3}}
    path.write_text(yaml.safe_dump({**LESIONS, "data": data, **labels}))
    return load(path)


def picture(seed: int) -> bytes:
    return png(np.random.default_rng(seed).integers(0, 256, (40, 30)).astype(np.uint8))


def two_classes() -> Mask:
    return disc(40, 30, (10, 10), 6) | disc(40, 30, (30, 20), 4) * np.uint8(2)


def test_masks_are_found_by_folder_and_table_and_bad_ones_are_refused_with_a_reason(home: Path) -> None:
    images, masks = home / "images", home / "images" / "masks"
    masks.mkdir(parents=True)
    good = two_classes()
    for i in range(8):
        (images / f"{i}.png").write_bytes(picture(i))
        (masks / f"{i}.png").write_bytes(png(good))
    (masks / "1.png").unlink()
    (masks / "1.npy").write_bytes(npy(good.astype(np.int32)))
    bad = {
        "missing": (None, "mask_missing"),
        "shape": (png(good[:-1]), "mask_shape"),
        "class": (png(good + np.uint8(1)), "mask_class"),
        "negative": (npy(good.astype(np.int16) - 1), "mask_class"),
        "colour": (png(np.repeat(good[:, :, None], 3, 2)), "mask_undecodable"),
        "float": (npy(good.astype(np.float32)), "mask_undecodable"),
        "cut": (png(good)[:40], "mask_undecodable"),
    }
    for number, (name, (content, _)) in enumerate(bad.items(), 100):
        (images / f"{name}.png").write_bytes(picture(number))
        if content:
            ending = "npy" if name in {"negative", "float"} else "png"
            (masks / f"{name}.{ending}").write_bytes(content)
    (images / "other.png").write_bytes(picture(200))
    (masks / "by another name.png").write_bytes(png(good))
    rows = ["file,mask,patient", "other.png,by another name.png,Doe", *(f"{i}.png,,P{i}" for i in range(8)), "gone.png,,x"]
    (home / "table.csv").write_text("\n".join(rows) + "\n")
    config = files_project(home, masks="images/masks", labels="table.csv")
    run_stage("ingest", config, (home / "run").as_uri())
    quarantine = [json.loads(line) for line in (home / "run" / "ingest" / "quarantine.jsonl").read_text().splitlines()]
    found = {refusal["item"]: refusal["code"] for refusal in quarantine}
    assert found == {f"{name}.png": code for name, (_, code) in bad.items()} | {"gone.png": "label_without_image"}
    assert next(each["reason"] for each in quarantine if each["code"] == "mask_shape") == (
        "its mask has 39 x 30 pixels, the image 40 x 30"
    )
    manifest = read_manifest(home / "run" / "ingest")
    assert set(manifest["id"]) == {*(f"{i}.png" for i in range(8)), "other.png"}
    assert all(np.array_equal(mask, good) for mask in read_masks(home / "run" / "ingest", manifest))
    assert set(manifest["label"]) == {1}, "the class of the largest region"
    assert (manifest["patient"] != "").all()


def test_a_class_that_no_mask_shows_stops_ingestion(home: Path) -> None:
    (home / "images").mkdir()
    (home / "masks").mkdir()
    for i in range(6):
        (home / "images" / f"{i}.png").write_bytes(picture(i))
        (home / "masks" / f"{i}.png").write_bytes(png(disc(40, 30, (10, 10), 6)))
    with pytest.raises(DataError, match="the train split has no images of 'mass'"):
        run_stage("ingest", files_project(home, masks="masks"), (home / "run").as_uri())


def test_the_same_image_with_another_mask_is_a_conflict(home: Path) -> None:
    (home / "images").mkdir()
    (home / "masks").mkdir()
    for i in range(9):
        (home / "images" / f"{i}.png").write_bytes(picture(min(i, 7)))
        (home / "masks" / f"{i}.png").write_bytes(png(np.roll(two_classes(), i == 8, 0)))
    run_stage("ingest", files_project(home, masks="masks"), (home / "run").as_uri())
    [refused] = (home / "run" / "ingest" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(refused) == {
        "item": "8.png",
        "code": "conflicting_label",
        "reason": "has the same pixels as 7.png, but another mask",
    }


# --- DICOM ---


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, Mask]:
    """A de-identified phantom of 80 x 80 pixels with its mask, which shows class 2."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        DOMAIN.generate(folder, patients=3, image_size=80, seed=2, labels=LABELS, masks=True)
        content = DOMAIN.deidentify((folder / "00002_0.dcm").read_bytes(), DeidentificationConfig(pixels="trust")).content
    mask = cv2.imread(str(folder / "masks" / "00002_0.png"), cv2.IMREAD_UNCHANGED)
    assert mask is not None
    return content, mask.astype(np.uint8)


def test_a_phantoms_mask_lies_on_its_opacity(study: tuple[bytes, Mask]) -> None:
    content, mask = study
    assert np.unique(mask).tolist() == [0, 2]
    image = decode_one(content, None, DOMAIN, Decoding()).image
    ring = ndimage.binary_dilation(mask > 0, iterations=8) & (mask == 0)
    assert image[mask > 0].mean() > image[ring].mean() + 3000


def test_a_mask_becomes_a_segmentation_of_the_study_and_back(study: tuple[bytes, Mask]) -> None:
    content, mask = study
    made = DOMAIN.segmentation(content, mask, ["nodule", "mass"], ["cv-factory 1", "digest"])
    assert made == DOMAIN.segmentation(content, mask, ["nodule", "mass"], ["cv-factory 1", "digest"])
    assert np.array_equal(DOMAIN.read_mask(made, LABELS, ""), mask)
    found, image = pydicom.dcmread(io.BytesIO(made)), pydicom.dcmread(io.BytesIO(content))
    assert found.SOPClassUID == pydicom.uid.SegmentationStorage
    assert [segment.SegmentLabel for segment in found.SegmentSequence] == ["nodule", "mass"]
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "PatientIdentityRemoved"):
        assert found[keyword].value == image[keyword].value
    assert found.SeriesInstanceUID != image.SeriesInstanceUID
    [source] = found.SourceImageSequence
    assert source.ReferencedSOPInstanceUID == image.SOPInstanceUID
    shown = found.pixel_array.reshape(-1, 80, 80)
    assert np.array_equal(shown[0] * 2, mask), "one frame, that of the class that is there"
    empty = DOMAIN.segmentation(content, np.zeros_like(mask), ["nodule", "mass"], ["1"])
    assert not DOMAIN.read_mask(empty, LABELS, "").any()


def test_a_mask_that_is_not_of_the_study_is_refused(study: tuple[bytes, Mask]) -> None:
    content, mask = study
    with pytest.raises(Rejected) as refused:
        DOMAIN.segmentation(content, mask[1:], ["nodule", "mass"], ["1"])
    assert refused.value.code == "mask_shape"
    with pytest.raises(Rejected, match="not a usable DICOM Segmentation"):
        DOMAIN.read_mask(content, LABELS, "")


def by_another(content: bytes, mask: Mask, labels: list[str]) -> bytes:
    """A segmentation as other software writes it: its segments, numbered from 1, are ``labels``."""
    code = pydicom.sr.codedict.codes.SCT.Lesion
    segments = [highdicom.seg.SegmentDescription(n, label, code, code, "MANUAL") for n, label in enumerate(labels, 1)]
    image, new = pydicom.dcmread(io.BytesIO(content)), pydicom.uid.generate_uid
    image.PatientName = None
    for keyword in ("PatientBirthDate", "AccessionNumber", "StudyID", "StudyTime", "ReferringPhysicianName"):
        setattr(image, keyword, image.get(keyword))
    made = highdicom.seg.Segmentation(
        [image], mask, "BINARY", segments, new(), 1, new(), 1, "Other", "Other", "1", "1", omit_empty_frames=False
    )
    file = io.BytesIO()
    made.save_as(file)
    return file.getvalue()


def test_a_segment_is_the_class_that_its_label_names(study: tuple[bytes, Mask]) -> None:
    content, mask = study
    both = np.where(mask > 0, mask, np.roll(mask, 20, 1) // 2).astype(np.uint8)
    instance = decode_one(content, None, DOMAIN, Decoding()).instance
    swapped = by_another(content, np.array([0, 2, 1], np.uint8)[both], ["mass", "nodule"])
    assert np.array_equal(DOMAIN.read_mask(swapped, LABELS, instance), both)
    alone = by_another(content, (mask > 0).astype(np.uint8), ["mass"])
    assert np.array_equal(DOMAIN.read_mask(alone, LABELS, instance), mask)
    with pytest.raises(Rejected, match="whose label is none of: background, nodule, mass") as refused:
        DOMAIN.read_mask(by_another(content, mask, ["nodule", "Doe^John"]), LABELS, instance)
    assert refused.value.code == "mask_class"
    assert "Doe" not in str(refused.value)


def test_a_segmentation_is_of_its_image_before_and_after_deidentification(study: tuple[bytes, Mask]) -> None:
    content, mask = study
    identified = pydicom.dcmread(io.BytesIO(content))
    del identified.PatientIdentityRemoved
    file = io.BytesIO()
    identified.save_as(file)
    made = by_another(file.getvalue(), mask, ["nodule", "mass"])
    pseudonym = decode_one(file.getvalue(), None, DOMAIN, Decoding()).instance
    assert pseudonym == DOMAIN.remapped(identified.SOPInstanceUID) != identified.SOPInstanceUID
    for instance in (pseudonym, str(identified.SOPInstanceUID), ""):
        assert np.array_equal(DOMAIN.read_mask(made, LABELS, instance), mask)
    with pytest.raises(Rejected, match="of another image") as refused:
        DOMAIN.read_mask(made, LABELS, DOMAIN.remapped("1.2.3"))
    assert refused.value.code == "mask_image"


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of the Debian package dicom3tools")
@pytest.mark.parametrize("is_empty", [False, True])
def test_a_validator_finds_no_error_in_it(study: tuple[bytes, Mask], tmp_path: Path, is_empty: bool) -> None:
    content, mask = study
    made = DOMAIN.segmentation(content, mask * np.uint8(not is_empty), ["nodule", "mass"], ["cv-factory 1"])
    (tmp_path / "mask.dcm").write_bytes(made)
    said = subprocess.run(["dciodvfy", tmp_path / "mask.dcm"], capture_output=True, text=True, errors="replace")
    lines = (said.stdout + said.stderr).splitlines()
    assert "Segmentation" in lines
    assert [line for line in lines if line.startswith("Error")] == []


def test_a_dicom_segmentation_is_a_mask_like_any_other(home: Path, study: tuple[bytes, Mask]) -> None:
    content, mask = study
    (home / "images").mkdir()
    (home / "masks").mkdir()
    both = np.where(mask > 0, mask, np.roll(mask, 20, 1) // 2)
    for i in range(8):
        image = pydicom.dcmread(io.BytesIO(content))
        stored = image.pixel_array.copy()
        stored[0, 0] = i
        image.PixelData, image.SOPInstanceUID, image.PatientID = stored.tobytes(), f"1.2.{i + 1}", f"p{i}"
        image.PatientName = image.PatientID
        image.StudyInstanceUID = f"1.3.{i + 1}"
        file = io.BytesIO()
        image.save_as(file)
        (home / "images" / f"{i}.dcm").write_bytes(file.getvalue())
        made = DOMAIN.segmentation(file.getvalue(), both.astype(np.uint8), ["nodule", "mass"], ["1"])
        (home / "masks" / f"{i}.dcm").write_bytes(made)
    shutil.copy(home / "images" / "7.dcm", home / "images" / "other.dcm")
    shutil.copy(home / "masks" / "6.dcm", home / "masks" / "other.dcm")
    shutil.copy(home / "images" / "7.dcm", home / "images" / "unknown.dcm")
    (home / "masks" / "unknown.dcm").write_bytes(DOMAIN.segmentation(file.getvalue(), mask, ["nodule", "effusion"], ["1"]))
    run_stage("ingest", files_project(home, masks="masks"), (home / "run").as_uri())
    quarantine = [json.loads(line) for line in (home / "run" / "ingest" / "quarantine.jsonl").read_text().splitlines()]
    assert {each["item"]: (each["code"], each["reason"]) for each in quarantine} == {
        "other.dcm": ("mask_image", "its mask is a segmentation of another image"),
        "unknown.dcm": ("mask_class", "its mask has a segment whose label is none of: background, nodule, mass"),
    }
    manifest = read_manifest(home / "run" / "ingest")
    assert len(manifest) == 8
    assert all(np.array_equal(each, both) for each in read_masks(home / "run" / "ingest", manifest))


# --- from end to end ---


class Lesions(NamedTuple):
    """A finished training of phantoms."""

    home: Path
    config: ProjectConfig
    run: str

    @property
    def bundle(self) -> Bundle:
        return Bundle.load(self.home / "run" / "train" / "bundle")


def phantoms(lesions: Lesions) -> Path:
    """Where its studies lie."""
    [folder] = (path for path in (lesions.home / "var" / "storage" / "lesions" / "phantoms").iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lesions]:
    home = tmp_path_factory.mktemp("lesions")
    path, run = home / "project.yaml", (home / "run").as_uri()
    path.write_text(yaml.safe_dump(LESIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CVF_HOME", str(home))
        patch.setenv("CVF_PSEUDONYM_KEY", "a key for tests")
        config = load(path)
        for stage in ("ingest", "preprocess", "train", "evaluate", "gate"):
            run_stage(stage, config, run)
        yield Lesions(home, config, run)


def test_masks_lie_beside_their_images_and_are_checked(lesions: Lesions, tmp_path: Path) -> None:
    folder = tmp_path / "preprocess"
    shutil.copytree(lesions.home / "run" / "preprocess", folder)
    record = PreprocessRecord.model_validate(read_result(lesions.run, "preprocess").record)
    for split, count in record.counts.items():
        masks, images = shards.open_masks(folder, split), shards.open_split(folder, split)
        assert masks is not None
        assert masks.shape == images.shape == (count, 32, 32)
        rows = shards.read_rows(folder, split)
        originals = list(read_masks(lesions.home / "run" / "ingest", rows))
        geometry = Geometry.of((64, 64), lesions.config.preprocessing)
        assert all(np.array_equal(masks[i], geometry.prepare(mask)) for i, mask in enumerate(originals))
    shards.verify(folder)
    broken = folder / "masks-val-00000.npy"
    broken.write_bytes(broken.read_bytes()[:-1] + b"\x01")
    with pytest.raises(DataError, match=r"masks-val-00000\.npy: is not what was written"):
        shards.verify(folder)


def test_an_interrupted_preprocessing_goes_on_with_its_masks(
    lesions: Lesions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "GROUP", 8)
    config, ingested, kept = lesions.config.preprocessing, lesions.home / "run" / "ingest", Images.put
    counts = preprocess.write_shards(tmp_path, ingested, config, [32, 32])
    journal = tmp_path / preprocess.JOURNAL
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:2]))  # as a killed try leaves it
    written: list[str] = []
    monkeypatch.setattr(Images, "put", lambda *given: (written.append(str(given[2].dtype)), kept(*given)))
    assert preprocess.write_shards(tmp_path, ingested, config, [32, 32]) == counts
    assert written.count("uint8") == written.count("uint16") == sum(counts.values()) - 16
    finished = lesions.home / "run" / "preprocess"
    for file in (*finished.glob("masks-*.npy"), *finished.glob("t*.npy")):
        assert file.read_bytes() == (tmp_path / file.name).read_bytes()


def test_the_network_learns_to_find_the_lesions_and_the_gate_judges_dice(lesions: Lesions) -> None:
    train = TrainRecord.model_validate(read_result(lesions.run, "train").record)
    record = EvaluateRecord.model_validate(read_result(lesions.run, "evaluate").record)
    gate = GateRecord.model_validate(read_result(lesions.run, "gate").record)
    assert train.val_auc is None
    assert train.val_dice is not None
    assert train.val_dice > 0.3
    assert set(record.metrics) == {"dice", "hd95"}
    assert set(record.intervals["test"]) == {"dice", "hd95"}
    assert (gate.metric, gate.challenger) == ("dice", record.metrics["dice"])
    women = record.subgroups["sex"]["F"]
    assert set(women.metrics) <= {"dice", "hd95"}
    drawn = {Path(name).stem for name in record.pictures}
    assert drawn >= {"learning_curves", "dice", "errors", "data"}


def test_the_model_card_tells_dice_and_holds_no_image(lesions: Lesions) -> None:
    card = (lesions.home / "run" / "evaluate" / "model_card.md").read_text()
    assert "one of background, opacity for each pixel of an image" in card
    assert "| Dice | " in card
    assert "| Hausdorff 95 (mm) | " in card
    assert "![dice](dice.png)" in card
    assert "errors.png" not in card
    assert "Temperature" not in card


def test_the_predictor_answers_in_the_pixels_of_the_image_as_evaluation_measured_it(lesions: Lesions) -> None:
    predictor, folder = Predictor(lesions.bundle), lesions.home / "run"
    predictions = pd.read_parquet(folder / "evaluate" / "predictions.parquet").set_index("id")
    rows = shards.read_rows(folder / "preprocess", "test")
    for row, truth in zip(rows.itertuples(), read_masks(folder / "ingest", rows), strict=True):
        given = decode_one((phantoms(lesions) / str(row.id)).read_bytes(), None, DOMAIN, predictor.manifest.decoding)
        [answer] = predictor.answer([given]).predictions
        assert isinstance(answer, SegmentedPrediction)
        mask, region = segmentation.mask_of(answer), answer.regions["opacity"]
        assert mask.shape == truth.shape == (64, 64)
        measured = dice_and_hd95(truth, mask, 2, given.spacing)
        expected = predictions.loc[row.id, ["challenger_dice_1", "challenger_hd95_1"]].to_numpy(float)
        assert np.concatenate(measured) == pytest.approx(expected, nan_ok=True)
        assert given.spacing is not None
        assert (region.unit, region.area) == ("mm2", pytest.approx(mask.sum() * math.prod(given.spacing), abs=1e-3))
        assert (region.confidence is None) == (not mask.any())
        assert answer.label == ("opacity" if mask.any() else "background")
        assert sum(answer.scores.values()) == pytest.approx(1, abs=1e-5)
        assert set(answer.features) >= set(predictor.manifest.features)


def test_areas_are_pixels_where_no_spacing_is_known(lesions: Lesions) -> None:
    predictor = Predictor(lesions.bundle)
    image = np.random.default_rng(7).integers(0, 65536, (50, 41)).astype(np.uint16)
    [answer] = predictor.answer([Decoded(image)]).predictions
    assert isinstance(answer, SegmentedPrediction)
    mask = segmentation.mask_of(answer)
    assert mask.shape == (50, 41)
    assert answer.regions["opacity"].unit == "pixels"
    assert answer.regions["opacity"].area == mask.sum()
    again = SegmentedPrediction.model_validate_json(answer.model_dump_json())
    assert np.array_equal(segmentation.mask_of(again), mask)


def test_the_bundle_has_a_reference_for_drift_that_answers_can_be_held_against(lesions: Lesions) -> None:
    reference, manifest = lesions.bundle.reference(), lesions.bundle.manifest
    assert set(reference) == set(manifest.features)
    assert {"score", "entropy", "foreground", "embedding_0"} <= set(reference)
    assert reference["foreground"].between(0, 1).all()
    predictor, rows = Predictor(lesions.bundle), shards.read_rows(lesions.home / "run" / "preprocess", "val")
    given = decode_one((phantoms(lesions) / str(rows["id"][0])).read_bytes(), None, DOMAIN, manifest.decoding)
    served = predictor.answer([given]).predictions[0].features
    assert reference.iloc[0][["score", "entropy", "foreground"]].to_dict() == pytest.approx(
        {name: served[name] for name in ("score", "entropy", "foreground")}, abs=1e-5
    )
    assert manifest.task == "segmentation"
    assert "task" not in manifest.model_dump(), "a bundle says it by its model"


def test_golden_studies_hold_the_masks_that_an_endpoint_must_answer(lesions: Lesions, home: Path) -> None:
    shutil.copytree(lesions.home / "run", home / "run")
    bundle = lesions.bundle
    names = {"model_name": "lesions", "model_version": 1, "mlflow_run_id": "0"}
    record = RegisterRecord(summary="", bundle=bundle.path.as_uri(), bundle_digest=bundle.digest, **names)
    result = Result(stage="register", run="", inputs_digest="", seconds=0, record=record.model_dump(mode="json"))
    (home / "run" / "register").mkdir()
    (home / "run" / "register" / "result.json").write_text(result.model_dump_json())
    config = lesions.config.model_copy(update={"storage": (home / "storage").as_uri()})
    studies = golden.studies(Stage("verify", config, (home / "run").as_uri(), home), bundle.digest)
    assert len(studies) == 8
    with TestClient(create_app(bundle.path, ServingSettings(threads=1))) as endpoint:
        for study in studies:
            answer = endpoint.post("/invocations", content=study.body, headers={"content-type": study.content_type})
            assert golden.require_answer(study, 1, answer.content, [], 0.001) <= 0.001, "by another engine"
    mask = segmentation.decoded(study.mask)
    mask[0, :4] ^= 1
    body = {"predictions": [answer.json()["predictions"][0] | {"mask": segmentation.encoded(mask)}]}
    assert golden.require_answer(study, 1, json.dumps(body).encode(), [], 0.001) == pytest.approx(4 / mask.size, abs=1e-3)
    with pytest.raises(DataError, match=r"golden study 1: the endpoint answers 0\.0\d+ of the pixels with another class"):
        golden.require_answer(study, 1, json.dumps(body).encode(), [], 0.0001)
    for text in (segmentation.encoded(mask[1:]), "no PNG", ""):
        body = {"predictions": [{"mask": text}]}
        with pytest.raises(DataError, match="golden study 1: the answer holds no mask of 64 x 64 pixels"):
            golden.require_answer(study, 1, json.dumps(body).encode(), [], 0.001)


def test_an_explanation_of_a_mask_is_refused_in_words(lesions: Lesions) -> None:
    from cv_factory_ops.config.explanations import GradCam

    explainer = Explainer(Predictor(lesions.bundle))
    with pytest.raises(ConfigError, match="a segmentation shows by its mask where it sees what"):
        explainer.answer([Decoded(np.full((32, 32), 9, np.uint16))], GradCam())
