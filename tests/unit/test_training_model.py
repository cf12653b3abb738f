"""The precision that a phase's workers agree on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from cluster import training_model
from cluster.config import TrainPhase
from cluster.training_figures import WorkerGroup
from cluster.training_model import agreed_precision


def phase(precision: str) -> TrainPhase:
    return TrainPhase(name="p", data=("t",), steps=1, nway=4, precision=precision)


def agree(rank: int, meeting: str, fast: list[bool], answers: Any) -> None:
    """What rank ``rank`` of so many workers as ``fast`` has entries finds."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=len(fast))
    training_model.bf16_is_fast = lambda _: fast[rank]
    group = WorkerGroup()
    answers.put([agreed_precision(phase(name), group) for name in ("auto", "fp32", "bf16", "autocast")])
    dist.destroy_process_group()


@pytest.fixture
def answers() -> Iterator[Any]:
    with multiprocessing.get_context("fork").Manager() as manager:
        yield manager.Queue()


@pytest.mark.parametrize(
    ("fast", "expected"),
    [([True, True], "autocast"), ([True, False], "fp32"), ([False, False], "fp32"), ([True], "autocast")],
)
def test_all_workers_compute_in_what_is_fast_on_all(
    tmp_path: Path, answers: Any, fast: list[bool], expected: str
) -> None:
    fork = multiprocessing.get_context("fork")
    workers = [
        fork.Process(target=agree, args=(rank, str(tmp_path / "meeting"), fast, answers))
        for rank in range(len(fast))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * len(fast)
    found = [answers.get() for _ in workers]
    # What a recipe names outright stays as it is.
    assert found == [[expected, "fp32", "bf16", "autocast"]] * len(fast)
