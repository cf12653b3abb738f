"""Training phases on a real local Ray: evidence, resume states, the published model, a killed worker."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import base_ref, phase_ref, tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe
from cluster.registry import Registry
from cluster.streams import TupleIndex, UnitSchedule
from cluster.trainer import PhaseResult, run_name, train_phase
from cluster.training_units import UnitSource, UnitStream
from colbert_core.encoder import ColBERT
from colbert_core.errors import DataError, TrainingError
from colbert_core.formats import load_model
from jobs import train
from tests.local_ray import local_ray
from tests.tiny_training import (
    NWAY,
    TUPLES,
    When,
    furthest,
    publish_inputs,
    published_weights,
    train_workers,
    training_recipe,
)

STEPS = 200
PHASE: dict[str, Any] = {
    "steps": STEPS,
    "num_workers": 2,
    "checkpoint": {"every_steps": 40, "keep_last": 2, "publish_every_steps": 120},
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with local_ray():
        yield


@dataclass
class Finished:
    recipe: Recipe
    registry: Registry
    result: PhaseResult

    @property
    def checkpoints(self) -> RunCheckpoints:
        return RunCheckpoints(self.registry.store, run_name(self.recipe, "p"))


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two workers, dropout, two parameter groups, ZeRO-1, 200 steps without any incident."""
    recipe = training_recipe(tmp_path_factory.mktemp("undisturbed"), **PHASE)
    registry = publish_inputs(recipe)
    return Finished(recipe, registry, train_phase(recipe, "p", registry))


def test_every_step_leaves_its_figures(undisturbed: Finished) -> None:
    records = undisturbed.result.records
    assert [record.step for record in records] == list(range(1, STEPS + 1))
    schedule = UnitSchedule(TUPLES, 4, 8, 12345)
    for record in records:
        tuples = sum(slot.count for slot in schedule.step(record.step - 1))
        assert record.documents_listed == tuples * NWAY
        # Four neighbours share their documents, and make up a unit.
        assert record.documents_encoded == 2 * NWAY
        assert record.workers == 2
        assert record.parts == {"kl": record.loss}
        assert 0 < record.loss < 5
        assert record.gradient_norm > 0
        assert 0 <= record.padding_fraction < 1
        assert record.tokens_per_s == pytest.approx(record.tokens / record.seconds)
        assert 0 <= record.data_wait_s <= record.seconds
    assert sum(record.truncated_documents for record in records) > 0
    assert sum(record.dropped_tokens for record in records) > 0
    assert [record.lr for record in records[:6]] == pytest.approx(
        [3e-4 * min(1, step / 5) for step in range(1, 7)]
    )
    assert records[-1].epoch == pytest.approx(STEPS * 2 / 13)


def test_curves_and_resume_states_are_stored(undisturbed: Finished) -> None:
    checkpoints = undisturbed.checkpoints
    assert checkpoints.steps() == [STEPS - 40, STEPS]
    kept = {item.key.split("/")[2] for item in undisturbed.registry.store.list(checkpoints.prefix)}
    assert kept == {"step-00000160", "step-00000200", "log", "tensorboard", "progress.json"}
    curves = list(undisturbed.registry.store.list(f"{checkpoints.prefix}tensorboard/"))
    assert len(curves) == 1
    assert curves[0].size > 10_000
    assert undisturbed.result.saves["saves"] == 5


def test_the_published_model_is_x_in_fp32(undisturbed: Finished, tmp_path: Path) -> None:
    saved = undisturbed.checkpoints.latest()
    assert saved is not None
    assert (saved.step, saved.workers) == (STEPS, 2)
    undisturbed.checkpoints.download(saved, tmp_path)
    state: dict[str, torch.Tensor] = {}
    for path in tmp_path.glob("*.safetensors"):
        state.update(load_file(path))
    model = load_model(undisturbed.registry.pull(undisturbed.result.ref))
    start = load_model(undisturbed.registry.pull(base_ref(undisturbed.recipe)))
    trained = {key.removeprefix("y/") for key in state if key.startswith("y/")}
    for (name, parameter), (_, before) in zip(
        model.named_parameters(), start.named_parameters(), strict=True
    ):
        if name in trained:
            x = torch.lerp(state[f"y/{name}"], state[f"z/{name}"], 1 - 1 / 0.9)
            assert torch.equal(parameter, x), name
            assert not torch.equal(x, state[f"y/{name}"]), name
        else:
            assert "word_embeddings" in name or "pooler" in name
            assert torch.equal(parameter, before), name


