"""Training sets that exist already: the three published forms, read into native tuples.

Rows are streamed and each is checked, so that a short score list, a NaN or an id without a text is an
error with a file and a row, never a silent hole in the training data.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from cluster.config import Recipe, TupleFiles
from cluster.sources import matching_files, parquet_rows, read_records, text_lines
from colbert_core.errors import ConfigError, DataError

# A native tuple: query_id, query, document_ids, documents, scores.
Row = dict[str, Any]

# Parameters of one SQL statement, well below SQLite's bound.
_LOOKUP_IDS = 500


def read_tuples(recipe: Recipe, files: TupleFiles) -> Iterator[Row]:
    """Streams a training set as native tuples.

    A set in form ``tuples`` without id columns gets ids made of file and row.

    Args:
        recipe: says where relative paths start.
        files: what to read.

    Yields:
        ``query_id``, ``query``, ``document_ids``, ``documents``, ``scores``, in the order of the files.

    Raises:
        DataError: a file or column is missing, a list is empty or has another length than its
            neighbour, a score is no finite number, an id has no text or occurs twice; the message names
            file and row (from 1).
        ConfigError: a texts file has a form that cannot be read.
    """
    paths = matching_files(recipe, files.tuples)
    if files.format == "tuples":
        for path in paths:
            yield from _native_rows(recipe, path)
        return
    assert files.queries is not None
    assert files.documents is not None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="raycolbert-texts-")))
        queries = stack.enter_context(TextTable(recipe, files.queries, "query_id", folder / "queries"))
        documents = stack.enter_context(
            TextTable(recipe, files.documents, "document_id", folder / "documents")
        )
        for path in paths:
            rows = _id_rows(recipe, path) if files.format == "ids" else _mmarco_rows(recipe, path)
            for origin, query_id, document_ids, scores in rows:
                row = {
                    "query_id": query_id,
                    "query": queries.texts([query_id], origin)[0],
                    "document_ids": document_ids,
                    "documents": documents.texts(document_ids, origin),
                    "scores": scores,
                }
                yield check_row(row, origin)


def check_row(row: Row, origin: str) -> Row:
    """Returns a native tuple whose parts fit together.

    Raises:
        DataError: they do not; the message starts with ``origin``.
    """
    documents, ids, scores = row["documents"], row["document_ids"], row["scores"]
    if not isinstance(row["query"], str):
        raise DataError(f"{origin}: the query is {type(row['query']).__name__}, not a string")
    if not documents:
        raise DataError(f"{origin}: the list of documents is empty")
    for what, values in (("scores", scores), ("document ids", ids)):
        if values is None or len(values) != len(documents):
            count = "no" if values is None else len(values)
            raise DataError(f"{origin}: {len(documents)} documents, but {count} {what}")
    for document, text in zip(ids, documents, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{origin}: document {document!r} is {type(text).__name__}, not a string")
    if len(set(ids)) != len(ids):
        twice = next(document for place, document in enumerate(ids) if document in ids[:place])
        raise DataError(f"{origin}: document id {twice!r} occurs twice")
    for document, score in zip(ids, scores, strict=True):
        if not isinstance(score, int | float) or not math.isfinite(score):
            raise DataError(f"{origin}: the score of document {document!r} is {score}, not a finite number")
    return row


class TextTable:
    """Texts by id, in a SQLite file on local disk: memory does not grow with their number.

    Args:
        recipe: says where relative paths start.
        pattern: Parquet, JSONL or TSV files.
        id_column: name of the id column of Parquet and JSONL; the other is ``text``.
        folder: where the database is made; it must not exist.

    Raises:
        DataError: a file or column is missing, a value is no string, or an id occurs twice.
    """

    def __init__(self, recipe: Recipe, pattern: str, id_column: str, folder: Path) -> None:
        self._pattern = pattern
        folder.mkdir()
        self._database = sqlite3.connect(folder / "texts.sqlite")
        # The file is scratch: nothing of it outlives this object.
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.execute("CREATE TABLE texts (id TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")
        for path in matching_files(recipe, pattern):
            self._fill(path, _texts(recipe, path, id_column))

    def texts(self, ids: Sequence[str], origin: str) -> list[str]:
        """The texts of ids.

        Raises:
            DataError: an id has none; the message names it and starts with ``origin``.
        """
        found: dict[str, str] = {}
        for first in range(0, len(ids), _LOOKUP_IDS):
            part = ids[first : first + _LOOKUP_IDS]
            marks = ",".join("?" * len(part))
            found.update(self._database.execute(f"SELECT id, text FROM texts WHERE id IN ({marks})", part))
        missing = [key for key in ids if key not in found]
        if missing:
            raise DataError(f"{origin}: no text for id {missing[0]!r} in {self._pattern}")
        return [found[key] for key in ids]

    def __enter__(self) -> TextTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()

    def _fill(self, path: str, rows: Iterator[tuple[int, str, str]]) -> None:
        last = (0, "")

        def pairs() -> Iterator[tuple[str, str]]:
            nonlocal last
            for row, key, text in rows:
                last = (row, key)
                yield key, text

        try:
            # A row is asked for when the one before it is stored: the last one asked for is the culprit.
            self._database.executemany("INSERT INTO texts VALUES (?, ?)", pairs())
        except sqlite3.IntegrityError:
            raise DataError(f"{path} row {last[0]}: id {last[1]!r} occurs twice") from None
        self._database.commit()


def _texts(recipe: Recipe, path: str, id_column: str) -> Iterator[tuple[int, str, str]]:
    """Row number, id and text of a texts file."""
    if path.endswith(".parquet"):
        for number, record in parquet_rows(recipe, path, (id_column, "text")):
            text = record["text"]
            if not isinstance(text, str):
                raise DataError(f"{path} row {number}: 'text' is {type(text).__name__}, not a string")
            yield number, _id(record[id_column], f"{path} row {number}"), text
    elif path.endswith((".jsonl", ".json")):
        for number, record in read_records(recipe, path, (id_column, "text")):
            yield number, record[id_column], record["text"]
    elif path.endswith((".tsv", ".txt")):
        for number, line in text_lines(recipe, path):
            key, separator, text = line.partition("\t")
            if not separator:
                raise DataError(f"{path} row {number}: expected id, tab, text")
            yield number, key, text
    else:
        raise ConfigError(f"{path}: unknown form of texts; .parquet, .jsonl or .tsv is expected")


def _native_rows(recipe: Recipe, path: str) -> Iterator[Row]:
    required, optional = ("query", "documents", "scores"), ("query_id", "document_ids")
    for number, record in parquet_rows(recipe, path, required, optional):
        origin = f"{path} row {number}"
        documents = record["documents"] or []
        if record.get("query_id") is None:
            record["query_id"] = f"{Path(path).stem}-{number}"
        if record.get("document_ids") is None:
            record["document_ids"] = [f"{record['query_id']}-{place}" for place in range(len(documents))]
        yield check_row(record, origin)


def _id_rows(recipe: Recipe, path: str) -> Iterator[tuple[str, str, list[str], Any]]:
    """Rows of the PyLate form: origin, query id, document ids, scores."""
    for number, record in parquet_rows(recipe, path, ("query_id", "document_ids", "scores")):
        origin = f"{path} row {number}"
        ids = [_id(document, origin) for document in record["document_ids"] or []]
        _same_length(ids, record["scores"], origin)
        yield origin, _id(record["query_id"], origin), ids, record["scores"]


def _mmarco_rows(recipe: Recipe, path: str) -> Iterator[tuple[str, str, list[str], Any]]:
    """Rows of the released MMARCO-ja form, the positive first."""
    columns = ("query_id", "pos_id", "neg_ids", "pos_score", "neg_scores")
    for number, record in parquet_rows(recipe, path, columns):
        origin = f"{path} row {number}"
        negatives = [_id(document, origin) for document in record["neg_ids"] or []]
        _same_length(negatives, record["neg_scores"], origin)
        ids = [_id(record["pos_id"], origin), *negatives]
        yield origin, _id(record["query_id"], origin), ids, [record["pos_score"], *record["neg_scores"]]


def _same_length(ids: list[str], scores: Any, origin: str) -> None:
    if not ids:
        raise DataError(f"{origin}: the list of documents is empty")
    if scores is None or len(scores) != len(ids):
        raise DataError(f"{origin}: {len(ids)} document ids, but {len(scores or [])} scores")


def _id(value: Any, origin: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{origin}: {value!r} is {type(value).__name__}, no id")
    return str(value)
