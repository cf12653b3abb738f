"""Runs on several nodes whose raylets are killed: one goes on elsewhere, an elastic one with what is left."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from cluster.artifacts import base_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe
from cluster.registry import Registry
from cluster.trainer import PhaseResult, run_name, train_phase
from tests.ray_nodes import add_node, kill_raylet_of, two_nodes
from tests.s3_server import S3Server
from tests.tiny_training import (
    Killing,
    When,
    furthest,
    furthest_apart,
    publish_inputs,
    published_weights,
    train_workers,
    training_recipe,
)

STEPS = 80
EVERY = 10
TOLERANCE = 1e-5
PHASE: dict[str, Any] = {
    "steps": STEPS,
    "queries_per_step": 16,
    # Maxima jump where rounding differs. With small steps a jump stays below the tolerance, and all of them
    # together go far beyond it.
    "optimizer": {"lr": 4e-6, "warmup_steps": 5, "weight_decay": 0.01},
    "checkpoint": {"every_steps": EVERY, "keep_last": 9},
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """A head without CPUs and two nodes with room for one worker each."""
    with pytest.MonkeyPatch.context() as environment:
        # How long Ray Train waits for a worker on the dead node before it counts again what there is.
        environment.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "8")
        with two_nodes() as cluster:
            yield cluster


@dataclass
class Finished:
    recipe: Recipe
    registry: Registry
    result: PhaseResult


@pytest.fixture(scope="module")
def undisturbed(nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    recipe = training_recipe(tmp_path_factory.mktemp("undisturbed"), **PHASE)
    registry = publish_inputs(recipe)
    return Finished(recipe, registry, train_phase(recipe, "p", registry))


def kill_raylet_of_a_worker() -> None:
    kill_raylet_of(train_workers()[0])


def test_an_elastic_run_outlives_a_raylet(
    undisturbed: Finished, nodes: Cluster, s3_server: S3Server, tmp_path: Path
) -> None:
    # The first to kill a node: Ray counts nodes anew every 20 seconds, so that a run which starts sooner
    # after a node came may begin with too few workers.
    storage = s3_server.storage(cache_dir=str(tmp_path / "cache"))
    base = undisturbed.recipe.model.base
    recipe = training_recipe(tmp_path, base=base, storage=storage, num_workers=[1, 2], **PHASE)
    registry = publish_inputs(recipe)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    with When(lambda: bool(checkpoints.steps()), kill_raylet_of_a_worker) as killer:
        result = train_phase(recipe, "p", registry)
    assert killer.done
    workers = [record.workers for record in result.records]
    assert [record.step for record in result.records] == list(range(1, STEPS + 1))
    # Two workers at first; after the raylet's death one, which begins again at a resume state.
    assert workers == sorted(workers, reverse=True)
    assert set(workers) == {1, 2}
    assert workers.count(2) % EVERY == 0
    assert {record.workers for record in undisturbed.result.records} == {1}
    found = registry, result.ref
    assert furthest_apart(found, (undisturbed.registry, undisturbed.result.ref)) <= TOLERANCE
    assert furthest_apart(found, (registry, base_ref(recipe))) > 10 * TOLERANCE
    add_node(nodes)


def test_a_killed_raylet_changes_nothing(undisturbed: Finished, nodes: Cluster, tmp_path: Path) -> None:
    recipe = training_recipe(tmp_path, base=undisturbed.recipe.model.base, **PHASE)
    registry = publish_inputs(recipe)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    step = random.SystemRandom().randrange(EVERY, STEPS // 2, EVERY)
    print(f"killed after the state of step {step}")
    killing = Killing(checkpoints, kill_raylet_of_a_worker)
    with When(lambda: step in checkpoints.steps(), killing) as killer:
        result = train_phase(recipe, "p", registry)
    assert killer.done
    assert killing.reached >= step
    killing.assert_nothing_was_repeated()
    # What Ray Data coordinates its readers with must not have been on a node that may die.
    coordinator = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
    where = coordinator.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
    assert ray.get(where) == ray.get_runtime_context().get_node_id()
    attempts = {item.key.split("/")[3] for item in registry.store.list(f"{checkpoints.prefix}tensorboard/")}
    assert len(attempts) == 2
    expected = undisturbed.result.records
    assert [record.step for record in result.records] == list(range(1, STEPS + 1))
    assert [record.loss for record in result.records] == [record.loss for record in expected]
    found = published_weights(registry, result.ref)
    assert furthest(found, published_weights(undisturbed.registry, undisturbed.result.ref)) == 0.0
