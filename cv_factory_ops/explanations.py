"""What an answer rests on: maps by four methods, a score that tells whether a map means anything, and pictures of both.

Explained are the log-odds of a label, its logit less the log-sum-exp of the others: what its probability depends on, which a
logit alone is not. In pictures red speaks for the label and blue against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, assert_never

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cv_factory_ops.answers import Faithfulness as Faithfulness
from cv_factory_ops.config.explanations import EXPLANATIONS, ExplanationMethod, GradCam, IntegratedGradients, Lime, Shap
from cv_factory_ops.config.models import EnsembleModel, Model, Vit
from cv_factory_ops.errors import ConfigError
from cv_factory_ops.models import Classifier, Detector, Segmenter
from cv_factory_ops.preprocessing.pipeline import to_tensor

MOST_PIXELS = 64 * 64 * 64
"""Of all images that the network sees at a time: with a gradient, those of a ResNet-18 of the usual stem take about a GiB."""
EXPLAINED_AT_A_TIME = 16
"""At most."""
STEPS = 12
"""Equal parts of the pixels that are taken away or put in one after the other."""
MOVED, SEED = 2, 0
"""Times that a map is moved elsewhere to be compared with itself, and the seed of where to."""
LIME_WIDTH = 0.25
"""Of the kernel by which LIME weights samples: that of the authors' own implementation for images."""
LEAST_SIDE = 256
"""Pixels that pictures of smaller images are enlarged to."""
RED, BLUE = (240, 40, 40), (50, 105, 250)

Forward = Callable[[Tensor], Tensor]
"""(N, channels, size, size) images -> (N, classes) log-odds."""
Map = NDArray[np.float32]
"""(rows, columns), see :func:`explain`."""
Rgb = NDArray[np.uint8]
"""(rows, columns, 3)"""


def explain(
    network: Classifier,
    images: NDArray[np.uint16],
    method: ExplanationMethod,
    targets: NDArray[np.int64],
    temperature: float = 1.0,
) -> NDArray[np.float32]:
    """(N, size, size[, 3]) prepared images and (N,) labels to explain -> (N, size, size) maps.

    ``grad_cam``: 0 .. 1, the largest of an image being 1; all 0 where nothing speaks for the label. The others are signed, in
    log-odds: of ``integrated_gradients`` each pixel's share, which sum up to the difference from the baseline; of ``lime`` and
    ``shap`` the weight of the superpixel that a pixel lies in, those of ``shap`` summing up in the same way. Repeatable. The
    network is in evaluation mode, and of this thread alone; the temperature is its bundle's.

    Raises:
        ConfigError: ``grad_cam``, and no layer of the network keeps places apart; or the network answers for pixels or
            with boxes.
    """
    if isinstance(network, Segmenter):
        raise ConfigError(f"{method.kind}: explains the label of an image; a segmentation shows by its mask where it sees what")
    if isinstance(network, Detector):
        raise ConfigError(f"{method.kind}: explains the label of an image; a detection shows by its boxes where it sees what")
    maps, forward = [], partial(_log_odds, network, temperature)
    together = min(_batch_size(images), EXPLAINED_AT_A_TIME)
    for start in range(0, len(images), together):
        part = slice(start, start + together)
        found = _attributed(network, forward, images[part], method, torch.from_numpy(targets[part]))
        maps.append(found.detach().numpy())
    return np.concatenate(maps).astype(np.float32)


def _attributed(
    network: Classifier, forward: Forward, images: NDArray[np.uint16], method: ExplanationMethod, target: Tensor
) -> Tensor:
    from captum import attr

    inputs = to_tensor(images).requires_grad_()
    match method:
        case GradCam():
            return _grad_cam(network, forward, inputs, target)
        case IntegratedGradients():
            baseline = _baseline(network, method)
            found: Tensor = attr.IntegratedGradients(forward).attribute(
                inputs, baseline, target, n_steps=method.steps, internal_batch_size=_batch_size(images)
            )
            return found.sum(1)
        case Lime() | Shap():
            baseline = _baseline(network, method)
            each = zip(images, torch.split(inputs.detach(), 1), target.tolist(), strict=True)
            return torch.cat([_of_superpixels(forward, baseline, method, *one) for one in each])
        case _:
            assert_never(method)


