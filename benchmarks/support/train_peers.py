"""Training steps of PyLate and of sentence-transformers, driven by lines; runs in their environments.

Each library is used as its own documentation does: its model, its collator, its distillation loss, in
training mode, with the optimiser that its trainer uses (AdamW, fused). ``RAYCOLBERT_PEER`` says which.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.support.line_protocol import serve


class PyLate:
    """``pylate.losses.Distillation``: min-max on the student's scores; documents padded to the limit."""

    def __init__(self, model: str, lengths: dict[str, int]) -> None:
        from pylate import losses, models, utils

        self.versions = {name: version(name) for name in ("pylate", "sentence-transformers", "torch")}
        self.model = models.ColBERT(
            model_name_or_path=model,
            device="cpu",
            query_length=lengths["query"],
            document_length=lengths["document"],
        )
        self.loss = losses.Distillation(model=self.model)
        self._collate = utils.ColBERTCollator(tokenize_fn=self.model.tokenize)

    def batch(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Features of queries and documents, and the teacher's scores."""
        made = self._collate(rows)
        return [column(made, name) for name in ("query", "documents")], made["label"]


class SentenceTransformers:
    """``MultiVectorDistillKLDivLoss``; each column of documents is padded to its longest."""

    def __init__(self, model: str, lengths: dict[str, int]) -> None:
        from sentence_transformers import MultiVectorEncoder
        from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
        from sentence_transformers.multi_vector_encoder.losses import MultiVectorDistillKLDivLoss

        self.versions = {name: version(name) for name in ("sentence-transformers", "transformers", "torch")}
        self.model = MultiVectorEncoder(model, device="cpu")
        self.loss = MultiVectorDistillKLDivLoss(self.model)
        self._collator = MultiVectorEncoderDataCollator

    def batch(self, rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], torch.Tensor]:
        """Features of queries and of each column of documents, and the teacher's scores."""
        ways = len(rows[0]["documents"])
        names = [f"document_{i}" for i in range(ways)]
        # Its trainer puts no marker in front of a text unless it is told to, column by column.
        prompts = {"query": self.model.prompts["query"]} | dict.fromkeys(
            names, self.model.prompts["document"]
        )
        collate = self._collator(preprocess_fn=self.model.preprocess, prompts=prompts)
        made = collate(
            [
                {
                    "query": row["query"],
                    **dict(zip(names, row["documents"], strict=True)),
                    "label": row["scores"],
                }
                for row in rows
            ]
        )
        return [column(made, name) for name in ("query", *names)], made["label"]


def column(batch: dict[str, Any], name: str) -> dict[str, Any]:
    """What a collator made of one column."""
    return {key.removeprefix(f"{name}_"): value for key, value in batch.items() if key.startswith(f"{name}_")}


class Program:
    """The commands: load, prepare, loss, step."""

    def load(self, model: str, lengths: dict[str, int], precision: str, lr: float) -> dict[str, str]:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        kinds: dict[str, Any] = {"pylate": PyLate, "sentence-transformers": SentenceTransformers}
        self._peer = kinds[os.environ["RAYCOLBERT_PEER"]](model, lengths)
        self._bf16 = precision == "bf16"
        trainable = [p for p in self._peer.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0, fused=True)
        return self._peer.versions

    def prepare(self, path: str) -> dict[str, float]:
        """Tokenises all steps of a case; tokenising is not part of a step's time."""
        steps = json.loads(Path(path).read_text(encoding="utf-8"))
        self._batches = [self._peer.batch(rows) for rows in steps]
        masks = [part["attention_mask"] for features, _ in self._batches for part in features[1:]]
        tokens = sum(int(mask.sum()) for mask in masks)
        return {"tokens": tokens, "padding": 1 - tokens / sum(mask.numel() for mask in masks)}

    def loss(self, index: int) -> float:
        """The loss of a step without dropout and without changing anything."""
        self._peer.model.eval()
        with torch.no_grad():
            return float(self._forward(index))

    def step(self, index: int) -> float:
        """Seconds of one optimiser step."""
        self._peer.model.train()
        begin = time.perf_counter()
        loss = self._forward(index)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - begin

    def _forward(self, index: int) -> torch.Tensor:
        features, labels = self._batches[index]
        # A model may write into what it is given.
        copies = [dict(part) for part in features]
        cast: Any = torch.autocast("cpu", torch.bfloat16) if self._bf16 else contextlib.nullcontext()
        with cast:
            return self._peer.loss(copies, labels)


if __name__ == "__main__":
    program = Program()
    serve(
        {"load": program.load, "prepare": program.prepare, "loss": program.loss, "step": program.step},
    )
