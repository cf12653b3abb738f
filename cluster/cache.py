"""Verified local copies of artifacts, shared by all processes of a machine.

Layout under the cache directory::

    blobs/<sha256>                                     one file per content, read-only
    artifacts/<kind>/<name>/<version>.<digest>/…       hard links to blobs; what ``pull`` returns
    locks/…                                            lock files; an artifact's is also its time of last use

A blob appears under its name only after its digest has been checked, and an artifact directory only
when it is complete. An artifact that a living process has pulled is never evicted: the process holds a
shared lock that the kernel releases when it ends.
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import Progress

from cluster.manifest import FileEntry, Manifest
from cluster.storage.api import READ_CHUNK, ObjectStore, file_sha256
from colbert_core.errors import IntegrityError, ObjectNotFound, StorageError

_THREADS = 8
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
        self._held: dict[Path, IO[bytes]] = {}
        self._mutex = threading.Lock()

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
            missing = {manifest.files[path].sha256: manifest.files[path].size for path in wanted}
            needed = sum(size for digest, size in missing.items() if not self._blob(digest).exists())
            self.evict(needed)
            self._build(store, manifest, keys, target)
        except OSError as error:
            reason = "no space left" if error.errno in _SPACE_ERRORS else error.strerror or str(error)
            raise StorageError(
                f"{manifest.ref}: cannot write to the cache {self.directory}: {reason}"
            ) from None
        return target

    def release(self, directory: Path) -> None:
        """Lets go of an artifact that this process has pulled: it may be evicted from now on."""
        with self._mutex:
            lock = self._held.pop(directory, None)
        if lock is not None:
            lock.close()

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
        target.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
        quiet = not Console(stderr=True).is_terminal
        try:
            with (
                Progress(console=Console(stderr=True), transient=True, disable=quiet) as progress,
                ThreadPoolExecutor(_THREADS) as pool,
            ):
                task = progress.add_task(
                    f"pull {manifest.ref}", total=sum(manifest.files[p].size for p in keys)
                )

                def fetch(path: str) -> None:
                    entry = manifest.files[path]
                    self._link_blob(store, keys[path], entry, building / path)
                    progress.advance(task, entry.size)

                futures = [pool.submit(fetch, path) for path in keys]
                try:
                    for future in futures:
                        future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            for folder in [building, *(path for path in building.rglob("*") if path.is_dir())]:
                folder.chmod(0o555)
            with self._lock(self._lock_path(target).with_suffix(".install")):
                if target.exists():
                    _remove_tree(target)
                # A folder's own write bit is needed to move it below another parent on some systems only.
                building.rename(target)
        finally:
            if building.exists():
                _remove_tree(building)

    def _link_blob(self, store: ObjectStore, key: str, entry: FileEntry, target: Path) -> None:
        """Links one verified blob to ``target``, downloading it first if no process has done so."""
        blob = self._blob(entry.sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._lock(self._lock_directory() / f"{entry.sha256}.blob"):
            if not blob.exists() or blob.stat().st_size != entry.size:
                self._download(store, key, entry, blob)
            try:
                os.link(blob, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
                shutil.copyfile(blob, target)
                target.chmod(0o444)

    def _download(self, store: ObjectStore, key: str, entry: FileEntry, blob: Path) -> None:
        blob.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=blob.parent, prefix=".loading-")
        loading, digest, size = Path(name), hashlib.sha256(), 0
        try:
            with os.fdopen(descriptor, "wb") as target, store.open(key) as source:
                while chunk := source.read(READ_CHUNK):
                    size += len(chunk)
                    digest.update(chunk)
                    target.write(chunk)
            if size != entry.size:
                raise IntegrityError(f"{key} in {store.uri}: {size} bytes, the manifest says {entry.size}")
            if digest.hexdigest() != entry.sha256:
                raise IntegrityError(f"{key} in {store.uri}: the content does not match its SHA-256")
            loading.chmod(0o444)
            loading.replace(blob)
        except ObjectNotFound:
            raise IntegrityError(
                f"{key} in {store.uri}: the manifest names this file, but it is missing"
            ) from None
        finally:
            loading.unlink(missing_ok=True)

    def _is_complete(self, target: Path, manifest: Manifest, wanted: list[str]) -> bool:
        try:
            return all((target / path).stat().st_size == manifest.files[path].size for path in wanted)
        except (FileNotFoundError, NotADirectoryError):
            return False

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
        with self._mutex:
            if artifact not in self._held:
                stream = path.open("ab")
                fcntl.flock(stream, fcntl.LOCK_SH)
                self._held[artifact] = stream
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


def verify_directory(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a pulled directory: paths that are missing or whose content differs."""
    wrong = []
    for path, entry in manifest.files.items():
        local = directory / path
        if not local.is_file():
            wrong.append(f"{local}: missing")
        elif local.stat().st_size != entry.size or file_sha256(local) != entry.sha256:
            wrong.append(f"{local}: the content does not match its SHA-256")
    return wrong


def _remove_tree(path: Path) -> None:
    for folder in [path, *path.rglob("*")]:
        if folder.is_dir():
            folder.chmod(stat.S_IRWXU)
    shutil.rmtree(path)
