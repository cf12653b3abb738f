"""What every section is made of."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from colbert_core.config import FrozenModel
from colbert_core.errors import ConfigError
from colbert_core.metric_names import parse_metric


def _known_metric(name: str) -> str:
    try:
        parse_metric(name)
    except ConfigError as error:
        raise ValueError(str(error)) from None
    return name


Metric = Annotated[str, AfterValidator(_known_metric)]
# Names end up as storage keys and file names.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]


def fingerprint(*parts: Any) -> str:
    """A 16-hex-digit digest of plain data or config models: equal content, equal digest."""

    def plain(part: Any) -> Any:
        return part.model_dump(mode="json") if isinstance(part, FrozenModel) else part

    text = json.dumps([plain(part) for part in parts], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Sets ``tree``'s value at a dotted key, in place; list items are addressed by number.

    Raises:
        KeyError: there is no such place.
    """
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise KeyError(key) from None
