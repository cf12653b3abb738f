"""Which documents a search may return: not deleted, and passing the filter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from numpy.typing import NDArray

from colbert_core.errors import DataError, SearchError
from colbert_core.index.shard import Shard, checked_ids

# Ids of the documents allowed, or a condition on metadata columns.
Filter: TypeAlias = "Iterable[str] | pc.Expression"


def checked_filter(condition: Filter | None) -> list[str] | pc.Expression | None:
    """A filter that can be applied to one shard after another: ids are read once.

    Raises:
        SearchError: it is neither an expression nor a collection of strings.
    """
    if condition is None or isinstance(condition, pc.Expression):
        return condition
    if isinstance(condition, (str, bytes)):
        raise SearchError(f"a filter is a collection of ids or an expression, not the string {condition!r}")
    try:
        return checked_ids(condition)
    except DataError as error:
        raise SearchError(f"a filter is a collection of ids or an expression: {error}") from None


def eligible_documents(shard: Shard, condition: list[str] | pc.Expression | None) -> NDArray[np.bool_]:
    """Documents of a shard that a search may return, bool ``[documents]``.

    Args:
        shard: an open shard.
        condition: of :func:`checked_filter`. None lets every document pass; a list of ids those in it (an
            empty one lets none pass); an expression those for which it is true (not null).

    Raises:
        SearchError: the expression names a column that the shard's metadata lacks, compares types that
            do not compare, or is not a condition.
        IndexFormatError: the metadata is damaged.
    """
    if condition is None:
        return shard.live
    if isinstance(condition, pc.Expression):
        if not len(shard):  # it has no metadata, whatever the others have
            return shard.live
        return shard.live & _matches(shard, condition)
    allowed = np.zeros(len(shard), dtype=np.bool_)
    found = shard.find(condition)
    allowed[found[found >= 0]] = True
    return shard.live & allowed


def _matches(shard: Shard, condition: pc.Expression) -> NDArray[np.bool_]:
    metadata = shard.metadata
    if metadata is None:
        raise SearchError("the filter is a condition on metadata, but the index has none")
    try:
        scanner = ds.dataset(metadata).scanner(columns={"match": condition}, use_threads=False)
        column = scanner.to_table()["match"]
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        columns = ", ".join(metadata.column_names)
        reason = str(error).splitlines()[0]
        raise SearchError(f"filter {condition}: {reason}; the columns are: {columns}") from None
    if not pa.types.is_boolean(column.type):
        raise SearchError(f"filter {condition}: its value is of type {column.type}, not true or false")
    return pc.fill_null(column, False).to_numpy().astype(np.bool_)
