"""The order in which a run's states and models become visible."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from cluster.artifacts import base_ref, phase_ref, tuples_ref
from cluster.cache import ArtifactCache
from cluster.checkpoints import RunCheckpoints
from cluster.registry import Registry
from cluster.run_lease import RunLease
from cluster.storage.local import LocalStore
from cluster.streams import TupleIndex
from cluster.training_figures import WorkerGroup
from cluster.training_job import PhaseJob
from cluster.training_log import RunLog
from cluster.training_saves import RunSaves
from colbert_core.errors import StorageError, TrainingError
from tests.tiny_training import publish_inputs, training_recipe


class HeldBack(LocalStore):
    """Takes no files of models until it is let go, or refuses them."""

    go = threading.Event()
    fail = False

    def upload(self, key: str, path: Path, *, if_absent: bool = False) -> str:
        if key.startswith("models/"):
            assert self.go.wait(10)
            if self.fail:
                raise StorageError("storage is away")
        return super().upload(key, path, if_absent=if_absent)


class Engine:
    """As far as saving needs one, at step 4."""

    step = 4

    def save(self, folder: Path) -> list[Path]:
        path = folder / "state-00000-00000.safetensors"
        path.write_bytes(b"state")
        return [path]

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        return {}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[WorkerGroup]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield WorkerGroup()
    dist.destroy_process_group()


class Rig:
    """A run's saves on a storage that can be held back, the lease held by ``lease``."""

    def __init__(self, folder: Path, group: WorkerGroup) -> None:
        self.recipe = training_recipe(folder)
        publish_inputs(self.recipe)
        self.store = HeldBack(self.recipe.storage, self.recipe.storage.root)
        self.store.go = threading.Event()
        self.registry = Registry(self.store, ArtifactCache(folder / "cache", 1.0))
        self.lease = RunLease(self.store, "runs/run/lease.json")
        job = PhaseJob(
            recipe=self.recipe,
            phase=self.recipe.train[0],
            run="run",
            init=base_ref(self.recipe),
            data=(tuples_ref(self.recipe, "t"),),
            index=cast(TupleIndex, None),  # nothing is read
            data_fingerprint="x",
            readers=1,
            claim=self.lease.claim,
        )
        self.saves = RunSaves(job, cast(Any, Engine()), self.registry, group, "attempt")
        self.log = RunLog(self.store, self.saves.prefix, start=0, steps=12, attempt="attempt")
        self.checkpoints = RunCheckpoints(self.store, "run")

    def save(self) -> None:
        self.saves.save(self.log)
        while not self.saves.uploaded:
            time.sleep(0.01)

    def close(self) -> None:
        self.saves.close()
        self.log.close()


@pytest.mark.parametrize("fail", [False, True], ids=["late", "lost"])
def test_a_state_is_not_visible_before_the_model_of_its_step(
    group: WorkerGroup, tmp_path: Path, fail: bool
) -> None:
    """Who goes on from it begins after that step, and never publishes that model."""
    rig = Rig(tmp_path, group)
    rig.store.fail = fail
    with rig.lease:
        rig.saves.publish([1.0])
        rig.save()
        rig.saves.commit()
        time.sleep(0.3)
        assert rig.checkpoints.steps() == []
        rig.store.go.set()
        if fail:
            with pytest.raises(StorageError, match="storage is away"):
                rig.saves.finish()
        else:
            rig.saves.finish()
    assert rig.registry.exists(phase_ref(rig.recipe, "p", 4)) is not fail
    assert rig.checkpoints.steps() == ([] if fail else [4])
    rig.close()


def test_a_run_that_is_anothers_by_now_makes_nothing_visible(group: WorkerGroup, tmp_path: Path) -> None:
    rig = Rig(tmp_path, group)
    with rig.lease:
        rig.save()
        rig.store.put("runs/run/lease.json", b'{"holder": "another"}')
        before = {item.key for item in rig.store.list("runs/run/")}
        rig.saves.commit()
        with pytest.raises(TrainingError, match="another process took this run over"):
            rig.saves.finish()
    assert {item.key for item in rig.store.list("runs/run/")} == before
    assert rig.checkpoints.steps() == []
    rig.close()
