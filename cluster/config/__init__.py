"""Recipes: one YAML file that says what every job does.

A recipe is a frozen tree of typed models. Unknown keys, wrong types and impossible combinations are
refused when it is loaded, with the dotted key and the allowed values (:class:`ConfigError`).
"""

from cluster.config.ablation import AblateConfig
from cluster.config.base import Name, fingerprint
from cluster.config.data import (
    BiEncoderScorer,
    Bm25Scorer,
    ColBERTScorer,
    CrossEncoderScorer,
    DataConfig,
    LabelScorer,
    Mining,
    Pool,
    Scorer,
    Scoring,
    Source,
    TokenMaxSimScorer,
    TupleFiles,
    TupleSet,
)
from cluster.config.loading import load_recipe, parse_recipe, refuse_credentials
from cluster.config.recipe import Recipe
from cluster.config.retrieval import EvaluateConfig, Gate, IndexConfig, ServeConfig, System
from cluster.config.session import MlflowConfig, RayConfig, StorageConfig, TrackConfig, WandbConfig
from cluster.config.training import (
    AverageConfig,
    AverageInput,
    CheckpointConfig,
    GreedySoup,
    ModelConfig,
    OptimizerConfig,
    TrainPhase,
)

__all__ = [
    "AblateConfig",
    "AverageConfig",
    "AverageInput",
    "BiEncoderScorer",
    "Bm25Scorer",
    "CheckpointConfig",
    "ColBERTScorer",
    "CrossEncoderScorer",
    "DataConfig",
    "EvaluateConfig",
    "Gate",
    "GreedySoup",
    "IndexConfig",
    "LabelScorer",
    "Mining",
    "MlflowConfig",
    "ModelConfig",
    "Name",
    "OptimizerConfig",
    "Pool",
    "RayConfig",
    "Recipe",
    "Scorer",
    "Scoring",
    "ServeConfig",
    "Source",
    "StorageConfig",
    "System",
    "TokenMaxSimScorer",
    "TrackConfig",
    "TrainPhase",
    "TupleFiles",
    "TupleSet",
    "WandbConfig",
    "fingerprint",
    "load_recipe",
    "parse_recipe",
    "refuse_credentials",
]
