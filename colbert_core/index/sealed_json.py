"""JSON files that record the SHA-256 of their own content: an index's manifests and generations."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from colbert_core.config import FrozenModel
from colbert_core.errors import IndexFormatError, SchemaVersionError

Content = TypeVar("Content", bound=FrozenModel)


def seal(content: FrozenModel) -> str:
    """The text of a file that holds ``content`` and its digest."""
    tree = content.model_dump(mode="json")
    return json.dumps({"sha256": _digest(tree), **tree}, indent=1, sort_keys=True) + "\n"


def read_sealed(path: Path, model: type[Content], what: str) -> Content:
    """Reads a file that :func:`seal` wrote and compares it with its digest.

    Args:
        path: the file.
        model: what it holds; the default of its ``schema_version`` is the newest that can be read.
        what: that, in words, for errors.

    Raises:
        IndexFormatError: it is missing or damaged.
        SchemaVersionError: a newer version of raycolbert wrote it.
    """
    newest = model.model_fields["schema_version"].default
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        version = tree["schema_version"]
        if isinstance(version, int) and version > newest:
            raise SchemaVersionError(f"{path}: schema version {version}, this reads up to {newest}")
        recorded = tree.pop("sha256")
        content = model.model_validate(tree)
        if recorded != _digest(content.model_dump(mode="json")):
            raise ValueError("its digest does not fit its content")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise IndexFormatError(f"{path}: not {what}: {error}") from None
    return content


def _digest(tree: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
