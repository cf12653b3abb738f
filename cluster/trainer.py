"""Runs a training phase on Ray Train: workers, restarts, resume by name, one run at a time."""

from __future__ import annotations

import signal
import threading
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import get_or_create_autoscaling_coordinator
from ray.train.torch import TorchConfig
from ray.train.v2.api.callback import UserCallback
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.train.v2.torch.torch_trainer import TorchTrainer

from cluster.artifacts import ArtifactRef, phase_fingerprint, phase_ref, training_phase, tuples_ref
from cluster.checkpoints import RunCheckpoints
from cluster.config import Recipe, TrainPhase, fingerprint
from cluster.models import check_start, resolve_model
from cluster.ray_session import SHORT_WAITS
from cluster.registry import Registry
from cluster.run_lease import HEARTBEAT_S, STALE_S, RunLease
from cluster.sources import load_source
from cluster.streams import TupleIndex
from cluster.training_job import PhaseJob, run_worker
from cluster.training_log import ProgressDisplay, StepRecord, read_log
from cluster.training_trackers import require_trackers
from colbert_core import errors
from colbert_core.allocator import release_freed_memory
from colbert_core.errors import DataError, TrainingError

MOST_READERS = 8


@dataclass(frozen=True)
class PhaseResult:
    """A finished phase.

    Attributes:
        ref: the published model.
        records: every step's figures.
        saves: what saving cost: ``saves``, ``blocked_s`` (training waited), ``upload_s`` (beside it).
    """

    ref: ArtifactRef
    records: list[StepRecord]
    saves: dict[str, float]


def run_name(recipe: Recipe, phase: str) -> str:
    """The name of a phase's run in storage: ``<model>-<phase>-<fingerprint>``."""
    ref = phase_ref(recipe, phase)
    return f"{ref.name}-{ref.version}"


def train_phase(
    recipe: Recipe,
    phase: str,
    registry: Registry,
    *,
    heartbeat_s: float = HEARTBEAT_S,
    stale_s: float = STALE_S,
    callbacks: Sequence[UserCallback] = (),
) -> PhaseResult:
    """Trains a phase to its end and publishes its model; continues where an earlier run was stopped.

    Ray must be connected. The start and the training sets must be published.

    Args:
        recipe: the recipe.
        phase: name of the phase.
        registry: of the recipe's storage.
        heartbeat_s, stale_s: of the lease that keeps a second run of this name out.
        callbacks: Ray Train's; they get what :func:`cluster.training_job.run_worker` reports.

    Raises:
        TrainingError: the run is in use elsewhere, its loss is no number, or its workers failed more
            often than ``max_failures``.
        DataError: a training set or the source of ``validation`` is malformed.
        ConfigError: a tracker of ``track`` is not installed, or the phase starts from a published model with
            other settings than ``model.colbert``.
        ArtifactNotFound: the start or a training set is not published.
    """
    config = training_phase(recipe, phase)
    require_trackers(recipe.track)
    run = run_name(recipe, phase)
    data = tuple(tuples_ref(recipe, name) for name in config.data)
    index, digest = _tuple_index(registry, data)
    init = resolve_model(recipe, registry, config.init)
    check_start(recipe, registry, config, init)
    if config.validation is not None:
        load_source(recipe, config.validation.source)  # workers load it, too late to be told of a mistake
    checkpoints = RunCheckpoints(registry.store, run)
    lease = RunLease(
        registry.store,
        f"{checkpoints.prefix}lease.json",
        inputs=[init, *data],
        heartbeat_s=heartbeat_s,
        stale_s=stale_s,
    )
    job = PhaseJob(
        recipe=recipe,
        phase=config,
        run=run,
        init=init,
        data=data,
        index=index,
        data_fingerprint=digest,
        readers=_readers(config),
        claim=lease.claim,
    )
    with lease, ProgressDisplay(registry.store, checkpoints.prefix, f"train {phase}"):
        _check_resume(job, checkpoints)
        outcome = _fit(job, registry, callbacks)
        lease.claim.check(registry.store)
    if failure := outcome.get("failure"):
        raise getattr(errors, failure[0])(f"training phase {phase!r}: {failure[1]}")
    saved = checkpoints.latest()
    counters = saved.counters if saved else {}
    return PhaseResult(
        ref=phase_ref(recipe, phase),
        records=read_log(registry.store, checkpoints.prefix),
        saves={name: float(str(counters[name])) for name in ("saves", "blocked_s", "upload_s")},
    )


