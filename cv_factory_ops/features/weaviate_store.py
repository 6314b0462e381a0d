"""Vectors in a Weaviate server, a collection for each name. https://docs.weaviate.io/weaviate/api"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import WeaviateStore
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.engine import Engine, Record, login
from cv_factory_ops.features.fields import Clause, fields, metadata_of, original, plain
from cv_factory_ops.features.stores import Item

if TYPE_CHECKING:
    from weaviate import WeaviateClient

IDS = uuid.UUID("5ba0a4b8-6f0c-4f43-9e0b-0b0f6d3c8f11")
"""Namespace of the UUIDs that stand for ids (RFC 9562, version 5)."""


class WeaviateVectors(Engine):
    """A collection whose description tells dimensions and metric; each name in the metadata is a property."""

    batch = 200

    def __init__(self, client: WeaviateClient, config: WeaviateStore, name: str, dimensions: int) -> None:
        super().__init__(config.url, config.metric, dimensions)
        self.client = client
        told = f"{dimensions} dimensions, {config.metric}"
        with self._explained():
            if not client.collections.exists(f"Cvf_{plain(name)}"):
                self._create(f"Cvf_{plain(name)}", told)
            self.collection = client.collections.use(f"Cvf_{plain(name)}")
            there = self.collection.config.get(simple=True)
        if there.description != told:
            raise DataError(f"{self.place}: holds {there.description}; {told} is asked for")
        self._properties = {each.name for each in there.properties}

    @classmethod
    def open(cls, config: WeaviateStore, name: str, dimensions: int) -> Self:
        """See :func:`cv_factory_ops.features.stores.open_store`."""
        import weaviate
        from weaviate.classes.init import AdditionalConfig, Auth, Timeout
        from weaviate.exceptions import WeaviateBaseError

        url, key = urlsplit(config.url), login(config.api_key_env)
        secure = url.scheme == "https"
        port = url.port or (443 if secure else 80)
        if port == config.grpc_port:
            raise ConfigError(f"store.grpc_port: {port} given, the port of store.url; Weaviate answers gRPC on another")
        try:
            client = weaviate.connect_to_custom(
                http_host=url.hostname or "",
                http_port=port,
                http_secure=secure,
                grpc_host=url.hostname or "",
                grpc_port=config.grpc_port,
                grpc_secure=secure,
                auth_credentials=Auth.api_key(key) if key else None,
                additional_config=AdditionalConfig(timeout=Timeout(init=10)),
                skip_init_checks=True,  # they also ask a package index for newer clients
            )
        except WeaviateBaseError as error:
            raise Unavailable(f"{config.url}: Weaviate does not answer ({type(error).__name__})") from None
        with ExitStack() as held:
            held.callback(client.close)
            store = cls(client, config, name, dimensions)
            store.held = held.pop_all()
        return store

    def read(self, ids: Sequence[str]) -> Mapping[str, Record]:
        with self._explained():
            found = self.collection.query.fetch_objects_by_ids(_uuids(ids), limit=len(ids), include_vector=True)
        return {record.item.id: record for record in map(_record, found.objects)}

    def write(self, records: Sequence[Record]) -> None:
        from weaviate.classes.data import DataObject

        objects = [
            DataObject(properties=_properties(record.item), uuid=_uuid(record.item.id), vector=record.vector.tolist())
            for record in records
        ]
        self._describe({name for each in objects for name in each.properties})
        with self._explained():
            if failed := self.collection.data.insert_many(objects).errors:
                raise Unavailable(f"{self.place}: Weaviate has not kept {len(failed)} of {len(records)} items")

    def remove(self, ids: Sequence[str]) -> None:
        from weaviate.classes.query import Filter

        with self._explained():
            self.collection.data.delete_many(Filter.by_id().contains_any(_uuids(ids)))

    def nearest(self, vector: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> Sequence[Record]:
        if any(clause.field not in self._properties for clause in wanted):
            return []
        with self._explained():
            found = self.collection.query.near_vector(vector.tolist(), limit=k, filters=_filter(wanted), include_vector=True)
        return [_record(each) for each in found.objects]

    def items(self) -> Iterator[Item]:
        with self._explained():
            yield from (_item(each.properties) for each in self.collection.iterator(cache_size=self.batch))

    def count(self) -> int:
        with self._explained():
            return int(self.collection.aggregate.over_all(total_count=True).total_count or 0)

    def _create(self, name: str, told: str) -> None:
        from weaviate.classes.config import Configure, DataType, Property, VectorDistances

        metric = VectorDistances.COSINE if self.metric == "cosine" else VectorDistances.L2_SQUARED
        only_kept = {"index_filterable": False, "index_searchable": False}
        self.client.collections.create(
            name,
            description=told,
            vector_config=Configure.Vectors.self_provided(
                vector_index_config=Configure.VectorIndex.hnsw(
                    distance_metric=metric, max_connections=32, ef_construction=200, ef=200
                )
            ),
            properties=[Property(name=each, data_type=DataType.TEXT, **only_kept) for each in ("key", "text")],
        )

    def _describe(self, names: Iterable[str]) -> None:
        """Make properties for names that are new, lest Weaviate guesses: it would take words apart."""
        from weaviate.classes.config import DataType, Property, Tokenization

        for name in sorted(set(names) - self._properties):
            if name.startswith("w_"):
                made = Property(
                    name=name,
                    data_type=DataType.TEXT,
                    tokenization=Tokenization.FIELD,
                    index_filterable=True,
                    index_searchable=False,
                )
            else:
                made = Property(name=name, data_type=DataType.NUMBER, index_filterable=True, index_range_filters=True)
            with self._explained():
                self.collection.config.add_property(made)
            self._properties.add(name)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from weaviate.exceptions import AuthenticationFailedError, UnexpectedStatusCodeError, WeaviateBaseError

        try:
            yield
        except AuthenticationFailedError:
            raise ConfigError(f"{self.place}: Weaviate refuses the key of store.api_key_env") from None
        except UnexpectedStatusCodeError as error:
            if error.status_code in {401, 403}:
                raise ConfigError(f"{self.place}: Weaviate refuses the key of store.api_key_env") from None
            raise DataError(f"{self.place}: Weaviate answers {error.status_code}") from None
        except WeaviateBaseError as error:
            raise Unavailable(f"{self.place}: Weaviate does not answer ({type(error).__name__})") from None


def _uuid(each: str) -> uuid.UUID:
    return uuid.uuid5(IDS, each)


def _uuids(ids: Sequence[str]) -> list[uuid.UUID]:
    return [_uuid(each) for each in ids]


def _properties(item: Item) -> dict[str, Any]:
    return {**fields(item.metadata), "key": plain(item.id), "text": item.text}


def _item(properties: Mapping[str, Any]) -> Item:
    return Item(original(properties["key"]), metadata_of(properties), properties["text"])


def _record(found: Any) -> Record:
    return Record(_item(found.properties), np.array(found.vector["default"], np.float32))


def _filter(wanted: Sequence[Clause]) -> Any:
    from weaviate.classes.query import Filter

    return Filter.all_of([_term(clause) for clause in wanted]) if wanted else None


def _term(clause: Clause) -> Any:
    from weaviate.classes.query import Filter

    named = Filter.by_property(clause.field)
    match clause.operator:
        case "in":
            return named.contains_any(list(clause.operand) if isinstance(clause.operand, tuple) else [])
        case "==":
            return named.equal(clause.operand)
        case ">=":
            return named.greater_or_equal(clause.operand)
        case "<=":
            return named.less_or_equal(clause.operand)
