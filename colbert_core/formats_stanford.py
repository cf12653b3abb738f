"""The layout of stanford-futuredata/ColBERT, also read by RAGatouille and rerankers.

One safetensors file holds the backbone under its base prefix ("bert.…") and the projection as
"linear.weight"; config.json says ``"architectures": ["HF_ColBERT"]``; ``artifact.metadata`` is JSON with
the settings, flat or under "config".
"""

from __future__ import annotations

import string
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from colbert_core.encoder import ColBERT
from colbert_core.errors import ModelError
from colbert_core.formats_weights import LINEAR_KEY, read_object, write_json
from colbert_core.text import skip_setting

METADATA_FILE = "artifact.metadata"
ARCHITECTURE = "HF_ColBERT"

# Defaults of colbert-ai 0.2's DocSettings, QuerySettings and ModelSettings for absent keys.
_DEFAULTS: dict[str, Any] = {
    "query_token_id": "[unused0]",
    "doc_token_id": "[unused1]",
    "query_maxlen": 32,
    "doc_maxlen": 220,
    "mask_punctuation": True,
    "attend_to_mask_tokens": False,
    "interaction": "colbert",
    "similarity": "cosine",
}


class StanfordExportWarning(UserWarning):
    """An export whose settings Stanford's layout has no words for."""


def masked_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that the reference code drops from documents under ``mask_punctuation``.

    For each symbol it is the first piece of the symbol alone (``encode(symbol)[0]``). With WordPiece that
    is the symbol. SentencePiece puts a word's start in front: where the vocabulary has '▁!', the '!' that
    follows a word is kept, and where it lacks it, every bare '▁' is dropped.
    """
    pieces = (tokenizer.encode(symbol, add_special_tokens=False) for symbol in string.punctuation)
    return {int(ids[0]) for ids in pieces if ids}


def write_stanford(model: ColBERT, directory: Path) -> None:
    """Writes artifact.metadata. ``model_name`` is null: a name that cannot be resolved would make the
    reference code take the class of bert-base-uncased, whatever the backbone is.

    Warns:
        StanfordExportWarning: the reference code will compute other scores; it is said why.
    """
    config = model.config
    if reasons := stanford_differences(model):
        warnings.warn(
            f"Stanford's ColBERT will not score as this model does: {'; '.join(reasons)}",
            StanfordExportWarning,
            stacklevel=3,
        )
    write_json(
        directory / METADATA_FILE,
        {
            "query_token_id": config.query_marker,
            "doc_token_id": config.document_marker,
            "query_token": "[Q]",
            "doc_token": "[D]",
            "dim": config.dim,
            "query_maxlen": config.query_length,
            "doc_maxlen": config.document_length,
            "mask_punctuation": config.skip_punctuation is not False,
            "attend_to_mask_tokens": config.attend_to_expansion,
            "dynamic_query_maxlen": config.query_length_rule == "released",
            "dynamic_querylen_multiples": config.query_length_multiple,
            "interaction": "colbert",
            "similarity": "cosine",
            "model_name": None,
            "checkpoint": None,
            "triples": None,
            "collection": None,
            "queries": None,
            "meta": {"version": "colbert-v0.4"},
        },
    )


def stanford_differences(model: ColBERT) -> list[str]:
    """What the reference code will do otherwise than this model, in words; nothing where scores are equal."""
    config, reasons = model.config, []
    wanted = set(model.text.skip_ids.tolist())
    if wanted:
        given = masked_ids(model.tokenizer)

        def shown(ids: set[int]) -> str:
            pieces = model.tokenizer.convert_ids_to_tokens(sorted(ids))
            return " ".join(pieces[:8]) + (" …" if len(pieces) > 8 else "")

        if kept := wanted - given:
            reasons.append(f"it keeps the document vectors of {shown(kept)}")
        if dropped := given - wanted:
            reasons.append(f"it drops those of {shown(dropped)}")
        if reasons:
            reasons.append("skip_punctuation: false is the same in both")
    if not config.expand_queries:
        reasons.append("it expands queries with [MASK], expand_queries is false here")
    if config.do_lower_case:
        reasons.append("it does not lower-case texts, do_lower_case is true here")
    return reasons


def read_metadata(directory: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Keys of a :class:`ColBERTConfig`, ``dim`` excepted, from artifact.metadata.

    A model trained by the author of JaColBERTv2.5 may ask for dynamic query lengths; they follow the
    released rule, not the paper's.

    Raises:
        ModelError: the file is missing, or asks for something that this model does not do.
    """
    path = directory / METADATA_FILE
    tree = read_object(path)
    given = tree["config"] if isinstance(tree.get("config"), dict) else tree
    values = {key: default if given.get(key) is None else given[key] for key, default in _DEFAULTS.items()}
    for key in ("interaction", "similarity"):
        if values[key] != _DEFAULTS[key]:
            raise ModelError(f"{path}: {key} is {values[key]!r}; only {_DEFAULTS[key]!r} is supported")
    dynamic = bool(given.get("dynamic_query_maxlen", False))
    settings = {
        "query_marker": _token(values["query_token_id"], tokenizer),
        "document_marker": _token(values["doc_token_id"], tokenizer),
        "query_length": values["query_maxlen"],
        "document_length": values["doc_maxlen"],
        "query_length_rule": "released" if dynamic else "fixed",
        "skip_punctuation": skip_setting(
            tokenizer, masked_ids(tokenizer) if values["mask_punctuation"] else ()
        ),
        "attend_to_expansion": values["attend_to_mask_tokens"],
    }
    if dynamic and given.get("dynamic_querylen_multiples"):
        settings["query_length_multiple"] = given["dynamic_querylen_multiples"]
    return settings


def stated_dim(directory: Path) -> int | None:
    """The ``dim`` in artifact.metadata, if it has one."""
    tree = read_object(directory / METADATA_FILE)
    given = tree["config"] if isinstance(tree.get("config"), dict) else tree
    return given.get("dim")


def projection_of(tensors: Mapping[str, Tensor], directory: Path) -> Tensor:
    """``linear.weight`` ``[dim, hidden]``.

    Raises:
        ModelError: it is missing.
    """
    if LINEAR_KEY not in tensors:
        raise ModelError(f"{directory}: no {LINEAR_KEY} among the weights, so there is no projection to load")
    return tensors[LINEAR_KEY]


def _token(value: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """A marker given as a token or, in some exports, as a number."""
    return str(tokenizer.convert_ids_to_tokens(value)) if isinstance(value, int) else str(value)
