"""Maps against other definitions of them, what a map that means something scores, and explanations as they are asked for."""

import base64
import io
import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pydicom
import pytest
import torch
from numpy.typing import NDArray
from pydicom.data import get_testdata_file
from torch import Tensor, nn

from cv_factory_ops import cli, registry
from cv_factory_ops.bundle import Bundle, BundleManifest
from cv_factory_ops.config import load
from cv_factory_ops.config.explanations import (
    EXPLANATIONS,
    ExplanationMethod,
    ExplanationsConfig,
    GradCam,
    IntegratedGradients,
    Lime,
    Shap,
)
from cv_factory_ops.config.models import DenseNet, EfficientNet, EnsembleModel, Member, Model, ResNet, SmallCnn, Vit
from cv_factory_ops.domain import DeidentificationConfig, open_domain
from cv_factory_ops.errors import ConfigError, Rejected
from cv_factory_ops.evaluation.bootstrap import Judged
from cv_factory_ops.evaluation.explanation_gallery import choose, explanation_gallery
from cv_factory_ops.explanations import Faithfulness, explain, faithfulness, overlay, superpixels
from cv_factory_ops.models import Classifier, build, join
from cv_factory_ops.predictor import Answer
from cv_factory_ops.preprocessing.pipeline import to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.records import EvaluateRecord, TrainRecord
from cv_factory_ops.stage import read_result, run_stage
from domain_medical.secondary_capture import secondary_capture
from tests.bundles import IMAGE, free_port, npy, png, start_cvf, wait_until, write_bundle
from tests.test_serving import dicom, is_served

SIDE = 16
MANIFEST: dict[str, Any] = {
    **{"project": "p", "domain": "medical", "labels": ["normal", "opacity"], "model": {"kind": "small_cnn"}},
    **{"preprocessing": {"size": SIDE}, "mean": 0.0, "std": 1.0, "threshold": 0.5, "features": {}},
    **{"data_digest": "", "test_digest": "", "code_version": "", "git_sha": ""},
}
METHODS: list[ExplanationMethod] = [
    GradCam(),
    IntegratedGradients(),
    Lime(superpixels=16, samples=200),
    Shap(superpixels=16, samples=200),
]


def random_images(count: int, side: int = SIDE, channels: int = 1, seed: int = 0) -> NDArray[np.uint16]:
    """Smooth ones, so that superpixels have something to find."""
    generator = np.random.default_rng(seed)
    shape = (count, side, side) if channels == 1 else (count, side, side, channels)
    noise = generator.random(shape).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(image, (0, 0), 1.5) for image in noise])
    return np.rint(65535 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint16)


def network_of(kind: Model, classes: int = 3, channels: int = 1) -> Classifier:
    """For images of 64 x 64, where that matters."""
    torch.manual_seed(4)
    network = build(kind, classes, 0.45, 0.2, channels, 64).eval()
    with torch.no_grad():
        next(layer for layer in network.head.modules() if isinstance(layer, nn.Linear)).weight.mul_(30)
    return network


def log_odds(network: Classifier, images: Tensor, target: int) -> Tensor:
    probabilities = network(images)[0].double().softmax(1)[:, target]
    return (probabilities / (1 - probabilities)).log()


def linear(weights: NDArray[np.float32]) -> Classifier:
    """Two classes whose log-odds are the sum of weights times intensities."""
    head = nn.Linear(weights.size, 2, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.stack([torch.zeros(weights.size), torch.from_numpy(weights).flatten()]))
    return Classifier(SmallCnn(), nn.Flatten(), head, 2, 0.0, 1.0).eval()


class OneQuadrant(nn.Module):
    """Sees nothing outside of the upper right quadrant."""

    def forward(self, images: Tensor) -> Tensor:
        seen = torch.zeros_like(images)
        half = images.shape[2] // 2
        seen[:, :, :half, half:] = images[:, :, :half, half:]
        return seen


