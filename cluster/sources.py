"""Labelled retrieval sets in BEIR layout: corpus, queries and relevance labels."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from cluster.config import Recipe
from cluster.storage import open_store
from colbert_core.errors import DataError

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?")


@dataclass(frozen=True)
class LabelledSource:
    """A corpus, the questions asked of it, and which documents answer them.

    Attributes:
        name: the source's name in the recipe.
        corpus: document id -> text, the title in front.
        queries: query id -> text.
        qrels: query id -> document id -> relevance above 0.
    """

    name: str
    corpus: Mapping[str, str]
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]

    @property
    def labelled_queries(self) -> dict[str, str]:
        """The queries that have a relevant document, in file order."""
        return {query_id: text for query_id, text in self.queries.items() if query_id in self.qrels}

    def sampled(self, most: int | None, seed: int) -> LabelledSource:
        """The same with the labels of at most so many queries (None: of all).

        Which these are depends on their ids and the seed alone, not on their order.
        """
        if most is None or most >= len(self.labelled_queries):
            return self
        ids = sorted(self.labelled_queries, key=lambda query: stable_hash(query, seed))
        kept = set(ids[:most])
        return replace(self, qrels={query: labels for query, labels in self.qrels.items() if query in kept})


def stable_hash(text: str, seed: int = 0) -> int:
    """A 64-bit digest that is the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


def document_text(title: str | None, text: str) -> str:
    """What the encoder reads of a document: its title, if any, in front of its text."""
    return f"{title} {text}" if title else text


def load_source(recipe: Recipe, name: str) -> LabelledSource:
    """Reads a data source of the recipe.

    Raises:
        DataError: a file is missing or malformed, an id occurs twice, or a label names an unknown id;
            the message names the file and the row.
    """
    source = recipe.data.sources[name]
    corpus: dict[str, str] = {}
    for row, record in read_records(recipe, source.corpus, ("_id", "text"), optional=("title",)):
        _insert(corpus, record["_id"], document_text(record["title"], record["text"]), source.corpus, row)
    queries: dict[str, str] = {}
    for row, record in read_records(recipe, source.queries, ("_id", "text")):
        _insert(queries, record["_id"], record["text"], source.queries, row)
    if not corpus:
        raise DataError(f"{source.corpus}: the corpus has no documents")
    return LabelledSource(name, corpus, queries, _read_qrels(recipe, source.qrels, corpus, queries))


