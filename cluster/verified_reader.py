"""Reading parts of a published file, every byte checked, without a local copy."""

from __future__ import annotations

import hashlib
import io
from typing import Any

from cluster.manifest import BLOCK_BYTES, FileEntry
from cluster.storage import ObjectStore
from colbert_core.errors import IntegrityError, ObjectNotFound


class VerifiedReader(io.RawIOBase):
    """A seekable reader that fetches whole blocks and compares each with its digest in the manifest.

    It holds one block (8 MiB) in memory; reading front to back fetches every block once.

    Args:
        store: where the file lies.
        key: its storage key.
        entry: its record in the manifest; a file larger than one block needs block digests.
    """

    def __init__(self, store: ObjectStore, key: str, entry: FileEntry) -> None:
        super().__init__()
        self._store = store
        self._key = key
        self._entry = entry
        self._digests = entry.blocks or (entry.sha256,)
        self._position = 0
        self._number = -1
        self._block = b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._entry.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}, before the start of {self._key!r}")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        if self._position >= self._entry.size:
            return 0
        number, inside = divmod(self._position, BLOCK_BYTES)
        if number != self._number:
            self._block, self._number = self._fetch(number), number
        data = self._block[inside : inside + len(buffer)]
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        size = min(BLOCK_BYTES, self._entry.size - start)
        where = f"{self._key} in {self._store.uri}"
        try:
            # Damaged on the way, or in storage? The second time tells.
            for _ in range(2):
                data = self._store.get_range(self._key, start, size)
                if len(data) == size and hashlib.sha256(data).hexdigest() == self._digests[number]:
                    return data
        except ObjectNotFound:
            raise IntegrityError(f"{where}: the manifest names this file, but it is missing") from None
        raise IntegrityError(f"{where}: bytes {start} to {start + size} do not match their SHA-256")
