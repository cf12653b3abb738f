"""PyLate and sentence-transformers encoding texts, PyLate building its index; runs in their environments.

``RAYCOLBERT_PEER`` says which. Each is called as its documentation does, with its own batches. Modes are
'fp32', 'bf16' (autocast over fp32 weights) and 'bf16-weights' (the weights themselves in bfloat16).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.line_protocol import serve


class PyLate:
    """``pylate.models.ColBERT``."""

    libraries = ("pylate", "fast-plaid", "sentence-transformers", "transformers", "torch")

    def __init__(self, model: str) -> None:
        from pylate import models

        self.model = models.ColBERT(model_name_or_path=model, device="cpu")

    @staticmethod
    def encode(model: Any, texts: list[str], is_query: bool) -> list[Any]:
        # It cannot make numpy arrays of bfloat16.
        return list(model.encode(texts, is_query=is_query, convert_to_numpy=False, show_progress_bar=False))


class SentenceTransformers:
    """``sentence_transformers.MultiVectorEncoder``."""

    libraries = ("sentence-transformers", "transformers", "torch")

    def __init__(self, model: str) -> None:
        from sentence_transformers import MultiVectorEncoder

        self.model = MultiVectorEncoder(model, device="cpu")

    @staticmethod
    def encode(model: Any, texts: list[str], is_query: bool) -> list[Any]:
        encode = model.encode_query if is_query else model.encode_document
        return list(encode(texts, show_progress_bar=False))


class Program:
    """The commands."""

    def load(self, model: str, texts: str) -> dict[str, str]:
        """Loads a model and reads the texts; returns versions."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        kinds: dict[str, Any] = {"pylate": PyLate, "sentence-transformers": SentenceTransformers}
        self._peer = kinds[os.environ["RAYCOLBERT_PEER"]](model)
        self._bf16: Any = None
        self._texts: dict[str, list[str]] = json.loads(Path(texts).read_text(encoding="utf-8"))
        return {name: version(name) for name in self._peer.libraries}

    def encode(self, mode: str) -> float:
        """Seconds that all documents take, tokenising included."""
        self._prepare(mode)
        begin = time.perf_counter()
        self._encode(self._texts["documents"], mode)
        return time.perf_counter() - begin

    def vectors(self, mode: str, count: int, out: str) -> list[int]:
        """Writes the vectors of the first documents, one after another; returns their lengths."""
        self._prepare(mode)
        found = [
            torch.as_tensor(each).float() for each in self._encode(self._texts["documents"][:count], mode)
        ]
        np.save(out, torch.cat(found).numpy())
        return [len(each) for each in found]

    def build(self, index: str, mode: str, bits: int, k: int) -> dict[str, Any]:
        """Makes PyLate's PLAID index of all documents, and searches it; seconds of each stage, answers."""
        from pylate import indexes, retrieve

        self._prepare(mode)
        texts = self._texts["documents"]
        begin = time.perf_counter()
        # Its index takes no bfloat16.
        found = [each.float() for each in self._encode(texts, mode)]
        encoded = time.perf_counter()
        plaid = indexes.PLAID(
            index_folder=index,
            index_name="plaid",
            override=True,
            nbits=bits,
            device="cpu",
            show_progress=False,
        )
        ids = [str(number) for number in range(len(texts))]
        plaid.add_documents(documents_ids=ids, documents_embeddings=found)
        indexed = time.perf_counter()
        retriever = retrieve.ColBERT(index=plaid)
        answers, searchable = [], 0.0
        questions = self._texts["questions"]
        for some in (questions[:1], questions[1:]):
            queries = [each.float() for each in self._encode(some, mode, is_query=True)]
            answers += retriever.retrieve(queries_embeddings=queries, k=k)
            searchable = searchable or time.perf_counter()
        return {
            "encode_s": encoded - begin,
            "index_s": indexed - encoded,
            "answer_s": searchable - indexed,
            "tokens": sum(map(len, found)),
            "answers": [[int(hit["id"]) for hit in hits] for hits in answers],
        }

    def _prepare(self, mode: str) -> None:
        """Casts the weights, where they are to be cast; that is no part of any time."""
        if mode == "bf16-weights" and self._bf16 is None:
            self._bf16 = copy.deepcopy(self._peer.model).to(torch.bfloat16)

    def _encode(self, texts: list[str], mode: str, is_query: bool = False) -> list[Any]:
        model = self._bf16 if mode == "bf16-weights" else self._peer.model
        cast: Any = torch.autocast("cpu", torch.bfloat16) if mode == "bf16" else contextlib.nullcontext()
        with cast:
            found: list[Any] = self._peer.encode(model, texts, is_query)
        return found


if __name__ == "__main__":
    program = Program()
    names = ("load", "encode", "vectors", "build")
    serve({name: getattr(program, name) for name in names})
