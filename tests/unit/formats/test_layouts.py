"""Round trips through every layout, and foreign directories built by hand."""

from __future__ import annotations

import json
import string
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import DimensionError, ModelError
from colbert_core.formats import detect_layout, load_model, save_model
from colbert_core.formats_stanford import StanfordExportWarning
from tests.saved_models import BASES, as_pylate, config, edit

TEXTS = ["日本の天気!", "the cat, the river", "tokyo"]


def same_vectors(one: ColBERT, other: ColBERT) -> None:
    for encode in ("encode_queries", "encode_documents"):
        a, b = getattr(one, encode)(TEXTS), getattr(other, encode)(TEXTS)
        assert torch.equal(a.vectors, b.vectors) and torch.equal(a.lengths, b.lengths)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("layouts", [("pylate", "stanford"), ("pylate",), ("stanford",)], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_a_round_trip_changes_no_bit(models, tmp_path, base, layouts):
    model = models(base)
    save_model(model, tmp_path / "a", layouts=layouts)
    loaded = load_model(tmp_path / "a")
    assert loaded.config == model.config
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    same_vectors(model, loaded)
    # Saving what was loaded gives the same files: averaging compares them byte by byte.
    save_model(loaded, tmp_path / "b", layouts=layouts)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_model_is_saved_in_fp32_and_left_as_it_is(saved, models, tmp_path):
    half = load_model(saved).to(torch.bfloat16)
    save_model(half, tmp_path / "half")
    assert half.projection.weight.dtype == torch.bfloat16
    for path in (tmp_path / "half").rglob("*.safetensors"):
        assert {t.dtype for t in load_file(path).values()} == {torch.float32}


def test_changing_a_loaded_model_does_not_change_its_file(copied, models):
    before = contents(copied)
    loaded = load_model(copied).train()
    loaded.encode_tokens(loaded.text.documents(TEXTS)).vectors.sum().backward()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.sub_(1.0)
    assert contents(copied) == before
    same_vectors(load_model(copied), models("bert"))


def test_one_directory_is_seen_by_all_three_readers(saved, models):
    model = models("bert")
    weights = load_file(saved / "model.safetensors")
    # Stanford: the class HF_ColBERT has the attributes `bert` and `linear`.
    assert {key.partition(".")[0] for key in weights} == {"bert", "linear"}
    assert torch.equal(weights["linear.weight"], model.projection.weight)
    assert json.loads((saved / "config.json").read_text())["architectures"] == ["HF_ColBERT"]
    metadata = json.loads((saved / "artifact.metadata").read_text())
    assert (
        metadata["query_token_id"] == "[unused0]" and metadata["dim"] == 8 and metadata["model_name"] is None
    )
    # PyLate: AutoModel at the root, the projection in 1_Dense.
    backbone, report = AutoModel.from_pretrained(saved, output_loading_info=True)
    assert not report["missing_keys"] and set(report["unexpected_keys"]) == {"linear.weight"}
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(backbone.state_dict()[key], value)
    dense = load_file(saved / "1_Dense" / "model.safetensors")
    assert torch.equal(dense["linear.weight"], model.projection.weight)
    settings = json.loads((saved / "config_sentence_transformers.json").read_text())
    assert settings["query_prefix"] == "[unused0]" and settings["query_length"] == 32


@pytest.mark.parametrize("base", BASES)
def test_pylates_lookup_of_the_skiplist_gives_our_ids(models, tmp_path, base):
    model = models(base)
    save_model(model, tmp_path / "m")
    words = json.loads((tmp_path / "m" / "config_sentence_transformers.json").read_text())["skiplist_words"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert sorted(tokenizer.convert_tokens_to_ids(word) for word in words) == model.text.skip_ids.tolist()


@pytest.mark.parametrize("base", BASES)
def test_tokenizer_files_do_not_remember_their_origin(models, tmp_path, base):
    save_model(models(base), tmp_path / "m")
    tree = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert not {"is_local", "name_or_path"} & tree.keys()
    # Names that transformers 4 does not know.
    assert "extra_special_tokens" not in tree and tree["tokenizer_class"] != "TokenizersBackend"


def test_the_japanese_tokenizer_keeps_its_word_splitter(models, tmp_path):
    save_model(models("japanese"), tmp_path / "m")
    assert (tmp_path / "m" / "vocab.txt").is_file()
    loaded = load_model(tmp_path / "m").tokenizer
    assert type(loaded).__name__ == "BertJapaneseTokenizer"
    assert loaded.mecab_kwargs == {"mecab_dic": "unidic_lite"} and loaded.word_tokenizer_type == "mecab"
    text = "東京大学で日本語の検索を研究する。"
    assert loaded.tokenize(text) == models("japanese").tokenizer.tokenize(text)


def test_without_our_file_the_pylate_view_gives_the_same_vectors(models, copied):
    (copied / "raycolbert.json").unlink()
    assert detect_layout(copied) == "pylate"
    loaded = load_model(copied)
    fixed = models("bert").config.model_copy(update={"query_length_rule": "fixed"})
    assert loaded.config == fixed
    same_vectors(loaded, load_model(copied, overrides=fixed))


@pytest.mark.parametrize("nested", [False, True])
def test_without_modules_the_stanford_view_gives_the_same_vectors(models, copied, nested):
    (copied / "raycolbert.json").unlink()
    (copied / "modules.json").unlink()
    metadata = copied / "artifact.metadata"
    if nested:
        metadata.write_text(json.dumps({"config": json.loads(metadata.read_text()), "ver": 1}))
    assert detect_layout(copied) == "stanford"
    loaded = load_model(copied)
    assert loaded.config == models("bert").config.model_copy(update={"query_length_rule": "fixed"})
    assert torch.equal(loaded.encode_documents(TEXTS).vectors, models("bert").encode_documents(TEXTS).vectors)


def test_stanford_settings_are_mapped_and_defaults_are_the_reference_codes(copied):
    (copied / "raycolbert.json").unlink()
    (copied / "modules.json").unlink()
    path = copied / "artifact.metadata"
    path.write_text(json.dumps({"model_name": None, "lr": 1e-5, "doc_token_id": 6}))
    settings = load_model(copied).config
    assert settings == ColBERTConfig(
        dim=8, query_length=32, document_length=220, query_length_rule="fixed", document_marker="[unused1]"
    )
    path.write_text(
        json.dumps(
            {
                "query_token_id": "[unused3]",
                "doc_maxlen": 300,
                "query_maxlen": 24,
                "mask_punctuation": False,
                "attend_to_mask_tokens": True,
                "dynamic_query_maxlen": True,
                "dynamic_querylen_multiples": 16,
            }
        )
    )
    settings = load_model(copied).config
    assert (settings.query_marker, settings.query_length, settings.document_length) == ("[unused3]", 24, 300)
    assert (settings.query_length_rule, settings.query_length_multiple) == ("released", 16)
    assert not settings.skip_punctuation and settings.attend_to_expansion


def test_stacked_and_residual_dense_layers_fold_into_one(models, copied):
    directory = as_pylate(copied)
    generator = torch.Generator().manual_seed(3)
    # As small as trained weights: sums of a hundred have rounding of their own, in any order.
    first, second, shortcut = (0.1 * torch.randn(n, 32, generator=generator) for n in (32, 8, 8))
    layers = [
        ({"linear.weight": first}, True),
        ({"linear.weight": second, "residual.weight": shortcut}, True),
    ]
    modules = json.loads((directory / "modules.json").read_text())[:1]
    for i, (tensors, residual) in enumerate(layers, start=1):
        folder = directory / f"{i}_Dense"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "model.safetensors")
        rows, columns = tensors["linear.weight"].shape
        values = {"in_features": columns, "out_features": rows, "bias": False, "use_residual": residual}
        values["activation_function"] = "torch.nn.modules.linear.Identity"
        (folder / "config.json").write_text(json.dumps(values))
        modules.append({"idx": i, "name": str(i), "path": folder.name, "type": "pylate.models.Dense.Dense"})
    (directory / "modules.json").write_text(json.dumps(modules))
    loaded = load_model(directory)
    states = torch.randn(5, 32, generator=generator)
    hidden = states @ first.T + states
    torch.testing.assert_close(loaded.projection(states), hidden @ second.T + hidden @ shortcut.T)
    assert loaded.config.dim == 8


def test_a_sentence_transformers_6_directory_is_read(models, copied):
    directory = as_pylate(copied)
    kinds = ["base.modules.transformer.Transformer", "base.modules.dense.Dense"]
    kinds += [
        "multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask",
        "base.modules.normalize.Normalize",
    ]
    paths = ["", "1_Dense", "2_MultiVectorMask", "3_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "2_MultiVectorMask").mkdir()
    (directory / "2_MultiVectorMask" / "config.json").write_text(json.dumps({"skiplist_words": ["!", "?"]}))
    expansion = {"strategy": "fixed", "attend": True, "length": 24}
    (directory / "sentence_bert_config.json").write_text(
        json.dumps({"query_expansion": expansion, "document_length": 99})
    )
    (directory / "config_sentence_transformers.json").write_text(
        json.dumps({"model_type": "MultiVectorEncoder", "similarity_fn_name": "maxsim",
                    "prompts": {"query": "[unused2] ", "document": "[unused1] "}})
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"makes \[ u.* \] of the query prompt '\[unused2\] '"):
        load_model(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[unused1]", "[unused2]"]})
    tokenizer.save_pretrained(directory)
    settings = load_model(directory).config
    assert settings.query_marker == "[unused2]" and settings.document_marker == "[unused1]"
    assert (settings.query_length, settings.document_length) == (24, 99)
    assert settings.attend_to_expansion and settings.expand_queries
    assert settings.skip_punctuation == ("!", "?")
    # Without lengths it cuts at what the model has positions for.
    (directory / "sentence_bert_config.json").write_text("{}")
    settings = load_model(directory).config
    assert (settings.query_length, settings.document_length, settings.expand_queries) == (512, 512, False)
    # And never beyond them: it takes the reserved rows of a position table for positions, as in RoBERTa.
    edit(directory / "sentence_bert_config.json", max_seq_length=514)
    settings = load_model(directory).config
    assert (settings.query_length, settings.document_length) == (512, 512)
    edit(directory / "sentence_bert_config.json", max_seq_length=100)
    assert load_model(directory).config.document_length == 100
    edit(directory / "sentence_bert_config.json", query_expansion=expansion)
    edit(
        directory / "config_sentence_transformers.json", prompts={"query": "query: ", "document": "[unused1]"}
    )
    with pytest.raises(ModelError, match=r"the query prefix 'query: ' is not one token"):
        load_model(directory)
    edit(directory / "sentence_bert_config.json", query_expansion={"strategy": "min", "length": 24})
    with pytest.raises(ModelError, match="only the strategy 'fixed'"):
        load_model(directory)


@pytest.mark.parametrize(
    ("words", "setting"),
    [
        (list(string.punctuation), True),
        ([], False),
        (["the", "!"], ("!", "the")),
        (["nowhere"], ("[UNK]",)),  # both libraries then skip unknown pieces
    ],
)
def test_pylates_skiplist_is_kept_as_it_is(copied, tmp_path, words, setting):
    edit(as_pylate(copied) / "config_sentence_transformers.json", skiplist_words=words)
    loaded = load_model(copied)
    assert loaded.config.skip_punctuation == setting
    save_model(loaded, tmp_path / "again", layouts=("pylate",))
    again = json.loads((tmp_path / "again" / "config_sentence_transformers.json").read_text())
    assert set(again["skiplist_words"]) == ({"[UNK]"} if words == ["nowhere"] else set(words))
    assert load_model(tmp_path / "again").config == loaded.config


@pytest.mark.parametrize("base", BASES)
def test_stanfords_skiplist_is_the_first_piece_of_each_symbol(models, tmp_path, base):
    """What its code computes, in its own words: with SentencePiece neither punctuation nor all of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save_model(models(base), tmp_path / "m", layouts=("stanford",))
    told = [str(each.message) for each in caught if each.category is StanfordExportWarning]
    (tmp_path / "m" / "raycolbert.json").unlink()
    loaded = load_model(tmp_path / "m")
    tokenizer = loaded.tokenizer
    theirs = {tokenizer.encode(symbol, add_special_tokens=False)[0] for symbol in string.punctuation}
    assert set(loaded.text.skip_ids.tolist()) == theirs
    if base == "xlmr":
        assert "▁" in loaded.config.skip_punctuation and "!" not in loaded.config.skip_punctuation
        (text,) = told
        assert 'keeps the document vectors of ! " #' in text and "drops those of ▁;" in text
    else:
        assert loaded.config.skip_punctuation is True
        assert told == []
    # What was read there is said there again, without a loss.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(loaded, tmp_path / "again", layouts=("stanford",))
    (tmp_path / "again" / "raycolbert.json").unlink()
    assert load_model(tmp_path / "again").config == loaded.config
    same_vectors(load_model(tmp_path / "again"), loaded)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"expand_queries": False}, "it expands queries with"),
        ({"do_lower_case": True}, "it does not lower-case"),
        ({"skip_punctuation": ("!", "the")}, 'it keeps the document vectors of the; it drops those of "'),
    ],
)
def test_an_export_that_stanfords_code_reads_otherwise_warns(models, tmp_path, setting, reason):
    model = models("bert")
    other = ColBERT(model.backbone, model.projection, model.tokenizer, config("bert", **setting))
    with pytest.warns(StanfordExportWarning, match=reason):
        save_model(other, tmp_path / "m")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_model(other, tmp_path / "p", layouts=("pylate",))


def test_overrides_replace_the_stored_config(saved):
    given = ColBERTConfig(dim=8, document_length=40, query_length_rule="released", skip_punctuation=False)
    assert load_model(saved, overrides=given).config == given
    with pytest.raises(DimensionError):
        load_model(saved, overrides=ColBERTConfig(dim=16))


def test_weights_without_a_pooler_load_and_save_without_one(models, copied, tmp_path):
    path = copied / "model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if ".pooler." not in key}
    save_file(weights, path)
    loaded = load_model(copied)
    same_vectors(loaded, models("bert"))
    save_model(loaded, tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == weights.keys()


def test_layer_norms_may_have_the_names_of_the_first_berts(models, copied):
    """Released BERTs have them, and transformers 5.3, which PyLate 1.6 wants, writes them again."""
    path = copied / "model.safetensors"
    older = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in load_file(path).items()
    }
    assert any(key.endswith("LayerNorm.gamma") for key in older)
    save_file(older, path)
    same_vectors(load_model(copied), models("bert"))


def test_sharded_weights_are_read(models, copied):
    path = copied / "model.safetensors"
    weights = load_file(path)
    path.unlink()
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[:10], names[10:])):
        save_file({key: weights[key] for key in part}, copied / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same_vectors(load_model(copied), models("bert"))
