"""A server that answers as an index of Pinecone does, by its published API (https://docs.pinecone.io/reference/api, data
plane): what the official client is run against where the managed service cannot be reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import numpy as np

KEY = "pinecone-key-of-the-tests"
COMPARISONS = {
    "$eq": lambda value, operand: value == operand,
    "$in": lambda value, operand: value in operand,
    "$gte": lambda value, operand: value >= operand,
    "$lte": lambda value, operand: value <= operand,
}
Records = dict[str, dict[str, Any]]
NO_HEADERS: Mapping[str, str] = {}


class PineconeServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, dimension: int, metric: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.dimension, self.metric = dimension, metric
        self.namespaces: dict[str, Records] = {}
        self.written = 0
        self.behind = 0
        """Reads (fetch, list, query, statistics) that are still answered as the last one was, whatever was written since."""
        self._shown: tuple[int, dict[str, Records]] = (0, {})

    def shown(self) -> tuple[int, dict[str, Records]]:
        """What a read sees: up to which write, and the records."""
        if self.behind:
            self.behind -= 1
        else:
            self._shown = self.written, {name: dict(records) for name, records in self.namespaces.items()}
        return self._shown

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def pinecone(dimension: int, metric: str) -> Iterator[PineconeServer]:
    with PineconeServer(dimension, metric) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PineconeServer
    there: dict[str, Records]
    """By namespace, as the request that is answered sees them."""
    answers: ClassVar[dict[str, str]] = {
        "/vectors/upsert": "upsert",
        "/vectors/fetch": "fetch",
        "/vectors/delete": "delete",
        "/vectors/list": "list_ids",
        "/query": "query",
        "/describe_index_stats": "stats",
    }

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        asked = parse_qs(urlsplit(self.path).query)
        self.answer({name: values if name == "ids" else values[0] for name, values in asked.items()})

    def do_POST(self) -> None:
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, asked: dict[str, Any]) -> None:
        name = self.answers.get(urlsplit(self.path).path)
        if self.headers.get("Api-Key") != KEY:
            self.send(401, {"message": "Invalid API Key"})
        elif name is None:
            self.send(404, {"message": "not found"})
        else:
            writes = name in {"upsert", "delete"}
            self.server.written += writes
            lsn, self.there = (self.server.written, self.server.namespaces) if writes else self.server.shown()
            status, content = getattr(self, name)(asked, self.there.setdefault(asked.get("namespace", ""), {}))
            self.send(status, content, {f"x-pinecone-lsn-{'committed' if writes else 'reconciled'}": str(lsn)})

    def send(self, status: int, content: dict[str, Any], headers: Mapping[str, str] = NO_HEADERS) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def upsert(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        vectors = asked["vectors"]
        if len(vectors) > 1000 or any(len(each["values"]) != self.server.dimension for each in vectors):
            return 400, {"code": 3, "message": "Vector dimension does not match the dimension of the index", "details": []}
        records.update({each["id"]: each for each in vectors})
        return 200, {"upsertedCount": len(vectors)}

    def fetch(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        return 200, {"vectors": {each: records[each] for each in asked["ids"] if each in records}}

    def delete(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        for each in asked["ids"]:
            records.pop(each, None)
        return 200, {}

    def list_ids(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        start, limit = int(asked.get("paginationToken", 0)), int(asked["limit"])
        page = sorted(records)[start : start + limit]
        more = {"pagination": {"next": str(start + limit)}} if start + limit < len(records) else {}
        return 200, {"vectors": [{"id": each} for each in page], **more}

    def query(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        admitted = [each for each in records.values() if matches(each["metadata"], asked.get("filter") or {})]
        scored = sorted(((self.score(asked["vector"], each["values"]), each["id"]) for each in admitted), reverse=True)
        return 200, {"matches": [{"id": each, "score": score} for score, each in scored[: asked["topK"]]]}

    def score(self, query: list[float], values: list[float]) -> float:
        given, other = np.array(query), np.array(values)
        if self.server.metric == "cosine":
            return float(given @ other / np.linalg.norm(given) / np.linalg.norm(other))
        return -float(((given - other) ** 2).sum())

    def stats(self, asked: dict[str, Any], records: Records) -> tuple[int, dict[str, Any]]:
        counts = {name: {"vectorCount": len(each)} for name, each in self.there.items()}
        total = sum(map(len, self.there.values()))
        return 200, {
            "namespaces": counts,
            "dimension": self.server.dimension,
            "indexFullness": 0.0,
            "totalVectorCount": total,
            "metric": self.server.metric,
            "vectorType": "dense",
        }


def matches(metadata: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a filter of ``$and`` and comparisons admits a record."""
    if "$and" in wanted:
        return all(matches(metadata, each) for each in wanted["$and"])
    return all(
        name in metadata and COMPARISONS[operator](metadata[name], operand)
        for name, comparison in wanted.items()
        for operator, operand in comparison.items()
    )
