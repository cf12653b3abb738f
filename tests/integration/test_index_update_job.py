"""Documents added to a published index by Ray workers: found at once, kept by compaction, safe from kills."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster.artifacts import ArtifactRef, base_ref, index_ref
from cluster.config import Recipe
from cluster.index_corpus import BuildArea
from cluster.manifest import Parent, parse_ref
from cluster.models import load_model_ref
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.sources import document_text
from colbert_core.config import SearchConfig
from colbert_core.index import merge_hits, open_index
from colbert_core.maxsim import maxsim_ragged
from jobs import compact_index, index, update_index
from serving.protocol import GroupQuery
from serving.shards import open_group
from serving.versions import load_served
from tests.processes import family
from tests.tiny_data import data_recipe, write_source
from tests.tiny_models import WORDS, tiny_bert_dir

DOCUMENTS, ADDED = 240, 80
QUESTIONS = [" ".join(random.Random(seed).sample(WORDS.split(), 5)) for seed in range(20)]
THOROUGH = SearchConfig(probes=64, candidates=1000, rerank=1000)


def rows(first: int, last: int, seed: int) -> list[dict[str, Any]]:
    words, source = WORDS.split(), random.Random(seed)
    return [
        {
            "_id": f"d{i:04d}",
            "title": f"title {i}" if i % 3 else None,
            "text": " ".join(source.choices(words, k=source.randint(4, 24))),
        }
        for i in range(first, last)
    ]


OLD = rows(0, DOCUMENTS, 0)
# The first 30 are new texts of documents that are there.
NEW = rows(DOCUMENTS - 30, DOCUMENTS - 30 + ADDED, 1)
GONE = [row["_id"] for row in OLD[:25]]
AFTER = {row["_id"]: row for row in [*OLD[25:], *NEW]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("update")
    write_source(folder / "old", OLD, [{"_id": "q", "text": "cat"}], [("q", "d0000", 1)])
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in NEW), encoding="utf-8")
    (folder / "gone.txt").write_text("\n".join(GONE) + "\n", encoding="utf-8")
    tiny_bert_dir(folder / "bert")
    return folder


def recipe(root: Path, store: str) -> Recipe:
    return data_recipe(
        root,
        storage={"root": str(root / store), "cache_dir": str(root / "cache")},
        model={
            "name": "tiny",
            "base": str(root / "bert"),
            "colbert": {"dim": 16, "document_length": 20, "query_length": 12, "query_length_rule": "fixed"},
        },
        ray={"num_cpus": 2},
        index={
            "name": "i",
            "model": "base",
            "sources": ["old"],
            "shards": 2,
            "codec": {"centroids": 128},
            "cpus_per_worker": 0.5,
        },
    )


@pytest.fixture(scope="module", autouse=True)
def _ray(root: Path) -> Iterator[None]:
    with ray_session(recipe(root, "unused")):
        yield


@pytest.fixture(scope="module")
def built(root: Path) -> Recipe:
    given = recipe(root, "store")
    index.run(given)
    registry = Registry.open(given.storage)
    registry.promote(index_ref(given), "production")
    shutil.copytree(root / "store", root / "killed")
    return given


CHANGE = {"add": "new.jsonl", "delete": "gone.txt", "replace": True}


@pytest.fixture(scope="module")
def updated(built: Recipe) -> str:
    report = update_index.run(built, **CHANGE, promote=True)
    assert report.metrics["added"] == ADDED - 30
    assert report.metrics["replaced"] == 30
    assert report.metrics["deleted"] == len(GONE)
    assert report.metrics["documents"] == len(AFTER)
    assert report.metrics["chunks_encoded"] == 1
    assert report.metrics["truncated_documents"] > 0
    # New words of the same kind fit about as well, and that is what is told.
    of_sample = report.metrics["residual_norm_of_sample"]
    assert report.metrics["drift_added"] == pytest.approx(
        report.metrics["residual_norm_added"] / of_sample, rel=1e-6
    )
    assert 0.8 < report.metrics["drift_added"] < 1.6
    (version,) = report.artifacts
    return version


def test_added_documents_are_found_and_deleted_ones_are_not(built: Recipe, updated: str) -> None:
    """Against exact MaxSim of vectors that the model makes here, over the documents there should be."""
    registry = Registry.open(built.storage)
    model = load_model_ref(registry, base_ref(built))
    ids = sorted(AFTER)
    vectors = model.encode_documents([document_text(AFTER[i]["title"], AFTER[i]["text"]) for i in ids])
    searcher = open_index(registry.pull(parse_ref(updated)), verify="full")
    assert len(searcher) == len(ids)
    queries = model.encode_queries(QUESTIONS)
    answers = searcher.search([query.numpy() for query in queries], 10, THOROUGH)
    overlap = 0
    for query, found in zip(queries, answers, strict=True):
        exact = maxsim_ragged(query, vectors)
        for hit in found:
            assert hit.score == pytest.approx(float(exact[ids.index(hit.id)]), abs=0.15)
        overlap += len({ids[i] for i in exact.topk(10).indices.tolist()} & {hit.id for hit in found})
    assert overlap > 0.85 * 10 * len(QUESTIONS)
    assert searcher.records(sorted(AFTER)) == {
        key: {"title": row["title"], "text": row["text"]} for key, row in AFTER.items()
    }
    searcher.close()


def test_the_alias_leads_the_service_to_it(built: Recipe, updated: str) -> None:
    """As a front and two groups open it: their answers, merged, are the whole index's."""
    registry = Registry.open(built.storage)
    ref = registry.resolve("indexes", "i@production")
    assert str(ref) == updated
    assert registry.manifest(ref).parents == (Parent(index_ref(built)), Parent(base_ref(built)))
    served = load_served(registry, ref)
    assert served.shards == 3
    queries = served.encode_queries(QUESTIONS)
    lengths = np.array([len(query) for query in queries])
    asked = GroupQuery(ref.version, np.concatenate(queries), lengths, 10, SearchConfig(rerank=20))
    parts = [open_group(registry, ref, number, 2, 1).search(asked).hits for number in range(2)]
    searcher = open_index(registry.pull(ref))
    whole = searcher.search(queries, 10, SearchConfig(rerank=20))
    assert [merge_hits(each) for each in zip(*parts, strict=True)] == whole
    searcher.close()


