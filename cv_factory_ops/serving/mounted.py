"""Where a service has put the bundle that a container shall serve, and how it gets there where none does."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

from cv_factory_ops import storage
from cv_factory_ops.bundle import Bundle, unpack
from cv_factory_ops.errors import ConfigError, DataError, Unavailable


def bundle_folder() -> Path:
    """SageMaker's ``SM_MODEL_DIR``, Azure ML's ``AZUREML_MODEL_DIR`` or a copy of Vertex AI's ``AIP_STORAGE_URI``.

    https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements#model_artifacts,
    https://learn.microsoft.com/en-us/azure/machine-learning/how-to-deploy-custom-container

    Raises:
        ConfigError: the image lacks what reads Cloud Storage, or its identity may not read there.
        DataError: there is no bundle, or there are several.
        Unavailable: Cloud Storage does not answer for now.
    """
    if uri := os.environ.get("AIP_STORAGE_URI"):
        return _downloaded(uri)
    if mounted := os.environ.get("AZUREML_MODEL_DIR"):
        found = sorted(path.parent for path in Path(mounted).rglob("bundle.json"))
        if len(found) != 1:
            raise DataError(f"{mounted}: holds {len(found)} model bundles; allowed is one")
        return found[0]
    return Path(os.environ.get("SM_MODEL_DIR", "/opt/ml/model"))


def fetch(uri: str, folder: Path) -> Bundle:
    """Lay a bundle out in a folder: the storage's ``models/<digest>/model.tar.gz``, or a bundle's directory.

    Raises:
        DataError: nothing is there, it is no bundle, or another than the digest in its address says.
        Unavailable: the storage does not answer.
    """
    with tempfile.TemporaryDirectory() as name:
        found = storage.local(uri.rstrip("/"), Path(name))
        if found.is_dir():
            shutil.copytree(found, folder, dirs_exist_ok=True)
        else:
            unpack(found, folder)
    bundle = Bundle.load(folder)
    named = re.fullmatch(r".*/([0-9a-f]{64})/model\.tar\.gz", uri)
    if named and named[1] != bundle.packed_digest:
        raise DataError(f"{uri}: holds the bundle {bundle.packed_digest}, another than its address says")
    return bundle


def _downloaded(uri: str) -> Path:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the age of grpcio, which is not used here
            from google.api_core.exceptions import ClientError, GoogleAPIError
            from google.auth.exceptions import DefaultCredentialsError, GoogleAuthError
            from google.cloud.storage import Client
            from requests import RequestException
    except ImportError as error:
        raise ConfigError(f"AIP_STORAGE_URI: needs {error.name}: pip install 'cv-factory[vertex]'") from None
    try:
        return _copied(Client(), uri)
    except (ClientError, DefaultCredentialsError) as error:
        raise ConfigError(f"{uri}: may not be read: {' '.join(str(error).split())}") from None
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        raise Unavailable(f"{uri}: cannot be read for now: {' '.join(str(error).split())}") from None


def _copied(client: Any, uri: str) -> Path:
    bucket, _, prefix = uri.removeprefix("gs://").rstrip("/").partition("/")
    folder = Path(tempfile.mkdtemp(prefix="cvf-model-"))
    for blob in client.list_blobs(bucket, prefix=f"{prefix}/"):
        if blob.name.endswith("/"):  # what consoles show as an empty folder
            continue
        path = folder / blob.name.removeprefix(f"{prefix}/")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{uri}: holds {blob.name!r}, which is no name of a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(str(path))
    if not (folder / "bundle.json").exists():
        raise DataError(f"{uri}: holds no bundle.json; expected: a model bundle")
    return folder