def read_records(
    recipe: Recipe, path: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams the rows of a Parquet or JSONL file as ``(row number from 1, record)``.

    Only the named columns are read; an optional one that is missing reads as None. Text columns must
    hold strings.

    Raises:
        DataError: no such file, an unknown format, a missing column, or a value that is not a string.
    """
    columns = (*required, *optional)
    rows = parquet_rows(recipe, path, required, optional) if path.endswith(".parquet") else None
    if rows is None:
        if not path.endswith((".jsonl", ".json")):
            raise DataError(f"{path}: unknown format; a .parquet or .jsonl file is expected")
        rows = _jsonl_rows(recipe, path)
    for number, record in rows:
        for column in columns:
            value = record.get(column)
            if value is None and column in optional:
                continue
            if value is None:
                raise DataError(
                    f"{path} row {number}: no column {column!r}; there are: {', '.join(sorted(record))}"
                )
            if not isinstance(value, str):
                raise DataError(f"{path} row {number}: {column!r} is {type(value).__name__}, not a string")
        yield number, {column: record.get(column) for column in columns}


def locate(recipe: Recipe, path: str) -> tuple[fs.FileSystem, str]:
    """The filesystem of a data path, and its path there.

    Relative paths start from ``data.root``; absolute paths and s3:// addresses stand for themselves.
    """
    root, tail = recipe.data.root, path
    if path.startswith("s3://"):
        bucket, _, tail = path.removeprefix("s3://").partition("/")
        root = f"s3://{bucket}"
    elif path.startswith("/"):
        return fs.LocalFileSystem(), path
    if not root.startswith("s3://"):
        return fs.LocalFileSystem(), f"{root.rstrip('/')}/{tail}"
    filesystem, base = open_store(recipe.storage.model_copy(update={"root": root})).arrow()
    return filesystem, f"{base.rstrip('/')}/{tail}"


def matching_files(recipe: Recipe, pattern: str) -> list[str]:
    """Data paths that a pattern with ``*``, ``?`` or ``[…]`` stands for, sorted; ``*`` spans folders.

    Raises:
        DataError: no file matches.
    """
    first = min((pattern.find(sign) for sign in "*?[" if sign in pattern), default=-1)
    if first < 0:
        return [pattern]
    folder = pattern[: pattern.rfind("/", 0, first) + 1]
    filesystem, location = locate(recipe, folder)
    selector = fs.FileSelector(location.rstrip("/") or "/", recursive=True, allow_not_found=True)
    tails = [
        info.path[len(selector.base_dir.rstrip("/")) + 1 :]
        for info in filesystem.get_file_info(selector)
        if info.type == fs.FileType.File
    ]
    found = sorted(folder + tail for tail in tails if fnmatch.fnmatchcase(folder + tail, pattern))
    if not found:
        raise DataError(f"no file matches {pattern!r} under data.root {recipe.data.root!r}")
    return found


def open_data(recipe: Recipe, path: str) -> pa.NativeFile:
    """Opens a data file for reading; the caller closes it.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    filesystem, location = locate(recipe, path)
    try:
        return filesystem.open_input_file(location)
    except FileNotFoundError:
        raise DataError(f"no file {path!r} under data.root {recipe.data.root!r}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from None


def parquet_rows(
    recipe: Recipe, path: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Streams ``(row number from 1, record)`` of a Parquet file; values are as they are stored.

    Raises:
        DataError: no such file, not Parquet, or a required column is missing.
    """
    with open_data(recipe, path) as handle:
        try:
            file = pq.ParquetFile(handle)
        except pa.ArrowInvalid as error:
            raise DataError(f"{path}: not a Parquet file: {error}") from None
        present = set(file.schema_arrow.names)
        for column in required:
            if column not in present:
                raise DataError(f"{path}: no column {column!r}; there are: {', '.join(sorted(present))}")
        number = 0
        wanted = [*required, *(column for column in optional if column in present)]
        for batch in file.iter_batches(batch_size=4096, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                yield number, record


def _jsonl_rows(recipe: Recipe, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in text_lines(recipe, path):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path} row {number}: not JSON: {error}") from None
            if not isinstance(record, dict):
                raise DataError(
                    f"{path} row {number}: a JSON object is expected, not {type(record).__name__}"
                )
            yield number, record


def text_lines(recipe: Recipe, path: str) -> Iterator[tuple[int, str]]:
    """Streams ``(row number from 1, line without its end)`` of a UTF-8 file.

    Raises:
        DataError: no such file, or it is not UTF-8.
    """
    number = 0
    with open_data(recipe, path) as handle, io.TextIOWrapper(handle, encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, start=1):
                yield number, line.rstrip("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} after row {number}: not UTF-8: {error.reason}") from None


def _insert(table: dict[str, str], key: str, text: str, path: str, row: int) -> None:
    if key in table:
        raise DataError(f"{path} row {row}: id {key!r} occurs twice")
    table[key] = text


def _read_qrels(
    recipe: Recipe, path: str, corpus: Mapping[str, str], queries: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Reads TSV labels: ``query-id corpus-id score``, or TREC's four columns; a header is skipped."""
    judged: dict[str, dict[str, int]] = {}
    for number, line in text_lines(recipe, path):
        fields = line.split("\t") if "\t" in line else line.split()
        if not fields or (number == 1 and not _NUMBER.fullmatch(fields[-1])):
            continue
        if len(fields) not in (3, 4):
            raise DataError(f"{path} row {number}: 3 or 4 columns are expected, not {len(fields)}")
        query_id, document_id, score = fields[0], fields[-2], fields[-1]
        if query_id not in queries:
            raise DataError(f"{path} row {number}: no query {query_id!r} in the queries file")
        if document_id not in corpus:
            raise DataError(f"{path} row {number}: no document {document_id!r} in the corpus")
        if not _NUMBER.fullmatch(score) or not (label := float(score)).is_integer():
            raise DataError(f"{path} row {number}: the label {score!r} is not a whole number")
        if judged.setdefault(query_id, {}).setdefault(document_id, int(label)) != label:
            raise DataError(
                f"{path} row {number}: query {query_id!r}, document {document_id!r} has another label above"
            )
    positive = {
        query_id: {document_id: label for document_id, label in labels.items() if label > 0}
        for query_id, labels in judged.items()
    }
    qrels = {query_id: labels for query_id, labels in positive.items() if labels}
    if not qrels:
        raise DataError(f"{path}: no relevant document is labelled")
    return qrels
