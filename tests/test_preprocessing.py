"""Declared steps, shards that go on where they stopped, augmentation with mixed labels, embedders and their state."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch.nn import functional

from cv_factory_ops import stage as stages
from cv_factory_ops import storage
from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config import load
from cv_factory_ops.config.data import Decoding
from cv_factory_ops.config.embeddings import Embedding
from cv_factory_ops.config.models import SmallCnn
from cv_factory_ops.config.preprocessing import PreprocessingConfig, Step
from cv_factory_ops.config.training import AugmentConfig
from cv_factory_ops.domain import Decoded, to_uint16
from cv_factory_ops.errors import ConfigError, DataError, Rejected
from cv_factory_ops.ingestion.decode import as_unit_range, instances
from cv_factory_ops.ingestion.manifest import Row, write_manifest
from cv_factory_ops.ingestion.pixels import PixelWriter, Place, pixel_digest
from cv_factory_ops.models import build
from cv_factory_ops.predictor import Predictor, infer
from cv_factory_ops.preprocessing import preprocess, shards
from cv_factory_ops.preprocessing.embedders import fit_embedder, load_embedder
from cv_factory_ops.preprocessing.pipeline import prepare, to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.preprocessing.statistics import image_statistics
from cv_factory_ops.records import IngestRecord, PreprocessRecord, Result
from cv_factory_ops.stage import run_stage
from cv_factory_ops.training.data import Shard, augment, mix
from cv_factory_ops.training.objectives import cross_entropy
from cv_factory_ops.training.release import fit_pca

Project = Callable[..., Path]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Networks this small only wait for one another's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(size: int, *steps: dict[str, Any]) -> PreprocessingConfig:
    return PreprocessingConfig(size=size, steps=TypeAdapter(list[Step]).validate_python(steps))


def noise(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def blobs(count: int, size: int, channels: int = 1, seed: int = 0) -> NDArray[np.uint16]:
    """Prepared images with structure that keypoints are found in."""
    generator = np.random.default_rng(seed)
    shape = (count, size, size, 3) if channels == 3 else (count, size, size)
    images = generator.random(shape, dtype=np.float32) * 0.1
    for image in images:
        for _ in range(12):
            center = tuple(int(v) for v in generator.integers(4, size - 4, 2))
            color = [float(v) for v in generator.random(channels)]
            cv2.circle(image, center, int(generator.integers(2, size // 6)), color, -1)
    return to_uint16(np.clip(images, 0, 1))


# --- steps -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (32, 32), (20, 10)])
def test_by_default_an_image_is_padded_to_a_square_and_resized(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    side = max(shape)
    top, left = (side - shape[0]) // 2, (side - shape[1]) // 2
    square = np.zeros((side, side), np.float32)
    square[top : top + shape[0], left : left + shape[1]] = to_uint16(image) / np.float32(65535)
    expected = cv2.resize(square, (32, 32), interpolation=cv2.INTER_AREA if side > 32 else cv2.INTER_LINEAR)
    assert np.abs(prepare(image, PreprocessingConfig(size=32)) - np.clip(expected, 0, 1) * 65535).max() < 0.6


def test_steps_are_done_in_their_order() -> None:
    """Resample to 0.5 mm, centre-crop 300 pixels, pad to a square, resize to 224."""
    steps = config(224, {"kind": "spacing", "mm": 0.5}, {"kind": "crop", "pixels": 300}, {"kind": "pad"})
    image = np.zeros((200, 400), np.float32)  # at 1 mm and 0.25 mm: 200 mm high, 100 mm wide
    image[50:150] = 1
    prepared = prepare(image, steps, (1.0, 0.25))
    content = prepared.max(0) > 0
    assert content.sum() == pytest.approx(224 * 200 / 300, abs=2)  # 200 of 300 columns are the image, the rest is border
    assert (prepared[:, 112] > 32768).sum() == pytest.approx(224 * 200 / 300, abs=2)  # 100 mm of 150 mm are white


def test_a_disc_stays_round_whatever_the_spacing() -> None:
    def disc(spacing: tuple[float, float]) -> NDArray[np.uint16]:
        rows, columns = (np.arange(round(100 / s)) * s - 50 for s in spacing)
        image = (np.hypot(*np.meshgrid(rows, columns, indexing="ij")) < 30).astype(np.float32)
        return prepare(image, config(100, {"kind": "spacing", "mm": 1.0}, {"kind": "crop", "mm": 100.0}), spacing)

    areas = [float((disc(spacing) > 32768).mean()) for spacing in [(1.0, 1.0), (0.5, 1.0), (0.4, 0.25)]]
    assert areas == pytest.approx([np.pi * 0.3**2] * 3, abs=0.01)


@pytest.mark.parametrize("step", [{"kind": "spacing", "mm": 1}, {"kind": "crop", "mm": 50}, {"kind": "pad", "mm": 50}])
def test_an_unknown_spacing_is_refused_where_it_is_needed(step: dict[str, Any]) -> None:
    with pytest.raises(Rejected, match="no pixel spacing") as refused:
        prepare(noise(20, 20), config(16, step))
    assert refused.value.code == "no_spacing"


def test_a_wrong_spacing_does_not_take_all_memory() -> None:
    with pytest.raises(Rejected, match="would become 2000000 x 2000000 pixels"):
        prepare(noise(20, 20), config(16, {"kind": "spacing", "mm": 0.0001}), (10.0, 10.0))


def test_a_resize_changes_the_spacing_that_later_steps_see() -> None:
    image = noise(100, 100)
    by_mm = prepare(image, config(32, {"kind": "resize", "pixels": 50}, {"kind": "crop", "mm": 20}), (1.0, 1.0))
    by_pixels = prepare(image, config(32, {"kind": "resize", "pixels": 50}, {"kind": "crop", "pixels": 10}))
    assert (by_mm == by_pixels).all()


def test_a_declared_range_becomes_0_to_1_and_is_checked() -> None:
    image = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    clipped = prepare(image, config(8, {"kind": "normalise", "low": 0.25, "high": 0.75})) / 65535
    assert clipped == pytest.approx(np.clip((image - 0.25) / 0.5, 0, 1), abs=1e-4)
    with pytest.raises(Rejected, match=r"outside of the declared range 0.25\.\.0.75") as refused:
        prepare(image, config(8, {"kind": "normalise", "low": 0.25, "high": 0.75, "outside": "refuse"}))
    assert refused.value.code == "intensity_range"


def test_quantiles_become_0_and_1() -> None:
    image = noise(32, 32) * 0.5 + 0.25
    image[0, 0], image[0, 1] = 0, 1  # outliers
    prepared = prepare(image, config(32, {"kind": "clip", "lower": 0.01, "upper": 0.99}))
    assert prepared.min() == 0
    assert prepared.max() == 65535
    assert 8 <= (prepared == 65535).sum() <= 12
    low, high = np.quantile(image, [0.01, 0.99])
    assert prepared / 65535 == pytest.approx(np.clip((image - low) / (high - low), 0, 1), abs=1e-4)


def test_equalisation_raises_the_contrast_of_a_flat_image_also_in_color() -> None:
    flat = 0.45 + noise(64, 64) * 0.1
    steps = config(64, {"kind": "equalise"})
    assert prepare(flat, steps).std() > 1.5 * prepare(flat, config(64)).std()
    colors = np.stack([flat, flat, flat], axis=2)
    assert prepare(colors, steps).std() > 1.5 * prepare(colors, config(64)).std()


@pytest.mark.parametrize("space", ["hsv", "lab", "ycrcb"])
def test_color_spaces_are_those_of_scikit_image(space: str) -> None:
    from skimage import color

    image = to_uint16(noise(16, 16, 3)) / np.float32(65535)
    expected = {
        "hsv": lambda: color.rgb2hsv(image),
        "lab": lambda: (color.rgb2lab(image) + np.array([0, 127, 127])) / np.array([100, 254, 254]),
        "ycrcb": lambda: np.stack(
            [
                image @ [0.299, 0.587, 0.114],
                (image[..., 0] - image @ [0.299, 0.587, 0.114]) * 0.713 + 0.5,
                (image[..., 2] - image @ [0.299, 0.587, 0.114]) * 0.564 + 0.5,
            ],
            axis=2,
        ),
    }[space]()
    prepared = prepare(image, config(16, {"kind": "color", "space": space})) / 65535
    assert prepared == pytest.approx(np.clip(expected, 0, 1), abs=0.01)


def test_three_channels_stay_three() -> None:
    image = noise(40, 30, 3)
    steps = config(
        16,
        {"kind": "clip"},
        {"kind": "resize", "pixels": 20, "side": "longer"},
        {"kind": "crop", "pixels": 18},
        {"kind": "pad"},
    )
    assert prepare(image, steps).shape == (16, 16, 3)
    assert to_tensor(np.stack([prepare(image, steps)])).shape == (1, 3, 16, 16)
    grey = np.repeat(noise(20, 20)[:, :, None], 3, axis=2)
    of_color, of_grey = image_statistics(prepare(grey, config(20))), image_statistics(prepare(grey[:, :, 0], config(20)))
    assert of_color == pytest.approx(of_grey, abs=1e-3)


@pytest.mark.parametrize("shape", [(7, 9), (1, 1), (40, 50, 3)])
def test_quantiles_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    levels = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    found = image_statistics(levels)
    expected = np.quantile(as_unit_range(levels).astype(np.float64), [0.05, 0.95])
    assert [found["p05"], found["p95"]] == pytest.approx(expected, abs=1e-5 if len(shape) == 3 else 1e-7)


def test_serving_prepares_what_training_has_stored() -> None:
    image = noise(50, 70)
    steps = config(32, {"kind": "clip"}, {"kind": "pad"})
    assert (prepare(image, steps) == prepare(to_uint16(image), steps)).all()


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"preprocessing": {"steps": [{"kind": "sharpen"}]}}, "steps.0.kind: 'sharpen' given; allowed: 'color'"),
        ({"preprocessing": {"steps": [{"kind": "crop"}]}}, "either pixels or mm"),
        ({"preprocessing": {"steps": [{"kind": "color", "space": "lab"}]}}, "needs decoding.color: rgb"),
        ({"preprocessing": {"steps": [{"kind": "normalise", "low": 0.9, "high": 0.1}]}}, "low below high"),
        ({"embedding": {"kind": "masked_image", "patch": 12}}, "a multiple of embedding.patch 12"),
        ({"embedding": {"kind": "hog", "cells": 32}}, "at least 64 for embedding.cells"),
        ({"embedding": {"kind": "word2vec"}}, "'word2vec' given; allowed: 'model'"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(project: Project, sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as wrong:
        load(project(**sections))
    assert said in str(wrong.value)
    assert len(str(wrong.value).splitlines()) == 1


# --- shards ----------------------------------------------------------------------------------------------------------------


def ingested(
    folder: Path,
    count: int,
    *,
    channels: int = 1,
    spacing: float | None = 1.0,
    splits: Sequence[str] = ("train", "train", "val", "test"),
    size: int = 24,
) -> None:
    """What an ``ingest`` stage publishes, in two files as two processes write them."""
    folder.mkdir(parents=True)
    rows = []
    with PixelWriter(folder / "pixels-0.bin") as one, PixelWriter(folder / "pixels-1.bin") as two:
        for i in range(count):
            shape = (size, size + i % 3) if channels == 1 else (size, size + i % 3, 3)
            pixels = to_uint16(noise(*shape, seed=i))
            place: Place = [one, two][i % 2].append(pixels)
            row = Row(
                id=f"image-{(i * 7919) % count:05d}-{i}",
                patient=f"p{i}",
                study="",
                instance="",
                label=(i // len(splits)) % 2,
                split=splits[i % len(splits)],
                source="base",
                review="",
                digest=pixel_digest(pixels),
                rows=shape[0],
                columns=shape[1],
                channels=channels,
                row_spacing=spacing,
                column_spacing=spacing,
                place=place,
                metadata={},
            )
            rows.append(row)
    write_manifest(folder, rows, {})
    record = IngestRecord(
        summary="made by a test", accepted=count, quarantined=0, quarantine_reasons={}, to_review=0, splits={}, captured=0,
        data_digest="d", test_digest="t",
    )  # fmt: skip
    result = Result(stage="ingest", run=folder.parent.as_uri(), inputs_digest="", seconds=0, record=record.model_dump())
    (folder / "result.json").write_text(result.model_dump_json())


def preprocessed(path: Path, run: Path) -> PreprocessRecord:
    return PreprocessRecord.model_validate(run_stage("preprocess", load(path), run.as_uri()).record)


@pytest.mark.parametrize("channels", [1, 3])
def test_shards_of_limited_size_read_as_one_array(
    project: Project, home: Path, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 10 * 16 * 16 * 2 * channels)
    ingested(home / "run" / "ingest", 90, channels=channels)
    path = project(preprocessing={"size": 16}, decoding={"color": "rgb" if channels == 3 else "grey"})
    record = preprocessed(path, home / "run")
    folder = home / "run" / "preprocess"
    assert sorted(item.name for item in folder.glob("train*")) == [*(f"train-{i:05d}.npy" for i in range(5)), "train.parquet"]
    whole = np.concatenate([np.load(folder / f"train-{i:05d}.npy") for i in range(5)])
    images = Shard.open(folder, "train").images
    assert len(images) == record.counts["train"] == 46
    assert images.shape == whole.shape
    for key in (0, -1, 9, 10, 45, slice(0, 10), slice(5, 25), slice(40, None), slice(None), slice(3, 40, 7), slice(9, 9)):
        assert np.array_equal(images[key], whole[key]), key
    order = np.random.default_rng(0).permutation(46)
    assert np.array_equal(images[order], whole[order])
    for step in (1, 3, 10, 30):
        assert np.array_equal(images.every(step)[:], whole[::step])
    assert images[slice(10, 20)].base is not None  # a view
    assert Shard.open(folder, "train").batch(order)[0].shape == (46, channels, 16, 16)
    assert record.mean == pytest.approx(whole.mean() / 65535)
    assert record.std == pytest.approx(whole.std() / 65535)


def test_what_was_changed_since_is_found(project: Project, home: Path) -> None:
    ingested(home / "run" / "ingest", 40)
    preprocessed(project(), home / "run")
    folder = home / "run" / "preprocess"
    shards.verify(folder)
    images = np.load(folder / "val-00000.npy", mmap_mode="r+")
    images[3, 4, 5] += 1
    images.flush()
    with pytest.raises(DataError, match=r"val-00000.npy: is not what was written.*run `cvf preprocess --force`"):
        shards.verify(folder)
    with (folder / "val-00000.npy").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"val-00000.npy: has \d+ bytes, not \d+"):
        Shard.open(folder, "val")
    (folder / "val-00000.npy").unlink()
    with pytest.raises(DataError, match=r"val-00000.npy: is missing"):
        Shard.open(folder, "val")
    (folder / "shards.json").unlink()
    with pytest.raises(DataError, match=r"shards.json: is not an index of shards"):
        Shard.open(folder, "train")


KILLED = """
import os, signal, sys, threading
from cv_factory_ops.preprocessing import preprocess
preprocess.JOURNAL_SECONDS = 0.0
lock, left, original = threading.Lock(), [300], preprocess.prepare
def prepare(*arguments):
    with lock:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.{signal})
    return original(*arguments)
