"""Recipes as files: what is no recipe, overrides, paths, and the digest that names versions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import Recipe, fingerprint, load_recipe, parse_recipe
from colbert_core.errors import ConfigError
from tests.recipe_tree import TREE


def written(folder: Path, text: str | None = None) -> Path:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump(TREE) if text is None else text, encoding="utf-8")
    return path


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"r\.yaml: .*the key 'steps' stands twice"):
        load_recipe(written(tmp_path, "name: r\nx: {steps: 1, lr: 2, steps: 3}"))
    merged = "name: r\nstorage: &s {root: a, cache_gb: 1}\nother: {<<: *s, root: b}\n"
    with pytest.raises(ConfigError, match="unknown key 'other'"):
        load_recipe(written(tmp_path, merged))


def test_what_is_no_recipe_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no recipe file .*missing\.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"r\.yaml: not readable as YAML"):
        load_recipe(written(tmp_path, "name: [unclosed"))
    with pytest.raises(ConfigError, match=r"r\.yaml: a recipe is a mapping, not list"):
        load_recipe(written(tmp_path, "- name"))
    with pytest.raises(ConfigError, match=r"r\.yaml: a recipe is a mapping, not NoneType"):
        load_recipe(written(tmp_path, ""))


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("train.1.steps=7", lambda recipe: recipe.train[1].steps == 7),
        ("train.1.optimizer.lr=1e-5", lambda recipe: recipe.train[1].optimizer.lr == 1e-5),
        ("train.0.num_workers=[1, 4]", lambda recipe: recipe.train[0].num_workers == (1, 4)),
        ("average.inputs.1.weight=2", lambda recipe: recipe.average.inputs[1].weight == 2.0),
        ("average.inputs=[{phase: post}]", lambda recipe: len(recipe.average.inputs) == 1),
        ("ray.num_cpus=2", lambda recipe: recipe.ray.num_cpus == 2),
        ("model.base=a=b", lambda recipe: recipe.model.base == "a=b"),
        ("average=null", lambda recipe: recipe.average is None),
        ("model.colbert.query_marker='[質問]'", lambda recipe: recipe.model.colbert.query_marker == "[質問]"),
    ],
)
def test_an_override_sets_one_value(tmp_path: Path, override: str, found: Any) -> None:
    path = written(tmp_path)
    assert not found(load_recipe(path))
    assert found(load_recipe(path, [override]))


def test_later_overrides_win_and_earlier_ones_stay(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path), ["train.0.steps=7", "train.0.seed=1", "train.0.steps=9"])
    assert (recipe.train[0].steps, recipe.train[0].seed) == (9, 1)


@pytest.mark.parametrize("override", ["train.9.steps=1", "train.x.steps=1", "name.x=1", "train.0.steps.x=1"])
def test_an_override_of_a_place_that_is_not_there_is_refused(tmp_path: Path, override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"--set {key}: the recipe has no such place"):
        load_recipe(written(tmp_path), [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.0.steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("name=[", "--set name: the value is not YAML"),
        ("data.edition=2026-02-30", "--set data.edition: the value is not YAML: day is out of range"),
        ("train.0.stpes=3", r"unknown key 'train\.0\.stpes'; allowed here"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(written(tmp_path), [override])


def test_an_override_inside_a_repeated_anchor_changes_one_place_only(tmp_path: Path) -> None:
    tree = {key: value for key, value in TREE.items() if key not in ("train", "average")}
    text = (
        yaml.safe_dump(tree)
        + """
train:
  - &phase
    name: pre
    data: [mined]
    nway: 4
    steps: 20
    optimizer: {lr: 1.0e-4}
  - <<: *phase
    name: post
"""
    )
    recipe = load_recipe(written(tmp_path, text), ["train.1.optimizer.lr=2e-4"])
    assert [phase.optimizer.lr for phase in recipe.train] == [1e-4, 2e-4]


def test_what_other_machines_read_has_no_relative_places(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(ConfigError, match=r"r\.yaml: storage\.root: 'store' is relative"):
        load_recipe(path, elsewhere=True)
    with pytest.raises(ConfigError, match=r"r\.yaml: data\.root: '.*' is relative"):
        load_recipe(path, ["storage.root=s3://b/p", "data.root=."], elsewhere=True)
    load_recipe(path, ["storage.root=s3://b/p", "data.root=/data"], elsewhere=True)


def test_relative_directories_become_absolute_and_addresses_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    recipe = load_recipe(written(tmp_path), ["data.root=samples"])
    assert recipe.storage.root == str(tmp_path / "store")
    assert recipe.data.root == str(tmp_path / "samples")
    assert recipe.storage.cache_dir == str(tmp_path / "home/.cache/raycolbert")
    addresses = ["storage.root=s3://bucket/store", "data.root=s3://bucket/data"]
    recipe = load_recipe(written(tmp_path), addresses)
    assert (recipe.storage.root, recipe.data.root) == ("s3://bucket/store", "s3://bucket/data")


def test_a_fingerprint_is_of_the_content_whatever_its_order_and_form() -> None:
    assert fingerprint({"a": 1, "b": [2, None]}) == fingerprint({"b": [2, None], "a": 1})
    assert fingerprint({"a": [1, 2]}) != fingerprint({"a": [2, 1]})
    assert fingerprint("a", "b") != fingerprint("ab")
    recipe: Recipe = parse_recipe(TREE)
    phase = recipe.train[0]
    assert fingerprint(phase) == fingerprint(phase.model_dump(mode="json"))
    assert fingerprint(phase) != fingerprint(recipe.train[1])


def test_a_fingerprint_is_the_same_in_every_process_and_for_ever() -> None:
    code = (
        "from cluster.config import fingerprint; print(fingerprint({'b': [1, 2.5, None], 'a': '日本'}, 'x'))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "cc256cca4c94066e"
