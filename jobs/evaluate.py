"""Compares retrieval systems on labelled questions, with paired 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.config import EvaluateConfig, Recipe
from cluster.evaluation import Evaluator, Values, mean
from cluster.models import pinned
from cluster.registry import Registry
from cluster.report import Report
from colbert_core.errors import ConfigError
from colbert_core.metrics import paired_bootstrap
from jobs.launch import main


def run(recipe: Recipe) -> Report:
    """Evaluates ``evaluate.systems`` on ``evaluate.sources``.

    Returns:
        The report; ``details`` holds ``scores[source][system][metric]``, with a baseline also
        ``intervals[source][system][metric] = [difference, low, high]``, ``queries[source]`` and, per
        source and system, ``runs``: where the run file is kept in storage.

    Raises:
        ConfigError: there is no ``evaluate`` section, or a system cannot search.
        ArtifactNotFound: a system's model or index is not published.
    """
    config = recipe.evaluate
    if config is None:
        raise ConfigError("the recipe has no 'evaluate' section")
    report = Report(job="evaluate", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    details: dict[str, Any] = {"scores": {}, "intervals": {}, "queries": {}, "runs": {}}
    console = Console(stderr=True)
    for source in config.sources:
        evaluator = Evaluator(recipe, registry, source, config.depth, config.max_queries)
        values = _evaluated(evaluator, config, report, details["runs"].setdefault(source, {}))
        details["queries"][source] = len(next(iter(next(iter(values.values())).values())))
        details["scores"][source] = {
            system: {metric: mean(found[metric]) for metric in config.metrics}
            for system, found in values.items()
        }
        if config.baseline is not None:
            details["intervals"][source] = _intervals(values, config, recipe.seed)
        for system, scores in details["scores"][source].items():
            report.metrics.update({f"{source}/{system}/{metric}": value for metric, value in scores.items()})
        console.print(_table(source, config, details))
    report.details.update(details, baseline=config.baseline)
    return report


def _evaluated(
    evaluator: Evaluator, config: EvaluateConfig, report: Report, runs: dict[str, str]
) -> dict[str, Values]:
    """Values of all systems; one that was evaluated before is noted as skipped."""
    found = {}
    for name, system in config.systems.items():
        with report.timed(f"{evaluator.source_name}: {name}"):
            found[name], known = evaluator.values(system, config.metrics)
        runs[name] = f"{evaluator.key(system)}/run.trec"
        (report.skipped if known else report.artifacts).append(runs[name])
    return found


def _intervals(
    values: Mapping[str, Values], config: EvaluateConfig, seed: int
) -> dict[str, dict[str, list[float]]]:
    """Per system and metric, the difference to the baseline and its paired bootstrap 95 % interval."""
    assert config.baseline is not None
    base = values[config.baseline]
    return {
        system: {
            metric: list(paired_bootstrap(found[metric], base[metric], seed=seed))
            for metric in config.metrics
        }
        for system, found in values.items()
        if system != config.baseline
    }


def _table(source: str, config: EvaluateConfig, details: Mapping[str, Any]) -> Table:
    scores, intervals = details["scores"][source], details["intervals"].get(source, {})
    best = {metric: max(row[metric] for row in scores.values()) for metric in config.metrics}
    title = f"{source} · {details['queries'][source]:,} questions"
    caption = f"below: paired 95 % interval of the difference to {config.baseline}"
    table = Table(title=title, caption=caption if config.baseline else None, title_justify="left")
    table.add_column("system")
    for metric in config.metrics:
        table.add_column(metric, justify="right")
    for system, row in scores.items():
        cells = []
        for metric in config.metrics:
            text = f"{row[metric]:.4f}"
            cell = f"[bold]{text}[/]" if row[metric] == best[metric] else text
            if system in intervals:
                _, low, high = intervals[system][metric]
                cell += f"\n[dim]{low:+.3f}, {high:+.3f}[/]"
            cells.append(cell)
        table.add_row(system, *cells)
    return table


if __name__ == "__main__":
    main("evaluate", run)
