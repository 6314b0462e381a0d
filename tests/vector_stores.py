"""Stores for tests: an entry of ``STORES`` for each that the contract in ``test_stores.py`` is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import (
    ChromaStore,
    FaissStore,
    FlatIndex,
    HnswIndex,
    IvfPqIndex,
    MilvusStore,
    PineconeStore,
    VectorStoreConfig,
    WeaviateStore,
)
from cv_factory_ops.features.checks import Metric
from cv_factory_ops.features.stores import VectorStore, open_store
from tests.pinecone_server import KEY as PINECONE_KEY
from tests.weaviate_server import KEY as WEAVIATE_KEY

DIMENSIONS = 8

STORES: dict[str, Callable[[pytest.FixtureRequest, Metric], VectorStoreConfig]] = {
    "faiss-flat": lambda request, metric: FaissStore(metric=metric, index=FlatIndex()),
    "faiss-hnsw": lambda request, metric: FaissStore(metric=metric, index=HnswIndex()),
    "faiss-ivf_pq": lambda request, metric: FaissStore(metric=metric, index=IvfPqIndex(codes=4)),
    "chroma": lambda request, metric: ChromaStore(metric=metric),
    "chroma-server": lambda request, metric: ChromaStore(metric=metric, url=request.getfixturevalue("chroma_server")),
    "milvus-lite": lambda request, metric: MilvusStore(metric=metric),
    "pinecone": lambda request, metric: pinecone_store(request, metric),
    "weaviate": lambda request, metric: weaviate_store(request, metric),
}
"""By the name of the parameter; a function may skip the test, or take a server from a fixture of its request."""


def pinecone_store(request: pytest.FixtureRequest, metric: Metric) -> PineconeStore:
    """The official client in front of a server of the tests."""
    request.getfixturevalue("monkeypatch").setenv("PINECONE_API_KEY", PINECONE_KEY)
    return PineconeStore(metric=metric, url=request.getfixturevalue("pinecone_servers")[metric].url)


def weaviate_store(request: pytest.FixtureRequest, metric: Metric) -> WeaviateStore:
    """The official client in front of a server of the tests."""
    request.getfixturevalue("monkeypatch").setenv("WEAVIATE_KEY", WEAVIATE_KEY)
    url, port = request.getfixturevalue("weaviate_server")
    return WeaviateStore(metric=metric, url=url, grpc_port=port, api_key_env="WEAVIATE_KEY")


@dataclass(frozen=True)
class Place:
    """Of a store: empty at first, later what was persisted."""

    config: VectorStoreConfig
    folder: Path
    name: str

    def open(self, dimensions: int = DIMENSIONS) -> VectorStore:
        return open_store(self.config, self.folder, self.name, dimensions)


def noise(count: int, dimensions: int = DIMENSIONS, seed: int = 0) -> NDArray[np.float32]:
    """Vectors (count, dimensions) that point anywhere."""
    return np.random.default_rng(seed).normal(size=(count, dimensions)).astype(np.float32)
