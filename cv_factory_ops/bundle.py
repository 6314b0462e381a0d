"""THE model bundle: one directory that training writes and every server loads.

    bundle.json        architecture, input size, labels, threshold, learned state, digests of what it was made from
    model.safetensors  the weights
    embedder.safetensors  learned state of the embedder, where the embedding is not the network's own
    pca.npz            mean and components of the embedding's principal components
    reference.parquet  features of held-out images: what drift is measured against
    index/             where it is served with similar studies: their index, see :mod:`cv_factory_ops.features.index`

Its digest (over all files but those of the index, which is made for this digest) names it everywhere: MLflow tag, endpoint
config, answers, captures. No file is a pickle.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from cv_factory_ops import storage
from cv_factory_ops.config.data import Decoding
from cv_factory_ops.config.embeddings import Embedding, ModelEmbedding
from cv_factory_ops.config.models import AnyModel, RetinaNet, Unet
from cv_factory_ops.config.preprocessing import PreprocessingConfig
from cv_factory_ops.config.sources import TaskName
from cv_factory_ops.domain import Kind
from cv_factory_ops.errors import DataError
from cv_factory_ops.records import Frozen
from cv_factory_ops.weights import write_weights

if TYPE_CHECKING:
    import pandas as pd

    from cv_factory_ops.models import Classifier
    from cv_factory_ops.preprocessing.embedders import Embedder

INDEX = "index"


class BundleManifest(Frozen):
    """``bundle.json``."""

    format: Literal[1] = 1
    project: str
    domain: str
    labels: list[str]
    model: AnyModel
    decoding: Decoding = Decoding()
    preprocessing: PreprocessingConfig
    embedding: Embedding = ModelEmbedding()
    mean: float
    """Mean intensity of the training images, 0..1; also a buffer of the weights."""
    std: float
    threshold: float
    """Score of the positive class from which the answer is positive (two classes), of a detection that from which a box is
    answered; chosen on validation."""
    overlap: float | None = Field(default=None, exclude_if=lambda given: given is None)
    """Of a detection: intersection over union above which the lesser of two boxes goes; chosen on validation."""
    temperature: float = 1.0
    """What the network's outputs are divided by; fitted on validation."""
    abstention: float = 0.0
    """Confidence (:func:`cv_factory_ops.metrics.confidence`) below which an answer is marked as abstained; 0 marks none."""
    features: dict[str, Kind]
    """Columns of the reference, and of the ``features`` of each answer."""
    data_digest: str
    test_digest: str
    code_version: str
    git_sha: str

    @property
    def task(self) -> TaskName:
        """What the network answers for: an image, each of its pixels, or boxes in it."""
        match self.model:
            case Unet():
                return "segmentation"
            case RetinaNet():
                return "detection"
            case _:
                return "classification"

    @property
    def channels(self) -> int:
        """Of the model's input: 1 grey, 3 colours."""
        return self.decoding.channels


