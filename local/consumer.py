"""A consumer of the endpoint: sends studies with an unmodified boto3 client, and later learns their true labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import boto3
import cv2
import numpy as np
from botocore.exceptions import BotoCoreError, ClientError
from numpy.typing import NDArray
from tqdm import tqdm

from cv_factory_ops import captures
from cv_factory_ops.config import ProjectConfig
from cv_factory_ops.config.sources import NpzSource, PhantomSource
from cv_factory_ops.domain import open_domain
from cv_factory_ops.errors import ConfigError, Unavailable
from cv_factory_ops.ingestion.manifest import read_images, read_manifest
from domain_medical.synthetic import SCANNERS, SHIFTED_SCANNER, studies

Kind = Literal["ordinary", "shifted", "unseen"]
PHANTOM_SEEDS: dict[Kind, int] = {"ordinary": 1000, "shifted": 2000, "unseen": 3000}
"""Other seeds are other patients."""
RESERVED_WINDOWS: dict[Kind, int] = {"ordinary": 0, "shifted": 1, "unseen": 3}
"""Drift windows of reserved images before the first one of a kind."""


@dataclass(frozen=True)
class Study:
    """What is sent, and what a radiologist will say of it one day."""

    inference_id: str
    content_type: str
    body: bytes
    label: str


def make_studies(config: ProjectConfig, count: int, kind: Kind, training_run: str) -> list[Study]:
    """Studies that training has not seen: like its own (``ordinary``), or of a changed acquisition, to be sent (``shifted``)
    and never sent (``unseen``).

    Phantoms come from new patients, those of a changed acquisition from a third scanner; arrays come from the reserved training
    images, those of a changed acquisition after blur, gamma and noise (:func:`degrade`). No two kinds have one in common.
    """
    match config.data.source:
        case PhantomSource() as source:
            scanners = SCANNERS if kind == "ordinary" else (SHIFTED_SCANNER,)
            seed = source.seed + PHANTOM_SEEDS[kind]
            made = studies(count, image_size=source.image_size, seed=seed, labels=config.labels, scanners=scanners)
            domain, settings = open_domain(config.domain), config.deidentification
            settings = settings.model_copy(update={"pixels": "trust"})  # phantoms are drawn without text
            return [
                Study(f"{kind}-{i:04d}", domain.content_type, domain.deidentify(body, settings).content, label)
                for i, (body, label) in enumerate(made)
            ]
        case NpzSource():
            first = RESERVED_WINDOWS[kind] * config.drift.window
            chosen = islice(_reserved(config, training_run), first, first + count)
            return [
                Study(f"{kind}-{i:04d}", "application/x-npy", _npy(image if kind == "ordinary" else degrade(image, i)), label)
                for i, (image, label) in enumerate(chosen, start=first)
            ]
        case other:
            raise ConfigError(f"data.source.kind: {other.kind!r} given; the demo's consumer has studies for: phantoms, npz")


def send(config: ProjectConfig, batch: list[Study], title: str) -> None:
    """Send studies, two at a time, as a hospital's gateway would.

    Without ``endpoint_url`` this client talks to AWS; the local endpoint takes any credentials.

    Raises:
        Unavailable: a study was not answered.
    """
    address = os.environ["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"]
    credentials = {"aws_access_key_id": "local", "aws_secret_access_key": "local", "region_name": "us-east-1"}
    client = boto3.client("sagemaker-runtime", endpoint_url=address, **credentials)

    def invoke(study: Study) -> None:
        client.invoke_endpoint(
            EndpointName=config.endpoint_name,
            ContentType=study.content_type,
            Body=study.body,
            InferenceId=study.inference_id,
        )

    try:
        with ThreadPoolExecutor(2) as pool:
            list(tqdm(pool.map(invoke, batch), title, len(batch), unit=" studies", leave=False, disable=None))
    except (BotoCoreError, ClientError) as error:
        raise Unavailable(f"endpoint {config.endpoint_name}: {' '.join(str(error).split())}") from None


def tell_labels(config: ProjectConfig, batch: list[Study]) -> None:
    """The labels of studies arrive."""
    captures.add_labels(config, {study.inference_id: study.label for study in batch})


def degrade(image: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Another acquisition of (rows, columns) in 0..1: blur (sigma 1 pixel), gamma 1.6, noise (standard deviation 0.06)."""
    blurred = cv2.GaussianBlur(image, (0, 0), 1.0) ** 1.6
    noise = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32)
    noisy: NDArray[np.float32] = np.clip(blurred + 0.06 * noise, 0, 1).astype(np.float32)
    return noisy


def _reserved(config: ProjectConfig, training_run: str) -> Iterator[tuple[NDArray[np.float32], str]]:
    folder = Path(unquote(urlsplit(f"{training_run}/ingest").path))
    manifest = read_manifest(folder)
    labels = manifest[manifest["split"] == "reserve"].set_index("id")["label"].to_dict()
    for name, image in read_images(folder):
        if name in labels:
            yield image.astype(np.float32) / 65535.0, config.labels[labels[name]]


def _npy(image: NDArray[np.float32]) -> bytes:
    target = BytesIO()
    np.save(target, image)
    return target.getvalue()
