"""Vectors in Milvus, or in Milvus Lite, which keeps them in a folder. https://milvus.io/docs"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from cv_factory_ops.config.retrieval import MilvusStore
from cv_factory_ops.errors import ConfigError, DataError, Unavailable
from cv_factory_ops.features.engine import Engine, Record, login, writable
from cv_factory_ops.features.fields import Clause, fields, metadata_of, original, plain
from cv_factory_ops.features.stores import Item

if TYPE_CHECKING:
    from pymilvus import MilvusClient

LONGEST_ID = 2048
LONGEST_TEXT = 65535  # bytes: the most that Milvus allows
LOGIN_REFUSED = 1400
FIRST_OF_REQUESTS = 100  # lower codes tell of the service: not ready, no memory, too many requests


class MilvusVectors(Engine):
    """A collection of ``id``, ``vector``, ``text`` and ``metadata``, read with consistency level Strong.

    Ids are kept as :func:`cv_factory_ops.features.fields.plain` makes them: the client writes them into expressions unquoted.
    """

    largest = LONGEST_TEXT

    def __init__(self, client: MilvusClient, place: str, config: MilvusStore, name: str, dimensions: int) -> None:
        super().__init__(place, config.metric, dimensions)
        self.client = client
        self.name = f"cvf_{plain(name)}"
        with self._explained():
            if not client.has_collection(self.name):
                self._create()
            there = client.describe_collection(self.name)
            vector: Any = next((field for field in there["fields"] if field["name"] == "vector"), {"params": {}})
            index = client.describe_index(self.name, "vector") or {}
            client.load_collection(self.name)
        found = (vector["params"].get("dim"), str(index.get("metric_type", "")).lower())
        if found != (dimensions, config.metric):
            raise DataError(f"{place}: holds {found[0]} dimensions, {found[1]}; {dimensions}, {config.metric} is asked for")

    @classmethod
    def open(cls, config: MilvusStore, folder: Path, name: str, dimensions: int) -> Self:
        """See :func:`cv_factory_ops.features.stores.open_store`."""
        from pymilvus import MilvusClient, MilvusException

        # It logs each failure with a traceback and the expression, which quotes data.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        place = config.url or str(folder / "milvus.db")
        token = login(config.token_env)
        with ExitStack() as held:
            where = folder
            if not config.url:
                from milvus_lite.server_manager import server_manager_instance

                where = writable(folder, held)
                held.callback(server_manager_instance.release_server, str(where / "milvus.db"))
            try:
                client = MilvusClient(config.url or str(where / "milvus.db"), token=token, timeout=10)
            except MilvusException as error:
                raise Unavailable(f"{place}: Milvus does not answer ({type(error).__name__})") from None
            held.callback(client.close)
            store = cls(client, place, config, name, dimensions)
            store.is_copy, store.held = where != folder, held.pop_all()
        return store

    def read(self, ids: Sequence[str]) -> Mapping[str, Record]:
        with self._explained():
            rows = self.client.query(
                self.name, ids=[plain(each) for each in ids], output_fields=["*"], consistency_level="Strong"
            )
        return {record.item.id: record for record in map(_record, rows)}

    def write(self, records: Sequence[Record]) -> None:
        with self._explained():
            self.client.upsert(self.name, [_row(record) for record in records])

    def remove(self, ids: Sequence[str]) -> None:
        with self._explained():
            self.client.delete(self.name, ids=[plain(each) for each in ids])

    def nearest(self, vector: NDArray[np.float32], k: int, wanted: Sequence[Clause]) -> Sequence[Record]:
        with self._explained():
            hits = self.client.search(
                self.name,
                data=[vector.tolist()],
                limit=k,
                filter=_expression(wanted),
                output_fields=["*"],
                consistency_level="Strong",
            )
        return [_record(hit["entity"]) for hit in hits[0]]

    def items(self) -> Iterator[Item]:
        with self._explained():
            pages = self.client.query_iterator(self.name, batch_size=self.batch, output_fields=["id", "text", "metadata"])
            while rows := pages.next():
                yield from (_item(row) for row in rows)
            pages.close()

    def count(self) -> int:
        with self._explained():
            rows = self.client.query(self.name, filter="", output_fields=["count(*)"], consistency_level="Strong")
        return int(rows[0]["count(*)"])

    def persist(self) -> None:
        with self._explained():
            self.client.flush(self.name)

    def _create(self) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=LONGEST_ID)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=self.dimensions)
        schema.add_field("text", DataType.VARCHAR, max_length=LONGEST_TEXT)
        schema.add_field("metadata", DataType.JSON)
        index = self.client.prepare_index_params()
        index.add_index("vector", index_type="AUTOINDEX", metric_type=self.metric.upper())
        self.client.create_collection(self.name, schema=schema, index_params=index, consistency_level="Strong")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from grpc import RpcError
        from pymilvus import MilvusException

        try:
            yield
        except RpcError as error:
            raise Unavailable(f"{self.place}: Milvus does not answer ({type(error).__name__})") from None
        except MilvusException as error:
            if error.code == LOGIN_REFUSED:
                raise ConfigError(f"{self.place}: Milvus refuses the login of store.token_env") from None
            if error.is_input_error or error.code >= FIRST_OF_REQUESTS:
                raise DataError(f"{self.place}: Milvus refuses: {type(error).__name__}, code {error.code}") from None
            raise Unavailable(f"{self.place}: Milvus does not answer ({type(error).__name__}, code {error.code})") from None


def _row(record: Record) -> dict[str, Any]:
    item = record.item
    return {"id": plain(item.id), "vector": record.vector.tolist(), "text": item.text, "metadata": fields(item.metadata)}


def _item(row: Mapping[str, Any]) -> Item:
    return Item(original(row["id"]), metadata_of(row["metadata"]), row["text"])


def _record(row: Mapping[str, Any]) -> Record:
    return Record(_item(row), np.asarray(row["vector"], np.float32))


def _expression(wanted: Sequence[Clause]) -> str:
    """Names and words are letters, digits and ``_`` here, so that none can be read as something else."""
    return " and ".join(f"({_term(clause)})" for clause in wanted)


def _term(clause: Clause) -> str:
    field = f'metadata["{clause.field}"]'
    if isinstance(clause.operand, tuple):  # Milvus Lite knows no "in" for what lies within JSON
        return " or ".join(f'{field} == "{word}"' for word in clause.operand)
    return f"{field} {clause.operator} {clause.operand!r}"
