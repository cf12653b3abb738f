"""Encoded texts on disk, as every search engine of a benchmark reads them; needs numpy alone.

::

    vectors.npy        float16 [tokens, dim], the documents' vectors one after another
    lengths.npy        int32 [documents]
    token_ids.npy      int64 [tokens], vocabulary id of each vector's token
    queries.npy        float32 [query tokens, dim]
    query_lengths.npy  int32 [queries]
    set.json           what it is
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


class VectorFiles:
    """The encoded documents and questions of a folder.

    Attributes:
        folder: where.
        vectors: float16 ``[tokens, dim]``, mapped from disk.
        lengths: int64 ``[documents]``.
        queries: float32 ``[length, dim]`` of each question.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.vectors: np.ndarray = np.load(self.folder / "vectors.npy", mmap_mode="r")
        self.lengths: np.ndarray = np.load(self.folder / "lengths.npy").astype(np.int64)
        flat = np.load(self.folder / "queries.npy")
        cuts = np.cumsum(np.load(self.folder / "query_lengths.npy"))[:-1]
        self.queries: list[np.ndarray] = np.split(flat, cuts)

    @property
    def about(self) -> dict[str, Any]:
        """What ``set.json`` says."""
        return json.loads((self.folder / "set.json").read_text(encoding="utf-8"))

    @property
    def offsets(self) -> np.ndarray:
        """int64 ``[documents + 1]``: document i owns vectors ``offsets[i]`` to ``offsets[i + 1]``."""
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def document(self, number: int) -> np.ndarray:
        """float16 ``[length, dim]``."""
        start = int(self.lengths[:number].sum())
        return self.vectors[start : start + int(self.lengths[number])]
