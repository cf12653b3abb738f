"""From a recipe's scorer configs to scorers."""

from __future__ import annotations

from collections.abc import Mapping

from cluster import config as recipes
from cluster.config import Recipe
from cluster.models import ensure_base, load_model_ref, resolve_model
from cluster.registry import Registry
from cluster.scorers.api import Ensemble, Scorer
from cluster.scorers.bm25 import Bm25Scorer
from cluster.scorers.cross_encoder import CrossEncoder
from cluster.scorers.encoders import ColBERTEncoder, PooledEncoder, VectorScorer
from cluster.scorers.labels import LabelScorer
from cluster.sources import LabelledSource
from colbert_core.encoder import ColBERT
from colbert_core.formats import load_model


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
        return VectorScorer(name, source, ColBERTEncoder(load_colbert(recipe, config.model, registry)))
    return VectorScorer(name, source, PooledEncoder.load(config))


def load_colbert(recipe: Recipe, spec: str, registry: Registry) -> ColBERT:
    """A ColBERT model: 'base', a phase, 'averaged', NAME@VERSION-or-alias, a directory or a hub id.

    The recipe's base is made if it does not exist yet.

    Raises:
        ArtifactNotFound: the recipe's model is not published yet, or there is no such version or alias.
        ModelError: the directory or hub id holds no ColBERT model.
    """
    if spec == "base":
        return load_model_ref(registry, ensure_base(recipe, registry))
    if "@" in spec or spec in ("averaged", *(phase.name for phase in recipe.train)):
        return load_model_ref(registry, resolve_model(recipe, registry, spec))
    return load_model(spec)


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
