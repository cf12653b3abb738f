"""From a recipe's scorer configs to scorers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster import config as recipes
from cluster.artifacts import ArtifactRef, is_own_model
from cluster.config import Recipe
from cluster.models import ensure_base, load_model_ref, resolve_model
from cluster.registry import Registry
from cluster.scorers.api import Ensemble, Scorer
from cluster.scorers.bm25 import Bm25Scorer
from cluster.scorers.cross_encoder import CrossEncoder
from cluster.scorers.encoders import ColBERTEncoder, PooledEncoder
from cluster.scorers.labels import LabelScorer
from cluster.scorers.vectors import VectorScorer, kept_vectors
from cluster.sources import LabelledSource
from colbert_core.formats import load_model
from colbert_core.pretrained import resolve_base


def build_scorer(recipe: Recipe, name: str, source: LabelledSource | None, registry: Registry) -> Scorer:
    """The scorer that ``scorers.<name>`` of the recipe describes.

    Args:
        recipe: the recipe.
        name: key of ``recipe.scorers``.
        source: what it works on; None for texts that come with each call, which bm25 and labels refuse.
        registry: where ColBERT models are found.

    Raises:
        ConfigError: the kind needs a source, or the model does not fit the config.
        ModelError: the model cannot be loaded.
    """
    config = recipe.scorers[name]
    if isinstance(config, recipes.Bm25Scorer):
        return Bm25Scorer(name, config, source)
    if isinstance(config, recipes.LabelScorer):
        return LabelScorer(name, source)
    if isinstance(config, recipes.CrossEncoderScorer):
        return CrossEncoder(name, config, source)
    if isinstance(config, recipes.ColBERTScorer):
        spec = config.model
        if (ref := _published(recipe, spec, registry)) is not None:
            return model_scorer(recipe, name, source, ref, registry)
        return VectorScorer(
            name, source, lambda: ColBERTEncoder(load_model(spec)), kept_vectors(_of_base(spec, ""))
        )
    encoder = config  # of a narrower type than the recipe's scorers
    kept = kept_vectors(_of_base(config.model, config.model_dump_json()))
    return VectorScorer(name, source, lambda: PooledEncoder.load(encoder), kept)


def model_scorer(
    recipe: Recipe, name: str, source: LabelledSource | None, ref: ArtifactRef, registry: Registry
) -> VectorScorer:
    """A scorer of a published model; the recipe's base is made if it does not exist yet.

    Raises:
        ArtifactNotFound: the model is not published.
    """
    if ref == resolve_model(recipe, registry, "base"):
        ensure_base(recipe, registry)
    registry.manifest(ref)  # one that is not published is told of now
    return VectorScorer(
        name,
        source,
        lambda: ColBERTEncoder(load_model_ref(registry, ref)),
        kept_vectors(f"{recipe.storage.root} {ref}"),
    )


def _published(recipe: Recipe, spec: str, registry: Registry) -> ArtifactRef | None:
    """The version that a spec names: 'base', a phase, 'averaged', NAME@VERSION-or-alias; else None."""
    return resolve_model(recipe, registry, spec) if "@" in spec or is_own_model(recipe, spec) else None


def _of_base(base: str, settings: str) -> str:
    """An identity of a model in a directory, which may change, or on the hub."""
    folder = Path(resolve_base(base))
    files = sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    return "\n".join([base, settings, *stamps])


def build_ensemble(
    recipe: Recipe,
    name: str,
    weights: Mapping[str, float],
    source: LabelledSource | None,
    registry: Registry,
) -> Ensemble:
    """Several scorers of the recipe as one, see :class:`~cluster.scorers.api.Ensemble`."""
    members = {
        member: (build_scorer(recipe, member, source, registry), weight) for member, weight in weights.items()
    }
    return Ensemble(name, source, members)
