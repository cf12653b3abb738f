"""Versions follow from all that determines the content, and from nothing else."""

from __future__ import annotations

import re
from copy import deepcopy
from typing import Any

import pytest

from cluster.artifacts import (
    ArtifactRef,
    averaged_ref,
    base_ref,
    candidates_ref,
    index_ref,
    model_ref,
    phase_ref,
    tuples_ref,
)
from cluster.config import Recipe, parse_recipe
from colbert_core.errors import ConfigError
from tests import recipe_tree
from tests.recipe_tree import FILES, PHASE

TREE: dict[str, Any] = {
    **recipe_tree.TREE,
    "storage": {"root": "/store"},
    "model": {"name": "m", "base": "some/backbone", "projection": "pca", "pca_source": "train"},
    "data": {
        **recipe_tree.TREE["data"],
        "root": "/data",
        "sources": {"train": FILES, "test": {**FILES, "qrels": "test.tsv"}},
    },
    "scorers": {
        **recipe_tree.TREE["scorers"],
        "other": {"kind": "bi_encoder", "model": "some/encoder"},
        "student": {"kind": "colbert", "model": "pre"},
    },
    "train": [
        {"name": "pre", **PHASE, "checkpoint": {"publish_every_steps": 10}},
        {"name": "post", "init": "pre", **PHASE, "data": ["given"], "steps": 10},
    ],
    "average": {"inputs": [{"phase": "pre", "step": 10}, {"phase": "pre"}, {"phase": "post"}]},
    "index": {"name": "i", "sources": ["test"], "shards": 2},
}
EVERYTHING = {"base", "candidates", "mined", "given", "pre", "pre-10", "post", "averaged", "index"}
# What a phase's model goes into.
OF_PRE = {"pre", "pre-10", "post", "averaged", "index"}
OF_POST = {"post", "averaged", "index"}
OF_MINED = {"mined", *OF_PRE}


def versions(tree: dict[str, Any]) -> dict[str, ArtifactRef]:
    recipe = parse_recipe(tree)
    return {
        "base": base_ref(recipe),
        "candidates": candidates_ref(recipe, "mined"),
        "mined": tuples_ref(recipe, "mined"),
        "given": tuples_ref(recipe, "given"),
        "pre": phase_ref(recipe, "pre"),
        "pre-10": phase_ref(recipe, "pre", 10),
        "post": phase_ref(recipe, "post"),
        "averaged": averaged_ref(recipe),
        "index": index_ref(recipe),
    }


def with_value(key: str, value: Any) -> dict[str, Any]:
    tree = deepcopy(TREE)
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    node[int(last) if isinstance(node, list) else last] = value
    return tree