@dataclass(frozen=True)
class Pca:
    """Principal components of the embedding: (x - mean) @ components.T."""

    mean: NDArray[np.float64]
    """(features,)"""
    components: NDArray[np.float64]
    """(components, features)"""

    def transform(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """(N, features) -> (N, components)"""
        centred = embedding.astype(np.float64) - self.mean
        # Row by row: BLAS adds up in another order for another number of rows, so the last bits would depend on the batch.
        projected: NDArray[np.float64] = np.array([self.components @ row for row in centred])
        return projected.reshape(len(embedding), len(self.components))

    def residual(self, embedding: NDArray[np.float32], projected: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) length of what the components leave of an embedding (N, features), given what :meth:`transform` made of it: an
        image unlike any that was learned may still lie between them in every component."""
        centred = embedding.astype(np.float64) - self.mean
        squares = [float(whole @ whole - part @ part) for whole, part in zip(centred, projected, strict=True)]
        return np.sqrt(np.maximum(squares, 0.0))


@dataclass(frozen=True)
class Bundle:
    """A bundle on the local disk."""

    path: Path
    manifest: BundleManifest

    @classmethod
    def load(cls, path: Path) -> Bundle:
        """Open a bundle directory.

        Raises:
            DataError: it is not one, or of another format.
        """
        try:
            return cls(path, BundleManifest.model_validate_json((path / "bundle.json").read_bytes()))
        except OSError:
            raise DataError(f"{path}: is not a model bundle; bundle.json is missing") from None
        except ValidationError as error:
            raise DataError(f"{path / 'bundle.json'}: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None

    @classmethod
    def write(
        cls,
        path: Path,
        manifest: BundleManifest,
        network: Classifier,
        pca: Pca,
        reference: pd.DataFrame,
        embedder: Embedder | None = None,
    ) -> Bundle:
        """Write a new bundle directory; ``embedder`` where the embedding is not the network's own."""
        from safetensors.numpy import save_file as save_arrays

        shutil.rmtree(path, ignore_errors=True)  # what a rank that died while it wrote has left
        path.mkdir(parents=True)
        write_weights(path / "model.safetensors", network.state_dict())
        if embedder:
            save_arrays(dict(embedder.state), path / "embedder.safetensors")
        np.savez(path / "pca.npz", mean=pca.mean, components=pca.components)
        reference.to_parquet(path / "reference.parquet", index=False)
        text = json.dumps(manifest.model_dump(mode="json"), indent=2, sort_keys=True)
        (path / "bundle.json").write_text(text, encoding="utf-8")
        for file in path.glob("*.safetensors"):  # for the writer alone, whatever the umask says; servers run as other users
            shutil.copymode(path / "bundle.json", file)
        return cls(path, manifest)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all files but the index."""
        return storage.tree_digest(self.path, without=INDEX)

    @cached_property
    def packed_digest(self) -> str:
        """What it is called by where it is packed together with an index; without one its own digest."""
        folder = self.path / INDEX
        return storage.text_digest(f"{self.digest} {storage.tree_digest(folder)}") if folder.is_dir() else self.digest

    def with_index(self, index: Path, folder: Path) -> Bundle:
        """A copy of the bundle in a new folder, with an index in it."""
        shutil.copytree(self.path, folder)
        shutil.copytree(index, folder / INDEX)
        return Bundle(folder, self.manifest)

    def network(self) -> Classifier:
        """The network with its weights, in evaluation mode."""
        from safetensors.torch import load_file

        from cv_factory_ops.models import build

        manifest = self.manifest
        network = build(
            manifest.model, len(manifest.labels), manifest.mean, manifest.std, manifest.channels, manifest.preprocessing.size
        )
        network.load_state_dict(load_file(self.path / "model.safetensors"))
        return network.eval()

    def embedder(self) -> Embedder | None:
        """What embeds images in place of the network."""
        if isinstance(self.manifest.embedding, ModelEmbedding):
            return None
        from safetensors.numpy import load_file

        from cv_factory_ops.preprocessing.embedders import load_embedder

        state = load_file(self.path / "embedder.safetensors")
        return load_embedder(self.manifest.embedding, state, self.manifest.preprocessing.size)

    def pca(self) -> Pca:
        with np.load(self.path / "pca.npz", allow_pickle=False) as arrays:
            return Pca(arrays["mean"], arrays["components"])

    def reference(self) -> pd.DataFrame:
        """Features of held-out images, one row an image, the columns of ``manifest.features``."""
        import pandas as pd

        return pd.read_parquet(self.path / "reference.parquet")


def pack(bundle: Path, archive: Path) -> None:
    """SageMaker's ``model.tar.gz`` of a bundle: the same bytes for the same bundle."""

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime = info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mode = 0o755 if info.isdir() else 0o644
        return info

    import gzip

    with archive.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=1, fileobj=raw, mtime=0) as zipped:
        with tarfile.open(fileobj=zipped, mode="w") as tar:
            for item in sorted(bundle.iterdir()):
                tar.add(item, item.name, filter=anonymous)


def unpack(archive: Path, folder: Path) -> None:
    """Extract ``model.tar.gz``; members that point outside the folder are refused.

    Raises:
        DataError: it is not a gzipped tar archive of plain files.
    """
    try:
        with tarfile.open(archive, "r:gz") as tar:
            tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Debian 12's Python 3.11.2 has none
            tar.extractall(folder, [_plain(member) for member in tar])  # noqa: S202 - each is looked at
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive}: is not a usable model.tar.gz: {error}") from None


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """
    Raises:
        TarError: it is neither a file nor a folder, or would lie elsewhere.
    """
    if not (member.isfile() or member.isdir()) or member.name.startswith("/") or ".." in member.name.split("/"):
        raise tarfile.TarError(f"{member.name} is not a file below it")
    return member


def missing_to_nan(features: Mapping[str, str | float | None], kinds: Mapping[str, Kind]) -> dict[str, str | float]:
    """A row of features in the reference's terms: absent numbers are NaN, absent categories ``missing``."""
    row: dict[str, str | float] = {}
    for name, kind in kinds.items():
        value = features.get(name)
        if kind == "number":
            row[name] = float(value) if isinstance(value, (int, float)) else float("nan")
        else:
            row[name] = "missing" if value is None else str(value)
    return row
