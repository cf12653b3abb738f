"""Training phases on a real local Ray: evidence, resume states, the published model, killed workers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.artifacts import ArtifactRef, base_ref, phase_ref, tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe
from cluster.evaluation import evaluate_model
from cluster.models import save_for_registry
from cluster.registry import Registry
from cluster.streams import TupleIndex, UnitSchedule
from cluster.trainer import PhaseResult, run_name, train_phase
from cluster.training_model import load_weights
from cluster.training_units import UnitSource, UnitStream
from colbert_core.encoder import ColBERT
from colbert_core.errors import DataError, TrainingError
from colbert_core.formats import load_model
from jobs import train
from tests.fault_proxy import Fault, FaultProxy
from tests.local_ray import local_ray
from tests.reported_steps import ReportedSteps
from tests.s3_server import S3Server
from tests.tiny_training import (
    NWAY,
    TUPLES,
    Killing,
    When,
    furthest,
    publish_inputs,
    published_weights,
    train_workers,
    training_recipe,
    validated,
)

STEPS = 200
PHASE: dict[str, Any] = {
    "steps": STEPS,
    "num_workers": 2,
    "checkpoint": {"every_steps": 40, "keep_last": 1, "keep_every_steps": 80, "publish_every_steps": 120},
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
    reported: Path

    @property
    def checkpoints(self) -> RunCheckpoints:
        return RunCheckpoints(self.registry.store, run_name(self.recipe, "p"))


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Two workers, dropout, two parameter groups, ZeRO-1, 200 steps without any incident."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = training_recipe(folder, **PHASE)
    registry = publish_inputs(recipe)
    reported = folder / "reported.jsonl"
    result = train_phase(recipe, "p", registry, callbacks=[ReportedSteps(reported)])
    return Finished(recipe, registry, result, reported)


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
        # The wait for a save falls into the step after it.
        assert (record.save_s > 0) == (record.step % 40 == 1 and record.step > 1)
        assert record.save_s <= record.seconds
    assert sum(record.truncated_documents for record in records) > 0
    assert sum(record.dropped_tokens for record in records) > 0
    assert [record.lr for record in records[:6]] == pytest.approx(
        [3e-4 * min(1, step / 5) for step in range(1, 7)]
    )
    assert records[-1].epoch == pytest.approx(STEPS * 2 / 13)


def test_ray_train_is_told_every_step(undisturbed: Finished) -> None:
    told = ReportedSteps.read(undisturbed.reported)
    assert told == [{"step": record.step, **record.scalars()} for record in undisturbed.result.records]


def test_curves_and_resume_states_are_stored(undisturbed: Finished) -> None:
    checkpoints = undisturbed.checkpoints
    # The last one, and every 80th.
    assert checkpoints.steps() == [80, 160, STEPS]
    kept = {item.key.split("/")[2] for item in undisturbed.registry.store.list(checkpoints.prefix)}
    states = {"step-00000080", "step-00000160", "step-00000200"}
    assert kept == {*states, "log", "tensorboard", "progress.json"}
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


def test_workers_killed_at_random_steps_and_in_a_save_change_nothing(
    undisturbed: Finished, s3_server: S3Server, tmp_path: Path
) -> None:
    during, later = random.SystemRandom().choice([(s, k) for s in (60, 80, 100, 120) for k in (20, 40)])
    print(f"killed in the save of step {during}, and once more {later} steps after the state resumed from")
    # Saved and published at other steps than the undisturbed run.
    settings = {"every_steps": 20, "keep_last": 2, "publish_every_steps": 60}
    phase = {**PHASE, "checkpoint": settings, "max_failures": 1}
    with FaultProxy(s3_server.endpoint_url) as proxy:
        storage = s3_server.storage(cache_dir=str(tmp_path / "cache"))
        storage = storage.model_copy(update={"endpoint_url": proxy.url})
        recipe = training_recipe(tmp_path, base=undisturbed.recipe.model.base, storage=storage, **phase)
        # Measured on the way, too, which the undisturbed run was not.
        recipe = validated(recipe, tmp_path, every_steps=30)
        registry = publish_inputs(recipe)
        checkpoints = RunCheckpoints(registry.store, run_name(recipe, "p"))
        # The first save takes three seconds to arrive.
        state = undisturbed.checkpoints.latest()
        assert state is not None
        rate = sum(entry.size for entry in state.files.values()) / 3
        slow = Fault("slow", ("PUT", "POST"), "/step-00000020/", times=None, rate=rate)
        # One worker's part of a later one hangs on its way until a worker is dead.
        hanging = Fault("stall", ("PUT", "POST"), f"/step-{during:08d}/", seconds=2.0)
        first, second = (Killing(checkpoints, kill_a_worker) for _ in range(2))
        with (
            proxy.fault(slow),
            proxy.fault(hanging),
            When(lambda: hanging.hits > 0, first) as killed,
            When(lambda: 0 < first.reached <= checkpoints.steps()[-1] - later, second) as killed_again,
            # The second death is one too many.
            pytest.raises(TrainingError, match="training phase 'p' failed"),
        ):
            train_phase(recipe, "p", registry)
        assert killed.done
        assert killed_again.done
        assert during - 40 <= first.reached < during
        assert first.reached + later <= second.reached < STEPS
        assert not registry.exists(undisturbed.result.ref)
        result = train_phase(recipe, "p", registry)
        # Nothing that a state held was computed again.
        first.assert_nothing_was_repeated()
        second.assert_nothing_was_repeated()
        assert [record.step for record in result.records] == list(range(1, STEPS + 1))
        # Training did not wait for the first save.
        assert not any(record.uploading for record in result.records[:20])
        assert result.records[20].uploading
        assert 0 < result.records[20].save_s < 3
        expected = undisturbed.result.records
        assert [record.loss for record in result.records] == [record.loss for record in expected]
        for step in (120, STEPS):
            found, wanted = (
                published_weights(reg, phase_ref(rec, "p", step))
                for reg, rec in ((registry, recipe), (undisturbed.registry, undisturbed.recipe))
            )
            assert furthest(found, wanted) == 0.0
        assert_published_models_were_measured(recipe, registry, result)


def assert_published_models_were_measured(recipe: Recipe, registry: Registry, result: PhaseResult) -> None:
    """At steps 30, 60, …, 180, 200: what ``evaluate`` finds of the models published at 60, 120, 180, 200."""
    measured = {record.step: record for record in result.records if record.validation}
    assert list(measured) == [30, 60, 90, 120, 150, 180, STEPS]
    assert all(record.validation.keys() == {"dev/nDCG@10"} for record in measured.values())
    assert all(record.validation_s > 0 for record in measured.values())
    for step in (60, 120, 180, STEPS):
        value = evaluate_model(recipe, registry, phase_ref(recipe, "p", step), "dev", "nDCG@10")
        # Parts of the documents are encoded in other batches, which rounds otherwise.
        assert measured[step].validation["dev/nDCG@10"] == pytest.approx(value, abs=0.002), step


def test_what_is_measured_is_x_and_not_y(cluster: None, tmp_path: Path) -> None:
    settings = {"optimizer": {"lr": 3e-2, "warmup_steps": 2}, "steps": 6, "checkpoint": {"every_steps": 6}}
    recipe = training_recipe(tmp_path, **settings)
    recipe = validated(recipe, tmp_path, every_steps=4)
    registry = publish_inputs(recipe)
    result = train_phase(recipe, "p", registry)
    assert [record.step for record in result.records if record.validation] == [4, 6]
    x = evaluate_model(recipe, registry, result.ref, "dev", "nDCG@10")
    # One worker encodes the same batches.
    assert result.records[-1].validation["dev/nDCG@10"] == pytest.approx(x, abs=1e-9)
    saved = RunCheckpoints(registry.store, run_name(recipe, "p"))
    latest = saved.latest()
    assert latest is not None
    saved.download(latest, tmp_path)
    state = load_file(next(tmp_path.glob("*.safetensors")))
    model = load_model(registry.pull(result.ref))
    load_weights(model, {key[2:]: value for key, value in state.items() if key.startswith("y/")})
    save_for_registry(model, tmp_path / "y")
    y = ArtifactRef("models", "m", "y")
    registry.publish(y, tmp_path / "y")
    assert abs(evaluate_model(recipe, registry, y, "dev", "nDCG@10") - x) > 1e-3


def test_a_source_that_is_missing_is_told_of_before_training(cluster: None, tmp_path: Path) -> None:
    recipe = validated(training_recipe(tmp_path), tmp_path, every_steps=4)
    registry = publish_inputs(recipe)
    (tmp_path / "dev" / "queries.parquet").unlink()
    with pytest.raises(DataError, match=r"no file '.*dev/queries\.parquet'"):
        train_phase(recipe, "p", registry)
    assert RunCheckpoints(registry.store, run_name(recipe, "p")).latest() is None


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

    recipe = training_recipe(tmp_path, base=undisturbed.recipe.model.base)
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


def test_a_gradient_that_is_no_number_names_the_tuples_of_all_workers(
    undisturbed: Finished, tmp_path: Path
) -> None:
    # The loss is a number still.
    recipe = training_recipe(
        tmp_path, base=undisturbed.recipe.model.base, num_workers=2, loss={"margin_mse": 1e38}
    )
    registry = publish_inputs(recipe)
    first, second = (
        ", ".join(f"q{number}" for number in range(slot.first, slot.first + slot.count))
        for slot in UnitSchedule(TUPLES, 4, 8, 12345).step(0)
    )
    message = rf"the gradient of step 1 is not finite \(norm \w+\); its tuples are {first}, {second}$"
    with pytest.raises(TrainingError, match=message):
        train_phase(recipe, "p", registry)
    assert not registry.exists(phase_ref(recipe, "p"))
