"""The memory of a mean of published models, in a process of its own: bounded, whatever goes in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cluster.artifacts import ArtifactRef
from cluster.config import StorageConfig
from cluster.registry import Registry
from colbert_core.tensor_files import TensorFileWriter, TensorSpec
from tests.s3_server import S3Server

SHAPES = {"embedding": (16_384, 512), **{f"layer.{number:02}": (2048, 512) for number in range(4)}}
LARGEST = 4 * 16_384 * 512

# Prints by how many bytes the process grew at most.
AVERAGE = """
import json, sys
from pathlib import Path
from cluster.averaging import mean_pieces
from cluster.artifacts import ArtifactRef
from cluster.config import StorageConfig
from cluster.published_model import published_models
from cluster.registry import Registry
from colbert_core.averaging import average_models

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

config, versions, output = json.loads(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
registry = Registry.open(StorageConfig.model_validate(config))
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
baseline = status("VmRSS")
models = published_models(registry, [ArtifactRef("models", "ja", version) for version in versions])
average_models(models, [1.0 + n for n in range(len(models))], output, mean_pieces)
print(status("VmHWM") - baseline)
"""


@pytest.fixture(scope="module")
def config(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> StorageConfig:
    """Six models of 50 MB with equal headers, and one whose header is longer."""
    folder = tmp_path_factory.mktemp("models")
    config = s3_server.storage(cache_dir=str(folder / "cache"))
    registry = Registry.open(config)
    values = np.random.default_rng(0).standard_normal(16_384 * 512, dtype=np.float32)
    specs = {name: TensorSpec("F32", shape) for name, shape in SHAPES.items()}
    for version, note in (("a", ""), ("b", "x" * 1000)):
        (folder / version).mkdir()
        with TensorFileWriter(folder / version / "model.safetensors", specs, {"note": note}) as writer:
            for name, shape in SHAPES.items():
                writer.write(name, [values[: np.prod(shape)]])
    for number in range(6):
        registry.publish(ArtifactRef("models", "ja", f"v{number}"), folder / "a")
    registry.publish(ArtifactRef("models", "ja", "longer"), folder / "b")
    return config


def growth(config: StorageConfig, versions: Sequence[str], output: Path) -> int:
    arguments = [config.model_dump_json(), json.dumps(list(versions)), str(output)]
    found = subprocess.run(
        [sys.executable, "-c", AVERAGE, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(found.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_memory_is_bounded_whatever_the_number_of_inputs(config: StorageConfig, tmp_path: Path) -> None:
    bound = 2 * LARGEST + 200 * 10**6
    few = growth(config, ["v0", "v1"], tmp_path / "few")
    many = growth(config, [f"v{number}" for number in range(6)], tmp_path / "many")
    assert few < bound and many < bound
    # More inputs add no more than the few blocks that hold their headers.
    assert many < few + 50 * 10**6
    shifted = growth(config, ["v0", "v1", "v2", "longer"], tmp_path / "shifted")
    assert shifted < bound
