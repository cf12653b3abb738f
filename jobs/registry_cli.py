"""``raycolbert registry …``: look at, verify, promote and clean up what is published."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.tree import Tree

from cluster.config import StorageConfig, load_recipe, refuse_credentials
from cluster.manifest import KINDS, Alias, Manifest
from cluster.manifest_diff import diff as difference
from cluster.registry import ArtifactRef, LineageNode, Parent, Registry, parse_ref
from cluster.registry_gc import collect
from colbert_core.errors import ArtifactNotFound, ConfigError, IntegrityError, RaycolbertError, StorageError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)

RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="KIND/NAME@VERSION-or-alias, e.g. models/ja@v1")
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="take the storage from this recipe")
]
RootOption = Annotated[
    str | None, typer.Option("--root", envvar="RAYCOLBERT_ROOT", help="s3://bucket/prefix or a directory")
]
EndpointOption = Annotated[
    str | None, typer.Option("--endpoint-url", envvar="RAYCOLBERT_ENDPOINT_URL", help="S3-compatible server")
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@contextmanager
def _opened(recipe: Path | None, root: str | None, endpoint_url: str | None) -> Iterator[Registry]:
    """The registry that the options name; typed errors end the command with their exit code."""
    try:
        refuse_credentials({"--root": root, "--endpoint-url": endpoint_url})
        if root is not None:
            storage = StorageConfig(root=root, endpoint_url=endpoint_url)
        elif recipe is not None:
            storage = load_recipe(recipe).storage
            if endpoint_url is not None:
                storage = storage.model_copy(update={"endpoint_url": endpoint_url})
        else:
            raise ConfigError("say where: --root s3://bucket/prefix or DIRECTORY, or --recipe FILE")
        yield Registry.open(storage)
    except RaycolbertError as error:
        errors.print(f"[bold red]error:[/] {type(error).__name__}: {error}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


@app.command("list")
def list_(
    pattern: Annotated[str, typer.Argument(metavar="[KIND[/NAME]]", help="only these; default: all")] = "",
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Published versions with their aliases, newest first."""
    kind, _, name = pattern.strip("/").partition("/")
    with _opened(recipe, root, endpoint_url) as registry:
        if kind and kind not in KINDS:
            raise ArtifactNotFound(f"no kind of artifact {kind!r}; there are: {', '.join(KINDS)}")
        rows = []
        for each in [k for k in KINDS if kind in ("", k)]:
            for found in [name] if name else registry.names(each):
                pointing = registry.aliases(each, found)
                for version in registry.versions(each, found):
                    manifest = registry.manifest(ArtifactRef(each, found, version))
                    names = sorted(alias for alias, state in pointing.items() if state.version == version)
                    rows.append((manifest, names))
        rows.sort(key=lambda row: (row[0].kind, row[0].name, -row[0].created_at.timestamp()))
        if as_json:
            _print_json([{**_summary(manifest), "aliases": names} for manifest, names in rows])
            return
        table = Table("artifact", "aliases", "created", "size", "files", title=registry.store.uri)
        for manifest, names in rows:
            cells = (decimal(manifest.total_bytes), str(len(manifest.files)))
            table.add_row(str(manifest.ref), ", ".join(names), _when(manifest), *cells)
        console.print(table)


