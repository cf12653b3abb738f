"""Mines hard negatives: candidates for every tuple set of the recipe that asks for them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

from cluster.artifacts import candidates_ref
from cluster.config import Mining, Recipe, fingerprint
from cluster.data_files import MODELS_KEY, DataFiles, check_same_files, scorer_files, source_files
from cluster.mining import MinedTuples, candidate_rows, mine
from cluster.models import pinned
from cluster.parts import PART_ROWS, upload_parts
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from cluster.scorers import Scorer, build_scorer
from cluster.scorers.distributed import DistributedScorer, ScorerWorkers
from cluster.sources import load_source
from jobs.launch import main

SMALLEST_PART_ROWS = 64
PARTS_OF_A_SMALL_SET = 16


def run(recipe: Recipe) -> Report:
    """Publishes ``data/<recipe>-<tuples>-candidates`` for each tuple set with ``mine``.

    Raises:
        DataError: a source is malformed, too small for the tuples asked for, or was changed since
            published candidates were mined in it, as may a scorer's model.
        ConfigError: a pool's scorer cannot search.
    """
    report = Report(job="mine_negatives", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    for name, tuple_set in recipe.data.tuples.items():
        if tuple_set.mine is None:
            continue
        ref = candidates_ref(recipe, name)
        if registry.exists(ref):
            check_same_files(recipe, registry, ref, source_files(recipe, tuple_set.mine.source))
            report.skipped.append(str(ref))
            continue
        _mine(recipe, name, tuple_set.mine, registry, report)
        report.artifacts.append(str(ref))
    return report


def _mine(recipe: Recipe, name: str, config: Mining, registry: Registry, report: Report) -> None:
    ref = candidates_ref(recipe, name)
    staged = registry.staging(ref)
    with report.timed(f"{name}: source"):
        names = list(dict.fromkeys(pool.scorer for pool in config.pools))
        data = DataFiles(recipe, source_files(recipe, config.source))
        models = DataFiles(recipe, scorer_files(recipe, names))
        staged.begin(fingerprint(data.fingerprint, models.fingerprint))
        source = load_source(recipe, config.source)
    with report.timed(f"{name}: mining"), ExitStack() as stack:
        scorers: dict[str, Scorer]
        if config.in_process:
            scorers = {scorer: build_scorer(recipe, scorer, source, registry) for scorer in names}
        else:
            stack.enter_context(ray_session(recipe))
            workers = stack.enter_context(
                ScorerWorkers(recipe, source, config.workers, config.cpus_per_worker, config.gpus_per_worker)
            )
            scorers = {scorer: DistributedScorer(scorer, workers) for scorer in names}
        mined = mine(source, config, scorers)
        statistics = {scorer: scorers[scorer].statistics() for scorer in names}
    with report.timed(f"{name}: writing"):
        counts = upload_parts(
            staged, candidate_rows(source, mined), scored=False, rows_per_part=_rows_per_part(mined)
        )
    metrics = {key: float(value) for key, value in asdict(mined.counts).items()}
    for scorer, found in statistics.items():
        metrics.update({f"{scorer}/{key}": value for key, value in found.items()})
    staged.commit(
        expected=list(counts),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=data.fingerprint,
        metrics=metrics,
        extra={
            "rows": counts,
            "nway": mined.documents.shape[1],
            **data.record(),
            **models.record(MODELS_KEY),
        },
    )
    report.metrics.update({f"{name}/{key}": value for key, value in metrics.items()})


def _rows_per_part(mined: MinedTuples) -> int:
    """Parts small enough that several scorer actors share even a small set evenly."""
    return min(PART_ROWS, max(SMALLEST_PART_ROWS, -(-len(mined.query_ids) // PARTS_OF_A_SMALL_SET)))


if __name__ == "__main__":
    main("mine_negatives", run)
