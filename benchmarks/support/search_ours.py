"""This project's index, driven by the search benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from benchmarks.support.search_engine import Engine, Settings, serve_engine
from benchmarks.support.search_files import VectorFiles
from colbert_core.config import CodecConfig, SearchConfig
from colbert_core.index import Codec, Searcher, ShardWriter, open_index
from colbert_core.index.assignment import COMPARED_WITH_ALL, Assigner

DOCUMENTS_AT_ONCE = 512


class Ours(Engine):
    """One shard; ids are the documents' numbers."""

    def __init__(self) -> None:
        self._searcher: Searcher | None = None

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("raycolbert", "numba", "faiss-cpu", "torch", "numpy")}

    def warm(self, files: VectorFiles, settings: Settings, threads: int) -> None:
        torch.set_num_threads(threads)
        compile_build(files, CodecConfig.model_validate(settings), threads)

    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        build_index(files, index, CodecConfig.model_validate(settings), threads)

    def open(self, index: Path, threads: int) -> None:
        self._searcher = open_index(index, threads=threads)

    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        assert self._searcher is not None  # opened first
        found = self._searcher.search(list(queries), k, SearchConfig.model_validate(settings))
        return [[int(hit.id) for hit in hits] for hits in found]


def compile_build(files: VectorFiles, config: CodecConfig, threads: int) -> None:
    """Compiles clustering and all that encodes, which a machine does once, not once an index."""
    few = files.vectors[:4096]
    small = config.model_copy(update={"centroids": min(512, len(few))})
    Codec.train(few, small, threads=threads).encode(few[:256])
    many = np.random.default_rng(0).integers(-127, 128, (COMPARED_WITH_ALL + 1, few.shape[1]), dtype=np.int8)
    Assigner(many, np.float32(1)).nearest(few[:256].astype(np.float32))


def build_index(
    files: VectorFiles, index: Path, config: CodecConfig, threads: int, metadata: pa.Table | None = None
) -> None:
    """Trains a codec from a sample of the documents, and writes one shard in bounded memory.

    Args:
        files: the vectors.
        index: directory to fill.
        config: of the codec.
        threads: to train with.
        metadata: a row for each document.
    """
    order = np.random.default_rng(config.seed).permutation(len(files.lengths))
    taken = order[np.cumsum(files.lengths[order]) <= max(config.sample_tokens, files.lengths.max())]
    offsets = files.offsets
    sample = np.concatenate([files.vectors[offsets[i] : offsets[i + 1]] for i in np.sort(taken)])
    codec = Codec.train(sample, config, total_tokens=len(files.vectors), threads=threads)
    codec.save(index / "codec")
    with ShardWriter(index / "shards" / "00000", codec) as writer:
        for start in range(0, len(files.lengths), DOCUMENTS_AT_ONCE):
            lengths = files.lengths[start : start + DOCUMENTS_AT_ONCE]
            ids = [str(number) for number in range(start, start + len(lengths))]
            rows = slice(int(offsets[start]), int(offsets[start + len(lengths)]))
            table = None if metadata is None else metadata.slice(start, len(lengths))
            writer.add(ids, files.vectors[rows], lengths, table)
        writer.finish()


if __name__ == "__main__":
    serve_engine(Ours())
