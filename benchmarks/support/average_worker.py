"""One measurement of reading published models, in a process of its own: plainly, or averaging them."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.support.line_protocol import serve
from cluster.artifacts import ArtifactRef
from cluster.averaging import READS_AHEAD, mean_pieces
from cluster.config import StorageConfig
from cluster.manifest import BLOCK_BYTES
from cluster.published_model import published_models
from cluster.registry import Registry
from colbert_core.averaging import average_models

Place = tuple[str, int, int]


def status_bytes(name: str) -> int:
    """A line of ``/proc/self/status``, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def measure(method: str, config: dict[str, object], versions: Sequence[str], folder: str) -> dict[str, float]:
    """Reads versions of ``models/mean`` once.

    Args:
        method: 'memory' (plain parallel download, discarded), 'disk' (the same, written to a file) or
            'average'.
        config: of the storage.
        versions: which.
        folder: on the disk to write to.

    Returns:
        ``seconds``, ``cpu_seconds`` of this process, and ``peak_bytes`` above what it had before.
    """
    registry = Registry.open(StorageConfig.model_validate(config))
    refs = [ArtifactRef("models", "mean", version) for version in versions]
    manifests = [registry.manifest(ref) for ref in refs]
    with tempfile.TemporaryDirectory(dir=folder) as output:
        work: dict[str, Callable[[], None]] = {
            "memory": lambda: download(registry, places, None),
            "disk": lambda: download(registry, places, Path(output) / "file"),
            "average": lambda: average_models(
                published_models(registry, refs),
                [1.0] * len(refs),
                Path(output) / "mean",
                mean_pieces,
            ),
        }
        places = [
            (manifest.key_of(path), start, min(BLOCK_BYTES, entry.size - start))
            for manifest in manifests
            for path, entry in manifest.files.items()
            for start in range(0, entry.size, BLOCK_BYTES)
        ]
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, cpu, begin = status_bytes("VmRSS"), time.process_time(), time.perf_counter()
        work[method]()
        return {
            "seconds": time.perf_counter() - begin,
            "cpu_seconds": time.process_time() - cpu,
            "peak_bytes": float(status_bytes("VmHWM") - before),
        }


def download(registry: Registry, places: Sequence[Place], target: Path | None) -> None:
    """The ranged reads of averaging over as many connections; nothing is checked.

    Args:
        registry: whose storage is read.
        places: key, start and length of each read.
        target: a file to write all of it to; None discards it.
    """
    offsets = [0]
    for _, _, length in places:
        offsets.append(offsets[-1] + length)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT) if target else None

    def read(number: int) -> None:
        key, start, length = places[number]
        buffer = memoryview(own.buffer)[:length]
        if registry.store.read_into(key, start, buffer) != length:
            raise RuntimeError(f"{key}: ends before byte {start + length}")
        if descriptor is not None:
            os.pwrite(descriptor, buffer, offsets[number])

    own = threading.local()
    with ThreadPoolExecutor(
        READS_AHEAD, initializer=lambda: setattr(own, "buffer", bytearray(BLOCK_BYTES))
    ) as pool:
        for _ in pool.map(read, range(len(places))):
            pass
    if descriptor is not None:
        os.close(descriptor)


if __name__ == "__main__":
    serve({"measure": measure})
