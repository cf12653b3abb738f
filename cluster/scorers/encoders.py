"""What makes the vectors of a scorer: bi-encoders, raw token states, and ColBERT models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from cluster.config import BiEncoderScorer, TokenMaxSimScorer
from cluster.scorers.loading import load_complete
from cluster.scorers.vectors import Encoded
from colbert_core.batching import TokenBudgetBatches
from colbert_core.encoder import ColBERT
from colbert_core.precision import bf16_is_fast, fast_precision
from colbert_core.pretrained import resolve_base
from colbert_core.text import TokenBatch
from colbert_core.vectors import RaggedVectors

Pooling = Literal["mean", "cls", "tokens"]


class ColBERTEncoder:
    """A ColBERT model as :class:`~cluster.scorers.vectors.TextEncoder`."""

    def __init__(self, model: ColBERT) -> None:
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._precision = fast_precision(model.device)

    def queries(self, texts: Sequence[str]) -> Encoded:
        batch = self.model.text.queries(texts)
        vectors = self.model.encode_queries(batch, precision=self._precision)
        return Encoded(vectors, batch.cut)

    def documents(self, texts: Sequence[str]) -> Encoded:
        batch = self.model.text.documents(texts)
        vectors = self.model.encode_documents(batch, precision=self._precision)
        return Encoded(vectors, batch.cut)


@dataclass
class PooledEncoder:
    """A Hugging Face encoder, pooled to one vector per text or left as one per token.

    Attributes:
        model: the encoder.
        tokenizer: its tokenizer.
        pooling: ``mean`` over all real tokens, ``cls`` (the first token), or ``tokens``.
        query_prefix, document_prefix: put in front of each text.
        max_length: tokens of a text, specials included; the rest is cut and counted.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pooling: Pooling
    query_prefix: str
    document_prefix: str
    max_length: int

    def __post_init__(self) -> None:
        self._autocast = bf16_is_fast(self.model.device)

    @classmethod
    def load(cls, config: BiEncoderScorer | TokenMaxSimScorer) -> PooledEncoder:
        """Loads what a scorer's config names.

        Raises:
            ModelError: there is no encoder to be loaded, or its weights are incomplete.
            ConfigError: ``max_length`` exceeds the positions that the encoder has.
        """
        model, tokenizer = load_complete(
            AutoModel, resolve_base(config.model), config.model, config.max_length
        )
        return cls(
            model,
            tokenizer,
            config.pooling if isinstance(config, BiEncoderScorer) else "tokens",
            config.query_prefix,
            config.document_prefix,
            config.max_length,
        )

    def queries(self, texts: Sequence[str]) -> Encoded:
        return self._encode([self.query_prefix + text for text in texts])

    def documents(self, texts: Sequence[str]) -> Encoded:
        return self._encode([self.document_prefix + text for text in texts])

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Encoded:
        ids, cut = tokenized(self.tokenizer, texts, self.max_length)
        pad = self.tokenizer.pad_token_id or 0
        device, width = self.model.device, int(self.model.config.hidden_size)
        batches = TokenBudgetBatches(whole_batch(ids), None, pad, device)
        total = int(batches.lengths.sum()) if self.pooling == "tokens" else len(texts)
        result = torch.empty(total, width)
        for part in batches:
            mask = part.attention_mask
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocast):
                output = self.model(input_ids=part.input_ids, attention_mask=mask)
            states = output.last_hidden_state.float()
            if self.pooling == "tokens":
                result[part.rows] = F.normalize(states[part.score], dim=-1).cpu()
                continue
            if self.pooling == "mean":
                pooled = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            else:
                pooled = states[:, 0]
            result[torch.from_numpy(part.texts)] = F.normalize(pooled, dim=-1).cpu()
        lengths = batches.lengths if self.pooling == "tokens" else torch.ones(len(texts), dtype=torch.int64)
        return Encoded(RaggedVectors(result, lengths), cut)


def tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[list[NDArray[np.int32]], list[bool]]:
    """Token ids with specials, cut to ``max_length``; and which texts were cut."""
    if not texts:
        return [], []
    ids = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    is_long = [len(row) > max_length for row in ids]
    long = [i for i, cut in enumerate(is_long) if cut]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            ids[i] = row
    return [np.asarray(row, dtype=np.int32) for row in ids], is_long


def whole_batch(ids: list[NDArray[np.int32]]) -> TokenBatch:
    """A batch in which every token is attended to and yields a vector."""
    ones = [np.ones(len(row), dtype=np.bool_) for row in ids]
    return TokenBatch(ids, ones, ones)
