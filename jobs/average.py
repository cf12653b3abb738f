"""The mean of published models: plain, or greedily only those that help on a dev source."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from cluster.artifacts import ArtifactRef, averaged_ref, input_refs
from cluster.averaging import mean_pieces
from cluster.config import AverageConfig, AverageInput, GreedySoup, Recipe
from cluster.data_files import DataFiles, check_same_files, source_files
from cluster.evaluation import evaluate_model
from cluster.models import pinned
from cluster.published_model import published_models
from cluster.ray_session import has_cluster, ray_session
from cluster.registry import Parent, Registry
from cluster.report import Report
from cluster.scorers.encoders import ColBERTEncoder
from cluster.scorers.vectors import VectorScorer
from cluster.sources import LabelledSource, load_source
from colbert_core.averaging import Soup, average_models, greedy_soup
from colbert_core.errors import ArtifactNotFound, ConfigError
from colbert_core.formats import load_model
from colbert_core.metric_names import parse_metric
from colbert_core.metrics import evaluate_run
from colbert_core.model_files import ModelFiles, local_model
from jobs.launch import main

Weighted = tuple[ArtifactRef, float]


def run(recipe: Recipe) -> Report:
    """Averages the models that ``average.inputs`` names and publishes the mean.

    The inputs are read from storage in parts; only a greedy soup, which has to search with them, keeps
    them on this machine. Does nothing if the result is published already. The manifest's parents are the
    models that went in, with their shares.

    Raises:
        ConfigError: there is no ``average`` section, an input is named twice, a phase publishes too few
            steps, or a metric is unknown.
        ArtifactNotFound: inputs are not published; all of them are named.
        ModelError: the models differ in shapes, config or tokenizer, see
            :func:`colbert_core.averaging.average_models`.
        IntegrityError: an input is damaged in storage.
    """
    report = Report(job="average", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    ref = averaged_ref(recipe)
    config = recipe.average
    assert config is not None  # averaged_ref has checked
    judged = [item.source for item in config.inputs] + [config.greedy.source if config.greedy else None]
    files = source_files(recipe, *dict.fromkeys(source for source in judged if source))
    if registry.exists(ref):
        check_same_files(recipe, registry, ref, files)
        report.skipped.append(str(ref))
        return report
    data = DataFiles(recipe, files)
    inputs = _resolved(recipe, registry, config, report)
    models: dict[ArtifactRef, ModelFiles]
    with tempfile.TemporaryDirectory(prefix="raycolbert-average-") as folder, ExitStack() as session:
        mean = Path(folder) / "model"
        if config.greedy is None:
            refs = [parent for parent, _ in inputs]
            models = dict(zip(refs, published_models(registry, refs), strict=True))
            if has_cluster(recipe):
                session.enter_context(ray_session(recipe))
        else:
            with report.timed("pull"):
                models = {parent: local_model(registry.pull(parent)) for parent, _ in inputs}
            with report.timed("greedy"):
                soup = _greedy(recipe, registry, config.greedy, inputs, models, Path(folder))
            inputs = list(soup.chosen)
            report.metrics[f"{config.greedy.source}/{config.greedy.metric}"] = soup.score
            report.details["trials"] = [
                {"models": [str(member) for member, _ in members], "score": score}
                for members, score in soup.trials
            ]
        with report.timed("average"):
            _mean_of(inputs, models, mean)
        total = sum(weight for _, weight in inputs)
        parents = [Parent(parent, weight / total) for parent, weight in inputs]
        with report.timed("publish"):
            registry.publish(
                ref,
                mean,
                parents=parents,
                recipe=recipe.model_dump(mode="json"),
                metrics=report.metrics,
                extra={**report.details, **data.record()},
            )
    report.metrics["models_averaged"] = len(inputs)
    report.details["parents"] = {str(parent.ref): parent.weight for parent in parents}
    report.artifacts.append(str(ref))
    return report


def _resolved(recipe: Recipe, registry: Registry, config: AverageConfig, report: Report) -> list[Weighted]:
    """The published versions that the inputs stand for, with their weights."""
    candidates = [
        input_refs(recipe, item) if item.model is None else [registry.resolve("models", item.model)]
        for item in config.inputs
    ]
    _together(
        config.inputs,
        [() if item.best else refs for item, refs in zip(config.inputs, candidates, strict=True)],
    )
    missing = [
        f"inputs.{position} ({ref})"
        for position, refs in enumerate(candidates)
        for ref in refs
        if not registry.exists(ref)
    ]
    if missing:
        there = ", ".join(registry.versions("models", recipe.model.name)) or "nothing"
        raise ArtifactNotFound(
            f"average: not published: {', '.join(missing)}; published under {recipe.model.name}: {there}"
        )
    chosen = [
        _best(recipe, registry, item, refs, report) if item.best else refs
        for item, refs in zip(config.inputs, candidates, strict=True)
    ]
    return _together(config.inputs, chosen)


def _together(inputs: Sequence[AverageInput], chosen: Sequence[Sequence[ArtifactRef]]) -> list[Weighted]:
    """What all inputs stand for, after checking that nothing comes twice."""
    found: dict[ArtifactRef, float] = {}
    for position, (item, refs) in enumerate(zip(inputs, chosen, strict=True)):
        for ref in refs:
            if ref in found:
                raise ConfigError(f"average.inputs.{position}: {ref} is named twice; give it a larger weight")
            found[ref] = item.weight
    return list(found.items())


def _best(
    recipe: Recipe, registry: Registry, item: AverageInput, refs: Sequence[ArtifactRef], report: Report
) -> list[ArtifactRef]:
    """The steps with the highest metric, best first; of equals the later."""
    assert item.source is not None and item.metric is not None  # the recipe was checked
    with report.timed("evaluate"):
        scores = {
            ref: evaluate_model(recipe, registry, ref, item.source, item.metric) for ref in reversed(refs)
        }
    report.details[f"{item.phase}: {item.metric} on {item.source}"] = {str(ref): scores[ref] for ref in refs}
    return sorted(scores, key=lambda ref: -scores[ref])[: item.best]


def _mean_of(inputs: Sequence[Weighted], models: Mapping[ArtifactRef, ModelFiles], output: Path) -> None:
    weights = [weight for _, weight in inputs]
    average_models([models[ref] for ref, _ in inputs], weights, output, mean_pieces)


def _greedy(
    recipe: Recipe,
    registry: Registry,
    settings: GreedySoup,
    inputs: Sequence[Weighted],
    models: Mapping[ArtifactRef, ModelFiles],
    folder: Path,
) -> Soup[Weighted]:
    """Chooses the inputs by exact MaxSim over the dev source; each trial's mean is deleted after it."""
    source = load_source(recipe, settings.source)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("greedy soup: models scored", total=2 * len(inputs) - 1)

        def score(chosen: Sequence[Weighted]) -> float:
            if len(chosen) == 1:
                value = _dev_score(source, registry.pull(chosen[0][0]), settings.metric)
            else:
                with tempfile.TemporaryDirectory(dir=folder) as trial:
                    _mean_of(chosen, models, Path(trial) / "model")
                    value = _dev_score(source, Path(trial) / "model", settings.metric)
            progress.advance(task)
            return value

        return greedy_soup(inputs, score)


def _dev_score(source: LabelledSource, directory: Path, metric: str) -> float:
    """The metric of an exact search with the model in ``directory``."""
    query_ids = list(source.labelled_queries)
    scorer = VectorScorer("greedy soup", source, lambda: ColBERTEncoder(load_model(directory)))
    ranking = scorer.search(query_ids, parse_metric(metric)[1])
    found = {query: dict(hits) for query, hits in zip(query_ids, ranking, strict=True)}
    return evaluate_run(found, source.qrels, [metric])[metric]


if __name__ == "__main__":
    main("average", run)
