"""Scorers: teachers, miners of negatives and systems to compare, by one interface."""

from cluster.scorers.api import Candidates, Ensemble, Scorer, combine, minmax, rank
from cluster.scorers.build import build_ensemble, build_scorer, model_scorer

__all__ = [
    "Candidates",
    "Ensemble",
    "Scorer",
    "build_ensemble",
    "build_scorer",
    "combine",
    "minmax",
    "model_scorer",
    "rank",
]
