"""Cross-encoders: query and document are read together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification

from cluster.config import CrossEncoderScorer as CrossEncoderConfig
from cluster.progress import progress
from cluster.scorers.api import Candidates, Scorer, Scores
from cluster.scorers.encoders import whole_batch
from cluster.scorers.loading import load_complete
from cluster.sources import LabelledSource
from colbert_core.batching import TokenBudgetBatches
from colbert_core.errors import ConfigError
from colbert_core.precision import bf16_is_fast

# Pairs tokenised and sorted by length together.
_PAIRS = 16_384


class CrossEncoder(Scorer):
    """A sequence classification model: its one logit, or its positive minus its negative logit.

    The document alone is cut to fit; a query that takes more than half of ``max_length`` is cut with it.
    Both are counted.
    """

    def __init__(self, name: str, config: CrossEncoderConfig, source: LabelledSource | None) -> None:
        super().__init__(name, source)
        self._max_length = config.max_length
        model, self._tokenizer = load_complete(
            AutoModelForSequenceClassification, config.model, config.model, config.max_length
        )
        if model.config.num_labels not in (1, 2):
            raise ConfigError(
                f"scorer {name!r}: {config.model} has {model.config.num_labels} classes; "
                "a cross-encoder has 1 or 2"
            )
        self._model = model
        self._autocast = bf16_is_fast(self._model.device)
        self._truncated_documents = 0
        self._truncated_queries = 0

    def score_candidates(self, candidates: Candidates) -> Scores:
        pairs = [
            (query, document)
            for query, documents in zip(candidates.queries, candidates.documents, strict=True)
            for document in documents
        ]
        scores = np.empty(len(pairs), dtype=np.float32)
        with progress() as bar:
            task = bar.add_task(f"{self.name}: scoring pairs", total=len(pairs))
            for first in range(0, len(pairs), _PAIRS):
                part = pairs[first : first + _PAIRS]
                for rows, values in self._batches(part):
                    scores[rows + first] = values
                    bar.advance(task, len(rows))
        counts = [len(documents) for documents in candidates.documents]
        return np.split(scores, np.cumsum(counts)[:-1]) if counts else []

    def statistics(self) -> dict[str, float]:
        return {
            "truncated_queries": self._truncated_queries,
            "truncated_documents": self._truncated_documents,
        }

    @torch.no_grad()
    def _batches(
        self, pairs: Sequence[tuple[str, str]]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Scores of pairs in batches of similar length: positions in ``pairs`` and scores."""
        ids, types = self._tokenized(pairs)
        pad = self._tokenizer.pad_token_id or 0
        device = self._model.device
        found = []
        for part in TokenBudgetBatches(whole_batch(ids), None, pad, device):
            given = {"input_ids": part.input_ids, "attention_mask": part.attention_mask}
            if types is not None:
                segment = torch.zeros_like(part.input_ids)
                for row, text in enumerate(part.texts):
                    segment[row, : len(types[text])] = torch.tensor(types[text])
                given["token_type_ids"] = segment
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._autocast):
                logits = self._model(**{key: value.to(device) for key, value in given.items()}).logits
            logits = logits.float()
            values = logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]
            found.append((part.texts, values.cpu().numpy()))
        return found

    def _tokenized(
        self, pairs: Sequence[tuple[str, str]]
    ) -> tuple[list[NDArray[np.int32]], list[list[int]] | None]:
        """Ids and, where the model has them, segment numbers of each pair, cut to the length."""
        queries, documents = [query for query, _ in pairs], [document for _, document in pairs]
        whole = self._tokenizer(queries, documents, verbose=False)
        ids, types = whole["input_ids"], whole.get("token_type_ids")
        long = [i for i, row in enumerate(ids) if len(row) > self._max_length]
        for strategy, rows in zip(
            ("only_second", "longest_first"), self._by_query_length(pairs, long), strict=True
        ):
            if not rows:
                continue
            cut = self._tokenizer(
                [queries[i] for i in rows],
                [documents[i] for i in rows],
                truncation=strategy,
                max_length=self._max_length,
            )
            for position, i in enumerate(rows):
                ids[i] = cut["input_ids"][position]
                if types is not None:
                    types[i] = cut["token_type_ids"][position]
        self._truncated_documents += len(long)
        return [np.asarray(row, dtype=np.int32) for row in ids], types

    def _by_query_length(
        self, pairs: Sequence[tuple[str, str]], long: list[int]
    ) -> tuple[list[int], list[int]]:
        """Splits overlong pairs into those with a query of ordinary length and those without."""
        if not long:
            return [], []
        lengths = self._tokenizer([pairs[i][0] for i in long], add_special_tokens=False, verbose=False)
        ordinary: list[int] = []
        overlong: list[int] = []
        for i, row in zip(long, lengths["input_ids"], strict=True):
            (overlong if len(row) > self._max_length // 2 else ordinary).append(i)
        self._truncated_queries += len(overlong)
        return ordinary, overlong