def test_repeated_and_compacted(built: Recipe, updated: str) -> None:
    assert update_index.run(built, **CHANGE).skipped == [updated]
    registry = Registry.open(built.storage)
    (compacted,) = compact_index.run(built).artifacts
    assert not any(path.startswith("deltas") for path in registry.manifest(parse_ref(compacted)).files)
    queries = load_model_ref(registry, base_ref(built)).encode_queries(QUESTIONS)
    found = []
    for version in (updated, compacted):
        searcher = open_index(registry.pull(parse_ref(version)))
        found.append(searcher.search([query.numpy() for query in queries], 20, SearchConfig(probes=4)))
        searcher.close()
    assert found[0] == found[1]


def test_killed_updates_go_on(built: Recipe, updated: str, root: Path) -> None:
    """In a copy of the storage: killed when the vectors are there, and once more at a random moment."""
    given = recipe(root, "killed")
    registry = Registry.open(given.storage)
    source, ref = index_ref(given), parse_ref(updated)
    area = BuildArea(registry.store, ref)
    script = "import sys, json; from cluster.config import Recipe; from jobs import update_index; " + (
        "update_index.run(Recipe.model_validate_json(sys.argv[1]), **json.loads(sys.argv[2]))"
    )
    arguments = [sys.executable, "-c", script, given.model_dump_json(), json.dumps(CHANGE)]
    with subprocess.Popen(arguments) as process:
        while not area.encoded():
            assert process.poll() is None
            time.sleep(0.005)
        kill(process)
    assert not registry.exists(ref)
    with subprocess.Popen(arguments) as process:
        time.sleep(8 * random.random())
        kill(process)
    assert registry.verify(source) == []
    report = update_index.run(given, **CHANGE)
    assert report.metrics.get("chunks_encoded", 0) == 0
    assert registry.verify(ref) == []
    assert contents(registry, ref) == contents(Registry.open(built.storage), ref)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kills a job, and waits for its Ray workers, which end with it."""
    started = family(process.pid)
    process.kill()
    psutil.wait_procs(started, timeout=60)


def contents(registry: Registry, ref: ArtifactRef) -> dict[str, str]:
    return {path: entry.sha256 for path, entry in registry.manifest(ref).files.items()}
