"""Latency, throughput and build time as the index grows, and what of it the scan of all centroids takes.

``python -m benchmarks.growth --data DIR --model DIR-OR-NAME@ALIAS [--root STORAGE] --cache DIR``; arguments
as for ``benchmarks.search``. The vectors are recombined to the largest size (made-up data, named so in the
results); a smaller size is the first documents of one random order, so that all sizes are alike. One shard
at the codec's and the search's defaults, which means as many centroids as the PLAID rule gives. All sizes
are open at once and take turns in every round; medians over the rounds. An exponent is the slope of a line
through the logarithms of sizes and figures, by least squares.

'scan' is a query's product with all centroids and what else is as long as they are: its probes and its table
of bytes. Of a build, 'nearest' is the time that finding each vector's nearest centroid takes, computed from
its rate on a sample (the median of five readings). What 100 million passages would take is worked out from
the largest size's costs by unit. Recall@10 is against exact MaxSim, for some of the questions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.growth_ours import STAGES
from benchmarks.support.growth_scale import BUDGETS, UnitCosts, carried_on, scale_table
from benchmarks.support.line_protocol import Peer
from benchmarks.support.results import finish
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_vectors import (
    add_set_options,
    encoded,
    exact_scores,
    recombined,
    texts_of,
)
from colbert_core.config import SearchConfig

SIZES, QUICK_SIZES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (0.02, 0.06)  # millions of vectors
K, QUESTIONS_FOR_RECALL = 10, 60
LEAST_DIFFERENCE = 0.05  # of exponents, below which where two lines meet is anywhere
FITTED = {
    "p50_ms": "single query, p50",
    "scan_ms": "of it the scan of centroids",
    "rest_ms": "of it the rest",
    "batch_ms": "a query of a batch",
    "build_s": "build",
    "nearest_s": "of it finding nearest centroids",
}

console = Console(width=170)


def main() -> int:
    parser = argparse.ArgumentParser(description="The index as it grows.")
    parser.add_argument("--quick", action="store_true", help="the sample corpus, recombined to small sizes")
    add_set_options(parser)
    parser.add_argument("--sizes", type=float, nargs="+", default=SIZES, help="millions of vectors")
    parser.add_argument("--folder", type=Path, help="for sets and indexes; default: the temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sizes = sorted(QUICK_SIZES if options.quick else options.sizes)
    rounds, questions = (1, 40) if options.quick else (options.rounds, options.questions)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-", dir=options.folder) as name:
        folder = Path(name)
        cache = options.cache or folder / "cache"
        real = encoded(texts_of(options.data, questions), options.model, options.root, cache)
        whole = recombined(real, round(sizes[-1] * 1e6), cache)
        about = whole.about
        order = np.random.default_rng(0).permutation(len(whole.lengths))
        scores = exact_scores(whole, whole.queries[:QUESTIONS_FOR_RECALL])[:, order]
        rows = []
        with ExitStack() as stack:
            processes = []
            for size in track(sizes, "building", console=console, transient=True):
                rows.append(build(whole, order, size, folder, options.threads))
                process = stack.enter_context(start(options.threads))
                rows[-1]["open_s"] = process.call("open", **places(folder, size), threads=options.threads)
                # Searches need the questions alone.
                (Path(places(folder, size)["folder"]) / "vectors.npy").unlink()
                processes.append(process)
            search(rows, processes, scores, rounds, folder)
    fits = {name: exponent(rows, name) for name in FITTED}
    console.print(growth_table(rows, about), fit_table(fits))
    asked, dim = float(np.mean([len(query) for query in whole.queries])), whole.vectors.shape[1]
    probes = SearchConfig().probes
    costs = UnitCosts.of(rows[-1], threads=options.threads, probes=probes, query_vectors=asked)
    scaled = [
        carried_on(costs, search=SearchConfig(), query_vectors=asked, dim=dim, centroids=count)
        for count in BUDGETS
    ]
    console.print(scale_table(scaled))
    half = half_way(rows)
    console.print(
        "the scan takes half of a query's time "
        + (f"from {half:.2g} vectors on, if both go on as fitted" if half else "at no size, as fitted")
    )
    return finish(
        "growth",
        settings={
            "set": about,
            "k": K,
            "search": SearchConfig().model_dump(),
            "threads": options.threads,
            "rounds": rounds,
        },
        results={
            "sizes": rows,
            "exponents": fits,
            "scan_is_half_at_vectors": half,
            "unit_costs": asdict(costs),
            "carried_on": scaled,
        },
        goals=[],
        console=console,
        quick=options.quick,
    )


def start(threads: int) -> Peer:
    environment = {"OMP_NUM_THREADS": str(threads)}
    return Peer("growth", sys.executable, "benchmarks.support.growth_ours", environment)


def places(folder: Path, size: float) -> dict[str, str]:
    """Where a size's set and index are."""
    return {"folder": str(folder / f"set-{size}"), "index": str(folder / f"index-{size}")}


def build(whole: VectorFiles, order: np.ndarray, size: float, folder: Path, threads: int) -> dict[str, Any]:
    """Cuts a set of about so many million vectors out of the whole, and builds its index."""
    cut = int(np.searchsorted(np.cumsum(whole.lengths[order]), size * 1e6)) + 1
    documents = order[:cut]
    vectors = write_part(whole, documents, Path(places(folder, size)["folder"]))
    with start(threads) as process:
        built = process.call("build", **places(folder, size), threads=threads)
    return {
        "vectors": vectors,
        "documents": len(documents),
        "centroids": built["centroids"],
        "build_s": built["seconds"],
        "nearest_s": built["nearest_s"],
        "bytes_per_token": built["bytes"] / vectors,
    }


