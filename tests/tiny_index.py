"""Small published indexes with a tiny model, for tests of what reads indexes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa

from cluster.artifacts import ArtifactRef
from cluster.manifest import Parent
from cluster.registry import Registry
from colbert_core.config import CodecConfig, ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from colbert_core.index import Codec, write_shard
from tests.tiny_models import tiny_bert_dir

CONFIG = ColBERTConfig(dim=16, query_length=16, document_length=32, min_expansion=2)


@dataclass(frozen=True)
class Document:
    """One document of a test corpus."""

    id: str
    text: str
    title: str | None = None
    topic: str = "none"


def publish_tiny_model(registry: Registry, ref: ArtifactRef, *, seed: int = 0) -> ColBERT:
    """Publishes an untrained model on a tiny backbone."""
    with TemporaryDirectory(prefix="tiny-model-") as folder:
        base = tiny_bert_dir(Path(folder) / "base", seed=seed)
        model = ColBERT.create(base, CONFIG, seed=seed)
        save_model(model, Path(folder) / "model")
        registry.publish(ref, Path(folder) / "model")
    return model


def publish_tiny_index(
    registry: Registry,
    ref: ArtifactRef,
    model: ColBERT,
    model_ref: ArtifactRef,
    documents: Sequence[Document],
    *,
    shards: int = 2,
) -> None:
    """Publishes an index as the index job lays it out; document i goes to shard i modulo ``shards``."""
    vectors = model.encode_documents([document.text for document in documents])
    flat, lengths = vectors.vectors.numpy(), vectors.lengths.numpy()
    config = CodecConfig(centroids=16, kmeans_iterations=2)
    codec = Codec.train(flat, config, total_tokens=len(flat), threads=1)
    with TemporaryDirectory(prefix="tiny-index-") as folder:
        root = Path(folder)
        (root / "codec").mkdir()
        codec.save(root / "codec")
        for shard in range(shards):
            rows = range(shard, len(documents), shards)
            table = pa.table(
                {
                    "title": pa.array([documents[row].title for row in rows], pa.string()),
                    "text": [documents[row].text for row in rows],
                    "topic": [documents[row].topic for row in rows],
                }
            )
            write_shard(
                root / "shards" / f"{shard:05d}",
                codec,
                [documents[row].id for row in rows],
                np.concatenate([vectors[row].numpy() for row in rows]),
                lengths[list(rows)],
                table,
            )
        registry.publish(ref, root, parents=[Parent(model_ref)])
