"""Trains and compares the variants of a recipe: the grid of ``ablate``, each from several seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from rich.console import Console
from rich.table import Table

from cluster.ablation import Trial, compare, expand, references, room
from cluster.artifacts import ArtifactRef, tuples_ref
from cluster.config import EvaluateConfig, Recipe, System
from cluster.config.ablation import BASELINE
from cluster.evaluation import Evaluator, Values, mean
from cluster.models import ensure_base, pinned
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from cluster.trainer import run_name
from cluster.trial_pool import Step, Work, run_all
from colbert_core.errors import ConfigError, TrainingError
from jobs import average, mine_negatives, score_teacher, train
from jobs.launch import main

console = Console(stderr=True)


def run(recipe: Recipe, report: Path | None = None) -> Report:
    """Runs every trial of ``ablate`` that is not finished, and compares the variants.

    A trial is the recipe's own training and evaluation with the variant's settings; its outputs carry
    the names that these settings give them. What trials share (candidates, teacher scores, the start) is
    made once, what exists already is not made again, and a trial that was stopped goes on where it was.
    A variant whose training fails is reported as failed, and the others go on.

    Args:
        recipe: the recipe.
        report: folder for ``report.json``; None writes none.

    Returns:
        The report; ``details`` holds ``scores[source][variant][metric] = {mean, by_seed}``,
        ``intervals[source][variant][metric] = [difference, low, high]`` to the baseline,
        ``references[source][system][metric]``, ``queries[source]``, the ``variants`` with their overrides,
        their ``models`` and what ``failed``.

    Raises:
        ConfigError: the recipe has no ``ablate`` section, two variants are the same, or a metric is
            unknown.
        TrainingError: the baseline failed, or every variant did.
    """
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    trials = [replace(trial, recipe=pinned(trial.recipe, registry)) for trial in expand(recipe)]
    config, study = recipe.evaluate, recipe.ablate
    if config is None or study is None:
        raise ConfigError("an ablation needs the sections 'evaluate' and 'ablate'")
    outcome = Report(job="ablate", recipe=recipe.name)
    judges = {source: _judge(recipe, source, registry) for source in config.sources}
    work = _reference_work(recipe, judges) + _trial_work(trials, judges, config, outcome)
    failed: dict[str, str] = {}
    if work:
        with ray_session(recipe):
            with outcome.timed("shared inputs"):
                _prepare([trial for trial in trials if trial.seed == trials[0].seed], registry, outcome)
            with outcome.timed("trials"):
                failed = run_all(work, study.at_once or room(trials, ray.cluster_resources()), registry.store)
    lost = {trial.variant for trial in trials if str(trial) in failed}
    if BASELINE in lost:
        raise TrainingError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
    made = [str(trial.ref) for trial in trials if str(trial) not in failed]
    outcome.artifacts += [ref for ref in made if ref not in outcome.skipped]
    outcome.warnings += [f"{name} failed: {reason}" for name, reason in failed.items()]
    outcome.details.update(
        variants=study.variants(),
        seeds=list(study.seeds),
        models={str(trial): str(trial.ref) for trial in trials},
        failed=failed,
        scores={},
        intervals={},
        references={},
        queries={},
    )
    compared = [trial for trial in trials if trial.variant not in lost]
    for source, judge in judges.items():
        values = [(trial, judge.model_values(trial.ref, config.metrics)[0]) for trial in compared]
        known = {name: judge.values(system, config.metrics)[0] for name, system in references(recipe).items()}
        _compare(outcome, source, config.metrics, values, known, recipe.seed)
        console.print(comparison_table(outcome, source, config.metrics))
    if report is not None:
        report.mkdir(parents=True, exist_ok=True)
        path = report / "report.json"
        path.write_text(outcome.model_dump_json(indent=2), encoding="utf-8")
        console.print(f"written: {path}")
    return outcome


# -- what is to be done -----------------------------------------------------------------------------


def _trial_work(
    trials: Sequence[Trial], judges: Mapping[str, Evaluator], config: EvaluateConfig, report: Report
) -> list[Work]:
    """The trials that are not finished; those that are go into the report's ``skipped``."""
    found = []
    for trial in trials:
        trained = next(iter(judges.values())).registry.exists(trial.ref)
        if trained:
            report.skipped.append(str(trial.ref))
            if all(judge.knows_model(trial.ref, config.metrics) for judge in judges.values()):
                continue
        last = trial.phases[-1]
        claims = {"num_cpus": last.cpus_per_worker, "num_gpus": last.gpus_per_worker}
        steps = [Step(_judge_model, (trial.recipe, trial.ref), claims)]
        if not trained:
            # Ray Train's workers claim what the training needs; the task only waits for them.
            steps.insert(0, Step(_train_trial, (trial,), {"num_cpus": 0.0}))
        runs = frozenset() if trained else frozenset(run_name(trial.recipe, p.name) for p in trial.phases)
        found.append(Work(str(trial), steps, run_name(trial.recipe, last.name), runs))
    return found


