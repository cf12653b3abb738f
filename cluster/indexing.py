"""Building an index on Ray: documents to vectors, one codec from a sample of them, shards to storage.

Every step leaves its result in storage: a build that is killed goes on where it was, and an actor that
dies takes nothing with it. No vector passes through the driver.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from cluster.artifacts import ArtifactRef
from cluster.config import IndexConfig, Recipe
from cluster.config.base import fingerprint
from cluster.data_files import DataFiles
from cluster.index_corpus import BuildArea, Chunk, Counts, corpus_files, corpus_state
from cluster.index_worker import IndexWorker
from cluster.manifest import Manifest, Parent
from cluster.registry import Registry
from cluster.report import Report
from cluster.worker_pool import WorkerPool
from colbert_core.errors import DataError, IntegrityError, StorageError

_THREADS = 8


def build_index(
    recipe: Recipe,
    config: IndexConfig,
    ref: ArtifactRef,
    model: ArtifactRef,
    registry: Registry,
    report: Report,
) -> Manifest:
    """Builds and publishes an index; needs a running Ray.

    Args:
        recipe: names the sources.
        config: its index section.
        ref: the version to publish.
        model: a published model.
        registry: where both are.
        report: gets figures and timings.

    Raises:
        DataError: the corpus is empty or malformed, or an id stands for two documents.
        VersionExists: somebody else published it meanwhile.
    """
    staged = registry.staging(ref)
    area = BuildArea(registry.store, ref)
    data = DataFiles(recipe, corpus_files(recipe, config.sources))
    inputs = {"model": str(model), "corpus": corpus_state(recipe, list(data.files))}
    if not staged.begin(fingerprint(inputs)):
        area.clear()
    area.begin(inputs)
    with WorkerPool(
        IndexWorker,
        (recipe, config, ref, model),
        size=config.encode_workers,
        cpus=config.cpus_per_worker,
        gpus=config.gpus_per_worker,
    ) as pool:
        with report.timed("workers"):
            pool.wait()
        with report.timed("documents"):
            chunks = _cut_corpus(recipe, config, pool, area)
        with report.timed("encoding"):
            counts = _encode(pool, area, chunks, report)
        with report.timed("codec"):
            codec = _train_codec(pool, area, chunks, counts.tokens, report)
        with report.timed("shards"):
            shards = _write_shards(pool, area, config, report)
    strangers = [shard["directory"] for shard in shards if shard["codec"] != codec["sha256"]]
    if strangers:
        raise IntegrityError(
            f"{ref}: two builds at once: {', '.join(strangers)} have another codec than the rest"
        )
    files = [*codec["files"], *(path for shard in shards for path in shard["files"])]
    size_of = {path: part.entry.size for path, part in staged.parts().items()}
    total = sum(size_of.get(path, 0) for path in files)
    report.metrics.update(
        documents=counts.documents,
        tokens=counts.tokens,
        truncated_documents=counts.truncated,
        dropped_tokens=counts.dropped_tokens,
        shards=len(shards),
        bytes_per_token=sum(shard["vector_bytes"] for shard in shards) / counts.tokens,
        size_mb=total / 2**20,
        centroids=codec["centroids"],
        sample_tokens=codec["training"]["tokens"],
        residual_norm=sum(shard["residual_norms"] for shard in shards) / counts.tokens,
        residual_norm_of_sample=codec["training"]["residual_norm"],
    )
    report.details["shards"] = [
        {key: shard[key] for key in ("directory", "documents", "tokens")} for shard in shards
    ]
    report.warnings += codec["training"]["notes"]
    with report.timed("publishing"):
        manifest = staged.commit(
            expected=files,
            parents=[Parent(model)],
            recipe=recipe.model_dump(mode="json"),
            fingerprint=data.fingerprint,
            metrics=report.metrics,
            extra={
                "dim": codec["dim"],
                "documents": counts.documents,
                "tokens": counts.tokens,
                "codec": codec["sha256"],
                "shards": report.details["shards"],
                **data.record(),
            },
        )
        # What cannot be removed now is left to garbage collection.
        with suppress(StorageError):
            area.clear()
    return manifest


def _cut_corpus(recipe: Recipe, config: IndexConfig, pool: WorkerPool, area: BuildArea) -> list[Chunk]:
    chunks = area.chunks()
    if chunks is None:
        files = corpus_files(recipe, config.sources)
        pool.run("split", range(len(files)), "corpus files read")
        area.keep_chunks(pool.run("cut", range(config.shards), "shards cut into chunks"))
        chunks = area.chunks()
    if not chunks:
        raise DataError(f"{', '.join(corpus_files(recipe, config.sources))}: the corpus has no documents")
    return chunks


def _encode(pool: WorkerPool, area: BuildArea, chunks: Sequence[Chunk], report: Report) -> Counts:
    done = area.encoded()
    missing = [chunk for chunk in chunks if chunk.name not in done]
    report.metrics["chunks_encoded"] = len(missing)
    report.metrics["chunks_found"] = len(chunks) - len(missing)
    total = Counts()
    with ThreadPoolExecutor(_THREADS) as readers:
        found = [chunk for chunk in chunks if chunk.name in done]
        for counts in readers.map(lambda chunk: area.record(chunk).counts, found):
            total.add(counts)
    weights = [chunk.documents for chunk in missing]
    for counts in pool.run("encode", missing, "documents encoded", weights=weights):
        total.add(counts)
    return total


def _train_codec(
    pool: WorkerPool, area: BuildArea, chunks: Sequence[Chunk], tokens: int, report: Report
) -> dict[str, Any]:
    found = area.store.exists(area.codec_key)
    report.metrics["codec_found"] = float(found)
    if not found:
        pool.run("train_codec", [(list(chunks), tokens)], "codec trained")
    codec: dict[str, Any] = area.read_json(area.codec_key)
    return codec


def _write_shards(
    pool: WorkerPool, area: BuildArea, config: IndexConfig, report: Report
) -> list[dict[str, Any]]:
    shards = range(config.shards)
    missing = [shard for shard in shards if not area.store.exists(area.shard_key(shard))]
    report.metrics["shards_written"] = len(missing)
    report.metrics["shards_found"] = config.shards - len(missing)
    pool.run("write", missing, "shards written")
    return [area.read_json(area.shard_key(shard)) for shard in shards]
