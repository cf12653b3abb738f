"""A mean over Ray tasks on two machines: the same bits as in one process, and errors as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import save_file

from cluster import averaging
from cluster.artifacts import ArtifactRef
from cluster.averaging import mean_pieces, other_cpus, spread_pieces, unit_groups
from cluster.published_model import published_models
from cluster.registry import Registry
from colbert_core.averaging import average_models
from colbert_core.errors import IntegrityError
from colbert_core.mean_plan import MeanPlan
from colbert_core.model_files import local_model
from tests.dying_file import DyingFile
from tests.s3_server import S3Server

WEIGHTS = [1.0, 0.3, 2.0]


@pytest.fixture(scope="module")
def machines() -> Iterator[Cluster]:
    """The driver's with one CPU and another with two."""
    settings = {"object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **settings}
    )
    cluster.add_node(num_cpus=2, **settings)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="WARNING")
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of nine blocks."""
    folders = [tmp_path_factory.mktemp(f"model{number}") for number in range(3)]
    for number, folder in enumerate(folders):
        generator = torch.Generator().manual_seed(number)
        shapes = {"embedding": (12_000, 1000), "layer": (1000, 1000), "bias": (1000,)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file({**tensors, "ids": torch.arange(5000)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    return folders


@pytest.fixture(scope="module")
def registry(s3_server: S3Server, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Registry:
    cache = str(tmp_path_factory.mktemp("cache"))
    registry = Registry.open(s3_server.storage(cache_dir=cache))
    for number, folder in enumerate(folders):
        registry.publish(ArtifactRef("models", "ja", f"v{number}"), folder)
    return registry


def ref(number: int) -> ArtifactRef:
    return ArtifactRef("models", "ja", f"v{number}")


def test_the_mean_is_the_same_to_the_bit(
    machines: Cluster,
    folders: list[Path],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert other_cpus() == 2
    spread: list[int] = []

    def watched(plan: MeanPlan, tasks: int) -> object:
        spread.append(tasks)
        return spread_pieces(plan, tasks)

    monkeypatch.setattr(averaging, "spread_pieces", watched)
    published = published_models(registry, [ref(number) for number in range(3)])
    average_models(published, WEIGHTS, tmp_path / "tasks", mean_pieces)
    assert spread == [2]
    average_models(published[::-1], WEIGHTS[::-1], tmp_path / "turned", mean_pieces)
    average_models([local_model(folder) for folder in folders], WEIGHTS, tmp_path / "here", mean_pieces)
    assert spread == [2, 2], "what only this machine can read is averaged here"
    here = (tmp_path / "here" / "model.safetensors").read_bytes()
    assert (tmp_path / "tasks" / "model.safetensors").read_bytes() == here
    assert (tmp_path / "turned" / "model.safetensors").read_bytes() == here


def test_damage_found_by_a_task_is_a_typed_error(
    machines: Cluster, registry: Registry, tmp_path: Path
) -> None:
    key = registry.manifest(ref(1)).key_of("model.safetensors")
    whole = registry.store.get(key)
    damaged = bytearray(whole)
    damaged[20 << 20] ^= 1
    registry.store.put(key, bytes(damaged))
    try:
        models = published_models(registry, [ref(number) for number in range(3)])
        with pytest.raises(IntegrityError, match=r"^models/ja/v1/.*bytes 16777216 to 25165824 do not match"):
            average_models(models, WEIGHTS, tmp_path / "mean", mean_pieces)
        assert list(tmp_path.iterdir()) == []
    finally:
        registry.store.put(key, whole)


def test_a_task_that_dies_is_run_again(machines: Cluster, folders: list[Path], tmp_path: Path) -> None:
    files = [DyingFile(folder / "model.safetensors", tmp_path / "died") for folder in folders]
    plan = MeanPlan.of(files, WEIGHTS)
    found = {(piece.name, piece.offset): piece.values.tobytes() for piece in spread_pieces(plan, 2)}
    assert (tmp_path / "died").exists()
    assert found == {(piece.name, piece.offset): piece.values.tobytes() for piece in plan.pieces()}


@pytest.mark.parametrize("tasks", [1, 2, 5, 100])
def test_groups_are_balanced_by_bytes(folders: list[Path], tasks: int) -> None:
    plan = MeanPlan.of([local_model(folders[0])["model.safetensors"]], [1.0])
    groups = unit_groups(plan, tasks)
    assert [unit for first, last in groups for unit in range(first, last)] == list(range(len(plan.units)))
    assert len(groups) == min(len(plan.units), max(tasks, 2))  # 52 MB: two groups of at most 32 MiB
    sizes = [sum(plan.nbytes(unit) for unit in plan.units[first:last]) for first, last in groups]
    assert max(sizes) <= sum(sizes) / len(sizes) + plan.nbytes(plan.units[1])
