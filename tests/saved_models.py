"""Tiny ColBERT models on every kind of backbone, and changes to their directories."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from colbert_core.config import ColBERTConfig
from tests.tiny_models import tiny_bert_dir, tiny_japanese_dir, tiny_modernbert_dir, tiny_xlmr_dir

BASES = {
    "bert": tiny_bert_dir,
    "japanese": tiny_japanese_dir,
    "xlmr": tiny_xlmr_dir,
    "modernbert": tiny_modernbert_dir,
}


def config(base: str, **values: object) -> ColBERTConfig:
    """The markers are in the vocabulary of the BERTs and new to the others."""
    markers = {} if base in ("bert", "japanese") else {"query_marker": "[Q]", "document_marker": "[D]"}
    return ColBERTConfig(**({"dim": 8, "document_length": 64} | markers | values))


def edit(path: Path, **changes: object) -> None:
    """Changes keys of a JSON file; the value ``...`` removes a key."""
    tree = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in tree.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")


def as_pylate(directory: Path) -> Path:
    (directory / "raycolbert.json").unlink()
    (directory / "artifact.metadata").unlink()
    weights = load_file(directory / "model.safetensors")
    del weights["linear.weight"]
    save_file(
        {key.removeprefix("bert."): value for key, value in weights.items()}, directory / "model.safetensors"
    )
    return directory
