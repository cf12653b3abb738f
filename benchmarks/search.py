"""Search engines over their own quality settings, on the same token vectors, against exact MaxSim.

``python -m benchmarks.search --data DIR --model DIR-OR-NAME@ALIAS [--root STORAGE] --cache DIR
--peer-python NAME=PATH``, where DIR holds ``jaquad`` and ``jsquad`` in BEIR layout, NAME is ``tachiom``,
``fast-plaid``, ``pylate`` or ``xtr-warp-rs``, and PATH the interpreter of an environment with that engine.
``--vectors N`` recombines the vectors to N (made-up data, named so in the results). ``--quick`` takes the
sample corpus, an untrained model and no peers.

Texts are encoded once, float16, and kept under ``--cache``; every engine gets these bytes. Recall is the
share of the exact MaxSim's best k that an engine returns, nDCG@10 is by human labels, beside that of the
exact ranking of the same questions. Each index is built by a process of its own and searched by another, with
``--threads`` threads; the engines take turns, setting by setting, in every round. A single query's latency is
that of one call with one query; batched QPS is of one call with all of them. Medians over the rounds; a
reading of more than ``STEADY_S`` seconds is taken once, in the first round. A build's time is without that of
compiling kernels, which a machine does once. A setting that would take more than ``PATIENCE_S`` seconds is
asked fewer questions, as the table says; one that follows a setting of more than ``SLOW_S`` seconds a query
is not measured. Memory is the peak resident set of the process: imports, and what it has mapped from disk,
included.

Peers' indexes are kept under ``--cache`` as well, with the figures of their builds, by engine, version,
settings, threads and processor: a benchmark that was interrupted goes on, and another one need not build
them again. Ours are built anew in every run.

At each level of recall that a peer reaches, our indexes that are no larger than the smallest peer's there are
compared with the fastest peers; all of ours, if none is so small.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.line_protocol import Peer
from benchmarks.support.results import Goal, finish, machine
from benchmarks.support.search_contenders import (
    CUTS,
    OURS,
    Contender,
    build,
    our_contenders,
    parsed,
    peer_contenders,
    started,
)
from benchmarks.support.search_engine import Settings
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_plot import plot
from benchmarks.support.search_vectors import (
    add_set_options,
    appearing,
    chosen_set,
    exact_ranking,
    texts_of,
)
from colbert_core.metrics import evaluate_run

DEPTHS = (10, 100)
LEVELS = (0.80, 0.85, 0.90, 0.95, 0.98)
STEADY_S = 30.0  # noise of the machine evens out in so long a reading
PATIENCE_S, FEWEST = 60.0, 20  # for one by one asking; questions that are asked all the same
SLOW_S = 2.0
INDEX, BUILT = "index", "built.json"

console = Console(width=150)


def main() -> int:
    parser = argparse.ArgumentParser(description="Search engines on the same token vectors.")
    parser.add_argument("--quick", action="store_true", help="the sample corpus, no peers, one round")
    add_set_options(parser)
    options, peers = parsed(parser)
    rounds, questions = (1, 60) if options.quick else (options.rounds, options.questions)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as folder:
        cache = options.cache or Path(folder) / "cache"
        texts = texts_of(options.data, questions)
        files = chosen_set(texts, options, cache)
        exact = exact_ranking(files)
        ours = our_contenders((4, 8), CUTS[1::3]) if options.quick else our_contenders((2, 4, 8), CUTS)
        contenders = [*ours, *(peer_contenders()[name] for name in peers)]
        bench = Benchmark(files, exact, texts.relevant, Path(folder), cache, options.threads)
        bench.run(contenders, peers, rounds)
    goals = bench.goals()
    results = {"exact_ndcg@10": bench.exact_ndcg, "engines": bench.engines, "curves": bench.rows}
    console.print(bench.curve_table(), bench.engine_table())
    name = "search" + (f"-{options.vectors}" if options.vectors else "")
    plot(name, bench.rows, quick=options.quick, console=console)
    return finish(
        name,
        settings={"set": bench.about, "threads": options.threads, "rounds": rounds, "peers": bench.versions},
        results=results,
        goals=goals,
        console=console,
        quick=options.quick,
    )


class Benchmark:
    """The measurements, and what they found.

    Attributes:
        about: what the set is.
        rows: a reading for each engine and setting.
        engines: figures of each engine's index.
        versions: of each engine's libraries.
        exact_ndcg: nDCG@10 of the exact ranking.
    """

    def __init__(
        self,
        files: VectorFiles,
        exact: np.ndarray,
        relevant: Sequence[Mapping[int, int]],
        folder: Path,
        cache: Path,
        threads: int,
    ) -> None:
        self._files, self._exact, self._threads = files, exact, threads
        self._folder, self._cache = folder, cache
        self._indexes: dict[str, Path] = {}
        self._relevant = {
            str(q): {str(key): label for key, label in labels.items()} for q, labels in enumerate(relevant)
        }
        self.about = files.about  # read now: without a cache the files are gone at the end
        self.rows: list[dict[str, Any]] = []
        self.engines: dict[str, dict[str, float]] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.exact_ndcg = self._ndcg(exact[:, :10])

    def run(self, contenders: Sequence[Contender], pythons: Mapping[str, str], rounds: int) -> None:
        """Builds all indexes, then searches them in turn."""
        for contender in track(contenders, "building", console=console, transient=True):
            with started(contender, pythons, self._threads) as process:
                versions = self.versions[contender.engine] = process.call("versions")
                place = self._indexes[contender.label] = self._place(contender, versions)
                if not place.exists():
                    with appearing(place) as staging:
                        built = build(process, contender, self._files, staging / INDEX, self._threads)
                        (staging / BUILT).write_text(json.dumps(built), encoding="utf-8")
            built = json.loads((place / BUILT).read_text(encoding="utf-8"))
            console.print(f"{contender.label}: built in {built['seconds']:,.0f} s")
            size = built["bytes"]
            self.engines[contender.label] = {
                "build_s": built["seconds"],
                "build_cpu_s": built["cpu_seconds"],
                "build_peak_mb": built["peak_mb"],
                "size_mb": size / 2**20,
                "bytes_per_token": size / len(self._files.vectors),
            }
        with ExitStack() as stack:
            processes = {}
            for contender in contenders:
                process = stack.enter_context(started(contender, pythons, self._threads))
                seconds = process.call(
                    "open",
                    folder=str(self._files.folder),
                    index=str(self._indexes[contender.label] / INDEX),
                    threads=self._threads,
                )
                self.engines[contender.label]["open_s"] = seconds
                processes[contender.label] = process
            self._search(contenders, processes, rounds)
            for label, process in processes.items():
                self.engines[label]["search_peak_mb"] = process.call("peak_mb")

    def _search(self, contenders: Sequence[Contender], processes: Mapping[str, Peer], rounds: int) -> None:
        readings: dict[tuple[str, int, int], list[dict[str, float]]] = {}
        steady: set[tuple[str, int, int]] = set()
        most = max(len(contender.searches) for contender in contenders)
        turns = [
            (contender, number)
            for number in range(most)
            for contender in contenders
            if number < len(contender.searches)
        ]
        for contender in contenders:  # compiles and reads what the first search has to
            self._read(processes[contender.label], contender.searches[0], DEPTHS[0])
        for _, (contender, number), k in track(
            list(itertools.product(range(rounds), turns, DEPTHS)),
            "searching",
            console=console,
            transient=True,
        ):
            key = contender.label, number, k
            before = readings.get((contender.label, number - 1, k))
            if key in steady or (number and (before is None or before[0]["p50_ms"] > 1000 * SLOW_S)):
                continue
            begin = time.perf_counter()
            readings.setdefault(key, []).append(
                self._read(processes[contender.label], contender.searches[number], k)
            )
            if time.perf_counter() - begin > STEADY_S:
                steady.add(key)
        for contender, number in sorted(turns, key=lambda turn: (turn[0].label, turn[1])):
            if any((contender.label, number, k) not in readings for k in DEPTHS):
                continue
            row: dict[str, Any] = {"engine": contender.label, "settings": contender.searches[number]}
            for k in DEPTHS:
                found = readings[contender.label, number, k]
                for figure in found[0]:
                    row[f"{figure}@{k}"] = statistics.median(each[figure] for each in found)
            self.rows.append(row)

    def _read(self, process: Peer, settings: Settings, k: int) -> dict[str, float]:
        out = self._folder / "found.npy"
        asked = {"k": k, "settings": settings, "first": 0}
        count = min(FEWEST, len(self._files.queries))
        times = process.call("single", out=str(out), last=count, **asked)
        if (wanted := min(len(self._files.queries), round(1000 * PATIENCE_S / np.mean(times)))) > count:
            count = wanted
            times = process.call("single", out=str(out), last=count, **asked)
        found = np.load(out)
        seconds = process.call("batch", last=count, **asked)
        best = self._exact[:count, :k]
        hits = sum(len(np.intersect1d(mine, theirs)) for mine, theirs in zip(found[:, :k], best, strict=True))
        return {
            "questions": count,
            "recall": hits / best.size,
            "ndcg": self._ndcg(found[:, :10]),
            "exact_ndcg": self._ndcg(self._exact[:count, :10]),
            "p50_ms": float(np.percentile(times, 50)),
            "p95_ms": float(np.percentile(times, 95)),
            "qps": count / seconds,
        }

    def _ndcg(self, found: np.ndarray) -> float:
        run = {
            str(q): {str(key): float(-rank) for rank, key in enumerate(row) if key >= 0}
            for q, row in enumerate(found.tolist())
        }
        asked = {query: self._relevant[query] for query in run}
        return evaluate_run(run, asked, ["nDCG@10"])["nDCG@10"]

    def _place(self, contender: Contender, versions: Mapping[str, str]) -> Path:
        """Where the index and the figures of its build belong."""
        if contender.engine == OURS:
            return self._folder / contender.label.replace(" ", "-")
        here = machine()
        key = [
            versions,
            contender.build,
            self._threads,
            here["processor"],
            here["instructions"],
            here["cores"],
        ]
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        return self._cache / f"{self._files.folder.name}-{contender.engine}-{digest}"

    # -- what it comes to -------------------------------------------------------------------------

    def goals(self) -> list[Goal]:
        """Without peers, that a thorough search finds what exact MaxSim does; with them, the lead."""
        mine = [row for row in self.rows if row["engine"].startswith(OURS)]
        theirs = [row for row in self.rows if not row["engine"].startswith(OURS)]
        if not theirs:
            return [Goal("best recall@10 against exact MaxSim", max(r["recall@10"] for r in mine), 0.98)]
        goals = []
        for k, level in itertools.product(DEPTHS, LEVELS):
            there = [row for row in theirs if row[f"recall@{k}"] >= level]
            here = [row for row in mine if row[f"recall@{k}"] >= level]
            if not there:
                continue
            name = f"recall@{k} ≥ {level:.2f}"
            smallest = min(self.engines[r["engine"]]["bytes_per_token"] for r in there)
            size = min((self.engines[r["engine"]]["bytes_per_token"] for r in here), default=float("inf"))
            if size <= smallest:
                here = [r for r in here if self.engines[r["engine"]]["bytes_per_token"] <= smallest]
            best_ms = min((row[f"p50_ms@{k}"] for row in here), default=float("inf"))
            best_qps = max((row[f"qps@{k}"] for row in here), default=0.0)
            goals += [
                Goal(f"{name}: peers' p50 / ours", min(r[f"p50_ms@{k}"] for r in there) / best_ms, 2.0),
                Goal(f"{name}: our QPS / peers'", best_qps / max(r[f"qps@{k}"] for r in there), 2.0),
            ]
            if k == DEPTHS[0]:
                goals.append(Goal(f"{name}: bytes per token", size, smallest, at_most=True))
        built = {label: figures["build_s"] for label, figures in self.engines.items()}
        ours = max(seconds for label, seconds in built.items() if label.startswith(OURS))
        fastest = min(seconds for label, seconds in built.items() if not label.startswith(OURS))
        goals.append(Goal("fastest peer's build time / our slowest", fastest / ours, 4.0))
        return goals

    def curve_table(self) -> Table:
        about = self.about
        table = Table(
            "engine",
            "settings",
            "asked",
            "R@10",
            "nDCG@10",
            "exact",
            "p50 ms",
            "p95 ms",
            "QPS",
            "R@100",
            "p50 ms",
            "QPS",
            title=f"{about['texts']}: {about['vectors']:,} vectors, {about['documents']:,} documents, "
            f"{about['questions']} questions; exact nDCG@10 {self.exact_ndcg:.4f}",
            title_justify="left",
        )
        for row in self.rows:
            table.add_row(
                row["engine"],
                " ".join(f"{key}={value}" for key, value in row["settings"].items()) or "default",
                f"{row['questions@10']:.0f}",
                f"{row['recall@10']:.3f}",
                f"{row['ndcg@10']:.4f}",
                f"{row['exact_ndcg@10']:.4f}",
                f"{row['p50_ms@10']:.2f}",
                f"{row['p95_ms@10']:.2f}",
                f"{row['qps@10']:,.0f}",
                f"{row['recall@100']:.3f}",
                f"{row['p50_ms@100']:.2f}",
                f"{row['qps@100']:,.0f}",
            )
        return table

    def engine_table(self) -> Table:
        columns = ("build_s", "build_cpu_s", "build_peak_mb", "size_mb", "bytes_per_token", "open_s")
        table = Table("engine", *columns, "search_peak_mb")
        for label, figures in self.engines.items():
            table.add_row(label, *(f"{figures[name]:,.2f}" for name in (*columns, "search_peak_mb")))
        return table


if __name__ == "__main__":
    raise SystemExit(main())
