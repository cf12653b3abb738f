"""The human relevance labels as a scorer."""

from __future__ import annotations

import numpy as np

from cluster.scorers.api import Candidates, Scorer, Scores
from cluster.sources import LabelledSource


class LabelScorer(Scorer):
    """1 for a document that is labelled relevant to the query, else 0."""

    def __init__(self, name: str, source: LabelledSource | None) -> None:
        super().__init__(name, source)
        self.require_source()

    def score_candidates(self, candidates: Candidates) -> Scores:
        qrels = self.require_source().qrels
        return [
            np.asarray([document in qrels.get(query, {}) for document in ids], dtype=np.float32)
            for query, ids in zip(candidates.query_ids, candidates.document_ids, strict=True)
        ]
