"""``raycolbert registry …``: look at, verify, promote and clean up what is published."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape

from cluster.config import StorageConfig, load_recipe, refuse_credentials
from cluster.manifest import KINDS, Alias, Manifest
from cluster.manifest_diff import diff as difference
from cluster.registry import ArtifactRef, Parent, Registry, parse_ref
from cluster.registry_gc import collect
from colbert_core.errors import ArtifactNotFound, ConfigError, IntegrityError, RaycolbertError, StorageError
from jobs.registry_tables import (
    Listed,
    changes,
    console,
    garbage,
    history,
    lineage_tree,
    listing,
    plain_lineage,
    print_json,
    problems,
    say,
    summary,
    unwrapped,
    version_tables,
)

MOST_DAYS = 36_500  # a hundred years: beyond what dates can tell, an age is a mistake

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
errors = Console(stderr=True)

_ROOT, _ENDPOINT = "RAYCOLBERT_ROOT", "RAYCOLBERT_ENDPOINT_URL"

RefArgument = Annotated[
    str, typer.Argument(metavar="REF", help="KIND/NAME@VERSION-or-alias, e.g. models/ja@v1")
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", "-r", help="take the storage from this recipe")
]
RootOption = Annotated[
    str | None,
    typer.Option("--root", help=f"s3://bucket/prefix or a directory; without --recipe, ${_ROOT} by default"),
]
EndpointOption = Annotated[
    str | None,
    typer.Option("--endpoint-url", help=f"S3-compatible server; without --recipe, ${_ENDPOINT} by default"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@contextmanager
def _opened(recipe: Path | None, root: str | None, endpoint_url: str | None) -> Iterator[Registry]:
    """The registry that the options name; typed errors end the command with their exit code."""
    if recipe is None:
        root, endpoint_url = root or os.environ.get(_ROOT), endpoint_url or os.environ.get(_ENDPOINT)
    try:
        refuse_credentials({"--root": root, "--endpoint-url": endpoint_url})
        if recipe is not None and root is not None:
            raise ConfigError("--root and --recipe both say where; one is enough")
        if recipe is not None:
            storage = load_recipe(recipe).storage
            if endpoint_url is not None:
                storage = storage.model_copy(update={"endpoint_url": endpoint_url})
        elif root:
            storage = StorageConfig(root=root, endpoint_url=endpoint_url)
        else:
            raise ConfigError(
                f"say where: --root s3://bucket/prefix or DIRECTORY, ${_ROOT}, or --recipe FILE"
            )
        yield Registry.open(storage)
    except RaycolbertError as error:
        message = f"{type(error).__name__}: {escape(str(error))}"
        errors.print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True)
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
            records = registry.manifests(each, name)
            pointing = {found: registry.aliases(each, found) for found in {ref.name for ref in records}}
            for ref, record in records.items():
                states = pointing[ref.name]
                names = sorted(alias for alias, state in states.items() if state.version == ref.version)
                rows.append(Listed(ref, record, names))
        rows.sort(key=lambda row: row.order)
        if as_json:
            print_json([row.plain() for row in rows])
        elif rows:
            console.print(listing(rows, registry.store.uri))
        else:
            say(f"nothing is published{' under ' * bool(pattern)}{pattern} in {registry.store.uri}")
        unreadable = [row.record for row in rows if not isinstance(row.record, Manifest)]
        if unreadable:
            raise IntegrityError("; ".join(map(str, unreadable)))


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
            print_json({**manifest.model_dump(mode="json"), "aliases": states})
            return
        for table in version_tables(manifest, list(aliases.values())):
            console.print(table)


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
            print_json(found)
        else:
            console.print(problems(found))
        if any(found.values()):
            damaged = ", ".join(ref for ref, wrong in found.items() if wrong)
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
        moved = registry.promote(_resolved(registry, ref), alias, expected=expected)
        _print_alias(moved, as_json)


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
        found = difference(old, new)
        if as_json:
            print_json(found)
        elif found:
            console.print(changes(found, old.ref, new.ref))
        else:
            say(f"{old.ref} and {new.ref} have the same content and origin")


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
            print_json(plain_lineage(node))
        else:
            unwrapped.print(lineage_tree(node))


@app.command("gc")
def gc(
    days: Annotated[float, typer.Option(min=0, max=MOST_DAYS, help="keep versions younger than this")] = 30.0,
    staging_days: Annotated[
        float, typer.Option(min=0, max=MOST_DAYS, help="keep unfinished work younger than this")
    ] = 2.0,
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
            print_json(found)
            return
        if not found.garbage:
            say(f"nothing to remove; {_versions(found.kept_versions)} kept")
            return
        console.print(garbage(found))
        done = "would be freed; nothing was removed (use --delete)" if found.dry_run else "freed"
        say(f"{decimal(found.size)} {done}; {_versions(found.kept_versions)} kept")


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
            print_json({"ref": str(resolved), "directory": str(directory)})
        else:
            print(directory)


def _tell_what_stanford_lacks(model: Path) -> None:
    """Stanford's layout has no words for some settings; whoever takes a model out of here may rely on it."""
    # The model's libraries take seconds to load, which no other command needs to wait for.
    from colbert_core.formats import load_model
    from colbert_core.formats_stanford import stanford_differences

    for reason in stanford_differences(load_model(model)):
        errors.print(f"[yellow]Stanford's ColBERT will not score as this model does:[/] {escape(reason)}")


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
        if manifest.kind == "models" and not any(path.endswith(".safetensors") for path in manifest.files):
            warning = f"[yellow]{manifest.ref} holds no .safetensors:[/] no job can load it as a model"
            errors.print(warning, highlight=False, soft_wrap=True)
        if as_json:
            print_json(summary(manifest))
        else:
            size = decimal(manifest.total_bytes)
            say(f"published {manifest.ref}: {len(manifest.files)} files, {size}")


def _resolved(registry: Registry, text: str) -> ArtifactRef:
    ref = parse_ref(text)
    return registry.resolve(ref.kind, f"{ref.name}@{ref.version}")


def _print_alias(alias: Alias, as_json: bool) -> None:
    if as_json:
        print_json(alias)
    else:
        console.print(history(alias))


def _versions(count: int) -> str:
    return f"{count} version{'s' * (count != 1)}"


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
