"""Scores of one query with many documents, by several libraries, driven by lines; needs numpy alone.

A case is a folder: ``query.npy`` float32 ``[length, dim]``, ``documents.npy`` float32 ``[tokens, dim]``,
``lengths.npy`` int64 ``[documents]``. What a library wants its input in is made before the clock starts.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.line_protocol import serve

Score = Callable[[], Any]
REST_SECONDS, WARM_SECONDS = 0.2, 0.1


def ours(query: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> Score:
    """This project, on ragged vectors."""
    import torch

    from colbert_core.maxsim import maxsim_ragged
    from colbert_core.vectors import RaggedVectors

    asked = torch.from_numpy(query)
    ragged = RaggedVectors(torch.from_numpy(documents), torch.from_numpy(lengths))
    return lambda: maxsim_ragged(asked, ragged)


def torch_padded(query: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> Score:
    """Plain torch on documents padded to the longest: product, mask, maximum, sum."""
    import torch

    asked = torch.from_numpy(query)
    parts = torch.from_numpy(documents).split(lengths.tolist())
    padded = torch.nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
    absent = torch.arange(padded.shape[1]) >= torch.from_numpy(lengths)[:, None]

    def score() -> torch.Tensor:
        similarity = torch.einsum("dtk,qk->dqt", padded, asked)
        return similarity.masked_fill_(absent[:, None], -torch.inf).amax(dim=-1).sum(dim=-1)

    return score


def torch_ragged(query: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> Score:
    """Plain torch without padding: one product, then the maximum of each document's rows."""
    import torch

    asked, flat = torch.from_numpy(query), torch.from_numpy(documents)
    sizes = torch.from_numpy(lengths)

    def score() -> torch.Tensor:
        best = torch.segment_reduce(flat @ asked.T, "max", lengths=sizes, axis=0)
        return best.sum(dim=-1)

    return score


def maxsim_cpu(query: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> Score:
    """The package of that name, in Rust over libxsmm."""
    import maxsim_cpu as library

    parts = np.split(documents, np.cumsum(lengths)[:-1])
    return lambda: library.maxsim_scores_variable(query, parts)


METHODS = {
    "raycolbert": ours,
    "torch padded": torch_padded,
    "torch ragged": torch_ragged,
    "maxsim-cpu": maxsim_cpu,
}


class Program:
    """The commands."""

    def __init__(self) -> None:
        self._scores: dict[tuple[str, str], Score] = {}
        self._products: dict[str, Score] = {}

    def versions(self) -> dict[str, str]:
        """Of the library, or of those that score here."""
        if os.environ["RAYCOLBERT_PEER"] == "maxsim-cpu":
            return {"maxsim-cpu": version("maxsim-cpu")}
        import torch

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        return {name: version(name) for name in ("raycolbert", "torch", "numpy")}

    def scores(self, method: str, folder: str, out: str) -> None:
        """Prepares a case and writes its scores, float32 ``[documents]``."""
        case = [np.load(Path(folder) / f"{name}.npy") for name in ("query", "documents", "lengths")]
        score = self._scores[method, folder] = METHODS[method](*case)
        np.save(out, np.asarray(score(), dtype=np.float32))

    def time(self, method: str, folder: str, repeats: int) -> list[float]:
        """Seconds of each of some calls."""
        return timed(self._scores[method, folder], repeats)

    def product(self, library: str, rows: int, inner: int, columns: int, repeats: int) -> list[float]:
        """Seconds of each of some fp32 matrix products."""
        key = f"{library} {rows}×{inner}×{columns}"
        if key not in self._products:
            self._products[key] = matrix_product(library, rows, inner, columns)
        return timed(self._products[key], repeats)


def matrix_product(library: str, rows: int, inner: int, columns: int) -> Score:
    """A product into a matrix that is there already, by torch or numpy."""
    chance = np.random.default_rng(0)
    left = chance.standard_normal((rows, inner), dtype=np.float32)
    right = chance.standard_normal((inner, columns), dtype=np.float32)
    out = np.empty((rows, columns), dtype=np.float32)
    if library == "numpy":
        return lambda: np.matmul(left, right, out=out)
    import torch

    tensors = [torch.from_numpy(each) for each in (left, right, out)]
    return lambda: torch.mm(tensors[0], tensors[1], out=tensors[2])


def timed(action: Score, repeats: int) -> list[float]:
    """Seconds of each call, after a rest and a while of calls that are not counted.

    Threads of a matrix library wait for their next product at full speed: what is timed right after it has
    one core less. And a machine at rest takes a moment to give all that it has.
    """
    time.sleep(REST_SECONDS)
    warm = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < warm:
        action()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - begin)
    return seconds


if __name__ == "__main__":
    program = Program()
    serve({name: getattr(program, name) for name in ("versions", "scores", "time", "product")})
