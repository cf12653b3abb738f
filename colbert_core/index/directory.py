"""An index directory: the codec, the shards, and generations that say which of them are current.

::

    codec/                    codec.safetensors, codec.json
    shards/00000/ …           written by the build
    deltas/00002-9c0f31ab/ …  written by the addition that made generation 2
    tombstones/00003-1b7e…/ … bitmaps of deleted documents, written by the deletion that made generation 3
    generations/00003.json    the shards and bitmaps of generation 3, written last

A change adds files and then one generation file, by rename: a reader sees the state before or after it,
and a process that is killed leaves at most files that nothing names. Changes survive that, not a loss of
power of the machine: what a generation file names is not synchronised with the disk. A directory without
generations, as the build leaves it, consists of all of its ``shards``.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from colbert_core.config import FrozenModel
from colbert_core.errors import IndexFormatError
from colbert_core.index.codec import Codec
from colbert_core.index.engine import Engine
from colbert_core.index.sealed_json import read_sealed, seal
from colbert_core.index.search import Searcher
from colbert_core.index.shard import MANIFEST_FILE, Shard, Verify


class ShardEntry(FrozenModel):
    """A shard of a generation.

    Attributes:
        path: its directory, relative to the index.
        documents: how many it holds, deleted ones included.
        deleted: how many are deleted.
        tombstones: file with one bit a document, lowest first, set where deleted; None if none is.
        tombstones_sha256: digest of that file.
    """

    path: str
    documents: int
    deleted: int = 0
    tombstones: str | None = None
    tombstones_sha256: str | None = None


class Generation(FrozenModel):
    """The shards of an index after a number of changes."""

    schema_version: Literal[1] = 1
    number: int
    codec_sha256: str
    shards: tuple[ShardEntry, ...]


def open_index(
    directory: str | Path,
    *,
    shards: Sequence[str] | None = None,
    verify: Verify = "fast",
    threads: int = 1,
    device: str | None = None,
) -> Searcher:
    """Opens the current generation of an index.

    Args:
        directory: an index, as the build or a registry's ``pull`` leaves it.
        shards: paths of the shards to open, relative to ``directory`` (``shards/00000``); all if None.
            The others need not be there.
        verify: see :meth:`Shard.open`.
        threads: see :class:`Searcher`.
        device: a torch device to search on; None: compiled kernels on the CPU.

    Raises:
        IndexFormatError: something is missing or damaged, or belongs to another index.
        SchemaVersionError: a newer version of raycolbert wrote it.
    """
    directory = Path(directory)
    codec = Codec.load(directory / "codec")
    opened = open_shards(directory, codec, shards=shards, verify=verify)
    engine: Engine | None = None
    if device is not None:
        from colbert_core.index.torch_engine import TorchEngine

        engine = TorchEngine(codec, opened, device)
    return Searcher(codec, opened, threads=threads, engine=engine)


def open_shards(
    directory: Path,
    codec: Codec,
    *,
    shards: Sequence[str] | None = None,
    verify: Verify = "fast",
    generation: Generation | None = None,
) -> list[Shard]:
    """Opens shards of a generation, deletions applied; other arguments as for :func:`open_index`.

    Args:
        generation: the generation; the current one if None.
    """
    generation = generation or current_generation(directory, codec)
    entries = {entry.path: entry for entry in generation.shards}
    for path in shards or ():
        if path not in entries:
            raise IndexFormatError(f"{directory}: has no shard {path!r}; there are: {', '.join(entries)}")
    opened = []
    for path in entries if shards is None else shards:
        shard = Shard.open(directory / path, codec, verify)
        if generation.number and len(shard) != entries[path].documents:
            raise IndexFormatError(
                f"{directory / path}: has {len(shard)} documents, "
                f"generation {generation.number} says {entries[path].documents}"
            )
        shard.live = ~read_tombstones(directory, entries[path], len(shard))
        opened.append(shard)
    return opened


def current_generation(directory: Path, codec: Codec) -> Generation:
    """The newest generation; number 0 stands for a directory as the build leaves it.

    Raises:
        IndexFormatError: there are no shards, or the generation is damaged or of another codec.
        SchemaVersionError: a newer version of raycolbert wrote it.
    """
    written = sorted((directory / "generations").glob("[0-9]*.json"), key=generation_order)
    if not written:
        # A writer that was killed leaves a directory whose name begins with a dot.
        found = sorted(path.parent.name for path in (directory / "shards").glob(f"[!.]*/{MANIFEST_FILE}"))
        if not found:
            raise IndexFormatError(f"{directory}: no index: it has no shards")
        entries = tuple(ShardEntry(path=f"shards/{name}", documents=0) for name in found)
        return Generation(number=0, codec_sha256=codec.sha256, shards=entries)
    path = written[-1]
    generation = read_sealed(path, Generation, "a generation of an index")
    if path.stem != f"{generation.number:05d}":
        raise IndexFormatError(f"{path}: holds generation {generation.number}")
    if generation.codec_sha256 != codec.sha256:
        raise IndexFormatError(f"{path}: belongs to another codec")
    return generation


def generation_order(path: PurePath) -> tuple[int, str]:
    """Sorts generation files by their numbers, also those of more than five digits."""
    return len(path.stem), path.stem


def generation_files(directory: Path, generation: Generation) -> list[str]:
    """Paths of all files that a generation consists of, relative to the index; those of absent shards are
    left out.
    """
    folders = ["codec", *(entry.path for entry in generation.shards)]
    files = [path for folder in folders for path in (directory / folder).rglob("*") if path.is_file()]
    found = [path.relative_to(directory).as_posix() for path in files]
    found += [entry.tombstones for entry in generation.shards if entry.tombstones is not None]
    if generation.number:
        found.append(f"generations/{generation.number:05d}.json")
    return sorted(found)


def write_generation(directory: Path, generation: Generation) -> None:
    """Makes a generation the current one; its files must be in place.

    Raises:
        IndexFormatError: the number is taken: somebody else has changed the index meanwhile.
    """
    folder = directory / "generations"
    folder.mkdir(exist_ok=True)
    path = folder / f"{generation.number:05d}.json"
    staging = folder / f".{path.name}-{os.getpid()}"
    with staging.open("w", encoding="utf-8") as file:
        file.write(seal(generation))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(staging, path)  # unlike a rename, this fails if the number is taken
    except FileExistsError:
        raise IndexFormatError(f"{path} exists: the index was changed at the same time") from None
    finally:
        staging.unlink()


def read_tombstones(directory: Path, entry: ShardEntry, documents: int) -> NDArray[np.bool_]:
    """Which documents of a shard are deleted, bool ``[documents]``.

    Raises:
        IndexFormatError: the bitmap is missing or damaged; it is always checked in full.
    """
    if entry.tombstones is None:
        return np.zeros(documents, dtype=np.bool_)
    path = directory / entry.tombstones
    try:
        data = path.read_bytes()
    except OSError as error:
        raise IndexFormatError(f"{path}: {error.strerror}") from None
    if len(data) != -(-documents // 8) or hashlib.sha256(data).hexdigest() != entry.tombstones_sha256:
        raise IndexFormatError(f"{path}: damaged: size or SHA-256 differs from the generation's")
    bits = np.unpackbits(np.frombuffer(data, dtype=np.uint8), count=documents, bitorder="little")
    return bits.astype(np.bool_)


def write_tombstones(
    directory: Path, folder: Path, entry: ShardEntry, deleted: NDArray[np.bool_]
) -> ShardEntry:
    """Writes a shard's bitmap into ``folder``; returns the shard's new entry."""
    folder.mkdir(parents=True, exist_ok=True)
    data = np.packbits(deleted, bitorder="little").tobytes()
    path = folder / entry.path.replace("/", "-")
    path.write_bytes(data)
    return entry.model_copy(
        update={
            "deleted": int(np.count_nonzero(deleted)),
            "tombstones": path.relative_to(directory).as_posix(),
            "tombstones_sha256": hashlib.sha256(data).hexdigest(),
        }
    )


def with_counts(generation: Generation, shards: Sequence[Shard]) -> Generation:
    """A generation whose entries name how many documents the opened shards hold."""
    entries: list[Any] = [
        entry.model_copy(update={"documents": len(shard)})
        for entry, shard in zip(generation.shards, shards, strict=True)
    ]
    return generation.model_copy(update={"shards": tuple(entries)})
