"""Tokenisation rules, with four families of tokenizers."""

from __future__ import annotations

import string
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from colbert_core.config import ColBERTConfig
from colbert_core.errors import DataError, ModelError
from colbert_core.text import (
    TextProcessor,
    TruncationCount,
    find_token,
    punctuation_ids,
    query_length,
    skip_setting,
)
from tests import tiny_models

FAMILIES = ("bert", "japanese", "xlmr", "modernbert")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    """One tokenizer per family; those without [unused0] and [unused1] get them added."""
    loaded = {}
    for name in FAMILIES:
        path: Path = getattr(tiny_models, f"tiny_{name}_dir")(tmp_path_factory.mktemp(name))
        loaded[name] = AutoTokenizer.from_pretrained(path)
        loaded[name].add_tokens(["[unused0]", "[unused1]"], special_tokens=True)
    return loaded


def test_a_token_is_found_as_it_was_added_where_text_is_lowercased(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.tiny_bert_dir(tmp_path / "bert", lower_case=True))
    assert find_token(tokenizer, "[Q] ") is None
    # As PyLate adds its markers: to be matched in text that has gone through the normaliser.
    tokenizer.add_tokens(["[Q] "])
    tokenizer.save_pretrained(tmp_path / "added")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "added")
    assert find_token(loaded, "[Q] ") == len(loaded) - 1
    assert find_token(loaded, "[Q]") is None


# The rows of the table in which the paper's rule and the released code differ or agree.
PAPER = {5: 32, 8: 32, **dict.fromkeys(range(9, 25), 32), **{n: n + 8 for n in range(25, 33)}}
PAPER |= {**dict.fromkeys(range(33, 57), 64), **{n: n + 8 for n in range(57, 65)}}
RELEASED = {5: 13, 8: 16, **dict.fromkeys(range(9, 32), 32), 32: 40}
RELEASED |= {**{n: n + 8 for n in range(33, 41)}, **dict.fromkeys(range(41, 64), 64), 64: 72}


@pytest.mark.parametrize(("rule", "table"), [("multiple", PAPER), ("released", RELEASED)])
def test_query_length_follows_the_rule(rule: str, table: dict[int, int]) -> None:
    config = ColBERTConfig(query_length_rule=rule)  # type: ignore[arg-type]
    assert {n: query_length(n, config) for n in table} == table
    assert {query_length(n, config, training=True) for n in range(1, 33)} == {32}


def test_query_length_never_exceeds_the_backbone_and_never_cuts() -> None:
    config = ColBERTConfig(query_length_rule="multiple")
    assert query_length(500, config, max_length=512) == 512
    assert query_length(508, config, max_length=512) == 512
    assert query_length(512, config, max_length=512) == 512
    assert query_length(28, ColBERTConfig(query_length_rule="fixed")) == 32
    assert query_length(28, ColBERTConfig(expand_queries=False)) == 28


def test_query_length_numbers_come_from_the_config() -> None:
    config = ColBERTConfig(query_length_multiple=16, min_expansion=4)
    assert [query_length(n, config) for n in (3, 12, 13, 16, 17)] == [16, 16, 17, 20, 32]
    assert query_length(16, ColBERTConfig(query_length_multiple=16, min_expansion=0)) == 16


