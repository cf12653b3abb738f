"""Evaluation: what the systems find, what is kept of it, and what is compared with what."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import ArtifactRef, base_ref
from cluster.config import AverageConfig, IndexConfig, Recipe, System
from cluster.evaluation import Evaluator, evaluate_model, mean
from cluster.models import ensure_base
from cluster.registry import Registry
from cluster.scorers import build_scorer
from cluster.sources import load_source
from colbert_core.errors import ArtifactNotFound, ConfigError, DataError
from colbert_core.metrics import evaluate_run, paired_bootstrap, per_query, read_trec_run
from jobs import evaluate
from tests.tiny_data import data_recipe, word_source, write_source
from tests.tiny_models import tiny_bert_dir

METRICS = ("nDCG@10", "R@1")
SYSTEMS = {
    "words": {"scorer": "bm25"},
    "states": {"scorer": "states"},
    "sum": {"ensemble": {"bm25": 1.0, "people": 1.0}},
    "start": {"model": "base"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    word_source(folder / "words")
    word_source(folder / "other", seed=1, documents=20, queries=10)
    tiny_bert_dir(folder / "bert")
    return folder


def recipe(root: Path, store: Path, **evaluate_keys: object) -> Recipe:
    return data_recipe(
        root,
        storage={"root": str(store / "store"), "cache_dir": str(store / "cache")},
        model={"base": str(root / "bert")},
        scorers={
            "bm25": {"kind": "bm25", "tokenizer": "whitespace"},
            "states": {"kind": "token_maxsim", "model": str(root / "bert")},
            "people": {"kind": "labels"},
        },
        evaluate={"sources": ["words", "other"], "systems": SYSTEMS, "metrics": METRICS} | evaluate_keys,
    )


def test_the_job_scores_every_system_and_source(root: Path, tmp_path: Path) -> None:
    given = recipe(root, tmp_path, baseline="words")
    report = evaluate.run(given)
    details = report.details
    assert details["queries"] == {"words": 30, "other": 10}
    source = load_source(given, "words")
    registry = Registry.open(given.storage)
    ranking = build_scorer(given, "bm25", source, registry).search(list(source.queries), 100)
    run = {query: dict(hits) for query, hits in zip(source.queries, ranking, strict=True)}
    expected = evaluate_run(run, source.qrels, METRICS)
    assert details["scores"]["words"]["words"] == pytest.approx(expected)
    assert report.metrics["words/words/nDCG@10"] == pytest.approx(expected["nDCG@10"])
    # With the labels as a member, the labelled document always wins.
    assert details["scores"]["words"]["sum"]["R@1"] == 1.0 > expected["R@1"]
    # Random weights still find shared words, but not as well as BM25.
    assert 0.1 < details["scores"]["words"]["states"]["nDCG@10"] < expected["nDCG@10"]
    assert set(details["intervals"]["words"]) == {"states", "sum", "start"}
    difference, low, high = details["intervals"]["words"]["sum"]["R@1"]
    assert difference == pytest.approx(1.0 - expected["R@1"])
    assert low <= difference <= high
    # The run file holds what the figures are made of.
    path = tmp_path / "run.trec"
    path.write_bytes(registry.store.get(details["runs"]["words"]["words"]))
    assert read_trec_run(path) == {query: pytest.approx(hits) for query, hits in run.items()}


def test_intervals_are_those_of_the_per_query_values(root: Path, tmp_path: Path) -> None:
    given = recipe(root, tmp_path, baseline="words", sources=["words"])
    found = evaluate.run(given).details["intervals"]["words"]["states"]["R@1"]
    evaluator = Evaluator(given, Registry.open(given.storage), "words")
    values = {
        name: evaluator.values(System.model_validate(SYSTEMS[name]), METRICS)[0]["R@1"]
        for name in ("words", "states")
    }
    assert found == list(paired_bootstrap(values["states"], values["words"], seed=given.seed))


def test_only_what_changed_is_evaluated_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, str]] = []
    original = Evaluator.run

    def recorded(self: Evaluator, system: System) -> object:
        ran.append((self.source_name, system.scorer or system.model or "ensemble"))
        return original(self, system)

    monkeypatch.setattr(Evaluator, "run", recorded)
    first = evaluate.run(recipe(root, tmp_path))
    assert len(ran) == 8
    ran.clear()
    again = evaluate.run(recipe(root, tmp_path))
    assert not ran
    assert again.details["scores"] == first.details["scores"]
    assert sorted(again.skipped) == sorted(first.artifacts)
    # Another metric is computed from the run that is kept.
    more = evaluate.run(recipe(root, tmp_path, metrics=["R@3"]))
    assert not ran
    assert more.metrics["words/words/R@3"] >= first.metrics["words/words/R@1"]
    # Another scorer setting concerns the systems that use the scorer.
    given = recipe(root, tmp_path)
    changed = given.scorers | {"bm25": given.scorers["bm25"].model_copy(update={"b": 0.9})}
    evaluate.run(given.model_copy(update={"scorers": changed}))
    assert sorted(ran) == [("other", "bm25"), ("other", "ensemble"), ("words", "bm25"), ("words", "ensemble")]
    ran.clear()
    evaluate.run(recipe(root, tmp_path, depth=50, sources=["other"]))
    assert len(ran) == 4


def test_evaluate_model_is_the_model_system_and_shares_its_result(root: Path, tmp_path: Path) -> None:
    given = recipe(root, tmp_path, sources=["words"], systems={"start": {"model": "base"}})
    registry = Registry.open(given.storage)
    with pytest.raises(ArtifactNotFound):
        evaluate_model(given, registry, ArtifactRef("models", "tiny", "nothing"), "words", "R@1")
    scores = evaluate.run(given).details["scores"]["words"]["start"]
    assert evaluate_model(given, registry, base_ref(given), "words", "nDCG@10") == scores["nDCG@10"]
    evaluator = Evaluator(given, registry, "words")
    values, known = evaluator.model_values(base_ref(given), METRICS)
    assert known
    assert mean(values["R@1"]) == scores["R@1"]
    run = evaluator.run(System(model="base"))
    assert values == per_query(run, evaluator.source.qrels, METRICS)
    assert all(len(hits) == 40 and np.isfinite(list(hits.values())).all() for hits in run.values())


def test_impossible_evaluations_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no 'evaluate' section"):
        evaluate.run(recipe(root, tmp_path).model_copy(update={"evaluate": None}))
    with pytest.raises(ConfigError, match="unknown metric 'nDCG'"):
        evaluate.run(recipe(root, tmp_path, metrics=["nDCG"]))
    with pytest.raises(ConfigError, match=r"evaluate\.systems\.people: 'people' is of kind labels"):
        evaluate.run(recipe(root, tmp_path, systems={"people": {"scorer": "people"}}))
    given = recipe(root, tmp_path, systems={"fast": {"model": "base", "index": True}})
    with pytest.raises(ConfigError, match="no 'index' section"):
        evaluate.run(given)
    other_model = IndexConfig(name="i", model="averaged", sources=("words",))
    averaged = AverageConfig.model_validate({"inputs": [{"model": "tiny@v1"}]})
    with pytest.raises(ConfigError, match="the recipe's index is of models/tiny@averaged"):
        evaluate.run(given.model_copy(update={"index": other_model, "average": averaged}))
    other_source = IndexConfig(name="i", model="base", sources=("other",))
    with pytest.raises(ConfigError, match="does not hold source 'words'; it holds other"):
        evaluate.run(given.model_copy(update={"index": other_source}))


def test_a_sample_of_the_questions_depends_on_their_ids_alone(root: Path, tmp_path: Path) -> None:
    given = recipe(root, tmp_path, sources=["words"], max_queries=7)
    report = evaluate.run(given)
    assert report.details["queries"] == {"words": 7}
    registry = Registry.open(given.storage)
    few, more = (Evaluator(given, registry, "words", max_queries=count) for count in (7, 12))
    chosen = list(few.source.labelled_queries)
    assert set(chosen) < set(more.source.labelled_queries)
    assert chosen != list(more.source.labelled_queries)[:7], "the first of the file are no sample"
    system = System.model_validate(SYSTEMS["words"])
    whole = Evaluator(given, registry, "words").values(system, METRICS)[0]["R@1"]
    sampled = few.values(system, METRICS)[0]["R@1"]
    assert sampled == {query: whole[query] for query in chosen}
    assert report.metrics["words/words/R@1"] == pytest.approx(mean(sampled))
    # All of them is no sample, whatever the number says.
    assert len(Evaluator(given, registry, "words", max_queries=999).source.labelled_queries) == len(whole)


def test_ids_that_no_run_file_can_carry_are_named_before_the_search(root: Path, tmp_path: Path) -> None:
    documents = [{"_id": "a b", "title": None, "text": "cat"}, {"_id": "c", "title": None, "text": "dog"}]
    write_source(root / "spaced", documents, [{"_id": "q", "text": "cat"}], [("q", "c", 1)])
    message = r"source 'spaced': document id 'a b': .* hold no white space"
    with pytest.raises(DataError, match=message):
        evaluate.run(recipe(root, tmp_path, sources=["spaced"]))


def test_a_metric_may_look_further_down_than_what_is_kept(root: Path, tmp_path: Path) -> None:
    """As 'average' asks for one: the search is as deep as its metric then."""
    given = recipe(root, tmp_path, metrics=["R@1"], depth=2)
    registry = Registry.open(given.storage)
    start = ensure_base(given, registry)
    everything = len(load_source(given, "words").corpus)
    assert evaluate_model(given, registry, start, "words", f"R@{everything}") == 1.0
