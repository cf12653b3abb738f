"""A killed driver, a second run under the same name, another number of workers."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe
from cluster.registry import Registry
from cluster.trainer import PhaseResult, run_name, train_phase
from colbert_core.errors import TrainingError
from tests.local_ray import local_ray
from tests.tiny_training import (
    Killing,
    furthest,
    furthest_apart,
    publish_inputs,
    published_weights,
    training_recipe,
)

STEPS = 80
# Saved every fifth of a second, at whatever step that is.
OFTEN = {"every_steps": 10 * STEPS, "every_minutes": 0.2 / 60, "keep_last": 9}
# Four units a step: with two workers they are summed in another order than with one.
PHASE: dict[str, Any] = {
    "steps": STEPS,
    "queries_per_step": 16,
    "checkpoint": {"every_steps": 20, "keep_last": 4},
}

DRIVER = """
import json, sys
from pathlib import Path
import ray
from cluster.registry import Registry
from cluster.trainer import train_phase
from tests.tiny_training import training_recipe

root, base, address, phase = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="WARNING")
recipe = training_recipe(Path(root), base=base, **json.loads(phase))
train_phase(recipe, "p", Registry.open(recipe.storage), heartbeat_s=0.5)
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with local_ray() as address:
        yield address


@dataclass
class Finished:
    recipe: Recipe
    registry: Registry
    result: PhaseResult


@pytest.fixture(scope="module")
def undisturbed(address: str, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    recipe = training_recipe(tmp_path_factory.mktemp("undisturbed"), **PHASE)
    registry = publish_inputs(recipe)
    return Finished(recipe, registry, train_phase(recipe, "p", registry))


def fresh(undisturbed: Finished, root: Path, **more: Any) -> tuple[Recipe, Registry]:
    """The same phase in a storage of its own."""
    recipe = training_recipe(root, base=undisturbed.recipe.model.base, **{**PHASE, **more})
    return recipe, publish_inputs(recipe)


def test_a_killed_driver_is_continued_by_name_and_no_second_run_is_let_in(
    undisturbed: Finished, address: str, tmp_path: Path
) -> None:
    phase = {**PHASE, "checkpoint": OFTEN}  # killed after some of these saves
    some = random.SystemRandom().randint(1, 3)
    recipe, registry = fresh(undisturbed, tmp_path, **phase)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    arguments = [str(tmp_path), recipe.model.base, address, json.dumps(phase)]
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, *arguments])
    try:
        lease = f"{checkpoints.prefix}lease.json"
        while not registry.store.exists(lease):
            assert driver.poll() is None
            time.sleep(0.1)
        with pytest.raises(TrainingError, match=rf"in use by process {driver.pid} on "):
            train_phase(recipe, "p", registry, stale_s=5.0)
        while len(checkpoints.steps()) < some:
            assert driver.poll() is None
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    killing = Killing(checkpoints, lambda: None)  # notes what there is now that the driver is dead
    killing()
    print(f"killed after {some} saves, the last at step {killing.reached}")
    assert not registry.exists(undisturbed.result.ref)
    result = train_phase(recipe, "p", registry, heartbeat_s=0.5, stale_s=3.0)
    assert 0 < killing.reached < STEPS
    killing.assert_nothing_was_repeated()
    assert not registry.store.exists(lease)
    expected = undisturbed.result.records
    assert [record.step for record in result.records] == list(range(1, STEPS + 1))
    assert [record.loss for record in result.records] == [record.loss for record in expected]
    found = published_weights(registry, result.ref)
    assert furthest(found, published_weights(undisturbed.registry, undisturbed.result.ref)) == 0.0


def test_a_run_that_another_process_took_over_ends_and_leaves_that_one_alone(
    undisturbed: Finished, tmp_path: Path
) -> None:
    recipe, registry = fresh(undisturbed, tmp_path, checkpoint=OFTEN)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    lease, other = f"{checkpoints.prefix}lease.json", b'{"holder": "another"}'
    seen: list[int] = []

    def take_over() -> None:
        while not checkpoints.steps():
            time.sleep(0.02)
        registry.store.put(lease, other)
        seen.extend(checkpoints.steps())

    with ThreadPoolExecutor(1) as pool:
        taken = pool.submit(take_over)
        with pytest.raises(TrainingError, match=rf"{lease}: another process took this run over"):
            train_phase(recipe, "p", registry, heartbeat_s=0.5)
        taken.result()
    # One that was on its way when it looked may have become visible.
    assert seen and len(checkpoints.steps()) <= len(seen) + 1
    assert checkpoints.steps()[-1] < STEPS
    assert not registry.exists(undisturbed.result.ref)
    assert registry.store.get(lease) == other


def test_two_workers_continue_what_one_began(undisturbed: Finished, tmp_path: Path) -> None:
    recipe, registry = fresh(undisturbed, tmp_path, num_workers=2, zero_stage=2)
    name = run_name(recipe, "p")
    assert name == run_name(undisturbed.recipe, "p")
    state = Path(undisturbed.recipe.storage.root) / "runs" / name / "step-00000040"
    shutil.copytree(state, Path(recipe.storage.root) / "runs" / name / "step-00000040")
    result = train_phase(recipe, "p", registry)
    assert [(record.step, record.workers) for record in result.records] == [
        (step, 2) for step in range(41, STEPS + 1)
    ]
    apart = furthest_apart((registry, result.ref), (undisturbed.registry, undisturbed.result.ref))
    assert 0.0 < apart <= 1e-5


def test_another_configuration_does_not_resume_a_run(undisturbed: Finished, tmp_path: Path) -> None:
    recipe, registry = fresh(undisturbed, tmp_path, seed=1)
    old = Path(undisturbed.recipe.storage.root) / "runs" / run_name(undisturbed.recipe, "p")
    new = Path(recipe.storage.root) / "runs" / run_name(recipe, "p")
    assert old.name != new.name
    shutil.copytree(old / "step-00000040", new / "step-00000040")
    with pytest.raises(TrainingError, match="saved by another configuration"):
        train_phase(recipe, "p", registry)
