"""A published index without what changes have left in it: a new version, as a fresh build would make it."""

from __future__ import annotations

from cluster.config import Recipe
from cluster.index_compaction import compact_published, compacted_ref, is_compact
from cluster.registry import Registry
from cluster.report import Report
from colbert_core.errors import ConfigError, VersionExists
from jobs.launch import main
from jobs.update_index import alias_of, index_spec


def run(recipe: Recipe, index: str | None = None, shards: int | None = None, promote: bool = False) -> Report:
    """Publishes ``indexes/NAME@compact-…``, unless it exists or there is nothing to compact.

    Args:
        recipe: names the storage.
        index: NAME@VERSION-or-alias; default: ``serve.index``, or ``production`` of ``index.name``.
        shards: how many the result has; default: as many as the build made.
        promote: point the alias to the new version, if it still points to the one that was compacted.

    Raises:
        ConfigError: no index is named, ``shards`` is below 1, or ``promote`` without an alias.
        ArtifactNotFound: the index is not published.
        PreconditionFailed: the alias was moved meanwhile; the new version is published.
    """
    report = Report(job="compact_index", recipe=recipe.name)
    if shards is not None and shards < 1:
        raise ConfigError(f"--shards {shards}: at least 1 is expected")
    registry = Registry.open(recipe.storage)
    spec = index_spec(recipe, index)
    source = registry.resolve("indexes", spec)
    alias = alias_of(spec, source) if promote else None
    manifest = registry.manifest(source)
    if is_compact(manifest, shards):
        report.skipped.append(str(source))
        return report
    ref = compacted_ref(source, shards)
    if registry.exists(ref):
        report.skipped.append(str(ref))
    else:
        try:
            compact_published(manifest, ref, shards, registry, report)
            report.artifacts.append(str(ref))
        except VersionExists:
            report.skipped.append(str(ref))
    if alias is not None:
        registry.promote(ref, alias, expected=source.version)
        report.details["promoted"] = alias
    return report


if __name__ == "__main__":
    main("compact_index", run)
