"""The mean of published models: plain, or greedily only those that help on a dev source."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cluster.artifacts import ArtifactRef, averaged_ref, phase_ref
from cluster.config import AverageConfig, AverageInput, GreedySoup, Recipe
from cluster.registry import Parent, Registry
from cluster.report import Report
from cluster.scorers.encoders import ColBERTEncoder, VectorScorer
from cluster.sources import LabelledSource, load_source
from colbert_core.averaging import Soup, average_models, greedy_soup
from colbert_core.errors import ArtifactNotFound, ConfigError
from colbert_core.formats import load_model
from colbert_core.metrics import evaluate_run
from jobs.launch import main


def run(recipe: Recipe) -> Report:
    """Averages the models that ``average.inputs`` names and publishes the mean.

    Does nothing if the result is published already. The manifest's parents are the models that went in,
    with their shares.

    Raises:
        ConfigError: there is no ``average`` section, an input is named twice, or the dev metric is unknown.
        ArtifactNotFound: inputs are not published; all of them are named.
        ModelError: the models differ in shapes, config or tokenizer, see
            :func:`colbert_core.averaging.average_models`.
    """
    report = Report(job="average", recipe=recipe.name)
    ref = averaged_ref(recipe)
    registry = Registry.open(recipe.storage)
    if registry.exists(ref):
        report.skipped.append(str(ref))
        return report
    config = recipe.average
    assert config is not None  # averaged_ref has checked
    inputs = _resolved(recipe, registry, config)
    with tempfile.TemporaryDirectory(prefix="raycolbert-average-") as folder:
        mean = Path(folder) / "model"
        with report.timed("pull"):
            directories = {parent: registry.pull(parent) for parent, _ in inputs}
        if config.greedy is not None:
            with report.timed("greedy"):
                soup = _greedy(recipe, config.greedy, inputs, directories, Path(folder))
            inputs = list(soup.chosen)
            report.metrics[f"{config.greedy.source}/{config.greedy.metric}"] = soup.score
            report.details["trials"] = [
                {"models": [str(member) for member, _ in members], "score": score}
                for members, score in soup.trials
            ]
        with report.timed("average"):
            _mean_of(inputs, directories, mean)
        total = sum(weight for _, weight in inputs)
        parents = [Parent(parent, weight / total) for parent, weight in inputs]
        with report.timed("publish"):
            registry.publish(
                ref,
                mean,
                parents=parents,
                recipe=recipe.model_dump(mode="json"),
                metrics=report.metrics,
                extra=dict(report.details),
            )
    report.metrics["models_averaged"] = len(inputs)
    report.details["parents"] = {str(parent.ref): parent.weight for parent in parents}
    report.artifacts.append(str(ref))
    return report


Weighted = tuple[ArtifactRef, float]


def _resolved(recipe: Recipe, registry: Registry, config: AverageConfig) -> list[Weighted]:
    """The published versions that the inputs stand for, with their weights."""
    resolved: list[Weighted] = []
    missing = []
    for position, item in enumerate(config.inputs):
        ref = _input_ref(recipe, registry, item)
        if ref in [other for other, _ in resolved]:
            raise ConfigError(f"average.inputs.{position}: {ref} is named twice; give it a larger weight")
        if not registry.exists(ref):
            missing.append(f"inputs.{position} ({ref})")
        resolved.append((ref, item.weight))
    if missing:
        there = ", ".join(registry.versions("models", recipe.model.name)) or "nothing"
        raise ArtifactNotFound(
            f"average: not published: {', '.join(missing)}; published under {recipe.model.name}: {there}"
        )
    return resolved


def _input_ref(recipe: Recipe, registry: Registry, item: AverageInput) -> ArtifactRef:
    if item.phase is not None:
        return phase_ref(recipe, item.phase, None if item.step == "last" else item.step)
    return registry.resolve("models", str(item.model))


def _mean_of(inputs: Sequence[Weighted], directories: dict[ArtifactRef, Path], output: Path) -> None:
    average_models([directories[ref] for ref, _ in inputs], [weight for _, weight in inputs], output)


def _greedy(
    recipe: Recipe,
    settings: GreedySoup,
    inputs: Sequence[Weighted],
    directories: dict[ArtifactRef, Path],
    folder: Path,
) -> Soup[Weighted]:
    """Chooses the inputs by exact MaxSim over the dev source; each trial's mean is deleted after it."""
    source = load_source(recipe, settings.source)
    evaluate_run({}, source.qrels, [settings.metric])  # refuses an unknown metric before any work
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("greedy soup: models scored", total=2 * len(inputs) - 1)

        def score(chosen: Sequence[Weighted]) -> float:
            if len(chosen) == 1:
                value = _dev_score(source, directories[chosen[0][0]], settings.metric)
            else:
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    _mean_of(chosen, directories, Path(trial) / "model")
                    value = _dev_score(source, Path(trial) / "model", settings.metric)
            progress.advance(task)
            return value

        return greedy_soup(inputs, score)


def _dev_score(source: LabelledSource, directory: Path, metric: str) -> float:
    """The metric of an exact search with the model in ``directory``."""
    depth = metric.partition("@")[2]
    if not depth.isdigit():
        raise ConfigError(
            f"average.greedy.metric {metric!r}: a metric at a rank is expected, such as nDCG@10"
        )
    query_ids = list(source.labelled_queries)
    scorer = VectorScorer("greedy soup", source, ColBERTEncoder(load_model(directory)))
    ranking = scorer.search(query_ids, int(depth))
    found = {query: dict(hits) for query, hits in zip(query_ids, ranking, strict=True)}
    return evaluate_run(found, source.qrels, [metric])[metric]


if __name__ == "__main__":
    main("average", run)
