"""What a job returns, prints and stores: a small typed record."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

import psutil
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.table import Table


class Report(BaseModel):
    """The outcome of one job.

    Attributes:
        job: name of the job.
        recipe: name of the recipe.
        skipped: outputs that already existed and were not made again.
        metrics: figures, flat, by name.
        timings: seconds by stage.
        artifacts: what the job wrote, as ``kind/name@version``.
        warnings: what a user must know although the job went through.
        details: anything further that is plain data (tables, curves).
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: int = 1
    job: str
    recipe: str
    started_at: datetime = Field(default_factory=lambda: datetime.now(timezone.utc))
    skipped: list[str] = []
    metrics: dict[str, float] = {}
    timings: dict[str, float] = {}
    artifacts: list[str] = []
    warnings: list[str] = []
    details: dict[str, Any] = {}

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the seconds that the block takes to ``timings[stage]``."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.timings[stage] = self.timings.get(stage, 0.0) + time.perf_counter() - begin

    def print(self, console: Console | None = None) -> None:
        """Prints the closing table."""
        console = console or Console()
        table = Table(title=f"{self.job} · {self.recipe}", title_justify="left", show_header=False)
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for name, value in self.metrics.items():
            table.add_row(name, f"{value:,.4f}" if value != int(value) else f"{int(value):,}")
        for stage, seconds in self.timings.items():
            table.add_row(f"time: {stage}", f"{seconds:.1f} s")
        for name in self.skipped:
            table.add_row("already there", name)
        for name in self.artifacts:
            table.add_row("written", name)
        console.print(table)
        for warning in self.warnings:
            console.print(f"[bold yellow]warning:[/] {warning}")


def memory_of_session_mb() -> float:
    """Resident memory of this process and all its children, shared pages counted once (PSS), in MB."""
    total = 0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20