@app.command("show")
def show(
    ref: RefArgument,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """The manifest of one version, and the history of its aliases."""
    with _opened(recipe, root, endpoint_url) as registry:
        manifest = registry.manifest(_resolved(registry, ref))
        aliases = registry.aliases(manifest.kind, manifest.name)
        if as_json:
            states = {name: state.model_dump(mode="json") for name, state in aliases.items()}
            _print_json({**manifest.model_dump(mode="json"), "aliases": states})
            return
        table = Table(title=str(manifest.ref), title_justify="left", show_header=False)
        table.add_row("created", _when(manifest))
        table.add_row("size", f"{decimal(manifest.total_bytes)} in {len(manifest.files)} files")
        table.add_row("data", manifest.data_fingerprint or "")
        for parent in manifest.parents:
            table.add_row("made from", f"{parent.ref} × {parent.weight:g}")
        for key, value in manifest.metrics.items():
            table.add_row(f"metric: {key}", f"{value:.4f}" if isinstance(value, float) else str(value))
        for library, version in manifest.libraries.items():
            table.add_row(f"with {library}", version)
        console.print(table)
        files = Table("file", "size", "sha256", title="files", title_justify="left")
        for path, entry in sorted(manifest.files.items()):
            files.add_row(path, decimal(entry.size), entry.sha256[:16])
        console.print(files)
        for state in aliases.values():
            console.print(_history(state))


@app.command("verify")
def verify(
    refs: Annotated[list[str], typer.Argument(metavar="REF...", help="KIND/NAME@VERSION-or-alias")],
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every byte in storage again and compare with the manifest; exits 2 if anything is wrong."""
    with _opened(recipe, root, endpoint_url) as registry:
        found = {str(ref): registry.verify(ref) for ref in (_resolved(registry, text) for text in refs)}
        if as_json:
            _print_json(found)
        else:
            table = Table("artifact", "result")
            for ref, problems in found.items():
                table.add_row(ref, "\n".join(problems) or "[green]intact[/]")
            console.print(table)
        if any(found.values()):
            damaged = ", ".join(ref for ref, problems in found.items() if problems)
            raise IntegrityError(f"damaged: {damaged}")


@app.command("promote")
def promote(
    ref: RefArgument,
    alias: Annotated[str, typer.Argument(help="such as production")],
    expected: Annotated[str | None, typer.Option(help="refuse unless the alias points here now")] = None,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to a version."""
    with _opened(recipe, root, endpoint_url) as registry:
        _print_alias(registry.promote(_resolved(registry, ref), alias, expected=expected), as_json)


@app.command("rollback")
def rollback(
    target: Annotated[str, typer.Argument(metavar="KIND/NAME@ALIAS", help="the alias to move back")],
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Point an alias to the version before; repeated, further back."""
    with _opened(recipe, root, endpoint_url) as registry:
        ref = parse_ref(target)
        _print_alias(registry.rollback(ref.kind, ref.name, ref.version), as_json)


@app.command("diff")
def diff(
    before: RefArgument,
    after: RefArgument,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """What differs between two versions: files, parents, metrics, recipe, data, libraries."""
    with _opened(recipe, root, endpoint_url) as registry:
        old, new = (registry.manifest(_resolved(registry, text)) for text in (before, after))
        changes = difference(old, new)
        if as_json:
            _print_json(changes)
            return
        table = Table("section", "key", str(old.ref), str(new.ref))
        for change in changes:
            table.add_row(change.section, change.key, *(_cell(v) for v in (change.before, change.after)))
        console.print(table if changes else f"{old.ref} and {new.ref} have the same content and origin")


@app.command("lineage")
def lineage(
    ref: RefArgument,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a version was made from, back to the beginning."""
    with _opened(recipe, root, endpoint_url) as registry:
        node = registry.lineage(_resolved(registry, ref))
        if as_json:
            _print_json(_plain(node))
        else:
            console.print(_tree(node))


@app.command("gc")
def gc(
    days: Annotated[float, typer.Option(min=0, help="keep versions younger than this")] = 30.0,
    staging_days: Annotated[float, typer.Option(min=0, help="keep unfinished work younger than this")] = 2.0,
    delete: Annotated[bool, typer.Option("--delete", help="remove; without it, only look")] = False,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find what no alias and no lineage needs, and what killed jobs left; remove it with --delete."""
    with _opened(recipe, root, endpoint_url) as registry:
        found = collect(
            registry,
            older_than=timedelta(days=days),
            staging_older_than=timedelta(days=staging_days),
            dry_run=not delete,
        )
        if as_json:
            _print_json(found)
            return
        table = Table("what", "name", "objects", "size", "last written")
        for item in found.garbage:
            when = f"{item.modified:%Y-%m-%d %H:%M}" if item.modified else ""
            table.add_row(item.what, item.name, str(item.objects or ""), decimal(item.size), when)
        console.print(table)
        done = "would be freed; nothing was removed (use --delete)" if found.dry_run else "freed"
        console.print(f"{decimal(found.size)} {done}; {found.kept_versions} versions kept")


@app.command("pull")
def pull(
    ref: RefArgument,
    to: Annotated[
        Path | None, typer.Option(help="copy to this new directory; default: only the cache")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="only this file (repeatable)")] = None,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Download a version, every byte checked, and print where it is."""
    with _opened(recipe, root, endpoint_url) as registry:
        resolved = _resolved(registry, ref)
        directory = registry.pull(resolved, paths=only or None)
        if to is not None:
            directory = _copied(directory, to)
            if resolved.kind == "models" and (directory / "artifact.metadata").exists() and not only:
                _tell_what_stanford_lacks(directory)
        if as_json:
            _print_json({"ref": str(resolved), "directory": str(directory)})
        else:
            print(directory)


def _tell_what_stanford_lacks(model: Path) -> None:
    """Stanford's layout has no words for some settings; whoever takes a model out of here may rely on it."""
    # The model's libraries take seconds to load, which no other command needs to wait for.
    from colbert_core.formats import load_model
    from colbert_core.formats_stanford import stanford_differences

    for reason in stanford_differences(load_model(model)):
        errors.print(f"[yellow]Stanford's ColBERT will not score as this model does:[/] {reason}")


@app.command("push")
def push(
    directory: Annotated[Path, typer.Argument(help="directory whose files are published")],
    ref: Annotated[
        str, typer.Argument(metavar="KIND/NAME@VERSION", help="a version that does not exist yet")
    ],
    parent: Annotated[list[str] | None, typer.Option(help="REF it was made from (repeatable)")] = None,
    recipe: RecipeOption = None,
    root: RootOption = None,
    endpoint_url: EndpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a directory as a new version."""
    with _opened(recipe, root, endpoint_url) as registry:
        parents = [Parent(_resolved(registry, text)) for text in parent or ()]
        manifest = registry.publish(parse_ref(ref), directory, parents=parents)
        if as_json:
            _print_json(_summary(manifest))
        else:
            size = decimal(manifest.total_bytes)
            console.print(f"published {manifest.ref}: {len(manifest.files)} files, {size}")


def _resolved(registry: Registry, text: str) -> ArtifactRef:
    ref = parse_ref(text)
    return registry.resolve(ref.kind, f"{ref.name}@{ref.version}")


def _summary(manifest: Manifest) -> dict[str, Any]:
    return {
        "ref": str(manifest.ref),
        "created_at": manifest.created_at.isoformat(),
        "size": manifest.total_bytes,
        "files": len(manifest.files),
        "metrics": manifest.metrics,
    }


def _when(manifest: Manifest) -> str:
    return f"{manifest.created_at:%Y-%m-%d %H:%M:%S %Z}"


def _cell(value: Any) -> str:
    return "—" if value is None else str(value)


def _print_json(content: Any) -> None:
    def plain(value: BaseModel) -> Any:
        return value.model_dump(mode="json")

    print(json.dumps(content, indent=2, ensure_ascii=False, default=plain))


def _print_alias(alias: Alias, as_json: bool) -> None:
    if as_json:
        _print_json(alias)
    else:
        console.print(_history(alias))


def _history(alias: Alias) -> Table:
    table = Table("when", "action", "version", "before", "by")
    table.title, table.title_justify = f"alias {alias.name}@{alias.alias} → {alias.version}", "left"
    for move in reversed(alias.history):
        table.add_row(
            f"{move.at:%Y-%m-%d %H:%M:%S %Z}", move.action, move.version, _cell(move.previous), move.by
        )
    return table


def _plain(node: LineageNode) -> dict[str, Any]:
    return {
        "ref": str(node.ref),
        "weight": node.weight,
        "exists": node.manifest is not None,
        "metrics": node.manifest.metrics if node.manifest else {},
        "parents": [_plain(parent) for parent in node.parents],
    }


def _tree(node: LineageNode, tree: Tree | None = None) -> Tree:
    """The artifact with its parents as branches, their weight where it is not 1."""
    label = f"[bold]{node.ref}[/]" + (f" × {node.weight:g}" if node.weight != 1.0 else "")
    if node.manifest is None:
        label += " [red]no longer there[/]"
    else:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in node.manifest.metrics.items() if isinstance(v, float))
        label += f" [dim]{_when(node.manifest)}[/] {figures}"
    branch = Tree(label) if tree is None else tree.add(label)
    for parent in node.parents:
        _tree(parent, branch)
    return branch


def _copied(source: Path, target: Path) -> Path:
    """A writable copy in a new directory, which appears when it is complete."""
    if target.exists():
        raise StorageError(f"--to {target}: it exists already")
    building = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.copytree(source, building, copy_function=shutil.copyfile)
        for path in [building, *building.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        building.rename(target)
    except OSError as error:
        shutil.rmtree(building, ignore_errors=True)
        raise StorageError(f"--to {target}: {error.strerror or error}") from None
    return target
