"""A training phase small enough for tests, with everything it needs published in a fresh storage."""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from cluster.artifacts import ArtifactRef, tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe, StorageConfig, parse_recipe
from cluster.models import ensure_base, load_model_ref
from cluster.registry import Registry
from cluster.streams import TupleWriter
from tests.tiny_data import word_source
from tests.tiny_models import WORDS, tiny_bert_dir

TUPLES = 50
NWAY = 4


def training_recipe(
    root: Path, *, base: str | None = None, storage: StorageConfig | None = None, **phase: Any
) -> Recipe:
    """One phase ``p`` over one tuple set ``t``.

    Args:
        root: storage and cache lie below it.
        storage: another storage.
        base: the base model's directory; default: below ``root``. Versions depend on its path.
        phase: settings of the phase.
    """
    settings: dict[str, Any] = {
        "name": "p",
        "data": ["t"],
        "nway": NWAY,
        "steps": 12,
        "queries_per_step": 8,
        "micro_batch": 4,
        "precision": "fp32",
        "dropout": 0.1,
        "num_workers": 1,
        "max_failures": 2,
        "freeze": ["word_embeddings"],
        "optimizer": {"lr": 3e-4, "warmup_steps": 5, "weight_decay": 0.01},
        "checkpoint": {"every_steps": 4, "keep_last": 2},
    }
    return parse_recipe(
        {
            "name": "r",
            "storage": (
                storage.model_dump(mode="json")
                if storage
                else {"root": str(root / "store"), "cache_dir": str(root / "cache")}
            ),
            "model": {
                "name": "m",
                "base": base or str(root / "base"),
                "colbert": {"dim": 16, "query_length": 8, "document_length": 24},
            },
            "data": {"tuples": {"t": {"read": {"format": "tuples", "tuples": "given.parquet"}}}},
            "train": [{**settings, **phase}],
        }
    )


def validated(recipe: Recipe, folder: Path, every_steps: int) -> Recipe:
    """The recipe with its phase measured on a source ``dev``, which is written into ``folder``."""
    paths = word_source(folder / "dev", documents=60, queries=200)
    tree = recipe.model_dump(mode="json")
    tree["data"]["sources"]["dev"] = {kind: str(folder / path) for kind, path in paths.items()}
    tree["train"][0]["validation"] = {"source": "dev", "every_steps": every_steps}
    return parse_recipe(tree)


def publish_inputs(
    recipe: Recipe, *, change: Callable[[list[dict[str, Any]]], None] | None = None
) -> Registry:
    """Publishes the untrained start and the tuples; neighbours share documents.

    Args:
        recipe: from :func:`training_recipe`.
        change: may damage the rows before they are written.
    """
    if not Path(recipe.model.base).exists():
        tiny_bert_dir(Path(recipe.model.base))
    registry = Registry.open(recipe.storage)
    ensure_base(recipe, registry)
    ref = tuples_ref(recipe, "t")
    if not registry.exists(ref):
        rows = tuple_rows()
        if change is not None:
            change(rows)
        folder = Path(tempfile.mkdtemp(prefix="raycolbert-test-tuples-"))
        for part in range(2):
            with TupleWriter(folder / f"part-{part}.parquet", ids=True) as writer:
                for row in rows[part * 30 : (part + 1) * 30]:
                    writer.write(row)
        registry.publish(ref, folder)
        shutil.rmtree(folder)
    return registry


def tuple_rows() -> list[dict[str, Any]]:
    """Queries ``q0``, ``q1``, …; each group of four shares its documents."""
    source, words = random.Random(0), WORDS.split()
    rows = []
    for number in range(TUPLES):
        if number % 4 == 0:
            documents = [" ".join(source.choices(words, k=source.randint(3, 30))) for _ in range(NWAY + 2)]
        rows.append(
            {
                "query": " ".join(source.choices(words, k=5)),
                "documents": documents,
                "scores": [source.random() for _ in documents],
                "query_id": f"q{number}",
                "document_ids": [f"d{number // 4}.{i}" for i in range(len(documents))],
            }
        )
    return rows


def published_weights(registry: Registry, ref: ArtifactRef) -> dict[str, torch.Tensor]:
    """All tensors of a published model's backbone and projection."""
    return load_file(registry.pull(ref) / "model.safetensors")


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def furthest_apart(left: tuple[Registry, ArtifactRef], right: tuple[Registry, ArtifactRef]) -> float:
    """The largest difference of two published models, in their weights and in the vectors of some texts.

    A key bias has no gradient but rounding, which the optimiser scales up. It changes no output, so its
    weights are left out; the vectors are not.
    """
    weights = [published_weights(*each) for each in (left, right)]
    weights = [{key: value for key, value in each.items() if "key.bias" not in key} for each in weights]
    texts = [row["query"] for row in tuple_rows()]
    vectors = [load_model_ref(*each).encode_documents(texts).vectors for each in (left, right)]
    return max(furthest(*weights), float((vectors[0] - vectors[1]).abs().max()))


def train_workers() -> list[psutil.Process]:
    """The processes of Ray Train workers that this test session has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


class Killing:
    """Kills something of a run, and notes what the run has in storage at that time.

    Args:
        checkpoints: of the run.
        kill: what kills.

    Attributes:
        reached: the last step that could be gone on from.
    """

    def __init__(self, checkpoints: RunCheckpoints, kill: Callable[[], None]) -> None:
        self.reached = 0
        self._checkpoints, self._kill = checkpoints, kill
        self._log: dict[str, bytes] = {}

    def __call__(self) -> None:
        self._kill()
        self.reached = (self._checkpoints.steps() or [0])[-1]
        self._log = self._stored_log()

    def assert_nothing_was_repeated(self) -> None:
        """No step up to the one reached has been made again: its record, with its times, is the same."""
        assert sum(len(lines.splitlines()) for lines in self._log.values()) == self.reached
        assert self._stored_log() == self._log

    def _stored_log(self) -> dict[str, bytes]:
        """The stored records of the steps up to the one reached, by key."""
        store, prefix = self._checkpoints.store, f"{self._checkpoints.prefix}log/"
        keys = [item.key for item in store.list(prefix)]
        return {key: store.get(key) for key in keys if int(key.removesuffix(".jsonl")[-8:]) <= self.reached}


class When(threading.Thread):
    """Does something once, as soon as a condition holds; :attr:`done` says whether it came to that."""

    def __init__(self, condition: Callable[[], bool], action: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._condition, self._action = condition, action
        self._leave = threading.Event()
        self.done = False

    def run(self) -> None:
        while not self._leave.is_set():
            if self._condition():
                self._action()
                self.done = True
                return
            time.sleep(0.02)

    def __enter__(self) -> When:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.join()
