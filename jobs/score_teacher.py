"""Scores candidates with the teacher, or brings an existing training set into native form."""

from __future__ import annotations

from contextlib import nullcontext

from cluster.artifacts import ArtifactRef, candidates_ref, tuples_ref
from cluster.config import Recipe, Scoring, TupleFiles, TupleSet
from cluster.data_files import (
    MODELS_KEY,
    DataFiles,
    check_same_files,
    scorer_files,
    source_files,
    tuple_files,
)
from cluster.manifest import Parent
from cluster.models import pinned
from cluster.parts import upload_parts
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report
from cluster.teacher import TeacherCounts, counted, score_parts
from cluster.tuples import read_tuples
from colbert_core.errors import ArtifactNotFound
from jobs.launch import main


def run(recipe: Recipe) -> Report:
    """Publishes ``data/<recipe>-<tuples>`` for each tuple set.

    Mined candidates are scored by the ensemble of ``score``. Files under ``read`` are taken with the
    scores they have, or scored again if the set has ``score``.

    Raises:
        ArtifactNotFound: a set's candidates are not mined yet.
        DataError: files are malformed, or were changed since published tuples were made of them.
        ConfigError: a scorer needs a labelled source, which files do not have.
    """
    report = Report(job="score_teacher", recipe=recipe.name)
    registry = Registry.open(recipe.storage)
    recipe = pinned(recipe, registry)
    for name, tuple_set in recipe.data.tuples.items():
        ref = tuples_ref(recipe, name)
        _check_files(recipe, name, tuple_set, registry)
        if registry.exists(ref):
            report.skipped.append(str(ref))
            continue
        if tuple_set.read is not None and tuple_set.score is None:
            _convert(recipe, name, tuple_set.read, registry, report)
        else:
            assert tuple_set.score is not None  # a mined set has one, the config says
            if tuple_set.read is not None:
                _candidates_from_files(recipe, name, tuple_set.read, registry, report)
            _score(recipe, name, tuple_set.score, registry, report)
        report.artifacts.append(str(ref))
    return report


def _check_files(recipe: Recipe, name: str, tuple_set: TupleSet, registry: Registry) -> None:
    """Refuses published tuples and candidates of files that hold something else now."""
    if tuple_set.read is not None:
        files = tuple_set.read
        patterns = [pattern for pattern in (files.tuples, files.queries, files.documents) if pattern]
    else:
        assert tuple_set.mine is not None  # a tuple set has exactly one origin
        patterns = source_files(recipe, tuple_set.mine.source)
    for ref in (candidates_ref(recipe, name), tuples_ref(recipe, name)):
        if registry.exists(ref):
            check_same_files(recipe, registry, ref, patterns)


def _convert(recipe: Recipe, name: str, files: TupleFiles, registry: Registry, report: Report) -> None:
    """Publishes tuples with the scores that their files hold."""
    ref, counts = tuples_ref(recipe, name), TeacherCounts()
    staged = registry.staging(ref)
    with report.timed(f"{name}: reading"):
        data = DataFiles(recipe, tuple_files(recipe, files))
        staged.begin(data.fingerprint)
        rows = upload_parts(staged, counted(read_tuples(recipe, files), counts), scored=True)
    metrics = counts.metrics()
    staged.commit(
        expected=list(rows),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=data.fingerprint,
        metrics=metrics,
        extra={"rows": rows, **data.record()},
    )
    report.metrics.update({f"{name}/{key}": value for key, value in metrics.items()})


def _candidates_from_files(
    recipe: Recipe, name: str, files: TupleFiles, registry: Registry, report: Report
) -> None:
    """Publishes the tuples of files as candidates, if they are not yet."""
    ref = candidates_ref(recipe, name)
    if registry.exists(ref):
        report.skipped.append(str(ref))
        return
    staged = registry.staging(ref)
    with report.timed(f"{name}: reading"):
        data = DataFiles(recipe, tuple_files(recipe, files))
        staged.begin(data.fingerprint)
        rows = upload_parts(staged, read_tuples(recipe, files), scored=False)
    staged.commit(
        expected=list(rows),
        recipe=recipe.model_dump(mode="json"),
        fingerprint=data.fingerprint,
        extra={"rows": rows, **data.record()},
    )
    report.artifacts.append(str(ref))


def _score(recipe: Recipe, name: str, scoring: Scoring, registry: Registry, report: Report) -> None:
    ref, candidates = tuples_ref(recipe, name), candidates_ref(recipe, name)
    rows = _published_rows(registry, candidates, name)
    models = DataFiles(recipe, scorer_files(recipe, scoring.scorers))
    staged = registry.staging(ref)
    staged.begin(models.fingerprint)
    with report.timed(f"{name}: scoring"), nullcontext() if scoring.in_process else ray_session(recipe):
        counts = score_parts(recipe, name, scoring, candidates, list(rows), staged)
    metrics = counts.metrics()
    staged.commit(
        expected=list(rows),
        parents=[Parent(candidates)],
        recipe=recipe.model_dump(mode="json"),
        fingerprint=registry.manifest(candidates).data_fingerprint,
        metrics=metrics,
        extra={"rows": rows, **models.record(MODELS_KEY)},
    )
    report.metrics.update({f"{name}/{key}": value for key, value in metrics.items()})


def _published_rows(registry: Registry, candidates: ArtifactRef, name: str) -> dict[str, int]:
    """Rows by part of published candidates."""
    if not registry.exists(candidates):
        raise ArtifactNotFound(f"data.tuples.{name}: {candidates} does not exist; run mine_negatives first")
    rows = registry.manifest(candidates).extra["rows"]
    assert isinstance(rows, dict)
    return {path: int(str(count)) for path, count in rows.items()}


if __name__ == "__main__":
    main("score_teacher", run)
