"""What processes of a group do with the DeepSpeed engine, for comparison with plain PyTorch.

A program measures in every process of its group; :func:`lead` starts the groups and writes what rank 0 found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cluster.config import OptimizerConfig
from colbert_core.errors import ConfigError, TrainingError
from tests.engine_reference import (
    CASES,
    PLAIN,
    SCHEDULE_FREE,
    STEPS,
    UNITS,
    Small,
    furthest,
    objective,
    reference,
    units_of,
)
from tests.tiny_models import WORDS


class Trained:
    """An engine over :class:`Small`, and what the tests ask of it."""

    def __init__(
        self, stage: int, precision: Any, config: OptimizerConfig, *, seed: int = 0, **more: Any
    ) -> None:
        from cluster.engine import TrainingEngine

        self.engine = TrainingEngine(
            Small(seed), objective, config, total_steps=STEPS, zero_stage=stage, precision=precision, **more
        )
        self.norms: list[float] = []

    def steps(self, first: int, last: int) -> None:
        rank, workers, engine = dist.get_rank(), dist.get_world_size(), self.engine
        for step in range(first, last):
            with engine.accumulation():
                mine = units_of(step)[rank::workers]
                for unit in mine:
                    assert engine.backward(unit, 1 / UNITS) == 9
                if engine.collective_forward:
                    for _ in range(-(-UNITS // workers) - len(mine)):
                        engine.backward(units_of(step)[0], 0.0)
            outcome = engine.update()
            assert outcome.step == step + 1
            self.norms.append(outcome.gradient_norm)

    def y(self) -> dict[str, torch.Tensor]:
        state = self.engine._state
        return {name: state.get(name).clone() for name in state.parameters}


def views(folder: Path) -> dict[str, Any]:
    """Every case: y and x against the reference, x taken in the middle, save and load."""
    workers = dist.get_world_size()
    references = {p: reference(workers, SCHEDULE_FREE, precision=p) for p in ("fp32", "bf16", "autocast")}
    found = {}
    for stage, precision in CASES:
        expected = references[precision]
        run = Trained(stage, precision, SCHEDULE_FREE)
        run.steps(0, 3)
        x = run.engine.averaged_weights()
        case = f"{stage}-{precision}"
        state = folder / f"state-{workers}-{case}"
        state.mkdir(exist_ok=True)
        dist.barrier()
        written = run.engine.save(state)
        dist.barrier()
        run.steps(3, STEPS)
        resumed = Trained(stage, precision, SCHEDULE_FREE, seed=1)
        frozen = {n: p for n, p in resumed.engine.model.named_parameters() if n == "table.weight"}
        resumed.engine.load(state)
        if stage < 3:
            frozen["table.weight"].data.copy_(dict(Small(0).named_parameters())["table.weight"])
            resumed.steps(3, STEPS)
        found[case] = {
            "y": furthest(run.y(), expected["y"]),
            "x": furthest(run.engine.averaged_weights(), expected["x"]),
            "norm": max(abs(a - b) for a, b in zip(run.norms, expected["norms"], strict=True)),
            "resumed y": furthest(resumed.y(), run.y()) if stage < 3 else 0.0,
            "resumed x": (
                furthest(resumed.engine.averaged_weights(), run.engine.averaged_weights())
                if stage < 3
                else 0.0
            ),
            "counters": [group.get("k") for group in run.engine._optimizer.param_groups],
            "names": sorted(x),
            "dtypes": sorted({str(value.dtype) for value in x.values()}),
            "files": sorted(path.name for path in written),
            "frozen state": any(
                tensor.numel() == 31 * 7
                for state_ in run.engine._optimizer.state.values()
                for tensor in state_.values()
                if torch.is_tensor(tensor)
            ),
        }
    return found


def stage_three_resume(folder: Path) -> dict[str, Any]:
    """ZeRO-3 resumes bit for bit (the frozen table, which is not in the state, is the same)."""
    found = {}
    for precision in ("fp32", "bf16"):
        state = folder / f"third-{dist.get_world_size()}-{precision}"
        state.mkdir(exist_ok=True)
        run = Trained(3, precision, SCHEDULE_FREE)
        run.steps(0, 3)
        dist.barrier()
        run.engine.save(state)
        dist.barrier()
        run.steps(3, STEPS)
        resumed = Trained(3, precision, SCHEDULE_FREE)
        resumed.steps(0, 1)
        resumed.engine.load(state)
        resumed.steps(3, STEPS)
        found[precision] = [
            furthest(resumed.y(), run.y()),
            furthest(resumed.engine.averaged_weights(), run.engine.averaged_weights()),
        ]
    return found


def plain_adamw(folder: Path) -> dict[str, Any]:
    """AdamW with warm-up, decay and clipping, and its resume."""
    workers = dist.get_world_size()
    expected = reference(workers, PLAIN, clipping=0.05)
    found = {}
    for stage in range(4):
        state = folder / f"adamw-{workers}-{stage}"
        state.mkdir(exist_ok=True)
        run = Trained(stage, "fp32", PLAIN, gradient_clipping=0.05)
        run.steps(0, 3)
        dist.barrier()
        run.engine.save(state)
        dist.barrier()
        run.steps(3, STEPS)
        resumed = Trained(stage, "fp32", PLAIN, gradient_clipping=0.05)
        resumed.engine.load(state)
        resumed.steps(3, STEPS)
        found[str(stage)] = {
            "x": furthest(run.engine.averaged_weights(), expected["x"]),
            "resumed": furthest(resumed.y(), run.y()),
        }
    return found


def other_sizes(folder: Path) -> dict[str, Any]:
    """States of two workers, loaded by one, at another stage."""
    expected = reference(2, SCHEDULE_FREE)
    found = {}
    for saved, loaded in ((0, 3), (1, 0), (2, 1), (3, 2)):
        run = Trained(loaded, "fp32", SCHEDULE_FREE)
        run.engine.load(folder / f"state-2-{saved}-fp32")
        run.steps(3, STEPS)
        found[f"{saved} to {loaded}"] = max(
            furthest(run.y(), expected["y"]), furthest(run.engine.averaged_weights(), expected["x"])
        )
    return found


def encoder(folder: Path) -> dict[str, Any]:
    """The real objective, ranks with different numbers of encoder batches, one without a unit at all."""
    from cluster.config import TrainPhase
    from cluster.engine import TrainingEngine
    from cluster.streams import TrainingTuple, UnitSlot
    from cluster.training_model import prepare_model
    from cluster.training_step import UnitObjective
    from cluster.training_units import tokenise_unit
    from colbert_core.config import ColBERTConfig
    from colbert_core.encoder import ColBERT

    rank, workers = dist.get_rank(), dist.get_world_size()
    words = WORDS.split()

    def unit(model: ColBERT, step: int, place: int) -> Any:
        # The later a unit in its step, the longer its documents: 1, 2 or 4 batches of 512 tokens.
        texts = [" ".join(words[(step + i) % 20 :] * (1 + 3 * place)) for i in range(6)]
        scores = np.linspace(0, 1, 6, dtype=np.float32)
        item = TrainingTuple(f"q{place}", words[step + place], texts, scores)
        slot = UnitSlot(step * UNITS + place, 0, place, place, 1, 1 / UNITS)
        return tokenise_unit(slot, [item], model.text)

    found: dict[str, Any] = {}
    results = {}
    for case, stage, checkpointing in (("0", 0, False), ("3", 3, False), ("3 recomputed", 3, True)):
        phase = TrainPhase(
            name="p",
            data=("t",),
            steps=3,
            nway=6,
            token_budget=512,
            gradient_checkpointing=checkpointing,
            dropout=0.1,
            freeze=("word_embeddings",),
        )
        config = ColBERTConfig(dim=16, query_length=8, document_length=96)
        model = prepare_model(ColBERT.create(folder / "base", config, seed=1), phase)
        run = UnitObjective(phase)
        engine = TrainingEngine(
            model, run, OptimizerConfig(lr=3e-4), total_steps=3, zero_stage=stage, precision="fp32"
        )
        counts = []
        for step in range(3):
            # In the second step there is one unit only.
            everything = [unit(model, step, place) for place in range(UNITS)][: 1 if step == 1 else UNITS]
            works = [run.prepare(model, each) for each in everything]
            passes = [work.passes for work in works]
            counts.append(passes)
            mine = works[rank::workers]
            with engine.accumulation():
                for turn in range(-(-len(everything) // workers)):
                    least = max(passes[turn * workers : (turn + 1) * workers])
                    if turn < len(mine):
                        weight = 1 / len(everything)
                        mine[turn].passes = least if stage == 3 else mine[turn].passes
                        engine.backward(mine[turn], weight)
                    elif stage == 3:
                        idle = run.prepare(model, None)
                        idle.passes = least
                        engine.backward(idle, 0.0)
            engine.update()
        results[case] = engine.averaged_weights()
        found["passes"] = counts
    start = dict(ColBERT.create(folder / "base", config, seed=1).named_parameters())
    found["moved"] = max(float((start[n].detach() - x).abs().max()) for n, x in results["0"].items())
    found["frozen"] = [name for name in results["0"] if "word_embeddings" in name]
    for case in ("3", "3 recomputed"):
        # Key biases have no gradient but rounding, which the optimiser then scales up.
        names = [name for name in results["0"] if "key.bias" not in name]
        found[case] = max(float((results[case][n] - results["0"][n]).abs().max()) for n in names)
    return found


def refusals(folder: Path) -> dict[str, Any]:
    """States that do not fit, and gradients that are no numbers."""
    messages = {}

    def message(name: str, error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error) as caught:
            call()
        messages[name] = str(caught.value)

    run = Trained(1, "fp32", SCHEDULE_FREE)
    message("missing", TrainingError, lambda: run.engine.load(folder / "nowhere"))
    message("optimizer", TrainingError, lambda: run.engine.load(folder / "adamw-1-0"))
    with run.engine.accumulation():
        ids, target = units_of(0)[0]
        run.engine.backward((ids, target * float("nan")), 1.0)
    message("gradient", TrainingError, run.engine.update)

    def all_frozen() -> None:
        from cluster.engine import TrainingEngine

        TrainingEngine(Small(0).requires_grad_(False), objective, SCHEDULE_FREE, total_steps=1)

    message("frozen", ConfigError, all_frozen)
    return messages


def start(rank: int, workers: int, folder: Path, programs: list[Callable[[Path], dict[str, Any]]]) -> None:
    """One process of a group; rank 0 writes what the programs found."""
    os.environ.update(LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous-{workers}",
        rank=rank,
        world_size=workers,
    )
    for program in programs:
        found = program(folder)
        if rank == 0:
            (folder / f"{program.__name__}-{workers}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def lead(_: int, folder: Path) -> None:
    """Imports what takes seconds once, and forks the processes of both groups."""
    import cluster.engine
    import cluster.training_units  # noqa: F401 - takes Ray Data with it

    for workers, programs in (
        (2, [views, stage_three_resume, plain_adamw, encoder]),
        (1, [views, stage_three_resume, plain_adamw, other_sizes, refusals]),
    ):
        mp.start_processes(start, args=(workers, folder, programs), nprocs=workers, start_method="fork")
