"""Distils the teacher into a ColBERT model, phase by phase; a phase that is published is skipped."""

from __future__ import annotations

from cluster.artifacts import phase_ref, training_phase
from cluster.config import Recipe, TrainPhase
from cluster.models import ensure_base, pinned
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from cluster.trainer import PhaseResult, train_phase
from colbert_core.errors import ConfigError
from jobs.launch import main


def run(recipe: Recipe, phase: str | None = None) -> Report:
    """Trains the recipe's phases in order.

    Args:
        recipe: the recipe; its training sets must have been published (job ``score_teacher``).
        phase: only this one; what it starts from must have been trained.

    Returns:
        Per phase the loss, throughput, padding and shared documents, and the last of what was measured by
        ``validation``; under ``details["loss_curves"]`` and ``details["validation_curves"]`` values by step.

    Raises:
        ConfigError: the recipe has no training phase, or none of this name.
        TrainingError, DataError, ArtifactNotFound: see :func:`cluster.trainer.train_phase`.
    """
    if not recipe.train:
        raise ConfigError("the recipe has no 'train' section")
    report = Report(job="train", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    phases = recipe.train if phase is None else (training_phase(recipe, phase),)
    for config in phases:
        ref = phase_ref(recipe, config.name)
        if registry.exists(ref):
            report.skipped.append(str(ref))
            report.warnings += _missing_steps(recipe, config, registry)
            continue
        with report.timed(config.name), ray_session(recipe):
            if config.init == "base":
                ensure_base(recipe, registry)
            _add(report, config.name, train_phase(recipe, config.name, registry))
    return report


def _missing_steps(recipe: Recipe, phase: TrainPhase, registry: Registry) -> list[str]:
    """Says which steps of a finished phase the recipe counts on and nobody will publish."""
    missing = [s for s in phase.published_steps if not registry.exists(phase_ref(recipe, phase.name, s))]
    if not missing:
        return []
    steps = ", ".join(map(str, missing))
    return [
        f"{phase.name}: its model is there, and so it is not trained again, but steps {steps} are not: "
        "publish_every_steps was another when it was trained, or they have been collected since"
    ]


def _add(report: Report, phase: str, result: PhaseResult) -> None:
    """Adds a finished phase to the report."""
    records = result.records
    listed = sum(record.documents_listed for record in records)
    encoded = sum(record.documents_encoded for record in records)
    seconds = sum(record.seconds for record in records)
    tail = records[-max(1, len(records) // 10) :]
    figures = {
        "steps": len(records),
        "loss": sum(record.loss for record in tail) / len(tail),
        "tokens_per_s": sum(record.tokens for record in records) / seconds,
        "padding_fraction": sum(record.padding_fraction for record in records) / len(records),
        "data_wait_share": sum(record.data_wait_s for record in records) / seconds,
        "documents_listed": listed,
        "documents_encoded": encoded,
        "truncated_documents": sum(record.truncated_documents for record in records),
        "truncated_queries": sum(record.truncated_queries for record in records),
        **{f"checkpoint_{name}": value for name, value in result.saves.items()},
    }
    # A run that was resumed may have been measured otherwise before.
    measured: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.validation.items():
            measured.setdefault(name, []).append((record.step, value))
    if measured:
        figures |= {name: points[-1][1] for name, points in measured.items()}
        report.details.setdefault("validation_curves", {})[phase] = measured
    report.metrics.update({f"{phase}.{name}": float(value) for name, value in figures.items()})
    report.artifacts.append(str(result.ref))
    curves = report.details.setdefault("loss_curves", {})
    curves[phase] = [[record.step, record.loss] for record in records]


if __name__ == "__main__":
    main("train", run)
