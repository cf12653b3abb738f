"""This project's index as it grows: a build, and searches whose stages are timed; driven by lines."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.support.line_protocol import serve
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_ours import build_index, compile_build
from colbert_core.config import CodecConfig, SearchConfig
from colbert_core.index import Codec, Searcher
from colbert_core.index.directory import open_shards
from colbert_core.index.engine import CpuEngine

STAGES = ("tables", "gather", "interact", "score")
READINGS = 5
SAMPLE = 1 << 16  # vectors that the rate of finding the nearest centroid is measured on


class TimedEngine(CpuEngine):
    """The CPU's engine, which notes the seconds of its stages.

    ``tables`` is the flat scan of all centroids with all that is as long as it: scores, probes, bytes. It
    is called once a query and shares its own work out, so its time is what the query waits for it; the
    others are called for pieces, on several threads, and theirs are the threads' seconds.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lock_times = threading.Lock()
        self._seconds = dict.fromkeys(STAGES, 0.0)
        for stage in STAGES:
            setattr(self, stage, self._timed(stage, getattr(self, stage)))

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed(*arguments: Any) -> Any:
            begin = time.perf_counter()
            result = call(*arguments)
            seconds = time.perf_counter() - begin
            with self._lock_times:
                self._seconds[stage] += seconds
            return result

        return timed

    def taken(self) -> dict[str, float]:
        """Seconds since the last time."""
        with self._lock_times:
            found, self._seconds = self._seconds, dict.fromkeys(STAGES, 0.0)
        return found


class Program:
    """The commands."""

    def build(self, folder: str, index: str, threads: int) -> dict[str, float]:
        """Makes an index of a set's vectors; seconds, and what is known of where they go."""
        files = VectorFiles(folder)
        compile_build(files, CodecConfig(), threads)
        begin = time.perf_counter()
        build_index(files, Path(index), CodecConfig(), threads)
        seconds = time.perf_counter() - begin
        codec = Codec.load(Path(index) / "codec")
        sample = codec.rotate(files.vectors[:SAMPLE].astype(np.float32))
        readings = []
        for _ in range(READINGS + 1):
            begin = time.perf_counter()
            codec.assigner.nearest(sample)
            readings.append((time.perf_counter() - begin) / len(sample))
        per_vector = statistics.median(readings[1:])
        size = sum(path.stat().st_size for path in Path(index).rglob("*") if path.is_file())
        return {
            "seconds": seconds,
            "nearest_s": per_vector * len(files.vectors),
            "centroids": len(codec.centroids),
            "bytes": size,
        }

    def open(self, folder: str, index: str, threads: int) -> float:
        """Opens the index and reads the questions; seconds of opening."""
        self._queries = VectorFiles(folder).queries
        begin = time.perf_counter()
        codec = Codec.load(Path(index) / "codec")
        shards = open_shards(Path(index), codec)
        self._engine = TimedEngine(codec, shards)
        self._searcher = Searcher(codec, shards, threads=threads, engine=self._engine)
        return time.perf_counter() - begin

    def single(self, k: int, settings: dict[str, Any], out: str) -> dict[str, list[float]]:
        """Milliseconds of each question, asked one by one, in all and by stage; writes the answers."""
        params = SearchConfig.model_validate(settings)
        times: dict[str, list[float]] = {name: [] for name in ("total", *STAGES)}
        found = np.full((len(self._queries), k), -1, dtype=np.int64)
        self._engine.taken()
        for row, query in zip(found, self._queries, strict=True):
            begin = time.perf_counter()
            (hits,) = self._searcher.search([query], k, params)
            times["total"].append(1000 * (time.perf_counter() - begin))
            for stage, seconds in self._engine.taken().items():
                times[stage].append(1000 * seconds)
            row[: len(hits)] = [int(hit.id) for hit in hits]
        np.save(out, found)
        return times

    def batch(self, k: int, settings: dict[str, Any]) -> float:
        """Seconds that all questions take together."""
        begin = time.perf_counter()
        self._searcher.search(self._queries, k, SearchConfig.model_validate(settings))
        return time.perf_counter() - begin


if __name__ == "__main__":
    program = Program()
    serve({name: getattr(program, name) for name in ("build", "open", "single", "batch")})
