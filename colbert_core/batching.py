"""Padded batches of similar length, bounded in tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colbert_core.text import TokenBatch

# Measured on lengths spread like those of passages (5 to 300 tokens): of 128 documents these leave 12 %
# padding, against 38 % when only the budget closes a batch.
_BUSY = 1 / 8
_SHORTER = 0.8

_BUDGET, _BUDGET_CPU = 16_384, 2_048


@dataclass
class PaddedBatch:
    """A few texts, padded to the longest of them.

    Attributes:
        texts: int64 ``[n]``, their positions in the whole batch.
        input_ids: int64 ``[n, length]``.
        attention_mask: int64 ``[n, length]``.
        score: bool ``[n, length]``, the positions that yield vectors.
        rows: int64 ``[score.sum()]`` on the CPU, where those vectors belong in the flat result.
    """

    texts: NDArray[np.int64]
    input_ids: Tensor
    attention_mask: Tensor
    score: Tensor
    rows: Tensor


class TokenBudgetBatches:
    """Iterates over a :class:`TokenBatch` in padded batches, longest texts first.

    Longest first, so that a budget too large for the device's memory fails at once. A batch that already
    keeps the device busy is closed rather than padded further with much shorter texts.

    Args:
        batch: the tokenised texts.
        token_budget: most tokens of a padded batch; a longer text is run alone. None: 16,384, and on a CPU
            2,048, whose activations stay in the cache.
        pad_id: the id that fills up the rows.
        device: where the batches are wanted.

    Attributes:
        lengths: int64 ``[n]``, vectors that each text yields.
        padding_fraction: padding tokens as a share of all tokens run, 0 to 1.
    """

    def __init__(
        self, batch: TokenBatch, token_budget: int | None, pad_id: int, device: torch.device
    ) -> None:
        if token_budget is None:
            token_budget = _BUDGET_CPU if device.type == "cpu" else _BUDGET
        self._batch = batch
        self._pad_id = pad_id
        self._device = device
        tokens = np.asarray([len(ids) for ids in batch.ids], dtype=np.int64)
        vectors = np.asarray([int(score.sum()) for score in batch.score], dtype=np.int64)
        self.lengths = torch.from_numpy(vectors)
        self._vectors = vectors
        self._starts = np.concatenate([[0], np.cumsum(vectors)])
        order = np.argsort(-tokens, kind="stable")
        self._groups: list[NDArray[np.int64]] = []
        begin = 0
        for end in range(1, len(order) + 1):
            longest = int(tokens[order[begin]])
            full = end == len(order) or (end - begin + 1) * longest > token_budget
            if not full and (end - begin) * longest >= token_budget * _BUSY:
                full = bool(tokens[order[end]] < longest * _SHORTER)
            if full:
                self._groups.append(order[begin:end])
                begin = end
        run = sum(len(group) * int(tokens[group[0]]) for group in self._groups)
        self.padding_fraction = 1.0 - float(tokens.sum()) / run if run else 0.0

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[PaddedBatch]:
        for group in self._groups:
            yield self._pad(group)

    def _pad(self, group: NDArray[np.int64]) -> PaddedBatch:
        batch = self._batch
        tokens = np.asarray([len(batch.ids[i]) for i in group])
        real = np.arange(tokens[0]) < tokens[:, None]
        input_ids = np.full(real.shape, self._pad_id, dtype=np.int64)
        attention = np.zeros(real.shape, dtype=np.int64)
        score = np.zeros(real.shape, dtype=np.bool_)
        input_ids[real] = np.concatenate([batch.ids[i] for i in group])
        attention[real] = np.concatenate([batch.attend[i] for i in group])
        score[real] = np.concatenate([batch.score[i] for i in group])
        rows = np.concatenate([np.arange(self._starts[i], self._starts[i] + self._vectors[i]) for i in group])
        return PaddedBatch(
            texts=group,
            input_ids=torch.from_numpy(input_ids).to(self._device),
            attention_mask=torch.from_numpy(attention).to(self._device),
            score=torch.from_numpy(score).to(self._device),
            rows=torch.from_numpy(rows),
        )
