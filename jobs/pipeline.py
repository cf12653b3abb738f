"""All jobs in order: from labelled text to a served, trained retriever.

Every stage is the job of the same name and skips what exists already, so a pipeline that was stopped
goes on where it was. Promotion is gated: the candidate becomes ``production`` only if it is not worse
than its start on the gate's questions.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from cluster.artifacts import index_ref, model_ref
from cluster.config import Recipe
from cluster.evaluation import evaluate_model
from cluster.models import pinned, resolve_model, start_of
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.report import Report, memory_of_session_mb
from colbert_core.allocator import release_freed_memory
from colbert_core.errors import ConfigError, RaycolbertError
from jobs import average, evaluate, index, mine_negatives, score_teacher, train
from jobs.html_report import write_report
from jobs.launch import main
from jobs.serve import refuse_second_service, serving_session
from serving.args import api_keys, recipe_args

PRODUCTION = "production"
MEMORY_SAMPLE_SECONDS = 2.0
MEMORY_SAMPLE_SHARE = 0.02  # of a core, at most: reading the pages of a dozen large processes takes time
REQUEST_TIMEOUT_SECONDS = 60.0
ANSWERS = 3

console = Console(stderr=True)  # the report alone goes to standard output, where --json is read


def run(recipe: Recipe, report: Path | None = None) -> Report:
    """Runs every section that the recipe has.

    Args:
        recipe: the recipe.
        report: folder for ``report.html`` and ``report.json``; None writes neither.

    Returns:
        The pipeline's report: the stages' metrics, seconds by stage, peak memory, and under
        ``details`` the score tables, the loss curve and the answers over HTTP.
    """
    whole = Report(job="pipeline", recipe=recipe.name)
    # Before the first stage, for the last one may move an alias that the recipe names.
    recipe = pinned(recipe, Registry.open(recipe.storage))
    _check(recipe)
    with _peak_memory(whole), ray_session(recipe):
        if recipe.serve is not None and recipe.serve.questions:
            refuse_second_service()
        for name, job in _stages(recipe):
            console.rule(f"[bold]{name}")
            with whole.timed(name):
                stage: Report = job.run(recipe)
            release_freed_memory()  # the next stage's worker processes need it
            stage.print(console)
            _merge(whole, name, stage)
        if recipe.index is not None:
            recipe = _promote(recipe, whole)
        if recipe.serve is not None and recipe.serve.questions:
            console.rule("[bold]serve")
            try:
                with whole.timed("serve"):
                    whole.details["answers"] = _ask(recipe)
                _print_answers(whole.details["answers"])
            except BaseException:
                _write(whole, report)  # what hours have made is told even if the last minute fails
                raise
    _write(whole, report)
    return whole


def _check(recipe: Recipe) -> None:
    """Refuses before any stage what the last ones would look for in vain.

    Raises:
        ConfigError: a model is 'averaged', but nothing is averaged; or the service could not start: its keys
            are not set, it names no index, or it has more groups than the recipe's index has shards.
    """
    if recipe.serve is not None and recipe.serve.questions:
        api_keys(recipe.serve)
        recipe_args(recipe)
        shards = recipe.index.shards if recipe.index and recipe.serve.index is None else None
        if shards is not None and recipe.serve.groups > shards:
            raise ConfigError(f"serve.groups: {recipe.serve.groups}, but index.shards is {shards}")
    systems = recipe.evaluate.systems.values() if recipe.evaluate else ()
    for spec in [recipe.index.model if recipe.index else None, *(system.model for system in systems)]:
        if spec is not None and "@" not in spec:
            model_ref(recipe, spec)


def _write(whole: Report, report: Path | None) -> None:
    if report is not None:
        for path in write_report(whole, report):
            console.print(f"written: {path}")


def _stages(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """The jobs that this recipe asks for, in order."""
    sets = recipe.data.tuples.values()
    if any(tuple_set.mine for tuple_set in sets):
        yield "mine_negatives", mine_negatives
    if sets:
        yield "score_teacher", score_teacher
    if recipe.train:
        yield "train", train
    if recipe.average:
        yield "average", average
    if recipe.index:
        yield "index", index
    if recipe.evaluate:
        yield "evaluate", evaluate


def _merge(whole: Report, name: str, stage: Report) -> None:
    whole.metrics.update({f"{name}/{key}": value for key, value in stage.metrics.items()})
    whole.artifacts += stage.artifacts
    whole.skipped += stage.skipped
    whole.warnings += stage.warnings
    whole.details[name] = stage.details | {"timings": stage.timings}


def _promote(recipe: Recipe, whole: Report) -> Recipe:
    """Moves ``production`` to the candidate's model and index, or to its start's if that is better.

    Returns:
        The recipe whose index is the promoted one, which is what is served.
    """
    assert recipe.index is not None
    registry = Registry.open(recipe.storage)
    candidate = resolve_model(recipe, registry, recipe.index.model)
    gate = recipe.evaluate.gate if recipe.evaluate else None
    if gate is not None:
        began = start_of(recipe, recipe.index.model)
        start = resolve_model(recipe, registry, began)
        with whole.timed("gate"):
            before = evaluate_model(recipe, registry, start, gate.source, gate.metric)
            after = evaluate_model(recipe, registry, candidate, gate.source, gate.metric)
        whole.metrics[f"gate/{gate.source}/{gate.metric}/start"] = before
        whole.metrics[f"gate/{gate.source}/{gate.metric}/candidate"] = after
        if after < before - gate.tolerance:
            whole.warnings.append(
                f"not promoted: {candidate} has {gate.metric} {after:.4f} on {gate.source!r}, "
                f"its start has {before:.4f}; the start is served instead"
            )
            candidate = start
            recipe = recipe.model_copy(update={"index": recipe.index.model_copy(update={"model": began})})
            with whole.timed("index of the start"):
                _merge(whole, "index of the start", index.run(recipe))
    for ref in (candidate, index_ref(recipe)):
        registry.promote(ref, PRODUCTION)
        console.print(f"{PRODUCTION} → {ref}")
    whole.details["production"] = {"model": str(candidate), "index": str(index_ref(recipe))}
    return recipe


def _ask(recipe: Recipe) -> list[dict[str, Any]]:
    """Serves the promoted index and asks the recipe's questions over HTTP."""
    assert recipe.serve is not None
    answers, k = [], min(ANSWERS, recipe.serve.max_k)
    keys = api_keys(recipe.serve)
    headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
    with (
        serving_session(recipe) as url,
        httpx.Client(headers=headers, timeout=REQUEST_TIMEOUT_SECONDS) as client,
    ):
        for question in recipe.serve.questions:
            try:
                response = client.post(f"{url}/v1/search", json={"query": question, "k": k})
            except httpx.HTTPError as error:
                raise RaycolbertError(f"{url}/v1/search: no answer to {question!r}: {error!r}") from None
            if response.status_code != httpx.codes.OK:
                raise RaycolbertError(f"{url}/v1/search answered {response.status_code}: {response.text}")
            body = response.json()
            answers.append({"question": question, "hits": body["results"][0], "shards": body["shards"]})
    return answers


def _print_answers(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        console.print(f"\n{answer['question']}", style="bold", markup=False)
        for rank, hit in enumerate(answer["hits"], start=1):
            text = f"  {rank}. {hit['score']:6.2f}  {hit['id']}  {hit.get('text') or ''}"
            console.print(text, highlight=False, markup=False)


@contextmanager
def _peak_memory(report: Report) -> Iterator[None]:
    """Samples the memory of this process and its children; the peak goes into the metrics."""
    done = threading.Event()
    peak = memory_of_session_mb()

    def sample() -> None:
        nonlocal peak
        pause = MEMORY_SAMPLE_SECONDS
        while not done.wait(pause):
            begin = time.thread_time()
            peak = max(peak, memory_of_session_mb())
            pause = max(MEMORY_SAMPLE_SECONDS, (time.thread_time() - begin) / MEMORY_SAMPLE_SHARE)

    thread = threading.Thread(target=sample, name="memory-sampler", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        report.metrics["peak_memory_mb"] = round(peak, 1)


if __name__ == "__main__":
    main("pipeline", run)
