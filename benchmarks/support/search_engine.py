"""What the search benchmark asks of an engine, in a process of its own; needs numpy alone."""

from __future__ import annotations

import resource
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.line_protocol import serve
from benchmarks.support.search_files import VectorFiles

Settings = dict[str, Any]


class Engine(ABC):
    """A search engine; documents are known by their numbers."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of its libraries."""

    def warm(self, files: VectorFiles, settings: Settings, threads: int) -> None:  # noqa: B027 -- compiled engines
        """What a machine does once, before its first build, such as compiling; not part of a build's time."""

    @abstractmethod
    def build(self, files: VectorFiles, index: Path, settings: Settings, threads: int) -> None:
        """Makes an index in an empty directory."""

    @abstractmethod
    def open(self, index: Path, threads: int) -> None:
        """Makes it ready to be searched."""

    @abstractmethod
    def search(self, queries: Sequence[np.ndarray], k: int, settings: Settings) -> list[list[int]]:
        """The best k documents of each query, all in one call if the engine can."""


def serve_engine(engine: Engine) -> None:
    """Answers the benchmark's commands until it ends."""
    state: dict[str, Any] = {}

    def build(folder: str, index: str, settings: Settings, threads: int) -> dict[str, float]:
        files = VectorFiles(folder)
        Path(index).mkdir(parents=True)
        engine.warm(files, settings, threads)
        begin, cpu = time.perf_counter(), _cpu_seconds()
        with AnonymousMemory() as memory:
            engine.build(files, Path(index), settings, threads)
        seconds, used = time.perf_counter() - begin, _cpu_seconds() - cpu
        size = sum(path.stat().st_size for path in Path(index).rglob("*") if path.is_file())
        return {
            "seconds": seconds,
            "cpu_seconds": used,
            "bytes": size,
            "peak_mb": _peak_mb(),
            "anonymous_mb": memory.peak_mb,
        }

    def open_(folder: str, index: str, threads: int) -> float:
        state["queries"] = VectorFiles(folder).queries
        begin = time.perf_counter()
        engine.open(Path(index), threads)
        return time.perf_counter() - begin

    def single(k: int, settings: Settings, first: int, last: int, out: str) -> list[float]:
        """Milliseconds of each query, asked one by one."""
        times, found = [], []
        for query in state["queries"][first:last]:
            begin = time.perf_counter()
            found += engine.search([query], k, settings)
            times.append(1000 * (time.perf_counter() - begin))
        _keep(found, k, out)
        return times

    def batch(k: int, settings: Settings, first: int, last: int) -> float:
        """Seconds that all queries take together."""
        begin = time.perf_counter()
        engine.search(state["queries"][first:last], k, settings)
        return time.perf_counter() - begin

    serve(
        {
            "versions": engine.versions,
            "build": build,
            "open": open_,
            "single": single,
            "batch": batch,
            "peak_mb": _peak_mb,
        }
    )


def _keep(found: Sequence[Sequence[int]], k: int, path: str) -> None:
    """Writes int64 ``[queries, k]``, -1 where there are fewer."""
    table = np.full((len(found), k), -1, dtype=np.int64)
    for row, ids in zip(table, found, strict=True):
        row[: len(ids)] = ids
    np.save(path, table)


def _cpu_seconds() -> float:
    """Of this process and those that it started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _peak_mb() -> float:
    """Peak resident set; what getrusage tells would include the process that started this one."""
    return _status_mb("VmHWM")


def _status_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) / 1024
    raise RuntimeError(f"this system does not tell {name}")


class AnonymousMemory:
    """The peak of memory that is no mapped file, of this process, looked at fifty times a second.

    Pages of mapped files can be dropped at any time, and count in the resident set all the same.
    """

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousMemory:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.peak_mb = max(self.peak_mb, _status_mb("RssAnon"))
            if self._over.wait(0.02):
                return
