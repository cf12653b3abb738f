"""Versions of models, data sets and indexes in object storage.

A version's files are uploaded first and its manifest last, if-absent: a version without a manifest does
not exist for anybody. Files are never overwritten either: when two publishers race for one version with
different content, the later one's file goes to a place of its own, and whose manifest is first decides.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from cluster.aliases import alias_key, alias_names, move_alias, promotion, read_alias, rolling_back
from cluster.artifacts import ArtifactRef, Kind
from cluster.cache import ArtifactCache
from cluster.config import StorageConfig
from cluster.manifest import BLOCK_BYTES, KINDS, Alias, Manifest, Parent, check_ref, manifest_key, parse_ref
from cluster.staging import StagedArtifact
from cluster.storage import ObjectStore, check_key, open_store
from cluster.transfers import transfer
from cluster.verified_reader import VerifiedReader
from colbert_core.errors import (
    ArtifactNotFound,
    IntegrityError,
    ObjectNotFound,
    RaycolbertError,
    SchemaVersionError,
    StorageError,
    VersionExists,
)

__all__ = [
    "KINDS",
    "Alias",
    "ArtifactRef",
    "LineageNode",
    "Manifest",
    "Parent",
    "Registry",
    "StagedArtifact",
    "parse_ref",
]

_THREADS = 8


@dataclass(frozen=True)
class LineageNode:
    """An artifact in the tree of what it was made from.

    Attributes:
        ref: the artifact.
        weight: its share in the artifact below it.
        manifest: None when the version no longer exists.
        parents: what it was made from.
    """

    ref: ArtifactRef
    weight: float
    manifest: Manifest | None
    parents: tuple[LineageNode, ...]


class Registry:
    """The artifacts under one storage root.

    Args:
        store: the storage.
        cache: verified local copies; shared between processes.
    """

    def __init__(self, store: ObjectStore, cache: ArtifactCache) -> None:
        self.store = store
        self.cache = cache

    @classmethod
    def open(cls, config: StorageConfig) -> Registry:
        """The registry of a recipe's storage."""
        return cls(open_store(config), ArtifactCache(Path(config.cache_dir).expanduser(), config.cache_gb))

    # -- reading ------------------------------------------------------------------------------------

    def exists(self, ref: ArtifactRef) -> bool:
        """Whether the version is published."""
        return self.store.exists(manifest_key(ref))

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """The record of a published version.

        Raises:
            ArtifactNotFound: it is not published; the message lists versions that are.
            SchemaVersionError: a newer raycolbert wrote it.
            IntegrityError: the manifest is damaged, or describes another version.
        """
        try:
            return self._manifest(ref)
        except ObjectNotFound:
            raise ArtifactNotFound(self._not_found(ref)) from None

    def manifests(self, kind: Kind, name: str = "") -> dict[ArtifactRef, Manifest | RaycolbertError]:
        """The records of all published versions; where one cannot be read, the error that says why.

        Args:
            kind: of artifacts.
            name: only of this name; by default of all.
        """
        names = [name] if name else self.store.list_folders(f"{kind}/")
        refs = [ArtifactRef(kind, each, version) for each in names for version in self._folders(kind, each)]

        def read(ref: ArtifactRef) -> Manifest | RaycolbertError | None:
            try:
                return self._manifest(ref)
            except (ObjectNotFound, ArtifactNotFound):
                return None  # not published yet, or a folder of something else
            except (IntegrityError, SchemaVersionError) as error:
                return error

        with ThreadPoolExecutor(_THREADS) as pool:
            found = zip(refs, pool.map(read, refs), strict=True)
            return {ref: record for ref, record in found if record is not None}

    def _manifest(self, ref: ArtifactRef) -> Manifest:
        key = manifest_key(ref)
        manifest = Manifest.from_bytes(self.store.get(key), key)
        if manifest.ref != ref:
            raise IntegrityError(f"{key}: this is the manifest of {manifest.ref}")
        return manifest

    def pull(self, ref: ArtifactRef, *, paths: Sequence[str] | None = None) -> Path:
        """A read-only local directory with the version's files, each checked against its SHA-256.

        The directory stays in the cache at least as long as this process lives.

        Args:
            ref: the version.
            paths: only these files; by default all.

        Raises:
            ArtifactNotFound: no such version, or it has no such file.
            IntegrityError: a file in storage is damaged or missing; nothing is installed.
        """
        return self.cache.install(self.store, self.manifest(ref), paths)

    def open_file(self, ref: ArtifactRef, path: str) -> BinaryIO:
        """A buffered, seekable reader of one file in storage; what it reads is checked, block by block.

        Raises:
            ArtifactNotFound: no such version, or it has no such file.
            IntegrityError: raised when the damaged part is read.
        """
        manifest = self.manifest(ref)
        key, entry = manifest.key_of(path), manifest.files[path]
        if entry.size > BLOCK_BYTES and not entry.blocks:
            return (self.pull(ref, paths=[path]) / path).open("rb")
        return cast(BinaryIO, io.BufferedReader(VerifiedReader(self.store, key, entry), 1 << 18))

    def verify(self, ref: ArtifactRef) -> list[str]:
        """Reads every file of a version in storage and returns what is wrong with it, by key."""
        manifest = self.manifest(ref)

        def check(path: str) -> str | None:
            key, entry = manifest.key_of(path), manifest.files[path]
            try:
                size = self.store.head(key).size
                if size != entry.size:
                    return f"{key}: {size} bytes, the manifest says {entry.size}"
                if self.store.sha256(key) != entry.sha256:
                    return f"{key}: the content does not match its SHA-256"
            except ObjectNotFound:
                return f"{key}: missing"
            return None

        sizes = {path: entry.size for path, entry in manifest.files.items()}
        found = transfer(f"verify {ref}", sizes, check)
        return [problem for _, problem in sorted(found.items()) if problem]

    def names(self, kind: Kind) -> list[str]:
        """Names of this kind that have at least one published version."""
        return [name for name in self.store.list_folders(f"{kind}/") if self.versions(kind, name)]

    def versions(self, kind: Kind, name: str) -> list[str]:
        """Published versions, in the order of their names."""
        folders = self._folders(kind, name)
        with ThreadPoolExecutor(_THREADS) as pool:
            there = list(pool.map(lambda v: self.store.exists(f"{kind}/{name}/{v}/manifest.json"), folders))
        return [version for version, found in zip(folders, there, strict=True) if found]

    def _folders(self, kind: Kind, name: str) -> list[str]:
        """Of versions, published or not."""
        return [version for version in self.store.list_folders(f"{kind}/{name}/") if version != "aliases"]

    def resolve(self, kind: Kind, spec: str) -> ArtifactRef:
        """The version that ``name@version`` or ``name@alias`` stands for now.

        Raises:
            ArtifactNotFound: there is neither such a version nor such an alias.
        """
        spec = spec.removeprefix(f"{kind}/")
        ref = parse_ref(f"{kind}/{spec}")
        if self.exists(ref):
            return ref
        try:
            return self.alias(kind, ref.name, ref.version).ref
        except ArtifactNotFound:
            raise ArtifactNotFound(self._not_found(ref)) from None

    def lineage(self, ref: ArtifactRef) -> LineageNode:
        """What a version was made from, and what that was made from, and so on.

        Raises:
            ArtifactNotFound: the version is not published; an ancestor may have been collected.
            IntegrityError: a manifest is damaged, or the lineage goes in a circle.
        """
        self.manifest(ref)
        known: dict[ArtifactRef, tuple[Manifest | None, tuple[LineageNode, ...]]] = {}

        def node(ref: ArtifactRef, weight: float, below: tuple[ArtifactRef, ...]) -> LineageNode:
            if ref in below:
                raise IntegrityError(f"the lineage of {below[0]} goes in a circle at {ref}")
            if ref not in known:
                try:
                    manifest = self.manifest(ref)
                except ArtifactNotFound:
                    known[ref] = (None, ())
                else:
                    parents = (node(parent.ref, parent.weight, (*below, ref)) for parent in manifest.parents)
                    known[ref] = (manifest, tuple(parents))
            return LineageNode(ref, weight, *known[ref])

        return node(ref, 1.0, ())

    # -- publishing ---------------------------------------------------------------------------------

    def publish(
        self,
        ref: ArtifactRef,
        directory: Path,
        *,
        parents: Sequence[Parent] = (),
        recipe: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Uploads all files of a directory and makes the version visible.

        A publish that was killed leaves no visible version; the next one skips the files that are there.

        Raises:
            VersionExists: the version is published already, or another publisher was first.
            StorageError: the directory holds no file, or a name that cannot be a key; or a file is gone.
        """
        files = _files_below(Path(directory))
        staged = self.staging(ref)
        sizes = {path: local.stat().st_size for path, local in files.items()}
        parts = transfer(f"publish {ref}", sizes, lambda path: staged.upload(path, files[path]))
        # A file that an earlier publish had left may have been collected since it was found.
        if gone := staged.absent(list(parts.values())):
            raise StorageError(f"{ref} is not published: removed meanwhile: {', '.join(gone)}; try again")
        entries = {path: part.entry for path, part in parts.items()}
        return staged.finish(
            entries, parents=parents, recipe=recipe, fingerprint=fingerprint, metrics=metrics, extra=extra
        )

    def staging(self, ref: ArtifactRef) -> StagedArtifact:
        """A version that several processes fill before one of them makes it visible.

        Raises:
            VersionExists: it is published already.
        """
        if self.exists(check_ref(ref)):
            raise VersionExists(f"{ref} is already in {self.store.uri}; a version is never rewritten")
        if self.store.exists(alias_key(ref.kind, ref.name, ref.version)):
            raise VersionExists(f"{ref}: no version can be named so, for there is such an alias")
        return StagedArtifact(self.store, ref)

    # -- aliases ------------------------------------------------------------------------------------

    def alias(self, kind: Kind, name: str, alias: str) -> Alias:
        """Where an alias points, and its history.

        Raises:
            ArtifactNotFound: there is no such alias.
        """
        return read_alias(self.store, kind, name, alias)[0]

    def aliases(self, kind: Kind, name: str) -> dict[str, Alias]:
        """All aliases of a name."""
        return {alias: self.alias(kind, name, alias) for alias in alias_names(self.store, kind, name)}

    def promote(
        self, ref: ArtifactRef, alias: str, *, expected: str | None = None, by: str | None = None
    ) -> Alias:
        """Points an alias to a published version.

        Args:
            ref: the version.
            alias: such as ``production``.
            expected: refuse unless the alias points to this version now.
            by: who does it; by default user and machine.

        Raises:
            ArtifactNotFound: the version is not published.
            PreconditionFailed: the alias does not point to ``expected``.
            VersionExists: a version has the name that the alias would have.
        """
        if not self.exists(ref):
            raise ArtifactNotFound(self._not_found(ref))
        check_ref(ArtifactRef(ref.kind, ref.name, alias))
        if self.store.exists(f"{ref.kind}/{ref.name}/{alias}/manifest.json"):
            raise VersionExists(f"{ref.kind}/{ref.name} has a version {alias!r}: no alias can be named so")
        return move_alias(self.store, ref.kind, ref.name, alias, promotion(ref, alias, expected, by))

    def rollback(self, kind: Kind, name: str, alias: str, *, by: str | None = None) -> Alias:
        """Points an alias to the version before; repeated, further back.

        Raises:
            ArtifactNotFound: no such alias, no earlier version, or that version is gone.
        """
        move = rolling_back(kind, name, alias, self.exists, by)
        return move_alias(self.store, kind, name, alias, move)

    def _not_found(self, ref: ArtifactRef) -> str:
        versions = self.versions(ref.kind, ref.name)
        if not versions:
            return f"no {ref} in {self.store.uri}: nothing is published under {ref.kind}/{ref.name}"
        aliases = alias_names(self.store, ref.kind, ref.name)
        some = ", ".join([*versions[-8:], *aliases])
        return f"no {ref} in {self.store.uri}; there are: {some}"


def _files_below(directory: Path) -> dict[str, Path]:
    """All files by relative path; symbolic links to files are followed."""
    if not directory.is_dir():
        raise StorageError(f"cannot publish {directory}: not a directory")
    found = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    if not found:
        raise StorageError(f"cannot publish {directory}: it holds no files")
    for path in found:
        check_key(path)
    return found
