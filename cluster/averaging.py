"""Computing a mean where there is room: read ahead in this process, or in tasks on other machines.

One process already reads as fast as a machine's network gives, so that only other machines add to it.
What the tasks compute is the same to the bit: a unit of a mean does not depend on who computes it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import ray

from cluster.worker_pool import result_of
from colbert_core.mean_plan import BLOCK_BYTES, MeanPlan, Piece
from colbert_core.model_files import LocalFile

READS_AHEAD = 6
# What a task returns passes through the object store of this machine.
_GROUP_BYTES = 4 * BLOCK_BYTES
_MOST_TASKS = 64


def mean_pieces(plan: MeanPlan) -> Iterator[Piece]:
    """Computes all pieces of a mean, on the cluster's other machines if there are any.

    Raises:
        RaycolbertError: what :meth:`MeanPlan.pieces` raises.
    """
    tasks = min(_MOST_TASKS, other_cpus())
    if tasks == 0 or any(isinstance(file, LocalFile) for file in plan.files):
        return plan.pieces(ahead=READS_AHEAD)
    return spread_pieces(plan, tasks)


def other_cpus() -> int:
    """Logical CPUs of the Ray cluster that are not of this machine; 0 without a Ray."""
    if not ray.is_initialized():
        return 0
    here = ray.get_runtime_context().get_node_id()
    others = (node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here)
    return int(sum(node["Resources"].get("CPU", 0.0) for node in others))


def spread_pieces(plan: MeanPlan, tasks: int) -> Iterator[Piece]:
    """Computes all pieces of a mean in Ray tasks of one CPU, groups of units of about equal bytes.

    Args:
        plan: of files that every machine can read.
        tasks: how many run at once.

    Raises:
        RaycolbertError: what :meth:`MeanPlan.pieces` raises.
        ray.exceptions.RayError: a task died too often.
    """
    task: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_group)
    shared = ray.put(plan)
    waiting = deque(unit_groups(plan, tasks))
    running: list[Any] = []
    try:
        while waiting or running:
            while waiting and len(running) < tasks:
                running.append(task.remote(shared, *waiting.popleft()))
            (done,), running = ray.wait(running)
            yield from result_of(done)
    finally:
        for reference in running:
            ray.cancel(reference)


def unit_groups(plan: MeanPlan, tasks: int) -> list[tuple[int, int]]:
    """Ranges of units that share the work out: at least one a task, of a bounded size."""
    sizes = [plan.nbytes(unit) for unit in plan.units]
    count = min(len(sizes), max(tasks, -(-sum(sizes) // _GROUP_BYTES)))
    groups: list[tuple[int, int]] = []
    first = done = 0
    for number, size in enumerate(sizes, start=1):
        done += size
        if done * count >= sum(sizes) * (len(groups) + 1):
            groups.append((first, number))
            first = number
    return groups


def _group(plan: MeanPlan, first: int, last: int) -> list[Piece]:
    return list(plan.pieces(first, last, ahead=READS_AHEAD))
