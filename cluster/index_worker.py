"""The actor that builds indexes: reads, encodes, trains the codec, writes shards."""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.artifacts import ArtifactRef
from cluster.config import IndexConfig, Recipe
from cluster.index_corpus import (
    BuildArea,
    Chunk,
    ChunkRecord,
    Counts,
    corpus_files,
    cut_shard,
    sample_place,
    split_file,
)
from cluster.models import load_model_ref
from cluster.registry import Registry, StagedArtifact
from cluster.sources import document_text
from colbert_core.encoder import ColBERT
from colbert_core.errors import IntegrityError
from colbert_core.index import Codec, ShardWriter
from colbert_core.index.shard import METADATA_FILE
from colbert_core.precision import fast_precision

_THREADS = 8
# Files of a shard that grow with texts and ids, not with vectors.
_NO_VECTORS = (METADATA_FILE, "ids", "id_offsets")
_COMPONENT = np.dtype("<f2")  # vectors of length 1 lose less in it than bfloat16 encoding does


class IndexWorker:
    """One of the actors that build an index; all that it knows it can find again in storage.

    Args:
        recipe: names the sources.
        config: its index section.
        ref: the index that is built.
        model: what encodes its documents.
    """

    def __init__(self, recipe: Recipe, config: IndexConfig, ref: ArtifactRef, model: ArtifactRef) -> None:
        torch.set_num_threads(max(1, int(config.cpus_per_worker)))
        self._recipe = recipe
        self._config = config
        self._ref = ref
        self._model_ref = model

    def split(self, number: int) -> int:
        """Splits a corpus file by shard."""
        path = corpus_files(self._recipe, self._config.sources)[number]
        return split_file(self._recipe, path, number, self._config.shards, self._area)

    def cut(self, shard: int) -> list[int]:
        """Cuts a shard's documents into chunks."""
        files = corpus_files(self._recipe, self._config.sources)
        return cut_shard(files, shard, self._config.codec.seed, self._area)

    def encode(self, chunk: Chunk) -> Counts:
        """Makes a chunk's vectors, fp16 in storage, and then its record."""
        model, table = self._model, self._area.documents(chunk)
        texts = [
            document_text(title, text)
            for title, text in zip(table["title"].to_pylist(), table["text"].to_pylist(), strict=True)
        ]
        model.text.truncation.reset()
        vectors = model.encode_documents(
            texts,
            token_budget=self._config.token_budget,
            pool_factor=self._config.pool_factor,
            precision=fast_precision(model.device),
        )
        self._area.store.put(self._area.vectors_key(chunk), vectors.vectors.half().numpy().tobytes())
        cut = model.text.truncation
        record = ChunkRecord(
            vectors.dim,
            table["id"].to_pylist(),
            vectors.lengths.tolist(),
            cut.truncated_documents,
            cut.dropped_tokens,
        )
        self._area.keep_record(chunk, record)
        return record.counts

    def train_codec(self, task: tuple[list[Chunk], int]) -> None:
        """Trains the codec on a sample of the vectors, and stages it.

        All documents' vectors are its sample if they are no more than ``sample_tokens``; otherwise those
        of the documents whose ids come first in a random order, whatever chunks they are in.

        Args:
            task: all chunks, and the tokens in them.
        """
        chunks, total = task
        limit = self._config.codec.sample_tokens
        # The share of ids that hold `limit` tokens on average, and some more: what is too much is cut off.
        bound = (1 << 64) if total <= limit else int(min(1.0, 1.1 * limit / total) * (1 << 64))
        with ThreadPoolExecutor(_THREADS) as readers:
            parts = list(readers.map(self._sampled, chunks, repeat(bound)))
        documents = sorted((item for part in parts for item in part), key=lambda item: item[:2])
        sample = np.concatenate([vectors for *_, vectors in documents])
        # The other workers of this job are idle meanwhile.
        cores = self._config.encode_workers * self._config.cpus_per_worker
        threads = max(1, min(os.cpu_count() or 1, int(cores)))
        sample = sample[:limit]
        codec = Codec.train(sample, self._config.codec, total_tokens=total, threads=threads)
        with TemporaryDirectory(prefix="raycolbert-codec-") as folder:
            codec.save(Path(folder))
            local = {f"codec/{path.name}": path for path in sorted(Path(folder).iterdir())}
            for name, path in local.items():
                self._staged.upload(name, path, keep_existing=True)
        # Another builder's may have been first, and then everybody goes on with that.
        codec = self._staged_codec(list(local))
        self._area.write_json(
            self._area.codec_key,
            {
                "files": list(local),
                "sha256": codec.sha256,
                "dim": codec.dim,
                "centroids": len(codec.centroids),
                "training": codec.training,
            },
        )

    def write(self, shard: int) -> None:
        """Compresses a shard's vectors, stages its files, and notes that it is done."""
        chunks = [chunk for chunk in self._area.chunks() or () if chunk.shard == shard]
        with TemporaryDirectory(prefix="raycolbert-shard-") as folder:
            directory = self._directory(shard)
            local = Path(folder) / directory
            summary = self._write_shard(local, chunks)
            files = sorted(path.relative_to(folder).as_posix() for path in local.rglob("*") if path.is_file())
            for path in files:
                self._staged.upload(path, Path(folder) / path)
        summary |= {"directory": directory, "files": files}
        self._area.write_json(self._area.shard_key(shard), summary)

    def _directory(self, shard: int) -> str:
        """Where a shard belongs in the index."""
        return f"shards/{shard:05d}"

    def _write_shard(self, directory: Path, chunks: Sequence[Chunk]) -> dict[str, Any]:
        """Writes a shard into a directory, one chunk after another."""
        residual_norms = 0.0
        with ShardWriter(directory, self._codec) as writer:
            for chunk in chunks:
                record = self._area.record(chunk)
                metadata = self._area.documents(chunk).select(["title", "text"])
                data = self._area.store.get(self._area.vectors_key(chunk))
                vectors = np.frombuffer(data, dtype=_COMPONENT).reshape(-1, record.dim)
                tokens = self._codec.encode(vectors)
                assert tokens.residual_norms is not None  # they have just been encoded
                residual_norms += float(tokens.residual_norms.sum(dtype=np.float64))
                writer.add_encoded(record.ids, tokens, record.lengths, metadata)
            manifest = writer.finish()
        return {
            "codec": manifest.codec_sha256,
            "documents": manifest.documents,
            "tokens": manifest.tokens,
            "residual_norms": residual_norms,
            "vector_bytes": sum(f.size for name, f in manifest.files.items() if name not in _NO_VECTORS),
        }

    def _sampled(self, chunk: Chunk, bound: int) -> list[tuple[int, str, NDArray[np.float16]]]:
        """Place, id and vectors of a chunk's documents whose place is below ``bound``.

        They are the first of their chunk, so that only they are read.
        """
        record = self._area.record(chunk)
        places = [sample_place(key, self._config.codec.seed) for key in record.ids]
        count = bisect_left(places, bound)
        if count == 0:
            return []
        tokens = sum(record.lengths[:count])
        size = tokens * record.dim * _COMPONENT.itemsize
        data = self._area.store.get_range(self._area.vectors_key(chunk), 0, size)
        if len(data) != size:
            raise IntegrityError(f"{self._area.vectors_key(chunk)}: {len(data)} bytes, {size} expected")
        vectors = np.frombuffer(data, dtype=_COMPONENT).reshape(tokens, record.dim)
        cuts = np.cumsum(record.lengths[: count - 1])
        return list(zip(places, record.ids, np.split(vectors, cuts), strict=False))

    @cached_property
    def _registry(self) -> Registry:
        return Registry.open(self._recipe.storage)

    @cached_property
    def _staged(self) -> StagedArtifact:
        return StagedArtifact(self._registry.store, self._ref)

    @cached_property
    def _area(self) -> BuildArea:
        return BuildArea(self._registry.store, self._ref)

    @cached_property
    def _model(self) -> ColBERT:
        """What encodes documents, loaded with the first chunk."""
        model = load_model_ref(self._registry, self._model_ref)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @cached_property
    def _codec(self) -> Codec:
        """The codec of this build."""
        return self._staged_codec(self._area.read_json(self._area.codec_key)["files"])

    def _staged_codec(self, files: Sequence[str]) -> Codec:
        """The codec that is staged, every byte checked."""
        parts = self._staged.parts()
        with TemporaryDirectory(prefix="raycolbert-codec-") as folder:
            for path in files:
                entry = parts[path].entry
                data = self._registry.store.get(self._ref.prefix + (entry.key or f"files/{path}"))
                if hashlib.sha256(data).hexdigest() != entry.sha256:
                    raise IntegrityError(f"{self._ref} {path}: the content does not match its SHA-256")
                (Path(folder) / Path(path).name).write_bytes(data)
            return Codec.load(folder)
