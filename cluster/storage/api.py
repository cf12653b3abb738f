"""The storage interface: what every backend does, and what a key may look like."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from pyarrow.fs import FileSystem

from cluster.config import StorageConfig
from colbert_core.errors import ObjectNotFound, StorageError

READ_CHUNK = 1 << 20
RESERVED = ".store"
"""First key segment that the local backend keeps its locks and unfinished writes under."""

_LARGE_BYTES = 64 << 20
_PART_BYTES = 8 << 20
_PARTS_AT_ONCE = 8
# Bounds the memory of all downloads of the process together: each part in flight is held whole.
_PART_SLOTS = threading.BoundedSemaphore(_PARTS_AT_ONCE)
_MAX_KEY_BYTES = 900
_MAX_SEGMENT_BYTES = 240


@dataclass(frozen=True)
class ObjectInfo:
    """One object as a listing shows it.

    Attributes:
        key: the key, relative to the store's root.
        size: bytes.
        etag: changes with every write of other content; only to be compared for equality.
        modified: time of the last write, timezone-aware.
    """

    key: str
    size: int
    etag: str
    modified: datetime


class ObjectStore(ABC):
    """Objects under a root, addressed by '/'-joined relative keys.

    A store holds no state but its configuration and connections; it can be pickled, and is opened
    again on the other side with the credentials found there.

    All methods raise :class:`~colbert_core.errors.StorageError` with the operation and the key when
    the storage is unreachable, refuses access, or a key is malformed.
    """

    def __init__(self, config: StorageConfig) -> None:
        self.config = config

    def __reduce__(self) -> tuple[object, tuple[StorageConfig]]:
        from cluster.storage import open_store

        return open_store, (self.config,)

    @property
    @abstractmethod
    def uri(self) -> str:
        """The root, for messages; it never holds credentials."""

    def get(self, key: str) -> bytes:
        """The whole object.

        Raises:
            ObjectNotFound: there is none.
        """
        return self.get_with_etag(key)[0]

    @abstractmethod
    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        """The whole object and the etag of just these bytes, to be given to ``put(if_match=)``."""

    @abstractmethod
    def get_range(self, key: str, start: int, length: int) -> bytes:
        """At most ``length`` bytes from offset ``start``; fewer at the end, none beyond it.

        Raises:
            ValueError: ``start`` or ``length`` is negative.
            ObjectNotFound: there is no such object.
        """

    @abstractmethod
    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        """Fills a buffer with the bytes from offset ``start`` on.

        Returns:
            How many there were; fewer than the buffer holds at the end of the object, 0 beyond it.

        Raises:
            ValueError: ``start`` is negative.
            ObjectNotFound: there is no such object.
        """

    def read_hashed(self, key: str, start: int, buffer: memoryview) -> tuple[int, str]:
        """As :meth:`read_into`; returns also the hex SHA-256 of the bytes that there were."""
        count = self.read_into(key, start, buffer)
        return count, hashlib.sha256(buffer[:count]).hexdigest()

    @abstractmethod
    def open(self, key: str) -> BinaryIO:
        """A buffered, seekable reader. It reads one object even if the key is overwritten meanwhile,
        or fails with StorageError; it never returns a mixture.
        """

    def download(self, key: str, path: Path) -> None:
        """Writes an object's content to a local file, large ones in parallel parts.

        The object must not change meanwhile; whoever needs the right bytes compares a digest afterwards.

        Raises:
            ObjectNotFound: there is no such object.
            OSError: the file cannot be written.
        """
        size = self.head(key).size
        if size <= _LARGE_BYTES:
            with self.open(key) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, READ_CHUNK)
            return

        with path.open("wb") as target:
            target.truncate(size)

            def fetch(start: int) -> None:
                with _PART_SLOTS:
                    data = self.get_range(key, start, _PART_BYTES)
                    written = 0
                    while written < len(data):
                        written += os.pwrite(target.fileno(), data[written:], start + written)

            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                for _ in pool.map(fetch, range(0, size, _PART_BYTES)):
                    pass

    @abstractmethod
    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        """Writes an object atomically.

        Args:
            key: where.
            data: the content.
            if_absent: write only if no object is there.
            if_match: write only over the object with this etag.

        Returns:
            The etag of what was written.

        Raises:
            PreconditionFailed: the condition does not hold; nothing was written.
        """

    @abstractmethod
    def upload(self, key: str, path: Path, *, if_absent: bool = False) -> str:
        """Writes a file's content atomically, in parallel parts, without holding it in memory.

        Returns and raises as :meth:`put`.
        """

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size, etag and time.

        Raises:
            ObjectNotFound: there is no such object.
        """

    def exists(self, key: str) -> bool:
        """Whether there is an object under this key."""
        try:
            self.head(key)
        except ObjectNotFound:
            return False
        return True

    @abstractmethod
    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """All objects whose key starts with ``prefix`` (any string), in byte order of their keys."""

    @abstractmethod
    def list_folders(self, prefix: str = "") -> Sequence[str]:
        """The next segments below ``prefix`` ('' or ending in '/') that have objects below them."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes an object; a missing one is no error."""

    @abstractmethod
    def abort_uploads(self, older_than: datetime, *, dry_run: bool = False) -> Sequence[str]:
        """Drops uploads that were begun before ``older_than`` and never finished; returns their keys."""

    @abstractmethod
    def arrow(self) -> tuple[FileSystem, str]:
        """A pyarrow filesystem and the root's path in it, for Ray Data and Ray Train."""

    def sha256(self, key: str) -> str:
        """Hex SHA-256 of an object, streamed."""
        with self.open(key) as stream:
            return _digest_of(stream)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a local file, streamed."""
    with path.open("rb") as stream:
        return _digest_of(stream)


def _digest_of(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(READ_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()


def check_key(key: str) -> str:
    """Returns ``key`` if it may name an object on every backend.

    Raises:
        StorageError: it is empty, absolute, too long, or has an empty, '.', '..' or reserved segment.
    """
    if not key:
        raise StorageError("an object key must not be empty")
    return _check_segments(key, key.split("/"))


def check_prefix(prefix: str) -> str:
    """Returns ``prefix`` if keys can start with it; its last segment may be empty or unfinished.

    Raises:
        StorageError: as :func:`check_key`.
    """
    *whole, last = prefix.split("/")
    _check_segments(prefix, [*whole, last] if last else whole)
    return prefix


def _check_segments(key: str, segments: list[str]) -> str:
    if any(segment in ("", ".", "..") for segment in segments):
        raise StorageError(f"bad key {key!r}: a key is relative, without empty, '.' or '..' segments")
    if any(ord(char) < 32 or char in "\\\x7f" for char in key):
        raise StorageError(f"bad key {key!r}: control characters and backslashes are not allowed")
    if segments and segments[0] == RESERVED:
        raise StorageError(f"bad key {key!r}: {RESERVED!r} is reserved")
    if len(key.encode()) > _MAX_KEY_BYTES or any(len(s.encode()) > _MAX_SEGMENT_BYTES for s in segments):
        raise StorageError(
            f"bad key {key[:80]!r}…: at most {_MAX_KEY_BYTES} bytes, and {_MAX_SEGMENT_BYTES} in one segment"
        )
    return key


def check_range(start: int, length: int) -> None:
    """Raises ValueError for a negative offset or length."""
    if start < 0 or length < 0:
        raise ValueError(f"a range has start and length >= 0, not {start} and {length}")
