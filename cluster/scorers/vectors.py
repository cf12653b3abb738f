"""Scorers over vectors, and the vectors that a process keeps of the texts it has met."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import compress, islice
from typing import Protocol

import numpy as np
import torch
from ray._common.utils import get_system_memory
from torch import Tensor

from cluster.progress import progress
from cluster.scorers.api import Candidates, Scorer, Scores, query_texts
from cluster.sources import LabelledSource
from colbert_core.exact import Ranking, exact_search
from colbert_core.maxsim import maxsim_pairs
from colbert_core.vectors import RaggedVectors

# Documents whose vectors are made and held together.
_BLOCK = 512
# Share of the machine's memory that kept vectors may take: those of one encoder, and all together.
_CACHE_SHARE = 1 / 8
_processes = 1


@dataclass(frozen=True)
class Encoded:
    """What an encoder makes of texts.

    Attributes:
        vectors: of length 1, on the CPU.
        cut: per text, whether its end was cut off.
    """

    vectors: RaggedVectors
    cut: Sequence[bool]


class TextEncoder(Protocol):
    """Texts to vectors of length 1: one per text, or one per token."""

    def queries(self, texts: Sequence[str]) -> Encoded: ...

    def documents(self, texts: Sequence[str]) -> Encoded: ...


class VectorScorer(Scorer):
    """MaxSim over an encoder's vectors; with one vector per text, that is the cosine.

    Args:
        name, source: as for any scorer.
        load: the encoder. It is called at once, unless vectors are kept already: then when a text has none.
        kept: vectors of texts that this encoder has met before; default: none.
    """

    def __init__(
        self,
        name: str,
        source: LabelledSource | None,
        load: Callable[[], TextEncoder],
        kept: KeptVectors | None = None,
    ) -> None:
        super().__init__(name, source)
        self._load = load
        self._kept = KeptVectors() if kept is None else kept
        # Hashes, so that the texts need not stay.
        self._cut_queries: set[int] = set()
        self._cut_documents: set[int] = set()
        if not self._kept.documents:
            _ = self._encoder  # a model that cannot be loaded is told of now

    @cached_property
    def _encoder(self) -> TextEncoder:
        return self._load()

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
        queries = self._queries(candidates.queries)
        unique = list(numbers)
        for first in range(0, len(unique), _BLOCK):
            block = self._documents(unique[first : first + _BLOCK])
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
        queries = self._queries(query_texts(source, query_ids))
        texts = list(islice(source.corpus.values(), first, last))
        return exact_search(queries, list(source.corpus), self._blocks(texts), depth, span=(first, last))

    def statistics(self) -> dict[str, float]:
        """How many of the texts that it was asked about were cut."""
        return {
            "truncated_queries": len(self._cut_queries),
            "truncated_documents": len(self._cut_documents),
        }

    def _queries(self, texts: Sequence[str]) -> RaggedVectors:
        def encode(new: Sequence[str]) -> Encoded:
            return self._encoder.queries(new)

        found = self._kept.queries.encoded(texts, encode)
        self._cut_queries.update(map(hash, compress(texts, found.cut)))
        return found.vectors

    def _documents(self, texts: Sequence[str]) -> RaggedVectors:
        def encode(new: Sequence[str]) -> Encoded:
            return self._encoder.documents(new)

        found = self._kept.documents.encoded(texts, encode)
        self._cut_documents.update(map(hash, compress(texts, found.cut)))
        return found.vectors

    def _blocks(self, texts: Sequence[str]) -> Iterator[RaggedVectors]:
        with progress() as bar:
            task = bar.add_task(f"{self.name}: searching documents", total=len(texts))
            for first in range(0, len(texts), _BLOCK):
                yield self._documents(texts[first : first + _BLOCK])
                bar.update(task, completed=min(first + _BLOCK, len(texts)))


class VectorCache:
    """Encodes texts and keeps the most recently used vectors, in half precision.

    All vectors are rounded to half precision, so that a score does not depend on what is kept; for
    vectors of length 1 that is 2^-11 of a component, less than what bfloat16 encoding differs by.

    Args:
        limit: bytes of vectors kept.

    Attributes:
        size: bytes of vectors held.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._kept: OrderedDict[str, tuple[Tensor, bool]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def encoded(self, texts: Sequence[str], encode: Callable[[Sequence[str]], Encoded]) -> Encoded:
        """Texts and their fp32 vectors.

        Args:
            texts: any.
            encode: makes the vectors, each of length 1, of those that are not kept; each text is given to
                it once.
        """
        new = list(dict.fromkeys(text for text in texts if text not in self._kept))
        fresh: dict[str, tuple[Tensor, bool]] = {}
        if new or not texts:
            made = encode(new)
            half = RaggedVectors(made.vectors.vectors.half(), made.vectors.lengths)
            fresh = dict(zip(new, zip(half, made.cut, strict=True), strict=True))
            if len(new) == len(texts):
                self._keep(fresh)
                return Encoded(RaggedVectors(half.vectors.float(), half.lengths), made.cut)
        found = []
        for text in texts:
            if text in self._kept:
                self._kept.move_to_end(text)
            found.append(fresh[text] if text in fresh else self._kept[text])
        self._keep(fresh)
        flat = torch.cat([vectors for vectors, _ in found]).float()
        lengths = torch.tensor([len(vectors) for vectors, _ in found])
        return Encoded(RaggedVectors(flat, lengths), [cut for _, cut in found])

    def _keep(self, fresh: dict[str, tuple[Tensor, bool]]) -> None:
        for text, (vectors, cut) in fresh.items():
            size = vectors.nbytes
            if size > self._limit:
                continue
            # A view would keep the whole batch alive.
            self._kept[text] = vectors.clone(), cut
            self.size += size
            while self.size > self._limit:
                self.size -= self._kept.popitem(last=False)[1][0].nbytes


class KeptVectors:
    """Vectors that one encoder has made of queries and of documents.

    Args:
        limit: bytes of documents' vectors kept, and an eighth of it for queries'; default: by the machine.
    """

    def __init__(self, limit: int | None = None) -> None:
        limit = _limit() if limit is None else limit
        self.queries = VectorCache(limit // 8)
        self.documents = VectorCache(limit)

    @property
    def size(self) -> int:
        """Bytes held."""
        return self.queries.size + self.documents.size


_KEPT: OrderedDict[str, KeptVectors] = OrderedDict()


def kept_vectors(identity: str) -> KeptVectors:
    """The vectors that this process keeps of an encoder.

    Mining, teacher and evaluation ask the same encoders about the same texts; in one process each text is
    encoded once. Those of the encoders used longest ago are dropped when all together grow too large.

    Args:
        identity: names the encoder's weights and settings.
    """
    _KEPT.setdefault(identity, KeptVectors())
    _KEPT.move_to_end(identity)
    while len(_KEPT) > 1 and sum(kept.size for kept in _KEPT.values()) > _limit():
        _KEPT.popitem(last=False)
    return _KEPT[identity]


def share_cache(processes: int) -> None:
    """Says how many processes of this machine keep vectors; call it before the first is kept."""
    global _processes  # noqa: PLW0603
    _processes = processes


def _limit() -> int:
    # A container's memory, where it has less than the machine.
    return int(get_system_memory() * _CACHE_SHARE / _processes)
