"""The evidence of a run: one record a step, as JSON lines, TensorBoard curves and a progress display.

Rank 0 keeps the records and stores those of finished steps with each resume state, so that after any
number of restarts the log in storage holds every step once. What was logged after the last state is
repeated by the resumed run.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import Field, JsonValue
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from cluster.storage import ObjectStore
from cluster.training_trackers import BackgroundTracker
from colbert_core.config import FrozenModel
from colbert_core.errors import ObjectNotFound, StorageError

# TensorBoard gets at most about this many points of a curve.
CURVE_POINTS = 2000
PROGRESS_S = 2.0
POLL_S = 1.0
PRINT_S = 30.0


class StepRecord(FrozenModel):
    """One optimiser step, over all workers.

    Attributes:
        step: number of the step, from 1.
        epoch: epochs finished, with its fraction.
        loss: mean over the step's tuples.
        parts: the terms of the loss.
        lr: learning rate.
        gradient_norm: L2 norm of the global gradient before clipping.
        seconds: the step's time, waiting for data included.
        data_wait_s: longest wait for data of any worker.
        save_s: longest that any worker waited for resume states and models since the step before: to write
            them to local disk, and for the upload before to end.
        uploading: was anything on its way to storage while this step was made.
        tokens: tokens encoded, without padding.
        tokens_per_s: those over the step's time.
        padding_fraction: padding as a share of all tokens run.
        documents_listed: documents of the step's tuples.
        documents_encoded: those that were encoded; shared ones count once a unit.
        truncated_documents: documents cut to the length limit.
        truncated_queries: queries cut to the length limit.
        dropped_tokens: tokens cut off, of documents and queries.
        workers: how many took part.
        precision: what the step was computed in.
        validation: what was measured of the model of this step, by source and metric; empty if nothing was.
        validation_s: how long that took, which is no part of ``seconds``.
    """

    step: int
    epoch: float
    loss: float
    parts: dict[str, float] = Field(default_factory=dict)
    lr: float
    gradient_norm: float
    seconds: float
    data_wait_s: float
    tokens: int
    tokens_per_s: float
    padding_fraction: float
    documents_listed: int
    documents_encoded: int
    truncated_documents: int
    truncated_queries: int
    dropped_tokens: int
    workers: int
    # Logs of earlier versions lack these.
    save_s: float = 0.0
    uploading: bool = False
    precision: Literal["fp32", "bf16", "autocast"] | None = None
    validation: dict[str, float] = Field(default_factory=dict)
    validation_s: float = 0.0

    def scalars(self) -> dict[str, float]:
        """The figures by name; terms of the loss as ``loss/kl``, metrics as ``validation/dev/nDCG_at_10``."""
        plain = self.model_dump(exclude={"step", "parts", "precision", "validation", "validation_s"})
        terms = {f"loss/{name}": value for name, value in self.parts.items()}
        # MLflow refuses names with an @.
        measured = {f"validation/{name.replace('@', '_at_')}": v for name, v in self.validation.items()}
        if measured:
            measured["validation_s"] = self.validation_s
        return {name: float(value) for name, value in {**plain, **terms, **measured}.items()}


class RunLog:
    """Collects records on rank 0 and stores them below the run's prefix.

    Args:
        store: the storage.
        prefix: ``runs/<run>/``.
        start: steps made before this process took over.
        steps: length of the run.
        attempt: distinguishes the TensorBoard files of restarts.
        trackers: services that get every record too.

    Attributes:
        latest: the last step's figures and what was measured last, as :func:`figures_of` takes them.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        *,
        start: int,
        steps: int,
        attempt: str,
        trackers: Sequence[BackgroundTracker] = (),
    ) -> None:
        self._store, self._prefix = store, prefix
        self._steps, self._attempt = steps, attempt
        self._trackers = trackers
        self._every = max(1, -(-steps // CURVE_POINTS))
        self._pending: list[StepRecord] = []
        self._directory = Path(tempfile.mkdtemp(prefix="raycolbert-log-"))
        self._curves = SummaryWriter(str(self._directory), purge_step=start + 1 if start else None)
        self.latest: dict[str, JsonValue] = {"step": start, "steps": steps}
        self._measured: JsonValue = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._show, name="progress", daemon=True)
        self._thread.start()

    def add(self, record: StepRecord) -> None:
        """Takes a finished step."""
        self._pending.append(record)
        if record.validation:
            self._measured = {"step": record.step, "metrics": dict(record.validation)}
        latest = record.model_dump(mode="json", exclude={"validation"})
        self.latest = {"steps": self._steps, **latest, "validation": self._measured}
        figures = {f"train/{name}": value for name, value in record.scalars().items()}
        for tracker in self._trackers:
            tracker.log(record.step, figures)
        if record.step % self._every == 0 or record.step == self._steps or record.validation:
            for name, value in figures.items():
                self._curves.add_scalar(name, value, record.step)

    def take(self) -> list[StepRecord]:
        """The records since the last call: what is to be stored with the state made now."""
        taken, self._pending = self._pending, []
        return taken

    def store(self, records: list[StepRecord]) -> None:
        """Stores records, and the curves so far."""
        if records:
            lines = "".join(f"{record.model_dump_json()}\n" for record in records)
            key = f"{self._prefix}log/{records[0].step:08d}-{records[-1].step:08d}.jsonl"
            self._store.put(key, lines.encode("utf-8"))
        self._curves.flush()
        for path in self._directory.iterdir():
            self._store.upload(f"{self._prefix}tensorboard/{self._attempt}/{path.name}", path)

    def close(self) -> None:
        """Ends the display; stores nothing."""
        self._stop.set()
        self._thread.join()
        self._curves.close()
        for tracker in self._trackers:
            tracker.close(finished=self.latest["step"] == self._steps)
        shutil.rmtree(self._directory, ignore_errors=True)

    def _show(self) -> None:
        """Keeps ``progress.json`` current, for whoever watches the run."""
        while not self._stop.wait(PROGRESS_S):
            # Only a display: storage that is away for a moment must not stop the run.
            with suppress(StorageError):
                self._store.put(f"{self._prefix}progress.json", json.dumps(self.latest).encode("utf-8"))


def read_log(store: ObjectStore, prefix: str) -> list[StepRecord]:
    """All stored records of a run, each step once, in order.

    Args:
        store: the storage.
        prefix: ``runs/<run>/``.
    """
    records: dict[int, StepRecord] = {}
    # What a restarted run wrote later about a step counts.
    for item in sorted(store.list(f"{prefix}log/"), key=lambda each: each.modified):
        for line in store.get(item.key).decode("utf-8").splitlines():
            record = StepRecord.model_validate_json(line)
            records[record.step] = record
    return [records[step] for step in sorted(records)]


class ProgressDisplay:
    """Shows a run's progress on the driver: a bar with the time left, or a line now and then.

    Args:
        store: the storage.
        prefix: ``runs/<run>/``.
        title: what runs.
        console: where to; a bar needs a terminal.
    """

    def __init__(self, store: ObjectStore, prefix: str, title: str, console: Console | None = None) -> None:
        self._store, self._prefix = store, prefix
        self._title = title
        self._console = console or Console(file=sys.stderr)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> ProgressDisplay:
        self._store.delete(f"{self._prefix}progress.json")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        if not self._console.is_terminal:
            self._print_lines()
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task = progress.add_task(self._title, total=None, figures="starting workers")
            while not self._stop.wait(POLL_S):
                if (latest := read_progress(self._store, self._prefix)) is not None:
                    progress.update(
                        task,
                        total=latest["steps"],
                        completed=latest["step"],
                        figures=figures_of(latest),
                    )

    def _print_lines(self) -> None:
        shown, printed = -1, float("-inf")
        while not self._stop.wait(POLL_S):
            latest = read_progress(self._store, self._prefix)
            if latest is None or latest["step"] == shown or time.monotonic() - printed < PRINT_S:
                continue
            shown, printed = latest["step"], time.monotonic()
            figures = figures_of(latest)
            self._console.print(
                f"{self._title}: step {shown} of {latest['steps']}  {figures}", highlight=False
            )


def read_progress(store: ObjectStore, prefix: str) -> dict[str, Any] | None:
    """The latest step of the run under ``prefix`` that is shown, with ``steps``; None if there is none."""
    try:
        return dict(json.loads(store.get(f"{prefix}progress.json")))
    except (ObjectNotFound, StorageError, ValueError):
        return None


def figures_of(latest: dict[str, Any]) -> str:
    """The figures of :func:`read_progress` that a progress line has room for."""
    if "loss" not in latest:
        return ""
    measured = latest.get("validation") or {}
    metrics = "".join(
        f"{name} {value:.4f} (step {measured['step']})  "
        for name, value in measured.get("metrics", {}).items()
    )
    return (
        f"loss {latest['loss']:.4f}  {metrics}lr {latest['lr']:.2e}  {latest['tokens_per_s']:,.0f} tokens/s  "
        f"padding {latest['padding_fraction']:.0%}  data wait {latest['data_wait_s']:.2f} s"
    )
