"""Exact late interaction of one query with a list of candidates, against the machine's matrix products.

``python -m benchmarks.maxsim [--quick] [--peer-python maxsim-cpu=PATH]``, where PATH is the interpreter of an
environment with that package. Made-up vectors of 128 dimensions, float32; documents have log-normal lengths,
mean 120. Plain torch scores them padded to the longest, and ragged with ``segment_reduce``; each library's
input is made before the clock starts.

The peak is the best rate of a float32 matrix product that this machine shows in the same run, by torch or by
numpy, of 2048³ or of 16,384 rows with the query; it is read before and after every round, and a share is of
the round's best. A call's work is that of the product alone, 2 × tokens × query length × dimensions; finding
maxima and adding them up counts as none. All take turns, and figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.line_protocol import Peer
from benchmarks.support.results import Goal, finish

OURS, PEER, PLAIN = "raycolbert", "maxsim-cpu", ("torch padded", "torch ragged")
QUERY, DIM = 32, 128
MEAN_TOKENS, DEVIATION = 120.0, 0.55  # the deviation is of the lengths' logarithms
CASES = {"100 candidates": 100, "1,000 candidates": 1000, "390k tokens": 3250}
QUICK_CASES = {"100 candidates": 100, "1,000 candidates": 1000}
LONG = 1000  # candidates from which on a list is long
PRODUCTS = {"2048³": (2048, 2048, 2048), "the query's": (16_384, DIM, QUERY)}
GOAL = 0.8

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Exact late interaction with long candidate lists.")
    parser.add_argument("--quick", action="store_true", help="the two shorter lists, few readings")
    parser.add_argument(
        "--peer-python", action="append", default=[], metavar="NAME=PATH", help=f"{PEER}=PATH"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in options.peer_python)
    if unknown := set(pythons) - {PEER}:
        parser.error(f"--peer-python: no peer {', '.join(sorted(unknown))}; there is {PEER}")
    rounds = 3 if options.quick else options.rounds
    cases = QUICK_CASES if options.quick else CASES
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name, ExitStack() as stack:
        folder = Path(name)
        here = stack.enter_context(start(OURS, sys.executable, options.threads))
        processes = dict.fromkeys((OURS, *PLAIN), here)
        for peer, python in pythons.items():
            processes[peer] = stack.enter_context(start(peer, python, options.threads))
        versions = {peer: processes[peer].call("versions") for peer in (OURS, *pythons)}
        rows = [
            measure(case, make_case(folder / case, count), processes, rounds) for case, count in cases.items()
        ]
    console.print(table(rows))
    goals = [
        Goal(f"{row['case']}: share of the matrix products' peak", row["methods"][OURS]["share"], GOAL)
        for row in rows
        if row["documents"] >= LONG
    ]
    return finish(
        "maxsim",
        settings={
            "query": QUERY,
            "dim": DIM,
            "threads": options.threads,
            "rounds": rounds,
            "peers": versions,
        },
        results={"cases": rows},
        goals=goals,
        console=console,
        quick=options.quick,
    )


def start(name: str, python: str, threads: int) -> Peer:
    names = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = dict.fromkeys((*names, "NUMBA_NUM_THREADS"), str(threads)) | {"RAYCOLBERT_PEER": name}
    return Peer(name, python, "benchmarks.support.maxsim_programs", environment)


def make_case(folder: Path, documents: int) -> Path:
    """Writes a query and documents with unit vectors."""
    chance = np.random.default_rng(documents)
    middle = np.log(MEAN_TOKENS) - DEVIATION**2 / 2
    lengths = np.clip(np.rint(chance.lognormal(middle, DEVIATION, documents)), 4, 512).astype(np.int64)
    vectors = chance.standard_normal((int(lengths.sum()) + QUERY, DIM), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    folder.mkdir()
    np.save(folder / "query.npy", vectors[:QUERY])
    np.save(folder / "documents.npy", vectors[QUERY:])
    np.save(folder / "lengths.npy", lengths)
    return folder


def measure(case: str, folder: Path, processes: Mapping[str, Peer], rounds: int) -> dict[str, Any]:
    """Times all methods on a case in turn, and the machine's products between them."""
    lengths = np.load(folder / "lengths.npy")
    work = 2e-9 * int(lengths.sum()) * QUERY * DIM
    repeats = 5 if len(lengths) >= LONG else 15
    scores = {}
    for method, process in processes.items():
        process.call("scores", method=method, folder=str(folder), out=str(folder / "scores.npy"))
        scores[method] = np.load(folder / "scores.npy")
    seconds: dict[str, list[float]] = {method: [] for method in processes}
    peaks: list[float] = []
    rates: dict[str, list[float]] = {}
    for number in track(range(rounds), description=case, console=console, transient=True):
        before = products(processes[OURS], rates)
        for method in _rotated(list(processes), number):
            found = processes[method].call("time", method=method, folder=str(folder), repeats=repeats)
            seconds[method].append(statistics.median(found))
        peaks.append(max(before, products(processes[OURS], rates)))
    methods = {}
    for method, spent in seconds.items():
        shares = [work / each / peak for each, peak in zip(spent, peaks, strict=True)]
        methods[method] = {
            "ms": 1000 * statistics.median(spent),
            "gflop_per_s": work / statistics.median(spent),
            "share": statistics.median(shares),
            "shares": [min(shares), max(shares)],
            "of_ours": statistics.median(
                theirs / ours for theirs, ours in zip(spent, seconds[OURS], strict=True)
            ),
            "difference": float(np.abs(scores[method] - scores[OURS]).max()),
        }
    return {
        "case": case,
        "documents": len(lengths),
        "tokens": int(lengths.sum()),
        "peak_gflop_per_s": statistics.median(peaks),
        "products_gflop_per_s": {name: statistics.median(found) for name, found in rates.items()},
        "methods": methods,
    }


def products(process: Peer, rates: dict[str, list[float]]) -> float:
    """Reads the rates of all products once, notes them, and returns the best, in GFLOP/s."""
    best = 0.0
    for name, (rows, inner, columns) in PRODUCTS.items():
        for library in ("torch", "numpy"):
            found = process.call(
                "product", library=library, rows=rows, inner=inner, columns=columns, repeats=3
            )
            rate = 2e-9 * rows * inner * columns / statistics.median(found)
            rates.setdefault(f"{library} {name}", []).append(rate)
            best = max(best, rate)
    return best


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table("candidates", "", title=f"one query of {QUERY} × {DIM}, float32", title_justify="left")
    for heading in ("ms", "GFLOP/s", "of the peak", f"{OURS} is", "difference"):
        made.add_column(heading, justify="right")
    for row in rows:
        for method, found in row["methods"].items():
            low, high = found["shares"]
            made.add_row(
                f"{row['case']}, {row['tokens']:,} tokens" if method == OURS else "",
                method,
                f"{found['ms']:.2f}",
                f"{found['gflop_per_s']:.0f}",
                f"{found['share']:.0%} ({low:.0%}–{high:.0%})",
                "" if method == OURS else f"{found['of_ours']:.2f}×",
                "" if method == OURS else f"{found['difference']:.1e}",
            )
        for name, rate in row["products_gflop_per_s"].items():
            made.add_row("", f"[dim]product, {name}[/]", "", f"[dim]{rate:.0f}[/]", "", "", "")
    return made


def _rotated(names: Sequence[str], number: int) -> list[str]:
    """The names, another one first each time."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


if __name__ == "__main__":
    raise SystemExit(main())
