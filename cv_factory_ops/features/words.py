"""Items by their words: BM25 over metadata and text."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable

from cv_factory_ops.features.fields import Clause, clauses, fields
from cv_factory_ops.features.stores import Filter, Item

TABLES = """
    CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2');
    CREATE TABLE items (number INTEGER PRIMARY KEY, id TEXT NOT NULL);
    CREATE TABLE facts (field TEXT, value, number INTEGER, PRIMARY KEY (field, value, number)) WITHOUT ROWID;
"""


class Words:
    """An index in memory, by SQLite's FTS5. Made anew from a store whenever that is opened, it cannot differ from it.

    A word in ``n`` of ``N`` items weighs ``ln((N - n + 0.5) / (n + 0.5))``, or 0.000001 where more than half of them have it;
    ``k1`` is 1.2, ``b`` 0.75. https://www.sqlite.org/fts5.html#the_bm25_function
    """

    def __init__(self, items: Iterable[Item]) -> None:
        import sqlite3  # which a Python may lack, and only a hybrid search needs

        self._database = sqlite3.connect(":memory:", check_same_thread=False)
        self._lock = threading.Lock()
        self._database.executescript(TABLES)
        for number, item in enumerate(items):
            self._database.execute("INSERT INTO items VALUES (?, ?)", (number, item.id))
            self._database.execute("INSERT INTO words (rowid, text) VALUES (?, ?)", (number, words_of(item)))
            facts = [(field, value, number) for field, value in fields(item.metadata).items()]
            self._database.executemany("INSERT INTO facts VALUES (?, ?, ?)", facts)
        self._database.commit()

    def best(self, text: str, k: int, where: Filter | None = None) -> list[str]:
        """Ids of those that share words with a text and that the filter admits: the ``k`` best, best first."""
        asked = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text.casefold())))
        if not asked:
            return []
        sql: str = "SELECT id FROM words JOIN items ON number = words.rowid WHERE words MATCH ?"
        values: list[str | float] = [asked]
        for clause in clauses(where or {}):
            condition, operands = _condition(clause)
            # The + keeps SQLite from asking for the words again for each number, a hundred times as slow.
            sql += f" AND +words.rowid IN (SELECT number FROM facts WHERE field = ? AND {condition})"  # noqa: S608 - operands apart
            values += [clause.field, *operands]
        with self._lock:
            rows = self._database.execute(f"{sql} ORDER BY bm25(words), id LIMIT ?", [*values, k]).fetchall()
        return [row[0] for row in rows]

    def close(self) -> None:
        self._database.close()


def words_of(item: Item) -> str:
    """The words of its metadata, then its text."""
    return " ".join([*(value for value in item.metadata.values() if isinstance(value, str)), item.text]).strip()


def _condition(clause: Clause) -> tuple[str, list[str | float]]:
    """SQL about ``value``, and what stands for its question marks."""
    if isinstance(clause.operand, list):
        return f"value IN ({', '.join('?' * len(clause.operand))})", list(clause.operand)
    return f"value {clause.operator} ?", [clause.operand]
