"""Tiny untrained models with real tokenizers, written in a fraction of a second, for tests.

Every function writes a Hugging Face directory (config, safetensors, tokenizer) and returns it. The
weights depend on ``seed`` only. Random backbones still tell tokens apart, so MaxSim over them finds
documents that share words with a query.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertJapaneseTokenizer,
    BertModel,
    BertTokenizer,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

WORDS = (
    "the a of to in and is for on with cat dog river mountain city train paper music red blue green "
    "fast slow search index model token query document question answer japan tokyo ray cluster"
)
JAPANESE_WORDS = (
    "日本 東京 大阪 京都 検索 文書 質問 回答 言語 学習 研究 電車 音楽 天気 料理 歴史 図書館 大学 です ます "
    "する した こと もの から まで"
)
UNUSED = [f"[unused{i}]" for i in range(10)]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def japanese_characters() -> list[str]:
    """Kana, Japanese punctuation and the 2,965 kanji of JIS level 1."""
    kana = [chr(code) for code in (*range(0x3041, 0x3097), *range(0x30A1, 0x30FF))]
    kanji = []
    for row in range(0xB0, 0xD0):
        for cell in range(0xA1, 0xFF):
            try:
                kanji.append(bytes((row, cell)).decode("euc_jp"))
            except UnicodeDecodeError:
                continue
    return [*kana, *"、。「」・ー々", *kanji]


def wordpieces(unused: bool = True) -> list[str]:
    """A WordPiece vocabulary in the order of cl-tohoku's: specials, [unused0-9], then pieces."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, *japanese_characters()]
    pieces = [*characters, *(f"##{c}" for c in characters), *WORDS.split(), *JAPANESE_WORDS.split()]
    return list(dict.fromkeys([*SPECIALS, *(UNUSED if unused else ()), *pieces]))


def tiny_bert_dir(
    path: Path,
    *,
    seed: int = 0,
    hidden: int = 32,
    layers: int = 2,
    max_positions: int = 512,
    unused: bool = True,
    lower_case: bool = False,
) -> Path:
    """A BERT with a WordPiece vocabulary; ``unused=False`` leaves [unused0-9] out."""
    vocabulary = wordpieces(unused)
    tokenizer = BertTokenizer(
        vocab={piece: i for i, piece in enumerate(vocabulary)}, do_lower_case=lower_case
    )
    torch.manual_seed(seed)
    return _save(path, BertModel(_bert_config(len(vocabulary), hidden, layers, max_positions)), tokenizer)


def tiny_cross_encoder_dir(path: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A BERT with a one-logit classification head and the vocabulary of :func:`tiny_bert_dir`."""
    vocabulary = wordpieces()
    tokenizer = BertTokenizer(vocab={piece: i for i, piece in enumerate(vocabulary)}, do_lower_case=False)
    torch.manual_seed(seed)
    config = _bert_config(len(vocabulary), hidden, layers, 512, num_labels=1)
    return _save(path, BertForSequenceClassification(config), tokenizer)


def tiny_japanese_dir(path: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """The family of the paper's backbone: BERT with BertJapaneseTokenizer (MeCab, unidic-lite)."""
    path.mkdir(parents=True, exist_ok=True)
    vocabulary = wordpieces()
    (path / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    tokenizer = BertJapaneseTokenizer(
        str(path / "vocab.txt"),
        do_lower_case=False,
        word_tokenizer_type="mecab",
        subword_tokenizer_type="wordpiece",
        mecab_kwargs={"mecab_dic": "unidic_lite"},
    )
    torch.manual_seed(seed)
    return _save(path, BertModel(_bert_config(len(vocabulary), hidden, layers, 512)), tokenizer)


def tiny_xlmr_dir(path: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """XLM-RoBERTa: Unigram pieces with '▁', padding id 1, positions that start after it."""
    characters = [*string.ascii_letters, *string.digits, *string.punctuation, *japanese_characters()]
    pieces = [
        *(f"▁{w}" for w in WORDS.split()),
        *JAPANESE_WORDS.split(),
        "▁",
        *(f"▁{c}" for c in "!?.,"),
        *characters,
    ]
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    scored = [(piece, 0.0) for piece in specials]
    # Each once: releases of tokenizers differ in whether they count a piece that is listed twice.
    scored += [(piece, -6.0 - 4.0 * (len(piece.strip("▁")) <= 1)) for piece in dict.fromkeys(pieces)]
    scored.append(("<mask>", 0.0))
    tokenizer = XLMRobertaTokenizer(vocab=scored)
    config = XLMRobertaConfig(
        vocab_size=len(scored),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    return _save(path, XLMRobertaModel(config), tokenizer)


def tiny_modernbert_dir(path: Path, *, seed: int = 0, hidden: int = 32, layers: int = 3) -> Path:
    """ModernBERT: byte-level BPE, rotary positions, local and global attention, no [unused0]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = ModernBertConfig(
        vocab_size=len(vocabulary),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=1024,
        local_attention=16,
        pad_token_id=vocabulary["[PAD]"],
        bos_token_id=vocabulary["[CLS]"],
        eos_token_id=vocabulary["[SEP]"],
        cls_token_id=vocabulary["[CLS]"],
        sep_token_id=vocabulary["[SEP]"],
    )
    torch.manual_seed(seed)
    return _save(path, ModernBertModel(config), tokenizer)


def _bert_config(vocabulary: int, hidden: int, layers: int, positions: int, **more: Any) -> BertConfig:
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        **more,
    )


def _save(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
