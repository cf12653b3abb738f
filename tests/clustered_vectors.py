"""Random token vectors that cluster as those of texts do, for tests of the index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from colbert_core.config import CodecConfig
from colbert_core.index import Codec, Hit, shard_of, write_shard


@dataclass(frozen=True)
class Corpus:
    """Documents and their unit token vectors.

    Attributes:
        ids: external ids, in no particular order.
        vectors: float32 ``[tokens, dim]``.
        lengths: int64 ``[documents]``.
        metadata: a column ``number`` (int64, as in the id) and a column ``colour`` (string, some null).
    """

    ids: list[str]
    vectors: NDArray[np.float32]
    lengths: NDArray[np.int64]
    metadata: pa.Table

    @property
    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def part(self, documents: Sequence[int] | NDArray[np.int64]) -> Corpus:
        """Some of the documents, in the given order."""
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in documents]
        return Corpus(
            [self.ids[i] for i in documents],
            self.vectors[np.concatenate(rows).astype(int)] if rows else self.vectors[:0],
            self.lengths[np.asarray(documents, dtype=int)],
            self.metadata.take(pa.array(documents, pa.int64())),
        )

    def maxsim(self, query: NDArray[np.float32]) -> NDArray[np.float64]:
        """Exact late interaction of a query ``[length, dim]`` with every document."""
        similarities = self.vectors.astype(np.float64) @ query.astype(np.float64).T
        return np.maximum.reduceat(similarities, self.offsets[:-1], axis=0).sum(axis=1)


def make_corpus(documents: int, *, dim: int = 32, topics: int = 60, seed: int = 0) -> Corpus:
    """Documents of 2 to 20 tokens, about half of them near the document's topic."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((topics, dim))
    lengths = rng.integers(2, 21, documents)
    topic = np.repeat(rng.integers(0, topics, documents), lengths)
    other = rng.integers(0, topics, len(topic))
    nearest = np.where(rng.random(len(topic)) < 0.5, topic, other)
    vectors = centres[nearest] + 0.5 * rng.standard_normal((len(topic), dim))
    numbers = rng.permutation(documents)
    colours = [["red", "green", None][number % 3] for number in numbers]
    metadata = pa.table({"number": pa.array(numbers, pa.int64()), "colour": pa.array(colours, pa.string())})
    return Corpus([f"文書-{number}" for number in numbers], unit(vectors), lengths, metadata)


def make_queries(corpus: Corpus, count: int, *, seed: int = 1) -> list[NDArray[np.float32]]:
    """Queries of 1 to 40 tokens, each a noisy view of some document."""
    rng = np.random.default_rng(seed)
    queries = []
    for _ in range(count):
        document = rng.integers(len(corpus.ids))
        rows = rng.integers(corpus.offsets[document], corpus.offsets[document + 1], rng.integers(1, 41))
        noise = 0.15 * rng.standard_normal((len(rows), corpus.vectors.shape[1]))
        queries.append(unit(corpus.vectors[rows] + noise))
    return queries


def unit(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Vectors of length 1."""
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def train_codec(corpus: Corpus, *, bits: int = 4, centroids: int = 64, seed: int = 0) -> Codec:
    """A codec of the whole corpus."""
    config = CodecConfig(centroids=centroids, residual_bits=bits, kmeans_iterations=4, seed=seed)  # type: ignore[arg-type]
    return Codec.train(corpus.vectors, config, threads=1)


def build(directory: Path, codec: Codec, corpus: Corpus, shards: int = 1) -> Path:
    """Writes an index as the index job does: documents go to shards by a hash of their ids."""
    codec.save(directory / "codec")
    home = np.array([shard_of(name, shards) for name in corpus.ids])
    for shard in range(shards):
        part = corpus.part(np.flatnonzero(home == shard))
        target = directory / "shards" / f"{shard:05d}"
        write_shard(target, codec, part.ids, part.vectors, part.lengths, part.metadata)
    return directory


def recall(found: Sequence[Sequence[Hit]], expected: Sequence[Sequence[str]]) -> float:
    """Mean share of the expected ids that were found."""
    shares = [
        len({hit.id for hit in hits} & set(wanted)) / len(wanted)
        for hits, wanted in zip(found, expected, strict=True)
    ]
    return float(np.mean(shares))
