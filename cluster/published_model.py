"""Published models read in ranges straight from storage, every byte checked, without a local copy."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

from cluster.artifacts import ArtifactRef
from cluster.manifest import BLOCK_BYTES, FileEntry
from cluster.registry import Registry
from cluster.storage import ObjectStore
from cluster.verified_reader import block_length, read_block
from colbert_core.errors import IntegrityError
from colbert_core.model_files import LocalFile, RangedFile

# Blocks of which the rest is about to be wanted: reads that begin or end inside a block share it. With as
# many inputs, a mean fetches every block once; with more, those with headers twice.
_KEPT_BLOCKS = 10


def published_models(registry: Registry, refs: Sequence[ArtifactRef]) -> list[dict[str, RangedFile]]:
    """The files of published models, each by path; nothing but the manifests is read yet.

    Large files from before manifests had digests of blocks can only be checked as a whole: these are
    pulled.

    Args:
        registry: where they are published.
        refs: models that are read together; the blocks that they keep in memory are bounded together.

    Raises:
        ArtifactNotFound: one is not published.
        IntegrityError: a manifest, or a file that is pulled, is damaged.
    """
    kept = KeptBlocks()
    return [_files(registry, ref, kept) for ref in refs]


def _files(registry: Registry, ref: ArtifactRef, kept: KeptBlocks) -> dict[str, RangedFile]:
    manifest = registry.manifest(ref)
    files: dict[str, RangedFile] = {}
    for path, entry in manifest.files.items():
        if entry.size > BLOCK_BYTES and not entry.blocks:
            files[path] = LocalFile(Path(registry.pull(ref, paths=[path])) / path)
        else:
            files[path] = PublishedFile(f"{ref}/{path}", registry.store, manifest.key_of(path), entry, kept)
    return files


class KeptBlocks:
    """A few blocks that were read in part; the rest of one is wanted soon, and only once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[tuple[str, int], Future[bytearray]] = {}
        self._left: dict[tuple[str, int], int] = {}

    def __reduce__(self) -> tuple[type[KeptBlocks], tuple[()]]:
        return KeptBlocks, ()

    def get(
        self, key: str, number: int, length: int, wanted: int, fetch: Callable[[], bytearray]
    ) -> bytearray:
        """A block, fetched unless it is kept or another thread is about to fetch it.

        Args:
            key: of the file.
            number: of the block.
            length: of the block, in bytes.
            wanted: how many of them are wanted now. In whatever order its parts are asked for, the block
                is let go with the last.
            fetch: reads it.
        """
        place = key, number
        with self._lock:
            found = self._blocks.pop(place, None)
            block: Future[bytearray] = found or Future()
            left = self._left.pop(place, length) - wanted
            if left > 0:
                self._left[place] = left
                self._blocks[place] = block
                while len(self._blocks) > _KEPT_BLOCKS:
                    del self._blocks[next(iter(self._blocks))]
        if found is None:
            try:
                block.set_result(fetch())
            except BaseException as error:
                with self._lock:
                    self._blocks.pop(place, None)
                block.set_exception(error)
                raise
        return block.result()


class PublishedFile:
    """One file of a published model, see :class:`~colbert_core.model_files.RangedFile`; can be pickled.

    Args:
        name: for messages.
        store: where it lies.
        key: its storage key.
        entry: its record in the manifest; a file larger than a block needs digests of its blocks.
        kept: shared by the files that are read together.
    """

    def __init__(self, name: str, store: ObjectStore, key: str, entry: FileEntry, kept: KeptBlocks) -> None:
        self._name = name
        self._store = store
        self._key = key
        self._entry = entry
        self._kept = kept

    def __str__(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return self._entry.size

    @property
    def sha256(self) -> str:
        return self._entry.sha256

    def read_into(self, start: int, buffer: memoryview) -> None:
        if start + len(buffer) > self.size:
            raise IntegrityError(f"{self._name}: has {self.size} bytes, {start + len(buffer)} are wanted")
        done = 0
        while done < len(buffer):
            number, inside = divmod(start + done, BLOCK_BYTES)
            length = block_length(self._entry, number)
            part = buffer[done : done + length - inside]
            if len(part) == length:
                read_block(self._store, self._key, self._entry, number, part)
            else:
                block = self._kept.get(self._key, number, length, len(part), self._fetch(number))
                part[:] = memoryview(block)[inside : inside + len(part)]
            done += len(part)

    def _fetch(self, number: int) -> Callable[[], bytearray]:
        def fetch() -> bytearray:
            block = bytearray(block_length(self._entry, number))
            read_block(self._store, self._key, self._entry, number, memoryview(block))
            return block

        return fetch
