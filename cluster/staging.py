"""A version on its way: files that several processes upload before one of them makes it visible."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import ValidationError

from cluster.artifacts import ArtifactRef
from cluster.manifest import FileEntry, Manifest, Parent, Part, manifest_key, seal, unseal
from cluster.storage import ObjectStore, check_key
from colbert_core.errors import (
    IntegrityError,
    ObjectNotFound,
    PreconditionFailed,
    StorageError,
    VersionExists,
)

_THREADS = 8
_FRESH = timedelta(hours=1)


class StagedArtifact:
    """A version on its way: files are uploaded, nothing is visible yet.

    It can be pickled and used by several processes at once. A finished upload leaves a small record, so
    that a restarted build asks :meth:`parts` and skips what is done.
    """

    def __init__(self, store: ObjectStore, ref: ArtifactRef) -> None:
        self.store = store
        self.ref = ref

    def begin(self, data: str) -> bool:
        """Notes what the files are made of; the records of files of anything else are removed.

        Args:
            data: fingerprint of the input that the version's name does not cover.

        Returns:
            Whether what is recorded was made of the same.
        """
        key = f"{self._parts_prefix()}data"
        try:
            known = self.store.get(key) == data.encode()
        except ObjectNotFound:
            known = False
        if not known:
            for info in list(self.store.list(self._parts_prefix())):
                if info.key.endswith(".json"):
                    self.store.delete(info.key)
            self.store.put(key, data.encode())
        return known

    def upload(self, path: str, local: Path, *, keep_existing: bool = False) -> Part:
        """Uploads a file, unless it is there with the same content, and records it.

        Args:
            path: relative path in the artifact.
            local: the file.
            keep_existing: if another file is recorded under this path, leave it and return its record:
                the first of several builders decides, and the others must go on with its content.

        Returns:
            The record that stands; ``part.entry.sha256`` tells whose content it is.
        """
        check_key(path)
        store, local = self.store, Path(local)
        try:
            entry = FileEntry.of(local)
        except OSError as error:
            raise StorageError(f"{self.ref}: cannot read {local}: {error.strerror}") from None
        recorded = self._part(path)
        stands = recorded is not None and (keep_existing or recorded.entry.sha256 == entry.sha256)
        if recorded is not None and stands and self._is_there(recorded):
            self._refresh(recorded)
            return recorded
        key = self._claim(path, entry.sha256)
        store.upload(self.ref.prefix + key, local)
        if key != f"files/{path}":
            entry = entry.model_copy(update={"key": key})
        part = Part(path=path, entry=entry)
        data = seal(part.model_dump(mode="json"))
        if keep_existing and recorded is None:
            try:
                store.put(self._record_key(path, "json"), data, if_absent=True)
            except PreconditionFailed:
                standing = self._part(path)
                if standing is not None:
                    return standing
                raise
        else:
            store.put(self._record_key(path, "json"), data)
        return part

    def parts(self) -> dict[str, Part]:
        """The finished files by path, as far as all processes have come."""
        prefix = self._parts_prefix()
        with ThreadPoolExecutor(_THREADS) as pool:
            keys = [info.key for info in self.store.list(prefix) if info.key.endswith(".json")]
            parts = list(pool.map(self._read_part, keys))
        return {part.path: part for part in parts if part is not None}

    def absent(self, parts: Sequence[Part]) -> list[str]:
        """Paths of those of the recorded files that are not in storage at their full size."""
        with ThreadPoolExecutor(_THREADS) as pool:
            there = list(pool.map(self._is_there, parts))
        return [part.path for part, found in zip(parts, there, strict=True) if not found]

    def commit(
        self,
        *,
        expected: Sequence[str] | None = None,
        parents: Sequence[Parent] = (),
        recipe: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Gathers the finished files and makes the version visible.

        Args:
            expected: exactly these paths make up the artifact; a finished file that is not among them is
                left out. By default all finished files.
            parents, recipe, fingerprint, metrics, extra: go to the manifest.

        Raises:
            StorageError: an expected file is not finished, or is gone; nothing is made visible.
            VersionExists: another publisher was first.
        """
        parts = self.parts()
        wanted = sorted(parts) if expected is None else sorted(set(expected))
        missing = [path for path in wanted if path not in parts]
        missing += self.absent([parts[path] for path in wanted if path in parts])
        if missing or not wanted:
            if self.store.exists(manifest_key(self.ref)):
                raise VersionExists(f"{self.ref} is already in {self.store.uri}")
            some = ", ".join(missing[:8]) or "it has no files at all"
            raise StorageError(f"{self.ref} is not published: {len(missing)} files are not uploaded: {some}")
        entries = {path: parts[path].entry for path in wanted}
        return self.finish(
            entries, parents=parents, recipe=recipe, fingerprint=fingerprint, metrics=metrics, extra=extra
        )

    def finish(
        self,
        entries: Mapping[str, FileEntry],
        *,
        parents: Sequence[Parent],
        recipe: Mapping[str, Any] | None,
        fingerprint: str | None,
        metrics: Mapping[str, Any] | None,
        extra: Mapping[str, Any] | None,
    ) -> Manifest:
        """Writes the manifest over uploaded files; :meth:`commit` checks them first."""
        try:
            manifest = Manifest(
                kind=self.ref.kind,
                name=self.ref.name,
                version=self.ref.version,
                files=dict(entries),
                parents=tuple(parents),
                recipe=dict(recipe) if recipe is not None else None,
                data_fingerprint=fingerprint,
                metrics=dict(metrics or {}),
                extra=dict(extra or {}),
            )
            data = manifest.to_bytes()
        except ValueError as error:
            raise StorageError(f"{self.ref}: the manifest would not be valid: {error}") from None
        store = self.store
        try:
            store.put(manifest_key(self.ref), data, if_absent=True)
        except PreconditionFailed:
            raise VersionExists(f"{self.ref} was published by another meanwhile, in {store.uri}") from None
        self._forget_parts()
        return manifest

    def _refresh(self, part: Part) -> None:
        """Writes an old record again: a build that goes on must not look abandoned to the collection."""
        if datetime.now(timezone.utc) - part.at > _FRESH:
            renewed = part.model_copy(update={"at": datetime.now(timezone.utc)})
            self.store.put(self._record_key(part.path, "json"), seal(renewed.model_dump(mode="json")))

    def _claim(self, path: str, digest: str) -> str:
        """The place of a file's content, which nobody writes other content to.

        The first content of a path gets the natural place, other content one that its digest names. The
        claim is a small object, for put-if-absent is atomic on every server for those, and it tells a
        resumed upload whose the natural place is. Claims go when the manifest is there, so that a claim
        newly made is only good if there still is none.
        """
        natural, beside = f"files/{path}", f"variants/{digest}/{path}"
        claim = self._record_key(path, "claim")
        try:
            self.store.put(claim, digest.encode(), if_absent=True)
        except PreconditionFailed:
            try:
                return natural if self.store.get(claim) == digest.encode() else beside
            except ObjectNotFound:
                return beside
        if self.store.exists(manifest_key(self.ref)):
            raise VersionExists(f"{self.ref} was published by another meanwhile, in {self.store.uri}")
        return natural

    def _is_there(self, part: Part) -> bool:
        try:
            key = self.ref.prefix + (part.entry.key or f"files/{part.path}")
            return self.store.head(key).size == part.entry.size
        except ObjectNotFound:
            return False

    def _part(self, path: str) -> Part | None:
        return self._read_part(self._record_key(path, "json"))

    def _read_part(self, key: str) -> Part | None:
        try:
            return Part.model_validate(unseal(self.store.get(key), key))
        except ObjectNotFound:
            return None
        except ValidationError as error:
            raise IntegrityError(f"{key}: not a valid part record: {error}") from None

    def _forget_parts(self) -> None:
        """The manifest has replaced the records; what cannot be deleted now is left to the collection."""
        store = self.store
        try:
            for info in list(store.list(self._parts_prefix())):
                store.delete(info.key)
        except StorageError:
            return

    def _parts_prefix(self) -> str:
        return f"{self.ref.prefix}.parts/"

    def _record_key(self, path: str, kind: str) -> str:
        escaped = quote(path, safe="")
        name = escaped if len(escaped) <= 200 else hashlib.sha256(path.encode()).hexdigest()
        return f"{self._parts_prefix()}{name}.{kind}"
