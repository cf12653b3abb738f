"""The PyLate and sentence-transformers layouts.

PyLate 1.x (which sentence-transformers 6 reads as well)::

    modules.json                       Transformer at "", pylate Dense at "1_Dense"
    config.json, model.safetensors     the backbone
    1_Dense/config.json, 1_Dense/model.safetensors    the projection, key "linear.weight"
    sentence_bert_config.json          max_seq_length, do_lower_case
    config_sentence_transformers.json  markers, lengths, expansion, skiplist

sentence-transformers 6 itself saves four modules (Transformer, Dense, MultiVectorMask, Normalize) and
keeps the lengths in sentence_bert_config.json and the markers as prompts; that is read, not written.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colbert_core.encoder import ColBERT
from colbert_core.errors import ModelError
from colbert_core.formats_weights import (
    LINEAR_KEY,
    WEIGHTS_FILE,
    read_json,
    read_object,
    read_tensors,
    write_json,
    write_tensors,
)
from colbert_core.text import find_token, skip_setting

MODULES_FILE = "modules.json"
DENSE_FOLDER = "1_Dense"

_SETTINGS_FILE = "config_sentence_transformers.json"
_TRANSFORMER_FILE = "sentence_bert_config.json"
_IDENTITY = "torch.nn.modules.linear.Identity"
# Tokenizers without a real bound report about 1e30 as model_max_length.
_NO_BOUND = 1_000_000


def write_pylate(model: ColBERT, directory: Path) -> None:
    """Writes what makes a directory with a backbone and a tokenizer a PyLate model."""
    config = model.config
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": DENSE_FOLDER, "type": "pylate.models.Dense.Dense"},
    ]
    write_json(directory / MODULES_FILE, modules)
    bound = model.max_positions or model.tokenizer.model_max_length
    if bound >= _NO_BOUND:
        bound = max(config.document_length, config.query_length)
    write_json(
        directory / _TRANSFORMER_FILE,
        {"max_seq_length": int(bound), "do_lower_case": config.do_lower_case},
    )
    write_json(
        directory / _SETTINGS_FILE,
        {
            "model_type": "ColBERT",
            "prompts": {},
            "default_prompt_name": None,
            "similarity_fn_name": "MaxSim",
            "query_prefix": config.query_marker,
            "document_prefix": config.document_marker,
            "query_length": config.query_length,
            "document_length": config.document_length,
            "attend_to_expansion_tokens": config.attend_to_expansion,
            # Tokens, not symbols: PyLate looks words up in the vocabulary, where SentencePiece and
            # byte-level BPE hold '▁!' or 'Ġ!' beside '!'.
            "skiplist_words": model.tokenizer.convert_ids_to_tokens(model.text.skip_ids.tolist()),
            "do_query_expansion": config.expand_queries,
        },
    )
    dense = directory / DENSE_FOLDER
    dense.mkdir()
    out_features, in_features = model.projection.weight.shape
    write_json(
        dense / "config.json",
        {
            "in_features": in_features,
            "out_features": out_features,
            "bias": False,
            "activation_function": _IDENTITY,
            "use_residual": False,
        },
    )
    write_tensors(dense / WEIGHTS_FILE, {LINEAR_KEY: model.projection.weight})


def is_multi_vector(directory: Path) -> bool:
    """Whether modules.json describes a model of token vectors: a Dense module, and no pooling.

    Raises:
        ModelError: modules.json is damaged.
    """
    kinds = [kind for kind, _ in _entries(directory)]
    return "Dense" in kinds and "Pooling" not in kinds


def backbone_folder(directory: Path) -> Path:
    """Where the Transformer module keeps the backbone and the tokenizer.

    Raises:
        ModelError: the first module is no Transformer.
    """
    first = _modules(directory)[0]
    if first[0] != "Transformer":
        raise ModelError(f"{directory / MODULES_FILE}: the first module is {first[0]}, not Transformer")
    return directory / first[1]


def read_projection(directory: Path) -> Tensor:
    """The Dense modules as one matrix ``[dim, hidden]``, fp32.

    Stacked layers fold into one by matrix product, and a residual connection is added to its layer:
    all are linear.

    Raises:
        ModelError: there is no Dense module, or one has a bias, an activation, or other shapes than its
            config says.
    """
    folders = [path for kind, path in _modules(directory) if kind == "Dense"]
    if not folders:
        raise ModelError(f"{directory / MODULES_FILE}: no Dense module, so there is no projection to load")
    layers = [_dense_matrix(directory / folder) for folder in folders]
    if len(layers) == 1:
        return layers[0].float()
    folded = layers[0].double()
    for folder, layer in zip(folders[1:], layers[1:], strict=True):
        if layer.shape[1] != folded.shape[0]:
            raise ModelError(
                f"{directory / folder}: takes {layer.shape[1]} dimensions, the layer before gives "
                f"{folded.shape[0]}"
            )
        folded = layer.double() @ folded
    return folded.float()


def read_settings(
    directory: Path, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> dict[str, Any]:
    """Keys of a :class:`ColBERTConfig`, ``dim`` excepted, from the files of either layout.

    Args:
        directory: of the model.
        tokenizer: the backbone's.
        positions: how many tokens the backbone can number (None: no bound).

    Raises:
        ModelError: the files ask for something that this model does not do; the key is named.
    """
    path = directory / _SETTINGS_FILE
    settings = read_object(path)
    transformer_file = backbone_folder(directory) / _TRANSFORMER_FILE
    transformer = read_object(transformer_file) if transformer_file.is_file() else {}
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, "MaxSim", "maxsim"):
        raise ModelError(f"{path}: similarity_fn_name is {similarity!r}; only MaxSim is supported")
    values: dict[str, Any] = {
        "query_length_rule": "fixed",
        "do_lower_case": bool(transformer.get("do_lower_case", False)),
    }
    mask_folders = [folder for kind, folder in _modules(directory) if kind == "MultiVectorMask"]
    is_prompt = "query_expansion" in transformer or bool(mask_folders)
    if is_prompt:
        longest = _longest(transformer.get("max_seq_length"), tokenizer, positions)
        values |= _expansion_settings(
            transformer.get("query_expansion"), transformer.get("query_length") or longest, transformer_file
        )
        values["document_length"] = transformer.get("document_length") or longest
        prompts = settings.get("prompts") or {}
        prefixes = {"query": prompts.get("query"), "document": prompts.get("document")}
        mask = read_object(directory / mask_folders[0] / "config.json") if mask_folders else {}
        if mask.get("skiplist_tasks", ["document"]) != ["document"]:
            raise ModelError(f"{directory / mask_folders[0]}: skiplist_tasks other than document are unknown")
        skiplist = mask.get("skiplist_words", [])
    else:
        defaults = {"query_prefix": "[Q] ", "document_prefix": "[D] "}
        prefixes = {side: settings.get(f"{side}_prefix", defaults[f"{side}_prefix"]) for side in _SIDES}
        values |= {
            "query_length": settings.get("query_length", 32),
            "document_length": settings.get("document_length", 180),
            "expand_queries": settings.get("do_query_expansion", True),
            "attend_to_expansion": settings.get("attend_to_expansion_tokens", False),
        }
        skiplist = settings.get("skiplist_words", list(string.punctuation))
    for side in _SIDES:
        values[f"{side}_marker"] = _marker(prefixes[side], side, tokenizer, path)
        # PyLate inserts the token; sentence-transformers puts the text in front, and may cut it up.
        if is_prompt and len(pieces := tokenizer.tokenize(str(prefixes[side]))) != 1:
            raise ModelError(
                f"{path}: the tokenizer makes {' '.join(pieces)} of the {side} prompt {prefixes[side]!r}; "
                "this model has markers of one token, not text prompts"
            )
    skipped = _skipped_ids(skiplist or [], tokenizer, known_only=is_prompt)
    values["skip_punctuation"] = skip_setting(tokenizer, skipped)
    return values


_SIDES = ("query", "document")


def _skipped_ids(words: Sequence[Any], tokenizer: PreTrainedTokenizerBase, known_only: bool) -> set[int]:
    """What a skiplist stands for: in PyLate a word that the vocabulary lacks is [UNK], in
    sentence-transformers it is nothing."""
    found = {str(word): tokenizer.convert_tokens_to_ids(str(word)) for word in words}
    return {
        index
        for word, index in found.items()
        if isinstance(index, int) and not (known_only and find_token(tokenizer, word) is None)
    }


def _modules(directory: Path) -> list[tuple[str, str]]:
    """(last part of the class name, folder) of each module, in order; unknown modules are refused."""
    path = directory / MODULES_FILE
    modules = _entries(directory)
    known = ("Transformer", "Dense", "MultiVectorMask", "Normalize")
    for kind, folder in modules:
        if kind not in known:
            raise ModelError(f"{path}: module {kind} is not supported; supported: {', '.join(known)}")
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ModelError(f"{path}: the path {folder!r} leads out of the directory")
    if not modules:
        raise ModelError(f"{path}: lists no modules")
    return modules


def _entries(directory: Path) -> list[tuple[str, str]]:
    path = directory / MODULES_FILE
    try:
        return [(entry["type"].rpartition(".")[2], entry["path"]) for entry in read_json(path)]
    except (TypeError, KeyError, AttributeError):
        raise ModelError(f"{path}: a list of modules with 'type' and 'path' is expected") from None


def _dense_matrix(folder: Path) -> Tensor:
    config = read_object(folder / "config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh"))
    if not activation.endswith(".Identity"):
        raise ModelError(f"{folder / 'config.json'}: activation_function {activation} is not the identity")
    tensors = read_tensors(folder)
    if LINEAR_KEY not in tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE}: no {LINEAR_KEY}; there are: {', '.join(sorted(tensors))}")
    if "linear.bias" in tensors and bool(tensors["linear.bias"].any()):
        raise ModelError(f"{folder / WEIGHTS_FILE}: linear.bias is not 0; a projection has no bias")
    weight = tensors[LINEAR_KEY]
    shape = [config.get("out_features"), config.get("in_features")]
    if list(weight.shape) != shape:
        raise ModelError(f"{folder}: {LINEAR_KEY} is {list(weight.shape)}, config.json says {shape}")
    if not config.get("use_residual"):
        return weight
    if shape[0] == shape[1]:
        return weight + torch.eye(weight.shape[0])
    if "residual.weight" not in tensors:
        raise ModelError(f"{folder / WEIGHTS_FILE}: use_residual is set, but there is no residual.weight")
    return weight + tensors["residual.weight"]


def _longest(stated: int | None, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> int | None:
    """The length that sentence-transformers cuts texts to.

    It counts all rows of the position table, of which RoBERTa and its kin reserve the first: texts of its
    514 tokens would fail there, and are cut to 512 here.
    """
    limits = [stated or tokenizer.model_max_length, positions]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _expansion_settings(expansion: Any, longest: int | None, path: Path) -> dict[str, Any]:
    if expansion is None:
        return {"expand_queries": False, "query_length": longest}
    if not isinstance(expansion, dict) or expansion.get("strategy") != "fixed":
        raise ModelError(f"{path}: query_expansion {expansion!r}: only the strategy 'fixed' is supported")
    if expansion.get("token") is not None:
        raise ModelError(f"{path}: query_expansion.token {expansion['token']!r}: only the mask token expands")
    return {
        "expand_queries": True,
        "query_length": expansion.get("length"),
        "attend_to_expansion": bool(expansion.get("attend", False)),
    }


def _marker(prefix: str | None, side: str, tokenizer: PreTrainedTokenizerBase, path: Path) -> str:
    """The single token that a prefix stands for; PyLate's own default is one token with a space, '[Q] '."""
    text = prefix or ""
    for candidate in (text, text.strip()):
        if candidate and find_token(tokenizer, candidate) is not None:
            return candidate
    raise ModelError(
        f"{path}: the {side} prefix {prefix!r} is not one token of the vocabulary; this model has markers, "
        "not text prompts"
    )
