"""Changes to an index: additions, deletions, updates, compaction, and how well the codec still fits.

Nothing is rewritten in place; see :mod:`colbert_core.index.directory` for what a change leaves behind.
One process may change an index at a time: of two that try, one fails and leaves nothing behind, except
what it wrote under a name that it was given.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from colbert_core.errors import DataError, IndexFormatError
from colbert_core.index.codec import Codec, EncodedTokens
from colbert_core.index.directory import (
    Generation,
    ShardEntry,
    current_generation,
    open_shards,
    with_counts,
    write_generation,
    write_tombstones,
)
from colbert_core.index.metadata import take_rows
from colbert_core.index.shard import Shard, checked_ids
from colbert_core.index.shard_writer import ShardWriter, shard_of

COMPACTION_DOCUMENTS = 4096  # documents held while they are copied


@dataclass(frozen=True)
class Drift:
    """How the tokens of an index compare with those that its codec was trained on.

    Attributes:
        tokens: tokens of live and deleted documents.
        mean_residual: their mean residual factor, in units of the training sample's; 1 means that they
            fit the centroids as well as the sample does.
        beyond: share of tokens whose residual is at the end of the codec's range, where it is clipped.
    """

    tokens: int
    mean_residual: float
    beyond: float


def delete_documents(directory: str | Path, ids: Sequence[str]) -> int:
    """Deletes documents; returns how many there were.

    Args:
        directory: an index.
        ids: external ids; unknown and already deleted ones are passed over.

    Raises:
        DataError: an id is no string.
    """
    directory = Path(directory)
    change = _Change(directory)
    count = change.delete(ids)
    if count:
        change.commit()
    return count


def add_documents(
    directory: str | Path,
    ids: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    lengths: Sequence[int] | NDArray[np.integer[Any]],
    metadata: pa.Table | None = None,
    *,
    replace: bool = False,
) -> int:
    """Adds documents as a delta shard.

    Args:
        directory: an index.
        ids, vectors, lengths, metadata: see :meth:`ShardWriter.add`.
        replace: a document whose id is there already takes its place; otherwise that is an error.

    Returns:
        How many documents were replaced.

    Raises:
        DataError: an id is there already, or occurs twice, or is no string, or the metadata columns are not
            the index's.
        DimensionError, NonFiniteError: the vectors do not fit.
    """
    directory = Path(directory)
    ids = checked_ids(ids)
    change = _Change(directory)
    known = [] if replace else change.known(ids)
    if known:
        raise DataError(f"the index has a document {known[0]!r} already; replace=True replaces it")
    _check_columns(change.shards, metadata)
    path = directory / "deltas" / change.name
    with ShardWriter(path, change.codec) as writer:
        writer.add(ids, vectors, lengths, metadata)
        manifest = writer.finish()
    replaced = change.delete(ids) if replace else 0
    entry = ShardEntry(path=path.relative_to(directory).as_posix(), documents=manifest.documents)
    change.commit(entry)
    return replaced


def known_documents(directory: str | Path, ids: Sequence[str]) -> set[str]:
    """Those of the ids that an index holds, deleted ones left out.

    Raises:
        DataError: an id is no string.
    """
    return set(_Change(Path(directory)).known(ids))


def check_metadata(directory: str | Path, schema: pa.Schema | None) -> None:
    """Checks that additions with these metadata columns fit an index.

    Raises:
        DataError: they are not the columns that the index has.
    """
    directory = Path(directory)
    table = schema.empty_table() if schema is not None else None
    _check_columns(open_shards(directory, Codec.load(directory / "codec")), table)


def commit_change(
    directory: str | Path, name: str, *, deleted: Sequence[str] = (), delta: ShardEntry | None = None
) -> Generation:
    """Makes an index's next generation: some documents deleted, and a delta shard that was written elsewhere.

    Args:
        directory: an index; the files of ``delta`` need not be there yet.
        name: of the change's files; the same change under the same name leaves the same bytes.
        deleted: external ids; unknown and already deleted ones are passed over.
        delta: the shard, whose documents are not among those that stay.

    Raises:
        DataError: an id is no string.
        IndexFormatError: the index was changed meanwhile. The change's files stay: whoever made the same
            change under the same name needs them.
    """
    change = _Change(Path(directory), name)
    change.delete(deleted)
    return change.commit(*([] if delta is None else [delta]))


def compact_index(
    source: str | Path,
    target: str | Path,
    shards: int | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Writes the live documents of an index as a new index with the same codec.

    The result is, byte for byte, what a build of these documents with this codec writes.

    Args:
        source: an index.
        target: directory to make.
        shards: number of shards; as many as ``source`` had before additions, if None.
        progress: called with the documents that have been copied since the last call.

    Returns:
        The new index's first generation, which is not written: a directory as the build leaves it.

    Raises:
        DataError: ``target`` exists.
    """
    source, target = Path(source), Path(target)
    if target.exists():
        raise DataError(f"{target} exists: an index is never rewritten")
    codec = Codec.load(source / "codec")
    opened = open_shards(source, codec, verify="full")
    count = shards or sum(path.parent.name == "shards" for path in (s.directory for s in opened)) or 1
    staging = target.with_name(f".{target.name}-compacting")
    shutil.rmtree(staging, ignore_errors=True)
    codec.save(staging / "codec")
    with ExitStack() as stack:
        writers = [
            stack.enter_context(ShardWriter(staging / "shards" / f"{number:05d}", codec))
            for number in range(count)
        ]
        for shard in opened:
            _copy_live(shard, writers, progress)
        for writer in writers:
            writer.finish()
    staging.rename(target)
    return current_generation(target, codec)


