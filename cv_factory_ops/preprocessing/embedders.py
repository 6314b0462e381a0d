"""From a prepared image to a vector that drift and retrieval compare images by, where that is not the trained network's own.

An embedder is fitted once, by training; its learned state goes into the bundle as safetensors. ``hog``, ``orb`` and ``sift``
work image by image, so a vector does not depend on the others of its batch; those of networks agree bit for bit for the same
batch, processor and number of threads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, assert_never

import cv2
import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.embeddings import (
    CnnEmbedding,
    Embedding,
    HogEmbedding,
    MaskedImageEmbedding,
    ModelEmbedding,
    OrbEmbedding,
    SiftEmbedding,
    VitEmbedding,
)
from cv_factory_ops.errors import ConfigError, DataError
from cv_factory_ops.ingestion.decode import as_unit_range
from cv_factory_ops.preprocessing.pipeline import to_tensor
from cv_factory_ops.preprocessing.shards import Images
from cv_factory_ops.weights import read_weights

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

log = logging.getLogger("cvf")

WORD_IMAGES = 1024
"""Training images, evenly spaced, that visual words are learned from."""
WORD_DESCRIPTORS = 200_000
"""Most descriptors that visual words are learned from."""
BATCH = 64

State = Mapping[str, NDArray[np.float32]]


class Embedder(Protocol):
    """Not changed by use: many threads may embed with one."""

    state: State
    """All that was learned."""

    def embed(self, prepared: NDArray[np.uint16]) -> NDArray[np.float32]:
        """(N, size, size) or (N, size, size, 3) prepared images -> (N, features)"""


def fit_embedder(config: Embedding, train: Images, device: torch.device | None = None) -> Embedder | None:
    """Learn from the prepared training images, or read weights that were learned elsewhere; None for the network's own.

    Raises:
        ConfigError, DataError: weights do not fit, nothing to learn from, or learning diverged.
    """
    size = train.shape[1]
    match config:
        case ModelEmbedding():
            return None
        case HogEmbedding():
            return Hog(config)
        case OrbEmbedding() | SiftEmbedding():
            return _learn_words(config, train.every(max(len(train) // WORD_IMAGES, 1)))
        case CnnEmbedding() | VitEmbedding():
            weights = {name: tensor.numpy() for name, tensor in read_weights(config.weights).tensors.items()}
            return load_embedder(config, weights, size)
        case MaskedImageEmbedding():
            return _learn_to_paint(config, train, device)
        case _:
            assert_never(config)


def load_embedder(config: Embedding, state: State, size: int) -> Embedder | None:
    """The embedder with that state, for images of ``size`` x ``size``; None for the network's own.

    Raises:
        DataError: the state is not one of this configuration.
    """
    match config:
        case ModelEmbedding():
            return None
        case HogEmbedding():
            return Hog(config)
        case OrbEmbedding() | SiftEmbedding():
            return VisualWords(config, state)
        case CnnEmbedding():
            kept = {name: array for name, array in state.items() if not name.startswith("fc.")}
            channels = _channels(kept, "conv1.weight")
            return Network(_resnet(config, channels), kept, channels, config.mean, config.std)
        case VitEmbedding():
            channels = _channels(state, VIT_INPUT)
            return Network(_vit(config, channels, size), state, channels, config.mean, config.std)
        case MaskedImageEmbedding():
            channels = _channels(state, VIT_INPUT)
            return Network(_masked_autoencoder(config, channels, size), state, channels, 0.5, 0.25)
        case _:
            assert_never(config)


class Hog:
    """Histograms of oriented gradients, by scikit-image; nothing is learned."""

    def __init__(self, config: HogEmbedding) -> None:
        self.state: State = {}
        self._config = config

    def embed(self, prepared: NDArray[np.uint16]) -> NDArray[np.float32]:
        """(N, size, size[, 3]) -> (N, (cells - 1)^2 * 4 * orientations)"""
        from skimage.feature import hog

        cell = prepared.shape[1] // self._config.cells
        side = cell * self._config.cells  # what is left over of a size that is no multiple is cut off
        parts = [
            hog(
                as_unit_range(image)[:side, :side],
                orientations=self._config.orientations,
                pixels_per_cell=(cell, cell),
                cells_per_block=(2, 2),
            )
            for image in prepared
        ]
        return np.stack(parts).astype(np.float32)


class VisualWords:
    """Weighted histogram of an image's descriptors by their nearest visual word, of length 1 (Sivic & Zisserman 2003).

    A word's weight is log(images / images with the word). Bits of ORB count as numbers 0 and 1.
    """

    def __init__(self, config: OrbEmbedding | SiftEmbedding, state: State) -> None:
        self.state = state
        self._config, self._words, self._weights = config, state["words"], state["weights"]
        self._lengths = np.square(self._words).sum(1)

    def embed(self, prepared: NDArray[np.uint16]) -> NDArray[np.float32]:
        """(N, size, size[, 3]) -> (N, words); zeros for an image without keypoints"""
        counts = np.stack([self.count(describe(image, self._config)) for image in prepared])
        weighted = counts * self._weights
        lengths = np.linalg.norm(weighted, axis=1, keepdims=True)
        vectors: NDArray[np.float32] = (weighted / np.where(lengths > 0, lengths, 1)).astype(np.float32)
        return vectors

    def count(self, descriptors: NDArray[np.float32]) -> NDArray[np.float32]:
        """(K, features) descriptors -> (words,) how many are nearest to which word"""
        nearest = (self._lengths - 2 * descriptors @ self._words.T).argmin(1)
        return np.bincount(nearest, minlength=len(self._words)).astype(np.float32)


def describe(prepared: NDArray[np.uint16], config: OrbEmbedding | SiftEmbedding) -> NDArray[np.float32]:
    """Descriptors of the strongest keypoints of one image: (K, 256) bits of ORB, or (K, 128) of SIFT."""
    grey = np.rint(as_unit_range(prepared) * 255).clip(0, 255).astype(np.uint8)
    if isinstance(config, SiftEmbedding):
        found = cv2.SIFT.create(nfeatures=config.keypoints).detectAndCompute(grey, None)[1]
        return np.zeros((0, 128), np.float32) if found is None else found[: config.keypoints]
    patch = min(31, len(grey) // 4)  # OpenCV's 31 leaves nothing of an image of 64 pixels
    orb = cv2.ORB.create(nfeatures=config.keypoints, edgeThreshold=patch, patchSize=patch, fastThreshold=5)
    found = orb.detectAndCompute(grey, None)[1]
    return np.zeros((0, 256), np.float32) if found is None else np.unpackbits(found, axis=1).astype(np.float32)


def _learn_words(config: OrbEmbedding | SiftEmbedding, images: Images) -> VisualWords:
    from sklearn.cluster import KMeans

    described = [describe(images[i], config) for i in range(len(images))]
    descriptors = np.concatenate(described)
    if len(descriptors) < config.words:
        raise DataError(
            f"embedding: {len(descriptors)} keypoints found in {len(images)} training images; {config.words} words need at"
            " least as many: lower embedding.words"
        )
    sample = descriptors[:: max(len(descriptors) // WORD_DESCRIPTORS, 1)]
    words = KMeans(config.words, n_init=1, random_state=config.seed).fit(sample).cluster_centers_.astype(np.float32)
    plain = VisualWords(config, {"words": words, "weights": np.ones(len(words), np.float32)})
    having = np.stack([plain.count(found) > 0 for found in described]).sum(0)
    weights = np.log(len(images) / np.maximum(having, 1)).astype(np.float32)
    return VisualWords(config, {"words": words, "weights": weights})


class Network:
    """Features of a PyTorch network, which takes (N, channels, size, size) and gives (N, features)."""

    def __init__(self, network: nn.Module, state: State, channels: int, mean: float, std: float) -> None:
        import torch

        tensors = {name: torch.from_numpy(np.array(array)) for name, array in state.items()}
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise DataError("embedding: the weights do not fit: " + " ".join(str(error).split())[:300]) from None
        self.state = state
        self._network, self._channels, self._mean, self._std = network.eval(), channels, mean, std

    def embed(self, prepared: NDArray[np.uint16]) -> NDArray[np.float32]:
        """(N, size, size[, 3]) -> (N, features)"""
        import torch

        with torch.inference_mode():
            images = (in_channels(to_tensor(prepared), self._channels) - self._mean) / self._std
            features: NDArray[np.float32] = self._network(images).numpy()
        return features


def in_channels(images: Tensor, channels: int) -> Tensor:
    """(N, 1 or 3, H, W) -> (N, channels, H, W): grey is repeated, colours are averaged."""
    if images.shape[1] == channels:
        return images
    return images.expand(-1, channels, -1, -1) if images.shape[1] == 1 else images.mean(1, keepdim=True)


VIT_INPUT = "patch_embedding.patch_embeddings.weight"


def _channels(state: State, name: str) -> int:
    if name not in state:
        raise DataError(f"embedding: the weights do not fit: {name} is missing")
    return int(state[name].shape[1])


def _resnet(config: CnnEmbedding, channels: int) -> nn.Module:
    from monai.networks import nets

    network: nn.Module = getattr(nets, f"resnet{config.depth}")(
        spatial_dims=2,
        n_input_channels=channels,
        feed_forward=False,
        conv1_t_size=3 if config.small_input else 7,
        conv1_t_stride=1 if config.small_input else 2,
        no_max_pool=config.small_input,
        shortcut_type="B",
    )
    return network


def _vit(config: VitEmbedding, channels: int, size: int) -> nn.Module:
    from monai.networks.nets import ViT

    class MeanOfTokens(ViT):  # type: ignore[misc]
        def forward(self, images: Tensor) -> Tensor:
            mean: Tensor = super().forward(images)[0].mean(1)
            return mean

    return MeanOfTokens(
        channels, size, config.patch, config.width, 4 * config.width, config.layers, config.heads, spatial_dims=2
    )


def _masked_autoencoder(config: MaskedImageEmbedding, channels: int, size: int) -> Any:
    """Called with images alone it embeds with all patches seen; its ``paint`` is the forward pass of learning."""
    import torch
    from monai.networks.nets import MaskedAutoEncoderViT

    class Masked(MaskedAutoEncoderViT):  # type: ignore[misc]
        paint = MaskedAutoEncoderViT.forward

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.patch_embedding(images)
            tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            mean: Tensor = self.blocks(tokens)[:, 1:].mean(1)
            return mean

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.meshgrid")  # MONAI calls it as older versions of PyTorch want it
        return Masked(
            in_channels=channels,
            img_size=size,
            patch_size=config.patch,
            hidden_size=config.width,
            mlp_dim=4 * config.width,
            num_layers=config.layers,
            num_heads=config.heads,
            masking_ratio=config.masked,
            decoder_hidden_size=config.width,
            decoder_mlp_dim=4 * config.width,
            decoder_num_layers=2,
            decoder_num_heads=config.heads,
            spatial_dims=2,
        )


def _learn_to_paint(config: MaskedImageEmbedding, train: Images, device: torch.device | None) -> Network:
    """Learn to paint hidden patches; the loss is the squared error of the hidden ones, each patch standardised."""
    import torch

    device = device or torch.device("cpu")
    channels = 1 if len(train.shape) == 3 else 3
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        network = _masked_autoencoder(config, channels, train.shape[1]).to(device)
        optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
        steps = -(-len(train) // config.batch_size) * config.epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=steps)
        for epoch in range(config.epochs):
            loss = _painting_epoch(network, optimizer, schedule, train, config, device)
            log.info("embedding: epoch %d/%d: loss %.4f", epoch + 1, config.epochs, loss)
    state = {name: tensor.cpu().contiguous().numpy() for name, tensor in network.state_dict().items()}
    return Network(network.cpu(), state, channels, 0.5, 0.25)


def _painting_epoch(
    network: Any, optimizer: Any, schedule: Any, train: Images, config: MaskedImageEmbedding, device: torch.device
) -> float:
    import torch

    order, total = torch.randperm(len(train)).numpy(), 0.0
    for start in range(0, len(order), config.batch_size):
        batch = to_tensor(train[np.sort(order[start : start + config.batch_size])]).to(device)
        images = (batch - 0.5) / 0.25
        painted, hidden = network.paint(images)
        loss = ((painted - _patches(images, config.patch)).square().mean(2) * hidden).sum() / hidden.sum()
        if not torch.isfinite(loss):
            raise ConfigError(
                f"embedding: the loss became non-finite; lower embedding.learning_rate ({config.learning_rate:g})"
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        total += float(loss.detach()) * len(batch)
    return total / len(order)


def _patches(images: Tensor, patch: int) -> Tensor:
    """(N, C, H, W) -> (N, patches, patch * patch * C), each of mean 0 and standard deviation 1"""
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1)
    flat = cut.reshape(len(images), -1, patch * patch * images.shape[1])
    standardised: Tensor = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, keepdim=True) + 1e-6).sqrt()
    return standardised
