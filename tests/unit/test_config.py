"""Recipes: which keys and values are refused, and how it is said."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from cluster.config import ServeConfig, parse_recipe
from colbert_core.config import LossConfig
from colbert_core.errors import ConfigError
from tests.recipe_tree import FILES, TREE


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The recipe above with one value replaced; None removes the key."""
    tree = deepcopy(TREE)
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    if value is None:
        del node[last]
    return tree


def refused(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_recipe(with_value(key, value), origin="r.yaml")
    message = str(caught.value)
    assert message.startswith("r.yaml: ")
    return message


def test_the_recipe_of_these_tests_is_valid_and_frozen() -> None:
    recipe = parse_recipe(TREE)
    with pytest.raises(ValueError, match="frozen"):
        recipe.train[0].steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "named", "allowed"),
    [
        ("typo", "typo", "average, data, evaluate"),
        ("storage.rot", "storage.rot", "request_timeout_s, root, single_writer"),
        ("model.colbert.dims", "model.colbert.dims", "attend_to_expansion, dim, do_lower_case"),
        ("data.sources.train.corps", "data.sources.train.corps", "corpus, qrels, queries"),
        ("data.tuples.mined.mine.pools.0.tke", "data.tuples.mined.mine.pools.0.tke", "ranks, scorer, take"),
        ("scorers.bm25.k3", "scorers.bm25.bm25.k3", "b, k1, kind, tokenizer"),
        ("train.1.stpes", "train.1.stpes", "seed, steps, threads_per_worker"),
        ("train.0.optimizer.learning_rate", "train.0.optimizer.learning_rate", "eps, lr, name"),
        ("average.inputs.0.stp", "average.inputs.0.stp", "best, last, metric, model, phase, source, step"),
        ("evaluate.systems.start.modle", "evaluate.systems.start.modle", "ensemble, index, model, scorer"),
        ("serve.search.prbes", "serve.search.prbes", "candidates, probes, rerank"),
    ],
)
def test_an_unknown_key_is_named_with_those_allowed_in_its_place(key: str, named: str, allowed: str) -> None:
    message = refused(key, 1)
    assert f"unknown key '{named}'; allowed here: " in message
    assert allowed in message


