"""How a network learns: ``training``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cv_factory_ops.config.values import Share
from cv_factory_ops.records import Frozen


class AugmentConfig(Frozen):
    """Random changes of the training images, drawn anew for each batch."""

    flip: bool = True
    """Mirror left and right with probability 1/2."""
    shift: Share = 0.05
    """Largest translation, as a share of the side."""
    intensity: Share = 0.1
    """Largest change of contrast (factor) and brightness (offset)."""
    noise: Share = 0.0
    """Largest standard deviation of added Gaussian noise."""
    rotate: float = Field(default=0.0, ge=0, le=180)
    """Largest rotation, in degrees."""
    zoom: float = Field(default=0.0, ge=0, le=4)
    """Largest magnification beyond 1: with 0.5 the middle two thirds may fill the image."""
    mixup: float = Field(default=0.0, ge=0)
    """Images and labels are mixed with weights from Beta(mixup, mixup) (Zhang et al. 2018); 0 turns it off."""
    cutmix: float = Field(default=0.0, ge=0)
    """A box of another image is pasted in, its area from Beta(cutmix, cutmix), and labels are mixed by area (Yun et al. 2019);
    0 turns it off. With ``mixup`` as well, each batch gets one of both by chance."""


class SupervisedConfig(Frozen):
    """Cross entropy with the labels, from the first weight to the last."""

    kind: Literal["supervised"] = "supervised"


class FineTuning(Frozen):
    """As supervised, from weights that were learned elsewhere (``model.weights``), stage by stage of the network."""

    kind: Literal["fine_tuning"] = "fine_tuning"
    frozen: int = Field(default=0, ge=0)
    """First stages of the network whose weights and batch-norm statistics stay as they are."""
    probe: bool = False
    """Only the head learns: all stages are frozen."""
    decay: float = Field(default=1.0, gt=0, le=1)
    """Learning rate of each stage, as a share of that of the stage after it (Howard & Ruder 2018); 1 is the same for all."""


class ContrastiveConfig(Frozen):
    """Views of an image lie close together in the embedding; the head learns from the labels without changing it.

    ``augment`` says how views differ: stronger changes than those of supervised training are usual."""

    kind: Literal["contrastive"] = "contrastive"
    method: Literal["simclr", "supcon"] = "simclr"
    """``simclr``: two views of each image (Chen et al. 2020). ``supcon``: all images of a label (Khosla et al. 2020)."""
    temperature: float = Field(default=0.2, gt=0)
    projection: int = Field(default=128, ge=2)
    """Features that views are compared in."""


class FixMatchConfig(Frozen):
    """Semi-supervised: unlabelled images (``data.unlabelled: keep``) are learned from where the network is sure of its answer
    (Sohn et al. 2020)."""

    kind: Literal["fixmatch"] = "fixmatch"
    confidence: Share = 0.95
    """Least probability of an answer that is taken for a label."""
    ratio: int = Field(default=3, ge=1)
    """Unlabelled images for each labelled one in a batch."""
    weight: float = Field(default=1.0, ge=0)
    """Of the unlabelled images in the loss."""
    strong: AugmentConfig = AugmentConfig(shift=0.125, intensity=0.5, noise=0.1, rotate=20, zoom=0.3)
    """Changes under which the answer must hold; ``training.augment`` are the mild ones that it is given for."""


Objective = Annotated[SupervisedConfig | FineTuning | ContrastiveConfig | FixMatchConfig, Field(discriminator="kind")]


class TrainingConfig(Frozen):
    """The loop, the same for every objective."""

    objective: Objective = SupervisedConfig()
    warm_start: Literal["none", "champion"] = "none"
    """Begin with the champion's weights, where its network and labels are the same; else, and before there is one, with
    ``model.weights`` or random ones."""
    epochs: int = Field(default=10, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Images a process takes at a time."""
    accumulate: int = Field(default=1, ge=1)
    """Such batches whose gradients are added up before the weights change."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the schedule."""
    schedule: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    """``one_cycle``: up from 1/25, then down to almost nothing (Smith & Topin 2019). ``cosine``: up from nothing, then down
    to nothing (Loshchilov & Hutter 2017). ``constant``: up from nothing, then unchanged."""
    warmup: Share = 0.3
    """Share of the training in which the learning rate rises."""
    weight_decay: float = Field(default=1e-4, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest L2 norm of the gradient."""
    class_weights: bool = False
    """Weight the loss by inverse class frequency."""
    weighted_sampling: bool = False
    """Draw images with replacement, each label as often as every other."""
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    """Decay of the moving average of the weights that is validated and kept; 0 turns it off."""
    patience: int = Field(default=0, ge=0)
    """Epochs without a better validation AUC before training stops; 0 never stops early."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the forward pass: ``auto`` takes ``bfloat16``, else ``float16``, on GPUs that are made for it, and ``float32``
    elsewhere."""
    deterministic: bool = False
    """On GPUs, only take algorithms that repeat themselves exactly; on CPUs training always does."""
    checkpoint_minutes: float = Field(default=10, gt=0)
    """Time between checkpoints within an epoch; one is also kept after each epoch, and when the training is stopped."""
    restarts: int = Field(default=0, ge=0)
    """Times that torchrun starts the ranks again, from the checkpoint, after one has died."""
    nodes: int = Field(default=1, ge=1)
    """Machines (pods) that train together; where each stage is a process of this machine, it plays them all."""
    processes_per_node: int = Field(default=2, ge=1)
    """DDP processes that torchrun starts on each node; with GPUs, at most one a GPU."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of each process."""
    seed: int = 0
    augment: AugmentConfig = AugmentConfig()
    embedding_components: int = Field(default=8, ge=1, le=64)
    """Principal components of the embedding that are kept for drift and retrieval."""


PLACEMENT = ("nodes", "processes_per_node", "threads", "checkpoint_minutes", "restarts")
"""Settings of ``training`` that say where and how it runs, not what is learned: they may change while it goes on."""
NOT_SEARCHED = {*PLACEMENT, "embedding_components", "warm_start"}
"""Settings of ``training`` that are the same for all trials of a search."""
