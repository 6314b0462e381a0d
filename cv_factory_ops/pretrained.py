"""Begin a network with weights that were learned elsewhere."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cv_factory_ops.errors import DataError
from cv_factory_ops.models import Classifier
from cv_factory_ops.weights import read_weights

log = logging.getLogger("cvf")

HEADS = ("head.", "fc.", "classifier.", "class_layers.out.", "_fc.", "classification_head.")
"""What the last layer is called, by ourselves, torchvision and MONAI."""
OPTIONAL = (".num_batches_tracked", ".downsample.0.bias")
"""What files may lack, and is 0 then: old ones do not count batches, torchvision's shortcuts have no bias."""
ALIASES = {
    "densenet": [(r"\.layers\.(norm|conv)([12])\.", r".\1\2."), (r"\.layers\.(norm|conv)([12])\.", r".\1.\2.")],
    "efficientnet": [(r"^_blocks\.\d+\.(\d+)\.", r"_blocks.\1.")],
}
"""How else MONAI's names are written in files, by kind: torchvision's today and formerly; blocks without their stack."""
UNUSED = re.compile(r"\.(norm_)?cross_attn\.")
"""What files of MONAI's transformers hold, and no forward pass takes."""


@dataclass(frozen=True)
class Loaded:
    """What :func:`load_weights` has taken."""

    uri: str
    sha256: str
    """Of the file."""
    head: bool
    """Whether the head was taken as well; otherwise it is as it was."""


def load_weights(network: Classifier, place: str) -> Loaded:
    """Give a network the weights of a safetensors file; ``place`` is that of :func:`cv_factory_ops.weights.read_weights`.

    The file is a bundle's ``model.safetensors`` or a state dict with MONAI's names, for ``resnet`` and ``densenet`` also
    torchvision's. The whole backbone must fit; the head is taken where its shape agrees. Mean and standard deviation of the
    training images stay as they are. Weights for three channels become weights for one, and the other way round, with the same
    response to a grey image; positions of patches are interpolated to another image size.

    Raises:
        ConfigError, DataError, Unavailable: the file cannot be read, or does not fit.
    """
    given = read_weights(place)
    backbone, misfits = _fit(given.tensors, network)
    if misfits:
        count = sum(name.startswith("backbone.") for name in network.state_dict())
        raise DataError(
            f"{given.uri}: {len(backbone)} of the {count} weights of this {network.config.kind} are there and fit; the first "
            f"that is wrong: {misfits[0]}; allowed: a bundle's model.safetensors, or names of MONAI or torchvision, of a "
            "network like this one"
        )
    head = _fit_head(given.tensors, network)
    network.load_state_dict(backbone | head, strict=False)
    log.info("the network begins with %s: the backbone%s", given.uri, " and the head" if head else "; the head is new")
    return Loaded(given.uri, given.sha256, head=bool(head))


def _fit(tensors: Mapping[str, Tensor], network: Classifier) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's weights out of those of a file, and what is wrong with the others."""
    fitted: dict[str, Tensor] = {}
    misfits, used = [], set()
    for name, wanted in network.state_dict().items():
        if not name.startswith("backbone."):
            continue
        theirs = _name_in(tensors, name, network.config.kind)
        used.add(theirs)
        if theirs is None and not name.endswith(OPTIONAL):
            misfits.append(f"{name.removeprefix('backbone.')} is not in the file")
            continue
        tensor = torch.zeros_like(wanted) if theirs is None else _adapted(tensors[theirs], wanted)
        if tensor.shape == wanted.shape:
            fitted[name] = tensor
        else:
            misfits.append(f"{theirs} is {tuple(tensor.shape)} in the file, {tuple(wanted.shape)} in the network")
    others = (name for name in tensors if name not in used and name not in {"mean", "std"})
    strange = (name for name in others if not name.startswith(HEADS) and not UNUSED.search(name))
    return fitted, misfits + [f"{name} is only in the file" for name in sorted(strange)]


def _fit_head(tensors: Mapping[str, Tensor], network: Classifier) -> dict[str, Tensor]:
    """All weights of the head, or none."""
    fitted: dict[str, Tensor] = {}
    for name, wanted in network.state_dict().items():
        if name.startswith("head."):
            last = name.rpartition(".")[2]
            theirs = next((other for other in (name, *(head + last for head in HEADS)) if other in tensors), None)
            if theirs is None or tensors[theirs].shape != wanted.shape:
                return {}
            fitted[name] = tensors[theirs]
    return fitted


def _name_in(tensors: Mapping[str, Tensor], name: str, kind: str) -> str | None:
    """What a weight of the backbone is called in a file; None where it is not there."""
    plain = name.removeprefix("backbone.")
    aliases = [re.sub(pattern, other, plain) for pattern, other in ALIASES.get(kind, [])]
    return next((each for each in (name, plain, *aliases) if each in tensors), None)


def _adapted(given: Tensor, wanted: Tensor) -> Tensor:
    """``given`` for as many channels of the image, or patches of it, as the network has; otherwise unchanged."""
    if given.ndim != wanted.ndim:
        return given
    if given.ndim == 4 and (given.shape[1], wanted.shape[1]) == (3, 1):
        return given.sum(1, keepdim=True)
    if given.ndim == 4 and (given.shape[1], wanted.shape[1]) == (1, 3):
        return given.expand(-1, 3, -1, -1) / 3
    if given.ndim == 3 and given.shape[1] != wanted.shape[1]:
        return _interpolated(given, math.isqrt(wanted.shape[1]))
    return given


def _interpolated(positions: Tensor, side: int) -> Tensor:
    """(1, patches, width) of a square -> (1, side^2, width), bicubic (Dosovitskiy et al. 2021, section 3.2)."""
    before = math.isqrt(positions.shape[1])
    if before**2 != positions.shape[1]:
        return positions
    grid = positions.transpose(1, 2).reshape(1, -1, before, before)
    return functional.interpolate(grid, (side, side), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
