"""What is known of the vectors of a FAISS index, by their row: an Arrow table, mapped from its file where it has one.

item     JSON of id, metadata and text
key      64 bits of the id's BLAKE2b, by which it is found
w_*, n_* a column for each name in the metadata (see :mod:`cv_factory_ops.features.fields`), words by their code
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cv_factory_ops.features.fields import Clause, fields
from cv_factory_ops.features.stores import Item

WORDS = pa.dictionary(pa.int32(), pa.string())


class Rows:
    """Items by row; at least one."""

    def __init__(self, table: Any) -> None:
        self.table = table
        column = table["item"].chunk(0)
        self._bounds = np.lib.stride_tricks.sliding_window_view(np.frombuffer(column.buffers()[1], np.int64), 2)
        written = memoryview(column.buffers()[2])
        self._written: Callable[[int, int], bytes | memoryview] = lambda start, end: written[start:end]

    @classmethod
    def of(cls, items: Sequence[Item]) -> Self:
        known = [fields(item.metadata) for item in items]
        written = [json.dumps([item.id, dict(item.metadata), item.text], separators=(",", ":")).encode() for item in items]
        columns = {"item": pa.array(written, pa.large_binary()), "key": pa.array(_keys([item.id for item in items]))}
        for name in sorted({name for each in known for name in each}):
            columns[name] = pa.array([each.get(name) for each in known], WORDS if name.startswith("w_") else pa.float64())
        return cls(pa.table(columns))

    @classmethod
    def read(cls, path: Path) -> Self:
        with pa.memory_map(str(path)) as file:
            begin = file.read_buffer(1).address
            rows = cls(pa.ipc.open_file(file).read_all())
        # Items are read, not mapped: each one that is looked at would make the 64 KiB around it resident in the process.
        first = rows.table["item"].chunk(0).buffers()[2].address - begin
        handle = os.open(path, os.O_RDONLY)
        weakref.finalize(rows, os.close, handle)
        rows._written = lambda start, end: os.pread(handle, end - start, first + start)
        return rows

    def write(self, path: Path) -> None:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, self.table.schema) as writer:
            writer.write_table(self.table)

    def kept(self, alive: NDArray[np.bool_]) -> Self:
        """Those that a mask (rows,) says, at least one."""
        return type(self)(self.table.filter(pa.array(alive)).combine_chunks())

    @classmethod
    def joined(cls, parts: Iterable[Rows]) -> Self:
        """All rows of several, one after the other."""
        tables = pa.concat_tables([part.table for part in parts], promote_options="default")
        return cls(tables.unify_dictionaries().combine_chunks())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def items(self, rows: Sequence[int] | NDArray[np.int64]) -> list[Item]:
        written = b",".join([self._written(start, end) for start, end in self._bounds[rows].tolist()])
        return [Item(*each) for each in json.loads(f"[{str(written, 'ascii')}]")]

    def find(self, ids: Sequence[str], alive: NDArray[np.bool_] | None) -> dict[str, int]:
        """Rows of those ids that are there, among those that a mask (rows,) admits."""
        sorted_keys, order = self._sorted
        keys = _keys(ids)
        starts, ends = (np.searchsorted(sorted_keys, keys, side) for side in ("left", "right"))
        places = np.flatnonzero(ends > starts)
        rows = [row for place in places for row in order[starts[place] : ends[place]].tolist() if alive is None or alive[row]]
        wanted = set(ids)
        return {item.id: row for item, row in zip(self.items(rows), rows, strict=True) if item.id in wanted}

    def admitted(self, wanted: Sequence[Clause]) -> NDArray[np.bool_]:
        """A mask (rows,) of those that all clauses, at least one, admit."""
        mask = self._mask(wanted[0])
        for clause in wanted[1:]:
            mask = pc.and_(mask, self._mask(clause))
        found: NDArray[np.bool_] = mask.to_numpy(zero_copy_only=False)
        return found

    def _mask(self, clause: Clause) -> Any:
        if clause.field not in self.table.column_names:
            return pa.array(np.zeros(len(self), np.bool_))
        column = self.table[clause.field].chunk(0)
        if isinstance(clause.operand, tuple):
            codes = [pc.index(column.dictionary, word).as_py() for word in clause.operand]  # -1 of a word that nobody has
            return pc.is_in(column.indices, value_set=pa.array(codes, pa.int32()))
        compare = {"==": pc.equal, ">=": pc.greater_equal, "<=": pc.less_equal}[clause.operator]
        return compare(column, clause.operand).fill_null(False)

    @cached_property
    def _sorted(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Keys in their order, and the rows that they belong to."""
        keys = self.table["key"].chunk(0).to_numpy()
        order = np.argsort(keys, kind="stable")
        return keys[order], order


def _keys(ids: Sequence[str]) -> NDArray[np.uint64]:
    digests = (hashlib.blake2b(id.encode(errors="surrogatepass"), digest_size=8).digest() for id in ids)
    return np.frombuffer(b"".join(digests), np.uint64)
