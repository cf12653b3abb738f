"""What a pipeline refuses at once, and what its gate compares with."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cluster.config import Recipe, parse_recipe
from cluster.models import start_of
from colbert_core.errors import ConfigError
from jobs import pipeline
from tests.recipe_tree import TREE


def recipe(**changes: Any) -> Recipe:
    return parse_recipe(copy.deepcopy(TREE) | changes)


def test_a_mean_that_nobody_makes_is_missed_before_the_first_stage() -> None:
    with pytest.raises(ConfigError, match="average"):
        pipeline.run(recipe(average=None))


def test_keys_that_the_service_will_want_are_missed_before_the_first_stage() -> None:
    serve = {"questions": ["cat"], "api_keys_env": "RAYCOLBERT_NO_SUCH_KEYS"}
    with pytest.raises(ConfigError, match="RAYCOLBERT_NO_SUCH_KEYS"):
        pipeline.run(recipe(serve=serve))


@pytest.mark.parametrize("spec", ["averaged", "pre", "post", "base"])
def test_the_gate_compares_with_what_training_began_with(spec: str) -> None:
    assert start_of(recipe(), spec) == "base"
    phases = copy.deepcopy(TREE["train"])
    phases[0]["init"] = "other@v1"
    assert start_of(recipe(train=phases), spec) == ("base" if spec == "base" else "other@v1")
