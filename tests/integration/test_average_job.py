"""The average job and the untrained start, through a real registry."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import ArtifactRef, averaged_ref, base_ref, phase_ref
from cluster.config import Recipe, StorageConfig, parse_recipe
from cluster.models import ensure_base, load_model_ref, resolve_model, sample_documents
from cluster.registry import Registry, parse_ref
from colbert_core.encoder import ColBERT
from colbert_core.errors import ArtifactNotFound, ConfigError, DataError, IntegrityError, ModelError
from colbert_core.formats import load_model, save_model
from jobs import average
from tests.tiny_models import tiny_bert_dir, tiny_xlmr_dir

DOCUMENTS = [
    # Equal scores are ordered by id: a model that cannot tell documents apart finds these first.
    ("a1", "", "天気"),
    ("a2", "", "電車"),
    ("a3", "", "green mountain"),
    ("a4", "", "slow river"),
    ("d1", "東京", "日本の料理の歴史"),
    ("d2", "", "the cat and the dog"),
    ("d3", "京都", "大学の図書館と音楽"),
    ("d4", "", "a fast train to the city"),
    ("d5", "", "red paper and blue music"),
]
QUERIES = [
    ("q1", "日本料理", "d1"),
    ("q2", "cat dog", "d2"),
    ("q3", "図書館", "d3"),
    ("q4", "fast train", "d4"),
]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return tiny_bert_dir(tmp_path_factory.mktemp("bert"))


def write_source(root: Path) -> None:
    corpus = [{"_id": key, "title": title, "text": text} for key, title, text in DOCUMENTS]
    queries = [{"_id": key, "text": text} for key, text, _ in QUERIES]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    labels = "".join(f"{query}\t{document}\t1\n" for query, _, document in QUERIES)
    (root / "qrels.tsv").write_text(labels, encoding="utf-8")


def tree(tmp_path: Path, base_dir: Path, storage: dict[str, Any] | None = None) -> dict[str, Any]:
    """A recipe with two phases, of which the first publishes an earlier step as well."""
    phase = {
        "data": ["tuples"],
        "steps": 20,
        "queries_per_step": 16,
        "checkpoint": {"publish_every_steps": 10},
    }
    files = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels.tsv"}
    write_source(tmp_path)
    return {
        "name": "test",
        "storage": storage or {"root": str(tmp_path / "store"), "cache_dir": str(tmp_path / "cache")},
        "model": {
            "name": "tiny",
            "base": str(base_dir),
            "colbert": {"dim": 8, "document_length": 64},
        },
        "data": {
            "root": str(tmp_path),
            "sources": {"dev": files},
            "tuples": {"tuples": {"read": {"format": "tuples", "tuples": "t.parquet"}}},
        },
        "train": [{"name": "pre", **phase}, {"name": "post", "init": "pre", **phase}],
        "average": {
            "inputs": [
                {"phase": "pre", "step": 10},
                {"phase": "pre"},
                {"phase": "post", "weight": 2},
            ]
        },
    }


def publish_steps(recipe: Recipe, registry: Registry, folder: Path) -> dict[ArtifactRef, ColBERT]:
    """Publishes three models as training would: the base with noise of growing size."""
    ensure_base(recipe, registry)
    published = {}
    refs = [phase_ref(recipe, "pre", 10), phase_ref(recipe, "pre"), phase_ref(recipe, "post")]
    for i, ref in enumerate(refs):
        model = load_model_ref(registry, base_ref(recipe))
        generator = torch.Generator().manual_seed(i)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02 * i)
        save_model(model, folder / str(i))
        registry.publish(ref, folder / str(i))
        published[ref] = model
    return published


def test_the_mean_is_published_once_with_its_parents(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    registry = Registry.open(recipe.storage)
    models = publish_steps(recipe, registry, tmp_path / "models")
    report = average.run(recipe)
    ref = averaged_ref(recipe)
    assert report.artifacts == [str(ref)] and not report.skipped
    states = [model.state_dict() for model in models.values()]
    for key, value in load_model_ref(registry, ref).state_dict().items():
        a, b, c = (state[key].double() for state in states)
        torch.testing.assert_close(value, ((a + b + 2 * c) / 4).float(), rtol=1e-6, atol=1e-8)
    manifest = registry.manifest(ref)
    assert {(parent.ref, parent.weight) for parent in manifest.parents} == set(
        zip(models, (0.25, 0.25, 0.5), strict=True)
    )
    assert manifest.recipe is not None and manifest.recipe["name"] == "test"
    again = average.run(recipe)
    assert again.skipped == [str(ref)] and not again.artifacts


def test_the_inputs_are_never_copied_here_as_a_whole(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    registry = Registry.open(recipe.storage)
    publish_steps(recipe, registry, tmp_path / "models")
    shutil.rmtree(tmp_path / "cache")
    average.run(recipe)
    assert not (tmp_path / "cache").exists()
    assert registry.verify(averaged_ref(recipe)) == []


def test_the_last_steps_are_taken(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    plan["average"]["inputs"] = [{"phase": "pre", "last": 2, "weight": 3}, {"phase": "post", "weight": 2}]
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    models = publish_steps(recipe, registry, tmp_path / "models")
    report = average.run(recipe)
    expected = dict(zip(map(str, models), (0.375, 0.375, 0.25), strict=True))
    assert report.details["parents"] == expected


def test_the_best_steps_are_taken_by_a_metric_that_is_stored(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    best = {"phase": "pre", "best": 2, "source": "dev", "metric": "RR@5"}
    plan["train"][0]["checkpoint"]["publish_every_steps"] = 5
    plan["average"]["inputs"] = [best]
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    ensure_base(recipe, registry)
    good = load_model_ref(registry, base_ref(recipe))
    save_model(good, tmp_path / "good")
    blind = load_model_ref(registry, base_ref(recipe))
    with torch.no_grad():
        # All vectors point the same way, so that every document scores alike.
        blind.projection.weight.zero_()
        blind.projection.weight[0, 0] = 1e6
    save_model(blind, tmp_path / "blind")
    refs = {step: phase_ref(recipe, "pre", step) for step in (5, 10, 15, 20)}
    for step, ref in refs.items():
        registry.publish(ref, tmp_path / ("blind" if step in (10, 20) else "good"))
    report = average.run(recipe)
    assert set(report.details["parents"]) == {str(refs[5]), str(refs[15])}
    scores = report.details["pre: RR@5 on dev"]
    assert scores[str(refs[5])] == scores[str(refs[15])] > scores[str(refs[10])] == scores[str(refs[20])]
    stored = {info.key: info.modified for info in registry.store.list("evaluations/")}
    assert len(stored) == 8  # a run and its values for each step

    # Of equals the later; nothing is evaluated again.
    plan["average"]["inputs"] = [best | {"best": 1}]
    assert set(average.run(parse_recipe(plan)).details["parents"]) == {str(refs[15])}
    plan["average"]["inputs"] = [best | {"best": 3}]
    found = average.run(parse_recipe(plan)).details["parents"]
    assert set(found) == {str(refs[step]) for step in (5, 15, 20)}
    assert {info.key: info.modified for info in registry.store.list("evaluations/")} == stored

    plan["average"]["inputs"] = [best, {"phase": "pre", "step": 15}]
    with pytest.raises(ConfigError, match=r"inputs\.1: .*step00000015 is named twice"):
        average.run(parse_recipe(plan))
    plan["average"]["inputs"] = [best | {"metric": "wrong@3"}]
    with pytest.raises(ConfigError, match="wrong@3"):
        average.run(parse_recipe(plan))


def test_a_moved_alias_leads_to_another_mean(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    plan["average"]["inputs"] = [{"phase": "post"}, {"model": "tiny@production"}]
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    early, last, post = publish_steps(recipe, registry, tmp_path / "models")
    with pytest.raises(ArtifactNotFound, match="tiny@production"):
        average.run(recipe)
    made = []
    for now in (early, last, early):
        registry.promote(now, "production")
        report = average.run(recipe)
        (ref,) = report.artifacts or report.skipped
        made.append(ref)
        manifest = registry.manifest(parse_ref(ref))
        assert {parent.ref for parent in manifest.parents} == {post, now}
        assert manifest.recipe["average"]["inputs"][1]["model"] == f"tiny@{now.version}"
    assert made[0] == made[2] != made[1]


def test_damage_in_storage_publishes_nothing(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    registry = Registry.open(recipe.storage)
    victim = list(publish_steps(recipe, registry, tmp_path / "models"))[1]
    key = registry.manifest(victim).key_of("model.safetensors")
    data = bytearray(registry.store.get(key))
    data[len(data) // 2] ^= 1
    registry.store.put(key, bytes(data))
    with pytest.raises(IntegrityError, match=re.escape(key)):
        average.run(recipe)
    assert not registry.exists(averaged_ref(recipe))
    assert not list(registry.store.list(averaged_ref(recipe).prefix))


def test_the_order_of_the_inputs_changes_neither_version_nor_bytes(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    publish_steps(recipe, registry, tmp_path / "models")
    average.run(recipe)
    files = registry.manifest(averaged_ref(recipe)).files
    plan["average"]["inputs"].reverse()
    turned = parse_recipe(plan)
    assert averaged_ref(turned) == averaged_ref(recipe)
    shutil.rmtree(tmp_path / "store" / averaged_ref(recipe).prefix)
    average.run(turned)
    again = registry.manifest(averaged_ref(turned)).files
    assert {name: entry.sha256 for name, entry in files.items()} == {
        name: entry.sha256 for name, entry in again.items()
    }


def test_all_missing_inputs_are_named(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    ensure_base(recipe, Registry.open(recipe.storage))
    with pytest.raises(ArtifactNotFound) as caught:
        average.run(recipe)
    for ref in (phase_ref(recipe, "pre", 10), phase_ref(recipe, "pre"), phase_ref(recipe, "post")):
        assert str(ref) in str(caught.value)
    assert base_ref(recipe).version in str(caught.value)


def test_inputs_named_twice_and_other_configs_are_refused(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    plan["average"]["inputs"] = [{"phase": "pre"}, {"phase": "pre", "step": 20}]
    recipe = parse_recipe(plan)
    with pytest.raises(ConfigError, match="named twice"):
        average.run(recipe)
    registry = Registry.open(recipe.storage)
    publish_steps(recipe, registry, tmp_path / "models")
    other = load_model_ref(registry, base_ref(recipe))
    other.config = other.config.model_copy(update={"document_length": 32})
    save_model(other, tmp_path / "other")
    registry.publish(ArtifactRef("models", "other", "v1"), tmp_path / "other")
    plan["average"]["inputs"] = [{"phase": "pre"}, {"model": "other@v1"}]
    with pytest.raises(ModelError, match=r"raycolbert\.json differs .* in colbert"):
        average.run(parse_recipe(plan))


def test_the_greedy_soup_leaves_a_harmful_checkpoint_out(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    plan["average"]["greedy"] = {"source": "dev", "metric": "MRR@5"}
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    ensure_base(recipe, registry)
    good = load_model_ref(registry, base_ref(recipe))
    save_model(good, tmp_path / "good")
    harmful = load_model_ref(registry, base_ref(recipe))
    with torch.no_grad():
        # So large that it also rules the mean: every vector is plus or minus the first axis.
        harmful.projection.weight.zero_()
        harmful.projection.weight[0, 0] = 1e6
    save_model(harmful, tmp_path / "harmful")
    registry.publish(phase_ref(recipe, "pre", 10), tmp_path / "harmful")
    registry.publish(phase_ref(recipe, "pre"), tmp_path / "good")
    registry.publish(phase_ref(recipe, "post"), tmp_path / "good")
    report = average.run(recipe)
    # The two good ones are the same model: the second raises nothing, so it is not taken either.
    parents = registry.manifest(averaged_ref(recipe)).parents
    assert [parent.ref for parent in parents] == [phase_ref(recipe, "pre")]
    assert parents[0].weight == 1.0
    trials = {tuple(trial["models"]): trial["score"] for trial in report.details["trials"]}
    alone = trials[(str(phase_ref(recipe, "pre")),)]
    assert report.metrics["dev/MRR@5"] == alone > trials[(str(phase_ref(recipe, "pre", 10)),)]
    assert len(trials) == 5
    # What it was chosen by has changed: the choice may be another, and is not passed off as this one.
    qrels = tmp_path / "qrels.tsv"
    qrels.write_text("".join(qrels.read_text(encoding="utf-8").splitlines(True)[:-1]), encoding="utf-8")
    with pytest.raises(DataError, match=r"qrels.tsv: .*, since models/"):
        average.run(recipe)


def test_the_start_is_made_once_and_depends_on_its_settings(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    ref = ensure_base(recipe, registry)
    created = registry.manifest(ref).created_at
    assert ensure_base(recipe, registry) == ref and registry.manifest(ref).created_at == created
    assert resolve_model(recipe, registry, "base") == ref
    model = load_model_ref(registry, ref)
    expected = ColBERT.create(base_dir, recipe.model.colbert, seed=recipe.seed)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.state_dict().items())
    plan["seed"] = 7
    other = parse_recipe(plan)
    assert base_ref(other) != ref
    changed = load_model_ref(registry, ensure_base(other, registry))
    assert not torch.equal(changed.projection.weight, model.projection.weight)


def test_a_pca_start_keeps_the_dot_products_of_its_documents(tmp_path, base_dir):
    plan = tree(tmp_path, base_dir)
    plan["model"] |= {"projection": "pca", "pca_source": "dev", "pca_documents": 4}
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    weight = load_model_ref(registry, ensure_base(recipe, registry)).projection.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), rtol=0, atol=1e-5)
    plan["model"]["base"] = str(registry.pull(base_ref(recipe)))
    with pytest.raises(ConfigError, match="has a projection already"):
        ensure_base(parse_recipe(plan), registry)


def test_a_base_that_is_a_colbert_model_keeps_its_projection(tmp_path, base_dir):
    model = ColBERT.create(base_dir, parse_recipe(tree(tmp_path, base_dir)).model.colbert, seed=3)
    save_model(model, tmp_path / "start", layouts=("stanford",))
    (tmp_path / "start" / "raycolbert.json").unlink()
    plan = tree(tmp_path, tmp_path / "start")
    plan["model"]["colbert"]["query_length"] = 24
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    made = load_model_ref(registry, ensure_base(recipe, registry))
    assert torch.equal(made.projection.weight, model.projection.weight)
    assert made.config == recipe.model.colbert


def test_samples_are_uniform_seeded_and_in_file_order(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    texts = [f"{title} {text}" if title else text for _, title, text in DOCUMENTS]
    assert sample_documents(recipe, "dev", 99, seed=1) == texts
    counts = dict.fromkeys(texts, 0)
    for seed in range(300):
        sample = sample_documents(recipe, "dev", 2, seed)
        assert sample == sample_documents(recipe, "dev", 2, seed) if seed < 3 else len(sample) == 2
        assert sorted(sample, key=texts.index) == sample
        for text in sample:
            counts[text] += 1
    # 600 draws over 9 documents: 67 each, standard deviation 7.2.
    assert all(35 < count < 100 for count in counts.values())
    (tmp_path / "corpus.jsonl").write_text("")
    with pytest.raises(DataError, match="no documents"):
        sample_documents(recipe, "dev", 2, seed=1)


def test_specs_resolve_to_versions_and_aliases(tmp_path, base_dir):
    recipe = parse_recipe(tree(tmp_path, base_dir))
    registry = Registry.open(recipe.storage)
    ref = ensure_base(recipe, registry)
    registry.promote(ref, "production")
    assert resolve_model(recipe, registry, "tiny@production") == ref
    assert resolve_model(recipe, registry, f"tiny@{ref.version}") == ref
    assert resolve_model(recipe, registry, "post") == phase_ref(recipe, "post")
    assert resolve_model(recipe, registry, "averaged") == averaged_ref(recipe)
    with pytest.raises(ArtifactNotFound):
        resolve_model(recipe, registry, "tiny@staging")
    with pytest.raises(ConfigError, match="no model 'prex'"):
        resolve_model(recipe, registry, "prex")
    with pytest.raises(ArtifactNotFound):
        load_model_ref(registry, phase_ref(recipe, "post"))


def test_everything_works_on_object_storage(tmp_path, base_dir, s3_server):
    storage: StorageConfig = s3_server.storage(cache_dir=str(tmp_path / "cache"))
    plan = tree(tmp_path, tiny_xlmr_dir(tmp_path / "xlmr"), storage.model_dump(mode="json"))
    plan["model"]["colbert"] |= {"query_marker": "[Q]", "document_marker": "[D]"}
    recipe = parse_recipe(plan)
    registry = Registry.open(recipe.storage)
    publish_steps(recipe, registry, tmp_path / "models")
    average.run(recipe)
    directory = registry.pull(averaged_ref(recipe))
    weights = load_file(directory / "model.safetensors")
    assert {key.partition(".")[0] for key in weights} == {"roberta", "linear"}
    assert load_model(directory).encode_documents(["日本の料理"]).vectors.isfinite().all()