def test_every_unknown_key_is_named_at_once() -> None:
    tree = with_value("typo", 1)
    tree["train"][0]["stpes"] = 2
    with pytest.raises(ConfigError, match=r"unknown key 'train\.0\.stpes'.*; unknown key 'typo'"):
        parse_recipe(tree)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("train.0.steps", "many", "train.0.steps: Input should be a valid integer"),
        ("train.0.steps", 2.5, "train.0.steps: Input should be a valid integer"),
        ("train.0.steps", 0, "train.0.steps: Input should be greater than or equal to 1 (given: 0)"),
        ("train.0.data", "mined", "train.0.data: Input should be a valid tuple (given: 'mined')"),
        ("train.0.precision", "fp16", "Input should be 'auto', 'fp32', 'bf16' or 'autocast'"),
        ("train.0.zero_stage", 4, "train.0.zero_stage: Input should be 0, 1, 2 or 3"),
        ("train.0", 3, "train.0: Input should be a valid dictionary"),
        ("storage", "store", "storage: Input should be a valid dictionary"),
        ("storage.root", None, "storage.root: Field required"),
        ("scorers.bm25.kind", "bm26", "'bm25', 'bi_encoder', 'cross_encoder', 'colbert'"),
        ("schema_version", 2, "schema_version: Input should be 1"),
        ("serve.port", 70_000, "serve.port: Input should be less than or equal to 65535"),
        ("name", "a/b", "name: String should match pattern"),
        ("data.sources", {"../x": FILES}, "String should match pattern"),
        ("average.inputs.0.step", "first", "average.inputs.0.step"),
        ("index.codec.residual_bits", 3, "index.codec.residual_bits: Input should be 2, 4 or 8"),
        ("seed", -1, "seed: Input should be greater than or equal to 0"),
        ("train.0.seed", -1, "train.0.seed: Input should be greater than or equal to 0"),
        ("index.codec.seed", -1, "index.codec.seed: Input should be greater than or equal to 0"),
        ("data.tuples.mined.mine.seed", -1, "mine.seed: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_type_or_value_is_named_with_its_key(key: str, value: Any, message: str) -> None:
    assert message in refused(key, value)


def test_pca_needs_a_source() -> None:
    assert "needs pca_source" in refused("model.projection", "pca")


def test_markers_differ() -> None:
    message = refused("model.colbert", {"query_marker": "[Q]", "document_marker": "[Q]"})
    assert "query_marker and document_marker are both '[Q]'" in message


def test_ranks_of_a_pool_are_in_order() -> None:
    message = refused("data.tuples.mined.mine.pools.0.ranks", [20, 1])
    assert "1 <= first <= last, not [20, 1]" in message


def test_a_tuple_set_has_one_origin() -> None:
    files = {"format": "tuples", "tuples": "t.parquet"}
    assert "exactly one of 'mine' and 'read'" in refused("data.tuples.mined.read", files)
    assert "exactly one of 'mine' and 'read'" in refused("data.tuples.given", {})


def test_mined_tuples_need_a_teacher() -> None:
    assert "needs 'score', its teacher" in refused("data.tuples.mined.score", None)


@pytest.mark.parametrize("form", ["ids", "mmarco"])
def test_tuples_of_ids_need_texts(form: str) -> None:
    message = refused("data.tuples.given.read", {"format": form, "tuples": "t.parquet", "queries": "q.tsv"})
    assert f"format '{form}' needs 'queries' and 'documents'" in message


def test_units_fill_a_step() -> None:
    message = refused("train.0.micro_batch", 3)
    assert "queries_per_step (8) must be a multiple of micro_batch (3)" in message


@pytest.mark.parametrize("workers", [0, [3, 1], [0, 2]])
def test_workers_are_a_number_or_a_range(workers: Any) -> None:
    assert "num_workers must be N or [fewest, most]" in refused("train.0.num_workers", workers)


def test_two_documents_have_no_gradient_under_min_max_on_both_sides() -> None:
    assert "nway 2 with loss.normalize 'both'" in refused("train.0.nway", 2)
    parse_recipe(with_value("train.0", TREE["train"][0] | {"nway": 2, "loss": {"normalize": "teacher"}}))


def test_a_loss_has_a_term() -> None:
    assert "all loss weights are 0" in refused("train.0.loss", {"kl": 0})


def test_in_batch_negatives_need_their_term() -> None:
    assert "in_batch_negatives needs a contrastive weight" in refused(
        "train.0.loss", {"in_batch_negatives": True}
    )
    LossConfig(in_batch_negatives=True, contrastive=0.1)


def test_phases_differ_in_name() -> None:
    assert "two phases share a name" in refused("train.1.name", "pre")


@pytest.mark.parametrize("name", ["base", "averaged"])
def test_some_phase_names_are_reserved(name: str) -> None:
    assert f"train.1.name: '{name}' is reserved" in refused("train.1.name", name)


def test_a_phase_starts_from_an_earlier_one() -> None:
    assert "train.0.init: no earlier phase 'post'; there are: base" in refused("train.0.init", "post")
    parse_recipe(with_value("train.0.init", "published@production"))


def test_an_average_input_has_one_origin() -> None:
    for item in ({"phase": "pre", "model": "m@v1"}, {}):
        assert "exactly one of 'phase' and 'model'" in refused("average.inputs", [item])


BEST = {"phase": "pre", "best": 2, "source": "train", "metric": "R@1"}


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (BEST | {"last": 2}, "one of 'step', 'last' and 'best'"),
        ({"phase": "pre", "step": 10, "last": 2}, "one of 'step', 'last' and 'best', not ['step', 'last']"),
        ({"model": "m@v1", "last": 2}, "last: of a phase, not of a model"),
        ({"phase": "pre", "best": 2, "source": "train"}, "'best' needs 'source' and 'metric'"),
        ({"phase": "pre", "best": 2, "metric": "R@1"}, "'best' needs 'source' and 'metric'"),
        ({"phase": "pre", "last": 2, "metric": "R@1"}, "say what is 'best', which is not given"),
        (BEST | {"metric": "nDCG"}, "unknown metric 'nDCG'; there are nDCG@k"),
        (BEST | {"source": "nope"}, "average.inputs.0.source: no data source 'nope'"),
        ({"phase": "pre", "last": 0}, "greater than or equal to 1"),
        ({"phase": "post", "last": 2}, "inputs.0.last: 2, but phase 'post' publishes its last step only"),
        (BEST | {"phase": "post"}, "average.inputs.0.best: 2, but phase 'post' publishes its last"),
    ],
)
def test_the_last_and_the_best_steps_are_asked_for_in_one_way(item: dict[str, Any], message: str) -> None:
    assert message in refused("average.inputs", [item])


def test_published_steps() -> None:
    steps = {}
    for length, every in ((20, 10), (25, 10), (5, 10), (20, None)):
        tree = with_value("train.0.steps", length)
        tree["train"][0]["checkpoint"] = {"publish_every_steps": every}
        tree["average"] = {"inputs": [{"phase": "pre"}]}
        steps[length, every] = parse_recipe(tree).train[0].published_steps
    assert steps == {(20, 10): (10, 20), (25, 10): (10, 20, 25), (5, 10): (5,), (20, None): (20,)}


@pytest.mark.parametrize(("step", "published"), [(7, "every 5 steps and its last"), (0, "every 5 steps")])
def test_an_average_of_a_step_that_is_not_published_is_refused(step: int, published: str) -> None:
    message = refused("average.inputs.0.step", step)
    assert message.startswith(f"r.yaml: average.inputs.0.step: {step}, but phase 'pre' publishes {published}")


def test_a_step_of_a_phase_that_publishes_its_last_only_is_refused() -> None:
    tree = with_value("average.inputs.1.step", 5)
    with pytest.raises(ConfigError, match="phase 'post' publishes its last step only"):
        parse_recipe(tree)
    tree["average"]["inputs"][1]["step"] = 20
    parse_recipe(tree)