@pytest.mark.parametrize("family", FAMILIES)
def test_the_marker_follows_the_first_special_and_the_rest_is_the_tokenizer_s(
    tokenizers: dict[str, PreTrainedTokenizerBase], family: str
) -> None:
    tokenizer = tokenizers[family]
    processor = TextProcessor(tokenizer, ColBERTConfig())
    text = "the cat of 東京, fast!"
    plain = tokenizer(text)["input_ids"]
    document = processor.documents([text]).ids[0].tolist()
    assert document[1] == tokenizer.convert_tokens_to_ids("[unused1]")
    assert [document[0], *document[2:]] == plain
    query = processor.queries([text])
    assert query.ids[0].tolist()[1] == tokenizer.convert_tokens_to_ids("[unused0]")
    length = len(plain) + 1
    assert query.ids[0].tolist()[2:length] == plain[1:]
    assert set(query.ids[0].tolist()[length:]) == {tokenizer.mask_token_id}
    assert query.attend[0].tolist() == [True] * length + [False] * (len(query.ids[0]) - length)
    assert query.score[0].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_long_texts_are_cut_as_the_tokenizer_cuts_and_counted(
    tokenizers: dict[str, PreTrainedTokenizerBase], family: str
) -> None:
    tokenizer = tokenizers[family]
    processor = TextProcessor(tokenizer, ColBERTConfig(document_length=12, query_length=6))
    texts = ["cat " * 40, "dog"]
    full = [tokenizer(text)["input_ids"] for text in texts]
    batch = processor.documents(texts)
    cut = tokenizer(texts[0], truncation=True, max_length=11)["input_ids"]
    assert np.delete(batch.ids[0], 1).tolist() == cut and len(batch.ids[0]) == 12
    assert len(batch.ids[1]) == len(full[1]) + 1
    queries = processor.queries(["cat " * 40], training=True)
    assert len(queries.ids[0]) == 6 and tokenizer.mask_token_id not in queries.ids[0]
    assert processor.truncation == TruncationCount(
        documents=2,
        truncated_documents=1,
        dropped_tokens=len(full[0]) - 11,
        queries=1,
        truncated_queries=1,
        dropped_query_tokens=len(full[0]) - 5,
    )


def test_inference_keeps_long_queries_whole_and_training_cuts_them(
    tokenizers: dict[str, PreTrainedTokenizerBase],
) -> None:
    processor = TextProcessor(tokenizers["bert"], ColBERTConfig(), max_length=80)
    text = "cat " * 47  # 50 tokens with [CLS], marker and [SEP]
    assert len(processor.queries([text]).ids[0]) == 64
    assert processor.truncation.truncated_queries == 0
    assert len(processor.queries([text], training=True).ids[0]) == 32
    assert processor.truncation.dropped_query_tokens == 18
    assert len(processor.queries(["cat " * 100]).ids[0]) == 80
    assert processor.truncation.dropped_query_tokens == 18 + 23


def test_truncation_counts_merge_and_reset() -> None:
    count = TruncationCount(documents=2, dropped_tokens=5)
    count.merge(TruncationCount(documents=1, truncated_documents=1, dropped_query_tokens=4))
    assert count == TruncationCount(3, 1, 5, 0, 0, 4)
    count.reset()
    assert count == TruncationCount()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_skiplist_holds_ascii_punctuation_and_nothing_else(
    tokenizers: dict[str, PreTrainedTokenizerBase], family: str
) -> None:
    tokenizer = tokenizers[family]
    pieces = tokenizer.convert_ids_to_tokens(punctuation_ids(tokenizer).tolist())
    assert {piece.lstrip("▁Ġ") for piece in pieces} == set(string.punctuation)
    if family == "xlmr":
        assert {"!", "▁!", "▁?"} <= set(pieces) and "▁" not in pieces
    processor = TextProcessor(tokenizer, ColBERTConfig())
    batch = processor.documents(["a, b! (c) 、。", "?!."])
    kept = tokenizer.convert_ids_to_tokens(batch.ids[0][batch.score[0]].tolist())
    assert not {piece.lstrip("▁Ġ") for piece in kept} & set(string.punctuation)
    skipped = tokenizer.convert_ids_to_tokens(batch.ids[0][~batch.score[0]].tolist())
    assert [piece.lstrip("▁Ġ") for piece in skipped] == [",", "!", "(", ")"]
    # Nothing but punctuation still leaves [CLS], marker and [SEP], and all of it takes part in attention.
    assert batch.score[1].tolist() == [True, True, *[False] * (len(batch.ids[1]) - 3), True]
    assert batch.attend[1].all()
    everything = TextProcessor(tokenizer, ColBERTConfig(skip_punctuation=False)).documents(["?!."])
    assert everything.score[0].all()


