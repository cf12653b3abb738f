"""The corpus of an index on its way to the encoder: split by shard, duplicates settled, cut into chunks.

Everything lies under ``.build/`` in the index's own folder, where any worker finds it, a restarted build
goes on from it, and garbage collection removes it should the build never be finished. What a document's
shard, chunk and place in the sample are depends on its id and the recipe, not on who does the work.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe
from cluster.sources import locate, read_records
from cluster.storage import ObjectStore
from colbert_core.errors import DataError
from colbert_core.index import shard_of

# Documents encoded, held and stored together; at most so many of the longest take 80 MB at 128 dimensions.
CHUNK_DOCUMENTS = 512
# Characters of documents held until they are written to the files of their shards.
BUFFER_CHARACTERS = 16_000_000

SCHEMA = pa.schema([("id", pa.string()), ("title", pa.string()), ("text", pa.string())])
_ROW_SCHEMA = SCHEMA.append(pa.field("row", pa.int64()))


@dataclass(frozen=True, order=True)
class Chunk:
    """Some documents of one shard, the unit of encoding.

    Attributes:
        shard: number of the shard.
        number: counts the chunks of the shard.
        documents: how many it holds.
    """

    shard: int
    number: int
    documents: int = field(compare=False)

    @property
    def name(self) -> str:
        return f"{self.shard:05d}-{self.number:06d}"


@dataclass(frozen=True)
class ChunkRecord:
    """What encoding a chunk yielded; a chunk that has one is done.

    Attributes:
        dim: dimensions of a vector.
        ids: document ids, in the order of the chunk.
        lengths: vectors of each document.
        truncated: documents whose end was cut off.
        dropped_tokens: tokens that were cut off.
    """

    dim: int
    ids: list[str]
    lengths: list[int]
    truncated: int
    dropped_tokens: int

    @property
    def counts(self) -> Counts:
        return Counts(len(self.ids), sum(self.lengths), self.truncated, self.dropped_tokens)


@dataclass
class Counts:
    """Figures of any number of chunks, as in :class:`ChunkRecord`."""

    documents: int = 0
    tokens: int = 0
    truncated: int = 0
    dropped_tokens: int = 0

    def add(self, other: Counts) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


class BuildArea:
    """The intermediate objects of one build.

    Args:
        store: where.
        ref: the index that is built.
    """

    def __init__(self, store: ObjectStore, ref: ArtifactRef) -> None:
        self.store = store
        self.prefix = f"{ref.prefix}.build/"

    def rows_key(self, file: int, shard: int) -> str:
        return f"{self.prefix}rows/{file:05d}-{shard:05d}.parquet"

    def documents_key(self, chunk: Chunk) -> str:
        return f"{self.prefix}documents/{chunk.name}.parquet"

    def vectors_key(self, chunk: Chunk) -> str:
        return f"{self.prefix}vectors/{chunk.name}.f16"

    def record_key(self, chunk: Chunk) -> str:
        return f"{self.prefix}records/{chunk.name}.json"

    def shard_key(self, shard: int) -> str:
        return f"{self.prefix}shards/{shard:05d}.json"

    @property
    def chunks_key(self) -> str:
        return f"{self.prefix}chunks.json"

    @property
    def codec_key(self) -> str:
        return f"{self.prefix}codec.json"

    def read_json(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def write_json(self, key: str, value: Any) -> None:
        self.store.put(key, json.dumps(value, ensure_ascii=False).encode())

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """Notes what is built from; what an unfinished build from anything else left is removed.

        Args:
            inputs: plain data that identifies the model and the corpus.
        """
        key = f"{self.prefix}inputs.json"
        if not self.store.exists(key) or self.read_json(key) != inputs:
            self.clear()
            self.write_json(key, inputs)

    def chunks(self) -> list[Chunk] | None:
        """All chunks of the corpus, or None while it is not cut up yet."""
        if not self.store.exists(self.chunks_key):
            return None
        sizes: list[list[int]] = self.read_json(self.chunks_key)
        return [
            Chunk(shard, number, documents)
            for shard, of_shard in enumerate(sizes)
            for number, documents in enumerate(of_shard)
        ]

    def keep_chunks(self, sizes: Sequence[Sequence[int]]) -> None:
        """Records the documents of each shard's chunks: the corpus is cut up."""
        self.write_json(self.chunks_key, sizes)

    def encoded(self) -> set[str]:
        """Names of the chunks that have a record."""
        return {Path(info.key).stem for info in self.store.list(f"{self.prefix}records/")}

    def record(self, chunk: Chunk) -> ChunkRecord:
        return ChunkRecord(**self.read_json(self.record_key(chunk)))

    def keep_record(self, chunk: Chunk, record: ChunkRecord) -> None:
        self.write_json(self.record_key(chunk), asdict(record))

    def documents(self, chunk: Chunk) -> pa.Table:
        """The chunk's documents, see ``SCHEMA``, those that come first into a sample first."""
        return pq.read_table(pa.BufferReader(self.store.get(self.documents_key(chunk))))

    def clear(self) -> None:
        """Removes all of it; what refers to others goes before them."""
        for info in sorted(self.store.list(self.prefix), key=lambda info: not info.key.endswith(".json")):
            self.store.delete(info.key)


