"""Model directories that are damaged, or hold what cannot be kept: refused, and named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError, ModelError, SchemaVersionError
from colbert_core.formats import detect_layout, has_projection, load_model, save_model
from tests.saved_models import as_pylate, config, edit
from tests.tiny_models import tiny_bert_dir


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(directory / "model.safetensors")
    change(weights)
    save_file(weights, directory / "model.safetensors")


NORM = "bert.embeddings.LayerNorm.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"),
            "pickled weights are never loaded",
        ),
        (lambda d: (d / "model.safetensors").unlink(), r"model\.safetensors: missing"),
        (lambda d: (d / "model.safetensors").write_bytes(b"12345678"), "not readable as safetensors"),
        (lambda d: change_weights(d, lambda w: w.pop(NORM)), r"missing embeddings\.LayerNorm\.weight"),
        (
            lambda d: change_weights(d, lambda w: w.update({NORM: torch.ones(3)})),
            r"LayerNorm\.weight is \[3\], the config says \[32\]",
        ),
        (lambda d: change_weights(d, lambda w: w.update({"bert.extra": torch.ones(3)})), "unknown extra"),
        (
            lambda d: change_weights(d, lambda w: w.update({"linear.weight": torch.ones(8, 32)})),
            "is not the projection that modules.json leads to",
        ),
        (lambda d: (d / "1_Dense" / "model.safetensors").unlink(), r"1_Dense/model\.safetensors: missing"),
        (
            lambda d: save_file({"weight": torch.ones(8, 32)}, d / "1_Dense" / "model.safetensors"),
            "no linear.weight; there are: weight",
        ),
        (
            lambda d: edit(d / "1_Dense" / "config.json", out_features=9),
            r"linear\.weight is \[8, 32\], config\.json says \[9, 32\]",
        ),
        (
            lambda d: edit(
                d / "1_Dense" / "config.json", activation_function="torch.nn.modules.activation.Tanh"
            ),
            "is not the identity",
        ),
        (lambda d: (d / "config.json").unlink(), r"config\.json: missing"),
        (
            lambda d: edit(d / "config.json", model_type="no-such-model"),
            "not an encoder that transformers knows",
        ),
        (lambda d: edit(d / "config.json", vocab_size=7), "word_embeddings.weight is"),
        (lambda d: [p.unlink() for p in d.glob("tokenizer*")], "no tokenizer.json"),
        (lambda d: (d / "raycolbert.json").write_text("{"), r"raycolbert\.json: not readable as JSON"),
        (
            lambda d: edit(d / "raycolbert.json", colbert={"dim": 8, "query_length": 1}),
            r"raycolbert\.json: query_length: ",
        ),
        (
            lambda d: edit(d / "raycolbert.json", colbert={"dim": 9}),
            "dim is 9, but the projection has 8 rows",
        ),
        (lambda d: edit(d / "raycolbert.json", colbert=...), "'schema_version' and 'colbert' are expected"),
    ],
)
def test_damage_is_named(copied, damage, message):
    damage(copied)
    with pytest.raises(ModelError, match=message):
        load_model(copied)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("similarity_fn_name", "cosine", "only MaxSim is supported"),
        ("query_prefix", "[unused0] [unused2]", "the query prefix .* is not one token"),
        ("query_length", "many", r"modules\.json: query_length"),
    ],
)
def test_pylate_settings_that_cannot_be_kept_are_refused(copied, key, value, message):
    edit(as_pylate(copied) / "config_sentence_transformers.json", **{key: value})
    with pytest.raises(ModelError, match=message):
        load_model(copied)


@pytest.mark.parametrize(("key", "value"), [("similarity", "l2"), ("interaction", "flipr"), ("dim", 9)])
def test_stanford_settings_that_cannot_be_kept_are_refused(copied, key, value):
    (copied / "raycolbert.json").unlink()
    (copied / "modules.json").unlink()
    edit(copied / "artifact.metadata", **{key: value})
    with pytest.raises(ModelError, match=rf"artifact\.metadata: {key} is"):
        load_model(copied)


def test_a_module_outside_the_directory_is_refused(copied):
    modules = json.loads((copied / "modules.json").read_text())
    modules[1]["path"] = "../elsewhere"
    (copied / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match="leads out of the directory"):
        load_model(copied)


def test_a_newer_schema_asks_for_an_upgrade(copied):
    edit(copied / "raycolbert.json", schema_version=2)
    with pytest.raises(SchemaVersionError, match="upgrade raycolbert"):
        load_model(copied)


def test_a_single_vector_model_is_a_backbone(tmp_path):
    directory = tiny_bert_dir(tmp_path / "base")
    kinds = {"": "models.Transformer", "1_Pooling": "models.Pooling", "2_Dense": "models.Dense"}
    modules = [{"type": f"sentence_transformers.{kind}", "path": path} for path, kind in kinds.items()]
    (directory / "modules.json").write_text(json.dumps(modules))
    assert detect_layout(directory) == "backbone" and not has_projection(directory)
    with pytest.raises(ModelError, match="a backbone without a projection"):
        load_model(directory)


def test_a_saved_model_can_be_a_base_again(saved, models):
    assert has_projection(saved)
    again = ColBERT.create(saved, config("bert"), seed=9)
    assert torch.equal(again.backbone.state_dict()["embeddings.word_embeddings.weight"],
                       models("bert").backbone.state_dict()["embeddings.word_embeddings.weight"])  # fmt: skip


def test_a_plain_backbone_and_an_empty_directory_are_told_apart(tmp_path):
    with pytest.raises(ModelError, match="a backbone without a projection"):
        load_model(tiny_bert_dir(tmp_path / "base"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        load_model(tmp_path / "empty")
    with pytest.raises(ModelError, match="no such model directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="neither a directory nor a model of the hub"):
        load_model("no-such-owner/no-such-model")


def test_nothing_is_overwritten_and_a_failed_save_leaves_nothing(models, saved, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="never overwritten"):
        save_model(models("bert"), saved)
    with pytest.raises(ConfigError, match="layouts"):
        save_model(models("bert"), tmp_path / "x", layouts=())
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(
        "colbert_core.formats.write_pylate", lambda *_: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        save_model(models("bert"), tmp_path / "empty")
    assert [p.name for p in tmp_path.iterdir()] == ["empty"] and not list((tmp_path / "empty").iterdir())