preprocess.prepare = prepare
from cv_factory_ops.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_an_interrupted_preprocessing_goes_on_and_ends_with_the_same_shards(
    project: Project, home: Path, name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for run in ("one", "two"):
        ingested(home / run / "ingest", 640)
    path = project(preprocessing={"size": 64})
    undisturbed = preprocessed(path, home / "one")
    code = KILLED.replace("{signal}", name)
    command = [sys.executable, "-c", code, "preprocess", "--config", path, "--run", home / "two"]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == {"SIGKILL": -signal.SIGKILL, "SIGTERM": 75}[name], killed.stderr
    assert not (home / "two" / "preprocess").exists()
    done = len((home / "two" / ".preprocess.work" / ".done").read_text().splitlines())
    assert 1 <= done < 10
    repeated = []
    original = preprocess.prepare
    monkeypatch.setattr(preprocess, "prepare", lambda *given: repeated.append(1) or original(*given))
    caplog.set_level("INFO", logger="cvf")
    again = preprocessed(path, home / "two")
    assert f"preprocess: going on, {done} of 10 groups of images are done" in caplog.text
    assert len(repeated) == 640 - 64 * done
    assert again == undisturbed
    assert not (home / "two" / ".preprocess.work").exists()
    assert {item.name for item in (home / "two" / "preprocess").iterdir()} == {
        *("shards.json", "result.json"),
        *(f"{split}{end}" for split in ("train", "val", "test") for end in (".parquet", "-00000.npy")),
    }


def test_other_settings_start_clean(project: Project, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    ingested(home / "run" / "ingest", 640)
    command = [sys.executable, "-c", KILLED.replace("{signal}", "SIGKILL"), "preprocess", "--run", home / "run", "--config"]
    subprocess.run([*command, project(preprocessing={"size": 64})], capture_output=True)
    assert (home / "run" / ".preprocess.work" / ".done").exists()
    caplog.set_level("INFO", logger="cvf")
    record = preprocessed(project(preprocessing={"size": 32}), home / "run")
    assert "going on" not in caplog.text
    assert "32 x 32" in record.summary


def test_a_stage_that_does_not_resume_starts_clean() -> None:
    assert [name for name, spec in stages.STAGES.items() if spec.resumes] == ["preprocess", "predict"]


def test_images_without_spacing_end_a_preprocessing_that_needs_it(project: Project, home: Path) -> None:
    ingested(home / "run" / "ingest", 40, spacing=None)
    path = project(preprocessing={"size": 16, "steps": [{"kind": "spacing", "mm": 0.5}]})
    command = [sys.executable, "-m", "cv_factory_ops.cli", "preprocess", "--config", path, "--run", home / "run"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 3
    (line,) = failed.stderr.splitlines()
    assert "40 images cannot be prepared (no_spacing): image-" in line
    assert "data.validation.required: [spacing] keeps such images out" in line
    assert not (home / "run" / ".preprocess.work").exists()


@pytest.mark.parametrize("column", ["patient", "digest"])
def test_training_refuses_shards_with_leakage(project: Project, home: Path, column: str) -> None:
    ingested(home / "run" / "ingest", 40)
    path = project()
    preprocessed(path, home / "run")
    folder = home / "run" / "preprocess"
    train, val = (pd.read_parquet(folder / f"{split}.parquet") for split in ("train", "val"))
    val.loc[2, column] = train.loc[5, column]
    val.to_parquet(folder / "val.parquet", index=False)
    command = [sys.executable, "-m", "cv_factory_ops.cli", "train", "--config", path, "--run", home / "run"]
    failed = subprocess.run(command, capture_output=True, text=True)
    assert failed.returncode == 3, failed.stderr
    (line,) = failed.stderr.splitlines()
    assert "more than one split" in line
    named = [train.loc[5, "patient"]] if column == "patient" else [train.loc[5, "id"], val.loc[2, "id"]]
    assert all(name in line for name in named)


# --- augmentation ----------------------------------------------------------------------------------------------------------


def test_rotation_by_a_quarter_is_a_quarter_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.rand(3, 2, 16, 16)
    monkeypatch.setattr(torch, "rand", lambda *shape, device=None: torch.ones(shape))  # the largest angle
    turned = augment(images, AugmentConfig(rotate=90, flip=False, shift=0, intensity=0))
    assert torch.allclose(turned, torch.rot90(images, 1, (2, 3)), atol=1e-4) or torch.allclose(
        turned, torch.rot90(images, -1, (2, 3)), atol=1e-4
    )


def test_rotation_keeps_a_disc_of_an_oblong_image_round() -> None:
    rows, columns = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(80.0) - 39.5, indexing="ij")
    disc = (torch.hypot(rows, columns) < 15).float()[None, None].expand(8, 1, 40, 80)
    turned = augment(disc, AugmentConfig(rotate=180, flip=False, shift=0, intensity=0))
    assert float((turned - disc).abs().mean()) < 0.01


def test_shift_takes_all_channels_along() -> None:
    grey = torch.rand(5, 1, 12, 12)
    torch.manual_seed(0)
    shifted = augment(grey.expand(-1, 3, -1, -1), AugmentConfig(shift=0.3, intensity=0))
    assert torch.equal(shifted[:, 0], shifted[:, 2])
    torch.manual_seed(0)
    assert torch.equal(shifted[:, :1], augment(grey, AugmentConfig(shift=0.3, intensity=0)))


@pytest.mark.parametrize("given", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_mixed_as_the_images_are(given: dict[str, float]) -> None:
    """Each image is all of its label's intensity, so its mean says how it was mixed."""
    labels = torch.arange(32) % 3
    images = (labels / 2.0)[:, None, None, None].expand(32, 2, 20, 24).clone()
    torch.manual_seed(0)
    mixed, shares = mix(images, labels, 3, AugmentConfig(**given))
    assert mixed.shape == images.shape
    assert torch.allclose(shares.sum(1), torch.ones(32))
    assert torch.allclose(mixed.mean((1, 2, 3)), shares @ torch.tensor([0.0, 0.5, 1.0]), atol=1e-5)
    assert int(((shares > 0).sum(1) == 2).sum()) > 0
    torch.manual_seed(0)
    assert torch.equal(mix(images, labels, 3, AugmentConfig(**given))[0], mixed)


def test_cutmix_pastes_a_box() -> None:
    images = torch.stack([torch.zeros(1, 30, 30), torch.ones(1, 30, 30)])
    torch.manual_seed(3)
    seen = 0
    for _ in range(20):
        mixed, shares = mix(images, torch.tensor([0, 1]), 2, AugmentConfig(cutmix=1.0))
        pasted = (mixed != images)[0, 0]
        if pasted.any():
            rows, columns = pasted.any(1).nonzero(), pasted.any(0).nonzero()
            assert int(pasted.sum()) == (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1)
            assert float(shares[0, 1]) == pytest.approx(float(pasted.float().mean()))
            seen += 1
    assert seen > 3


def test_without_mixing_labels_stay_labels() -> None:
    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    assert mix(images, labels, 4, AugmentConfig()) == (images, labels)


@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_share_of_1_costs_what_the_label_costs(weights: torch.Tensor | None, smoothing: float) -> None:
    logits, labels = torch.randn(16, 3), torch.arange(16) % 3
    as_label = functional.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    shares = functional.one_hot(labels, 3).float()
    assert torch.allclose(cross_entropy(logits, labels, weights, smoothing), as_label)
    assert torch.allclose(cross_entropy(logits, shares, weights, smoothing), as_label)


# --- embedders -------------------------------------------------------------------------------------------------------------


def weights(home: Path, kind: str, channels: int = 1) -> None:
    """Weights of a network that was learned elsewhere, as a safetensors file."""
    from monai.networks import nets
    from safetensors.torch import save_file

    torch.manual_seed(0)
    if kind not in {"cnn", "vit"}:
        return
    if kind == "cnn":
        network = nets.resnet10(spatial_dims=2, n_input_channels=channels, num_classes=5, shortcut_type="B")
    else:
        network = nets.ViT(channels, 64, 16, 48, 192, 2, 3, spatial_dims=2)
    save_file(network.state_dict(), home / f"{kind}.safetensors")


SETTINGS: dict[str, dict[str, Any]] = {
    "model": {},
    "hog": {"cells": 6},
    "orb": {"words": 16},
    "sift": {"words": 16},
    "cnn": {"depth": 10, "weights": "cnn.safetensors"},
    "vit": {"width": 48, "layers": 2, "weights": "vit.safetensors"},
    "masked_image": {"width": 24, "layers": 2, "epochs": 2, "batch_size": 16},
}


def embedding(kind: str) -> Embedding:
    adapter: TypeAdapter[Embedding] = TypeAdapter(Embedding)
    return adapter.validate_python({"kind": kind, **SETTINGS[kind]})


def manifest_of(settings: Embedding, channels: int) -> BundleManifest:
    return BundleManifest(
        project="tiny", domain="medical", labels=["a", "b"], model=SmallCnn(width=4), mean=0.5, std=0.25, threshold=0.5,
        decoding=Decoding(color="rgb" if channels == 3 else "grey"), preprocessing=PreprocessingConfig(size=64),
        embedding=settings, features={"score": "number"}, data_digest="d", test_digest="t", code_version="0", git_sha="",
    )  # fmt: skip


FRESH = """
import sys, numpy as np, torch
from pathlib import Path
from cv_factory_ops.bundle import Bundle
from cv_factory_ops.predictor import Predictor
torch.set_num_threads(1)
folder = Path(sys.argv[1])
images = np.load(folder / "images.npy")
for kind in sys.argv[2:]:
    predictor = Predictor(Bundle.load(folder / kind))
    vectors = predictor.forward(images)[1]
    np.savez(folder / f"{kind}.npz", vectors=vectors, components=predictor._pca.transform(vectors))
    print(kind, *sorted({"sklearn", "skimage", "monai"} & {name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize("channels", [1, 3])
def test_a_bundle_embeds_bit_by_bit_as_training_did(home: Path, channels: int) -> None:
    """In a process that has seen nothing but the bundle, with the same batch; without heavy libraries where none is needed."""
    train, held_out, expected = Images([blobs(48, 64, channels)]), blobs(20, 64, channels, seed=1), {}
    network = build(SmallCnn(width=4), 2, 0.5, 0.25, channels).eval()
    for kind in SETTINGS:
        weights(home, kind, channels)
        embedder = fit_embedder(embedding(kind), train)
        pca = fit_pca(infer(network, train, embedder)[1], 4)
        table = pd.DataFrame({"score": [0.5]})
        Bundle.write(home / kind, manifest_of(embedding(kind), channels), network, pca, table, embedder)
        vectors = infer(network, held_out, embedder)[1]
        assert len(np.unique(vectors.round(4), axis=0)) > 15, kind  # it tells images apart
        expected[kind] = vectors, pca.transform(vectors)
        if kind in {"hog", "orb", "sift"}:
            alone = np.concatenate([infer(network, held_out[i : i + 1], embedder)[1] for i in range(20)])
            assert alone.tobytes() == vectors.tobytes()
    np.save(home / "images.npy", held_out)
    order = ["model", "orb", "sift", "hog", "cnn", "vit", "masked_image"]
    answered = subprocess.run([sys.executable, "-c", FRESH, home, *order], check=True, capture_output=True, text=True)
    for kind, (vectors, components) in expected.items():
        with np.load(home / f"{kind}.npz") as found:
            assert found["vectors"].tobytes() == vectors.tobytes(), kind
            assert found["components"].tobytes() == components.tobytes(), kind
    assert answered.stdout.splitlines()[:4] == ["model", "orb", "sift", "hog skimage"]


def test_components_do_not_depend_on_the_batch() -> None:
    data = noise(300, 64)
    pca = fit_pca(data, 8)
    assert pca.transform(data).tobytes() == b"".join(pca.transform(data[i : i + 1]).tobytes() for i in range(300))


def test_another_state_of_the_embedder_is_another_bundle(home: Path) -> None:
    digests = []
    for seed in (0, 1):
        embedder = fit_embedder(embedding("orb"), Images([blobs(48, 64, seed=seed)]))
        assert embedder is not None
        path, manifest = home / str(seed), manifest_of(embedding("orb"), 1)
        torch.manual_seed(0)
        network = build(SmallCnn(width=4), 2)
        pca = fit_pca(noise(8, 16), 2)
        digests.append(Bundle.write(path, manifest, network, pca, pd.DataFrame({"score": [0.5]}), embedder).digest)
    assert digests[0] != digests[1]
    assert storage.sha256(home / "0" / "pca.npz") == storage.sha256(home / "1" / "pca.npz")


@pytest.mark.parametrize("kind", ["orb", "sift"])
def test_images_of_one_texture_have_like_words(kind: str) -> None:
    rows, columns = np.mgrid[:64, :64]

    def dots(seed: int) -> NDArray[np.float32]:
        image = noise(64, 64, seed=seed) * 0.1
        for row, column in np.random.default_rng(seed).integers(8, 56, (12, 2)):
            image += np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / 8)
        return np.clip(image, 0, 1)

    def checks(seed: int) -> NDArray[np.float32]:
        return np.clip(((rows // 8 + columns // 8 + seed) % 2) * 0.8 + noise(64, 64, seed=seed) * 0.1, 0, 1)

    images = to_uint16(np.stack([make(seed) for make in (dots, checks) for seed in range(20)]))
    embedder = fit_embedder(embedding(kind), Images([images]))
    assert embedder is not None
    likeness = embedder.embed(images) @ embedder.embed(images).T
    same = (likeness[:20, :20].mean() + likeness[20:, 20:].mean()) / 2
    assert same > likeness[:20, 20:].mean() + 0.2


def test_an_image_without_keypoints_is_zeros_and_too_few_of_them_are_an_error() -> None:
    embedder = fit_embedder(embedding("sift"), Images([blobs(48, 64)]))
    assert embedder is not None
    assert not embedder.embed(np.full((2, 64, 64), 30000, np.uint16)).any()
    with pytest.raises(DataError, match="0 keypoints found in 9 training images; 16 words need at least as many"):
        fit_embedder(embedding("sift"), Images([np.zeros((9, 64, 64), np.uint16)]))


def test_weights_that_do_not_fit_are_said_in_one_line(home: Path) -> None:
    train = Images([blobs(4, 64)])
    weights(home, "vit")
    wrong: TypeAdapter[Embedding] = TypeAdapter(Embedding)
    with pytest.raises(DataError, match="the weights do not fit") as refused:
        fit_embedder(wrong.validate_python({"kind": "vit", "weights": "vit.safetensors", "width": 96}), train)
    assert len(str(refused.value)) < 400
    (home / "cnn.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"cnn.safetensors: is not a safetensors file"):
        fit_embedder(embedding("cnn"), train)
    with pytest.raises(DataError, match=r"conv1.weight is missing"):
        load_embedder(embedding("cnn"), {}, 64)


def test_grey_images_go_through_a_network_of_three_channels(home: Path) -> None:
    weights(home, "cnn", channels=3)
    embedder = fit_embedder(embedding("cnn"), Images([blobs(4, 64)]))
    assert embedder is not None
    assert embedder.embed(blobs(4, 64)).shape == (4, 512)


def test_learning_to_paint_gets_better_and_leaves_the_generator_alone(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="cvf")
    settings: TypeAdapter[Embedding] = TypeAdapter(Embedding)
    config = settings.validate_python(
        {"kind": "masked_image", "patch": 8, "width": 48, "layers": 2, "epochs": 12, "batch_size": 16, "learning_rate": 3e-3}
    )
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = fit_embedder(config, Images([blobs(64, 32)]))
    assert torch.equal(torch.rand(3), expected)
    losses = [float(record.args[2]) for record in caplog.records if record.msg.startswith("embedding: epoch")]  # type: ignore[index]
    assert len(losses) == 12
    assert losses[-1] < 0.95 * losses[0]
    short = config.model_copy(update={"epochs": 2})
    two, three = (fit_embedder(short, Images([blobs(32, 32)])) for _ in range(2))
    assert one is not None
    assert two is not None
    assert three is not None
    assert all(np.array_equal(two.state[name], three.state[name]) for name in one.state)


# --- all of it -------------------------------------------------------------------------------------------------------------


def test_colors_spacing_mixing_and_embedding_from_shards_to_an_answer(project: Project, home: Path) -> None:
    ingested(home / "run" / "ingest", 96, channels=3)
    path = project(
        decoding={"color": "rgb"},
        preprocessing={"size": 16, "steps": [{"kind": "spacing", "mm": 1.5}, {"kind": "pad"}]},
        training={
            "epochs": 1, "batch_size": 8, "processes_per_node": 1, "label_smoothing": 0.1, "class_weights": True,
            "augment": {"rotate": 20, "mixup": 0.2, "cutmix": 1.0},
        },
        embedding={"kind": "hog", "cells": 4},
    )  # fmt: skip
    preprocessed(path, home / "run")
    run_stage("train", load(path), (home / "run").as_uri())
    bundle = Bundle.load(home / "run" / "train" / "bundle")
    assert bundle.manifest.channels == 3
    predictor = Predictor(bundle)
    predictor.warm_up()
    (answer,) = predictor.answer([Decoded(to_uint16(noise(30, 20, 3)), spacing=(1.0, 1.0))]).predictions
    assert f"embedding_{7}" in answer.features
    request = {"instances": [noise(30, 20, 3).tolist(), noise(9, 9).tolist()], "spacing": [1, 1]}
    of_request = predictor.answer(instances(json.dumps(request).encode(), bundle.manifest.decoding)).predictions
    assert of_request[0] == answer
    assert len(of_request) == 2
    with pytest.raises(Rejected, match="no pixel spacing"):
        predictor.answer([Decoded(to_uint16(noise(30, 20, 3)))])
    with pytest.raises(Rejected, match="has 1 channels; the model takes 3"):
        predictor.answer([Decoded(to_uint16(noise(30, 20)), spacing=(1.0, 1.0))])
    assert json.loads((bundle.path / "bundle.json").read_text())["preprocessing"]["steps"][0]["mm"] == 1.5