def changed_by(key: str, value: Any) -> set[str]:
    before, after = versions(TREE), versions(with_value(key, value))
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [
        ("model.base", "another/backbone", {"base", *OF_PRE}),
        ("model.colbert.dim", 64, {"base", *OF_PRE}),
        ("model.pca_documents", 10, {"base", *OF_PRE}),
        ("seed", 7, {"base", *OF_PRE}),
        ("data.root", "/elsewhere", EVERYTHING),
        ("data.edition", "2", EVERYTHING),
        ("data.sources.train.corpus", "other.jsonl", {"base", "candidates", *OF_MINED}),
        ("data.sources.test.corpus", "other.jsonl", {"index"}),
        ("data.tuples.mined.mine.seed", 7, {"candidates", *OF_MINED}),
        ("data.tuples.mined.mine.group_size", 4, {"candidates", *OF_MINED}),
        ("data.tuples.mined.mine.pools.0.ranks", [1, 10], {"candidates", *OF_MINED}),
        ("scorers.bm25.k1", 1.2, {"candidates", *OF_MINED}),
        ("data.tuples.mined.score.scorers", {"teacher": 1.0, "other": 1.0}, OF_MINED),
        ("data.tuples.mined.score.normalize", False, OF_MINED),
        ("scorers.teacher.model", "another/reranker", OF_MINED),
        ("scorers.other.model", "another/encoder", set()),
        ("data.tuples.given.read.tuples", "other.parquet", {"given", *OF_POST}),
        ("train.0.steps", 30, OF_PRE),
        ("train.0.seed", 7, OF_PRE),
        ("train.0.nway", 3, OF_PRE),
        ("train.0.queries_per_step", 16, OF_PRE),
        ("train.0.micro_batch", 8, OF_PRE),
        ("train.0.dropout", 0.0, OF_PRE),
        ("train.0.optimizer.lr", 1e-5, OF_PRE),
        ("train.0.loss.student_temperature", 0.5, OF_PRE),
        ("train.0.precision", "fp32", OF_PRE),
        ("train.0.gradient_clipping", 1.0, OF_PRE),
        ("train.0.freeze", ["embeddings"], OF_PRE),
        ("train.0.data", ["mined", "given"], OF_PRE),
        ("train.1.steps", 20, OF_POST),
        ("train.1.init", "base", OF_POST),
        ("average.inputs.0.weight", 2.0, {"averaged", "index"}),
        ("average.inputs.0.step", "last", {"averaged", "index"}),
        ("average.greedy", {"source": "test"}, {"averaged", "index"}),
        ("index.shards", 3, {"index"}),
        ("index.codec.residual_bits", 2, {"index"}),
        ("index.pool_factor", 2, {"index"}),
        ("index.model", "post", {"index"}),
        ("index.sources", ["train"], {"index"}),
    ],
)
def test_a_version_changes_with_what_determines_it_and_so_do_its_descendants(
    key: str, value: Any, changed: set[str]
) -> None:
    assert changed_by(key, value) == changed


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("storage", {"root": "s3://bucket/elsewhere", "cache_gb": 1.0}),
        ("ray.num_cpus", 2),
        ("data.tuples.mined.mine.workers", 4),
        ("data.tuples.mined.mine.cpus_per_worker", 2.0),
        ("data.tuples.mined.mine.gpus_per_worker", 1.0),
        ("data.tuples.mined.score.workers", 4),
        ("data.tuples.mined.score.gpus_per_worker", 1.0),
        ("train.0.num_workers", 8),
        ("train.0.num_workers", [1, 8]),
        ("train.0.cpus_per_worker", 2.0),
        ("train.0.gpus_per_worker", 1.0),
        ("train.0.threads_per_worker", 2),
        ("train.0.zero_stage", 3),
        ("train.0.gradient_checkpointing", True),
        ("train.0.token_budget", 4096),
        ("train.0.max_failures", 0),
        ("train.0.checkpoint", {"every_steps": 5, "keep_last": 1, "publish_every_steps": 5}),
        ("train.0.validation", {"source": "test", "every_steps": 5}),
        ("index.encode_workers", 4),
        ("index.cpus_per_worker", 2.0),
        ("index.gpus_per_worker", 1.0),
        ("index.token_budget", 4096),
        ("serve", {"port": 9000}),
        ("evaluate", {"sources": ["test"], "systems": {"start": {"model": "base"}}}),
    ],
)
def test_no_version_changes_with_how_the_work_is_spread(key: str, value: Any) -> None:
    assert changed_by(key, value) == set()


def test_a_scorer_that_is_a_model_of_the_recipe_stands_for_that_model_s_version() -> None:
    tree = with_value(
        "data.tuples.given",
        {
            "mine": {"source": "train", "pools": [{"scorer": "student", "take": 3}]},
            "score": {"scorers": {"teacher": 1.0}},
        },
    )
    before = candidates_ref(parse_recipe(tree), "given")
    tree["train"][0]["optimizer"] = {"lr": 1e-6}
    assert candidates_ref(parse_recipe(tree), "given") != before
    tree["train"][0].pop("optimizer")
    tree["train"][1]["optimizer"] = {"lr": 1e-6}
    assert candidates_ref(parse_recipe(tree), "given") == before


