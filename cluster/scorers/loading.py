"""Loading Hugging Face models that score: complete weights or an error, and the device they run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from colbert_core.errors import ConfigError, ModelError


def load_complete(
    auto_class: Any, base: str | Path, origin: str, max_length: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in fp32 and eval mode on the best device, and its tokenizer.

    Transformers gives a weight that the files lack a random value and a log line. A scorer with a random
    layer scores nonsense, so here that is an error; only the pooler of a bare encoder may be missing,
    which no scorer reads.

    Args:
        auto_class: ``AutoModel`` or a kin with a head.
        base: directory or hub id.
        origin: how messages call the model.
        max_length: tokens that it has to take.

    Raises:
        ModelError: there is no such model, or weights are missing.
        ConfigError: the model has fewer positions than ``max_length``.
    """
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(base)
            model, found = auto_class.from_pretrained(base, dtype=torch.float32, output_loading_info=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{origin}: cannot be loaded as {auto_class.__name__}: {error}") from error
    missing = sorted(found["missing_keys"])
    if auto_class is AutoModel:
        missing = [key for key in missing if ".pooler." not in f".{key}"]
    if missing:
        raise ModelError(
            f"{origin}: no {auto_class.__name__}: there are no weights for {', '.join(missing[:5])}"
        )
    _check_positions(model, max_length, origin)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), tokenizer


def _check_positions(model: PreTrainedModel, max_length: int, origin: str) -> None:
    positions = getattr(model.config, "max_position_embeddings", None)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa and its kin keep the first rows for padding.
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            positions = module.num_embeddings - reserved
    if positions is not None and 0 < positions < max_length:
        raise ConfigError(f"max_length is {max_length}, but {origin} has {positions} positions")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Transformers from drawing bars and reports: what matters of them is checked here."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
