"""Reading parts of a published file, every byte checked, without a local copy."""

from __future__ import annotations

from typing import Any

from cluster.manifest import BLOCK_BYTES, FileEntry
from cluster.storage import ObjectStore
from cluster.storage.positioned import PositionedReader
from colbert_core.errors import IntegrityError, ObjectNotFound


class VerifiedReader(PositionedReader):
    """A seekable reader that fetches whole blocks and compares each with its digest in the manifest.

    It holds one block (8 MiB) in memory; reading front to back fetches every block once.

    Args:
        store: where the file lies.
        key: its storage key.
        entry: its record in the manifest; a file larger than one block needs block digests.
    """

    def __init__(self, store: ObjectStore, key: str, entry: FileEntry) -> None:
        super().__init__(key, entry.size)
        self._store = store
        self._entry = entry
        self._number = -1
        self._block = bytearray()

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

    def _fetch(self, number: int) -> bytearray:
        block = bytearray(block_length(self._entry, number))
        read_block(self._store, self._key, self._entry, number, memoryview(block))
        return block


def block_length(entry: FileEntry, number: int) -> int:
    """Bytes of a file's block; all but the last have the same."""
    return min(BLOCK_BYTES, entry.size - number * BLOCK_BYTES)


def read_block(store: ObjectStore, key: str, entry: FileEntry, number: int, buffer: memoryview) -> None:
    """Fills a buffer with one block of a published file, checked.

    Args:
        store: where the file lies.
        key: its storage key.
        entry: its record in the manifest, with digests of its blocks if it has more than one.
        number: of the block, from 0.
        buffer: as long as the block.

    Raises:
        IntegrityError: the file is missing, or these are not the bytes that were published.
        StorageError: they cannot be read.
    """
    where = f"{key} in {store.uri}"
    start, digests = number * BLOCK_BYTES, entry.blocks or (entry.sha256,)
    try:
        # Damaged on the way, or in storage? The second time tells.
        for _ in range(2):
            filled, digest = store.read_hashed(key, start, buffer)
            if filled == len(buffer) and digest == digests[number]:
                return
    except ObjectNotFound:
        raise IntegrityError(f"{where}: the manifest names this file, but it is missing") from None
    raise IntegrityError(f"{where}: bytes {start} to {start + len(buffer)} do not match their SHA-256")