def measure_drift(shards: Sequence[Shard]) -> Drift:
    """Compares the residuals of shards with those of the codec's training sample."""
    codec = shards[0].codec
    counts = np.sum([shard.manifest.residual_factor_counts for shard in shards], axis=0)
    tokens = int(counts.sum())
    if tokens == 0:
        return Drift(0, 1.0, 0.0)
    mean = float(counts @ codec.residual_factors.astype(np.float64)) / tokens
    trained = max(codec.training["residual_factor"], float(np.finfo(np.float32).tiny))
    return Drift(tokens, mean / trained, float(counts[-1]) / tokens)


class _Change:
    """A change on its way from one generation to the next."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.directory = directory
        self.codec = Codec.load(directory / "codec")
        generation = current_generation(directory, self.codec)
        self.shards = open_shards(directory, self.codec, generation=generation)
        self.generation = with_counts(generation, self.shards)
        self.number = generation.number + 1
        # Two changes may begin at the same generation; only one will end it, each has files of its own.
        self.name = f"{self.number:05d}-{name or secrets.token_hex(4)}"
        self._own_files = not name
        self._deleted: dict[int, NDArray[np.bool_]] = {}

    def known(self, ids: Sequence[str]) -> list[str]:
        """Those of the ids that the index has, not deleted."""
        known = []
        for shard in self.shards:
            place = shard.find(ids)
            known += [ids[int(i)] for i in np.flatnonzero(place >= 0) if shard.live[place[i]]]
        return known

    def delete(self, ids: Sequence[str]) -> int:
        """Marks documents as deleted; returns how many."""
        names = list(dict.fromkeys(checked_ids(ids)))
        count = 0
        for number, shard in enumerate(self.shards):
            place = shard.find(names)
            place = place[place >= 0]
            place = place[shard.live[place]]
            if len(place):
                deleted = ~shard.live
                deleted[place] = True
                self._deleted[number] = deleted
                count += len(place)
        return count

    def commit(self, *added: ShardEntry) -> Generation:
        """Makes the change visible; returns the new generation.

        Raises:
            IndexFormatError: the index was changed meanwhile; no file is left that only this change has.
        """
        entries = list(self.generation.shards)
        folder = self.directory / "tombstones" / self.name
        for number, deleted in self._deleted.items():
            entries[number] = write_tombstones(self.directory, folder, entries[number], deleted)
        entries += added
        generation = Generation(number=self.number, codec_sha256=self.codec.sha256, shards=tuple(entries))
        try:
            write_generation(self.directory, generation)
        except IndexFormatError:
            if self._own_files:  # under a given name they may be those of the change that was made
                for path in (folder, *(self.directory / entry.path for entry in added)):
                    shutil.rmtree(path, ignore_errors=True)
            raise
        return generation


def _check_columns(shards: Sequence[Shard], metadata: pa.Table | None) -> None:
    """Additions have the metadata columns that the index has.

    Raises:
        DataError: they differ.
    """
    for shard in shards:
        if len(shard) == 0:
            continue
        there = shard.metadata.schema if shard.metadata is not None else None
        given = metadata.schema.remove_metadata() if metadata is not None else None
        if there != given:
            raise DataError(f"metadata columns are {given or 'none'}; the index has {there or 'none'}")
        return


def _copy_live(shard: Shard, writers: Sequence[ShardWriter], progress: Callable[[int], None] | None) -> None:
    """Hands the live documents of a shard to the writers that their ids belong to."""
    live = np.flatnonzero(shard.live)
    for start in range(0, len(live), COMPACTION_DOCUMENTS):
        documents = live[start : start + COMPACTION_DOCUMENTS]
        names = shard.ids(documents)
        homes = np.array([shard_of(name, len(writers)) for name in names])
        for home in np.unique(homes):
            chosen = documents[homes == home]
            lengths = shard.offsets[chosen + 1] - shard.offsets[chosen]
            rows = np.concatenate([np.arange(shard.offsets[i], shard.offsets[i + 1]) for i in chosen])
            tokens = EncodedTokens(shard.codes[rows], shard.residuals[rows], shard.scales[rows])
            table = take_rows(shard.metadata, chosen) if shard.metadata is not None else None
            writers[home].add_encoded(
                [names[int(i)] for i in np.flatnonzero(homes == home)], tokens, lengths, table
            )
        if progress is not None:
            progress(len(documents))
