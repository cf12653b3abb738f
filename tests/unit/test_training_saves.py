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
from cluster.storage.local import LocalStore
from cluster.streams import TupleIndex
from cluster.training_figures import WorkerGroup
from cluster.training_job import PhaseJob
from cluster.training_log import RunLog
from cluster.training_saves import RunSaves
from colbert_core.errors import StorageError
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


@pytest.mark.parametrize("fail", [False, True], ids=["late", "lost"])
def test_a_state_is_not_visible_before_the_model_of_its_step(
    group: WorkerGroup, tmp_path: Path, fail: bool
) -> None:
    """Who goes on from it begins after that step, and never publishes that model."""
    recipe = training_recipe(tmp_path)
    publish_inputs(recipe)
    store = HeldBack(recipe.storage, recipe.storage.root)
    store.go, store.fail = threading.Event(), fail
    registry = Registry(store, ArtifactCache(tmp_path / "cache", 1.0))
    job = PhaseJob(
        recipe=recipe,
        phase=recipe.train[0],
        run="run",
        init=base_ref(recipe),
        data=(tuples_ref(recipe, "t"),),
        index=cast(TupleIndex, None),  # nothing is read
        data_fingerprint="x",
        readers=1,
    )
    saves = RunSaves(job, cast(Any, Engine()), registry, group, "attempt")
    log = RunLog(store, saves.prefix, start=0, steps=12, attempt="attempt")
    checkpoints = RunCheckpoints(store, "run")
    saves.publish([1.0])
    saves.save(log)
    while not saves.uploaded:
        time.sleep(0.01)
    saves.commit()
    time.sleep(0.3)
    assert checkpoints.steps() == []
    store.go.set()
    if fail:
        with pytest.raises(StorageError, match="storage is away"):
            saves.finish()
    else:
        saves.finish()
    assert registry.exists(phase_ref(recipe, "p", 4)) is not fail
    assert checkpoints.steps() == ([] if fail else [4])
    saves.close()
    log.close()