def test_a_shortened_phase_can_be_tried_without_touching_the_average() -> None:
    parse_recipe(with_value("train.0.steps", 8))


def test_mined_tuples_are_as_long_as_training_wants_them() -> None:
    message = refused("train.1.nway", 5)
    assert "train.1.nway: 5, but the tuples of 'mined' are mined with 4 documents" in message


@pytest.mark.parametrize(("name", "kind"), [("teacher", "cross_encoder"), ("labels", "labels")])
def test_a_pool_is_of_a_scorer_that_can_search(name: str, kind: str) -> None:
    tree = with_value("data.tuples.mined.mine.pools.0.scorer", name)
    tree["scorers"]["labels"] = {"kind": "labels"}
    with pytest.raises(ConfigError, match=f"'{name}' is of kind {kind}, which .* cannot search"):
        parse_recipe(tree)


def test_a_system_is_of_one_kind() -> None:
    message = refused("evaluate.systems.start", {"model": "base", "scorer": "bm25"})
    assert "exactly one of 'scorer', 'ensemble' and 'model'" in message


@pytest.mark.parametrize("key", ["fronts", "group_replicas"])
@pytest.mark.parametrize("value", [[4, 2], [0, 2]])
def test_replicas_are_in_order(key: str, value: list[int]) -> None:
    message = refused(f"serve.{key}", value)
    assert f"serve.{key}: must be [fewest, most] with 1 <= fewest <= most" in message
    assert ServeConfig.model_validate({key: [2, 2]})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.pca_source", "nope", "model.pca_source: no data source 'nope'; there are: test, train"),
        ("data.tuples.mined.mine.source", "nope", "data.tuples.mined.mine.source: no data source 'nope'"),
        (
            "data.tuples.mined.mine.pools.0.scorer",
            "nope",
            "no scorer 'nope'; there are: bm25, teacher",
        ),
        ("data.tuples.mined.score.scorers", {"nope": 1}, "data.tuples.mined.score.scorers: no scorer 'nope'"),
        ("train.0.data", ["nope"], "train.0.data: no tuple set 'nope'; there are: given, mined"),
        (
            "train.0.validation",
            {"source": "nope", "every_steps": 5},
            "train.0.validation.source: no data source 'nope'; there are: test, train",
        ),
        ("average.inputs.0.phase", "nope", "average.inputs.0.phase: no phase 'nope'; there are: post, pre"),
        ("average.greedy", {"source": "nope"}, "average.greedy.source: no data source 'nope'"),
        ("index.sources", ["nope"], "index.sources: no data source 'nope'"),
        ("index.model", "nope", "index.model: no model 'nope'; there are: averaged, base, post, pre"),
        ("evaluate.sources", ["nope"], "evaluate.sources: no data source 'nope'"),
        ("evaluate.systems.start", {"scorer": "nope"}, "evaluate.systems.start: no scorer 'nope'"),
        ("evaluate.systems.start", {"ensemble": {"nope": 1}}, "evaluate.systems.start: no scorer 'nope'"),
        ("evaluate.systems.start.model", "nope", "evaluate.systems.start.model: no model 'nope'"),
        ("evaluate.baseline", "nope", "evaluate.baseline: no system 'nope'; there are: start"),
        ("evaluate.gate", {"source": "nope"}, "evaluate.gate.source: no data source 'nope'"),
    ],
)
def test_a_name_that_stands_for_nothing_is_named_with_those_there_are(
    key: str, value: Any, message: str
) -> None:
    assert message in refused(key, value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluate.metrics", ["nDCG@10", "recall@10"], "evaluate.metrics.1: unknown metric 'recall@10'"),
        ("evaluate.gate", {"source": "test", "metric": "R"}, "evaluate.gate.metric: unknown metric 'R'"),
        ("average.greedy", {"source": "test", "metric": "x@1"}, "average.greedy.metric: unknown metric"),
        (
            "evaluate.metrics",
            ["R@1000"],
            "depth: 100 documents are kept per query, too few for R@1000",
        ),
        ("evaluate.gate", {"source": "test", "metric": "R@101"}, "too few for R@101"),
        ("evaluate.systems.start", {"scorer": "bm25", "index": True}, "'index' goes with 'model'"),
        ("evaluate.systems.start", {"ensemble": {"bm25": 0}}, "greater than 0"),
        ("evaluate.systems.start", {"scorer": "teacher"}, "'teacher' is of kind cross_encoder, which scores"),
        ("evaluate.systems.start", {"ensemble": {"teacher": 1}}, "evaluate.systems.start: 'teacher' is of"),
        ("evaluate.systems.start", {"model": "pre", "index": True}, "the recipe's index is of 'averaged'"),
        (
            "evaluate",
            {"sources": ["test", "train"], "systems": {"it": {"model": "averaged", "index": True}}},
            "evaluate.systems.it: the recipe's index does not hold evaluate.sources' 'train'; it holds: test",
        ),
    ],
)
def test_what_would_fail_after_hours_is_refused_at_once(key: str, value: Any, message: str) -> None:
    assert message in refused(key, value)
