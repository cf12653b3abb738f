"""Memory of an index build as the corpus grows, and how long its result takes to open.

``python -m benchmarks.index_memory [--quick] [--folder DIR]``. Passages of 32 made-up vectors of 128
dimensions, near 4,096 random centres, lie in a mapped file; a process of its own trains the codec from a
fixed sample and writes one shard, for each size anew. The build keeps ids and lengths in memory, no vectors
beyond the sample and one chunk. Peaks: memory that is no mapped file, and the resident set, in which the
kernel also counts pages of mapped files as long as nobody needs their place. Another process opens the index.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.line_protocol import Peer
from benchmarks.support.results import Goal, finish

PASSAGES, QUICK_PASSAGES = (50_000, 100_000, 200_000, 400_000), (2_000, 4_000, 8_000)
LENGTH, DIM, CENTRES = 32, 128, 4096
# Ids, lengths and offsets, which do stay in memory, and what the allocator does not give back.
BYTES_PER_PASSAGE = 1024
OPEN_S = 1.0

console = Console(width=110)


def main() -> int:
    parser = argparse.ArgumentParser(description="Memory of an index build as the corpus grows.")
    parser.add_argument("--quick", action="store_true", help="some thousand passages")
    parser.add_argument("--folder", type=Path, help="for vectors and indexes; default: the temporary one")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sizes = QUICK_PASSAGES if options.quick else PASSAGES
    sample = sizes[0] * LENGTH // 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-", dir=options.folder) as name:
        folder = Path(name)
        make_vectors(folder, sizes[-1])
        for passages in track(sizes, "building", console=console, transient=True):
            cut(folder, passages)
            where = {"folder": str(folder), "index": str(folder / f"index-{passages}")}
            with start(options.threads) as peer:
                settings = {"sample_tokens": sample, "centroids": CENTRES}
                built = peer.call("build", **where, settings=settings, threads=options.threads)
            with start(options.threads) as peer:
                opened = peer.call("open", **where, threads=options.threads)
            rows.append({"passages": passages, "vectors": passages * LENGTH, **built, "open_s": opened})
    table = Table(
        "passages", "vectors", "s", "MB on disk", "peak MB, no files", "peak MB, resident", "open, s"
    )
    for row in rows:
        figures = (row["seconds"], row["bytes"] / 2**20, row["anonymous_mb"], row["peak_mb"])
        cells = (*(f"{each:,.1f}" for each in figures), f"{row['open_s']:.3f}")
        table.add_row(f"{row['passages']:,}", f"{row['vectors']:,}", *cells)
    console.print(table)
    growth = rows[-1]["anonymous_mb"] - rows[0]["anonymous_mb"]
    per_passage = growth * 2**20 / (sizes[-1] - sizes[0])
    slowest = max(row["open_s"] for row in rows)
    goals = [
        Goal("bytes of memory per added passage", per_passage, BYTES_PER_PASSAGE, at_most=True),
        Goal("seconds to open, the slowest", slowest, OPEN_S, at_most=True),
    ]
    return finish(
        "index_memory",
        settings={"vectors_per_passage": LENGTH, "dim": DIM, "sample": sample, "threads": options.threads},
        results={"builds": rows},
        goals=goals,
        console=console,
        quick=options.quick,
    )


def start(threads: int) -> Peer:
    environment = {"OMP_NUM_THREADS": str(threads)}
    return Peer("build", sys.executable, "benchmarks.support.search_ours", environment)


def make_vectors(folder: Path, passages: int) -> None:
    """Writes the vectors of the largest size, float16; each smaller one is its beginning."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CENTRES, DIM), dtype=np.float32)
    rows = passages * LENGTH
    out = np.lib.format.open_memmap(folder / "all.npy", "w+", np.float16, (rows, DIM))
    for start in range(0, rows, 1 << 16):
        part = centres[rng.integers(0, CENTRES, min(1 << 16, rows - start))]
        part += rng.standard_normal(part.shape, dtype=np.float32)
        out[start : start + len(part)] = part / np.linalg.norm(part, axis=1, keepdims=True)
    out.flush()
    np.save(folder / "queries.npy", np.zeros((1, DIM), np.float32))
    np.save(folder / "query_lengths.npy", np.ones(1, np.int32))


def cut(folder: Path, passages: int) -> None:
    """Makes the first passages the set that is built from."""
    whole = np.load(folder / "all.npy", mmap_mode="r")
    part = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, (passages * LENGTH, DIM))
    for start in range(0, len(part), 1 << 18):
        part[start : start + (1 << 18)] = whole[start : min(start + (1 << 18), len(part))]
    part.flush()
    np.save(folder / "lengths.npy", np.full(passages, LENGTH, np.int32))
    (folder / "set.json").write_text(json.dumps({"documents": passages}), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
