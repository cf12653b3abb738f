"""What the application is built from, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import ServeConfig, parse_recipe
from colbert_core.errors import ConfigError
from serving.app import base_url, build
from serving.args import api_keys, parse_args, recipe_args

ARGS: dict[str, Any] = {"storage": {"root": "/data"}, "serve": {"index": "news@production", "groups": 3}}


def deployments(application: Any) -> dict[str, Any]:
    """All deployments bound in an application, by name."""
    front = application._bound_deployment
    groups = [item._bound_deployment for item in front.init_args[2:]]
    return {item.name: item for item in [front, *groups]}


def test_one_deployment_for_the_front_and_one_for_each_group() -> None:
    found = deployments(build(ARGS))
    assert list(found) == ["front", "shards-0", "shards-1", "shards-2"]
    assert [item.init_args[1] for name, item in found.items() if name != "front"] == [0, 1, 2]


def test_replicas_and_resources_come_from_the_config() -> None:
    serve = {
        **ARGS["serve"],
        "fronts": [2, 6],
        "group_replicas": [1, 1],
        "cpus_per_front": 1.5,
        "cpus_per_group": 3,
        "threads_per_group": 3,
        "max_inflight": 40,
    }
    found = deployments(build({**ARGS, "serve": serve}))
    front, group = found["front"], found["shards-1"]
    assert front.ray_actor_options["num_cpus"] == 1.5
    assert group.ray_actor_options["num_cpus"] == 3
    scaling = front._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 6)
    assert front.max_ongoing_requests > 40, "the front must see a request to answer it with 429"
    assert group._deployment_config.autoscaling_config is None
    assert group.num_replicas == 1
    assert group.max_ongoing_requests > 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"serve": {"index": "news"}}, "NAME@VERSION"),
        ({"serve": {}}, "NAME@VERSION"),
        ({"serve": {"index": "news@production", "gruops": 2}}, "serve.gruops"),
        ({"serve": {"index": "news@production", "max_k": 0}}, "serve.max_k"),
        ({"storage": {}}, "storage.root"),
        ({"shards": 2}, "shards"),
    ],
)
def test_wrong_arguments_are_refused_by_their_key(change: dict[str, Any], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        build({**ARGS, **change})


def recipe(**sections: Any) -> Any:
    return parse_recipe(
        {
            "name": "r",
            "storage": {"root": "/data"},
            "model": {"name": "m", "base": "b"},
            "data": {"sources": {"s": {"corpus": "c", "queries": "q", "qrels": "r"}}},
            **sections,
        }
    )


def test_a_recipe_serves_the_production_version_of_its_index_unless_it_says_otherwise() -> None:
    index = {"name": "news", "model": "base", "sources": ["s"]}
    assert recipe_args(recipe(index=index, serve={})).index == "news@production"
    assert recipe_args(recipe(index=index, serve={"index": "old@v1"})).index == "old@v1"


def test_a_recipe_that_cannot_be_served_is_refused() -> None:
    with pytest.raises(ConfigError, match="no 'serve' section"):
        recipe_args(recipe())
    with pytest.raises(ConfigError, match=r"serve\.index"):
        recipe_args(recipe(serve={}))


def test_arguments_survive_the_way_through_a_config_file() -> None:
    parsed = parse_args(ARGS)
    assert parse_args(parsed.model_dump(mode="json")) == parsed


def test_keys_come_from_the_environment_and_a_closed_service_never_opens_by_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = ServeConfig(api_keys_env="TEST_KEYS")
    monkeypatch.setenv("TEST_KEYS", " one, two ,,")
    assert api_keys(config) == ["one", "two"]
    for empty in ("", " , "):
        monkeypatch.setenv("TEST_KEYS", empty)
        with pytest.raises(ConfigError, match="TEST_KEYS"):
            api_keys(config)
    monkeypatch.delenv("TEST_KEYS")
    with pytest.raises(ConfigError, match="TEST_KEYS"):
        api_keys(config)
    assert api_keys(ServeConfig()) == []


def test_an_address_of_ipv6_stands_in_brackets() -> None:
    assert base_url("::1", 8000) == "http://[::1]:8000"
    assert base_url("::", 8000) == base_url("0.0.0.0", 8000) == "http://127.0.0.1:8000"
    assert base_url("head.example", 80) == "http://head.example:80"
