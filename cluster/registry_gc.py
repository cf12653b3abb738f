"""Garbage collection: versions that nothing needs, and what killed jobs left behind.

A version is kept if an alias points to it (or did before its last movement, so that a rollback works), if
it is young, if a training run that lives learns from it, or if such a version was made from it, at any
distance. If any manifest cannot be read, its lineage is unknown and nothing is collected at all.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta, timezone
from graphlib import CycleError, TopologicalSorter
from itertools import groupby

from pydantic import BaseModel

from cluster.artifacts import ArtifactRef
from cluster.manifest import KINDS, Manifest, manifest_key
from cluster.registry import Registry
from cluster.run_lease import inputs_of_runs
from cluster.storage import ObjectInfo
from colbert_core.errors import IntegrityError

_PROBE_AGE = timedelta(hours=1)


class Garbage(BaseModel):
    """One thing that is not needed.

    Attributes:
        what: ``version``, ``staging`` (an unfinished publish), ``leftover`` (files in a version's folder that
            its manifest does not name), ``upload`` (an unfinished upload) or ``probe``.
        name: the version or key.
        objects: how many objects it is made of.
        size: their bytes; 0 where the storage does not say.
        modified: when it was last written; None where the storage does not say.
    """

    what: str
    name: str
    objects: int = 0
    size: int = 0
    modified: datetime | None = None


class Collection(BaseModel):
    """What a collection found, and whether it removed it."""

    dry_run: bool
    garbage: list[Garbage]
    kept_versions: int

    @property
    def size(self) -> int:
        """Bytes of all garbage."""
        return sum(item.size for item in self.garbage)


def collect(
    registry: Registry,
    *,
    older_than: timedelta = timedelta(days=30),
    staging_older_than: timedelta = timedelta(days=2),
    dry_run: bool = True,
    now: datetime | None = None,
) -> Collection:
    """Finds, and unless ``dry_run`` removes, what nothing needs.

    A version's manifest goes first, so that a collection that is killed leaves no damaged version; children
    go before what they were made from.

    What a training run learns from is kept while the run lives, and for ``staging_older_than`` after its last
    sign of life.

    Args:
        registry: where.
        older_than: age of a version below which it is kept.
        staging_older_than: age of the last write below which an unfinished publish is kept. It must exceed
            the longest pause of a living build.
        dry_run: only look.
        now: the present, for tests.

    Raises:
        IntegrityError: a manifest or an alias is damaged; nothing has been removed.
        SchemaVersionError: a newer raycolbert wrote one; nothing has been removed.
    """
    now = now or datetime.now(timezone.utc)
    store = registry.store
    folders = _folders(registry)
    manifests: dict[ArtifactRef, Manifest] = {}
    for ref, objects in folders.items():
        if any(info.key == manifest_key(ref) for info in objects):
            manifests[ref] = registry.manifest(ref)
    young = {ref for ref, manifest in manifests.items() if now - manifest.created_at < older_than}
    staging_limit = now - staging_older_than
    roots = young | _aliased(registry, folders) | inputs_of_runs(store, staging_limit)
    kept = _with_ancestors(roots, manifests)

    garbage = []
    for ref in _children_first(set(manifests) - kept, manifests):
        if not dry_run:
            # Somebody may have promoted it, or what was made from it, since the aliases were read.
            if ref in _aliased(registry, [ref]):
                kept |= _with_ancestors({ref}, manifests)
            if ref in kept:
                continue
            store.delete(manifest_key(ref))
            _delete(registry, ref.prefix, folders[ref])
        garbage.append(_describe("version", str(ref), folders[ref]))
    for ref, objects in folders.items():
        if ref not in manifests and all(info.modified < staging_limit for info in objects):
            garbage.append(_describe("staging", ref.prefix, objects))
            if not dry_run:
                # Somebody may have taken the publish up again since the folders were read.
                present = list(store.list(ref.prefix))
                if set(present) <= set(objects) and not registry.exists(ref):
                    _delete(registry, ref.prefix, objects)
        elif ref in kept and ref in manifests:
            named = {manifest_key(ref), *(manifests[ref].key_of(path) for path in manifests[ref].files)}
            unnamed = [info for info in objects if info.key not in named and info.modified < staging_limit]
            if unnamed:
                garbage.append(_describe("leftover", ref.prefix, unnamed))
                if not dry_run:
                    _delete(registry, ref.prefix, unnamed)
    probes = [info for info in store.list(".probe/") if info.modified < now - _PROBE_AGE]
    if probes:
        garbage.append(_describe("probe", ".probe/", probes))
        if not dry_run:
            _delete(registry, ".probe/", probes)
    uploads = store.abort_uploads(staging_limit, dry_run=dry_run)
    garbage += [Garbage(what="upload", name=key) for key in uploads]
    return Collection(dry_run=dry_run, garbage=garbage, kept_versions=len(kept & set(manifests)))


def _folders(registry: Registry) -> dict[ArtifactRef, list[ObjectInfo]]:
    """All objects of each version's folder, published or not."""
    found: dict[ArtifactRef, list[ObjectInfo]] = {}
    for kind in KINDS:
        objects = (info for info in registry.store.list(f"{kind}/") if info.key.count("/") > 2)
        for (name, version), group in groupby(objects, lambda info: tuple(info.key.split("/")[1:3])):
            if version != "aliases":
                found.setdefault(ArtifactRef(kind, name, version), []).extend(group)
    return found


def _aliased(registry: Registry, refs: Iterable[ArtifactRef]) -> set[ArtifactRef]:
    """The versions that aliases point to, and those that a rollback would lead to."""
    found = set()
    for kind, name in {(ref.kind, ref.name) for ref in refs}:
        for alias in registry.aliases(kind, name).values():
            found.add(alias.ref)
            if (earlier := alias.earlier()) is not None:
                found.add(ArtifactRef(kind, name, earlier))
    return found


def _with_ancestors(roots: set[ArtifactRef], manifests: dict[ArtifactRef, Manifest]) -> set[ArtifactRef]:
    found: set[ArtifactRef] = set()
    waiting = list(roots)
    while waiting:
        ref = waiting.pop()
        if ref not in found:
            found.add(ref)
            if ref in manifests:
                waiting += [parent.ref for parent in manifests[ref].parents]
    return found


def _children_first(refs: set[ArtifactRef], manifests: dict[ArtifactRef, Manifest]) -> list[ArtifactRef]:
    """Orders versions so that none comes before one that was made from it."""
    children: dict[ArtifactRef, set[ArtifactRef]] = {ref: set() for ref in sorted(refs)}
    for ref in sorted(refs):
        for parent in manifests[ref].parents:
            if parent.ref in refs:
                children[parent.ref].add(ref)
    try:
        return list(TopologicalSorter(children).static_order())
    except CycleError as error:
        circle = " <- ".join(str(ref) for ref in error.args[1])
        raise IntegrityError(f"the lineage goes in a circle: {circle}") from None


def _describe(what: str, name: str, objects: list[ObjectInfo]) -> Garbage:
    return Garbage(
        what=what,
        name=name,
        objects=len(objects),
        size=sum(info.size for info in objects),
        modified=max(info.modified for info in objects),
    )


def _delete(registry: Registry, prefix: str, objects: list[ObjectInfo]) -> None:
    """Deletes objects below a prefix, but for those that were written anew since they were listed."""
    unchanged = set(objects).intersection(registry.store.list(prefix))
    # Part records first: a publish that resumes now must not believe in files that are about to go.
    for info in sorted(unchanged, key=lambda info: ("/.parts/" not in info.key, info.key)):
        registry.store.delete(info.key)
