"""fast-plaid, PyLate, tachiom and xtr-warp-rs, driven by the search benchmark; runs in their environments.

``RAYCOLBERT_PEER`` says which. Each gets the same float16 vectors, and as many threads as it is told.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.search_engine import Engine, Settings, serve_engine
from benchmarks.support.search_files import VectorFiles


class Tachiom(Engine):
    """Token-aware clustering, PQ, a graph of centroids; reads the files itself."""

    def __init__(self) -> None:
        import tachiom

        self._class: Any = tachiom.Tachiom
        self._index: Any = None
        self._threads = 1

    def versions(self) -> dict[str, str]:
        try:
            return {"tachiom": version("tachiom")}
        except PackageNotFoundError:  # an unpacked wheel
            return {"tachiom": "unknown"}

    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        paths = [str(files.folder / f"{name}.npy") for name in ("vectors", "token_ids", "lengths")]
        built = self._class.build(*paths, **settings)
        built.save(str(index / "index.bin"))

    def open(self, index: Path, threads: int) -> None:
        self._threads = threads
        self._index = self._class.load(str(index / "index.bin"))

    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        if len(queries) == 1:
            _, found = self._index.search(np.ascontiguousarray(queries[0]), k=k, **settings)
            return [_known(found)]
        offsets = np.cumsum([0, *(len(query) for query in queries)]).astype(np.uint64)
        _, rows = self._index.batch_search(
            np.concatenate(queries), len(queries), k, offsets=offsets, num_threads=self._threads, **settings
        )
        return [_known(row) for row in rows]


class FastPlaid(Engine):
    """PLAID in Rust over libtorch."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._index: Any = None

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("fast-plaid", "torch")}

    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        from fast_plaid import search

        self._torch.set_num_threads(threads)
        search.FastPlaid(index=str(index), device="cpu").create(
            documents_embeddings=_tensors(self._torch, files), **settings
        )

    def open(self, index: Path, threads: int) -> None:
        from fast_plaid import search

        self._torch.set_num_threads(threads)
        self._index = search.FastPlaid(index=str(index), device="cpu")

    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        given = [self._torch.from_numpy(np.ascontiguousarray(query)) for query in queries]
        found = self._index.search(queries_embeddings=given, top_k=k, show_progress=False, **settings)
        return [[int(number) for number, _ in hits] for hits in found]


class PyLatePlaid(Engine):
    """PyLate's PLAID index: a fast-plaid of the version that it pins, with a table of external ids."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._index: Any = None
        self._defaults: Settings = {}

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("pylate", "fast-plaid", "torch")}

    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        self._torch.set_num_threads(threads)
        self._plaid(index, override=True, **settings).add_documents(
            documents_ids=[str(number) for number in range(len(files.lengths))],
            documents_embeddings=_tensors(self._torch, files),
        )

    def open(self, index: Path, threads: int) -> None:
        self._torch.set_num_threads(threads)
        self._index = self._plaid(index)
        backend = self._index._index
        self._defaults = {name: getattr(backend, name) for name in ("n_ivf_probe", "n_full_scores")}

    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        # A search takes its quality settings from the constructor; a second index would load it all again.
        for name, value in (self._defaults | settings).items():
            setattr(self._index._index, name, value)
        given = [self._torch.from_numpy(np.ascontiguousarray(query)) for query in queries]
        return [[int(hit["id"]) for hit in hits] for hits in self._index(given, k=k)]

    def _plaid(self, index: Path, **settings: Any) -> Any:
        from pylate import indexes

        return indexes.PLAID(
            index_folder=str(index), index_name="plaid", device="cpu", show_progress=False, **settings
        )


class XtrWarp(Engine):
    """WARP in Rust over libtorch."""

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._index: Any = None
        self._threads = 1

    def versions(self) -> dict[str, str]:
        return {name: version(name) for name in ("xtr-warp-rs", "torch")}

    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        from xtr_warp import XTRWarp

        self._torch.set_num_threads(threads)
        XTRWarp(index=str(index)).create(
            embeddings_source=[each.float() for each in _tensors(self._torch, files)],
            device="cpu",
            show_progress=False,
            **settings,
        )

    def open(self, index: Path, threads: int) -> None:
        from xtr_warp import XTRWarp

        self._torch.set_num_threads(threads)
        self._threads = threads
        self._index = XTRWarp(index=str(index)).load(device="cpu", dtype=self._torch.float32)

    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        given = [self._torch.from_numpy(np.ascontiguousarray(query)) for query in queries]
        found = self._index.search(
            queries_embeddings=given, top_k=k, num_threads=self._threads, show_progress=False, **settings
        )
        return [[int(number) for number, _ in hits] for hits in found]


def _tensors(torch: Any, files: VectorFiles) -> list[Any]:
    """The documents, each a float16 tensor ``[length, dim]``."""
    flat = torch.from_numpy(np.array(files.vectors))
    return list(flat.split(files.lengths.tolist()))


def _known(numbers: Any) -> list[int]:
    """Without the mark of a place that was not filled."""
    return [int(number) for number in numbers if number != np.iinfo(np.uint32).max]


PEERS: dict[str, type[Engine]] = {
    "tachiom": Tachiom,
    "fast-plaid": FastPlaid,
    "pylate": PyLatePlaid,
    "xtr-warp-rs": XtrWarp,
}

if __name__ == "__main__":
    serve_engine(PEERS[os.environ["RAYCOLBERT_PEER"]]())
