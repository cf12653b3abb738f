"""Averaging models straight from object storage, against a plain parallel download of the same bytes.

``python -m benchmarks.average [--quick] [--folder DIR]``. A real S3 server (SeaweedFS, from the
development extra) runs on this machine and shares its cores. Inputs are fp32 models of the size of
multilingual-e5-small: an embedding of 250,002 x 384 and twelve layers, 470 MB each, all different. The
download takes the same ranges in the same way over the same number of connections and checks nothing;
averaging checks every block, sums in float64 and writes the mean to the disk. Each reading is made by a fresh
process; the methods take turns, and a ratio is the median of the ratios of the same round. Memory is the peak
of the resident set above what the process had after its imports and one request.

The goal is of the download that is written to disk, which is what a download is for, and where averaging
leaves its result as well. What the server gives when nothing is kept is shown beside it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.line_protocol import Peer
from benchmarks.support.results import Goal, finish
from cluster.artifacts import ArtifactRef
from cluster.averaging import READS_AHEAD
from cluster.config import StorageConfig
from cluster.registry import Registry
from colbert_core.tensor_files import TensorFileWriter, TensorSpec
from tests.s3_server import S3Server

METHODS = {"memory": "downloaded, discarded", "disk": "downloaded to disk", "average": "averaged"}
RATIO_GOAL, RATIO_OF = 0.60, "disk"
MEMORY_MB = 200
Shapes = Mapping[str, tuple[int, ...]]

console = Console(width=130)


def main() -> int:
    parser = argparse.ArgumentParser(description="Throughput and memory of averaging from object storage.")
    parser.add_argument("--quick", action="store_true", help="small inputs, one round")
    parser.add_argument("--folder", type=Path, help="for the server's data; default: the temporary one")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shapes = model_shapes(25_000 if arguments.quick else 250_002)
    counts = (2, 4) if arguments.quick else (2, 8)
    rounds = 1 if arguments.quick else arguments.rounds
    os.environ.update(S3Server.environment(), OMP_NUM_THREADS="1")
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-", dir=arguments.folder) as folder:
        server = S3Server(Path(folder) / "s3").start()
        try:
            config = server.storage(cache_dir=f"{folder}/cache")
            size = publish_models(config, shapes, max(counts), Path(folder))
            samples = {count: measure(config, count, rounds, folder) for count in counts}
        finally:
            server.stop()
    largest = 4 * max(int(np.prod(shape)) for shape in shapes.values())
    bound_mb = 2 * largest / 1e6 + MEMORY_MB
    results = {str(count): summary(samples[count], count * size) for count in counts}
    console.print(table(results, size, bound_mb))
    console.print(
        f"The goal compares with what is {METHODS[RATIO_OF]}: averaging leaves its result there, too.\n"
        f"What is discarded shows what the server can give; checking, summing and writing share "
        f"{os.cpu_count()} cores with it.\n"
    )
    goals = [
        Goal(f"of what is {METHODS[RATIO_OF]}, {count} inputs", found["ratio"][RATIO_OF], RATIO_GOAL)
        for count, found in results.items()
    ]
    goals += [
        Goal(f"peak memory in MB, {count} inputs", found["peak_mb"]["average"], bound_mb, at_most=True)
        for count, found in results.items()
    ]
    settings = {
        "server": "SeaweedFS on this machine",
        "connections": READS_AHEAD,
        "input_mb": size / 1e6,
        "largest_tensor_mb": largest / 1e6,
        "rounds": rounds,
    }
    return finish(
        "average", settings=settings, results=results, goals=goals, console=console, quick=arguments.quick
    )


def model_shapes(words: int) -> Shapes:
    """Tensors of multilingual-e5-small with a vocabulary of ``words``, and a projection."""
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (words, 384),
        "embeddings.position_embeddings.weight": (512, 384),
        "linear.weight": (128, 384),
    }
    for layer in range(12):
        prefix = f"encoder.layer.{layer}"
        for name in ("attention.query", "attention.key", "attention.value", "attention.output.dense"):
            shapes |= {f"{prefix}.{name}.weight": (384, 384), f"{prefix}.{name}.bias": (384,)}
        shapes |= {f"{prefix}.intermediate.weight": (1536, 384), f"{prefix}.intermediate.bias": (1536,)}
        shapes |= {f"{prefix}.output.weight": (384, 1536), f"{prefix}.output.bias": (384,)}
    return shapes


def publish_models(config: StorageConfig, shapes: Shapes, count: int, folder: Path) -> int:
    """Publishes ``models/mean@v0`` and so on; returns the bytes of one."""
    registry = Registry.open(config)
    specs = {name: TensorSpec("F32", shape) for name, shape in sorted(shapes.items())}
    size = 0
    for number in track(range(count), description="publishing inputs", console=console, transient=True):
        with tempfile.TemporaryDirectory(dir=folder) as model:
            random = np.random.default_rng(number)
            with TensorFileWriter(Path(model) / "model.safetensors", specs) as writer:
                for name, spec in specs.items():
                    writer.write(name, [random.standard_normal(spec.shape, dtype=np.float32)])
            manifest = registry.publish(ArtifactRef("models", "mean", f"v{number}"), Path(model))
            size = manifest.total_bytes
    return size


def measure(config: StorageConfig, count: int, rounds: int, folder: str) -> list[dict[str, dict[str, float]]]:
    """Per round, each method's reading; one round before them fills the caches and is not counted."""
    versions = [f"v{number}" for number in range(count)]
    found = []
    for number in range(rounds + 1):
        readings = {}
        for method in METHODS:
            if number == 0 and method != "memory":
                continue
            with Peer(method, sys.executable, "benchmarks.support.average_worker", {}) as peer:
                arguments: dict[str, Any] = {"config": config.model_dump(mode="json"), "versions": versions}
                readings[method] = peer.call("measure", method=method, folder=folder, **arguments)
        if number:
            found.append(readings)
    return found


def summary(rounds: Sequence[Mapping[str, Mapping[str, float]]], size: int) -> dict[str, Any]:
    """Medians over the rounds; the ratios are of each plain download."""

    def median(method: str, figure: str) -> float:
        return statistics.median(readings[method][figure] for readings in rounds)

    ratios = {
        method: statistics.median(r[method]["seconds"] / r["average"]["seconds"] for r in rounds)
        for method in ("memory", "disk")
    }
    return {
        "mb_per_s": {method: size / 1e6 / median(method, "seconds") for method in METHODS},
        "cpu_s_per_gb": {method: median(method, "cpu_seconds") / (size / 1e9) for method in METHODS},
        "peak_mb": {method: max(r[method]["peak_bytes"] for r in rounds) / 1e6 for method in METHODS},
        "ratio": ratios,
        "samples": list(rounds),
    }


def table(results: Mapping[str, Mapping[str, Any]], size: int, bound_mb: float) -> Table:
    title = f"inputs of {size / 1e6:.0f} MB over {READS_AHEAD} connections; memory bound {bound_mb:.0f} MB"
    found = Table(
        "inputs", "", "MB/s", "CPU s / GB", "peak MB", "averaging gives", title=title, title_justify="left"
    )
    for count, figures in results.items():
        for method, label in METHODS.items():
            cells = [f"{figures[key][method]:.4g}" for key in ("mb_per_s", "cpu_s_per_gb", "peak_mb")]
            share = f"{figures['ratio'][method]:.2f} of it" if method in figures["ratio"] else ""
            found.add_row(count if method == "memory" else "", label, *cells, share)
    return found


if __name__ == "__main__":
    sys.exit(main())
