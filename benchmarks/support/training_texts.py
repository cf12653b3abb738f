"""Real questions and passages for training benchmarks, at the lengths that a case asks for."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

Lengths = Literal["natural", "log-normal", "full"]
LENGTHS: tuple[Lengths, ...] = ("natural", "log-normal", "full")

# Tokens of a passage under 'log-normal', before the limit cuts them: 52 % padding at a limit of 300.
MEAN_TOKENS, DEVIATION_TOKENS = 140.0, 80.0
SHORTEST = 12
SAMPLES = Path(__file__).parents[2] / "samples" / "ja"


class Texts:
    """Questions with their passage, and passages to choose negatives from.

    Args:
        data: a folder with the set in BEIR layout, or None for the samples of this project.
        tokenizer: measures lengths.
        limit: most tokens of a passage, markers included.
        part: which set.
    """

    def __init__(
        self,
        data: Path | None,
        tokenizer: PreTrainedTokenizerBase,
        limit: int,
        part: str = "jaquad/dev",
    ) -> None:
        folder = data / part if data else SAMPLES
        self.name = part if data else "samples/ja"
        form = "parquet" if data else "jsonl"
        self._passages = {row["_id"]: row["text"] for row in _rows(folder / f"corpus.{form}")}
        questions = {row["_id"]: row["text"] for row in _rows(folder / f"queries.{form}")}
        labels = folder / ("qrels.tsv" if data else "qrels/train.tsv")
        pairs = [line.split("\t") for line in labels.read_text(encoding="utf-8").splitlines()]
        self._asked = [
            (questions[query], passage)
            for query, passage, *_ in pairs
            if query in questions and passage in self._passages
        ]
        self._tokenizer, self._limit = tokenizer, limit

    def tuples(self, count: int, ways: int, lengths: Lengths, seed: int = 0) -> list[dict[str, Any]]:
        """Training tuples: a question, its passage first, and other passages, all different.

        Teacher scores are random in 0 … 1, the passage of the question has 1 and the last has 0: scaled
        already, so that a loss which scales them and one which does not see the same.
        """
        chance = random.Random(f"{seed}/{ways}/{lengths}")
        asked = random.Random(seed).sample(self._asked, count)
        made = []
        for question, passage in asked:
            others = chance.sample([key for key in self._passages if key != passage], ways - 1)
            documents = [self._shaped(key, lengths, chance) for key in (passage, *others)]
            scores = [1.0, *(chance.random() for _ in range(ways - 2)), 0.0]
            made.append({"query": question, "documents": documents, "scores": scores})
        return made

    def _shaped(self, key: str, lengths: Lengths, chance: random.Random) -> str:
        text = self._passages[key]
        if lengths == "natural":
            return text
        wanted = self._limit
        if lengths == "log-normal":
            variance = math.log(1 + (DEVIATION_TOKENS / MEAN_TOKENS) ** 2)
            drawn = chance.lognormvariate(math.log(MEAN_TOKENS) - variance / 2, math.sqrt(variance))
            wanted = min(self._limit, max(SHORTEST, round(drawn)))
        while True:
            ends = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ends = [end for _, end in ends["offset_mapping"]]
            if len(ends) >= wanted:
                # Markers take three places; 'full' is cut by every library's own truncation.
                return text if lengths == "full" else text[: ends[wanted - 4]]
            text += self._passages[chance.choice(list(self._passages))]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        yield from pq.read_table(path).to_pylist()
    else:
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