def sample_place(key: str, seed: int) -> int:
    """The place of a document id in a random order of all ids, of 64 bits; a sample takes the lowest."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, key=f"sample {seed}".encode()).digest()
    return int.from_bytes(digest, "big")


def corpus_files(recipe: Recipe, sources: Sequence[str]) -> list[str]:
    """The corpus files of data sources, each once though several sources may share it."""
    return list(dict.fromkeys(recipe.data.sources[name].corpus for name in sources))


def corpus_state(recipe: Recipe, paths: Sequence[str]) -> dict[str, list[Any]]:
    """Size and time of the last write of corpus files, by path: a file that was changed differs."""
    state = {}
    for path in paths:
        filesystem, location = locate(recipe, path)
        info = filesystem.get_file_info(location)
        state[path] = [info.size, info.mtime_ns]
    return state


def split_file(recipe: Recipe, path: str, number: int, shards: int, area: BuildArea) -> int:
    """Streams a corpus file into one file for each shard; returns its rows.

    Raises:
        DataError: the file is missing or malformed; says which row.
    """
    rows = characters = 0
    with TemporaryDirectory(prefix="raycolbert-split-") as folder:
        files = [Path(folder) / f"{shard}.parquet" for shard in range(shards)]
        with ExitStack() as stack:
            writers = [
                stack.enter_context(pq.ParquetWriter(file, _ROW_SCHEMA, compression="zstd")) for file in files
            ]
            waiting: list[list[dict[str, Any]]] = [[] for _ in files]
            for row, record in read_records(recipe, path, ("_id", "text"), optional=("title",)):
                key, title, text = record["_id"], record["title"] or None, record["text"]
                _check_unicode(path, row, key, title, text)
                waiting[shard_of(key, shards)].append({"id": key, "title": title, "text": text, "row": row})
                rows, characters = row, characters + len(text) + 100
                if characters > BUFFER_CHARACTERS:
                    _flush(waiting, writers)
                    characters = 0
            _flush(waiting, writers)
        for shard, file in enumerate(files):
            area.store.upload(area.rows_key(number, shard), file)
    return rows


def cut_shard(paths: Sequence[str], shard: int, seed: int, area: BuildArea) -> list[int]:
    """Cuts a shard's documents into chunks; returns the documents of each.

    Two sources may share a document. Memory is that of the shard's ids and one chunk.

    Raises:
        DataError: an id occurs twice in a file, or in two files with different texts.
    """
    sizes: list[int] = []

    def write(rows: list[dict[str, Any]]) -> None:
        rows.sort(key=lambda row: (sample_place(row["id"], seed), row["id"]))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, compression="zstd")
        chunk = Chunk(shard, len(sizes), len(rows))
        area.store.put(area.documents_key(chunk), sink.getvalue().to_pybytes())
        sizes.append(len(rows))

    waiting: list[dict[str, Any]] = []
    for row in _unique_rows(paths, shard, area):
        waiting.append(row)
        if len(waiting) == CHUNK_DOCUMENTS:
            write(waiting)
            waiting = []
    if waiting:
        write(waiting)
    return sizes


def _unique_rows(paths: Sequence[str], shard: int, area: BuildArea) -> Iterator[dict[str, Any]]:
    seen: dict[str, tuple[int, int, bytes]] = {}
    for number, path in enumerate(paths):
        with area.store.open(area.rows_key(number, shard)) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    key, place = row["id"], row["row"]
                    content = json.dumps([row["title"], row["text"]]).encode()
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    if key not in seen:
                        seen[key] = (number, place, digest)
                        yield row
                        continue
                    first, first_row, first_digest = seen[key]
                    if first == number:
                        raise DataError(
                            f"{path} row {place}: id {key!r} occurs twice, first in row {first_row}"
                        )
                    if digest != first_digest:
                        raise DataError(
                            f"{path} row {place}: id {key!r} has another text in {paths[first]} "
                            f"row {first_row}; one index cannot hold both"
                        )


def _flush(waiting: list[list[dict[str, Any]]], writers: Sequence[pq.ParquetWriter]) -> None:
    for rows, writer in zip(waiting, writers, strict=True):
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, _ROW_SCHEMA))
            rows.clear()


def _check_unicode(path: str, row: int, *texts: str | None) -> None:
    """JSON can spell halves of characters, which no other format takes."""
    for text in texts:
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{path} row {row}: not valid Unicode: {error.reason}") from None
