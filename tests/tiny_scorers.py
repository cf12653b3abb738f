"""A source of five documents, and scorers of it."""

from __future__ import annotations

from pathlib import Path

from cluster.config import Scorer
from cluster.registry import Registry
from cluster.scorers import Scorer as ScorerBase
from cluster.scorers import (
    build_scorer,
)
from cluster.sources import LabelledSource
from tests.tiny_data import data_recipe

CORPUS = {
    "d1": "the cat on the mountain",
    "d2": "the dog and the cat and the river",
    "d0": "blue train",
    "d9": "blue train",
    "d5": "music",
}
QUERIES = {"q1": "cat mountain", "q2": "blue blue train", "q3": "paper"}
SOURCE = LabelledSource("words", CORPUS, QUERIES, {"q1": {"d1": 1}, "q2": {"d9": 2}})


def build(config: Scorer, tmp_path: Path, source: LabelledSource | None = SOURCE) -> ScorerBase:
    recipe = data_recipe(tmp_path, scorers={"it": config.model_dump()})
    return build_scorer(recipe, "it", source, Registry.open(recipe.storage))
