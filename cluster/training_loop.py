"""What one Ray Train worker does: stream, step, evidence, resume state, and the model at the end.

All workers take every decision together. Two small collectives a step carry what must be agreed on:
before the step, whether every worker has its data; after the backward pass, the figures of the step,
whether all losses are numbers, and whether it is time to save.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn

from cluster.artifacts import ArtifactRef, phase_fingerprint, phase_ref
from cluster.checkpoints import BackgroundSave, RunCheckpoints, SavedStep
from cluster.config import Recipe, TrainPhase
from cluster.engine import TrainingEngine
from cluster.models import load_model_ref
from cluster.registry import Parent, Registry
from cluster.storage import open_store
from cluster.streams import TupleIndex, UnitSchedule
from cluster.training_figures import StepFigures
from cluster.training_log import RunLog, StepRecord
from cluster.training_step import UnitObjective, UnitOutcome, UnitWork
from cluster.training_trackers import open_trackers
from cluster.training_units import TokenisedUnit, UnitSource, UnitStream
from colbert_core.allocator import release_freed_memory
from colbert_core.encoder import ColBERT
from colbert_core.errors import ConfigError, RaycolbertError, TrainingError, VersionExists
from colbert_core.formats import save_model

# ray.train.report makes all workers wait for the controller, which looks every 2 seconds.
REPORT_S = 15.0
RECENT_STEPS = 50
# Activations of ever other sizes leave gaps between what stays: on a CPU a worker would double in size.
RELEASE_EVERY_STEPS = 4


@dataclass(frozen=True)
class PhaseJob:
    """All that a worker needs to run a training phase.

    Attributes:
        recipe: the whole recipe.
        phase: the phase to run.
        run: name of the run in storage.
        init: the model to start from.
        data: the training sets, in order.
        index: where their tuples are.
        data_fingerprint: digest of their content.
        readers: Ray Data processes that read and tokenise for one worker.
    """

    recipe: Recipe
    phase: TrainPhase
    run: str
    init: ArtifactRef
    data: tuple[ArtifactRef, ...]
    index: TupleIndex
    data_fingerprint: str
    readers: int

    @property
    def schedule(self) -> UnitSchedule:
        phase = self.phase
        return UnitSchedule(self.index.tuples, phase.micro_batch, phase.queries_per_step, phase.seed)


def run_worker(config: dict[Any, Any]) -> dict[str, Any]:
    """The training function of Ray Train; ``config['job']`` is a :class:`PhaseJob`.

    Returns:
        ``{"failure": [class name, message]}`` when going on is pointless (malformed data, a loss that
        is no number): raising would make Ray Train try the same again. Else the last step's figures.
    """
    return TrainingLoop(config["job"]).run()


def prepare_model(model: ColBERT, phase: TrainPhase) -> ColBERT:
    """Applies ``freeze`` and ``dropout`` of a phase and the device's attention, in place; training mode.

    Raises:
        ConfigError: a ``freeze`` pattern matches no parameter.
    """
    for pattern in phase.freeze:
        matched = [parameter for name, parameter in model.named_parameters() if pattern in name]
        if not matched:
            some = ", ".join(name for name, _ in list(model.named_parameters())[:4])
            raise ConfigError(f"freeze: no parameter's name contains {pattern!r}; there are {some}, …")
        for parameter in matched:
            parameter.requires_grad_(False)
    if phase.dropout is not None:
        for module in model.modules():
            name = "p" if isinstance(module, nn.Dropout) else "attention_dropout"
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, phase.dropout)
    if not phase.gpus_per_worker:
        # On a CPU the backward pass of fused attention takes twice as long as the plain one.
        model.backbone.set_attn_implementation("eager")
    return model.train()


class TrainingLoop:
    """One worker's part of a training phase, from the last resume state to the end."""

    def __init__(self, job: PhaseJob) -> None:
        self._job, self._phase = job, job.phase
        context = ray.train.get_context()
        self._rank, self._workers = context.get_world_rank(), context.get_world_size()
        threads = self._phase.threads_per_worker or max(1, int(self._phase.cpus_per_worker))
        torch.set_num_threads(threads)
        if self._phase.gpus_per_worker:
            torch.cuda.set_device(ray.train.torch.get_device())
        # Figures and decisions are on the CPU.
        self._control = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None
        self._attempt = self._agree_on(uuid.uuid4().hex[:12])
        self._registry = Registry.open(job.recipe.storage)
        self._store = open_store(job.recipe.storage)
        self._model = prepare_model(load_model_ref(self._registry, job.init), self._phase)
        self._objective = UnitObjective(self._phase)
        self._engine = TrainingEngine(
            self._model,
            self._objective,
            self._phase.optimizer,
            total_steps=self._phase.steps,
            zero_stage=self._phase.zero_stage,
            precision=self._phase.precision,
            gradient_clipping=self._phase.gradient_clipping,
        )
        self._checkpoints = RunCheckpoints(self._store, job.run, self._phase.checkpoint.keep_last)
        self._save = BackgroundSave(self._checkpoints, self._rank, self._attempt)
        self._saving = False
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publications: list[Future[None]] = []
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_save = self._last_report = time.monotonic()
        self._resume()
        self._log = (
            RunLog(
                self._store,
                self._checkpoints.prefix,
                start=self._engine.step,
                steps=self._phase.steps,
                attempt=self._attempt,
                trackers=open_trackers(
                    job.recipe.track,
                    job.run,
                    {"phase": self._phase.model_dump(mode="json"), "data": [str(ref) for ref in job.data]},
                ),
            )
            if self._rank == 0
            else None
        )

    def run(self) -> dict[str, Any]:
        """Trains to the end; see :func:`run_worker` for what it returns."""
        stream = UnitStream(
            UnitSource(self._job.index, self._model.text, self._phase.nway),
            self._job.schedule,
            rank=self._rank,
            workers=self._workers,
            start=self._engine.step,
            stop=self._phase.steps,
            readers=self._job.readers,
        )
        try:
            failure = self._steps(stream)
            self._finish_save()
            if failure is not None:
                return {"failure": list(failure)}
            self._publish()
            for publication in self._publications:
                publication.result()
            return {"step": self._engine.step, "loss": float(np.mean(self._recent or [np.nan]))}
        finally:
            self._save.close()
            self._publisher.shutdown(wait=False, cancel_futures=True)
            if self._log is not None:
                self._log.close()

    def _steps(self, stream: UnitStream) -> tuple[str, str] | None:
        """All remaining steps; returns what stopped them early."""
        steps = iter(stream)
        begin = time.perf_counter()
        while self._engine.step < self._phase.steps:
            units: list[TokenisedUnit] = []
            problem: tuple[str, str] | None = None
            try:
                _, units = next(steps)
            except RaycolbertError as error:
                problem = (type(error).__name__, str(error))
            works = [self._objective.prepare(self._model, unit) for unit in units]
            passes, problem = self._prepare(works, problem)
            if problem is not None:
                return problem
            outcomes = self._backward(works, passes)
            figures = self._gather(units, outcomes, stream.wait_s)
            bad = [outcome.non_finite for outcome in outcomes if outcome.non_finite]
            if figures.any_bad:
                reasons = self._first_of(bad[0] if bad else None)
                return (TrainingError.__name__, f"step {self._engine.step + 1}: {reasons}")
            try:
                update = self._engine.update()
            except TrainingError as error:
                labels = self._first_of(", ".join(label for unit in units for label in unit.labels))
                return (TrainingError.__name__, f"{error}; among its tuples are {labels}")
            now = time.perf_counter()
            record = figures.record(update, self._epoch(), now - begin, self._workers)
            begin = now
            self._recent.append(record.loss)
            if self._log is not None:
                self._log.add(record)
            self._after_step(record, figures)
        return None

    def _prepare(
        self, works: list[UnitWork], problem: tuple[str, str] | None
    ) -> tuple[list[int], tuple[str, str] | None]:
        """Before a step: does every worker have its data, and how many forward passes must all make?"""
        most = -(-self._job.schedule.units_per_step // self._workers)
        counts = [0] * most
        if self._engine.collective_forward:
            counts[: len(works)] = [work.passes for work in works]
        vector = torch.tensor([float(problem is not None), *map(float, counts)], dtype=torch.float64)
        dist.all_reduce(vector, op=dist.ReduceOp.MAX, group=self._control)
        if vector[0] > 0:
            return [], self._first_of(problem)
        return [int(count) for count in vector[1:].tolist()], None

    def _backward(self, works: list[UnitWork], passes: list[int]) -> list[UnitOutcome]:
        outcomes = []
        with self._engine.accumulation():
            for place, least in enumerate(passes):
                if place < len(works):
                    work = works[place]
                    assert work.unit is not None
                    work.passes = max(work.passes, least)
                    outcomes.append(self._engine.backward(work, work.unit.slot.weight))
                elif self._engine.collective_forward:
                    self._engine.backward(UnitWork(None, (), least), 0.0)
        return outcomes

    def _gather(self, units: list[TokenisedUnit], outcomes: list[UnitOutcome], wait_s: float) -> StepFigures:
        """The figures of a step from all workers; rank 0's clock decides about saving and reporting."""
        minutes = self._phase.checkpoint.every_minutes
        now = time.monotonic()
        save_due = minutes is not None and now - self._last_save >= 60 * minutes
        values = StepFigures.row(
            units,
            outcomes,
            wait_s=wait_s,
            uploaded=self._save.uploaded,
            save_due=self._rank == 0 and save_due,
            report_due=self._rank == 0 and now - self._last_report >= REPORT_S,
        )
        mine = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(mine) for _ in range(self._workers)]
        dist.all_gather(everyone, mine, group=self._control)
        return StepFigures(torch.stack(everyone).numpy())

    def _after_step(self, record: StepRecord, figures: StepFigures) -> None:
        """Saves, publishes and reports as due."""
        if self._saving and figures.all_uploaded:
            self._commit()
        step, settings = record.step, self._phase.checkpoint
        due = step % settings.every_steps == 0 or step == self._phase.steps or figures.save_due
        if settings.publish_every_steps and step % settings.publish_every_steps == 0:
            if step < self._phase.steps:
                self._publish()
            due = True
        if due:
            self._begin_save()
        if step % RELEASE_EVERY_STEPS == 0 and self._engine.device.type == "cpu":
            release_freed_memory()
        if due or figures.report_due:
            ray.train.report({**record.scalars(), "step": step})
            self._last_report = time.monotonic()

    # -- resume state -------------------------------------------------------------------------------

    def _resume(self) -> None:
        """Loads the last complete state; rank 0 says which one that is."""
        saved = self._checkpoints.latest() if self._rank == 0 else None
        manifest = self._agree_on(saved.model_dump(mode="json") if saved else None)
        if manifest is None:
            return
        saved = SavedStep.model_validate(manifest)
        with tempfile.TemporaryDirectory(prefix="raycolbert-resume-") as folder:
            self._checkpoints.download(saved, Path(folder))
            self._engine.load(folder)

    def _begin_save(self) -> None:
        self._finish_save()
        self._save.begin(self._engine.step, self._engine.save)
        self._records = self._log.take() if self._log is not None else []
        self._saving = True
        self._last_save = time.monotonic()

    def _finish_save(self) -> None:
        """Waits until the save in flight is complete on every worker, and makes it visible."""
        if self._saving:
            self._save.wait()
            dist.barrier(group=self._control)
            self._commit()
        self._save.wait()

    def _commit(self) -> None:
        """Every worker has uploaded its part: rank 0 writes log and manifest."""
        step, records = self._save.step, self._records
        assert step is not None

        def publish() -> None:
            assert self._log is not None
            self._log.store(records)
            self._checkpoints.commit(
                step,
                self._attempt,
                self._workers,
                phase_fingerprint(self._job.recipe, self._phase),
                {
                    "tuples_seen": step * self._phase.queries_per_step,
                    "blocked_s": self._save.blocked_s,
                    "upload_s": self._save.upload_s,
                    "saves": self._save.saves,
                },
            )
            self._checkpoints.trim()

        self._save.commit(publish if self._rank == 0 else None)
        self._saving = False

    # -- the model ----------------------------------------------------------------------------------

    def _publish(self) -> None:
        """Publishes x, in fp32; uploading goes on in the background."""
        weights = self._engine.averaged_weights()
        if self._rank != 0:
            return
        step = self._engine.step
        ref = phase_ref(self._job.recipe, self._phase.name, step)
        if self._registry.exists(ref):
            return
        # A fresh copy of the start: parameters that were frozen, and perhaps rounded to bf16 in the
        # live model, are published as they were.
        model = load_model_ref(self._registry, self._job.init)
        load_weights(model, weights)
        folder = tempfile.TemporaryDirectory(prefix="raycolbert-publish-")
        save_model(model, Path(folder.name) / "model")
        metrics = {"step": step, "loss": float(np.mean(self._recent))} if self._recent else {"step": step}
        parents = [Parent(self._job.init), *(Parent(ref) for ref in self._job.data)]

        def upload() -> None:
            # A restarted run publishes the same bytes again: whoever is first is right.
            with folder, suppress(VersionExists):
                self._registry.publish(
                    ref,
                    Path(folder.name) / "model",
                    parents=parents,
                    recipe=self._job.recipe.model_dump(mode="json"),
                    fingerprint=self._job.data_fingerprint,
                    metrics=metrics,
                    extra={"phase": self._phase.name, "run": self._job.run, "view": "x"},
                )

        self._publications.append(self._publisher.submit(upload))

    # -- agreement ----------------------------------------------------------------------------------

    def _epoch(self) -> float:
        places = self._engine.step * self._job.schedule.units_per_step
        return places / self._job.schedule.units

    def _agree_on(self, value: Any) -> Any:
        """Rank 0's value, on every worker."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._control)
        return box[0]

    def _first_of(self, value: Any) -> Any:
        """The lowest rank's value that is not None, on every worker."""
        values = [None] * self._workers
        dist.all_gather_object(values, value, group=self._control)
        return next((found for found in values if found is not None), None)


def load_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Copies weights into a model by parameter name; parameters not named stay as they are."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)
