"""What every benchmark ends with: a table, a JSON file, and whether its goals are met."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

RESULTS = Path(__file__).parents[1] / "results"
# What sets processors of one name apart, as torch calls it.
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16")
LIBRARIES = ("torch", "transformers", "ray", "deepspeed", "schedulefree", "numpy", "numba", "pyarrow")


@dataclass(frozen=True)
class Goal:
    """A figure that a benchmark is to reach.

    Attributes:
        name: what is measured.
        value: what was measured.
        goal: what is asked for.
        at_most: is the goal an upper bound.
    """

    name: str
    value: float
    goal: float
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was when they were."""
    found = torch.cpu.get_capabilities()
    return {
        "processor": found.get("cpu_name", platform.processor()),
        "instructions": [name for name in INSTRUCTIONS if found.get(name)],
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load": [round(value, 2) for value in os.getloadavg()],
    }


def versions(names: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """Versions of the libraries that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def finish(
    name: str,
    *,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    goals: Sequence[Goal],
    console: Console,
    quick: bool,
) -> int:
    """Writes the JSON file, prints the goals, and returns the exit status.

    Args:
        name: of the benchmark; the file is ``benchmarks/results/<name>.json``, or ``<name>-quick.json``.
        settings: what was measured, versions of peers included.
        results: the figures.
        goals: what is asked for.
        console: where to print.
        quick: a smoke reading: goals are shown, and do not decide the status.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    content = {
        "benchmark": name,
        "quick": quick,
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "settings": dict(settings),
        "results": dict(results),
        "goals": [{**asdict(goal), "met": goal.met} for goal in goals],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for goal in goals:
        sign, verdict = ("≤" if goal.at_most else "≥"), ("[green]met[/]" if goal.met else "[red]NOT met[/]")
        console.print(f"{goal.name}: {goal.value:.3g} (goal {sign} {goal.goal:g}): {verdict}")
    console.print(f"written: {path}")
    return 0 if quick or all(goal.met for goal in goals) else 1
