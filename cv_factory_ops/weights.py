"""Weights that were learned elsewhere: safetensors files by path, from S3, or from the Hugging Face hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cv_factory_ops import storage
from cv_factory_ops.config import as_uri
from cv_factory_ops.errors import ConfigError, DataError, Unavailable

if TYPE_CHECKING:
    from torch import Tensor

HUB_URI = re.compile(r"hf://(?P<repository>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


@dataclass(frozen=True)
class Weights:
    """What a safetensors file holds."""

    uri: str
    sha256: str
    """Of the file."""
    tensors: dict[str, Tensor]
    """By their names in the file; those of half precision as float32."""


def read_weights(place: str) -> Weights:
    """Read a safetensors file: a path, ``file://``, ``s3://`` or ``hf://owner/repository[@revision]/file``.

    Raises:
        ConfigError: the hub has no such file, or huggingface_hub is not installed.
        DataError: it is not there, or not a safetensors file.
        Unavailable: the store or the hub does not answer.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    uri = as_uri(place)
    content = storage.read_bytes(_from_hub(uri).resolve().as_uri() if uri.startswith("hf://") else uri)
    try:
        tensors = load(content)
    except (SafetensorError, KeyError):  # a KeyError is a type of number that PyTorch has not
        raise DataError(f"{uri}: is not a safetensors file") from None
    single = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return Weights(uri, hashlib.sha256(content).hexdigest(), single)


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file."""
    from safetensors.torch import save_file

    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _from_hub(uri: str) -> Path:
    """The file in the hub's cache on this machine (``HF_HOME``), downloaded where it is not there yet."""
    try:
        from httpx2 import HTTPError
        from huggingface_hub import errors, hf_hub_download
    except ImportError:
        raise ConfigError(f"{uri}: needs huggingface_hub: pip install 'cv-factory[hub]'") from None
    given = HUB_URI.fullmatch(uri)
    if not given:
        raise ConfigError(f"{uri}: allowed is hf://owner/repository/file or hf://owner/repository@revision/file")
    try:
        return Path(hf_hub_download(given["repository"], given["file"], revision=given["revision"]))
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
        errors.HFValidationError,
    ):
        raise ConfigError(f"{uri}: the hub has no such file, or HF_TOKEN does not open it") from None
    except (errors.LocalEntryNotFoundError, HTTPError):
        page = f"https://huggingface.co/{given['repository']}/blob/{given['revision'] or 'main'}/{given['file']}"
        raise Unavailable(f"{uri}: the hub does not answer; without a network, give the path of a copy of {page}") from None
    except OSError as error:
        raise storage.explained_os_error(error, uri) from None