def looking_at_one_quadrant() -> Classifier:
    """Label 1 is where pixels of the upper right quadrant are brighter than 0.7."""
    convolution, head = nn.Conv2d(1, 1, 1), nn.Linear(1, 2)
    with torch.no_grad():
        convolution.weight.fill_(1)
        convolution.bias.fill_(-0.5)  # type: ignore[union-attr]
        head.weight.copy_(torch.tensor([[0.0], [400.0]]))
        head.bias.copy_(torch.tensor([3.0, 0.0]))
    backbone = nn.Sequential(OneQuadrant(), convolution, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Classifier(SmallCnn(), backbone, head, 2, 0.2, 1.0).eval()


def with_squares(count: int, seed: int = 0) -> NDArray[np.uint16]:
    """A bright square in each quadrant of a dark image."""
    generator = np.random.default_rng(seed)
    images = generator.normal(0.2, 0.02, (count, SIDE, SIDE))
    for image, row, column in itertools.product(images, (0, SIDE // 2), (0, SIDE // 2)):
        top, left = row + generator.integers(1, SIDE // 2 - 5), column + generator.integers(1, SIDE // 2 - 5)
        image[top : top + 4, left : left + 4] = 0.9
    return np.rint(65535 * images).astype(np.uint16)


def test_grad_cam_is_what_its_paper_defines() -> None:
    network, images = network_of(SmallCnn(width=4)), random_images(3, side=32)
    targets = np.array([0, 2, 1])
    maps = explain(network, images, GradCam(), targets)
    for image, target, found in zip(images, targets, maps, strict=True):
        standardised = (to_tensor(image[None]) - network.mean) / network.std
        features = network.backbone[:-3](standardised)  # type: ignore[index]
        logits = network.head(network.backbone[-3:](features))[0]  # type: ignore[index]
        others = torch.cat([logits[:target], logits[target + 1 :]])
        (gradient,) = torch.autograd.grad(logits[target] - others.logsumexp(0), features)
        weighted = (gradient.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
        expected = nn.functional.interpolate(weighted, (32, 32), mode="bilinear")[0, 0]
        np.testing.assert_allclose(found, (expected / expected.max()).detach(), atol=1e-5)
    assert maps.shape == (3, 32, 32)
    assert maps.dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        (ResNet(depth=10), "layer4"),
        (DenseNet(), "class_layers.relu"),
        (EfficientNet(), "_swish"),
        (Vit(patch=8, width=24, layers=2, heads=3), "blocks.1.norm1"),
    ],
    ids=lambda given: given if isinstance(given, str) else given.kind,
)
def test_grad_cam_looks_at_what_is_pooled_or_attended_to_last(kind: Model, layer: str) -> None:
    network, images, kept = network_of(kind), random_images(1, side=64), list[Tensor]()
    hook = network.backbone.get_submodule(layer).register_forward_hook(
        lambda module, given, made: kept.append(made.clone()) or kept[-1]
    )
    explained = log_odds(network, to_tensor(images), 1).sum()
    hook.remove()
    (gradient,) = torch.autograd.grad(explained, kept[-1])
    weights, features = gradient, kept[-1]
    if kind.kind == "vit":  # a class token comes first, then 8 x 8 patches
        weights, features = (each[:, 1:].mT.unflatten(2, (8, 8)) for each in (gradient, kept[-1]))
    weighted = (weights.mean((2, 3), keepdim=True) * features).sum(1, keepdim=True).relu()
    assert weighted.shape[2] > 1
    expected = nn.functional.interpolate(weighted, (64, 64), mode="bilinear")[0, 0]
    found = explain(network, images, GradCam(), np.array([1]))[0]
    np.testing.assert_allclose(found, (expected / expected.max()).detach(), atol=1e-4)


def test_grad_cam_of_an_ensemble_counts_each_member_by_what_it_adds() -> None:
    kinds = [Vit(patch=8, width=24, layers=1, heads=3), ResNet(depth=10)]
    weights, images = [0.75, 0.25], random_images(2, side=64)
    members = [network_of(kind) for kind in kinds]
    bias = [0.0] * members[0].classes
    joined = [Member(model=kind, temperature=1, bias=bias, weight=share) for kind, share in zip(kinds, weights, strict=True)]
    config = EnsembleModel(members=joined)
    found = explain(join(config, members).eval(), images, GradCam(), np.array([0, 0]))
    alone = [explain(member, images, GradCam(), np.array([0, 0])) for member in members]
    for image in range(2):  # a sum of the members' maps, with some positive weight for each
        shares, misfit, *_ = np.linalg.lstsq(np.stack([each[image].ravel() for each in alone], 1), found[image].ravel())
        assert (shares > 0).all()
        assert float(misfit[0]) < 1e-6


def test_grad_cam_says_where_it_has_nothing_to_look_at() -> None:
    with pytest.raises(ConfigError, match="no layer of the network has rows and columns; allowed: integrated_gradients"):
        explain(linear(np.ones((SIDE, SIDE), np.float32)), random_images(1), GradCam(), np.array([1]))


@pytest.mark.parametrize("baseline", [None, 0.1])
def test_integrated_gradients_sum_up_to_the_difference_from_the_baseline(baseline: float | None) -> None:
    network, images = network_of(SmallCnn(width=4)), random_images(2)
    maps = explain(network, images, IntegratedGradients(steps=512, baseline=baseline), np.array([2, 2]))
    with torch.no_grad():
        start = torch.full((2, 1, SIDE, SIDE), 0.45 if baseline is None else baseline)
        difference = log_odds(network, to_tensor(images), 2) - log_odds(network, start, 2)
    np.testing.assert_allclose(maps.sum((1, 2)), difference, atol=0.02 * float(difference.abs().max()))


def test_a_linear_model_is_explained_by_its_weights() -> None:
    weights = np.random.default_rng(1).normal(0, 0.1, (SIDE, SIDE)).astype(np.float32)
    network, images = linear(weights), random_images(1)
    shares = weights * (images[0] / 65535 - 0.25)
    settings: dict[str, Any] = {"baseline": 0.25, "superpixels": 9, "samples": 600}
    pixelwise = explain(network, images, IntegratedGradients(baseline=0.25, steps=8), np.array([1]))[0]
    np.testing.assert_allclose(pixelwise, shares, atol=1e-5)
    regions = superpixels(images[0], 9)
    expected = np.bincount(regions.ravel(), shares.ravel())[regions]
    np.testing.assert_allclose(explain(network, images, Shap(**settings), np.array([1]))[0], expected, atol=1e-4)
    against = explain(network, images, Lime(**settings), np.array([0]))[0]
    np.testing.assert_allclose(against, -expected, atol=0.1 * np.abs(expected).max())


def test_shapley_values_are_those_of_all_coalitions() -> None:
    network, images = network_of(SmallCnn(width=4)), random_images(1)
    regions = superpixels(images[0], 6)
    count = int(regions.max()) + 1
    subsets = list(itertools.product([False, True], repeat=count))
    masks = torch.from_numpy(np.array([np.array(subset)[regions] for subset in subsets]))[:, None]
    with torch.no_grad():
        values = log_odds(network, torch.where(masks, to_tensor(images), torch.tensor(0.45)), 0)
    worth = dict(zip(subsets, values.tolist(), strict=True))
    exact = [shapley(worth, i, count) for i in range(count)]
    found = explain(network, images, Shap(superpixels=6, samples=3000), np.array([0]))[0]
    np.testing.assert_allclose(found, np.array(exact)[regions], atol=0.05 * max(map(abs, exact)))


def shapley(worth: dict[tuple[bool, ...], float], player: int, count: int) -> float:
    total = 0.0
    for others in itertools.product([False, True], repeat=count - 1):
        weight = math.factorial(sum(others)) * math.factorial(count - 1 - sum(others)) / math.factorial(count)
        without, with_player = ((*others[:player], joined, *others[player:]) for joined in (False, True))
        total += weight * (worth[with_player] - worth[without])
    return total


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_what_one_quadrant_decides_is_seen_there_and_scores_better_than_elsewhere(method: ExplanationMethod) -> None:
    network, images, half = looking_at_one_quadrant(), with_squares(4), SIDE // 2
    maps = explain(network, images, method, np.ones(4, np.int64))
    weights = np.abs(maps)
    inside = weights[:, :half, half:].sum((1, 2)) / weights.sum((1, 2))
    assert inside.min() > 0.8
    for score in faithfulness(network, images, maps, np.ones(4, np.int64)):
        assert score.deletion < score.deletion_random - 0.1
        assert score.insertion > score.insertion_random + 0.1


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_the_same_seed_gives_the_same_map_and_disturbs_nobody(method: ExplanationMethod) -> None:
    network, images, state = network_of(SmallCnn(width=4)), random_images(2), torch.random.get_rng_state()
    maps = explain(network, images, method, np.array([0, 1]))
    np.testing.assert_array_equal(explain(network, images, method, np.array([0, 1])), maps)
    np.testing.assert_allclose(explain(network, images[1:], method, np.array([1])), maps[1:], atol=1e-5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks for module in network.modules())
    if isinstance(method, Lime | Shap):
        other = explain(network, images, method.model_copy(update={"seed": 1}), np.array([0, 1]))
        assert not np.array_equal(other, maps)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.kind)
def test_colours_and_blank_images_are_explained(method: ExplanationMethod) -> None:
    images = random_images(2, channels=3)
    images[1] = 20_000
    maps = explain(network_of(SmallCnn(width=4), channels=3), images, method, np.array([0, 1]))
    assert maps.shape == (2, SIDE, SIDE)
    assert np.isfinite(maps).all()
    assert maps[0].any()


@pytest.mark.parametrize("side", [8, 16, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_are_connected_and_about_as_many_as_asked_for(side: int, channels: int) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (side, side, channels), np.uint16).squeeze()
    smooth = random_images(1, side, channels)[0]
    for image in (noise, smooth, np.full_like(noise, 9)):
        regions = superpixels(image, 12)
        numbers = np.unique(regions)
        np.testing.assert_array_equal(numbers, np.arange(len(numbers)))
        assert 6 <= len(numbers) <= 24
        assert all(cv2.connectedComponents((regions == i).astype(np.uint8), connectivity=4)[0] == 2 for i in numbers)


def test_deletion_and_insertion_are_areas_under_the_probability() -> None:
    weights = np.random.default_rng(2).normal(0, 0.3, (SIDE, SIDE)).astype(np.float32)
    network, image = linear(weights), random_images(1)[0]
    network.mean.fill_(0.25)
    found = weights * (image / 65535 - 0.25)
    (score,) = faithfulness(network, image[None], found[None].astype(np.float32), np.array([1]))
    order = np.argsort(-found, axis=None, kind="stable")
    curve = []
    for part in range(13):
        left = (image / 65535).ravel()
        left[order[: round(part * SIDE * SIDE / 12)]] = 0.25
        curve.append(1 / (1 + np.exp(-(weights.ravel() * (left - 0.25)).sum())))
    assert score.deletion == pytest.approx(np.trapezoid(curve, dx=1 / 12), abs=1e-5)
    generator = np.random.default_rng(3)
    for _ in range(5):
        other = generator.random((1, SIDE, SIDE)).astype(np.float32)
        (worse,) = faithfulness(network, image[None], other, np.array([1]))
        assert worse.deletion > score.deletion
        assert worse.insertion < score.insertion


def test_a_map_that_says_nothing_scores_as_itself_moved() -> None:
    network, images = looking_at_one_quadrant(), with_squares(1)
    (score,) = faithfulness(network, images, np.zeros((1, SIDE, SIDE), np.float32), np.array([1]))
    assert (score.deletion, score.insertion) == pytest.approx((score.deletion_random, score.insertion_random))


def test_an_overlay_is_red_for_blue_against_and_grey_elsewhere() -> None:
    image, found = np.full((SIDE, SIDE), 32768, np.uint16), np.zeros((SIDE, SIDE), np.float32)
    found[:4], found[-4:] = 1, -1
    drawn = overlay(image, found)
    assert drawn.shape == (256, 256, 3)
    assert drawn.dtype == np.uint8
    for_it, nothing, against = drawn[20].astype(int), drawn[128], drawn[-20].astype(int)
    assert (for_it[:, 0] > for_it[:, 1:].max(1) + 50).all()
    assert (against[:, 2] > against[:, :2].max(1) + 50).all()
    assert (nothing == 128).all()


def judged(truths: NDArray[np.int64], positive: NDArray[np.float64]) -> Judged:
    manifest = BundleManifest.model_validate(MANIFEST)
    return Judged(truths, np.stack([1 - positive, positive], 1), np.arange(len(truths)), manifest)


def test_the_surest_and_the_worst_of_each_class_are_chosen() -> None:
    truths = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    answers = judged(truths, np.array([0.1, 0.3, 0.2, 0.9, 0.6, 0.8, 0.7, 0.6]))
    chosen = choose(answers, 8)
    assert [each.row for each in chosen] == [0, 2, 3, 4, 5, 6]
    assert [each.answer for each in chosen] == [0, 0, 1, 1, 1, 1]
    assert [each.probability for each in chosen] == pytest.approx([0.9, 0.8, 0.9, 0.6, 0.8, 0.7])
    assert [each.row for each in choose(answers, 1)] == [0, 3, 5]


def test_the_gallery_is_drawn_and_measured(tmp_path: Path) -> None:
    network, images = looking_at_one_quadrant(), with_squares(12)
    with torch.no_grad():
        probabilities = network(to_tensor(images))[0].softmax(1).double().numpy()
    answers = judged(np.arange(12) % 2, probabilities[:, 1])
    figure, metrics = explanation_gallery(answers, Images([images[:5], images[5:]]), network, ExplanationsConfig(images=4))
    figure.savefig(tmp_path / "gallery.png")
    drawn = cv2.imread(str(tmp_path / "gallery.png"))
    assert drawn is not None
    assert drawn.std() > 20
    tiles = [axis for part in figure.subfigs for half in part.subfigs for axis in half.axes if axis.images]
    assert len(tiles) == 2 * len(choose(answers, 4))
    assert f"deletion {metrics['explanation_deletion']:.2f}" in figure.get_suptitle()
    assert set(metrics) == {f"explanation_{name}{end}" for name in ("deletion", "insertion") for end in ("", "_random")}
    assert metrics["explanation_deletion"] < metrics["explanation_deletion_random"]


def test_an_evaluation_draws_the_gallery_and_logs_how_much_it_means(project: Callable[..., Path], home: Path) -> None:
    config = load(project(explanations={"method": {"kind": "integrated_gradients", "steps": 8}, "images": 4}))
    run = (home / "run").as_uri()
    for name in ("ingest", "preprocess", "train", "evaluate"):
        run_stage(name, config, run)
    record = EvaluateRecord.model_validate(read_result(run, "evaluate").record)
    client = registry.connect(config)
    logged = client.get_run(TrainRecord.model_validate(read_result(run, "train").record).mlflow_run_id)
    assert {name: logged.data.metrics[name] for name in record.explanations} == record.explanations
    assert set(record.explanations) == {f"explanation_{name}" for name in Faithfulness.model_fields}
    assert "evaluation/explanations.png" in [item.path for item in client.list_artifacts(logged.info.run_id, "evaluation")]
    drawn = cv2.imread(str(home / "run" / "evaluate" / "explanations.png"))
    assert drawn is not None
    assert f"{home / 'run' / 'evaluate' / 'explanations.png'}" in [uri.removeprefix("file://") for uri in record.pictures]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("explanations") / "bundle", seed=1)


@pytest.fixture(scope="module")
def client(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a real ``cvf serve``."""
    port, folder = free_port(), tmp_path_factory.mktemp("process")
    process = start_cvf("serve", "--model", str(bundle.path), "--host", "127.0.0.1", "--port", str(port), folder=folder)
    wait_until(lambda: process.poll() is not None or is_served(port))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as connected:
        yield connected
    process.terminate()
    process.communicate(timeout=30)


@pytest.fixture
def study() -> bytes:
    """A real MR slice of pydicom's test data, de-identified."""
    return open_domain("medical").deidentify(dicom(), DeidentificationConfig(pixels="trust")).content


def ask(client: httpx.Client, body: bytes, content_type: str, attributes: str, accept: str = "*/*") -> httpx.Response:
    headers = {"content-type": content_type, "x-amzn-sagemaker-custom-attributes": attributes, "accept": accept}
    return client.post("/invocations", content=body, headers=headers)


def shown(overlay: str) -> NDArray[np.int64]:
    """(rows, columns, 3) red, green, blue of a picture in an answer."""
    drawn = cv2.imdecode(np.frombuffer(base64.b64decode(overlay, validate=True), np.uint8), cv2.IMREAD_COLOR)
    assert drawn is not None
    return drawn[:, :, ::-1].astype(np.int64)


@pytest.mark.parametrize("method", EXPLANATIONS)
def test_a_request_that_asks_for_it_is_explained(client: httpx.Client, method: str) -> None:
    plain = client.post("/invocations", content=npy(), headers={"content-type": "application/x-npy"}).json()
    explained = ask(client, npy(), "application/x-npy", f"explain={method}").json()
    reason = explained["predictions"][0].pop("explanation")
    assert explained == plain
    Answer.model_validate(plain)
    assert reason["method"] == method
    drawn = shown(reason["overlay"])
    assert drawn.shape == (256, 256, 3)
    assert np.ptp(drawn, axis=2).max() > 30
    for name in ("deletion", "deletion_random", "insertion", "insertion_random"):
        assert 0 <= reason[name] <= 1


def test_each_image_of_a_batch_is_explained_by_itself(client: httpx.Client) -> None:
    images = [IMAGE.tolist(), np.flipud(IMAGE.T).tolist()]
    both = ask(client, json.dumps({"instances": images}).encode(), "application/json", "explain=grad_cam").json()
    alone = ask(client, json.dumps({"instances": images[1:]}).encode(), "application/json", "explain=grad_cam").json()
    first, second = (shown(given["explanation"]["overlay"]) for given in both["predictions"])
    np.testing.assert_allclose(second, shown(alone["predictions"][0]["explanation"]["overlay"]), atol=1)
    assert np.abs(first - second).max() > 30


@pytest.mark.parametrize(
    ("attributes", "body", "content_type", "accept", "status", "code"),
    [
        ("explain=magic", npy(), "application/x-npy", "*/*", 400, "custom_attributes"),
        ("trace=1", npy(), "application/x-npy", "*/*", 400, "custom_attributes"),
        ("grad_cam", npy(), "application/x-npy", "*/*", 400, "custom_attributes"),
        ("explain=lime", json.dumps({"instances": [IMAGE.tolist()] * 5}).encode(), "application/json", "*/*", 400, "too_many"),
        ("explain=grad_cam", b"no image", "image/png", "*/*", 400, "undecodable"),
        ("explain=grad_cam", png(), "image/png", "application/dicom", 406, "accept"),
        ("explain=grad_cam", dicom(), "application/dicom", "application/dicom", 400, "identified"),
    ],
)
def test_what_cannot_be_explained_is_refused(
    client: httpx.Client, attributes: str, body: bytes, content_type: str, accept: str, status: int, code: str
) -> None:
    response = ask(client, body, content_type, attributes, accept)
    assert (response.status_code, response.json()["code"]) == (status, code)
    if code == "custom_attributes":
        assert all(f"explain={method}" in response.json()["error"] for method in EXPLANATIONS)


def test_a_study_is_explained_as_a_secondary_capture(
    client: httpx.Client, bundle: Bundle, study: bytes, tmp_path: Path
) -> None:
    response = ask(client, study, "application/dicom", "explain=grad_cam", "application/json;q=0.1, Application/DICOM")
    assert response.headers["content-type"] == "application/dicom"
    found, source = pydicom.dcmread(io.BytesIO(response.content)), pydicom.dcmread(io.BytesIO(study))
    for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "StudyDate", "PatientIdentityRemoved"):
        assert found[keyword].value == source[keyword].value
    assert found.SOPClassUID == pydicom.uid.SecondaryCaptureImageStorage
    assert found.SOPInstanceUID != source.SOPInstanceUID
    assert found.SeriesInstanceUID != source.SeriesInstanceUID
    assert found.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
    assert list(found.ImageType[:2]) == ["DERIVED", "SECONDARY"]
    assert bundle.digest in found.SoftwareVersions
    assert "grad_cam" in found.DerivationDescription
    assert found.PhotometricInterpretation == "RGB"
    assert f"{datetime.now():%Y%m%d}" not in str(found)
    asked_as_json = ask(client, study, "application/dicom", "explain=grad_cam").json()
    np.testing.assert_array_equal(found.pixel_array, shown(asked_as_json["predictions"][0]["explanation"]["overlay"]))


def test_a_secondary_capture_is_the_same_for_the_same(study: bytes) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    content = secondary_capture(study, drawn, "why", ("cv-factory 0", "digest"))
    assert secondary_capture(study, drawn, "why", ("cv-factory 0", "digest")) == content
    assert secondary_capture(study, drawn, "why not", ("cv-factory 0", "digest")) != content
    np.testing.assert_array_equal(pydicom.dcmread(io.BytesIO(content)).pixel_array, drawn)


def test_a_secondary_capture_names_the_frame_that_was_answered() -> None:
    path = get_testdata_file("examples_rgb_color.dcm")
    assert isinstance(path, str)
    data = pydicom.dcmread(path)
    data.NumberOfFrames, data.PixelData, data.PatientIdentityRemoved = 3, 3 * data.PixelData, "YES"
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "AccessionNumber", "ReferringPhysicianName"):
        setattr(data, keyword, None)
    file = io.BytesIO()
    data.save_as(file)
    found = pydicom.dcmread(io.BytesIO(secondary_capture(file.getvalue(), np.zeros((4, 4, 3), np.uint8), "why", ("0",))))
    assert found.SourceImageSequence[0].ReferencedFrameNumber == 2


def test_a_study_that_cannot_be_referred_to_has_no_secondary_capture(study: bytes) -> None:
    data = pydicom.dcmread(io.BytesIO(study))
    data.StudyInstanceUID = ""
    file = io.BytesIO()
    data.save_as(file)
    with pytest.raises(Rejected, match="StudyInstanceUID is missing"):
        secondary_capture(file.getvalue(), np.zeros((4, 4, 3), np.uint8), "why", ("0",))
    with pytest.raises(Rejected, match="de-identify the study"):
        secondary_capture(dicom(), np.zeros((4, 4, 3), np.uint8), "why", ("0",))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of the Debian package dicom3tools")
def test_an_independent_validator_finds_no_error_in_a_secondary_capture(study: bytes, tmp_path: Path) -> None:
    content = secondary_capture(study, np.zeros((32, 32, 3), np.uint8), "why", ("cv-factory 0", 64 * "f"))
    (tmp_path / "capture.dcm").write_bytes(content)
    said = subprocess.run(["dciodvfy", tmp_path / "capture.dcm"], capture_output=True, text=True, errors="replace")
    assert "SCImage" in said.stderr
    assert [line for line in said.stderr.splitlines() if line.startswith("Error")] == []


@pytest.mark.skipif(shutil.which("dcm2pnm") is None, reason="needs dcm2pnm, of the Debian package dcmtk")
def test_an_independent_decoder_shows_the_same_picture(study: bytes, tmp_path: Path) -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (12, 10, 3), np.uint8)
    (tmp_path / "capture.dcm").write_bytes(secondary_capture(study, drawn, "why", ("0",)))
    subprocess.run(["dcm2pnm", "--write-png", tmp_path / "capture.dcm", tmp_path / "out.png"], check=True, capture_output=True)
    decoded = cv2.imread(str(tmp_path / "out.png"))
    assert decoded is not None
    np.testing.assert_array_equal(decoded[:, :, ::-1], drawn)


