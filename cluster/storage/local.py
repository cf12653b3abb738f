"""Storage in a local (or network-mounted) directory, with the semantics of an object store.

Every write goes to a file of its own first and is then linked or renamed to its place, so that readers
see the old object or the new one. Put-if-absent is a hard link, which the file system makes at most
once; compare-and-swap runs under a lock file, which works between processes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, cast

from pyarrow.fs import FileSystem, LocalFileSystem

from cluster.config import StorageConfig
from cluster.storage.api import RESERVED, ObjectInfo, ObjectStore, check_key, check_prefix, check_range
from colbert_core.errors import ConfigError, ObjectNotFound, PreconditionFailed, StorageError

_TRIES = 100


class LocalStore(ObjectStore):
    """Objects as plain files under a directory, which is made at the first write.

    Raises:
        ConfigError: there is something else than a directory.
    """

    def __init__(self, config: StorageConfig, root: str) -> None:
        super().__init__(config)
        self.root = Path(root).expanduser().absolute()
        if self.root.exists() and not self.root.is_dir():
            raise ConfigError(f"storage.root {self.root}: a file, not a directory")

    @property
    def uri(self) -> str:
        return str(self.root)

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        with self._reading("get", key) as stream:
            return stream.read(), _etag(os.fstat(stream.fileno()))

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        with self._reading("get_range", key) as stream:
            stream.seek(start)
            return stream.read(length)

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        check_range(start, len(buffer))
        with self._reading("read_into", key) as stream:
            stream.seek(start)
            return cast(io.BufferedReader, stream).readinto(buffer)

    def open(self, key: str) -> BinaryIO:
        with self._explained("open", key):
            path = self._path(key)
            if path.is_dir():
                raise FileNotFoundError
            return path.open("rb")

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        def fill(target: BinaryIO) -> None:
            target.write(data)

        return self._write("put", key, fill, if_absent=if_absent, if_match=if_match)

    def upload(self, key: str, path: Path, *, if_absent: bool = False) -> str:
        def fill(target: BinaryIO) -> None:
            with Path(path).open("rb") as source:
                shutil.copyfileobj(source, target, 1 << 20)

        if not Path(path).is_file():
            raise StorageError(f"upload to {key!r}: {path} is not a file")
        return self._write("upload", key, fill, if_absent=if_absent, if_match=None)

    def head(self, key: str) -> ObjectInfo:
        with self._explained("head", key):
            path = self._path(key)
            status = path.stat()
            if path.is_dir():
                raise FileNotFoundError
            return _info(key, status)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        folder = prefix.rpartition("/")[0]
        yield from self._walk(self.root / folder, f"{folder}/" if folder else "", prefix)

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        check_prefix(prefix)
        with self._explained("list", prefix):
            try:
                entries = list(os.scandir(self.root / prefix))
            except (FileNotFoundError, NotADirectoryError):
                return []
            names = (entry.name for entry in entries if entry.is_dir() and entry.name != RESERVED)
            filled = (name for name in names if next(self.list(f"{prefix}{name}/"), None) is not None)
            return sorted(filled, key=str.encode)

    def delete(self, key: str) -> None:
        with self._explained("delete", key):
            path = self._path(key)
            if path.is_dir():
                return
            path.unlink(missing_ok=True)
            for parent in path.parents:
                if parent == self.root:
                    break
                try:
                    parent.rmdir()
                except OSError:
                    break

    def abort_uploads(self, older_than: datetime, *, dry_run: bool = False) -> Sequence[str]:
        stale = []
        for path in sorted((self.root / RESERVED / "writing").glob("*")):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < older_than.timestamp():
                    stale.append(path.name)
                    if not dry_run:
                        path.unlink()
        return stale

    def arrow(self) -> tuple[FileSystem, str]:
        return LocalFileSystem(), str(self.root)

    def _path(self, key: str) -> Path:
        return self.root / check_key(key)

    @contextmanager
    def _reading(self, operation: str, key: str) -> Iterator[BinaryIO]:
        with self._explained(operation, key), self.open(key) as stream:
            yield stream

    def _write(
        self,
        operation: str,
        key: str,
        fill: Callable[[BinaryIO], None],
        *,
        if_absent: bool,
        if_match: str | None,
    ) -> str:
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        with self._explained(operation, key):
            target = self._path(key)
            if if_absent and target.is_file():
                raise FileExistsError
            writing = self.root / RESERVED / "writing"
            writing.mkdir(parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=writing)
            temporary = Path(name)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    fill(stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                    # The kernel's own time stamps are too coarse to tell two quick writes apart.
                    os.utime(stream.fileno(), ns=(time.time_ns(),) * 2)
                    temporary.chmod(0o644)
                    etag = _etag(os.fstat(stream.fileno()))
                if if_match is not None:
                    with self._lock(key):
                        self._require(key, if_match)
                        _place(temporary, target, exclusive=False)
                elif if_absent:
                    _place(temporary, target, exclusive=True)
                else:
                    # Under the lock as well: a plain write must not slip between a compare and its swap.
                    with self._lock(key):
                        _place(temporary, target, exclusive=False)
                return etag
            finally:
                temporary.unlink(missing_ok=True)

    def _require(self, key: str, etag: str) -> None:
        try:
            current = self.head(key).etag
        except ObjectNotFound:
            raise PreconditionFailed(f"put of {key!r} in {self.uri}: the object to replace is gone") from None
        if current != etag:
            raise PreconditionFailed(
                f"put of {key!r} in {self.uri}: the object has changed since it was read"
            )

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        locks = self.root / RESERVED / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        # A bounded set of lock files serves all keys; two keys on one file only wait for each other.
        name = hashlib.sha256(key.encode()).hexdigest()[:2]
        with (locks / name).open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _walk(self, directory: Path, base: str, prefix: str) -> Iterator[ObjectInfo]:
        with self._explained("list", prefix):
            try:
                entries = [(entry, entry.is_dir()) for entry in os.scandir(directory)]
            except (FileNotFoundError, NotADirectoryError):
                return
        # A folder sorts as its name with a slash: this is the byte order of the whole keys.
        entries.sort(key=lambda pair: (pair[0].name + "/" * pair[1]).encode())
        for entry, is_folder in entries:
            key = base + entry.name
            if is_folder:
                if key != RESERVED and (f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/")):
                    yield from self._walk(Path(entry.path), f"{key}/", prefix)
            elif key.startswith(prefix):
                with suppress(FileNotFoundError):
                    yield _info(key, entry.stat())

    @contextmanager
    def _explained(self, operation: str, key: str) -> Iterator[None]:
        """Turns operating system errors into typed ones that name operation, key and root."""
        where = f"{operation} of {key!r} in {self.uri}"
        try:
            yield
        except (FileNotFoundError, NotADirectoryError):
            raise ObjectNotFound(f"{where}: no such object") from None
        except FileExistsError:
            raise PreconditionFailed(f"{where}: the object exists already") from None
        except IsADirectoryError:
            raise StorageError(f"{where}: other objects lie below this key") from None
        except PermissionError as error:
            raise StorageError(f"{where}: permission denied ({error.filename})") from None
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            reason = "no space left" if full else (error.strerror or str(error))
            raise StorageError(f"{where}: {reason}") from None


def _place(temporary: Path, target: Path, *, exclusive: bool) -> None:
    """Moves a finished file to its place; ``exclusive`` fails with FileExistsError if it is taken."""
    # A concurrent delete may remove a folder that it has emptied between any two of these lines.
    for _ in range(_TRIES):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError:
            continue
        except (FileExistsError, NotADirectoryError):
            if any(parent.is_file() for parent in target.parents):
                raise StorageError(f"cannot write {target}: another object lies above this key") from None
            continue
        if target.is_dir():
            try:
                target.rmdir()
            except FileNotFoundError:
                continue
            except OSError:
                raise IsADirectoryError from None
        try:
            if exclusive:
                os.link(temporary, target)
            else:
                temporary.replace(target)
            return
        except FileNotFoundError:
            continue
    raise StorageError(f"cannot write {target}: {_TRIES} times its folder was removed by others")


def _etag(status: os.stat_result) -> str:
    """Every write makes a new file, so inode and time tell two writes apart without reading the content."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    modified = datetime.fromtimestamp(status.st_mtime, tz=timezone.utc)
    return ObjectInfo(key, status.st_size, _etag(status), modified)
