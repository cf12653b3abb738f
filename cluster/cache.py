"""Verified local copies of artifacts, shared by all processes of a machine.

Layout under the cache directory::

    blobs/<sha256>                                     one file per content, read-only
    artifacts/<kind>/<name>/<version>.<digest>/…       hard links to blobs; what ``pull`` returns
    building/…                                         unfinished downloads
    locks/…                                            lock files; an artifact's is also its time of last use

A blob appears under its name only after its digest has been checked, and an artifact directory only
when it is complete. A verified file is read-only and carries a fixed time stamp, so that one that was
changed since is noticed and fetched again. An artifact that a living process has pulled is never
evicted: the process holds a shared lock that the kernel releases when it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from cluster.manifest import FileEntry, Manifest
from cluster.storage.api import ObjectStore, file_sha256
from cluster.transfers import transfer
from colbert_core.errors import IntegrityError, ObjectNotFound, StorageError

# The artifacts in use by this process, whatever registry pulled them: the locks that say so, and how often
# each was pulled without being released.
_HELD: dict[Path, IO[bytes]] = {}
_PULLS: Counter[Path] = Counter()
_MUTEX = threading.Lock()
_ABANDONED_S = 24 * 3600.0
_SEALED_AT = 1_000_000_000.0
_SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class ArtifactCache:
    """Local copies below one directory.

    Args:
        directory: made at the first use.
        limit_gb: size above which the artifacts used longest ago are evicted (10^9 bytes).
    """

    def __init__(self, directory: Path, limit_gb: float) -> None:
        self.directory = directory
        self.limit_bytes = int(limit_gb * 1e9)

    def __reduce__(self) -> tuple[type[ArtifactCache], tuple[Path, float]]:
        return ArtifactCache, (self.directory, self.limit_bytes / 1e9)

    def install(self, store: ObjectStore, manifest: Manifest, paths: Sequence[str] | None = None) -> Path:
        """A complete directory with the manifest's files, or with some of them.

        Files that the cache holds are not read again, whatever version they came with.

        Raises:
            IntegrityError: an object is missing, cut short or altered; the message names its key.
            StorageError: it cannot be read, or the disk is full.
            ArtifactNotFound: ``paths`` names a file that the artifact does not have.
        """
        wanted = sorted(manifest.files) if paths is None else sorted(set(paths))
        keys = {path: manifest.key_of(path) for path in wanted}
        target = self._target(manifest, None if paths is None else wanted)
        try:
            self._hold(target)
            if self._is_complete(target, manifest, wanted):
                return target
            sizes = {manifest.files[path].sha256: manifest.files[path].size for path in wanted}
            self._drop_abandoned()
            self.evict(sum(size for digest, size in sizes.items() if not self._blob(digest).exists()))
            self._build(store, manifest, keys, target)
        except OSError as error:
            reason = "no space left" if error.errno in _SPACE_ERRORS else error.strerror or str(error)
            where = f"{manifest.ref}: cannot write to the cache {self.directory}"
            raise StorageError(f"{where}: {reason}") from None
        return target

    def release(self, directory: Path) -> None:
        """Undoes a pull; an artifact that was released as often as it was pulled may be evicted."""
        with _MUTEX:
            _PULLS[directory] -= 1
            if _PULLS[directory] <= 0:
                del _PULLS[directory]
                if (lock := _HELD.pop(directory, None)) is not None:
                    lock.close()

    @contextmanager
    def released_on_error(self, directory: Path) -> Iterator[None]:
        """Releases an artifact that was pulled for what the block makes, should it fail."""
        try:
            yield
        except BaseException:
            self.release(directory)
            raise

    def evict(self, room: int = 0) -> list[Path]:
        """Removes the artifacts used longest ago until ``room`` bytes more would fit.

        Returns:
            The directories removed. Artifacts in use stay, even if the limit is then exceeded.
        """
        removed: list[Path] = []
        if self.size() + room <= self.limit_bytes:
            return removed
        artifacts = [path for path in self.directory.glob("artifacts/*/*/*") if path.is_dir()]
        for path in sorted(artifacts, key=self._last_use):
            with self._exclusive(self._lock_path(path)) as free:
                if free and path.exists():
                    _remove_tree(path)
                    removed.append(path)
            self._drop_unused_blobs()
            if self.size() + room <= self.limit_bytes:
                break
        return removed

    def size(self) -> int:
        """Bytes of all blobs."""
        total = 0
        for path in self.directory.glob("blobs/*"):
            with suppress(FileNotFoundError):
                total += path.stat().st_size
        return total

    def _build(self, store: ObjectStore, manifest: Manifest, keys: dict[str, str], target: Path) -> None:
        building = Path(tempfile.mkdtemp(dir=self._building_directory()))

        def fetch(path: str) -> None:
            self._link_blob(store, keys[path], manifest.files[path], building / path)

        try:
            transfer(f"pull {manifest.ref}", {path: manifest.files[path].size for path in keys}, fetch)
            with self._lock(self._lock_path(target).with_suffix(".install")):
                if self._is_complete(target, manifest, list(keys)):
                    return
                if target.exists():
                    _remove_tree(target)
                target.parent.mkdir(parents=True, exist_ok=True)
                building.rename(target)
            for folder in [target, *(path for path in target.rglob("*") if path.is_dir())]:
                folder.chmod(0o555)
        finally:
            if building.exists():
                _remove_tree(building)

    def _link_blob(self, store: ObjectStore, key: str, entry: FileEntry, target: Path) -> None:
        """Links one verified blob to ``target``, downloading it first if no process has done so."""
        blob = self._blob(entry.sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(self._lock_directory() / f"{entry.sha256}.blob"):
            if not _is_sealed(blob, entry.size):
                try:
                    self._download(store, key, entry, blob)
                except IntegrityError:
                    # Damaged on the way, or in storage? The second time tells.
                    self._download(store, key, entry, blob)
            try:
                os.link(blob, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
                shutil.copyfile(blob, target)
                _seal(target)

    def _download(self, store: ObjectStore, key: str, entry: FileEntry, blob: Path) -> None:
        blob.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self._building_directory())
        os.close(descriptor)
        loading = Path(name)
        where = f"{key} in {store.uri}"
        try:
            store.download(key, loading)
            size = loading.stat().st_size
            if size != entry.size:
                raise IntegrityError(f"{where}: {size} bytes, the manifest says {entry.size}")
            if file_sha256(loading) != entry.sha256:
                raise IntegrityError(f"{where}: the content does not match its SHA-256")
            # Sealed in its place only: the old time stamp would make it look abandoned here.
            loading.replace(blob)
            _seal(blob)
        except ObjectNotFound:
            raise IntegrityError(f"{where}: the manifest names this file, but it is missing") from None
        finally:
            loading.unlink(missing_ok=True)

    def _is_complete(self, target: Path, manifest: Manifest, wanted: list[str]) -> bool:
        return all(_is_sealed(target / path, manifest.files[path].size) for path in wanted)

    def _building_directory(self) -> Path:
        """Where unfinished work lies."""
        path = self.directory / "building"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _drop_abandoned(self) -> None:
        """Removes what a process that was killed a day ago or more had not finished."""
        for left in self._building_directory().iterdir():
            with suppress(FileNotFoundError):
                if left.stat().st_mtime < time.time() - _ABANDONED_S:
                    _remove_tree(left)

    def _target(self, manifest: Manifest, some: list[str] | None) -> Path:
        # The digest keeps versions of the same name from two storages apart.
        digest = hashlib.sha256(manifest.to_bytes()).hexdigest()[:12]
        if some is not None:
            digest += "-" + hashlib.sha256("\n".join(some).encode()).hexdigest()[:12]
        ref = manifest.ref
        return self.directory / "artifacts" / ref.kind / ref.name / f"{ref.version}.{digest}"

    def _blob(self, digest: str) -> Path:
        return self.directory / "blobs" / digest

    def _lock_directory(self) -> Path:
        path = self.directory / "locks"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def _lock_path(self, artifact: Path) -> Path:
        name = hashlib.sha256(str(artifact.relative_to(self.directory)).encode()).hexdigest()[:24]
        return self._lock_directory() / f"{name}.use"

    def _hold(self, artifact: Path) -> None:
        """Marks an artifact as in use by this process, and as used now."""
        path = self._lock_path(artifact)
        with _MUTEX:
            if artifact not in _HELD:
                stream = path.open("ab")
                fcntl.flock(stream, fcntl.LOCK_SH)
                _HELD[artifact] = stream
            _PULLS[artifact] += 1
        os.utime(path)

    def _last_use(self, artifact: Path) -> float:
        try:
            return self._lock_path(artifact).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    @contextmanager
    def _lock(self, path: Path) -> Iterator[None]:
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _exclusive(self, path: Path) -> Iterator[bool]:
        """Tries to get a lock alone, without waiting; says whether it did."""
        with path.open("ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def _drop_unused_blobs(self) -> None:
        """Removes blobs that no artifact links to."""
        for blob in self.directory.glob("blobs/*"):
            with (
                self._exclusive(self._lock_directory() / f"{blob.name}.blob") as free,
                suppress(FileNotFoundError),
            ):
                if free and blob.stat().st_nlink == 1:
                    blob.unlink()


def _seal(path: Path) -> None:
    """Marks a verified file read-only and with a fixed time stamp: a later write to it shows."""
    path.chmod(0o444)
    os.utime(path, (_SEALED_AT, _SEALED_AT))


def _is_sealed(path: Path, size: int) -> bool:
    """Whether the file is there as it was verified."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size and status.st_mtime == _SEALED_AT


def _remove_tree(path: Path) -> None:
    if path.is_dir():
        for folder in [path, *(below for below in path.rglob("*") if below.is_dir())]:
            folder.chmod(stat.S_IRWXU)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
