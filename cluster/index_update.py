"""New versions of a published index with documents added and deleted.

A published version stays as it is; a change makes a version of its own whose parent it is. Added documents
are encoded and compressed by Ray workers, with the model and the codec of the index, into one delta shard
that goes from them straight to storage. All else is done by the process that asks, on a verified local copy
of the index: it writes bitmaps of the deleted documents and the generation that names the shards.

The files of shards that stay are uploaded again under the new version, since a version's files lie together.
Everything about a new version follows from its parent and the change: a run that was killed, at any moment,
is repeated and goes on with what is uploaded.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pydantic import ValidationError

from cluster.artifacts import ArtifactRef
from cluster.config import IndexConfig, Recipe, Source, fingerprint
from cluster.index_change import IndexChange
from cluster.index_corpus import SCHEMA, BuildArea, Counts
from cluster.index_versions import model_of, publish_index, upload_files
from cluster.index_worker import IndexWorker
from cluster.manifest import Manifest
from cluster.registry import Registry
from cluster.report import Report
from cluster.worker_pool import WorkerPool
from colbert_core.errors import ConfigError, DataError, StorageError
from colbert_core.index import (
    Codec,
    check_metadata,
    commit_change,
    known_documents,
    measure_drift,
)
from colbert_core.index.directory import (
    Generation,
    ShardEntry,
    current_generation,
    generation_files,
    open_shards,
)

# Mean residual of added tokens, in units of the training sample's, above which a user is told.
DRIFT_TOLD = 1.1
# Share of deleted documents, and number of delta shards, from which compaction is recommended.
DELETED_TOLD, DELTAS_TOLD = 0.2, 8

_SOURCE = "additions"


def updated_ref(source: ArtifactRef, change: IndexChange) -> ArtifactRef:
    """The version that a change makes of an index."""
    return ArtifactRef("indexes", source.name, f"update-{fingerprint(source.version, change.digest)}")


def encoding_config(recipe: Recipe, manifest: Manifest) -> IndexConfig:
    """How documents are added to an index: encoded as those there are, by the recipe's workers.

    Raises:
        ConfigError: the index's manifest does not tell how its documents were encoded.
    """
    try:
        built = IndexConfig.model_validate((manifest.recipe or {})["index"])
    except (KeyError, ValidationError):
        raise ConfigError(
            f"{manifest.ref} was not made from a recipe with an 'index' section: how its documents were "
            "encoded is not known, so none can be added"
        ) from None
    spread = ("encode_workers", "cpus_per_worker", "gpus_per_worker", "token_budget")
    given = {name: getattr(recipe.index, name) for name in spread} if recipe.index is not None else {}
    return built.model_copy(update={"sources": (_SOURCE,), "shards": 1, **given})


class DeltaWorker(IndexWorker):
    """The actor that makes a delta shard: as one that builds, but the codec is that of a published index.

    Args:
        recipe: with the added documents as its only source.
        config: see :func:`encoding_config`.
        ref: the version that is made.
        model: what encodes.
        source: the index whose codec compresses.
        directory: where the shard belongs in the index.
    """

    def __init__(
        self,
        recipe: Recipe,
        config: IndexConfig,
        ref: ArtifactRef,
        model: ArtifactRef,
        source: ArtifactRef,
        directory: str,
    ) -> None:
        super().__init__(recipe, config, ref, model)
        self._source = source
        self._delta = directory

    def _directory(self, shard: int) -> str:
        return self._delta

    @cached_property
    def _codec(self) -> Codec:
        files = self._registry.manifest(self._source).files
        codec = [path for path in files if path.startswith("codec/")]
        return Codec.load(self._registry.pull(self._source, paths=codec) / "codec")


@dataclass(frozen=True)
class _Delta:
    """A delta shard in storage: its entry, its files, and figures of it."""

    entry: ShardEntry
    files: tuple[str, ...]
    tokens: int
    residual_norms: float


class IndexUpdate:
    """One update of one index.

    Args:
        recipe: names storage, data root and workers.
        manifest: of the index that is changed.
        change: what to do.
        registry: where it is.
        report: gets figures and timings.

    Raises:
        ConfigError, DataError, IndexFormatError: the change cannot be made; nothing has been written.
    """

    def __init__(
        self, recipe: Recipe, manifest: Manifest, change: IndexChange, registry: Registry, report: Report
    ) -> None:
        self.ref = updated_ref(manifest.ref, change)
        self._recipe, self._manifest, self._change = recipe, manifest, change
        self._registry, self._report = registry, report
        self._model = model_of(manifest)
        with report.timed("pull"):
            self._copy = registry.pull(manifest.ref)
        self._codec = Codec.load(self._copy / "codec")
        self._shards = open_shards(self._copy, self._codec)
        generation = current_generation(self._copy, self._codec)
        self._name = f"{generation.number + 1:05d}-{change.digest}"
        self._known = known_documents(self._copy, [*change.deleted, *change.added])
        self._vanishing = change.vanishing(self._known)
        if change.additions is not None:
            self._config = encoding_config(recipe, manifest)
            try:
                check_metadata(self._copy, SCHEMA.remove(0))
            except DataError as error:
                raise DataError(f"{change.additions}: cannot be added to {manifest.ref}: {error}") from None

    def run(self) -> Manifest:
        """Makes the new version and publishes it; needs a running Ray if documents are added.

        Raises:
            DataError: a document cannot be encoded.
            VersionExists: somebody else published it meanwhile.
        """
        report, change = self._report, self._change
        staged = self._registry.staging(self.ref)
        area = BuildArea(self._registry.store, self.ref)
        delta = None if change.additions is None else self._encode(area)
        with TemporaryDirectory(prefix="raycolbert-update-") as folder, report.timed("upload"):
            work = Path(folder) / "index"
            _mirror(self._copy, work)
            generation = commit_change(
                work,
                change.digest,
                deleted=self._vanishing,
                delta=None if delta is None else delta.entry,
            )
            files = generation_files(work, generation)
            upload_files(staged, work, files)
        self._tell(generation, delta)
        tokens = {
            shard.directory.relative_to(self._copy).as_posix(): shard.manifest.tokens
            for shard in self._shards
        }
        if delta is not None:
            tokens[delta.entry.path] = delta.tokens
        with report.timed("publish"):
            manifest = publish_index(
                staged,
                [*files, *(delta.files if delta is not None else ())],
                self._manifest,
                self._model,
                generation,
                tokens,
                report,
                {"change": change.digest},
            )
            with suppress(StorageError):
                area.clear()
        return manifest

    def _encode(self, area: BuildArea) -> _Delta:
        """Encodes the added documents and stages their shard, as far as that is not done yet."""
        report, change = self._report, self._change
        assert change.additions is not None
        directory = f"deltas/{self._name}"
        only = Source(corpus=change.additions, queries=change.additions, qrels=change.additions)
        data = self._recipe.data.model_copy(update={"sources": {_SOURCE: only}})
        recipe = self._recipe.model_copy(update={"data": data})
        area.begin({"source": str(self._manifest.ref), "change": change.digest})
        arguments = (recipe, self._config, self.ref, self._model, self._manifest.ref, directory)
        found = area.store.exists(area.shard_key(0))
        if not found:
            with WorkerPool(
                DeltaWorker,
                arguments,
                size=self._config.encode_workers,
                cpus=self._config.cpus_per_worker,
                gpus=self._config.gpus_per_worker,
            ) as pool:
                with report.timed("documents"):
                    if area.chunks() is None:
                        pool.run("split", [0], "files of added documents read")
                        area.keep_chunks(pool.run("cut", [0], "shards cut into chunks"))
                chunks = area.chunks() or []
                done = area.encoded()
                missing = [chunk for chunk in chunks if chunk.name not in done]
                report.metrics["chunks_encoded"] = len(missing)
                report.metrics["chunks_found"] = len(chunks) - len(missing)
                with report.timed("encoding"):
                    weights = [chunk.documents for chunk in missing]
                    pool.run("encode", missing, "documents encoded", weights=weights)
                with report.timed("shard"):
                    pool.run("write", [0], "delta shard written")
        counts = Counts()
        for chunk in area.chunks() or ():
            counts.add(area.record(chunk).counts)
        shard: dict[str, Any] = area.read_json(area.shard_key(0))
        report.metrics.update(
            delta_found=float(found),
            truncated_documents=counts.truncated,
            dropped_tokens=counts.dropped_tokens,
        )
        entry = ShardEntry(path=shard["directory"], documents=shard["documents"])
        return _Delta(entry, tuple(shard["files"]), shard["tokens"], shard["residual_norms"])

    def _tell(self, generation: Generation, delta: _Delta | None) -> None:
        """Figures of the change, and how the codec fits."""
        report, change = self._report, self._change
        replaced = sum(key in self._known for key in change.added)
        report.metrics.update(
            added=len(change.added) - replaced,
            replaced=replaced,
            deleted=len(self._vanishing) - replaced,
        )
        trained = float(self._codec.training["residual_norm"])
        report.metrics["residual_norm_of_sample"] = trained
        if delta is not None:
            mean = delta.residual_norms / delta.tokens
            report.metrics.update(tokens_added=delta.tokens, residual_norm_added=mean)
            report.metrics["drift_added"] = mean / trained if trained else 1.0
            if mean > DRIFT_TOLD * trained:
                report.warnings.append(
                    f"the codec fits the added documents less well than those it was trained on: their mean "
                    f"residual is {mean:.3f}, {mean / trained:.2f} times the sample's; if there are many of "
                    "them, build the index anew"
                )
        drift = measure_drift(self._shards)
        report.metrics.update(drift_before=drift.mean_residual, residuals_clipped=drift.beyond)
        held = sum(entry.documents for entry in generation.shards)
        gone = sum(entry.deleted for entry in generation.shards)
        deltas = sum(entry.path.startswith("deltas/") for entry in generation.shards)
        if held and (gone / held > DELETED_TOLD or deltas >= DELTAS_TOLD):
            report.warnings.append(
                f"{gone} of {held} documents are deleted and {deltas} shards are additions: compact the index"
            )


def _mirror(source: Path, target: Path) -> None:
    """A directory of links to all files of another: what is added to it is not added to that."""
    for path in source.rglob("*"):
        if path.is_file():
            link = target / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
