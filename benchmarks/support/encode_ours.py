"""This project encoding texts and building an index of them, driven by the benchmarks of both."""

from __future__ import annotations

import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.support.line_protocol import serve
from colbert_core.config import CodecConfig
from colbert_core.formats import load_model
from colbert_core.index import Codec, ShardWriter, open_index

DOCUMENTS_AT_ONCE = 512


class Program:
    """The commands. ``mode`` is the precision: 'fp32', or 'bf16' (autocast over fp32 weights)."""

    def load(self, model: str, texts: str) -> dict[str, str]:
        """Loads a model and reads the texts; returns versions."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._model = load_model(model).eval()
        self._texts: dict[str, list[str]] = json.loads(Path(texts).read_text(encoding="utf-8"))
        return {name: version(name) for name in ("raycolbert", "transformers", "torch")}

    def encode(self, mode: Any) -> float:
        """Seconds that all documents take, tokenising included."""
        begin = time.perf_counter()
        self._model.encode_documents(self._texts["documents"], precision=mode)
        return time.perf_counter() - begin

    def vectors(self, mode: Any, count: int, out: str) -> list[int]:
        """Writes the vectors of the first documents, one after another; returns their lengths."""
        found = self._model.encode_documents(self._texts["documents"][:count], precision=mode)
        np.save(out, found.vectors.numpy())
        return list(found.lengths.tolist())

    def build(self, index: str, mode: Any, bits: int, k: int) -> dict[str, Any]:
        """Makes an index of all documents, and searches it; seconds of each stage and the answers."""
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        texts, directory = self._texts["documents"], Path(index)
        begin = time.perf_counter()
        found = self._model.encode_documents(texts, precision=mode)
        vectors, lengths = found.vectors.half().numpy(), found.lengths.numpy()
        encoded = time.perf_counter()
        codec = Codec.train(
            vectors, CodecConfig.model_validate({"residual_bits": bits}), threads=torch.get_num_threads()
        )
        codec.save(directory / "codec")
        with ShardWriter(directory / "shards" / "00000", codec) as writer:
            for start in range(0, len(texts), DOCUMENTS_AT_ONCE):
                some = lengths[start : start + DOCUMENTS_AT_ONCE]
                first = int(lengths[:start].sum())
                ids = [str(number) for number in range(start, start + len(some))]
                writer.add(ids, vectors[first : first + int(some.sum())], some)
            writer.finish()
        indexed = time.perf_counter()
        searcher = open_index(directory, threads=torch.get_num_threads())
        questions = self._texts["questions"]
        answers = searcher.search(self._queries(questions[:1], mode), k)
        searchable = time.perf_counter()
        answers += searcher.search(self._queries(questions[1:], mode), k)
        searcher.close()
        return {
            "encode_s": encoded - begin,
            "index_s": indexed - encoded,
            "answer_s": searchable - indexed,
            "tokens": len(vectors),
            "answers": [[int(hit.id) for hit in hits] for hits in answers],
        }

    def _queries(self, texts: list[str], mode: Any) -> list[np.ndarray]:
        return [query.numpy() for query in self._model.encode_queries(texts, precision=mode)]


if __name__ == "__main__":
    program = Program()
    names = ("load", "encode", "vectors", "build")
    serve({name: getattr(program, name) for name in names})
