"""What the contract publishes, and ways to damage it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry

FILES = {"model.bin": bytes(range(256)) * 5000, "config.json": b"{}", "deep/er/日本語.txt": "本文".encode()}


def ref(version: str = "v1", kind: str = "models", name: str = "ja") -> ArtifactRef:
    """A version of the tests' model."""
    return ArtifactRef(kind, name, version)  # type: ignore[arg-type]


def write(directory: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """A directory with these files and no others."""
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def flip(registry: Registry, key: str) -> None:
    """Flips one bit in the middle of a stored object."""
    data = bytearray(registry.store.get(key))
    data[len(data) // 2] ^= 1
    registry.store.put(key, bytes(data))


KILLED_PUBLISH = """
import sys, os
from pathlib import Path
from cluster.config import StorageConfig
from cluster.registry import ArtifactRef, Registry
import cluster.staging

registry = Registry.open(StorageConfig.model_validate_json(sys.argv[1]))
# Dies as by SIGKILL after the files and before the manifest.
cluster.staging.StagedArtifact.finish = lambda *a, **k: os._exit(9)
registry.publish(ArtifactRef("models", "ja", "v1"), Path(sys.argv[2]))
"""