def test_the_form_of_the_names() -> None:
    refs = versions(TREE)
    digest = "[0-9a-f]{16}"
    for name, form in {
        "base": f"models/m@base-{digest}",
        "candidates": f"data/r-mined-candidates@{digest}",
        "mined": f"data/r-mined@{digest}",
        "pre": f"models/m@pre-{digest}",
        "pre-10": f"models/m@pre-{digest}-step00000010",
        "averaged": f"models/m@averaged-{digest}",
        "index": f"indexes/i@{digest}",
    }.items():
        assert re.fullmatch(form, str(refs[name])), name
    assert refs["pre-10"].version.startswith(refs["pre"].version)
    assert refs["pre"].prefix == f"models/m/{refs['pre'].version}/"


def test_the_last_step_is_the_phase_s_model() -> None:
    recipe = parse_recipe(TREE)
    assert phase_ref(recipe, "pre", 20) == phase_ref(recipe, "pre")


def test_the_order_of_a_mean_s_inputs_does_not_matter() -> None:
    tree = deepcopy(TREE)
    tree["average"]["inputs"].reverse()
    assert averaged_ref(parse_recipe(tree)) == averaged_ref(parse_recipe(TREE))


def averaged(*inputs: dict[str, Any], **more: Any) -> ArtifactRef:
    return averaged_ref(parse_recipe(with_value("average", {"inputs": list(inputs), **more})))


def test_the_last_steps_are_the_steps_they_stand_for() -> None:
    assert averaged({"phase": "pre", "last": 2}) == averaged({"phase": "pre", "step": 10}, {"phase": "pre"})
    assert averaged({"phase": "pre", "last": 1}) == averaged({"phase": "pre"})
    assert averaged({"phase": "pre", "last": 2}) != averaged({"phase": "pre"})
    with pytest.raises(ConfigError, match="3 steps of phase 'pre', but it publishes 2: 10, 20"):
        averaged({"phase": "pre", "last": 3})


def test_how_steps_are_chosen_is_part_of_the_name() -> None:
    best = {"phase": "pre", "best": 1, "source": "test", "metric": "nDCG@10"}
    forms = [
        averaged(best),
        averaged(best | {"best": 2}),
        averaged(best | {"metric": "R@1"}),
        averaged(best | {"source": "train"}),
        averaged(best | {"weight": 2.0}),
        averaged({"phase": "pre"}, greedy={"source": "test"}),
        averaged({"phase": "pre"}, greedy={"source": "train"}),
        averaged({"phase": "pre"}, greedy={"source": "test", "metric": "R@1"}),
    ]
    assert len(set(forms)) == len(forms)
    for average in ({"inputs": [best]}, {"inputs": [{"phase": "pre"}], "greedy": {"source": "test"}}):
        tree = with_value("average", average)
        before = averaged_ref(parse_recipe(tree))
        tree["data"]["sources"]["test"] = {**tree["data"]["sources"]["test"], "queries": "other.jsonl"}
        assert averaged_ref(parse_recipe(tree)) != before
    tree = with_value("average", {"inputs": [best]})
    before = averaged_ref(parse_recipe(tree))
    tree["train"][0]["checkpoint"] = {"publish_every_steps": 5}
    assert averaged_ref(parse_recipe(tree)) != before, "there is more to choose from"


def test_specs_stand_for_versions_and_unknown_ones_are_refused_with_those_there_are() -> None:
    recipe = parse_recipe(TREE)
    assert model_ref(recipe, "base") == base_ref(recipe)
    assert model_ref(recipe, "post") == phase_ref(recipe, "post")
    assert model_ref(recipe, "averaged") == averaged_ref(recipe)
    with pytest.raises(ConfigError, match=r"no model 'nope' .* base, averaged, pre, post"):
        model_ref(recipe, "nope")
    with pytest.raises(ConfigError, match=r"no training phase 'nope'; there are: pre, post"):
        phase_ref(recipe, "nope")


@pytest.mark.parametrize("section", ["average", "index"])
def test_what_has_no_section_has_no_version(section: str) -> None:
    recipe: Recipe = parse_recipe({key: value for key, value in TREE.items() if key != section})
    with pytest.raises(ConfigError, match=f"the recipe has no '{section}' section"):
        {"average": averaged_ref, "index": index_ref}[section](recipe)
