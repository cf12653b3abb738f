"""What all new versions of a published index have in common: their model, and how they become visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.artifacts import ArtifactRef
from cluster.manifest import Manifest, Parent
from cluster.report import Report
from cluster.staging import StagedArtifact
from cluster.transfers import transfer
from colbert_core.errors import IndexFormatError
from colbert_core.index.directory import Generation


def model_of(manifest: Manifest) -> ArtifactRef:
    """The model that an index was encoded with.

    Raises:
        IndexFormatError: its manifest names none, or several.
    """
    models = [parent.ref for parent in manifest.parents if parent.ref.kind == "models"]
    if len(models) != 1:
        raise IndexFormatError(
            f"{manifest.ref}: its manifest names {len(models)} models; an index has exactly one"
        )
    return models[0]


def upload_files(staged: StagedArtifact, directory: Path, files: Sequence[str]) -> None:
    """Stages files of a local directory."""
    sizes = {path: (directory / path).stat().st_size for path in files}
    transfer(f"upload {staged.ref}", sizes, lambda path: staged.upload(path, directory / path))


def publish_index(
    staged: StagedArtifact,
    files: Sequence[str],
    parent: Manifest,
    model: ArtifactRef,
    generation: Generation,
    tokens: Mapping[str, int],
    report: Report,
    extra: Mapping[str, Any],
) -> Manifest:
    """Makes a version visible, described as the build describes one.

    Args:
        tokens: of each shard, by its path, deleted documents' included.
    """
    shards = [
        {"directory": entry.path, "documents": entry.documents, "tokens": tokens[entry.path]}
        for entry in generation.shards
    ]
    gone = sum(entry.deleted for entry in generation.shards)
    held = sum(entry.documents for entry in generation.shards)
    report.metrics.update(documents=held - gone, tombstones=gone, shards=len(shards))
    report.details["shards"] = shards
    return staged.commit(
        expected=files,
        parents=[Parent(parent.ref), Parent(model)],
        recipe=parent.recipe,
        fingerprint=staged.ref.version,
        metrics=report.metrics,
        extra={
            "dim": parent.extra.get("dim"),
            "documents": held - gone,
            "tokens": sum(tokens.values()),
            "codec": generation.codec_sha256,
            "shards": shards,
            **extra,
        },
    )
