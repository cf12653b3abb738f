"""Compaction: a published index without additions and deletions, as a new version."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from cluster.artifacts import ArtifactRef
from cluster.config import fingerprint
from cluster.index_versions import model_of, publish_index, upload_files
from cluster.manifest import Manifest
from cluster.progress import progress
from cluster.registry import Registry
from cluster.report import Report
from colbert_core.index import Codec, compact_index, measure_drift
from colbert_core.index.directory import generation_files, open_shards, with_counts


def compacted_ref(source: ArtifactRef, shards: int | None) -> ArtifactRef:
    """The version that compaction makes of an index."""
    return ArtifactRef("indexes", source.name, f"compact-{fingerprint(source.version, shards)}")


def is_compact(manifest: Manifest, shards: int | None) -> bool:
    """Whether a version is as a build leaves it, with so many shards (any number, if None)."""
    if any(path.startswith("generations/") for path in manifest.files):
        return False
    folders = {path.split("/")[1] for path in manifest.files if path.startswith("shards/")}
    return shards is None or shards == len(folders)


def compact_published(
    manifest: Manifest, ref: ArtifactRef, shards: int | None, registry: Registry, report: Report
) -> Manifest:
    """Publishes the live documents of an index as a new version without additions and deletions.

    Its shards are, byte for byte, those that a build of these documents with this codec has. Memory is
    that of 4,096 documents and all ids; the disk holds both indexes for a while.

    Args:
        manifest: of the index.
        ref: the version to publish.
        shards: how many; None for as many as it had before additions.
        registry: where it is.
        report: gets figures and timings.

    Raises:
        VersionExists: somebody else published it meanwhile.
        IndexFormatError: a shard is damaged.
    """
    staged = registry.staging(ref)
    model = model_of(manifest)
    with report.timed("pull"):
        source = registry.pull(manifest.ref)
    codec = Codec.load(source / "codec")
    opened = open_shards(source, codec)
    live = sum(int(np.count_nonzero(shard.live)) for shard in opened)
    report.metrics.update(
        shards_before=len(opened), documents_removed=sum(len(shard) for shard in opened) - live
    )
    with TemporaryDirectory(prefix="raycolbert-compact-") as folder:
        target = Path(folder) / "index"
        with report.timed("compact"), progress() as bar:
            row = bar.add_task("documents copied", total=live)
            generation = compact_index(source, target, shards, progress=lambda count: bar.advance(row, count))
        written = open_shards(target, codec)
        generation = with_counts(generation, written)
        tokens = {f"shards/{shard.directory.name}": shard.manifest.tokens for shard in written}
        files = generation_files(target, generation)
        with report.timed("upload"):
            upload_files(staged, target, files)
        drift = measure_drift(written)
        report.metrics.update(drift=drift.mean_residual, residuals_clipped=drift.beyond)
    with report.timed("publish"):
        return publish_index(staged, files, manifest, model, generation, tokens, report, {})
