"""Stores of vectors, and how similar studies are found: ``retrieval``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cv_factory_ops.records import Frozen


class FlatIndex(Frozen):
    """Compares with every vector: exact."""

    kind: Literal["flat"] = "flat"


class HnswIndex(Frozen):
    """A graph of neighbours (Malkov and Yashunin 2016): fast, in memory."""

    kind: Literal["hnsw"] = "hnsw"
    neighbours: int = Field(default=32, ge=4, le=128)
    """Of a vector in the graph (M)."""
    build_breadth: int = Field(default=200, ge=8, le=2000)
    """Candidates that are looked at while it is built (efConstruction)."""
    search_breadth: int = Field(default=128, ge=1, le=5000)
    """Candidates that are looked at in a search (efSearch): the more, the better the recall and the slower."""


class IvfPqIndex(Frozen):
    """Cells with compressed vectors (Jegou, Douze and Schmid 2011): the smallest. Re-scored on full vectors by ``exact``."""

    kind: Literal["ivf_pq"] = "ivf_pq"
    cells: int = Field(default=1024, ge=1, le=65536)
    """Of which a vector belongs to one (nlist)."""
    codes: int = Field(default=16, ge=1, le=256)
    """Bytes that a vector is compressed to (M); a divisor of its dimensions."""
    probes: int = Field(default=32, ge=1, le=65536)
    """Cells that a search looks into (nprobe)."""


FaissIndex = Annotated[FlatIndex | HnswIndex | IvfPqIndex, Field(discriminator="kind")]


class _Store(Frozen):
    metric: Literal["cosine", "l2"] = "cosine"
    """What nearness is."""


class FaissStore(_Store):
    """FAISS in the process that asks, in files beside its bundle."""

    kind: Literal["faiss"] = "faiss"
    index: FaissIndex = HnswIndex()


class ChromaStore(_Store):
    """Chroma in the process that asks, or a Chroma server. Needs ``pip install 'cv-factory[vectors]'``."""

    kind: Literal["chroma"] = "chroma"
    url: str = Field(default="", pattern=r"^(https?://[^/@\s]+/?)?$")
    """Of a server; empty keeps files beside the bundle."""
    token_env: str = ""
    """Environment variable with the server's token."""


class MilvusStore(_Store):
    """Milvus, or Milvus Lite in the process that asks. Needs ``pip install 'cv-factory[vectors]'``."""

    kind: Literal["milvus"] = "milvus"
    url: str = Field(default="", pattern=r"^(https?://[^/@\s]+/?)?$")
    """Of a server; empty is Milvus Lite, which keeps a file beside the bundle."""
    token_env: str = ""
    """Environment variable with ``user:password`` or an API key."""


class PineconeStore(_Store):
    """An index of Pinecone, made beforehand with this metric and the right dimensions; a namespace for each bundle."""

    kind: Literal["pinecone"] = "pinecone"
    url: str = Field(pattern=r"^https?://[^/@\s]+/?$")
    """Of the index, as Pinecone's console shows its host."""
    api_key_env: str = "PINECONE_API_KEY"
    """Environment variable with the key."""


class WeaviateStore(_Store):
    """A Weaviate server; a collection for each bundle."""

    kind: Literal["weaviate"] = "weaviate"
    url: str = Field(pattern=r"^https?://[^/@\s]+/?$")
    grpc_port: int = Field(default=50051, ge=1, le=65535)
    api_key_env: str = ""
    """Environment variable with the key; empty asks without one."""


VectorStoreConfig = Annotated[
    FaissStore | ChromaStore | MilvusStore | PineconeStore | WeaviateStore, Field(discriminator="kind")
]


class DenseRetriever(Frozen):
    """Nearest vectors."""

    kind: Literal["dense"] = "dense"


class HybridRetriever(Frozen):
    """Nearest vectors, and best words by BM25 (Robertson and Zaragoza 2009) over metadata and text, joined by reciprocal rank
    fusion (Cormack, Clarke and Buettcher 2009)."""

    kind: Literal["hybrid"] = "hybrid"
    candidates: int = Field(default=50, ge=1, le=1000)
    """That each of the two contributes."""
    rank_constant: float = Field(default=60, gt=0)
    """What is added to each rank: the greater, the less the first ranks stand out."""


Retriever = Annotated[DenseRetriever | HybridRetriever, Field(discriminator="kind")]


class NoReranker(Frozen):
    """As retrieved."""

    kind: Literal["none"] = "none"


class ExactReranker(Frozen):
    """By the full vectors, which an index that compresses or estimates only comes near to."""

    kind: Literal["exact"] = "exact"
    candidates: int = Field(default=50, ge=1, le=1000)
    """That are looked at."""


class CrossEncoderReranker(Frozen):
    """By a model that reads both texts, the query's and the candidate's. Needs ``pip install 'cv-factory[rerank]'``."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    path: str
    """Folder of a model for sentence-transformers' CrossEncoder; nothing is downloaded."""
    candidates: int = Field(default=50, ge=1, le=1000)
    """That are looked at."""


Reranker = Annotated[NoReranker | ExactReranker | CrossEncoderReranker, Field(discriminator="kind")]


class RetrievalConfig(Frozen):
    """Similar studies: which are indexed, where, and how they are found. See docs/retrieval.md."""

    store: VectorStoreConfig = FaissStore()
    vector: Literal["components", "embedding"] = "embedding"
    """What stands for an image: the embedding, or its principal components, of which there are
    ``training.embedding_components``."""
    retriever: Retriever = DenseRetriever()
    reranker: Reranker = ExactReranker()
    splits: list[Literal["train", "val", "test"]] = Field(default=["train", "val"], min_length=1)
    """Whose images can be found."""
    k: int = Field(default=5, ge=1, le=100)
    """Similar studies that an answer comes with, where it is asked for them without a number."""
