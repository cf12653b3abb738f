"""Documents added to and deleted from a published index: a new version of it, whose parent it is."""

from __future__ import annotations

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe
from cluster.index_change import read_change
from cluster.index_update import IndexUpdate, updated_ref
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from colbert_core.errors import ConfigError, RaycolbertError
from jobs.launch import main


def run(
    recipe: Recipe,
    index: str | None = None,
    add: str | None = None,
    delete: str | None = None,
    replace: bool = False,
    promote: bool = False,
) -> Report:
    """Publishes ``indexes/NAME@update-…``, unless it exists, or the index is the result of this change.

    Args:
        recipe: names the storage, and the workers that encode.
        index: NAME@VERSION-or-alias; default: ``serve.index``, or ``production`` of ``index.name``.
        add: documents to add, see :func:`cluster.index_change.read_change`.
        delete: ids to delete. An id that is both deleted and added is an update.
        replace: added documents may take the place of those with their id.
        promote: point the alias to the new version, if it still points to the one that was changed.

    Raises:
        ConfigError: no index is named, or ``promote`` without an alias.
        ArtifactNotFound: the index is not published.
        DataError: a file is malformed, or does not fit the index; names file, row and id.
        PreconditionFailed: the alias was moved meanwhile; the new version is published.
    """
    report = Report(job="update_index", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    spec = index_spec(recipe, index)
    source = registry.resolve("indexes", spec)
    alias = alias_of(spec, source) if promote else None
    change = read_change(recipe, add, delete, replace)
    manifest = registry.manifest(source)
    ref = updated_ref(source, change)
    if manifest.extra.get("change") == change.digest:
        report.skipped.append(str(source))
        return report
    if registry.exists(ref):
        report.skipped.append(str(ref))
    else:
        update = IndexUpdate(recipe, manifest, change, registry, report)
        try:
            if add is None:
                update.run()
            else:
                with ray_session(recipe):
                    update.run()
            report.artifacts.append(str(ref))
        except RaycolbertError:
            # Somebody else made the same change and was first; they have also cleared up.
            if not registry.exists(ref):
                raise
            report.skipped.append(str(ref))
    if alias is not None:
        registry.promote(ref, alias, expected=source.version)
        report.details["promoted"] = alias
    return report


def index_spec(recipe: Recipe, index: str | None) -> str:
    """The index that a command is about.

    Raises:
        ConfigError: neither the command nor the recipe names one.
    """
    if index is not None:
        if "@" not in index:
            raise ConfigError(f"--index {index}: NAME@VERSION-or-alias is expected")
        return index
    if recipe.serve is not None and recipe.serve.index is not None:
        return recipe.serve.index
    if recipe.index is not None:
        return f"{recipe.index.name}@production"
    raise ConfigError("--index NAME@VERSION-or-alias is needed: the recipe has no 'index' section")


def alias_of(spec: str, ref: ArtifactRef) -> str:
    """The alias by which a command names an index.

    Raises:
        ConfigError: it names a version.
    """
    alias = spec.rpartition("@")[2]
    if alias == ref.version:
        raise ConfigError(f"--promote moves an alias, but {spec} is a version: name the index by its alias")
    return alias


if __name__ == "__main__":
    main("update_index", run)
