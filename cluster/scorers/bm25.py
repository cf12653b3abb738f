"""BM25 (Robertson and Zaragoza 2009, Lucene's variant) over Japanese or space-separated text."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence

import bm25s
import numpy as np
from numpy.typing import NDArray

from cluster.config import Bm25Scorer as Bm25Config
from cluster.progress import progress
from cluster.scorers.api import Candidates, Scorer, Scores, query_texts
from cluster.sources import LabelledSource
from colbert_core.errors import DataError
from colbert_core.exact import Ranking, TopDocuments

# Queries whose scores over the whole corpus are held at once, as far as this many scores go.
_SCORES_AT_ONCE = 16_000_000


class Bm25Scorer(Scorer):
    """Term matching; needs the corpus, since a term's weight is how rare it is there.

    Texts are NFKC-normalised and lower-cased, then split into MeCab surface forms (unidic-lite) or at
    white space. The index is built at the first use.
    """

    def __init__(self, name: str, config: Bm25Config, source: LabelledSource | None) -> None:
        super().__init__(name, source)
        self.config = config
        self._ids = list(self.require_source().corpus)
        self._place = {document: i for i, document in enumerate(self._ids)}
        self._split = _splitter(config.tokenizer)
        self._index: bm25s.BM25 | None = None

    def score_candidates(self, candidates: Candidates) -> Scores:
        places = []
        for query, ids in zip(candidates.query_ids, candidates.document_ids, strict=True):
            try:
                places.append([self._place[document] for document in ids])
            except KeyError as error:
                raise DataError(
                    f"scorer {self.name!r}: source {self.require_source().name!r} has no document "
                    f"{error.args[0]!r}, a candidate of query {query!r}"
                ) from None
        return [self._scores(text)[place] for text, place in zip(candidates.queries, places, strict=True)]

    def search(self, query_ids: Sequence[str], depth: int) -> Ranking:
        texts = query_texts(self.require_source(), query_ids)
        top = TopDocuments(len(texts), self._ids, depth)
        step = max(1, _SCORES_AT_ONCE // len(self._ids))
        with progress() as bar:
            task = bar.add_task(f"{self.name}: searching", total=len(texts))
            for first in range(0, len(texts), step):
                top.merge(first, 0, np.stack([self._scores(text) for text in texts[first : first + step]]))
                bar.update(task, completed=min(first + step, len(texts)))
        return top.ranking()

    def _scores(self, text: str) -> NDArray[np.float32]:
        """Scores of all documents; 0 for one that shares no term with the query."""
        if self._index is None:
            self._index = self._build()
        tokens = self._index.get_tokens_ids(self._split(text))
        return np.asarray(self._index.get_scores_from_ids(tokens), dtype=np.float32)

    def _build(self) -> bm25s.BM25:
        source = self.require_source()
        with progress() as bar:
            corpus = [
                self._split(text)
                for text in bar.track(source.corpus.values(), description=f"{self.name}: reading documents")
            ]
        if not any(corpus):
            raise DataError(f"scorer {self.name!r}: no document of source {source.name!r} has a word")
        index = bm25s.BM25(k1=self.config.k1, b=self.config.b, method="lucene")
        index.index(corpus, show_progress=False)
        return index


def _splitter(tokenizer: str) -> Callable[[str], list[str]]:
    """A function from text to terms."""
    if tokenizer == "whitespace":
        return lambda text: _normalised(text).split()
    import fugashi
    import unidic_lite

    # MeCab's own output of surface forms; building a node object per word takes longer.
    tagger = fugashi.Tagger(f'-Owakati -d "{unidic_lite.DICDIR}"')
    return lambda text: tagger.parse(_normalised(text)).split()


def _normalised(text: str) -> str:
    # MeCab reads C strings: a NUL would end the text.
    return unicodedata.normalize("NFKC", text).lower().replace("\0", " ")
