"""From text to the first answer: this project's index build against PyLate's with its PLAID index.

``python -m benchmarks.build --data DIR --peer-python pylate=PATH``, where DIR holds ``jaquad`` and ``jsquad``
in BEIR layout and PATH is the interpreter of an environment with PyLate. Without it only this project is
measured; without data, on the sample passages. ``--model`` as for ``benchmarks.search``.

The model is loaded before; then the clock runs from the texts, over their vectors and the index on disk, to
the answer to a first question. Both compress residuals to 4 bits per dimension, at their defaults
otherwise. Each build is made by a fresh process with ``--threads`` threads; they take turns, and a ratio is
the median of the ratios of the same round. 'bf16' is autocast over fp32 weights; 'bf16-weights' casts the
weights themselves, which this project does not do. The goal is for both as they come: ours encodes in bf16
where the processor has it, the peer in fp32 unless told otherwise. nDCG@10 by human labels, over the
questions whose passage is among the documents, shows that both indexes answer.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.encode_programs import MODES, OURS, default_leads, precision_of, start
from benchmarks.support.exported_model import export_model, some_of, write_texts
from benchmarks.support.precisions import add_precision_option, chosen_precisions
from benchmarks.support.results import Goal, finish
from benchmarks.support.search_vectors import Texts, add_set_options, texts_of
from colbert_core.metrics import evaluate_run

PEER = "pylate"
STAGES = ("encode_s", "index_s", "answer_s")
BITS, K = 4, 10
GOAL = 2.0

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Building an index, from text to the first answer.")
    parser.add_argument("--quick", action="store_true", help="a few sample passages, one round")
    add_set_options(parser)
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="pylate=PATH")
    parser.add_argument("--documents", type=int, default=1000, help="so many of the corpus, at random")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_precision_option(parser)
    options = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in options.peer_python)
    if unknown := set(pythons) - {PEER}:
        parser.error(f"--peer-python: no peer {', '.join(sorted(unknown))}; there is {PEER}")
    precisions = chosen_precisions(options)
    rounds, documents = (1, 32) if options.quick else (options.rounds, options.documents)
    torch.set_num_threads(options.threads)
    turns = [(OURS, precision) for precision in precisions]
    turns += [(PEER, mode) for each in precisions for mode in MODES[each] if PEER in pythons]
    readings: dict[tuple[str, str], list[dict[str, Any]]] = {turn: [] for turn in turns}
    versions: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name:
        folder = Path(name)
        texts = some_of(texts_of(options.data, options.questions), documents)
        model = export_model(options.model, options.root, texts.documents, folder / "model")
        write_texts(texts, folder / "texts.json")
        every = [turn for number in range(rounds) for turn in turns[number % 2 :] + turns[: number % 2]]
        for library, mode in track(every, description="building", console=console, transient=True):
            with start(library, pythons, options.threads) as process:
                versions[library] = process.call(
                    "load", model=str(folder / "model"), texts=str(folder / "texts.json")
                )
                # The first touch of the weights is no part of a build.
                process.call("vectors", mode=mode, count=2, out=str(folder / "warm.npy"))
                index = folder / "index"
                found = process.call("build", index=str(index), mode=mode, bits=BITS, k=K)
            found["index_bytes"] = sum(path.stat().st_size for path in index.rglob("*") if path.is_file())
            shutil.rmtree(index)
            readings[library, mode].append(found)
    rows = [row_of(library, mode, found, texts) for (library, mode), found in readings.items()]
    seconds = {(row["library"], row["mode"]): row["total_s"] for row in rows}
    console.print(table(rows, f"{texts.name}, {len(texts.documents)} documents, {model}"))
    return finish(
        "build",
        settings={
            "texts": texts.name,
            "documents": len(texts.documents),
            "questions": len(texts.questions),
            "model": model,
            "bits": BITS,
            "threads": options.threads,
            "rounds": rounds,
            "peers": versions,
        },
        results={"builds": rows},
        goals=[
            Goal(f"{library}'s time / ours, as they come", ratio, GOAL)
            for library, ratio in default_leads(seconds, pythons).items()
        ],
        console=console,
        quick=options.quick,
    )


def row_of(library: str, mode: str, found: Sequence[Mapping[str, Any]], texts: Texts) -> dict[str, Any]:
    """Medians over the rounds; the answers are those of the last."""
    row: dict[str, Any] = {"library": library, "mode": mode}
    row |= {stage: statistics.median(each[stage] for each in found) for stage in STAGES}
    row["total_s"] = [sum(each[stage] for stage in STAGES) for each in found]
    last = found[-1]
    run = {
        str(question): {str(document): float(-rank) for rank, document in enumerate(documents)}
        for question, documents in enumerate(last["answers"])
    }
    labels = {
        str(question): {str(document): label for document, label in relevant.items()}
        for question, relevant in enumerate(texts.relevant)
    }
    row["ndcg@10"] = evaluate_run(run, labels, ["nDCG@10"])["nDCG@10"]
    row["tokens"] = last["tokens"]
    row["bytes_per_token"] = last["index_bytes"] / last["tokens"]
    return row


def table(rows: Sequence[Mapping[str, Any]], title: str) -> Table:
    made = Table("mode", "library", title=title, title_justify="left")
    columns = ("encode s", "index s", "answer s", "total s", f"{OURS} is", "bytes/token", "nDCG@10")
    for heading in columns:
        made.add_column(heading, justify="right")
    total = {(row["library"], row["mode"]): statistics.median(row["total_s"]) for row in rows}
    for row in rows:
        whole = total[row["library"], row["mode"]]
        ratio = "" if row["library"] == OURS else f"{whole / total[OURS, precision_of(row['mode'])]:.2f}×"
        made.add_row(
            row["mode"],
            row["library"],
            *(f"{row[stage]:.2f}" for stage in STAGES),
            f"{whole:.2f}",
            ratio,
            f"{row['bytes_per_token']:.1f}",
            f"{row['ndcg@10']:.4f}",
        )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
