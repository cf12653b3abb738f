"""A training phase on Ray Train in a scratch storage, for comparison with bare steps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.artifacts import tuples_ref
from cluster.config import Recipe, parse_recipe
from cluster.models import ensure_base
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.streams import TupleWriter
from cluster.trainer import train_phase
from cluster.training_log import StepRecord


def write_tuples(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a training set as the jobs do."""
    with TupleWriter(path) as writer:
        for row in rows:
            writer.write(dict(row))


def phase_recipe(
    folder: Path, base: Path, colbert: Mapping[str, Any], tuples: Path, phase: Mapping[str, Any]
) -> Recipe:
    """A recipe with one phase ``p`` over one set of tuples.

    Args:
        folder: of its storage.
        base: directory of the ColBERT model that it starts from.
        colbert: that model's configuration.
        tuples: its training set.
        phase: settings of the phase.
    """
    return parse_recipe(
        {
            "name": "bench",
            "storage": {"root": str(folder / "store"), "cache_dir": str(folder / "cache")},
            "ray": {"object_store_mb": 256},
            "model": {"name": "bench", "base": str(base), "colbert": dict(colbert)},
            "data": {"tuples": {"t": {"read": {"format": "tuples", "tuples": str(tuples)}}}},
            "train": [{"name": "p", "data": ["t"], **phase}],
        }
    )


def ray_steps(
    base: Path, colbert: Mapping[str, Any], tuples: Path, phase: Mapping[str, Any]
) -> list[StepRecord]:
    """Trains the phase on Ray Train, in a storage of its own, and returns its log."""
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as folder:
        recipe = phase_recipe(Path(folder), base, colbert, tuples, phase)
        registry = Registry.open(recipe.storage)
        ensure_base(recipe, registry)
        data = Path(folder) / "data"
        data.mkdir()
        (data / "part-00000.parquet").write_bytes(tuples.read_bytes())
        registry.publish(tuples_ref(recipe, "t"), data)
        with ray_session(recipe):
            return train_phase(recipe, "p", registry).records