def _batch_size(images: NDArray[np.uint16] | Tensor) -> int:
    """How many of such images, (N, size, size[, 3]) or (N, channels, size, size), go through the network at a time."""
    size: int = images.shape[2]
    return max(MOST_PIXELS // size**2, 1)


def _log_odds(network: Classifier, temperature: float, images: Tensor) -> Tensor:
    """(N, classes): log p - log (1 - p)."""
    logits = network(images)[0] / temperature
    itself = torch.eye(logits.shape[1], dtype=torch.bool)
    others = logits.unsqueeze(1).masked_fill(itself, -math.inf).logsumexp(2)
    return torch.sub(logits, others)


def _baseline(network: Classifier, method: IntegratedGradients | Lime | Shap) -> float:
    return float(network.mean) if method.baseline is None else method.baseline


def _grad_cam(network: Classifier, forward: Forward, images: Tensor, target: Tensor) -> Tensor:
    """Of an ensemble the sum over its members, each as large as what it adds to the answer, whatever its resolution."""
    from captum import attr

    maps = torch.zeros_like(images[:, 0])
    for config, backbone in _members(network):
        with _spatial_layer(network, config, backbone, images[:1].detach()) as layer:
            found = attr.LayerGradCam(forward, layer).attribute(images, target, relu_attributions=True)
        enlarged = attr.LayerAttribution.interpolate(found, tuple(images.shape[2:]), "bilinear")
        maps = maps + enlarged[:, 0] * found[0].numel()
    return maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)


def _members(network: Classifier) -> list[tuple[Model, nn.Module]]:
    if not isinstance(network.config, EnsembleModel):
        return [(network.config, network.backbone)]
    models = [member.model for member in network.config.members]
    return [(model, network.backbone.get_submodule(f"members.{i}")) for i, model in enumerate(models)]


@contextmanager
def _spatial_layer(network: Classifier, config: Model, backbone: nn.Module, image: Tensor) -> Iterator[nn.Module]:
    """The layer whose features Grad-CAM weights: of a transformer, the patches that its last attention looks at."""
    if not isinstance(config, Vit):
        yield _last_spatial(network, backbone, image)
        return
    grid, norm = nn.Identity(), backbone.get_submodule(f"blocks.{config.layers - 1}.norm1")
    hook = norm.register_forward_hook(lambda module, given, tokens: _through_grid(grid, tokens))
    try:
        yield grid
    finally:
        hook.remove()


def _through_grid(grid: nn.Module, tokens: Tensor) -> Tensor:
    """(N, 1 + patches, features) unchanged, the patches having gone through ``grid`` as (N, features, rows, columns)."""
    side = math.isqrt(tokens.shape[1] - 1)
    maps = grid(tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, side, side))
    return torch.cat([tokens[:, :1], maps.flatten(2).transpose(1, 2)], 1)


def _last_spatial(network: Classifier, backbone: nn.Module, image: Tensor) -> nn.Module:
    """The last layer of the backbone with the resolution of the last convolution: behind its activation, before pooling."""
    sizes: dict[nn.Module, torch.Size] = {}

    def note(module: nn.Module, given: object, made: object) -> None:
        sizes.pop(module, None)  # one that is called again is noted where it is called last: this is what Captum looks at
        sizes[module] = made.shape[2:] if isinstance(made, Tensor) and made.ndim == 4 else torch.Size()

    hooks = [module.register_forward_hook(note) for module in backbone.modules()]
    try:
        with torch.no_grad():
            network(image)
    finally:
        for hook in hooks:
            hook.remove()
    convolved = [size for module, size in sizes.items() if isinstance(module, nn.Conv2d) and math.prod(size) > 1]
    if not convolved:
        others = ", ".join(kind for kind in EXPLANATIONS if kind != GradCam().kind)
        raise ConfigError(f"grad_cam: no layer of the network has rows and columns; allowed: {others}")
    return [module for module, size in sizes.items() if size == convolved[-1]][-1]


def _of_superpixels(
    forward: Forward, baseline: float, method: Lime | Shap, image: NDArray[np.uint16], tensor: Tensor, target: int
) -> Tensor:
    from captum import attr
    from captum._utils.models.linear_model import SkLearnRidge

    regions = torch.from_numpy(superpixels(image, method.superpixels))[None, None]
    model: Any = attr.Lime(forward, SkLearnRidge(alpha=1.0), _closeness)
    if isinstance(method, Shap):
        model = attr.KernelShap(forward)
        model.perturb_func = _with_complements(model.perturb_func)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(method.seed)
        found: Tensor = model.attribute(
            tensor,
            baseline,
            target,
            feature_mask=regions,
            n_samples=method.samples,
            perturbations_per_eval=_batch_size(tensor),
        )
    return found[:, 0]


def _with_complements(samples: Callable[..., Iterator[Tensor]]) -> Callable[..., Iterator[Tensor]]:
    """Each sample followed by its opposite, which makes a few hundred enough (Covert & Lee 2021)."""

    def pairs(image: Tensor, **settings: Any) -> Iterator[Tensor]:
        for shown in samples(image, **settings):
            yield shown
            yield 1 - shown

    return pairs


