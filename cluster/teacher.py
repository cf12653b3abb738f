"""The teacher at work: candidates in, scored tuples out, part by part, in this process or over actors."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray.data
import torch

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe, Scoring
from cluster.parts import read_part, write_part
from cluster.progress import progress
from cluster.registry import Registry, StagedArtifact
from cluster.scorers import Candidates, Scorer, build_ensemble, minmax
from cluster.scorers.vectors import share_cache
from cluster.sources import load_source
from cluster.tuples import Row, check_row
from colbert_core import errors
from colbert_core.errors import ObjectNotFound, RaycolbertError

# Scorers that know more of a source's documents and queries than their texts.
_OF_A_SOURCE = {"bm25", "labels"}


@dataclass
class TeacherCounts:
    """What the teacher thinks of the positives.

    Attributes:
        tuples: tuples counted.
        documents: documents in them.
        positive_first: tuples whose first document, the positive, no other one outscores.
        no_opinion: tuples whose documents all have the same score.
        scorers: counts of the scorers, such as truncated texts.
    """

    tuples: int = 0
    documents: int = 0
    positive_first: int = 0
    no_opinion: int = 0
    scorers: dict[str, float] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        scores = row["scores"]
        self.tuples += 1
        self.documents += len(scores)
        self.positive_first += scores[0] >= max(scores)
        self.no_opinion += min(scores) == max(scores)

    def merge(self, other: TeacherCounts) -> None:
        for item in fields(self):
            if item.name != "scorers":
                setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))
        for key, value in other.scorers.items():
            self.scorers[key] = self.scorers.get(key, 0.0) + value

    def metrics(self) -> dict[str, float]:
        """Flat figures for a report."""
        return {
            "tuples": float(self.tuples),
            "documents": float(self.documents),
            "positive_first": self.positive_first / self.tuples if self.tuples else 0.0,
            "no_opinion": self.no_opinion / self.tuples if self.tuples else 0.0,
            **self.scorers,
        }


def counted(rows: Iterable[Row], counts: TeacherCounts) -> Iterator[Row]:
    """Passes rows on and counts them."""
    for row in rows:
        counts.add(row)
        yield row


def score_parts(
    recipe: Recipe,
    tuples: str,
    scoring: Scoring,
    candidates: ArtifactRef,
    paths: Sequence[str],
    staged: StagedArtifact,
) -> TeacherCounts:
    """Scores the parts of published candidates that are not uploaded yet.

    A part is scored by one worker and uploaded under the same name.

    Returns:
        The counts of all parts, those of an earlier, killed job included.
    """
    done = staged.parts()
    missing = [path for path in paths if path not in done]
    if missing:
        scorer = PartScorer(recipe, tuples, scoring, candidates, staged)
        scored = map(scorer.score, missing) if scoring.in_process else _by_actors(scorer, missing)
        with progress() as bar:
            task = bar.add_task(
                f"{tuples}: parts scored", total=len(paths), completed=len(paths) - len(missing)
            )
            for _ in scored:
                bar.advance(task)
    total = TeacherCounts()
    store = staged.store
    for path in paths:
        key = _counts_key(staged.ref, path)
        try:
            total.merge(TeacherCounts(**json.loads(store.get(key))))
        except ObjectNotFound:
            continue
    return total


def _by_actors(scorer: PartScorer, paths: Sequence[str]) -> Iterator[Any]:
    """Scores parts over a pool of Ray Data actors; needs a running Ray."""
    # The job shows its own bar, in parts; Ray Data's log of blocks says nothing to its user.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    scoring = scorer.scoring
    results = dataset.map_batches(
        _ScoringActor,
        fn_constructor_args=(scorer,),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=min(scoring.workers, len(paths))),
        num_cpus=scoring.cpus_per_worker,
        num_gpus=scoring.gpus_per_worker,
    )
    for row in results.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"], RaycolbertError)(row["message"])
        yield row


class _ScoringActor:
    """An actor that scores parts."""

    def __init__(self, scorer: PartScorer) -> None:
        torch.set_num_threads(max(1, int(scorer.scoring.cpus_per_worker)))
        share_cache(scorer.scoring.workers)
        self._scorer = scorer

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Scores the parts in ``path``; a typed error is told by class name and message.

        Raised here, it would arrive at the driver as Ray's own error with a page of traceback.
        """
        paths = [str(path) for path in batch["path"]]
        try:
            for path in paths:
                self._scorer.score(path)
        except RaycolbertError as error:
            name, message = type(error).__name__, str(error)
        else:
            name, message = "", ""
        return {"path": paths, "error": [name] * len(paths), "message": [message] * len(paths)}


class PartScorer:
    """Scores parts; it builds its scorers once, with the first part."""

    def __init__(
        self,
        recipe: Recipe,
        tuples: str,
        scoring: Scoring,
        candidates: ArtifactRef,
        staged: StagedArtifact,
    ) -> None:
        self.scoring = scoring
        self._recipe = recipe
        self._tuples = tuples
        self._candidates = candidates
        self._staged = staged

    @cached_property
    def _registry(self) -> Registry:
        return Registry.open(self._recipe.storage)

    @cached_property
    def _scorer(self) -> Scorer:
        mining = self._recipe.data.tuples[self._tuples].mine
        kinds = {self._recipe.scorers[name].kind for name in self.scoring.scorers}
        # The others need only the texts that the parts hold, and each worker would hold the corpus.
        source = load_source(self._recipe, mining.source) if mining and kinds & _OF_A_SOURCE else None
        return build_ensemble(self._recipe, self._tuples, self.scoring.scorers, source, self._registry)

    def score(self, path: str) -> None:
        """Scores the part of this name and uploads it."""
        counts = TeacherCounts()
        before = self._scorer.statistics()
        # All at once: a document that several queries ask for is encoded once, and batches are even.
        rows = self._scored(read_part(self._registry, self._candidates, path), path)
        for row in rows:
            counts.add(row)
        after = self._scorer.statistics()
        counts.scorers = {key: value - before.get(key, 0.0) for key, value in after.items()}
        # The counts go first: a part that is recorded as uploaded has its counts.
        self._staged.store.put(_counts_key(self._staged.ref, path), json.dumps(asdict(counts)).encode())
        with tempfile.TemporaryDirectory(prefix="raycolbert-teacher-") as folder:
            local = Path(folder) / path
            write_part(local, rows, scored=True)
            self._staged.upload(path, local)

    def _scored(self, rows: list[Row], path: str) -> list[Row]:
        scores = self._scorer.score_candidates(
            Candidates(
                [row["query_id"] for row in rows],
                [row["query"] for row in rows],
                [row["document_ids"] for row in rows],
                [row["documents"] for row in rows],
            )
        )
        found = []
        for number, (row, values) in enumerate(zip(rows, scores, strict=True), start=1):
            final = minmax(values) if self.scoring.normalize else values
            scored = row | {"scores": np.asarray(final, dtype=np.float32).tolist()}
            found.append(check_row(scored, f"{self._candidates} {path} row {number}"))
        return found


def _counts_key(ref: ArtifactRef, path: str) -> str:
    return f"scoring/{ref.name}/{ref.version}/{path}.json"