def test_the_command_explains_a_picture_and_a_study(
    bundle: Bundle, study: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "image.png").write_bytes(png())
    (tmp_path / "study").write_bytes(study)
    arguments = ["explain", "--bundle", str(bundle.path), "--method", "integrated_gradients", "--out"]
    assert cli.main([*arguments, str(tmp_path / "new" / "a.png"), str(tmp_path / "image.png")]) == 0
    drawn = cv2.imread(str(tmp_path / "new" / "a.png"))
    assert drawn is not None
    assert drawn.shape == (256, 256, 3)
    assert cli.main([*arguments, str(tmp_path / "b.dcm"), str(tmp_path / "study")]) == 0
    assert pydicom.dcmread(tmp_path / "b.dcm").pixel_array.shape == (256, 256, 3)
    assert capsys.readouterr().out.count("integrated_gradients of the answer") == 2


@pytest.mark.parametrize(
    ("out", "image", "says", "code"),
    [
        ("a.dcm", "image.png", "allowed: .png", 2),
        ("a.gif", "study", "allowed: .png, .dcm", 2),
        ("a.png", "identified", "de-identify the study", 3),
        ("a.png", "none", "cannot be read", 3),
    ],
)
def test_the_command_says_what_it_cannot_do(
    bundle: Bundle, study: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str], out: str, image: str, says: str, code: int
) -> None:
    (tmp_path / "image.png").write_bytes(png())
    (tmp_path / "study").write_bytes(study)
    (tmp_path / "identified").write_bytes(dicom())
    assert cli.main(["explain", "--bundle", str(bundle.path), str(tmp_path / image), "--out", str(tmp_path / out)]) == code
    error = capsys.readouterr().err
    assert says in error
    assert "Curie" not in error
    assert not (tmp_path / out).exists()
