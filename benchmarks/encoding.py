"""Documents encoded a second, against PyLate and sentence-transformers on the same model and texts.

``python -m benchmarks.encoding --data DIR --peer-python pylate=PATH --peer-python
sentence-transformers=PATH``, where DIR holds ``jaquad`` and ``jsquad`` in BEIR layout and PATH is the
interpreter of an environment with that library. Without peers only this project is measured; without data,
on the sample passages. ``--model`` takes another model than the untrained one, as ``benchmarks.search`` does.

All load one directory and encode the same passages, tokenising included, each in a process of its own that
sees ``--threads`` threads, each with the batches of its own ``encode``. 'bf16' is autocast over fp32 weights;
'bf16-weights' casts the weights themselves, which the peers allow and this project does not do. The goal is
for the libraries as they come: ours encodes in bf16 where the processor has it, the peers in fp32 unless told
otherwise. They take turns, mode by mode, in every round; a ratio is the median of the ratios of the same
round. Vectors of the first documents are compared in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.encode_programs import MODES, OURS, default_leads, precision_of, ratios, start
from benchmarks.support.exported_model import export_model, some_of, write_texts
from benchmarks.support.line_protocol import Peer
from benchmarks.support.precisions import add_precision_option, chosen_precisions
from benchmarks.support.results import Goal, finish
from benchmarks.support.search_vectors import add_set_options, texts_of

PEERS = ("pylate", "sentence-transformers")
COMPARED = 8  # documents whose vectors are compared
GOAL = 1.5
Readings = dict[tuple[str, str], list[float]]

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of encoding documents.")
    parser.add_argument("--quick", action="store_true", help="a few sample passages, no peers, one round")
    add_set_options(parser)
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    parser.add_argument("--documents", type=int, default=256, help="so many of the corpus, at random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_precision_option(parser)
    options = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in options.peer_python)
    if unknown := set(pythons) - set(PEERS):
        parser.error(f"--peer-python: no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    precisions = chosen_precisions(options)
    rounds, documents = (1, 24) if options.quick else (options.rounds, options.documents)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name:
        folder = Path(name)
        texts = some_of(texts_of(options.data, options.questions), documents)
        model = export_model(options.model, options.root, texts.documents, folder / "model")
        write_texts(texts, folder / "texts.json")
        with ExitStack() as stack:
            processes, versions = {}, {}
            for library in (OURS, *pythons):
                process = stack.enter_context(start(library, pythons, options.threads))
                versions[library] = process.call(
                    "load", model=str(folder / "model"), texts=str(folder / "texts.json")
                )
                processes[library] = process
            lengths, differences = compare_vectors(processes, folder)
            readings = measure(processes, precisions, rounds)
    results = summary(readings, len(texts.documents))
    console.print(table(results, f"{texts.name}, {len(texts.documents)} documents, {model}"))
    for library, difference in differences.items():
        console.print(f"largest difference of a component, fp32: {difference:.1e} to {library}")
    return finish(
        "encoding",
        settings={
            "texts": texts.name,
            "documents": len(texts.documents),
            "vectors_of_first": lengths,
            "model": model,
            "threads": options.threads,
            "rounds": rounds,
            "peers": versions,
        },
        results={"modes": results, "difference_of_vectors": differences},
        goals=[
            Goal(f"documents/s over {library}, as they come", ratio, GOAL)
            for library, ratio in default_leads(readings, pythons).items()
        ],
        console=console,
        quick=options.quick,
    )


def compare_vectors(processes: Mapping[str, Peer], folder: Path) -> tuple[list[int], dict[str, float]]:
    """Whether all encode the same: the largest difference of a component to ours; warms them up, too.

    Returns:
        Vectors of the first documents, and the differences.

    Raises:
        SystemExit: a peer gives other numbers of vectors, so that it is not the same work.
    """
    lengths, found = {}, {}
    for library, process in processes.items():
        out = folder / f"{library}.npy"
        lengths[library] = process.call("vectors", mode="fp32", count=COMPARED, out=str(out))
        found[library] = np.load(out)
    for library in processes:
        if lengths[library] != lengths[OURS]:
            raise SystemExit(f"{library} gives {lengths[library]} vectors, {OURS} {lengths[OURS]}")
    differences = {
        library: float(np.abs(vectors - found[OURS]).max())
        for library, vectors in found.items()
        if library != OURS
    }
    return lengths[OURS], differences


def measure(processes: Mapping[str, Peer], precisions: Sequence[str], rounds: int) -> Readings:
    """Seconds of each library and mode; one reading before them is not counted."""
    turns = [
        (library, mode)
        for precision in precisions
        for library in processes
        for mode in (MODES[precision][:1] if library == OURS else MODES[precision])
    ]
    readings: Readings = {turn: [] for turn in turns}
    every = [(number, turn) for number in range(rounds) for turn in _rotated(turns, number)]
    for library, process in processes.items():
        for mode in {mode for name, mode in turns if name == library}:
            process.call("vectors", mode=mode, count=COMPARED, out="/dev/null")
    for _, (library, mode) in track(every, description="encoding", console=console, transient=True):
        readings[library, mode].append(processes[library].call("encode", mode=mode))
    return readings


def summary(readings: Readings, documents: int) -> list[dict[str, Any]]:
    """A row for each library and mode."""
    rows = []
    for (library, mode), seconds in readings.items():
        row: dict[str, Any] = {"library": library, "mode": mode, "seconds": seconds}
        row["documents_per_s"] = documents / statistics.median(seconds)
        if library != OURS:
            found = ratios(seconds, readings[OURS, precision_of(mode)])
            row["ratio"] = statistics.median(found)
            row["ratios"] = [min(found), max(found)]
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    made = Table("mode", "library", title=title, title_justify="left")
    for heading in ("documents/s", "seconds", f"{OURS} is"):
        made.add_column(heading, justify="right")
    for row in rows:
        ratio = ""
        if "ratio" in row:
            low, high = row["ratios"]
            ratio = f"{row['ratio']:.2f}× ({low:.2f}–{high:.2f})"
        seconds = f"{statistics.median(row['seconds']):.2f}"
        made.add_row(row["mode"], row["library"], f"{row['documents_per_s']:.1f}", seconds, ratio)
    return made


def _rotated(turns: Sequence[tuple[str, str]], number: int) -> list[tuple[str, str]]:
    """The turns, another one first each time."""
    first = number % len(turns)
    return [*turns[first:], *turns[:first]]


if __name__ == "__main__":
    raise SystemExit(main())
