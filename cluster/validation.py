"""How good a run's exported view is, measured on a labelled source while the run goes on.

Every worker makes a copy of the model with x in fp32, which is what would be published at this step, encodes
its part of the documents and searches them exactly; the best of all parts are ranked together. The module in
training is only read, and random numbers of a step depend on its place in the run alone, so that training
goes on bit for bit as if nothing had been measured (``tests/integration/test_train.py``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cluster.engine import TrainingEngine
from cluster.registry import Registry
from cluster.scorers.encoders import ColBERTEncoder
from cluster.scorers.vectors import KeptVectors, VectorScorer
from cluster.sources import load_source
from cluster.training_figures import WorkerGroup
from cluster.training_job import PhaseJob
from cluster.training_model import exported_model
from colbert_core.allocator import release_freed_memory
from colbert_core.errors import RaycolbertError
from colbert_core.exact import Ranking, TopDocuments
from colbert_core.metric_names import parse_metric
from colbert_core.metrics import evaluate_run


class Validation:
    """Measures a phase's ``validation.metric``; every worker makes one, and all measure together.

    Args:
        job: the phase, which has a ``validation`` section.
        engine: whose x is measured.
        registry: where the start is found, for parameters that are frozen.
        group: the workers.

    Raises:
        DataError: the source is missing or malformed.
    """

    def __init__(self, job: PhaseJob, engine: TrainingEngine, registry: Registry, group: WorkerGroup) -> None:
        assert job.phase.validation is not None  # the caller has looked
        self._settings = job.phase.validation
        self._job, self._engine, self._registry, self._group = job, engine, registry, group
        source = load_source(job.recipe, self._settings.source)
        self._source = source.sampled(self._settings.max_queries, job.recipe.seed)
        self._depth = parse_metric(self._settings.metric)[1]

    def due(self, step: int) -> bool:
        """Is the model of this step measured?"""
        return step % self._settings.every_steps == 0 or step == self._job.phase.steps

    def measure(self) -> dict[str, float]:
        """The metric's mean over the source's labelled queries, as ``<source>/<metric>``; collective.

        Raises:
            RaycolbertError: on all workers, what one of them met, such as a vector that is no number.
        """
        release_freed_memory()  # of steps, whose blocks do not fit what follows, and the other way round
        part: tuple[NDArray[np.int64], NDArray[np.float32]] | RaycolbertError
        try:
            found = self._search()
            part = found.positions, found.scores
        except RaycolbertError as error:
            part = error
        release_freed_memory()
        queries, documents = list(self._source.labelled_queries), list(self._source.corpus)
        top = TopDocuments(len(queries), documents, self._depth)
        for each in self._group.every(part):
            if isinstance(each, RaycolbertError):
                raise each
            top.merge_documents(0, *each)
        run = {query: dict(hits) for query, hits in zip(queries, top.ranking(), strict=True)}
        metric = self._settings.metric
        value = evaluate_run(run, self._source.qrels, [metric])[metric]
        return {f"{self._settings.source}/{metric}": value}

    def _search(self) -> Ranking:
        """The best of this worker's part of the documents; collective."""
        weights = self._engine.averaged_weights()
        model = exported_model(self._registry, self._job.init, weights)
        del weights
        cuts = np.linspace(0, len(self._source.corpus), self._group.count + 1).astype(int).tolist()
        first, last = cuts[self._group.rank : self._group.rank + 2]
        # Each text is met once: keeping vectors would only take memory.
        scorer = VectorScorer("validation", self._source, lambda: ColBERTEncoder(model), KeptVectors(limit=0))
        return scorer.search_span(list(self._source.labelled_queries), self._depth, first, last)
