"""Items by their words: BM25 over metadata and text."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Sequence

from cv_factory_ops.features.fields import Clause, clauses, fields
from cv_factory_ops.features.stores import Filter, Item

TABLES = """
    CREATE VIRTUAL TABLE words USING fts5(text, content='', tokenize='unicode61 remove_diacritics 2');
    CREATE TABLE items (number INTEGER PRIMARY KEY, id TEXT NOT NULL);
    CREATE TABLE facts (field TEXT, value, number INTEGER, PRIMARY KEY (field, value, number)) WITHOUT ROWID;
"""
RANKED = """
    WITH found AS MATERIALIZED (
        SELECT id, bm25(words) AS score FROM words JOIN items ON number = words.rowid WHERE {condition}
    ), ranked AS (
        SELECT id, RANK() OVER by_score AS place, COUNT(*) OVER by_score AS through
        FROM found WINDOW by_score AS (ORDER BY score)
    )
    SELECT id, place FROM ranked WHERE through <= ? OR id IN (SELECT value FROM json_each(?)) ORDER BY place, id
"""
UNSAID = {"patient", "study", "split"}
"""Names in the metadata whose words say whose an item is, or what for, and nothing of what it shows."""


def report_words(text: str) -> str:
    """The words of a report in their order, without whatever has a digit in it: dates, telephone numbers, identifiers. **Names
    stay**: who writes the table takes them out."""
    return " ".join(word for word in re.findall(r"\w+", text) if word.isalpha())


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

    def ranks(self, text: str, k: int, where: Filter | None = None, others: Sequence[str] = ()) -> dict[str, int]:
        """Ranks from 1, best first, of those that share words with a text and that the filter admits: of the ``k`` best, and of
        ``others`` wherever they stand.

        Equally good ones have one rank, that of the first of them. Of a tie that the ``k`` would cut none is told but for the
        ``others``: hundreds of items may have the same few words, and none of them is better than the rest.
        """
        asked = " OR ".join(f'"{word}"' for word in dict.fromkeys(re.findall(r"\w+", text.casefold())))
        if not asked:
            return {}
        condition, values = "words MATCH ?", list[str | float]([asked])
        for clause in clauses(where or {}):
            narrowed, operands = _condition(clause)
            # The + keeps SQLite from asking for the words again for each number, a hundred times as slow.
            condition += f" AND +words.rowid IN (SELECT number FROM facts WHERE field = ? AND {narrowed})"  # noqa: S608 - operands apart
            values += [clause.field, *operands]
        with self._lock:
            sql = RANKED.format(condition=condition)
            return dict(self._database.execute(sql, [*values, k, json.dumps(list(others))]).fetchall())

    def close(self) -> None:
        self._database.close()


def words_of(item: Item) -> str:
    """The words of its metadata but for ``UNSAID``, then its text."""
    said = [value for name, value in item.metadata.items() if isinstance(value, str) and name not in UNSAID]
    return " ".join([*said, item.text]).strip()


def _condition(clause: Clause) -> tuple[str, list[str | float]]:
    """SQL about ``value``, and what stands for its question marks."""
    if isinstance(clause.operand, tuple):
        return f"value IN ({', '.join('?' * len(clause.operand))})", list(clause.operand)
    return f"value {clause.operator} ?", [clause.operand]
