"""A server that answers as Weaviate does, by its published REST API and the gRPC service that its client comes with
(``weaviate.proto.v1``): what the official client is run against where no Weaviate can be."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import grpc
import numpy as np
from weaviate.proto.v1 import aggregate_pb2, base_pb2, batch_delete_pb2, batch_pb2, search_get_pb2, weaviate_pb2_grpc

KEY = "weaviate-key-of-the-tests"
OPERATOR = base_pb2.Filters.Operator
INDEX = {
    "cleanupIntervalSeconds": 300,
    "dynamicEfMin": 100,
    "dynamicEfMax": 500,
    "dynamicEfFactor": 8,
    "flatSearchCutoff": 40000,
    "skip": False,
    "vectorCacheMaxObjects": 10**12,
    "filterStrategy": "sweeping",
}
"""What the server fills in where a collection's vector index does not say it."""
Objects = dict[str, tuple[np.ndarray, dict[str, Any]]]


class Database(weaviate_pb2_grpc.WeaviateServicer):
    """Collections: what REST describes, and gRPC fills and asks."""

    def __init__(self) -> None:
        self.schema: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, Objects] = {}

    def Search(self, request: Any, context: Any) -> Any:
        require_key(context)
        admitted = self.admitted(request.collection, request.filters if request.HasField("filters") else None, context)
        if request.HasField("near_vector"):
            query = np.frombuffer(request.near_vector.vectors[0].vector_bytes, np.float32)
            metric = self.schema[request.collection]["vectorConfig"]["default"]["vectorIndexConfig"]["distance"]
            admitted.sort(key=lambda each: distance(metric, query, self.objects[request.collection][each][0]))
        else:
            admitted = [each for each in sorted(admitted) if each > request.after]
        found = admitted[: request.limit]
        return search_get_pb2.SearchReply(results=[self.result(request.collection, each) for each in found])

    def BatchObjects(self, request: Any, context: Any) -> Any:
        require_key(context)
        for each in request.objects:
            known = {name["name"] for name in self.schema[each.collection]["properties"]}
            properties = dict(each.properties.non_ref_properties)
            if unknown := set(properties) - known:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"no properties {unknown}")
            self.objects[each.collection][each.uuid] = (np.frombuffer(each.vector_bytes, np.float32), properties)
        return batch_pb2.BatchObjectsReply()

    def BatchDelete(self, request: Any, context: Any) -> Any:
        require_key(context)
        gone = self.admitted(request.collection, request.filters, context)
        for each in gone:
            del self.objects[request.collection][each]
        return batch_delete_pb2.BatchDeleteReply(matches=len(gone), successful=len(gone))

    def Aggregate(self, request: Any, context: Any) -> Any:
        require_key(context)
        count = len(self.objects[request.collection])
        return aggregate_pb2.AggregateReply(single_result=aggregate_pb2.AggregateReply.Single(objects_count=count))

    def admitted(self, collection: str, wanted: Any, context: Any) -> list[str]:
        known = {each["name"] for each in self.schema[collection]["properties"]} | {"_id"}
        return [
            each
            for each, (_, properties) in self.objects[collection].items()
            if wanted is None or admits(wanted, {"_id": each, **properties}, known, context)
        ]

    def result(self, collection: str, each: str) -> Any:
        vector, properties = self.objects[collection][each]
        answer = search_get_pb2.SearchResult()
        answer.metadata.id, answer.metadata.id_as_bytes = each, uuid.UUID(each).bytes
        answer.metadata.vectors.add(
            name="default", vector_bytes=vector.tobytes(), type=base_pb2.Vectors.VECTOR_TYPE_SINGLE_FP32
        )
        for name, value in properties.items():
            kept = answer.properties.non_ref_props.fields[name]
            setattr(kept, "text_value" if isinstance(value, str) else "number_value", value)
        return answer


def require_key(context: Any) -> None:
    if dict(context.invocation_metadata()).get("authorization") != f"Bearer {KEY}":
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "invalid api key")


def distance(metric: str, query: np.ndarray, vector: np.ndarray) -> float:
    given, other = query.astype(float), vector.astype(float)
    if metric == "cosine":
        return float(1 - given @ other / np.linalg.norm(given) / np.linalg.norm(other))
    return float(((given - other) ** 2).sum())


def admits(wanted: Any, properties: dict[str, Any], known: set[str], context: Any) -> bool:
    if wanted.operator == OPERATOR.OPERATOR_AND:
        return all(admits(each, properties, known, context) for each in wanted.filters)
    if wanted.operator == OPERATOR.OPERATOR_OR:
        return any(admits(each, properties, known, context) for each in wanted.filters)
    name = wanted.target.property
    if name not in known:
        context.abort(grpc.StatusCode.UNKNOWN, f"no such prop with name '{name}'")
    if name not in properties:
        return False
    match wanted.operator:
        case OPERATOR.OPERATOR_CONTAINS_ANY:
            return properties[name] in wanted.value_text_array.values
        case OPERATOR.OPERATOR_EQUAL:
            return bool(properties[name] == (wanted.value_text if wanted.HasField("value_text") else wanted.value_number))
        case OPERATOR.OPERATOR_GREATER_THAN_EQUAL:
            return bool(properties[name] >= wanted.value_number)
        case OPERATOR.OPERATOR_LESS_THAN_EQUAL:
            return bool(properties[name] <= wanted.value_number)
    raise NotImplementedError(wanted.operator)


class Rest(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    database: Database

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        schema = self.database.schema
        name = self.path.removeprefix("/v1/schema/")
        if self.path == "/v1/meta":
            self.send(200, {"version": "1.32.0", "grpcMaxMessageSize": 10_000_000})
        elif self.path.startswith("/v1/.well-known/"):
            self.send(404, {})
        elif self.headers.get("Authorization") != f"Bearer {KEY}":
            self.send(401, {"error": [{"message": "anonymous access not enabled"}]})
        else:
            self.send(200, schema[name]) if name in schema else self.send(404, {})

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers.get("Authorization") != f"Bearer {KEY}":
            self.send(401, {"error": [{"message": "anonymous access not enabled"}]})
        elif self.path == "/v1/schema":
            index = given["vectorConfig"]["default"]
            index["vectorIndexConfig"] = {**INDEX, **index["vectorIndexConfig"]}
            self.database.schema[given["class"]] = {"properties": [], **given}
            self.database.objects[given["class"]] = {}
            self.send(200, given)
        else:
            self.database.schema[self.path.split("/")[3]]["properties"].append({"indexSearchable": False, **given})
            self.send(200, given)

    def send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def weaviate() -> Iterator[tuple[str, int]]:
    """Address of REST, port of gRPC."""
    database = Database()
    service = grpc.server(ThreadPoolExecutor(2))
    weaviate_pb2_grpc.add_WeaviateServicer_to_server(database, service)
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Rest,), {"database": database})) as rest:
        Thread(target=rest.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{rest.server_port}", port
        rest.shutdown()
    service.stop(0).wait()