def write_part(whole: VectorFiles, documents: np.ndarray, folder: Path) -> int:
    """Writes some documents of a set, in that order, with all questions; returns their vectors."""
    folder.mkdir()
    lengths, offsets = whole.lengths[documents], whole.offsets
    shape = (int(lengths.sum()), whole.vectors.shape[1])
    out = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, shape)
    place = 0
    for document, length in zip(documents, lengths, strict=True):
        out[place : place + length] = whole.vectors[offsets[document] : offsets[document + 1]]
        place += length
    out.flush()
    np.save(folder / "lengths.npy", lengths.astype(np.int32))
    for name in ("queries.npy", "query_lengths.npy"):
        (folder / name).write_bytes((whole.folder / name).read_bytes())
    (folder / "set.json").write_text(json.dumps(whole.about), encoding="utf-8")
    return int(place)


def search(
    rows: Sequence[dict[str, Any]],
    processes: Sequence[Peer],
    scores: np.ndarray,
    rounds: int,
    folder: Path,
) -> None:
    """Adds to each row its latencies, throughput and recall.

    Args:
        rows: of each size.
        processes: its open index.
        scores: float32 ``[questions, documents]``: exact, in the order that sizes are cut from.
        rounds: how often each is asked.
        folder: for answers.
    """
    out = folder / "found.npy"
    asked: dict[str, Any] = {"k": K, "settings": {}}
    single: list[list[Mapping[str, list[float]]]] = [[] for _ in rows]
    batch: list[list[float]] = [[] for _ in rows]
    turns = [(number, place) for number in range(rounds + 1) for place in range(len(rows))]
    for number, place in track(turns, "searching", console=console, transient=True):
        times = processes[place].call("single", out=str(out), **asked)
        seconds = processes[place].call("batch", **asked)
        if number == 0:  # compiles, and reads what the first searches have to
            continue
        single[place].append(times)
        batch[place].append(seconds / len(times["total"]))
        best = np.argsort(-scores[:, : rows[place]["documents"]], axis=1, kind="stable")[:, :K]
        found = np.load(out)[: len(scores)]
        hits = sum(len(np.intersect1d(mine, theirs)) for mine, theirs in zip(found, best, strict=True))
        rows[place]["recall"] = hits / best.size
    for row, readings, spent in zip(rows, single, batch, strict=True):
        medians = [{stage: float(np.median(values)) for stage, values in each.items()} for each in readings]
        middle = {name: statistics.median(each[name] for each in medians) for name in ("total", *STAGES)}
        row |= {
            "p50_ms": middle["total"],
            "p95_ms": statistics.median(float(np.percentile(each["total"], 95)) for each in readings),
            "scan_ms": middle["tables"],
            "rest_ms": middle["total"] - middle["tables"],
            "scan_share": middle["tables"] / middle["total"],
            "thread_ms": {stage: middle[stage] for stage in STAGES if stage != "tables"},
            "batch_ms": 1000 * statistics.median(spent),
            "qps": 1 / statistics.median(spent),
        }


def exponent(rows: Sequence[Mapping[str, Any]], figure: str) -> dict[str, float]:
    """The power of the number of vectors that a figure grows with, and its factor."""
    logs = np.log([[row["vectors"], row[figure]] for row in rows])
    slope, constant = np.polyfit(logs[:, 0], logs[:, 1], 1)
    return {"exponent": float(slope), "factor": float(np.exp(constant))}


def half_way(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Vectors at which the scan takes as long as the rest, by both fits; None if they hardly differ."""
    scan, rest = exponent(rows, "scan_ms"), exponent(rows, "rest_ms")
    if scan["exponent"] - rest["exponent"] < LEAST_DIFFERENCE:
        return None
    return float((rest["factor"] / scan["factor"]) ** (1 / (scan["exponent"] - rest["exponent"])))


def growth_table(rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> Table:
    title = f"{about['texts']} recombined from {about['recombined_from']:,} vectors, {about['model']}"
    table = Table(title=title, title_justify="left")
    headings = ("vectors", "documents", "centroids", "p50 ms", "p95 ms", "scan ms", "scan", "gather ms")
    for heading in (*headings, "interact ms", "score ms", "QPS", "R@10", "build s", "nearest", "bytes/token"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            *(f"{row[name]:,}" for name in ("vectors", "documents", "centroids")),
            *(f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms", "scan_ms")),
            f"{row['scan_share']:.0%}",
            *(f"{value:.2f}" for value in row["thread_ms"].values()),
            f"{row['qps']:,.0f}",
            f"{row['recall']:.3f}",
            f"{row['build_s']:,.1f}",
            f"{row['nearest_s'] / row['build_s']:.0%}",
            f"{row['bytes_per_token']:.1f}",
        )
    return table


def fit_table(fits: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table("", "grows with vectors to the power of")
    for name, label in FITTED.items():
        table.add_row(label, f"{fits[name]['exponent']:.2f}")
    return table


if __name__ == "__main__":
    raise SystemExit(main())
