"""A training set larger than Ray's object store is streamed in memory that does not grow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from ray._private.internal_api import node_stats
from transformers import AutoTokenizer

from cluster.streams import ROW_GROUP_TUPLES, TupleIndex, UnitSchedule, tuple_schema
from cluster.training_units import UnitSource, UnitStream, pack_unit
from colbert_core.config import ColBERTConfig
from colbert_core.text import TextProcessor
from tests.local_ray import local_ray
from tests.tiny_models import tiny_bert_dir

MB = 2**20
STORE_MB = 80
FILES_MB = 200
NWAY, MICRO_BATCH, DOCUMENT_LENGTH, PASSAGES = 32, 16, 500, 4096
# A passage is this many words of one letter, and then a long word that is one unknown token.
WORDS, CHARACTERS = DOCUMENT_LENGTH, 4_000


@pytest.fixture(scope="module")
def training_set(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files, uncompressed, in row groups of the usual size."""
    folder = tmp_path_factory.mktemp("large")
    source = random.Random(0)
    filler = CHARACTERS - 2 * WORDS
    passages = [
        " ".join(source.choices("abcdefgh", k=WORDS)) + " " + source.randbytes(filler // 2).hex()
        for _ in range(PASSAGES)
    ]
    groups = -(-FILES_MB * MB // (ROW_GROUP_TUPLES * NWAY * CHARACTERS))
    scores = [[float(i) for i in range(NWAY)]] * ROW_GROUP_TUPLES
    paths = []
    for file in range(2):
        paths.append(str(folder / f"part-{file}.parquet"))
        with pq.ParquetWriter(paths[-1], tuple_schema(), compression="none", use_dictionary=False) as writer:
            for group in range(file, groups, 2):
                chosen = [source.choices(passages, k=NWAY) for _ in range(ROW_GROUP_TUPLES)]
                rows = {"query": [f"red {group}"] * len(chosen), "documents": chosen, "scores": scores}
                writer.write_table(pa.table(rows, schema=tuple_schema()))
    assert sum(Path(path).stat().st_size for path in paths) >= FILES_MB * MB
    return paths


@pytest.fixture(scope="module")
def small_store() -> Iterator[None]:
    with local_ray(num_cpus=3, object_store_mb=STORE_MB):
        yield


def anonymous_mb(process: psutil.Process, name: str = "") -> float:
    """Allocated by a process, no mapped file nor the object store; 0 if it has ended or another name."""
    try:
        memory = process.memory_info()
        return float(memory.rss - memory.shared) / MB if name in process.name() else 0.0
    except psutil.NoSuchProcess:
        return 0.0


@dataclass
class Memory:
    """Megabytes in use at one moment.

    Attributes:
        store: objects in the object store.
        spilled: objects written to disk so far, for want of room.
        own: what the process that takes the units has allocated.
        readers: what the processes that read and tokenise have allocated.
    """

    store: float
    spilled: float
    own: float
    readers: float

    @classmethod
    def now(cls) -> Memory:
        (node,) = ray.nodes()
        stats = node_stats(node["NodeManagerAddress"], node["NodeManagerPort"]).store_stats
        raylet = psutil.Process().parent()
        assert raylet is not None
        return cls(
            store=stats.object_store_bytes_used / MB,
            spilled=stats.spilled_bytes_total / MB,
            own=anonymous_mb(psutil.Process()),
            readers=sum(anonymous_mb(process, "UnitReader") for process in raylet.children()),
        )


@dataclass
class Streamed:
    """One pass over the training set.

    Attributes:
        seen: the units, in order.
        lengths: the lengths of all documents, in tokens.
        megabytes: what the units measure as they go through the object store.
        samples: memory in use, every few steps.
    """

    seen: list[int] = field(default_factory=list)
    lengths: set[int] = field(default_factory=set)
    megabytes: float = 0.0
    samples: list[Memory] = field(default_factory=list)


@ray.remote(num_cpus=0)
def stream_in_a_process_of_its_own(source: UnitSource, schedule: UnitSchedule) -> Streamed:
    """As a training worker takes its units; a process of other tests would measure what they have left."""
    result = Streamed()
    stream = UnitStream(source, schedule, rank=0, workers=1, start=0, stop=schedule.units, readers=2)
    for step, (unit,) in stream:
        result.seen.append(unit.slot.unit)
        result.lengths |= {len(ids) for ids in unit.documents.ids}
        result.megabytes += pack_unit(unit).nbytes / MB
        if step % 4 == 3:
            result.samples.append(Memory.now())
    return result


def test_a_training_set_larger_than_the_object_store_is_streamed_in_flat_memory(
    training_set: list[str], small_store: None, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert_dir(tmp_path / "bert"))
    text = TextProcessor(tokenizer, ColBERTConfig(document_length=DOCUMENT_LENGTH))
    source = UnitSource(TupleIndex(training_set), text, NWAY)
    schedule = UnitSchedule(source.index.tuples, MICRO_BATCH, MICRO_BATCH, seed=1)
    result: Streamed = ray.get(stream_in_a_process_of_its_own.remote(source, schedule))
    assert sorted(result.seen) == list(range(schedule.units))
    assert result.lengths == {DOCUMENT_LENGTH}
    # More than the object store has room for.
    assert result.megabytes > STORE_MB
    samples = result.samples
    # Readers may have ended at the last step.
    assert all(sample.readers for sample in samples[:-1]), "no reader is running"
    # Of what goes through the object store, a part is in it at a time.
    held = max(sample.store for sample in samples)
    assert held < result.megabytes / 2, f"{held:.0f} MB were in the store, of {result.megabytes:.0f} in all"
    assert max(sample.spilled for sample in samples) == 0
    early, late = samples[2 : len(samples) // 2], samples[len(samples) // 2 :]
    for name in ("own", "readers"):
        before, after = (max(getattr(sample, name) for sample in part) for part in (early, late))
        assert after - before < 16, f"{name} grew from {before:.0f} to {after:.0f} MB: {samples}"
