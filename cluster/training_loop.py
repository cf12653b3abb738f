"""What one Ray Train worker does: stream, step, evidence, resume state, and the model at the end.

All workers take every decision together. Two small collectives a step carry what must be agreed on:
before the step, whether every worker has its data; after the backward pass, the figures of the step,
whether all losses are numbers, and whether it is time to save.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
import ray.train.torch
import torch

from cluster.engine import TrainingEngine
from cluster.models import load_model_ref
from cluster.ray_session import go_before_helpers
from cluster.registry import Registry
from cluster.training_figures import StepFigures, WorkerGroup
from cluster.training_job import PhaseJob
from cluster.training_log import RunLog, StepRecord
from cluster.training_model import agreed_precision, prepare_model
from cluster.training_saves import RunSaves
from cluster.training_step import UnitObjective, UnitOutcome, UnitWork
from cluster.training_trackers import open_trackers
from cluster.training_units import TokenisedUnit, UnitSource, UnitStream
from colbert_core.allocator import GrowthLimit
from colbert_core.errors import RaycolbertError, StorageError, TrainingError

if TYPE_CHECKING:
    from cluster.validation import Validation

# A report to Ray Train makes all workers wait until the controller, which looks every 2 seconds, has taken
# the one before: each carries all steps since then.
REPORT_S = 15.0
RECENT_STEPS = 50


class TrainingLoop:
    """One worker's part of a training phase, from the last resume state to the end."""

    def __init__(self, job: PhaseJob) -> None:
        self._job, self._phase = job, job.phase
        threads = self._phase.threads_per_worker or max(1, int(self._phase.cpus_per_worker))
        go_before_helpers()  # torch starts its threads later, and they inherit it
        torch.set_num_threads(threads)
        if self._phase.gpus_per_worker:
            torch.cuda.set_device(ray.train.torch.get_device())
        self._group = WorkerGroup()
        attempt = self._group.agree_on(uuid.uuid4().hex[:12])
        self._registry = registry = Registry.open(job.recipe.storage)
        self._model = prepare_model(load_model_ref(registry, job.init), self._phase)
        self._objective = UnitObjective(self._phase)
        self._precision = agreed_precision(self._phase, self._group)
        self._engine = TrainingEngine(
            self._model,
            self._objective,
            self._phase.optimizer,
            total_steps=self._phase.steps,
            zero_stage=self._phase.zero_stage,
            precision=self._precision,
            gradient_clipping=self._phase.gradient_clipping,
        )
        self._saves = RunSaves(job, self._engine, registry, self._group, attempt)
        self._saves.resume()
        self._validation: Validation | None = None
        if self._phase.validation is not None:
            from cluster.validation import Validation  # with all scorers, which other runs need not import

            self._validation = Validation(job, self._engine, registry, self._group)
        self._memory = GrowthLimit()
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._unreported: list[dict[str, float]] = []
        self._last_report = time.monotonic()
        self._log: RunLog | None = None
        if self._group.rank == 0:
            settings = {"phase": self._phase.model_dump(mode="json"), "data": [str(ref) for ref in job.data]}
            self._log = RunLog(
                registry.store,
                self._saves.prefix,
                start=self._engine.step,
                steps=self._phase.steps,
                attempt=attempt,
                trackers=open_trackers(job.recipe.track, job.run, settings),
            )

    def run(self) -> dict[str, Any]:
        """Trains to the end; see :func:`cluster.training_job.run_worker` for what it returns."""
        stream = UnitStream(
            UnitSource(self._job.index, self._model.text, self._phase.nway),
            self._job.schedule,
            rank=self._group.rank,
            workers=self._group.count,
            start=self._engine.step,
            stop=self._phase.steps,
            readers=self._job.readers,
        )
        try:
            failure = self._taken_over() or self._steps(stream)
            self._saves.finish()
            if failure is not None:
                return {"failure": list(failure)}
            self._saves.publish(self._recent)
            self._saves.wait()
            return {"step": self._engine.step, "loss": float(np.mean(self._recent or [np.nan]))}
        finally:
            self._saves.close()
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
            if figures.any_bad:
                reasons = self._all_of([each.non_finite for each in outcomes if each.non_finite])
                return (TrainingError.__name__, f"step {self._engine.step + 1}: {'; '.join(reasons)}")
            try:
                update = self._engine.update()
            except TrainingError as error:
                labels = self._all_of([label for unit in units for label in unit.labels])
                return (TrainingError.__name__, f"{error}; its tuples are {', '.join(labels)}")
            made = time.perf_counter()
            validation, problem = self._validate()
            if problem is not None:
                return problem
            now = time.perf_counter()
            record = figures.record(
                update,
                epoch=self._epoch(),
                seconds=made - begin,
                workers=self._group.count,
                precision=self._precision,
                validation=validation,
                validation_s=now - made if validation else 0.0,
            )
            begin = now
            self._recent.append(record.loss)
            if self._log is not None:
                self._log.add(record)
            self._after_step(record, figures)
        return None

    def _taken_over(self) -> tuple[str, str] | None:
        """Whether the run is another's by now: starting its workers again is of no use; collective."""
        problem = None
        if self._group.rank == 0:
            try:
                self._job.claim.check(self._registry.store)
            except TrainingError as error:
                problem = (type(error).__name__, str(error))
        return self._group.agree_on(problem)

    def _prepare(
        self, works: list[UnitWork], problem: tuple[str, str] | None
    ) -> tuple[list[int], tuple[str, str] | None]:
        """Before a step: does every worker have its data, and how many forward passes must all make?"""
        most = -(-self._job.schedule.units_per_step // self._group.count)
        counts = [0] * most
        if self._engine.collective_forward:
            counts[: len(works)] = [work.passes for work in works]
        stop, *largest = self._group.largest([float(problem is not None), *map(float, counts)])
        if stop > 0:
            return [], self._group.first_of(problem)
        return [int(count) for count in largest], None

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
                    idle = self._objective.prepare(self._model, None)
                    idle.passes = least
                    self._engine.backward(idle, 0.0)
        return outcomes

    def _gather(self, units: list[TokenisedUnit], outcomes: list[UnitOutcome], wait_s: float) -> StepFigures:
        """The figures of a step from all workers; rank 0's clock decides about saving and reporting."""
        minutes = self._phase.checkpoint.every_minutes
        now, first = time.monotonic(), self._group.rank == 0
        row = StepFigures.row(
            units,
            outcomes,
            wait_s=wait_s,
            save_s=self._saves.waited_s(),
            uploading=self._saves.uploading,
            uploaded=self._saves.uploaded,
            save_due=first and minutes is not None and now - self._saves.last >= 60 * minutes,
            report_due=first and now - self._last_report >= REPORT_S,
        )
        return StepFigures(self._group.gather(row))

    def _validate(self) -> tuple[dict[str, float], tuple[str, str] | None]:
        """What is measured of the model of this step, if it is due, or why it cannot be; collective."""
        if self._validation is None or not self._validation.due(self._engine.step):
            return {}, None
        try:
            return self._validation.measure(), None
        except StorageError:
            raise  # the workers may be luckier when they are started again
        except RaycolbertError as error:
            return {}, (type(error).__name__, f"validation of step {self._engine.step}: {error}")

    def _after_step(self, record: StepRecord, figures: StepFigures) -> None:
        """Saves, publishes and reports as due."""
        if figures.all_uploaded:
            self._saves.commit()
        step, settings = record.step, self._phase.checkpoint
        last = step == self._phase.steps
        publish_due = settings.publish_every_steps and step % settings.publish_every_steps == 0
        if publish_due and not last:
            self._saves.publish(self._recent)
        if step % settings.every_steps == 0 or publish_due or last or figures.save_due:
            self._saves.save(self._log)
        if self._engine.device.type == "cpu":
            self._memory.after_step()
        self._unreported.append({**record.scalars(), "step": step})
        if last or figures.report_due:
            ray.train.report({**self._unreported[-1], "steps": self._unreported})
            self._unreported, self._last_report = [], time.monotonic()

    def _all_of(self, texts: list[str]) -> list[str]:
        """The texts of all workers; collective."""
        return [text for found in self._group.every(texts) for text in found]

    def _epoch(self) -> float:
        places = self._engine.step * self._job.schedule.units_per_step
        return places / self._job.schedule.units
