"""Aliases in a recipe stand for versions, and outputs are named after those."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.artifacts import ArtifactRef, averaged_ref, candidates_ref, index_ref, phase_ref
from cluster.config import Recipe, StorageConfig, parse_recipe
from cluster.models import check_start, ensure_base, pinned, resolve_model
from cluster.registry import Registry
from colbert_core.errors import ArtifactNotFound, ConfigError
from tests.tiny_models import tiny_bert_dir
from tests.tiny_training import training_recipe

FILES = {"corpus": "c.jsonl", "queries": "q.jsonl", "qrels": "q.tsv"}
ALIAS = "other@production"


def tree(root: Path) -> dict[str, Any]:
    """A recipe that names an alias wherever it can name a model."""
    phase = {"data": ["mined"], "steps": 2, "queries_per_step": 16, "nway": 4}
    mine = {"source": "dev", "pools": [{"scorer": "student", "take": 3}]}
    return {
        "name": "r",
        "storage": {"root": str(root / "store"), "cache_dir": str(root / "cache")},
        "model": {"name": "m", "base": "nowhere"},
        "data": {
            "sources": {"dev": FILES},
            "tuples": {"mined": {"mine": mine, "score": {"scorers": {"student": 1.0}}}},
        },
        "scorers": {
            "student": {"kind": "colbert", "model": ALIAS},
            "hub": {"kind": "colbert", "model": "some/model"},
            "encoder": {"kind": "bi_encoder", "model": "name@revision"},
        },
        "train": [{"name": "pre", "init": ALIAS, **phase}, {"name": "post", "init": "base", **phase}],
        "average": {
            "inputs": [
                {"phase": "post", "best": 1, "source": "dev", "metric": "R@1"},
                {"model": ALIAS, "weight": 2.0},
            ]
        },
        "index": {"name": "i", "model": ALIAS, "sources": ["dev"]},
        "evaluate": {
            "sources": ["dev"],
            "systems": {"before": {"model": ALIAS}, "start": {"model": "base"}, "words": {"scorer": "hub"}},
        },
    }


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return parse_recipe(tree(tmp_path))


@pytest.fixture
def registry(recipe: Recipe, tmp_path: Path) -> Registry:
    """Versions v1 and v2 of a model, of which the first is in production."""
    registry = Registry.open(recipe.storage)
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "file").write_text("x")
    for version in ("v1", "v2"):
        registry.publish(ArtifactRef("models", "other", version), tmp_path / "f")
    registry.promote(ArtifactRef("models", "other", "v1"), "production")
    return registry


def names(recipe: Recipe) -> list[ArtifactRef]:
    return [
        candidates_ref(recipe, "mined"),
        phase_ref(recipe, "pre"),
        averaged_ref(recipe),
        index_ref(recipe),
    ]


def test_every_alias_of_a_model_becomes_a_version(recipe: Recipe, registry: Registry, tmp_path: Path) -> None:
    expected = tree(tmp_path)
    expected["scorers"]["student"]["model"] = "other@v1"
    expected["train"][0]["init"] = "other@v1"
    expected["average"]["inputs"][1]["model"] = "other@v1"
    expected["index"]["model"] = "other@v1"
    expected["evaluate"]["systems"]["before"]["model"] = "other@v1"
    found = pinned(recipe, registry)
    assert found == parse_recipe(expected)
    assert pinned(found, registry) == found
    assert parse_recipe(found.model_dump(mode="json")) == found


def test_a_moved_alias_leads_to_other_names(recipe: Recipe, registry: Registry) -> None:
    before = names(pinned(recipe, registry))
    assert names(pinned(recipe, registry)) == before
    registry.promote(ArtifactRef("models", "other", "v2"), "production")
    after = names(pinned(recipe, registry))
    assert not set(before) & set(after)
    registry.rollback("models", "other", "production")
    assert names(pinned(recipe, registry)) == before


def test_what_does_not_exist_is_left_to_the_job_that_needs_it(recipe: Recipe, tmp_path: Path) -> None:
    elsewhere = Registry.open(StorageConfig(root=str(tmp_path / "empty"), cache_dir=str(tmp_path / "cache")))
    assert pinned(recipe, elsewhere) == recipe


def test_a_recipe_without_the_sections_stays_as_it_is(registry: Registry, tmp_path: Path) -> None:
    bare = {key: tree(tmp_path)[key] for key in ("name", "storage", "model")}
    assert pinned(parse_recipe(bare), registry) == parse_recipe(bare)


def test_a_published_start_with_other_settings_is_refused(tmp_path: Path) -> None:
    made = training_recipe(tmp_path)  # dim 16, query_length 8, document_length 24
    tiny_bert_dir(Path(made.model.base))
    registry = Registry.open(made.storage)
    start = ensure_base(made, registry)

    def check(init: str, **colbert: Any) -> None:
        values = made.model_dump(mode="json")
        values["model"]["colbert"] = colbert
        values["train"][0]["init"] = init
        recipe = parse_recipe(values)
        check_start(recipe, registry, recipe.train[0], resolve_model(recipe, registry, init))

    spec = f"{start.name}@{start.version}"
    check("base", dim=16, query_length=8, document_length=24)
    check(spec, dim=16, query_length=8)
    check(spec)  # nothing is asked for
    with pytest.raises(ConfigError) as refused:
        check(spec, dim=16, query_length=64, do_lower_case=True)
    assert str(refused.value) == (
        f"training phase 'p' starts from {spec} and keeps its settings: model.colbert.query_length is 64, "
        "that model has 8; model.colbert.do_lower_case is True, that model has False; set the same values, "
        "or none"
    )
    with pytest.raises(ArtifactNotFound):
        check("base", dim=32)
