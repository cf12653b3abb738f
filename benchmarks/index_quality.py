"""What filters and token pooling do to the quality of a search.

``python -m benchmarks.index_quality [--quick] [--data DIR] [--model DIR-OR-NAME@ALIAS] [--root STORAGE]
[--cache DIR] [--vectors N]``; arguments as for ``benchmarks.search``, N for the filters. Two tables:

- recall@10 against exact MaxSim over the documents that a filter lets pass, where a condition on a metadata
  column selects 100, 10, 1 and 0.1 % of them at random, at the default and at a small quality setting;
- nDCG@10 by human labels, and recall@10 against the exact ranking of all vectors, with one vector kept in 1,
  2 and 3: by exact MaxSim of the pooled vectors, and by an index of them.

``--quick`` takes the sample corpus, for the filters recombined to more documents.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.results import Goal, finish
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_ours import build_index
from benchmarks.support.search_vectors import (
    Texts,
    add_set_options,
    encoded,
    exact_scores,
    pooled,
    recombined,
    texts_of,
)
from colbert_core.config import CodecConfig, SearchConfig
from colbert_core.index import open_index
from colbert_core.metrics import evaluate_run

SHARES = (1.0, 0.1, 0.01, 0.001)
SETTINGS = {"default": SearchConfig(), "small": SearchConfig(probes=4, candidates=400, rerank=100)}
POOLING = (1, 2, 3)
QUICK_VECTORS = 150_000
K = 10

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Quality of filtered search and of pooled vectors.")
    parser.add_argument("--quick", action="store_true", help="the sample corpus, recombined")
    add_set_options(parser)
    parser.add_argument("--vectors", type=int, help="recombine the vectors to so many for the filters")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    questions = 60 if options.quick else options.questions
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name:
        folder = Path(name)
        cache = options.cache or folder / "cache"
        texts = texts_of(options.data, questions)
        whole = encoded(texts, options.model, options.root, cache)
        sets = {factor: whole if factor == 1 else pooled(whole, factor, cache) for factor in POOLING}
        wanted = QUICK_VECTORS if options.quick else options.vectors
        files = recombined(whole, wanted, cache) if wanted else whole
        filtered = filter_rows(files, folder / "filters", options.threads)
        rows = pooling_rows(sets, texts, folder, options.threads)
        about = {"filters": files.about, "pooling": whole.about}
    console.print(filter_table(filtered, about["filters"]), pooling_table(rows, about["pooling"]))
    goals = [
        Goal(f"recall@10 at {row['share']:.1%}, {row['setting']}", row["recall"], 0.90)
        for row in filtered
        if row["setting"] == "default" or row["share"] <= 0.01
    ]
    return finish(
        "index_quality",
        settings={"sets": about, "threads": options.threads},
        results={"filters": filtered, "pooling": rows},
        goals=goals,
        console=console,
        quick=options.quick,
    )


def filter_rows(files: VectorFiles, index: Path, threads: int) -> list[dict[str, Any]]:
    """Recall and latency under filters of each selectivity."""
    count = len(files.lengths)
    rank = np.random.default_rng(0).permutation(count)  # a filter lets those below a bound pass
    build_index(files, index, CodecConfig(), threads, pa.table({"rank": rank}))
    searcher = open_index(index, threads=threads)
    searcher.search(files.queries[:2], K)
    scores = exact_scores(files)
    rows = []
    for share in SHARES:
        bound = max(1, round(share * count))
        masked = np.where(rank < bound, scores, -np.inf)
        best = np.argsort(-masked, axis=1, kind="stable")[:, : min(K, bound)]
        condition = None if share == 1 else pc.field("rank") < bound
        for name, setting in SETTINGS.items():
            times, hits = [], 0
            for query, wanted in zip(files.queries, best, strict=True):
                begin = time.perf_counter()
                (found,) = searcher.search([query], K, setting, condition)
                times.append(1000 * (time.perf_counter() - begin))
                hits += len({int(hit.id) for hit in found} & set(wanted.tolist()))
            rows.append(
                {
                    "share": share,
                    "documents": bound,
                    "setting": name,
                    "recall": hits / best.size,
                    "p50_ms": float(np.median(times)),
                }
            )
    searcher.close()
    return rows


def pooling_rows(
    sets: Mapping[int, VectorFiles], texts: Texts, folder: Path, threads: int
) -> list[dict[str, Any]]:
    """Quality and size with pooled vectors."""
    whole = np.argsort(-exact_scores(sets[1]), axis=1, kind="stable")[:, :K]
    rows = []
    for factor, files in sets.items():
        index = folder / f"pooled-{factor}"
        build_index(files, index, CodecConfig(), threads)
        searcher = open_index(index, threads=threads)
        found = [
            [int(hit.id) for hit in hits] for hits in searcher.search(files.queries, K, SETTINGS["default"])
        ]
        searcher.close()
        exact = np.argsort(-exact_scores(files), axis=1, kind="stable")[:, :K].tolist()
        size = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
        rows.append(
            {
                "factor": factor,
                "vectors": len(files.vectors),
                "size_mb": size / 2**20,
                "exact_ndcg": _ndcg(exact, texts.relevant),
                "exact_recall": _recall(exact, whole),
                "index_ndcg": _ndcg(found, texts.relevant),
                "index_recall": _recall(found, whole),
            }
        )
    return rows


def filter_table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Table:
    made = f", recombined from {about['recombined_from']:,}" if "recombined_from" in about else ""
    table = Table(
        *("passes", "documents", "setting", "recall@10", "p50 ms"),
        title=f"filters · {about['texts']}: {about['vectors']:,} vectors{made}, "
        f"{about['documents']:,} documents",
        title_justify="left",
    )
    for row in rows:
        cells = (f"{row['documents']:,}", row["setting"], f"{row['recall']:.3f}", f"{row['p50_ms']:.2f}")
        table.add_row(f"{row['share']:.1%}", *cells)
    return table


def pooling_table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Table:
    table = Table(
        *("one vector in", "vectors", "MB", "nDCG@10, exact", "recall@10, exact"),
        *("nDCG@10, index", "recall@10, index"),
        title=f"pooling · {about['texts']}, {about['model']}",
        title_justify="left",
    )
    for row in rows:
        quality = (
            f"{row[name]:.4f}" for name in ("exact_ndcg", "exact_recall", "index_ndcg", "index_recall")
        )
        table.add_row(str(row["factor"]), f"{row['vectors']:,}", f"{row['size_mb']:.2f}", *quality)
    return table


def _recall(found: Sequence[Sequence[int]], wanted: np.ndarray) -> float:
    return sum(len({*a} & {*b}) for a, b in zip(found, wanted.tolist(), strict=True)) / wanted.size


def _ndcg(found: Sequence[Sequence[int]], relevant: Sequence[Mapping[int, int]]) -> float:
    run = {str(q): {str(key): float(-rank) for rank, key in enumerate(row)} for q, row in enumerate(found)}
    labels = {str(q): {str(key): label for key, label in each.items()} for q, each in enumerate(relevant)}
    return evaluate_run(run, labels, ["nDCG@10"])["nDCG@10"]


if __name__ == "__main__":
    raise SystemExit(main())
