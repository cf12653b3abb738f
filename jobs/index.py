"""Builds the index that the recipe describes: vectors of all documents, compressed, in shards."""

from __future__ import annotations

from cluster.artifacts import base_ref, index_ref
from cluster.config import Recipe
from cluster.data_files import check_same_files
from cluster.index_corpus import corpus_files
from cluster.indexing import build_index
from cluster.models import ensure_base, pinned, resolve_model
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from colbert_core.errors import RaycolbertError
from jobs.launch import main


def run(recipe: Recipe) -> Report:
    """Publishes ``indexes/<index.name>``, unless it exists.

    A build that was killed goes on where it was: vectors that are stored are not made again, the codec
    is not trained again, and finished shards stay as they are.

    Raises:
        ConfigError: the recipe has no index.
        ArtifactNotFound: the model is not published.
        DataError: a corpus is malformed, was changed since the published index was built of it, or one id
            stands for two different documents.
    """
    report = Report(job="index", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    ref = index_ref(recipe)
    config = recipe.index
    assert config is not None  # index_ref has checked
    model = resolve_model(recipe, registry, config.model)
    if registry.exists(ref):
        check_same_files(recipe, registry, ref, corpus_files(recipe, config.sources))
        report.skipped.append(str(ref))
        return report
    if model == base_ref(recipe):
        ensure_base(recipe, registry)
    registry.manifest(model)
    try:
        with ray_session(recipe):
            build_index(recipe, config, ref, model, registry, report)
    except RaycolbertError:
        # Two jobs of one recipe build the same index; the first to finish also clears up behind both.
        if not registry.exists(ref):
            raise
        report.skipped.append(str(ref))
        return report
    report.artifacts.append(str(ref))
    return report


if __name__ == "__main__":
    main("index", run)
