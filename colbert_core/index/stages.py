"""What a search holds from stage to stage: what it may return, what it has found, where it cuts off."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colbert_core.config import SearchConfig


@dataclass
class Scope:
    """What a request may return.

    Attributes:
        eligible: for each shard, bool ``[documents]``.
        total: how many there are.
    """

    eligible: list[NDArray[np.bool_]]
    total: int

    def documents(self) -> list[NDArray[np.int32]]:
        """All of them, by shard."""
        return [np.flatnonzero(mask).astype(np.int32) for mask in self.eligible]


@dataclass
class Candidates:
    """Documents by shard, with the keys of the stages they went through."""

    documents: list[NDArray[np.int32]]
    gather: list[NDArray[np.int64]]
    interaction: list[NDArray[np.int64]]

    def only(self, masks: Sequence[NDArray[np.bool_]]) -> Candidates:
        """Those that the masks mark."""
        return Candidates(
            *([array[mask] for array, mask in zip(arrays, masks, strict=True)] for arrays in self._all())
        )

    def _all(self) -> tuple[list[NDArray[Any]], ...]:
        return self.documents, self.gather, self.interaction


@dataclass(frozen=True)
class Limits:
    """How many a search keeps at each stage: centroids a query token, then documents.

    Attributes:
        k: documents in the answer.
        probes: centroids of each query token whose postings are read.
        candidates: documents kept by the summed gains of those centroids; no fewer than ``rerank``.
        rerank: documents that are scored; no fewer than k.
    """

    k: int
    probes: int
    candidates: int
    rerank: int

    @staticmethod
    def of(params: SearchConfig | None, k: int) -> Limits:
        """The limits of a request for k documents."""
        params = params or SearchConfig()
        rerank = max(params.rerank, k)
        return Limits(k, params.probes, max(params.candidates, rerank), rerank)
