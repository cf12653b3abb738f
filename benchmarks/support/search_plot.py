"""The curves of the search benchmark as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.support.results import RESULTS


def plot(name: str, rows: Sequence[Mapping[str, Any]], *, quick: bool, console: Console) -> None:
    """Writes ``benchmarks/results/<name>.png``: recall@10 against latency and against batched QPS.

    Needs matplotlib, from the ``bench`` extra; without it nothing is drawn, and that is said.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        console.print("no picture: matplotlib is not installed; it is in the 'bench' extra")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5))
    for axis, figure_name, label in zip(
        axes, ("p50_ms@10", "qps@10"), ("single query, p50 ms", "batched queries per second"), strict=True
    ):
        for engine in dict.fromkeys(row["engine"] for row in rows):
            points = sorted((row["recall@10"], row[figure_name]) for row in rows if row["engine"] == engine)
            style = "o-" if engine.startswith("raycolbert") else "s--"
            axis.plot(*zip(*points, strict=True), style, label=engine)
        axis.set_xlabel("recall@10 against exact MaxSim")
        axis.set_ylabel(label)
        axis.set_yscale("log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend()
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if quick else ''}.png"
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    console.print(f"written: {path}")
