"""Resume states and models of a run, on their way to storage while it goes on."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from cluster.artifacts import phase_fingerprint, phase_ref
from cluster.checkpoints import BackgroundSave, RunCheckpoints, SavedStep
from cluster.engine import TrainingEngine
from cluster.models import save_for_registry
from cluster.registry import Parent, Registry
from cluster.training_figures import WorkerGroup
from cluster.training_job import PhaseJob
from cluster.training_log import RunLog, StepRecord
from cluster.training_model import exported_model
from colbert_core.errors import VersionExists


class RunSaves:
    """What one worker does so that nothing of its run is lost; all methods but figures are collective.

    Training waits while states and models are written to local disk. They are uploaded beside it, one
    state at a time: a save that is due while the one before is still on its way waits for that. A state
    becomes visible after the models that were due before it, since who goes on from it publishes none of
    them again.

    Args:
        job: the phase.
        engine: whose state is saved.
        registry: where models are published.
        group: the workers.
        attempt: folder of this process group's files, the same on all workers.

    Attributes:
        prefix: of the run in storage.
        last: when the last save began, in seconds of :func:`time.monotonic`.
    """

    def __init__(
        self, job: PhaseJob, engine: TrainingEngine, registry: Registry, group: WorkerGroup, attempt: str
    ) -> None:
        self._job, self._engine, self._registry, self._group = job, engine, registry, group
        self._attempt = attempt
        settings = job.phase.checkpoint
        self._checkpoints = RunCheckpoints(
            registry.store, job.run, settings.keep_last, settings.keep_every_steps
        )
        self._save = BackgroundSave(self._checkpoints, group.rank, attempt)
        self._saving = False
        self._log: RunLog | None = None
        self._records: list[StepRecord] = []
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="publish")
        self._publications: list[Future[None]] = []
        self._blocked_s = self._blocked_before = 0.0
        self.prefix = self._checkpoints.prefix
        self.last = time.monotonic()

    def resume(self) -> None:
        """Loads the last complete state, if there is one; rank 0 says which one that is."""
        saved = self._checkpoints.latest() if self._group.rank == 0 else None
        manifest = self._group.agree_on(saved.model_dump(mode="json") if saved else None)
        if manifest is None:
            return
        saved = SavedStep.model_validate(manifest)
        with tempfile.TemporaryDirectory(prefix="raycolbert-resume-") as folder:
            self._checkpoints.download(saved, Path(folder))
            self._engine.load(folder)

    # -- figures ------------------------------------------------------------------------------------

    @property
    def uploaded(self) -> bool:
        """Is this worker's part of a save in storage that is not committed yet?

        Raises:
            StorageError: the upload failed.
        """
        return self._save.uploaded

    @property
    def uploading(self) -> bool:
        """Is anything of this worker on its way to storage?"""
        return self._save.running or any(not publication.done() for publication in self._publications)

    def waited_s(self) -> float:
        """Seconds that training has waited here since the last call."""
        waited, self._blocked_before = self._blocked_s - self._blocked_before, self._blocked_s
        return waited

    # -- resume states ------------------------------------------------------------------------------

    def save(self, log: RunLog | None) -> None:
        """Saves the state of now; with it, rank 0 stores the records that ``log`` has collected."""
        with self._waiting():
            self._settle()
            self._save.begin(self._engine.step, self._engine.save)
        self._log, self._records = log, log.take() if log is not None else []
        self._saving = True
        self.last = time.monotonic()

    def commit(self) -> None:
        """Makes the save in flight visible, if there is one: every worker has said that it is uploaded.

        A model that could not be published fails the save, and so does a run that is another's by now: it
        must not delete what the other one builds on.
        """
        if not self._saving:
            return
        step, log, records = self._save.step, self._log, self._records
        models = list(self._publications)
        assert step is not None
        counters = {
            "tuples_seen": step * self._job.phase.queries_per_step,
            "blocked_s": self._blocked_s,
            "upload_s": self._save.upload_s,
            "saves": self._save.saves,
        }

        def publish() -> None:
            assert log is not None
            self._job.claim.check(self._registry.store)
            log.store(records)
            for model in models:
                model.result()
            fingerprint = phase_fingerprint(self._job.recipe, self._job.phase)
            self._checkpoints.commit(step, self._attempt, self._group.count, fingerprint, counters)
            self._checkpoints.trim()

        self._save.commit(publish if self._group.rank == 0 else None)
        self._saving = False

    def finish(self) -> None:
        """Waits until the save in flight is complete on every worker, and visible."""
        with self._waiting():
            self._settle()

    def _settle(self) -> None:
        if self._saving:
            self._save.wait()
            self._group.barrier()
            self.commit()
        self._save.wait()

    # -- models -------------------------------------------------------------------------------------

    def publish(self, recent: Sequence[float]) -> None:
        """Publishes x, in fp32.

        Args:
            recent: losses of the last steps, whose mean goes to the manifest.
        """
        with self._waiting():
            weights = self._engine.averaged_weights()
            if self._group.rank == 0:
                self._publish(weights, recent)

    def _publish(self, weights: dict[str, torch.Tensor], recent: Sequence[float]) -> None:
        job, step = self._job, self._engine.step
        ref = phase_ref(job.recipe, job.phase.name, step)
        if self._registry.exists(ref):
            return
        model = exported_model(self._registry, job.init, weights)
        folder = tempfile.TemporaryDirectory(prefix="raycolbert-publish-")
        save_for_registry(model, Path(folder.name) / "model")
        metrics = {"step": step, **({"loss": sum(recent) / len(recent)} if recent else {})}
        parents = [Parent(job.init), *(Parent(ref) for ref in job.data)]

        def upload() -> None:
            # A restarted run publishes the same bytes again: whoever is first is right.
            with folder, suppress(VersionExists):
                self._registry.publish(
                    ref,
                    Path(folder.name) / "model",
                    parents=parents,
                    recipe=job.recipe.model_dump(mode="json"),
                    fingerprint=job.data_fingerprint,
                    metrics=metrics,
                    extra={"phase": job.phase.name, "run": job.run, "view": "x"},
                )

        self._publications.append(self._publisher.submit(upload))

    def wait(self) -> None:
        """Waits until all models are published.

        Raises:
            StorageError: one could not be.
        """
        for publication in self._publications:
            publication.result()

    def close(self) -> None:
        """Starts nothing more; what is running is left to itself."""
        self._save.close()
        self._publisher.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._blocked_s += time.perf_counter() - begin
