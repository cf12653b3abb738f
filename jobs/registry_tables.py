"""What ``raycolbert registry …`` prints: tables, trees, and the same as JSON.

Whatever names a version can be copied from the terminal whole: it is folded where a table is too narrow,
and never cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from pydantic import BaseModel
from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from cluster.artifacts import ArtifactRef
from cluster.manifest import Alias, Manifest
from cluster.manifest_diff import Change
from cluster.registry import LineageNode
from cluster.registry_gc import Collection
from colbert_core.errors import RaycolbertError

console = Console()
unwrapped = Console(width=10_000)


@dataclass(frozen=True)
class Listed:
    """A version in a listing.

    Attributes:
        ref: which.
        record: its manifest, or why that cannot be read.
        aliases: those that point to it, sorted.
    """

    ref: ArtifactRef
    record: Manifest | RaycolbertError
    aliases: Sequence[str]

    @property
    def order(self) -> tuple[str, str, float]:
        """Sorts by kind and name, newest first; what cannot be read comes before."""
        at = self.record.created_at.timestamp() if isinstance(self.record, Manifest) else float("inf")
        return self.ref.kind, self.ref.name, -at

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        if isinstance(self.record, Manifest):
            return {**summary(self.record), "aliases": self.aliases}
        return {"ref": str(self.ref), "problem": str(self.record), "aliases": self.aliases}


def say(text: str) -> None:
    """Prints a line, however long."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def print_json(content: Any) -> None:
    """Prints plain values and pydantic models as JSON."""

    def plain(value: BaseModel) -> Any:
        return value.model_dump(mode="json")

    print(json.dumps(content, indent=2, ensure_ascii=False, default=plain))


def summary(manifest: Manifest) -> dict[str, Any]:
    """A version in a few words, for JSON."""
    return {
        "ref": str(manifest.ref),
        "created_at": manifest.created_at.isoformat(),
        "size": manifest.total_bytes,
        "files": len(manifest.files),
        "metrics": manifest.metrics,
    }


def listing(rows: Sequence[Listed], uri: str) -> Table:
    """Versions with their aliases."""
    table = _folded("artifact", "aliases", title=Text(uri))
    table.add_column("created (UTC)", no_wrap=True)
    table.add_column("size", no_wrap=True)
    table.add_column("files", no_wrap=True)
    for row in rows:
        cells: list[str | Text] = [str(row.ref), ", ".join(row.aliases)]
        if isinstance(row.record, Manifest):
            size, files = row.record.total_bytes, row.record.files
            cells += [_minute(row.record.created_at), decimal(size), str(len(files))]
        else:
            cells.append(Text("unreadable", "red"))
        _add(table, *cells)
    return table


def version_tables(manifest: Manifest, aliases: Sequence[Alias]) -> list[RenderableType]:
    """All that a manifest says but the recipe, and where its name's aliases were."""
    table = _folded("", "", title=Text(str(manifest.ref)), show_header=False)
    _add(table, "created", _when(manifest.created_at))
    _add(table, "size", f"{decimal(manifest.total_bytes)} in {len(manifest.files)} files")
    if manifest.data_fingerprint:
        _add(table, "data", manifest.data_fingerprint)
    for parent in manifest.parents:
        _add(table, "made from", f"{parent.ref} × {parent.weight:g}")
    for key, value in manifest.metrics.items():
        _add(table, f"metric: {key}", f"{value:.4f}" if isinstance(value, float) else str(value))
    for library, version in manifest.libraries.items():
        _add(table, f"with {library}", version)
    files = _folded("file", "size", "sha256", title="files")
    for path, entry in sorted(manifest.files.items()):
        _add(files, path, decimal(entry.size), entry.sha256[:16])
    return [table, files, *map(history, aliases)]


def history(alias: Alias) -> Table:
    """The movements of an alias, the last first."""
    title = f"alias {alias.kind}/{alias.name}@{alias.alias} → {alias.version}"
    table = _folded("when", "action", "version", "before", "by", title=Text(title))
    for move in reversed(alias.history):
        _add(table, _when(move.at), move.action, move.version, _cell(move.previous), move.by)
    return table


def problems(found: Mapping[str, Sequence[str]]) -> Table:
    """What is wrong with versions, by their names."""
    table = _folded("artifact", "result")
    for ref, each in found.items():
        _add(table, ref, "\n".join(each) or Text("intact", "green"))
    return table


def changes(found: Sequence[Change], before: ArtifactRef, after: ArtifactRef) -> Table:
    """What differs between two versions."""
    table = _folded("section", "key", str(before), str(after))
    for change in found:
        _add(table, change.section, change.key, _cell(change.before), _cell(change.after))
    return table


def garbage(found: Collection) -> Table:
    """What nothing needs."""
    table = _folded("what", "name", "objects", "size", "last written (UTC)")
    for item in found.garbage:
        when = _minute(item.modified) if item.modified else ""
        _add(table, item.what, item.name, str(item.objects or ""), decimal(item.size), when)
    return table


def plain_lineage(node: LineageNode) -> dict[str, Any]:
    """A lineage for JSON."""
    return {
        "ref": str(node.ref),
        "weight": node.weight,
        "exists": node.manifest is not None,
        "metrics": node.manifest.metrics if node.manifest else {},
        "parents": [plain_lineage(parent) for parent in node.parents],
    }


def lineage_tree(node: LineageNode, tree: Tree | None = None) -> Tree:
    """The artifact with its parents as branches, their weight where it is not 1."""
    label = Text(str(node.ref), "bold")
    if node.weight != 1.0:
        label.append(f" × {node.weight:g}", "not bold")
    if node.manifest is None:
        label.append(" no longer there", "not bold red")
    else:
        label.append(f" {_when(node.manifest.created_at)}", "not bold dim")
        figures = [f"{k} {v:.4g}" for k, v in node.manifest.metrics.items() if isinstance(v, float)]
        label.append(f" {', '.join(figures)}" if figures else "", "not bold")
    branch = Tree(label) if tree is None else tree.add(label)
    for parent in node.parents:
        lineage_tree(parent, branch)
    return branch


def _folded(*headers: str, **options: Any) -> Table:
    """A table whose cells are folded where they are too wide."""
    table = Table(title_justify="left", **options)
    for header in headers:
        table.add_column(Text(header), overflow="fold")
    return table


def _add(table: Table, *cells: str | Text) -> None:
    """Adds a row; brackets in a cell are brackets, not markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def _when(at: datetime) -> str:
    return f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M:%S %Z}"


def _minute(at: datetime) -> str:
    return f"{at.astimezone(timezone.utc):%Y-%m-%d %H:%M}"


def _cell(value: Any) -> str:
    return "—" if value is None else str(value)
