"""Writes a shard from documents that arrive in any order, in bounded memory.

Encoded tokens are appended to spool files beside the target; at the end they are copied, document by
document, into the order of the ids. What stays in memory are the ids, the lengths and one chunk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit
from numpy.typing import NDArray

from colbert_core.errors import DataError, DimensionError
from colbert_core.index.codec import Codec, EncodedTokens
from colbert_core.index.metadata import take_rows
from colbert_core.index.shard import (
    METADATA_FILE,
    FileInfo,
    ShardManifest,
    array_layout,
    write_manifest,
)
from colbert_core.tensor_files import file_sha256

METADATA_ROWS = 8192  # rows of a metadata batch
COUNTED_TOKENS = 1 << 16


def id_hash(name: str) -> int:
    """64 stable bits of an external id."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "little")


def shard_of(name: str, shards: int) -> int:
    """Which of ``shards`` shards a document belongs to; depends on its id alone."""
    return (id_hash(name) >> 32) % shards


class ShardWriter:
    """Collects documents and writes them as one shard.

    Use as a context manager; without :meth:`finish`, nothing is left behind.
    """

    def __init__(self, directory: str | Path, codec: Codec) -> None:
        """Starts a shard.

        Args:
            directory: the shard to make; must not exist.
            codec: what tokens are encoded with.

        Raises:
            DataError: the directory exists: a shard is never rewritten.
        """
        self.directory = Path(directory)
        if self.directory.exists():
            raise DataError(f"{self.directory} exists: a shard is never rewritten")
        self.codec = codec
        self._staging = self.directory.with_name(f".{self.directory.name}-{os.getpid()}")
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        self._spools = {
            name: (self._staging / f"{name}.spool").open("wb") for name in ("codes", "residuals", "scales")
        }
        self._ids: list[pa.LargeStringArray] = []
        self._lengths: list[NDArray[np.int64]] = []
        self._metadata: pa.RecordBatchStreamWriter | None = None
        self._schema: pa.Schema | None = None
        self.documents = 0
        self.tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        for spool in self._spools.values():
            spool.close()
        if self._metadata is not None:
            self._metadata.close()
        shutil.rmtree(self._staging, ignore_errors=True)

    def add(
        self,
        ids: Sequence[str],
        vectors: NDArray[np.floating[Any]],
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        metadata: pa.Table | None = None,
    ) -> None:
        """Encodes and adds documents.

        Args:
            ids: n external ids: any strings, unique in the index.
            vectors: floating ``[sum(lengths), dim]``, the documents' tokens one after another.
            lengths: ``[n]``, tokens of each document, at least 1.
            metadata: n rows; all calls must agree on the columns.

        Raises:
            DataError: an id is no string or not Unicode, a document has no tokens, or the metadata
                does not fit.
            DimensionError: the vectors' shape does not fit the lengths or the codec.
            NonFiniteError: a vector holds a NaN or an infinity.
        """
        counts = _checked_lengths(ids, lengths)
        if vectors.ndim != 2 or len(vectors) != counts.sum():
            raise DimensionError(f"lengths add up to {counts.sum()}, the vectors are {list(vectors.shape)}")
        tokens = self.codec.encode(vectors)  # first: what it refuses must leave no documents behind
        self._add_documents(ids, counts, metadata)
        self._append(tokens)

    def add_encoded(
        self,
        ids: Sequence[str],
        tokens: EncodedTokens,
        lengths: Sequence[int] | NDArray[np.integer[Any]],
        metadata: pa.Table | None = None,
    ) -> None:
        """Adds documents that this codec has encoded already; otherwise as :meth:`add`."""
        counts = _checked_lengths(ids, lengths)
        if len(tokens.centroids) != counts.sum():
            raise DimensionError(
                f"lengths add up to {counts.sum()}, there are {len(tokens.centroids)} tokens"
            )
        self._add_documents(ids, counts, metadata)
        self._append(tokens)

    def finish(self) -> ShardManifest:
        """Writes the shard; it appears complete or not at all.

        Raises:
            DataError: two documents have the same id.
        """
        for spool in self._spools.values():
            spool.close()
        ids = pa.chunked_array(self._ids, pa.large_string()).combine_chunks()
        if isinstance(ids, pa.ChunkedArray):  # no chunk at all
            ids = pa.array([], pa.large_string())
        order = pc.sort_indices(ids).to_numpy().astype(np.int64)
        ids = ids.take(pa.array(order))
        repeated = pc.equal(ids[1:], ids[:-1]) if len(ids) > 1 else None
        if repeated is not None and pc.any(repeated).as_py():
            raise DataError(f"two documents have the id {ids[pc.index(repeated, True).as_py()].as_py()!r}")
        lengths = np.concatenate([np.zeros(0, dtype=np.int64), *self._lengths])
        starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)[: len(lengths)]
        offsets = np.concatenate([[0], np.cumsum(lengths[order])]).astype(np.int64)
        names = ids.to_pylist()
        self._write("ids", np.frombuffer("".join(names).encode("utf-8"), dtype=np.uint8))
        self._write("id_offsets", _id_offsets(ids))
        tie_breaks = np.fromiter(
            (id_hash(name) & 0xFFFFFFFF for name in names), dtype=np.uint32, count=len(names)
        )
        self._write("tie_breaks", tie_breaks)
        self._write("offsets", offsets)
        codes = self._permuted("codes", order, starts, offsets)
        self._permuted("residuals", order, starts, offsets)
        scales = self._permuted("scales", order, starts, offsets)
        postings = self._write_postings(offsets, codes)
        counts = np.zeros(256, dtype=np.int64)
        for start in range(0, len(scales), COUNTED_TOKENS):
            counts += np.bincount(scales[start : start + COUNTED_TOKENS, 1], minlength=256)
        if self._metadata is not None:
            self._write_metadata(order)
        del codes, scales
        for path in self._staging.glob("*.spool"):
            path.unlink()
        files = {
            path.name: FileInfo(size=path.stat().st_size, sha256=file_sha256(path))
            for path in sorted(self._staging.iterdir())
        }
        manifest = ShardManifest(
            codec_sha256=self.codec.sha256,
            documents=self.documents,
            tokens=self.tokens,
            postings=postings,
            residual_factor_counts=tuple(int(count) for count in counts),
            files=files,
        )
        write_manifest(self._staging, manifest)
        self._staging.rename(self.directory)
        return manifest

    def _add_documents(
        self, ids: Sequence[str], lengths: NDArray[np.int64], metadata: pa.Table | None
    ) -> None:
        try:
            names = pa.array(ids, pa.large_string())
        except (pa.ArrowException, UnicodeEncodeError, TypeError) as error:
            raise DataError(f"an id is not a Unicode string: {error}") from None
        if names.null_count:
            raise DataError(f"document {self.documents + ids.index(None)} has no id")
        if self.documents and (metadata is None) != (self._schema is None):
            raise DataError("some documents have metadata and some have none")
        if metadata is not None:
            self._add_metadata(metadata, len(ids))
        self._ids.append(names)
        self._lengths.append(lengths)
        self.documents += len(ids)
        if self.documents >= 1 << 31:
            raise DataError("a shard holds at most 2^31 - 1 documents: use more shards")

    def _add_metadata(self, metadata: pa.Table, rows: int) -> None:
        if metadata.num_rows != rows:
            raise DataError(f"metadata has {metadata.num_rows} rows for {rows} documents")
        if self._metadata is None:
            self._schema = metadata.schema.remove_metadata()
            self._metadata = pa.ipc.new_stream(str(self._staging / "metadata.spool"), self._schema)
        if not metadata.schema.equals(self._schema):
            raise DataError(f"metadata columns differ: {metadata.schema} after {self._schema}")
        self._metadata.write_table(metadata.replace_schema_metadata(None))

    def _append(self, tokens: EncodedTokens) -> None:
        self._spools["codes"].write(tokens.centroids.astype(self.codec.code_dtype).tobytes())
        self._spools["residuals"].write(np.ascontiguousarray(tokens.residuals).tobytes())
        self._spools["scales"].write(np.ascontiguousarray(tokens.scales).tobytes())
        self.tokens += len(tokens.centroids)

    def _write(self, name: str, values: NDArray[Any]) -> None:
        values.astype(values.dtype.newbyteorder("<"), copy=False).tofile(self._staging / name)

    def _create(self, name: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """A new array file, mapped for writing."""
        path = self._staging / name
        if 0 in shape:
            path.touch()
            return np.empty(shape, dtype)
        return np.memmap(path, dtype, mode="w+", shape=shape).view(np.ndarray)

    def _permuted(
        self, name: str, order: NDArray[np.int64], starts: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> NDArray[Any]:
        """Writes a token array in the order of the ids."""
        dtype, shape = array_layout(self.codec, self.documents, self.tokens, 0)[name]
        target = self._create(name, dtype, shape)
        if self.tokens:
            source = np.memmap(self._staging / f"{name}.spool", dtype, mode="r", shape=shape).view(np.ndarray)
            row_bytes = source.dtype.itemsize * (shape[1] if len(shape) == 2 else 1)
            _copy_rows(
                source.view(np.uint8).reshape(self.tokens, row_bytes),
                target.view(np.uint8).reshape(self.tokens, row_bytes),
                order,
                starts,
                offsets,
            )
        return target

    def _write_postings(self, offsets: NDArray[np.int64], codes: NDArray[Any]) -> int:
        """Writes the inverted lists; returns their total length."""
        last = np.full(len(self.codec.centroids), -1, dtype=np.int32)
        counts = np.zeros(len(self.codec.centroids) + 1, dtype=np.int64)
        _count_postings(offsets, codes, last, counts)
        bounds = np.cumsum(counts)
        self._write("posting_offsets", bounds)
        postings = self._create("postings", "<i4", (int(bounds[-1]),))
        last[:] = -1
        _fill_postings(offsets, codes, last, bounds[:-1].copy(), postings)
        return int(bounds[-1])

    def _write_metadata(self, order: NDArray[np.int64]) -> None:
        assert self._metadata is not None
        self._metadata.close()
        with pa.memory_map(str(self._staging / "metadata.spool")) as source:
            table = pa.ipc.open_stream(source).read_all()
            with pa.ipc.new_file(str(self._staging / METADATA_FILE), table.schema) as writer:
                for start in range(0, len(order), METADATA_ROWS):
                    rows = take_rows(table, order[start : start + METADATA_ROWS]).combine_chunks()
                    writer.write_table(rows, max_chunksize=METADATA_ROWS)


def write_shard(
    directory: str | Path,
    codec: Codec,
    ids: Sequence[str],
    vectors: NDArray[np.floating[Any]],
    lengths: Sequence[int] | NDArray[np.integer[Any]],
    metadata: pa.Table | None = None,
) -> ShardManifest:
    """Writes documents that are all in memory as one shard; see :class:`ShardWriter`."""
    with ShardWriter(directory, codec) as writer:
        writer.add(ids, vectors, lengths, metadata)
        return writer.finish()


def _checked_lengths(
    ids: Sequence[str], lengths: Sequence[int] | NDArray[np.integer[Any]]
) -> NDArray[np.int64]:
    counts = np.asarray(lengths, dtype=np.int64)
    if counts.shape != (len(ids),):
        raise DimensionError(f"{len(ids)} ids have {list(counts.shape)} lengths")
    if len(counts) and counts.min() < 1:
        raise DataError(f"document {ids[int(np.argmin(counts))]!r} has no tokens")
    return counts


def _id_offsets(ids: pa.LargeStringArray) -> NDArray[np.int64]:
    sizes = pc.binary_length(ids).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@njit(nogil=True, cache=True)
def _copy_rows(source, target, order, starts, offsets):  # type: ignore[no-untyped-def]
    """``target`` document i = ``source`` document ``order[i]``, row by row."""
    for i in range(order.shape[0]):
        begin = starts[order[i]]
        for j in range(offsets[i + 1] - offsets[i]):
            for k in range(source.shape[1]):
                target[offsets[i] + j, k] = source[begin + j, k]


@njit(nogil=True, cache=True)
def _count_postings(offsets, codes, last, counts):  # type: ignore[no-untyped-def]
    """``counts[c + 1]`` = documents that hold centroid c; ``last[c]`` is the last document counted."""
    for document in range(offsets.shape[0] - 1):
        for position in range(offsets[document], offsets[document + 1]):
            centroid = codes[position]
            if last[centroid] != document:
                last[centroid] = document
                counts[centroid + 1] += 1


@njit(nogil=True, cache=True)
def _fill_postings(offsets, codes, last, ends, postings):  # type: ignore[no-untyped-def]
    """Appends each document to the postings of its centroids; ``ends`` are the lists' ends so far."""
    for document in range(offsets.shape[0] - 1):
        for position in range(offsets[document], offsets[document + 1]):
            centroid = codes[position]
            if last[centroid] != document:
                last[centroid] = document
                postings[ends[centroid]] = document
                ends[centroid] += 1
