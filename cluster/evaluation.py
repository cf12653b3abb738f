"""Retrieval systems over labelled sources: runs, metrics, and a cache of both in storage."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.artifacts import ArtifactRef, index_ref, scorer_identity
from cluster.config import Recipe, System, fingerprint
from cluster.data_files import DataFiles, scorer_files, source_files
from cluster.models import load_model_ref, resolve_model
from cluster.registry import Registry
from cluster.scorers import Ensemble, Scorer, build_scorer, model_scorer
from cluster.scorers.encoders import ColBERTEncoder
from cluster.sources import LabelledSource, load_source
from colbert_core.config import SearchConfig
from colbert_core.errors import ConfigError, DataError
from colbert_core.metric_names import parse_metric
from colbert_core.metrics import per_query, read_trec_run, write_trec_run

Run = Mapping[str, Mapping[str, float]]
# Metric to query id to value.
Values = dict[str, dict[str, float]]

# Documents kept per query where no recipe section says otherwise.
DEPTH = 100


class Evaluator:
    """Runs systems over one source; scorers are built once, and finished results are not made again.

    A result is kept in storage under ``evaluations/<recipe>/<fingerprint>/``: the run in TREC format and
    the values per query. The fingerprint covers the system, the source's content and the depth.

    Args:
        recipe: names systems' scorers and models, and where the data are.
        registry: where models and indexes are found.
        source_name: data source to evaluate on; it is loaded when it is first needed.
        depth: documents kept per query.
        max_queries: only a sample of the labelled queries, chosen by the recipe's seed; default: all.
    """

    def __init__(
        self,
        recipe: Recipe,
        registry: Registry,
        source_name: str,
        depth: int = DEPTH,
        max_queries: int | None = None,
    ) -> None:
        self.recipe = recipe
        self.registry = registry
        self.source_name = source_name
        self.depth = depth
        self.max_queries = max_queries
        self._source: LabelledSource | None = None
        self._scorers: dict[str, Scorer] = {}

    @property
    def source(self) -> LabelledSource:
        if self._source is None:
            source = load_source(self.recipe, self.source_name)
            self._source = source.sampled(self.max_queries, self.recipe.seed)
        return self._source

    def key(self, system: System) -> str:
        """Where the system's results are kept in storage, without a closing slash."""
        return self._key(self._identity(system))

    def values(self, system: System, metrics: Sequence[str]) -> tuple[Values, bool]:
        """Each metric of each labelled query, and whether it was known already.

        Raises:
            ConfigError: the system cannot search, or its index is of another model or source.
            ArtifactNotFound: its model or index is not published.
        """
        return self._cached(self._identity(system), metrics, lambda: self.run(system))

    def model_values(self, ref: ArtifactRef, metrics: Sequence[str]) -> tuple[Values, bool]:
        """The same for a published model, searched exactly."""
        return self._cached(_model_identity(ref), metrics, lambda: self._run_model(ref))

    def knows(self, system: System, metrics: Sequence[str]) -> bool:
        """Would :meth:`values` answer without any work?"""
        return self.registry.store.exists(_values_key(self.key(system), metrics))

    def knows_model(self, ref: ArtifactRef, metrics: Sequence[str]) -> bool:
        """Would :meth:`model_values` answer without any work?"""
        return self.registry.store.exists(_values_key(self._key(_model_identity(ref)), metrics))

    def run(self, system: System) -> Run:
        """The ``depth`` best documents of every labelled query: query id to document id to score."""
        if system.scorer is not None:
            return self._searched(self._scorer(system.scorer))
        if system.ensemble is not None:
            members = {name: (self._scorer(name), weight) for name, weight in system.ensemble.items()}
            return self._searched(Ensemble("ensemble", self.source, members))
        assert system.model is not None  # a system is one of the three
        ref = resolve_model(self.recipe, self.registry, system.model)
        return self._run_index(ref) if system.index else self._run_model(ref)

    def _run_model(self, ref: ArtifactRef) -> Run:
        return self._searched(model_scorer(self.recipe, str(ref), self.source, ref, self.registry))

    def _run_index(self, model: ArtifactRef) -> Run:
        from colbert_core.index import open_index

        searcher = open_index(self.registry.pull(self._index_of(model)))
        encoder = ColBERTEncoder(load_model_ref(self.registry, model))
        queries = encoder.queries(list(self.source.labelled_queries.values())).vectors
        settings = self.recipe.serve.search if self.recipe.serve else SearchConfig()
        hits = searcher.search([vectors.numpy() for vectors in queries], self.depth, settings)
        return {
            query: {hit.id: float(hit.score) for hit in found}
            for query, found in zip(self.source.labelled_queries, hits, strict=True)
        }

    def _index_of(self, model: ArtifactRef) -> ArtifactRef:
        """The recipe's index, if it is one of this model and covers the source."""
        ref, config = index_ref(self.recipe), self.recipe.index
        assert config is not None  # index_ref has checked
        indexed = resolve_model(self.recipe, self.registry, config.model)
        if indexed != model:
            raise ConfigError(f"the recipe's index is of {indexed}, and cannot be searched with {model}")
        if self.source_name not in config.sources:
            raise ConfigError(
                f"the recipe's index does not hold source {self.source_name!r}; "
                f"it holds {', '.join(config.sources)}"
            )
        return ref

    def _scorer(self, name: str) -> Scorer:
        if name not in self._scorers:
            self._scorers[name] = build_scorer(self.recipe, name, self.source, self.registry)
        return self._scorers[name]

    def _searched(self, scorer: Scorer) -> Run:
        query_ids = list(self.source.labelled_queries)
        ranking = scorer.search(query_ids, self.depth)
        return {query: dict(hits) for query, hits in zip(query_ids, ranking, strict=True)}

    def _cached(self, identity: Any, metrics: Sequence[str], run: Any) -> tuple[Values, bool]:
        store, key = self.registry.store, self._key(identity)
        values_key = _values_key(key, metrics)
        if store.exists(values_key):
            return json.loads(store.get(values_key)), True
        with tempfile.TemporaryDirectory(prefix="raycolbert-run-") as folder:
            path = Path(folder) / "run.trec"
            known = store.exists(f"{key}/run.trec")
            if known:
                path.write_bytes(store.get(f"{key}/run.trec"))
                found = read_trec_run(path)
            else:
                self._check_ids()
                found = run()
                write_trec_run(path, found)
                store.upload(f"{key}/run.trec", path)
        values = per_query(found, self.source.qrels, metrics)
        store.put(values_key, json.dumps(values).encode())
        return values, known

    def _check_ids(self) -> None:
        """Refuses before a search what its run file could not carry."""
        source = self.source
        for kind, names in (("query", source.labelled_queries), ("document", source.corpus)):
            for name in names:
                if name.split() != [name]:
                    raise DataError(
                        f"source {self.source_name!r}: {kind} id {name!r}: an evaluated source's ids are not "
                        "empty and hold no white space, which TREC run files cannot carry"
                    )

    def _identity(self, system: System) -> Any:
        """Plain data that determines what a system finds."""
        if system.scorer is not None:
            return ["scorer", self._scorer_identity(system.scorer)]
        if system.ensemble is not None:
            members = [
                (self._scorer_identity(name), weight) for name, weight in sorted(system.ensemble.items())
            ]
            return ["ensemble", members]
        assert system.model is not None
        model = resolve_model(self.recipe, self.registry, system.model)
        identity = _model_identity(model)
        if system.index:
            settings = self.recipe.serve.search if self.recipe.serve else SearchConfig()
            identity += [str(self._index_of(model)), settings.model_dump(mode="json")]
        return identity

    def _scorer_identity(self, name: str) -> Any:
        plain = scorer_identity(self.recipe, name)
        if plain["kind"] == "colbert" and "@" in plain["model"]:
            # An alias may have moved since.
            plain["model"] = str(resolve_model(self.recipe, self.registry, plain["model"]))
        files = DataFiles(self.recipe, scorer_files(self.recipe, [name]))
        return [plain, files.fingerprint] if files.files else plain

    def _key(self, identity: Any) -> str:
        content = DataFiles(self.recipe, source_files(self.recipe, self.source_name)).fingerprint
        sample = [] if self.max_queries is None else [self.max_queries, self.recipe.seed]
        digest = fingerprint(identity, content, self.depth, *sample)
        return f"evaluations/{self.recipe.name}/{digest}"


def evaluate_model(
    recipe: Recipe, registry: Registry, ref: ArtifactRef, source_name: str, metric: str
) -> float:
    """The mean of a metric over a source's labelled queries, for a published model searched exactly.

    Raises:
        ArtifactNotFound: the model is not published.
        ConfigError: there is no such metric.
    """
    depth = max(recipe.evaluate.depth if recipe.evaluate else DEPTH, parse_metric(metric)[1])
    values, _ = Evaluator(recipe, registry, source_name, depth).model_values(ref, [metric])
    return mean(values[metric])


def mean(values: Mapping[str, float]) -> float:
    """The mean over queries."""
    return sum(values.values()) / len(values)


def _model_identity(ref: ArtifactRef) -> list[Any]:
    return ["model", str(ref)]


def _values_key(key: str, metrics: Sequence[str]) -> str:
    return f"{key}/values-{fingerprint(sorted(metrics))}.json"