def _check_resume(job: PhaseJob, checkpoints: RunCheckpoints) -> None:
    """Is what is to be continued this phase's own work?"""
    saved = checkpoints.latest()
    expected = phase_fingerprint(job.recipe, job.phase)
    if saved is not None and saved.fingerprint != expected:
        raise TrainingError(
            f"{checkpoints.prefix}: step {saved.step} was saved by another configuration "
            f"({saved.fingerprint}, this one is {expected})"
        )


def _fit(job: PhaseJob, registry: Registry, callbacks: Sequence[UserCallback]) -> dict[str, Any]:
    """Runs Ray Train; the return value of rank 0's training function."""
    phase = job.phase
    filesystem, base = registry.store.arrow()
    # Ray Train's own records are of no use afterwards: resume states are ours. A name of its own keeps
    # a resumed run from being taken for the one before.
    scratch = f"{base}/runs/{job.run}/ray-train"
    trainer = TorchTrainer(
        run_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if phase.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=phase.num_workers,
            use_gpu=phase.gpus_per_worker > 0,
            resources_per_worker=_resources(phase),
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=scratch,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=phase.max_failures),
            worker_runtime_env={"env_vars": worker_environment(phase)},
            callbacks=list(callbacks),
        ),
    )
    # Ray Data keeps one coordinator for the cluster, bound to the node of who asked for it first. On a
    # worker's node it would end with that node, and readers started meanwhile would wait for it for ever.
    get_or_create_autoscaling_coordinator()
    release_freed_memory()  # this process only waits now, and the workers may run beside it
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        result: Any = trainer.fit()
    except TrainingFailedError as error:
        raise TrainingError(f"training phase {phase.name!r} failed: {_reason(error)}") from error
    finally:
        # Ray Train leaves its own handler behind, which later would call a controller that is gone.
        if threading.current_thread() is threading.main_thread() and interrupt is not None:
            signal.signal(signal.SIGINT, interrupt)
        # What is left there is of no use, and must not hide how the run ended.
        with suppress(OSError):
            filesystem.delete_dir_contents(scratch, missing_dir_ok=True)
    outcome = result.return_value
    if not isinstance(outcome, dict):
        raise TrainingError(f"training phase {phase.name!r} was stopped before its end")
    return outcome


def worker_environment(phase: TrainPhase) -> dict[str, str]:
    """Variables of a training process; they must stand before torch is imported."""
    return {
        "OMP_NUM_THREADS": str(phase.threads_per_worker or max(1, int(phase.cpus_per_worker))),
        # Forward and backward run on different threads. With a heap for each, what one
        # frees the other cannot use, and a process holds both their peaks in fragments.
        "MALLOC_ARENA_MAX": "1",
        **SHORT_WAITS,
        "TOKENIZERS_PARALLELISM": "false",
    }


def _tuple_index(registry: Registry, data: tuple[ArtifactRef, ...]) -> tuple[TupleIndex, str]:
    """Where the tuples of the published training sets are, and a digest of their content."""
    filesystem, base = registry.store.arrow()
    paths, digests = [], []
    for ref in data:
        manifest = registry.manifest(ref)
        files = sorted(path for path in manifest.files if path.endswith(".parquet"))
        if not files:
            raise DataError(f"{ref} holds no Parquet file")
        paths += [f"{base}/{manifest.key_of(path)}" for path in files]
        digests += [manifest.files[path].sha256 for path in files]
    return TupleIndex(paths, filesystem), fingerprint(digests)


def _resources(phase: TrainPhase) -> dict[str, float]:
    resources = {"CPU": phase.cpus_per_worker}
    if phase.gpus_per_worker:
        resources["GPU"] = phase.gpus_per_worker
    return resources


def _readers(phase: TrainPhase) -> int:
    """Processes that read for one worker: the CPUs that training leaves, shared; at least one."""
    most = phase.num_workers if isinstance(phase.num_workers, int) else phase.num_workers[1]
    spare = ray.cluster_resources().get("CPU", 0.0) - most * phase.cpus_per_worker
    return min(MOST_READERS, max(1, int(spare // most)))


def _reason(error: TrainingFailedError) -> str:
    """The workers' own error, without Ray's frames around it."""
    failures = getattr(error, "worker_failures", {})
    for rank, failure in sorted(failures.items()):
        cause = getattr(failure, "cause", None) or getattr(failure, "_base_exc", None) or failure
        return f"worker {rank}: {type(cause).__name__}: {cause}"
    return str(error)
