"""From texts to token ids: markers, [MASK] expansion, query lengths, the punctuation skiplist.

A text is tokenised to one token less than its bound and the marker's id is inserted at index 1, right
after [CLS] (the way of current colbert-ai and of PyLate; older code overwrote a prepended ". ").
Nothing is padded here: batches are ragged, and the encoder pads the few rows it runs together.
"""

from __future__ import annotations

import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from colbert_core.config import ColBERTConfig
from colbert_core.errors import DataError, ModelError

# Tokenizers without a real bound report about 1e30 as model_max_length.
_NO_BOUND = 1_000_000
# Word-start signs of SentencePiece and byte-level BPE pieces.
_WORD_START = "▁Ġ"


@dataclass
class TokenBatch:
    """Tokenised texts, ragged.

    Attributes:
        ids: per text, int32 ``[length]`` token ids, markers and [MASK] included.
        attend: per text, bool ``[length]``: may other tokens attend to this one.
        score: per text, bool ``[length]``: does this token yield a vector. All tokens of a query do;
            of a document, all but ASCII punctuation.
        cut: per text, whether its end was cut off; empty if nobody says.
    """

    ids: list[NDArray[np.int32]]
    attend: list[NDArray[np.bool_]]
    score: list[NDArray[np.bool_]]
    cut: list[bool] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)


