"""The stages of a search, taken apart: ways from a query to its best documents, over one and the same index.

``python -m benchmarks.search_stages --data DIR --model DIR-OR-NAME@ALIAS [--root STORAGE] --cache DIR``;
arguments as for ``benchmarks.search``. The ways, of the same centroids, postings and residuals:

- gains, centroids, residuals: what :class:`~colbert_core.index.Searcher` does. Documents met by the probes,
  by the summed gains of their centroids; the best by all of their centroids; the best of those by residuals;
- centroids, residuals: PLAID's. All documents that the probes meet go to the interaction of centroids;
- gains, residuals: tachiom's two levels. The best by summed gains are scored by residuals;
- probed tokens: WARP's. The tokens in the probed centroids are scored, and nothing else;
- probed tokens, residuals: the best by WARP's scores are scored by all of their residuals.

All begin with the same tables of a query: its scores with all centroids, and bytes of them for the
interaction, which WARP's ways never read. WARP's estimate takes the best 128 centroids of each token, however
few are probed.

One thread, one query at a time; ways and settings take turns in every round, medians over the rounds. Recall
is against exact MaxSim.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.probed_tokens import BOUND, ProbedTokens
from benchmarks.support.results import finish
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_ours import build_index
from benchmarks.support.search_vectors import add_set_options, chosen_set, exact_ranking, texts_of
from colbert_core.config import CodecConfig, SearchConfig
from colbert_core.index import Searcher, open_index
from colbert_core.index.engine import CpuEngine, run_here
from colbert_core.index.query import prepare_query

K = 10
LEVELS = (0.80, 0.85, 0.90, 0.95, 0.98)
OURS = "gains, centroids, residuals"
RERANKS = (50, 100, 200, 400, 1000)
PROBES = (2, 4, 8, 16, 32)

Answer = Callable[[np.ndarray], np.ndarray]
console = Console(width=120)


@dataclass(frozen=True)
class Setting:
    """A way with its cut-offs.

    Attributes:
        way: which stages.
        about: the cut-offs.
        answer: the best documents' numbers of a query.
    """

    way: str
    about: str
    answer: Answer


def main() -> int:
    parser = argparse.ArgumentParser(description="The stages of a search, taken apart.")
    parser.add_argument("--quick", action="store_true", help="the sample corpus, an untrained model")
    add_set_options(parser)
    parser.add_argument("--vectors", type=int, help="recombine the vectors to so many")
    parser.add_argument("--bits", type=int, nargs="+", default=(2, 4), choices=(2, 4), help="of residuals")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds, questions = (1, 40) if options.quick else (options.rounds, options.questions)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name:
        cache = options.cache or Path(name) / "cache"
        files = chosen_set(texts_of(options.data, questions), options, cache)
        about, exact = files.about, exact_ranking(files)[:, :K]
        for bits in options.bits:
            index = Path(name) / f"{bits}-bit"
            torch.set_num_threads(2)
            build_index(files, index, CodecConfig(residual_bits=bits), threads=2)
            torch.set_num_threads(1)
            rows += [{"bits": bits, **row} for row in readings(settings(index), files, exact, rounds)]
    fastest = {(bits, level): by_way(rows, bits, level) for bits in options.bits for level in LEVELS}
    console.print(curve_table(rows, about), level_table(fastest))
    return finish(
        "search_stages",
        settings={"set": about, "threads": 1, "rounds": rounds},
        results={"curves": rows},
        goals=[],
        console=console,
        quick=options.quick,
    )


def settings(index: Path) -> list[Setting]:
    """All ways over an index of one shard, each with its settings."""
    searcher = open_index(index)
    codec, (shard,) = searcher.codec, searcher.shards
    engine, tokens = CpuEngine(codec, [shard]), ProbedTokens(codec, shard)
    numbers = np.array([int(name) for name in shard.ids(range(len(shard)))])

    def cut(way: str, probes: int, rerank: int, candidates: int | None) -> Setting:
        """Our own search: with fewer candidates than documents, so that the probes choose among them."""
        params = SearchConfig(probes=probes, rerank=rerank, candidates=candidates or len(shard) - 1)
        about = f"probes={probes}" + (f" candidates={candidates}" if candidates else "") + f" rerank={rerank}"
        return Setting(way, about, lambda query: _numbers(searcher, query, params))

    def warp(probes: int, rerank: int | None) -> Setting:
        def answer(query: np.ndarray) -> np.ndarray:
            tables = engine.tables(prepare_query(codec, query), max(BOUND, probes), run_here)
            try:
                documents, scores = tokens.search(tables, probes)
                if rerank:
                    documents = documents[_best(scores, rerank)]
                    scores = engine.score(0, tables, documents)
            finally:
                engine.release(tables)
            return numbers[documents[_best(scores, K)]]

        way = "probed tokens" + (", residuals" if rerank else "")
        return Setting(way, f"probes={probes}" + (f" rerank={rerank}" if rerank else ""), answer)

    few = [(2, 50), (4, 100), (8, 100), (8, 200), (16, 400), (32, 1000)]
    return [
        *(cut(OURS, probes, rerank, 5 * rerank) for probes, rerank in few),
        *(cut("centroids, residuals", probes, rerank, None) for probes, rerank in few),
        *(
            cut("gains, residuals", probes, rerank, rerank)
            for probes, rerank in (*few, (16, 1000), (16, 4000))
        ),
        *(warp(probes, None) for probes in (*PROBES, 64, 128)),
        *(
            warp(probes, rerank)
            for probes, rerank in ((2, 50), (4, 50), (8, 50), (16, 50), (16, 200), (32, 200))
        ),
    ]


def readings(
    chosen: Sequence[Setting], files: VectorFiles, exact: np.ndarray, rounds: int
) -> list[dict[str, Any]]:
    """Recall and p50 of every setting."""
    times: list[list[float]] = [[] for _ in chosen]
    recall = []
    for setting in chosen:  # compiles, and reads what the first search has to
        found = [setting.answer(query) for query in files.queries]
        hits = sum(len(np.intersect1d(mine, best)) for mine, best in zip(found, exact, strict=True))
        recall.append(hits / exact.size)
    for _ in track(range(rounds), "searching", console=console, transient=True):
        for setting, mine in zip(chosen, times, strict=True):
            each = []
            for query in files.queries:
                begin = time.perf_counter()
                setting.answer(query)
                each.append(1000 * (time.perf_counter() - begin))
            mine.append(float(np.median(each)))
    return [
        {"way": setting.way, "settings": setting.about, "recall": share, "p50_ms": statistics.median(mine)}
        for setting, share, mine in zip(chosen, recall, times, strict=True)
    ]


def by_way(rows: Sequence[Mapping[str, Any]], bits: int, level: float) -> dict[str, float]:
    """The least p50 of each way that reaches a level of recall."""
    found: dict[str, float] = {}
    for row in rows:
        if row["bits"] == bits and row["recall"] >= level:
            found[row["way"]] = min(row["p50_ms"], found.get(row["way"], float("inf")))
    return found


def curve_table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Table:
    title = f"{about['texts']}: {about['vectors']:,} vectors, {about['documents']:,} documents"
    columns = ("bits", "way", "settings", f"recall@{K}", "p50 ms")
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        figures = f"{row['recall']:.3f}", f"{row['p50_ms']:.2f}"
        table.add_row(str(row["bits"]), row["way"], row["settings"], *figures)
    return table


def level_table(fastest: Mapping[tuple[int, float], Mapping[str, float]]) -> Table:
    ways = list(dict.fromkeys(way for found in fastest.values() for way in found))
    table = Table("bits", f"recall@{K}", *ways, title="least p50 in ms", title_justify="left")
    for (bits, level), found in fastest.items():
        cells = (f"{found[way]:.2f}" if way in found else "" for way in ways)
        table.add_row(str(bits), f"≥ {level:.2f}", *cells)
    return table


def _numbers(searcher: Searcher, query: np.ndarray, params: SearchConfig) -> np.ndarray:
    (hits,) = searcher.search([query], K, params)
    return np.array([int(hit.id) for hit in hits], dtype=np.int64)


def _best(scores: np.ndarray, keep: int) -> np.ndarray:
    """Places of the best, in no particular order."""
    if len(scores) <= keep:
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - keep)[len(scores) - keep :]


if __name__ == "__main__":
    raise SystemExit(main())
