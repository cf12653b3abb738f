"""Training steps of this project in one process, without Ray, driven by lines; also the machine's limits."""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.support.line_protocol import serve
from benchmarks.support.process_group import join_alone
from benchmarks.support.results import versions
from cluster.config import OptimizerConfig, Recipe, TrainPhase, parse_recipe
from cluster.engine import TrainingEngine
from cluster.streams import TrainingTuple, TupleIndex, UnitSchedule, UnitSlot
from cluster.training_figures import WorkerGroup
from cluster.training_model import agreed_precision, prepare_model
from cluster.training_step import UnitObjective
from cluster.training_units import TokenisedUnit, UnitSource, tokenise_unit
from colbert_core.formats import load_model

TOKEN_BUDGET = 2048
# Names of torch's matrix products in a profile, forward and backward. Those of attention are part of a
# kernel of ours, and not among them.
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_linear")


class Program:
    """The commands: load, prepare, loss, step, profile, bare, gemm."""

    def load(self, model: str, lengths: dict[str, int], precision: str, lr: float) -> dict[str, str]:
        del lengths  # stored with the model
        phase = TrainPhase(
            name="step",
            data=("none",),
            nway=8,
            steps=1_000_000,
            precision="fp32" if precision == "fp32" else "autocast",
            # As the recipes for CPUs have it: small batches, little padding.
            token_budget=TOKEN_BUDGET,
            optimizer=OptimizerConfig(name="adamw", lr=lr, decay="constant"),
            zero_stage=0,
        )
        self._start(model, phase)
        return versions(("torch", "transformers", "deepspeed"))

    def prepare(self, path: str) -> dict[str, float]:
        """Tokenises all steps of a case; tokenising is not part of a step's time."""
        steps = json.loads(Path(path).read_text(encoding="utf-8"))
        self._units = [
            [
                tokenise_unit(
                    UnitSlot(number, 0, number, 0, len(rows), 1.0),
                    [
                        TrainingTuple(
                            "", row["query"], row["documents"], np.asarray(row["scores"], dtype=np.float32)
                        )
                        for row in rows
                    ],
                    self._model.text,
                )
            ]
            for number, rows in enumerate(steps)
        ]
        tokens = padded = 0
        for (unit,) in self._units:
            tokens += sum(len(ids) for ids in unit.documents.ids)
            _, documents = self._objective.prepare(self._model, unit).batches
            padded += sum(part.input_ids.numel() for part in documents)
        return {"tokens": tokens, "padding": 1 - tokens / padded}

    def loss(self, index: int) -> float:
        """The loss of a step without dropout and without changing anything."""
        self._model.eval()
        (unit,) = self._units[index]
        with torch.no_grad():
            loss, _ = self._objective(self._model, self._objective.prepare(self._model, unit))
        self._model.train()
        return float(loss)

    def step(self, index: int) -> float:
        """Seconds of one optimiser step."""
        begin = time.perf_counter()
        self._run(self._units[index])
        return time.perf_counter() - begin

    def profile(self, index: int) -> dict[str, float]:
        """Where a step's processor time goes, and how fast its matrix products are."""
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as recorded:
            seconds = self.step(index)
        events = recorded.key_averages()
        total = sum(event.self_cpu_time_total for event in events)
        products = [event for event in events if event.key in PRODUCTS]
        spent = sum(event.self_cpu_time_total for event in products)
        work = sum(event.flops for event in products)
        return {
            "seconds": seconds,
            "product_share": spent / total,
            "product_gflops": work / 1e9,
            "product_gflop_per_s": work / 1e3 / spent,
        }

    def bare(self, recipe: dict[str, Any], model: str, paths: list[str], steps: int) -> list[float]:
        """Seconds of each step of a phase, with all its data tokenised before: no Ray, no stream, no log."""
        config: Recipe = parse_recipe(recipe)
        phase = config.train[0]
        self._start(model, phase)
        index = TupleIndex(paths)
        source = UnitSource(index, self._model.text, phase.nway)
        schedule = UnitSchedule(index.tuples, phase.micro_batch, phase.queries_per_step, phase.seed)
        units = [[source.unit(slot) for slot in schedule.step(step)] for step in range(steps)]
        seconds = []
        for step in units:
            begin = time.perf_counter()
            self._run(step)
            seconds.append(time.perf_counter() - begin)
        return seconds

    def gemm(self, rows: int, inner: int, columns: int, precision: str, repeats: int) -> float:
        """GFLOP/s of one matrix product."""
        kind = torch.float32 if precision == "fp32" else torch.bfloat16
        left, right = torch.randn(rows, inner).to(kind), torch.randn(inner, columns).to(kind)
        out = torch.empty(rows, columns, dtype=kind)
        seconds = []
        for _ in range(repeats + 2):
            begin = time.perf_counter()
            torch.mm(left, right, out=out)
            seconds.append(time.perf_counter() - begin)
        return 2e-9 * rows * inner * columns / statistics.median(seconds[2:])

    def _start(self, model: str, phase: TrainPhase) -> None:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        join_alone()
        self._model = prepare_model(load_model(model), phase)
        self._objective = UnitObjective(phase)
        self._engine = TrainingEngine(
            self._model,
            self._objective,
            phase.optimizer,
            total_steps=phase.steps,
            zero_stage=phase.zero_stage,
            precision=agreed_precision(phase, WorkerGroup()),
        )

    def _run(self, units: list[TokenisedUnit]) -> None:
        works = [self._objective.prepare(self._model, unit) for unit in units]
        with self._engine.accumulation():
            for unit, work in zip(units, works, strict=True):
                self._engine.backward(work, unit.slot.weight)
        self._engine.update()


if __name__ == "__main__":
    program = Program()
    serve(
        {
            "load": program.load,
            "prepare": program.prepare,
            "loss": program.loss,
            "step": program.step,
            "profile": program.profile,
            "bare": program.bare,
            "gemm": program.gemm,
        }
    )