def _reference_work(recipe: Recipe, judges: Mapping[str, Evaluator]) -> list[Work]:
    """The reference systems that are not evaluated yet on some source."""
    assert recipe.evaluate is not None
    phase = recipe.train[-1]
    claims = {"num_cpus": phase.cpus_per_worker, "num_gpus": phase.gpus_per_worker}
    return [
        Work(f"reference {name}", [Step(_judge_system, (recipe, system), claims)])
        for name, system in references(recipe).items()
        if not all(judge.knows(system, recipe.evaluate.metrics) for judge in judges.values())
    ]


def _prepare(trials: Sequence[Trial], registry: Registry, report: Report) -> None:
    """Makes what trials share: candidates, teacher scores and untrained starts."""
    for trial in trials:
        recipe, sets = trial.recipe, trial.recipe.data.tuples
        if not all(registry.exists(tuples_ref(recipe, name)) for name in sets):
            for stage in (mine_negatives.run(recipe), score_teacher.run(recipe)):
                report.artifacts += stage.artifacts
        if any(phase.init == "base" for phase in trial.phases):
            ensure_base(recipe, registry)


def _judge(recipe: Recipe, source: str, registry: Registry) -> Evaluator:
    assert recipe.evaluate is not None
    return Evaluator(recipe, registry, source, recipe.evaluate.depth, recipe.evaluate.max_queries)


# -- what runs on the cluster -------------------------------------------------------------------------


def _train_trial(trial: Trial) -> None:
    for phase in trial.phases:
        train.run(trial.recipe, phase=phase.name)
    if trial.model == "averaged":
        average.run(trial.recipe)


def _judge_model(recipe: Recipe, ref: ArtifactRef) -> None:
    assert recipe.evaluate is not None
    registry = Registry.open(recipe.storage)
    for source in recipe.evaluate.sources:
        _judge(recipe, source, registry).model_values(ref, recipe.evaluate.metrics)


def _judge_system(recipe: Recipe, system: System) -> None:
    assert recipe.evaluate is not None
    registry = Registry.open(recipe.storage)
    for source in recipe.evaluate.sources:
        _judge(recipe, source, registry).values(system, recipe.evaluate.metrics)


# -- what it says ---------------------------------------------------------------------------------------


def _compare(
    report: Report,
    source: str,
    metrics: Sequence[str],
    values: Sequence[tuple[Trial, Values]],
    known: Mapping[str, Values],
    seed: int,
) -> None:
    """Adds a source's scores and intervals to the report."""
    scores: dict[str, dict[str, Any]] = {}
    intervals: dict[str, dict[str, Any]] = {}
    for metric in metrics:
        found = compare(_by_variant((trial, each[metric]) for trial, each in values), seed)
        for variant, score in found.items():
            by_seed = {str(number): value for number, value in score.by_seed.items()}
            scores.setdefault(variant, {})[metric] = {"mean": score.mean, "by_seed": by_seed}
            if score.difference is not None:
                intervals.setdefault(variant, {})[metric] = list(score.difference)
            report.metrics[f"{source}/{variant}/{metric}"] = score.mean
    report.details["scores"][source] = scores
    report.details["intervals"][source] = intervals
    report.details["references"][source] = {
        name: {metric: mean(each[metric]) for metric in metrics} for name, each in known.items()
    }
    report.details["queries"][source] = len(values[0][1][metrics[0]])


def comparison_table(report: Report, source: str, metrics: Sequence[str]) -> Table:
    """A source's scores in a report of :func:`run`: by system and variant, with their seeds and intervals."""
    details = report.details
    scores, intervals = details["scores"][source], details["intervals"][source]
    seeds = ", ".join(map(str, details["seeds"]))
    table = Table(
        title=f"{source} · {details['queries'][source]:,} questions · seeds {seeds}",
        caption="mean over seeds; each seed; difference to the baseline with its 95 % interval: paired "
        "bootstrap over questions, which does not cover what other seeds would give",
        title_justify="left",
    )
    table.add_column("variant", overflow="fold")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for name, row in details["references"][source].items():
        table.add_row(f"[dim]{name}[/]", *(f"[dim]{row[metric]:.4f}[/]" for metric in metrics))
    table.add_section()
    for variant, row in scores.items():
        cells = []
        for metric in metrics:
            score = row[metric]
            cell = f"{score['mean']:.4f}"
            if len(score["by_seed"]) > 1:
                cell += "\n[dim]" + " ".join(f"{value:.4f}" for value in score["by_seed"].values()) + "[/]"
            if variant in intervals:
                difference, low, high = intervals[variant][metric]
                style = "bold" if low > 0 or high < 0 else "default"
                cell += f"\n[{style}]{difference:+.4f} ({low:+.4f}, {high:+.4f})[/]"
            cells.append(cell)
        table.add_row(variant, *cells)
    for name in details["failed"]:
        table.add_row(f"[red]{name}[/]", *("failed" for _ in metrics))
    return table


def _by_variant(values: Iterable[tuple[Trial, Any]]) -> dict[str, dict[int, Any]]:
    found: dict[str, dict[int, Any]] = {}
    for trial, value in values:
        found.setdefault(trial.variant, {})[trial.seed] = value
    return found


if __name__ == "__main__":
    main("ablate", run)
