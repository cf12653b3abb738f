"""Scorers over vectors: bi-encoders, MaxSim of raw token states, and ColBERT models."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, Protocol

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from cluster.config import BiEncoderScorer, TokenMaxSimScorer
from cluster.scorers.api import Candidates, Scorer, Scores, query_texts
from cluster.scorers.loading import load_complete
from cluster.scorers.progress import progress
from cluster.sources import LabelledSource
from colbert_core.batching import TokenBudgetBatches
from colbert_core.encoder import ColBERT
from colbert_core.exact import Ranking, exact_search
from colbert_core.maxsim import maxsim_pairs
from colbert_core.precision import bf16_is_fast, fast_precision
from colbert_core.pretrained import resolve_base
from colbert_core.text import TokenBatch
from colbert_core.vectors import RaggedVectors

TOKEN_BUDGET = 16_384
# Documents whose vectors are made and held together.
_BLOCK = 512
# Share of the machine's memory that one scorer's cache of vectors may take.
_CACHE_SHARE = 1 / 8

Pooling = Literal["mean", "cls", "tokens"]


class TextEncoder(Protocol):
    """Texts to vectors of length 1, on the CPU: one per text, or one per token."""

    def queries(self, texts: Sequence[str]) -> RaggedVectors: ...

    def documents(self, texts: Sequence[str]) -> RaggedVectors: ...

    def truncated(self) -> tuple[int, int]:
        """Queries and documents so far whose end was cut off."""
        ...


class VectorScorer(Scorer):
    """MaxSim over an encoder's vectors; with one vector per text, that is the cosine.

    A text is encoded once as long as its vectors fit into the cache: a share of the machine's memory.
    """

    def __init__(self, name: str, source: LabelledSource | None, encoder: TextEncoder) -> None:
        super().__init__(name, source)
        self._encoder = encoder
        limit = int(psutil.virtual_memory().total * _CACHE_SHARE)
        self._queries = VectorCache(encoder.queries, limit // 8)
        self._documents = VectorCache(encoder.documents, limit)

    def score_candidates(self, candidates: Candidates) -> Scores:
        numbers: dict[str, int] = {}
        for texts in candidates.documents:
            for text in texts:
                numbers.setdefault(text, len(numbers))
        counts = [len(texts) for texts in candidates.documents]
        document_of = np.asarray(
            [numbers[text] for texts in candidates.documents for text in texts], dtype=np.int64
        )
        query_of = np.repeat(np.arange(len(counts)), counts)
        scores = np.empty(len(document_of), dtype=np.float32)
        queries = self._queries.vectors(candidates.queries)
        unique = list(numbers)
        for first in range(0, len(unique), _BLOCK):
            block = self._documents.vectors(unique[first : first + _BLOCK])
            here = np.flatnonzero((document_of >= first) & (document_of < first + _BLOCK))
            pairs = np.stack([query_of[here], document_of[here] - first], axis=1)
            with torch.no_grad():
                scores[here] = maxsim_pairs(queries, block, torch.from_numpy(pairs)).numpy()
        return np.split(scores, np.cumsum(counts)[:-1]) if counts else []

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        return self.search_span(query_ids, depth, 0, len(self.require_source().corpus))

    def search_span(self, query_ids: Sequence[str], depth: int, first: int, last: int) -> Ranking:
        """:meth:`search` among the documents at positions ``first`` to ``last`` (exclusive) alone."""
        source = self.require_source()
        queries = self._queries.vectors(query_texts(source, query_ids))
        texts = list(islice(source.corpus.values(), first, last))
        return exact_search(queries, list(source.corpus), self._blocks(texts), depth, span=(first, last))

    def statistics(self) -> dict[str, float]:
        queries, documents = self._encoder.truncated()
        return {"truncated_queries": queries, "truncated_documents": documents}

    def _blocks(self, texts: Sequence[str]) -> Iterator[RaggedVectors]:
        with progress() as bar:
            task = bar.add_task(f"{self.name}: searching documents", total=len(texts))
            for first in range(0, len(texts), _BLOCK):
                yield self._documents.vectors(texts[first : first + _BLOCK])
                bar.update(task, completed=min(first + _BLOCK, len(texts)))


class VectorCache:
    """Encodes texts and keeps the most recently used vectors, in half precision.

    All vectors are rounded to half precision, so that a score does not depend on what is kept; for
    vectors of length 1 that is 2^-11 of a component, less than what bfloat16 encoding differs by.

    Args:
        encode: makes the vectors of texts, each of length 1.
        limit: bytes of vectors kept.
    """

    def __init__(self, encode: Callable[[Sequence[str]], RaggedVectors], limit: int) -> None:
        self._encode = encode
        self._limit = limit
        self._size = 0
        self._kept: OrderedDict[str, Tensor] = OrderedDict()

    def vectors(self, texts: Sequence[str]) -> RaggedVectors:
        """fp32 vectors of each text; a text that is not kept is encoded, once even if given twice."""
        new = list(dict.fromkeys(text for text in texts if text not in self._kept))
        fresh: dict[str, Tensor] = {}
        if new or not texts:
            encoded = self._encode(new)
            half = RaggedVectors(encoded.vectors.half(), encoded.lengths)
            fresh = dict(zip(new, half, strict=True))
            if len(new) == len(texts):
                self._keep(fresh)
                return RaggedVectors(half.vectors.float(), half.lengths)
        parts = []
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
            parts.append(fresh[text] if text in fresh else self._kept[text])
        self._keep(fresh)
        return RaggedVectors(torch.cat(parts).float(), torch.tensor([len(part) for part in parts]))

    def _keep(self, fresh: dict[str, Tensor]) -> None:
        for text, vectors in fresh.items():
            size = vectors.nbytes
            if size > self._limit:
                continue
            # A view would keep the whole batch alive.
            self._kept[text] = vectors.clone()
            self._size += size
            while self._size > self._limit:
                self._size -= self._kept.popitem(last=False)[1].nbytes


class ColBERTEncoder:
    """A ColBERT model as :class:`TextEncoder`."""

    def __init__(self, model: ColBERT) -> None:
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self._precision = fast_precision(model.device)

    def queries(self, texts: Sequence[str]) -> RaggedVectors:
        return self.model.encode_queries(texts, token_budget=TOKEN_BUDGET, precision=self._precision)

    def documents(self, texts: Sequence[str]) -> RaggedVectors:
        return self.model.encode_documents(texts, token_budget=TOKEN_BUDGET, precision=self._precision)

    def truncated(self) -> tuple[int, int]:
        count = self.model.text.truncation
        return count.truncated_queries, count.truncated_documents


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
        self._truncated = [0, 0]
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

    def queries(self, texts: Sequence[str]) -> RaggedVectors:
        return self._encode([self.query_prefix + text for text in texts], 0)

    def documents(self, texts: Sequence[str]) -> RaggedVectors:
        return self._encode([self.document_prefix + text for text in texts], 1)

    def truncated(self) -> tuple[int, int]:
        return self._truncated[0], self._truncated[1]

    @torch.no_grad()
    def _encode(self, texts: list[str], side: int) -> RaggedVectors:
        ids, cut = tokenized(self.tokenizer, texts, self.max_length)
        self._truncated[side] += cut
        pad = self.tokenizer.pad_token_id or 0
        device, width = self.model.device, int(self.model.config.hidden_size)
        batches = TokenBudgetBatches(whole_batch(ids), TOKEN_BUDGET, pad, device)
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
        return RaggedVectors(result, lengths)


def tokenized(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_length: int
) -> tuple[list[NDArray[np.int32]], int]:
    """Token ids with specials, cut to ``max_length``; and how many texts were cut."""
    if not texts:
        return [], 0
    ids = tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)[
        "input_ids"
    ]
    long = [i for i, row in enumerate(ids) if len(row) > max_length]
    if long:
        cut = tokenizer([texts[i] for i in long], truncation=True, max_length=max_length)["input_ids"]
        for i, row in zip(long, cut, strict=True):
            ids[i] = row
    return [np.asarray(row, dtype=np.int32) for row in ids], len(long)


def whole_batch(ids: list[NDArray[np.int32]]) -> TokenBatch:
    """A batch in which every token is attended to and yields a vector."""
    ones = [np.ones(len(row), dtype=np.bool_) for row in ids]
    return TokenBatch(ids, ones, ones)
