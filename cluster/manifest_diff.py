"""What differs between two published versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from cluster.manifest import Manifest


class Change(BaseModel):
    """One difference.

    Attributes:
        section: ``files``, ``parents``, ``metrics``, ``recipe``, ``data``, ``libraries`` or ``extra``.
        key: path, name or dotted key.
        before: value in the first version, None if it is not there.
        after: value in the second version, None if it is not there.
    """

    section: str
    key: str
    before: Any = None
    after: Any = None


def diff(before: Manifest, after: Manifest) -> list[Change]:
    """All differences of content and origin; names, times and publication ids are left out."""
    sections = [(name, _sections(before)[name], _sections(after)[name]) for name in _sections(before)]
    return [
        Change(section=name, key=key, before=old.get(key), after=new.get(key))
        for name, old, new in sections
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]


def _sections(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        "files": {
            path: f"{entry.size:,} bytes, {entry.sha256[:12]}" for path, entry in manifest.files.items()
        },
        "parents": {str(parent.ref): parent.weight for parent in manifest.parents},
        "metrics": _flat(manifest.metrics),
        "recipe": _flat(manifest.recipe or {}),
        "data": {"fingerprint": manifest.data_fingerprint},
        "libraries": dict(manifest.libraries),
        "extra": _flat(manifest.extra),
    }


def _flat(tree: Any, base: str = "") -> dict[str, Any]:
    """Nested plain data as one mapping of dotted keys to leaves."""
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, list):
        items = enumerate(tree)
    else:
        return {base: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{base}.{key}" if base else str(key))
    return flat or ({base: tree} if base else {})
