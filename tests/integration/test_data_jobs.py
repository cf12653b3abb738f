"""Mining and teacher scoring over real Ray actors and real S3: what a killed job leaves is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from cluster.artifacts import ArtifactRef, candidates_ref, tuples_ref
from cluster.config import Recipe
from cluster.data_files import DataFiles, scorer_files
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.scorers import Candidates, build_ensemble, build_scorer, minmax
from cluster.scorers.distributed import DistributedScorer, ScorerWorkers
from cluster.sources import load_source
from cluster.streams import TrainingTuple, TupleIndex
from cluster.teacher import score_parts
from colbert_core.errors import ArtifactNotFound, ModelError
from jobs import mine_negatives, score_teacher
from tests.s3_server import S3Server
from tests.tiny_data import data_recipe, word_source
from tests.tiny_models import tiny_bert_dir, tiny_cross_encoder_dir

NWAY = 6
QUERIES = 300


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    word_source(folder / "words", documents=60, queries=QUERIES)
    tiny_cross_encoder_dir(folder / "cross")
    tiny_bert_dir(folder / "bert")
    pq.write_table(
        pa.table(
            {
                "query": ["cat dog", "blue music", "fast train"],
                "documents": [["cat", "dog river"], ["music", "red paper"], ["slow train", "fast"]],
                "scores": [[0.9, 0.1], [0.8, 0.2], [1.0, -1.0]],
            }
        ),
        folder / "released.parquet",
    )
    return folder


@pytest.fixture(scope="module")
def storage(s3_server: S3Server, root: Path) -> dict[str, Any]:
    settings = s3_server.storage().model_dump(mode="json")
    return settings | {"cache_dir": str(root / "cache")}


def recipe(root: Path, storage: dict[str, Any], name: str = "test", **tuples: Any) -> Recipe:
    mined = {
        "mine": {
            "source": "words",
            "pools": [
                {"scorer": "bm25", "ranks": [1, 20], "take": NWAY - 3},
                {"scorer": "states", "ranks": [1, 20], "take": 2},
            ],
            "group_size": 4,
            "workers": 2,
            "cpus_per_worker": 0.5,
        },
        "score": {"scorers": {"cross": 2.0, "bm25": 1.0}, "workers": 2, "cpus_per_worker": 0.5},
    }
    return data_recipe(
        root,
        name=name,
        storage=storage,
        ray={"num_cpus": 2},
        scorers={
            "bm25": {"kind": "bm25", "tokenizer": "whitespace"},
            "cross": {"kind": "cross_encoder", "model": str(root / "cross")},
            "states": {"kind": "token_maxsim", "model": str(root / "bert")},
            "broken": {"kind": "cross_encoder", "model": str(root / "bert")},
        },
        data={"tuples": tuples or {"mined": mined}},
    )


@pytest.fixture(scope="module", autouse=True)
def _ray(root: Path, storage: dict[str, Any]) -> Iterator[None]:
    with ray_session(recipe(root, storage)):
        yield


def published(registry: Registry, ref: ArtifactRef) -> list[TrainingTuple]:
    rows = registry.manifest(ref).extra["rows"]
    assert isinstance(rows, dict)
    folder = registry.pull(ref)
    index = TupleIndex([str(folder / path) for path in rows])
    assert index.tuples == sum(int(str(count)) for count in rows.values())
    return index.read(0, index.tuples, 2 if index.tuples == 3 else NWAY)


def test_mined_tuples_are_scored_once_and_resumed(root: Path, storage: dict[str, Any]) -> None:
    given = recipe(root, storage)
    registry = Registry.open(given.storage)
    with pytest.raises(ArtifactNotFound, match="run mine_negatives first"):
        score_teacher.run(given)
    mining = mine_negatives.run(given)
    assert mining.metrics["mined/tuples"] == QUERIES
    candidates, ref = candidates_ref(given, "mined"), tuples_ref(given, "mined")
    paths = list(registry.manifest(candidates).files)
    assert len(paths) > 3

    # A job that was killed after two parts.
    scoring = given.data.tuples["mined"].score
    assert scoring is not None
    staged = registry.staging(ref)
    staged.begin(DataFiles(given, scorer_files(given, scoring.scorers)).fingerprint)
    alone = scoring.model_copy(update={"workers": 1})
    score_parts(given, "mined", alone, candidates, paths[:2], staged)
    before = {path: registry.store.head(f"{ref.prefix}files/{path}") for path in paths[:2]}
    assert not registry.exists(ref)
    report = score_teacher.run(given)
    assert {path: registry.store.head(f"{ref.prefix}files/{path}") for path in paths[:2]} == before

    manifest = registry.manifest(ref)
    assert [str(parent.ref) for parent in manifest.parents] == [str(candidates)]
    assert list(manifest.files) == paths
    source_files = registry.manifest(candidates).extra["data_files"]
    assert isinstance(source_files, dict)
    assert sorted(source_files) == ["words/corpus.parquet", "words/qrels.tsv", "words/queries.parquet"]
    assert manifest.data_fingerprint == registry.manifest(candidates).data_fingerprint
    assert report.metrics["mined/tuples"] == QUERIES
    assert report.metrics["mined/documents"] == QUERIES * NWAY
    tuples = published(registry, ref)
    agree = np.mean([t.scores[0] == t.scores.max() for t in tuples])
    assert report.metrics["mined/positive_first"] == pytest.approx(agree)
    source = load_source(given, "words")
    teacher = build_ensemble(given, "mined", scoring.scorers, source, registry)
    by_text = {text: document for document, text in source.corpus.items()}
    for item in tuples[:: QUERIES // 10]:
        ids = [by_text[text] for text in item.documents]
        assert ids[0] in source.qrels[item.label]
        expected = minmax(teacher.score([item.label], [ids])[0])
        # Batches of another size round differently.
        np.testing.assert_allclose(item.scores, expected, atol=0.05)

    assert mine_negatives.run(given).skipped == [str(candidates)]
    assert score_teacher.run(given).skipped == [str(ref)]


def test_released_tuples_keep_their_scores_or_get_new_ones(root: Path, storage: dict[str, Any]) -> None:
    files = {"format": "tuples", "tuples": "released.parquet"}
    again = {"read": files, "score": {"scorers": {"states": 1.0}, "normalize": False}}
    given = recipe(root, storage, kept={"read": files}, again=again)
    report = score_teacher.run(given)
    registry = Registry.open(given.storage)
    kept = published(registry, tuples_ref(given, "kept"))
    assert [t.scores.tolist() for t in kept] == [
        pytest.approx(row) for row in ([0.9, 0.1], [0.8, 0.2], [1.0, -1.0])
    ]
    assert report.metrics["kept/positive_first"] == 1.0
    scored = published(registry, tuples_ref(given, "again"))
    assert [t.documents for t in scored] == [t.documents for t in kept]
    scorer = build_scorer(given, "states", None, registry)
    query, documents = scored[0].query, scored[0].documents
    expected = scorer.checked(Candidates(["q"], [query], [["0", "1"]], [documents]))[0]
    np.testing.assert_allclose(scored[0].scores, expected, rtol=0.02)


def test_an_error_in_an_actor_arrives_as_it_was_raised(root: Path, storage: dict[str, Any]) -> None:
    files = {"format": "tuples", "tuples": "released.parquet"}
    given = recipe(root, storage, bad={"read": files, "score": {"scorers": {"broken": 1.0}}})
    with pytest.raises(ModelError, match="there are no weights for classifier"):
        score_teacher.run(given)


def test_workers_find_what_one_process_finds(root: Path, storage: dict[str, Any]) -> None:
    given = recipe(root, storage)
    registry = Registry.open(given.storage)
    source = load_source(given, "words")
    with ScorerWorkers(given, source, 2, 0.5, 0.0) as workers:
        queries, ids = list(source.queries)[:50], list(source.corpus)
        for name in ("bm25", "states"):
            alone, shared = build_scorer(given, name, source, registry), DistributedScorer(name, workers)
            expected, found = alone.search(queries, 10), shared.search(queries, 10)
            np.testing.assert_allclose(found.scores, expected.scores, rtol=0.01)
            if name == "bm25":
                assert list(found) == list(expected)
            rows = [ids[i : i + 3] for i in range(50)]
            for left, right in zip(alone.score(queries, rows), shared.score(queries, rows), strict=True):
                np.testing.assert_allclose(left, right, rtol=0.01)
        # A worker that dies is replaced, and its share of the work done again.
        before = DistributedScorer("bm25", workers).search(queries, 10)
        ray.kill(workers.actors[0])
        assert list(DistributedScorer("bm25", workers).search(queries, 10)) == list(before)
        with pytest.raises(ModelError, match="there are no weights for classifier") as raised:
            DistributedScorer("broken", workers).score(queries[:1], [ids[:1]])
        assert type(raised.value) is ModelError
