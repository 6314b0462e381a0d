"""What a training asks of the network: each objective turns a batch into a loss, and leaves a classifier.

Supervised training and fine-tuning share one, or one for masks or boxes; contrastive training and FixMatch are others. Each
rank sees its own images; DDP averages the gradients.
"""

from __future__ import annotations

from typing import Any, Protocol, assert_never

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from cv_factory_ops.config.training import (
    AugmentConfig,
    ContrastiveConfig,
    FineTuning,
    FixMatchConfig,
    SupervisedConfig,
    TrainingConfig,
)
from cv_factory_ops.detection import anchors
from cv_factory_ops.errors import DataError
from cv_factory_ops.models import Classifier, Detector, Segmenter
from cv_factory_ops.training.data import Shard, augment, augment_with_boxes, augment_with_masks, mix


class Objective(Protocol):
    """What the loop calls for each batch."""

    @property
    def module(self) -> nn.Module:
        """What DDP wraps: the network with whatever else is learned beside it."""

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of this rank's images (n, channels, H, W) in 0..1 and labels (n,), masks (n, H, W) or boxes (n, most, 5);
        ``parallel`` is ``module`` under DDP."""


def open_objective(
    config: TrainingConfig, network: Classifier, class_weights: Tensor | None, unlabelled: Shard | None
) -> Objective:
    """The objective that a training declares; for a network that answers for pixels or with boxes, the one that learns
    from masks or boxes.

    Raises:
        DataError: it needs unlabelled images, and there are none.
    """
    if isinstance(network, Segmenter):
        return Segmentation(config, network, class_weights)
    if isinstance(network, Detector):
        return Detection(config, network)
    supervised = Supervised(config, network, class_weights)
    match config.objective:
        case SupervisedConfig() | FineTuning():
            return supervised
        case ContrastiveConfig():
            return Contrastive(config.objective, config.augment, supervised)
        case FixMatchConfig():
            if unlabelled is None:
                raise DataError(
                    "training.objective: fixmatch learns from unlabelled images: none here; set data.unlabelled: keep"
                )
            return FixMatch(config.objective, config.augment, supervised, unlabelled)
        case _:
            assert_never(config.objective)


class Supervised:
    """Cross entropy with the labels of randomly changed, possibly mixed, images."""

    def __init__(self, config: TrainingConfig, network: Classifier, class_weights: Tensor | None) -> None:
        self.module = network
        self._config, self._class_weights = config, class_weights

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images = augment(images, self._config.augment)
        images, targets = mix(images, labels, self.module.classes, self._config.augment)
        return self.cross_entropy(parallel(images)[0], targets)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """With labels (n,) or shares of labels (n, classes)."""
        return cross_entropy(logits, targets, self._class_weights, self._config.label_smoothing)


class Segmentation:
    """Dice and cross entropy of the pixels of randomly changed images, summed up (MONAI's ``DiceCELoss``).

    Dice (Milletari et al. 2016) is that of a batch as a whole, without the background: a class that an image does not show
    would else give it a loss of 1 for any answer but none.
    """

    def __init__(self, config: TrainingConfig, network: Segmenter, class_weights: Tensor | None) -> None:
        from monai.losses import DiceCELoss

        self.module = network
        self._augment = config.augment
        self._loss = DiceCELoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            batch=True,
            weight=class_weights,
            label_smoothing=config.label_smoothing,
        ).to(network.mean.device)

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        images, masks = augment_with_masks(images, labels, self.module.classes, self._augment)
        loss: Tensor = self._loss(parallel(images)[0].float(), masks[:, None])
        return loss


class Detection:
    """Focal loss of all anchors (Lin et al. 2017) and, of those that stand for a box, smooth L1 of how it differs from them,
    each divided by the number of these anchors.

    Which anchors stand for a box, is found by ATSS (Zhang et al. 2020): of the nearest of each resolution those that overlap it
    more than most.
    """

    def __init__(self, config: TrainingConfig, network: Detector) -> None:
        from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
        from monai.apps.detection.utils.box_coder import BoxCoder
        from monai.data.box_utils import box_iou

        self.module = network
        self._augment = config.augment
        self._matcher = ATSSMatcher(NEAREST, box_iou, center_in_gt=False)
        self._coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        from monai.losses.focal_loss import sigmoid_focal_loss

        images, boxes = augment_with_boxes(images, labels, self._augment)
        outputs = parallel(images)[0].float()
        squares, places = self._anchors(images.shape[2], images.device)
        logits, targets = outputs[..., 4:], torch.zeros_like(outputs[..., 4:])
        differences, count = outputs.new_zeros(()), 0
        for number, of_image in enumerate(boxes):
            known = of_image[of_image[:, 0] > 0]
            if not len(known):
                continue
            owners = self._matcher.compute_matches(known[:, 1:], squares, places, 1)[1]
            at = torch.nonzero(owners >= 0).squeeze(1)
            matched = known[owners[at]]
            targets[number, at, matched[:, 0].long() - 1] = 1
            wanted = self._coder.encode_single(matched[:, 1:], squares[at])
            differences = differences + functional.smooth_l1_loss(outputs[number, at, :4], wanted, reduction="sum", beta=BETA)
            count += len(at)
        loss: Tensor = (sigmoid_focal_loss(logits, targets, 2.0, 0.25).sum() + differences) / max(count, 1)
        return loss

    def _anchors(self, size: int, device: torch.device) -> tuple[Tensor, list[int]]:
        """(anchors, 4), and how many are of each resolution."""
        config = self.module.config
        return torch.from_numpy(anchors(config, size)).to(device), [(size // stride) ** 2 for stride in config.strides]


NEAREST = 9
"""Anchors of each resolution that may stand for a box (Zhang et al. 2020)."""
BETA = 1 / 9
"""Difference from which on smooth L1 is straight (Lin et al. 2017)."""


class Contrastive:
    """SimCLR (Chen et al. 2020) or SupCon (Khosla et al. 2020): two random views of an image, or all images of a label, lie
    close together.

    The head learns beside it from the labels; its gradient does not reach the backbone, so the embedding is that of the
    contrastive loss alone, and every epoch can be validated.
    """

    def __init__(self, config: ContrastiveConfig, view: AugmentConfig, supervised: Supervised) -> None:
        self._config, self._view, self._supervised = config, view, supervised
        self.module = _Projected(supervised.module, config.projection).to(supervised.module.mean.device)

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        views = torch.cat([augment(images, self._view), augment(images, self._view)])
        logits, projected = parallel(views)
        keys = labels if self._config.method == "supcon" else _numbered(images)
        contrast = contrastive_loss(projected, keys.repeat(2), self._config.temperature)
        return contrast + self._supervised.cross_entropy(logits, labels.repeat(2))


class FixMatch:
    """Cross entropy with the labels, and, for unlabelled images, with the answer of which the network itself is sure.

    That answer is given for a mildly changed image, and must hold for the strongly changed one (Sohn et al. 2020).
    """

    def __init__(self, config: FixMatchConfig, weak: AugmentConfig, supervised: Supervised, unlabelled: Shard) -> None:
        self.module = supervised.module
        self._config, self._weak, self._supervised, self._unlabelled = config, weak, supervised, unlabelled

    def loss(self, parallel: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        drawn = torch.randint(len(self._unlabelled), (self._config.ratio * len(images),))
        others = self._unlabelled.batch(drawn.numpy())[0].to(images.device)
        weak, strong = augment(others, self._weak), augment(others, self._config.strong)
        logits = parallel(torch.cat([augment(images, self._weak), weak, strong]))[0]
        known, mild, changed = logits.split([len(images), len(others), len(others)])
        sure, answers = mild.detach().softmax(1).max(1)
        wrong = functional.cross_entropy(changed, answers, reduction="none")
        agreement = (wrong * (sure >= self._config.confidence)).mean()
        loss: Tensor = self._supervised.cross_entropy(known, labels) + self._config.weight * agreement
        return loss


class _Projected(nn.Module):
    """A classifier with the projection that contrastive training compares in, and that is thrown away with it."""

    def __init__(self, network: Classifier, features: int) -> None:
        super().__init__()
        self.network = network
        self.projection = nn.Sequential(nn.Linear(network.features, features), nn.ReLU(), nn.Linear(features, features))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.network.embed(images)
        return self.network.head(embedding.detach()), functional.normalize(self.projection(embedding))


def contrastive_loss(vectors: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Mean over this rank's (n, features) unit vectors of the loss L_out of Khosla et al. (2020), equation 2.

    Those with the same key (n,) belong together, those of all ranks are compared with: with one pair a key it is the NT-Xent
    loss of SimCLR. Every rank has the same number.
    """
    others, their_keys = (_OfAllRanks.apply(own) for own in (vectors, keys))  # type: ignore[no-untyped-call]
    own = torch.arange(len(vectors), device=vectors.device)
    itself = torch.zeros(len(vectors), len(others), dtype=torch.bool, device=vectors.device)
    itself[own, own + dist.get_rank() * len(vectors)] = True
    log_shares = (vectors @ others.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (keys[:, None] == their_keys) & ~itself
    loss: Tensor = -(log_shares.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    return loss


class _OfAllRanks(torch.autograd.Function):
    """(n, ...) of each rank -> (ranks * n, ...) on all ranks; what any rank's loss asks of a rank's rows reaches that rank."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        parts: tuple[Tensor, ...] = total.chunk(dist.get_world_size())
        return parts[dist.get_rank()]


def _numbered(images: Tensor) -> Tensor:
    """(n,) another number for each image of all ranks."""
    return torch.arange(len(images), device=images.device) + dist.get_rank() * len(images)


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float) -> Tensor:
    """Mean over a batch of the cross entropy with labels (n,) int64, or with shares of labels (n, classes).

    PyTorch divides by the weights of the labels where those are numbers, but by n where they are shares; here both are means
    by weight, so that a share of 1 counts as the label itself.
    """
    if targets.ndim == 1:
        return functional.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    total = functional.cross_entropy(logits, targets, weights, reduction="sum", label_smoothing=smoothing)
    return total / (len(targets) if weights is None else (targets @ weights).sum())