def test_a_list_of_tokens_is_skipped_instead(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    tokenizer = tokenizers["bert"]
    processor = TextProcessor(tokenizer, ColBERTConfig(skip_punctuation=("cat", "!")))
    batch = processor.documents(["the cat, the dog!"])
    skipped = tokenizer.convert_ids_to_tokens(batch.ids[0][~batch.score[0]].tolist())
    assert skipped == ["cat", "!"]
    assert skip_setting(tokenizer, processor.skip_ids.tolist()) == ("!", "cat")
    assert skip_setting(tokenizer, punctuation_ids(tokenizer).tolist()) is True
    assert skip_setting(tokenizer, ()) is False
    with pytest.raises(ModelError, match=r"names 'nowhere', 'neither', not in the vocabulary"):
        TextProcessor(tokenizer, ColBERTConfig(skip_punctuation=("nowhere", "!", "neither")))


def test_a_symbol_missing_from_the_vocabulary_does_not_skip_unknown_tokens(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.tiny_bert_dir(tmp_path))
    kept = {piece: i for i, piece in enumerate(p for p in tiny_models.wordpieces() if p not in "~^")}
    smaller = type(tokenizer)(vocab=kept, do_lower_case=False)
    found = punctuation_ids(smaller)
    assert smaller.unk_token_id not in found
    assert len(found) == len(string.punctuation) - 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_empty_texts_are_allowed(
    tokenizers: dict[str, PreTrainedTokenizerBase], family: str, text: str
) -> None:
    processor = TextProcessor(tokenizers[family], ColBERTConfig())
    document = processor.documents([text])
    assert len(document.ids[0]) >= 3 and document.score[0].sum() >= 3
    if not text:
        assert len(document.ids[0]) == 3
    assert len(processor.queries([text]).ids[0]) == 32
    assert len(processor.documents([])) == len(processor.queries([])) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bad", [None, 3, float("nan"), b"cat", "broken \ud800"])
def test_what_is_no_text_is_refused_by_position(
    tokenizers: dict[str, PreTrainedTokenizerBase], family: str, bad: object
) -> None:
    processor = TextProcessor(tokenizers[family], ColBERTConfig())
    with pytest.raises(DataError, match="text 1 "):
        processor.documents(["fine", bad, "fine"])  # type: ignore[list-item]
    assert processor.truncation.documents == 0


def test_expansion_can_be_off_or_attended(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    plain = TextProcessor(tokenizers["bert"], ColBERTConfig(expand_queries=False))
    batch = plain.queries(["cat dog", "cat " * 40], training=True)
    assert [len(ids) for ids in batch.ids] == [5, 32]
    attended = TextProcessor(tokenizers["bert"], ColBERTConfig(attend_to_expansion=True)).queries(["cat"])
    assert len(attended.ids[0]) == 32 and attended.attend[0].all()


def test_texts_are_lower_cased_on_request(tokenizers: dict[str, PreTrainedTokenizerBase]) -> None:
    lower = TextProcessor(tokenizers["bert"], ColBERTConfig(do_lower_case=True)).documents(["CAT"])
    assert "cat" in tokenizers["bert"].convert_ids_to_tokens(lower.ids[0].tolist())
    upper = TextProcessor(tokenizers["bert"], ColBERTConfig()).documents(["CAT"])
    assert "cat" not in tokenizers["bert"].convert_ids_to_tokens(upper.ids[0].tolist())


def test_missing_marker_and_missing_mask_token_are_named(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.tiny_bert_dir(tmp_path))
    with pytest.raises(ModelError, match=r"marker '\[Q\]' is not in the vocabulary"):
        TextProcessor(tokenizer, ColBERTConfig(query_marker="[Q]"))
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="no mask token"):
        TextProcessor(tokenizer, ColBERTConfig())
    assert len(TextProcessor(tokenizer, ColBERTConfig(expand_queries=False)).queries(["cat"]).ids[0]) == 4


def test_the_tokenizer_s_own_bound_serves_where_none_is_given(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_models.tiny_bert_dir(tmp_path), model_max_length=20)
    processor = TextProcessor(tokenizer, ColBERTConfig())
    assert len(processor.queries(["cat " * 100]).ids[0]) == 20
    assert len(processor.documents(["cat " * 100]).ids[0]) == 20