def superpixels(image: NDArray[np.uint16], count: int) -> NDArray[np.int64]:
    """(rows, columns[, 3]) prepared image -> (rows, columns) numbers from 0 of about so many connected regions; of noise,
    squares."""
    from skimage.segmentation import slic

    # The compactness weighs distance against intensity, which grey has in 0..1 and colour, as CIE L*a*b*, in 0..100.
    compactness, axis = (0.1, None) if image.ndim == 2 else (10, 2)
    regions = slic(image / 65535, count, compactness, start_label=0, channel_axis=axis)
    if regions.max() < count // 2:  # what is not connected is joined to a neighbour, in the end to a single region
        regions = slic(image / 65535, count, 1000 * compactness, start_label=0, channel_axis=axis)
    return np.asarray(regions, np.int64)


def _closeness(image: Tensor, changed: Tensor, shown: Tensor, **_: object) -> float:
    """Weight of a sample by the cosine distance of which superpixels it shows from all (Ribeiro et al. 2016)."""
    distance = 1 - math.sqrt(float(shown.float().mean()))
    return math.exp(-((distance / LIME_WIDTH) ** 2) / 2)


def faithfulness(
    network: Classifier,
    images: NDArray[np.uint16],
    maps: NDArray[np.float32],
    targets: NDArray[np.int64],
    temperature: float = 1.0,
) -> list[Faithfulness]:
    """Of each image, for prepared images (N, size, size[, 3]), maps (N, size, size) and the labels (N,) that these explain."""
    scores, forward = [], partial(_log_odds, network, temperature)
    for image, found, target in zip(images, maps, targets, strict=True):
        blurred = cv2.GaussianBlur(image, (0, 0), len(image) / 8)
        sharp, smooth = to_tensor(image[None]), to_tensor(blurred[None])
        generator = np.random.default_rng(SEED)  # anew: the score of an image does not depend on those before it
        order = np.stack([found, *(_moved(found, generator) for _ in range(MOVED))])
        deletion = _areas(forward, sharp, network.mean.expand_as(sharp), order, int(target))
        insertion = _areas(forward, smooth, sharp, order, int(target))
        scores.append(
            Faithfulness(
                deletion=deletion[0],
                deletion_random=float(np.mean(deletion[1:])),
                insertion=insertion[0],
                insertion_random=float(np.mean(insertion[1:])),
            )
        )
    return scores


def _moved(found: Map, generator: np.random.Generator) -> Map:
    """By a quarter to three quarters of each side; what leaves comes in again opposite."""
    by = [int(generator.integers(side // 4, side - side // 4, endpoint=True)) for side in found.shape]
    return np.roll(found, by, (0, 1))


@torch.inference_mode()
def _areas(forward: Forward, start: Tensor, end: Tensor, maps: NDArray[np.float32], target: int) -> list[float]:
    """For each map, the area under the target's probability while the pixels of ``start`` become those of ``end``."""
    ranks = torch.from_numpy((-maps).reshape(len(maps), -1).argsort(1, kind="stable").argsort(1).reshape(maps.shape))
    changed = torch.linspace(0, ranks[0].numel(), STEPS + 1).round()
    is_changed = ranks[:, None] < changed[:, None, None]
    mixed = torch.where(is_changed.flatten(0, 1).unsqueeze(1), end, start)
    curves = torch.cat([forward(batch)[:, target].sigmoid() for batch in torch.split(mixed, _batch_size(mixed))])
    areas: list[float] = torch.trapezoid(curves.view(len(maps), -1), dx=1 / STEPS).tolist()
    return areas


def overlay(image: NDArray[np.uint16], found: Map) -> Rgb:
    """A map over the prepared image (size, size[, 3]) in grey, enlarged by a whole number; what is stronger covers more."""
    factor = math.ceil(LEAST_SIDE / len(image))
    size = (factor * image.shape[1], factor * image.shape[0])
    shown = picture(image)
    grey = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY)
    strength = np.clip(found / max(float(np.quantile(np.abs(found), 0.995)), 1e-12), -1, 1)
    strength = cv2.resize(strength.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)[:, :, None]
    base = cv2.resize(grey, size, interpolation=cv2.INTER_LINEAR)[:, :, None]
    colour = np.where(strength > 0, np.array(RED), np.array(BLUE))
    cover = 0.65 * np.abs(strength)
    drawn: Rgb = np.rint(base * (1 - cover) + colour * cover).astype(np.uint8)
    return drawn


def picture(image: NDArray[np.uint16]) -> Rgb:
    """A prepared image (size, size[, 3]) as a screen shows it."""
    shown = (image >> 8).astype(np.uint8)
    return np.repeat(shown[:, :, None], 3, axis=2) if shown.ndim == 2 else shown
