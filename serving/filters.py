"""Filters as clients write them in JSON, as conditions on an index's metadata.

``{"topic": "music", "year": {"$gte": 2020}}`` selects documents for which all conditions hold. Values are
compared with ``$eq`` (or by the value alone), ``$ne``, ``$gt``, ``$gte``, ``$lt``, ``$lte``, ``$in``; null
selects documents that lack the value. ``$and`` and ``$or`` take lists of filters, ``$not`` one.
``{"$ids": [...]}``, alone, selects documents by id. A document that lacks a value fails every condition on
it but those that ask for null. An empty list selects nothing; a filter without a condition is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from colbert_core.errors import SearchError
from colbert_core.index import Filter

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "$eq": operator.eq,
    "$ne": operator.ne,
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_NESTED = ("$and", "$or", "$not")
# Deeper ones are no filters that a person or a program means, and would exhaust the stack.
MAX_DEPTH = 16


def parse_filter(tree: dict[str, Any]) -> Filter:
    """The condition that a filter stands for.

    Raises:
        SearchError: the filter is not well-formed; the message names the key. Whether the columns exist
            and compare with the values is found out by the search.
    """
    try:
        return _ids(tree) if "$ids" in tree else _all_of(tree, "filter", 1)
    except UnicodeEncodeError as error:
        raise SearchError(f"filter: {error.object!r} is no text: it has half a surrogate pair") from None


def _ids(tree: dict[str, Any]) -> list[str]:
    ids = tree["$ids"]
    if len(tree) > 1:
        raise SearchError("filter: $ids stands alone, without other conditions")
    if not isinstance(ids, list) or not all(isinstance(key, str) for key in ids):
        raise SearchError("filter.$ids: expected a list of document ids")
    for key in ids:
        key.encode()
    return ids


def _all_of(tree: Any, place: str, depth: int) -> pc.Expression:
    if not isinstance(tree, dict):
        raise SearchError(f"{place}: expected an object of conditions, not {type(tree).__name__}")
    if not tree:
        raise SearchError(f"{place}: has no condition; leave it out to search all documents")
    if depth > MAX_DEPTH:
        raise SearchError(f"{place}: conditions are nested more than {MAX_DEPTH} deep")
    return reduce(operator.and_, [_condition(key, value, place, depth) for key, value in tree.items()])


def _condition(key: str, value: Any, place: str, depth: int) -> pc.Expression:
    here = f"{place}.{key}"
    if key == "$not":
        return ~_all_of(value, here, depth + 1)
    if key in ("$and", "$or"):
        if not isinstance(value, list) or not value:
            raise SearchError(f"{here}: expected a list of filters")
        parts = [_all_of(part, f"{here}.{i}", depth + 1) for i, part in enumerate(value)]
        return reduce(operator.and_ if key == "$and" else operator.or_, parts)
    if key.startswith("$"):
        allowed = ", ".join((*_NESTED, "$ids"))
        raise SearchError(f"{here}: no such operator; here there are: {allowed}, and the names of columns")
    comparisons = value if isinstance(value, dict) else {"$eq": value}
    if not comparisons:
        raise SearchError(f"{here}: has no condition; leave it out to search all documents")
    return reduce(operator.and_, [_compare(key, name, other, here) for name, other in comparisons.items()])


def _compare(column: str, name: str, value: Any, place: str) -> pc.Expression:
    field = pc.field(column)
    if name == "$in":
        if not isinstance(value, list):
            raise SearchError(f"{place}.$in: expected a list of values")
        return _is_in(field, value, f"{place}.$in")
    if name not in _COMPARISONS:
        allowed = ", ".join((*_COMPARISONS, "$in"))
        raise SearchError(f"{place}.{name}: no such comparison; there are: {allowed}")
    if isinstance(value, (dict, list)):
        raise SearchError(f"{place}.{name}: expected a single value")
    if value is None:
        if name == "$eq":
            return field.is_null()
        if name == "$ne":
            return field.is_valid()
        raise SearchError(f"{place}.{name}: null has no order")
    try:
        return _COMPARISONS[name](field, pc.scalar(value))
    except (pa.ArrowException, OverflowError) as error:
        raise SearchError(f"{place}.{name}: {error}") from None


def _is_in(field: pc.Expression, values: Sequence[Any], place: str) -> pc.Expression:
    if not values:
        # True of no document, and still an error if there is no such column.
        return field.is_null() & field.is_valid()
    if any(value is None or isinstance(value, (dict, list)) for value in values):
        raise SearchError(f"{place}: expected texts, numbers or booleans")
    try:
        return field.isin(pa.array(values))
    except (pa.ArrowException, OverflowError) as error:
        raise SearchError(f"{place}: the values have no common type: {error}") from None