@dataclass
class TruncationCount:
    """How much text was cut since the last :meth:`reset`; markers and [MASK] are not text."""

    documents: int = 0
    truncated_documents: int = 0
    dropped_tokens: int = 0
    queries: int = 0
    truncated_queries: int = 0
    dropped_query_tokens: int = 0

    def reset(self) -> None:
        for item in fields(self):
            setattr(self, item.name, 0)

    def merge(self, other: TruncationCount) -> None:
        """Adds the counts of another processor, for example another worker's."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


def query_length(
    length: int, config: ColBERTConfig, training: bool = False, max_length: int | None = None
) -> int:
    """The number of tokens a query is expanded to.

    Rules, with m = ``query_length_multiple`` and e = ``min_expansion`` (32 and 8 in the paper):
    ``fixed``: always ``query_length`` (longer queries were truncated to it). ``multiple``: the next
    multiple of m, or ``length + e`` if that would leave fewer than e [MASK] tokens (JaColBERTv2.5,
    section 3.5). ``released``: ``length + e`` if ``length mod m <= e``, else the next multiple of m
    (the author's evaluator, which contradicts the paper).

    Args:
        length: tokens of the query, [CLS], marker and [SEP] included.
        config: the rule and its numbers.
        training: training uses ``fixed`` whatever the rule.
        max_length: positions that the backbone has; the result never exceeds it.

    Returns:
        ``length`` plus the number of [MASK] tokens to append.
    """
    step, fewest = config.query_length_multiple, config.min_expansion
    next_multiple = -(-length // step) * step
    if not config.expand_queries:
        target = length
    elif training or config.query_length_rule == "fixed":
        target = config.query_length
    elif config.query_length_rule == "multiple":
        target = max(next_multiple, length + fewest)
    else:
        target = length + fewest if length % step <= fewest else next_multiple
    return max(length, target if max_length is None else min(target, max_length))


@dataclass
class TextProcessor:
    """Turns texts into :class:`TokenBatch` es for one model, and counts what it cuts.

    Args:
        tokenizer: the backbone's tokenizer; both markers must be in its vocabulary.
        config: markers, lengths, expansion and skiplist.
        max_length: positions that the backbone has; default: the tokenizer's ``model_max_length``.

    Attributes:
        truncation: the texts and tokens cut so far.
        query_marker_id, document_marker_id: the ids inserted at index 1.
        mask_id: the id that queries are expanded with; None if the tokenizer has none and queries are
            not expanded.
        skip_ids: sorted ids of ASCII punctuation, or of what the config names, which yields no document
            vectors.

    Raises:
        ModelError: a marker or a token to skip is not in the vocabulary, or queries are to be expanded
            and the tokenizer has no mask token.
    """

    tokenizer: PreTrainedTokenizerBase
    config: ColBERTConfig
    max_length: int | None = None
    truncation: TruncationCount = field(default_factory=TruncationCount)

    def __post_init__(self) -> None:
        if self.max_length is None and self.tokenizer.model_max_length < _NO_BOUND:
            self.max_length = int(self.tokenizer.model_max_length)
        self.query_marker_id = self._marker_id(self.config.query_marker)
        self.document_marker_id = self._marker_id(self.config.document_marker)
        self.mask_id: int | None = self.tokenizer.mask_token_id
        if self.mask_id is None and self.config.expand_queries:
            raise ModelError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no mask token, which expand_queries needs; "
                "use another backbone or set expand_queries to false"
            )
        self.skip_ids = self._skip_ids()
        # Which specials the tokenizer puts around a text: [CLS] … [SEP] in most encoders.
        empty, probe = self._tokenize(["", "a"])
        self._specials_before = next(
            (i for i, (a, b) in enumerate(zip(empty, probe, strict=False)) if a != b), len(empty)
        )
        self._specials_after = len(empty) - self._specials_before

    def queries(self, texts: Sequence[str], *, training: bool = False) -> TokenBatch:
        """Tokenises queries and appends [MASK] tokens.

        Args:
            texts: the queries; empty ones are allowed.
            training: use length rule ``fixed``, as training always does.

        Raises:
            DataError: an item is not a text; the message names its position.
        """
        config = self.config
        bound = self.max_length
        if training or config.query_length_rule == "fixed":
            bound = config.query_length if bound is None else min(bound, config.query_length)
        batch = TokenBatch([], [], [])
        for raw in self._tokenize(texts):
            ids, dropped = self._insert_marker(raw, self.query_marker_id, bound)
            self.truncation.queries += 1
            self.truncation.truncated_queries += dropped > 0
            self.truncation.dropped_query_tokens += dropped
            length = query_length(len(ids), config, training, self.max_length)
            attend = np.ones(length, dtype=np.bool_)
            if length > len(ids):
                attend[len(ids) :] = config.attend_to_expansion
                ids = ids + [self.mask_id] * (length - len(ids))  # type: ignore[list-item]
            batch.ids.append(np.asarray(ids, dtype=np.int32))
            batch.attend.append(attend)
            batch.score.append(np.ones(length, dtype=np.bool_))
            batch.cut.append(dropped > 0)
        return batch

    def documents(self, texts: Sequence[str]) -> TokenBatch:
        """Tokenises documents to at most ``document_length`` tokens and applies the skiplist.

        An empty text yields the vectors of [CLS], the marker and [SEP].

        Raises:
            DataError: an item is not a text; the message names its position.
        """
        bound = self.config.document_length
        if self.max_length is not None:
            bound = min(bound, self.max_length)
        batch = TokenBatch([], [], [])
        for raw in self._tokenize(texts):
            ids, dropped = self._insert_marker(raw, self.document_marker_id, bound)
            self.truncation.documents += 1
            self.truncation.truncated_documents += dropped > 0
            self.truncation.dropped_tokens += dropped
            array = np.asarray(ids, dtype=np.int32)
            batch.ids.append(array)
            batch.attend.append(np.ones(len(array), dtype=np.bool_))
            batch.score.append(~np.isin(array, self.skip_ids))
            batch.cut.append(dropped > 0)
        return batch

    def _marker_id(self, marker: str) -> int:
        index = find_token(self.tokenizer, marker)
        if index is None:
            raise ModelError(
                f"marker {marker!r} is not in the vocabulary of tokenizer {self.tokenizer.name_or_path!r}; "
                "ColBERT.create adds missing markers"
            )
        return index

    def _skip_ids(self) -> NDArray[np.int32]:
        skipped = self.config.skip_punctuation
        if isinstance(skipped, bool):
            return punctuation_ids(self.tokenizer) if skipped else _NO_IDS
        found = {token: find_token(self.tokenizer, token) for token in skipped}
        if missing := [token for token, index in found.items() if index is None]:
            raise ModelError(
                f"skip_punctuation names {', '.join(map(repr, missing))}, not in the vocabulary of tokenizer "
                f"{self.tokenizer.name_or_path!r}"
            )
        return np.asarray(sorted({index for index in found.values() if index is not None}), dtype=np.int32)

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids with the tokenizer's own specials, at full length: cutting is done here, to be counted."""
        for position, text in enumerate(texts):
            if not isinstance(text, str):
                raise DataError(f"text {position} is {type(text).__name__}, not a string: {text!r:.80}")
        if not texts:
            return []
        plain = [text.lower() for text in texts] if self.config.do_lower_case else list(texts)
        try:
            return self.tokenizer(
                plain, return_attention_mask=False, return_token_type_ids=False, verbose=False
            )["input_ids"]
        except (TypeError, UnicodeEncodeError):
            # Lone surrogates pass as str, but are not text: no UTF-8 form exists.
            for position, text in enumerate(texts):
                if any("\ud800" <= character <= "\udfff" for character in text):
                    raise DataError(
                        f"text {position} holds a lone surrogate, which is not valid Unicode: {text!r:.80}"
                    ) from None
            raise

    def _insert_marker(self, raw: list[int], marker: int, bound: int | None) -> tuple[list[int], int]:
        """Puts the marker after [CLS] and cuts the text's end so that all fits into ``bound`` tokens."""
        before, after = self._specials_before, self._specials_after
        end = len(raw) - after
        keep = end if bound is None else min(end, max(before, bound - 1 - after))
        return [*raw[:before], marker, *raw[before:keep], *raw[end:]], end - keep


_NO_IDS: NDArray[np.int32] = np.zeros(0, dtype=np.int32)


def find_token(tokenizer: PreTrainedTokenizerBase, token: str) -> int | None:
    """The id of exactly this token, or None where the vocabulary lacks it (and not the id of [UNK])."""
    index = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(index, int):
        return None
    if tokenizer.convert_ids_to_tokens(index) == token:
        return index
    # The way back gives an added token as it is matched: '[q] ' for '[Q] ' where text is lowercased first.
    return index if tokenizer.added_tokens_encoder.get(token) == index else None


def punctuation_ids(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int32]:
    """The ids that stand for one symbol of ``string.punctuation``, sorted.

    These are the symbol's own piece, the same piece at a word's start ('▁!' in SentencePiece, 'Ġ!' in
    byte-level BPE), and what the tokenizer makes of the symbol alone when that is the symbol itself.
    [UNK], a bare '▁' and pieces with further characters never are: dropping them would lose text.
    """
    found = set()
    for symbol in string.punctuation:
        candidates = [symbol, *(sign + symbol for sign in _WORD_START)]
        candidates += tokenizer.tokenize(symbol)
        for piece in candidates:
            index = find_token(tokenizer, piece)
            if index is not None and piece.lstrip(_WORD_START) == symbol:
                found.add(index)
    return np.asarray(sorted(found - set(tokenizer.all_special_ids)), dtype=np.int32)


def skip_setting(tokenizer: PreTrainedTokenizerBase, ids: Collection[int]) -> bool | tuple[str, ...]:
    """The ``skip_punctuation`` under which exactly these ids yield no document vectors."""
    if not ids:
        return False
    if sorted(ids) == punctuation_ids(tokenizer).tolist():
        return True
    return tuple(tokenizer.convert_ids_to_tokens(sorted(ids)))