def test_the_manifest_says_where_the_model_comes_from(undisturbed: Finished) -> None:
    recipe, registry = undisturbed.recipe, undisturbed.registry
    for step in (120, STEPS):
        manifest = registry.manifest(phase_ref(recipe, "p", step))
        assert [parent.ref for parent in manifest.parents] == [base_ref(recipe), tuples_ref(recipe, "t")]
        assert manifest.metrics["step"] == step
        assert manifest.recipe == recipe.model_dump(mode="json")
        assert manifest.data_fingerprint


def test_a_published_phase_is_not_trained_again(undisturbed: Finished) -> None:
    report = train.run(undisturbed.recipe)
    assert report.skipped == [str(undisturbed.result.ref)]
    assert report.artifacts == []


def kill_a_worker() -> None:
    train_workers()[0].kill()


def test_a_killed_worker_changes_nothing(undisturbed: Finished, tmp_path: Path) -> None:
    recipe = training_recipe(tmp_path, base=undisturbed.recipe.model.base, **PHASE)
    registry = publish_inputs(recipe)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    with When(lambda: checkpoints.steps() != [], kill_a_worker) as killer:
        result = train_phase(recipe, "p", registry)
    assert killer.done
    attempts = {item.key.split("/")[3] for item in registry.store.list(f"{checkpoints.prefix}tensorboard/")}
    assert len(attempts) == 2
    assert [record.step for record in result.records] == list(range(1, STEPS + 1))
    expected = undisturbed.result.records
    assert [record.loss for record in result.records] == [record.loss for record in expected]
    for step in (120, STEPS):
        found, wanted = (
            published_weights(reg, phase_ref(rec, "p", step))
            for reg, rec in ((registry, recipe), (undisturbed.registry, undisturbed.recipe))
        )
        assert furthest(found, wanted) == 0.0


def test_tuples_of_a_step_do_not_depend_on_the_number_of_workers(undisturbed: Finished) -> None:
    registry, ref = undisturbed.registry, tuples_ref(undisturbed.recipe, "t")
    filesystem, base = registry.store.arrow()
    manifest = registry.manifest(ref)
    index = TupleIndex([f"{base}/{manifest.key_of(path)}" for path in sorted(manifest.files)], filesystem)
    model = load_model(registry.pull(base_ref(undisturbed.recipe)))
    source = UnitSource(index, model.text, NWAY)
    schedule = UnitSchedule(TUPLES, 4, 12, 7)
    orders = {}
    for workers in (1, 2, 4):
        steps: list[list[str]] = [[] for _ in range(2, 9)]
        for rank in range(workers):
            stream = UnitStream(source, schedule, rank=rank, workers=workers, start=2, stop=9)
            seen = []
            for step, units in stream:
                seen.append(step)
                steps[step - 2] += [label for unit in units for label in unit.labels]
            assert seen == list(range(2, 9))
        orders[workers] = [sorted(labels) for labels in steps]
    assert orders[1] == orders[2] == orders[4]
    expected = [
        sorted(f"q{n}" for slot in schedule.step(step) for n in range(slot.first, slot.first + slot.count))
        for step in range(2, 9)
    ]
    assert orders[1] == expected


def test_malformed_tuples_stop_the_run_at_once(undisturbed: Finished, tmp_path: Path) -> None:
    def damage(rows: list[dict[str, Any]]) -> None:
        rows[41]["scores"][2] = float("nan")

    recipe = training_recipe(tmp_path, base=undisturbed.recipe.model.base, num_workers=2)
    registry = publish_inputs(recipe, change=damage)
    with pytest.raises(DataError, match=r"part-1.parquet: row 12 \(query q41\): score 2 is nan"):
        train_phase(recipe, "p", registry)


def test_a_loss_that_is_no_number_names_its_tuples_and_keeps_the_last_state(
    undisturbed: Finished, tmp_path: Path
) -> None:
    schedule = UnitSchedule(TUPLES, 4, 8, 12345)
    bad = schedule.step(5)[1]

    def damage(rows: list[dict[str, Any]]) -> None:
        # The square of this margin is no fp32 number any more.
        rows[bad.first]["scores"][0] = 3e38

    recipe = training_recipe(
        tmp_path, base=undisturbed.recipe.model.base, num_workers=2, loss={"margin_mse": 0.1}
    )
    registry = publish_inputs(recipe, change=damage)
    with pytest.raises(TrainingError, match=rf"step 6: the loss is inf over the tuples .*q{bad.first}\b"):
        train_phase(recipe, "p", registry)
    checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
    assert checkpoints.steps() == [4]
    assert not registry.exists(phase_ref(recipe, "p"))
    saved = checkpoints.latest()
    assert saved is not None
    checkpoints.download(saved, tmp_path)
    assert isinstance(load_model(registry.pull(base_ref(recipe))), ColBERT)
