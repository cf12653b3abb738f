"""What an update of an index asks for: documents to add and ids to delete, read and checked row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.config import Recipe
from cluster.sources import read_records, text_lines
from colbert_core.errors import DataError


@dataclass(frozen=True)
class IndexChange:
    """Additions and deletions.

    Attributes:
        additions: file of the documents to add, if there are any.
        added: row of each of their ids, from 1, in file order.
        deletions: file of the ids to delete, if there are any.
        deleted: row of each of these ids, in file order.
        replace: a document that is there already gives way to the added one of its id.
        digest: 16 hex digits over all of it, texts included.
    """

    additions: str | None
    added: Mapping[str, int] = field(repr=False)
    deletions: str | None
    deleted: Mapping[str, int] = field(repr=False)
    replace: bool
    digest: str

    def vanishing(self, known: Iterable[str]) -> list[str]:
        """The ids whose documents go: those to delete, and those that added documents take the place of.

        Args:
            known: those of the ids on either list that the index holds.

        Raises:
            DataError: an id to delete is not in the index, or one to add is there and is to stay.
        """
        there = set(known)
        for key, row in self.deleted.items():
            if key not in there:
                raise DataError(f"{self.deletions} row {row}: the index has no document {key!r}")
        for key, row in self.added.items():
            if key in there and key not in self.deleted and not self.replace:
                raise DataError(
                    f"{self.additions} row {row}: the index has a document {key!r} already; --replace, or "
                    "its id among the deletions, puts the new one in its place"
                )
        return [*self.deleted, *(key for key in self.added if key in there and key not in self.deleted)]


def read_change(recipe: Recipe, additions: str | None, deletions: str | None, replace: bool) -> IndexChange:
    """Reads the files of an update; memory is that of the ids.

    Args:
        recipe: tells where ``data.root`` and its storage are; relative paths start there.
        additions: Parquet or JSONL with ``_id``, ``text`` and maybe ``title``.
        deletions: text, an id a line; empty lines are passed over.
        replace: see :class:`IndexChange`.

    Raises:
        DataError: neither file is given, a file is missing, malformed or empty, or an id occurs twice in
            it; the message names file, row and id.
    """
    if additions is None and deletions is None:
        raise DataError("nothing to change: give documents to add, ids to delete, or both")
    digest = hashlib.blake2b(json.dumps([replace]).encode(), digest_size=8)
    added: dict[str, int] = {}
    if additions is not None:
        for row, record in read_records(recipe, additions, ("_id", "text"), optional=("title",)):
            content = [record["_id"], record["title"] or None, record["text"]]
            _enter(added, record["_id"], row, additions)
            digest.update(json.dumps(content).encode())
        if not added:
            raise DataError(f"{additions}: there are no documents in it")
    deleted: dict[str, int] = {}
    digest.update(b"deleted")
    if deletions is not None:
        for row, line in text_lines(recipe, deletions):
            key = line.removesuffix("\r")
            if key:
                _enter(deleted, key, row, deletions)
                digest.update(json.dumps(key).encode())
        if not deleted:
            raise DataError(f"{deletions}: there are no ids in it")
    return IndexChange(additions, added, deletions, deleted, replace, digest.hexdigest())


def _enter(rows: dict[str, int], key: str, row: int, path: str) -> None:
    first = rows.setdefault(key, row)
    if first != row:
        raise DataError(f"{path} row {row}: id {key!r} occurs twice, first in row {first}")
