"""Building an index on a real local Ray: the same index by any number of workers, and after a kill."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.support.search_engine import AnonymousMemory
from cluster.artifacts import base_ref, index_ref
from cluster.config import Recipe, StorageConfig
from cluster.config.base import fingerprint
from cluster.data_files import DataFiles
from cluster.index_corpus import CHUNK_DOCUMENTS, BuildArea, corpus_state
from cluster.manifest import Manifest, Parent, parse_ref
from cluster.models import ensure_base, load_model_ref, pinned
from cluster.ray_session import ray_session
from cluster.registry import Registry
from cluster.sources import document_text
from cluster.storage import ObjectInfo
from cluster.worker_pool import WorkerPool
from colbert_core.allocator import release_freed_memory
from colbert_core.config import CodecConfig, SearchConfig
from colbert_core.errors import ArtifactNotFound, DataError
from colbert_core.index import Codec, open_index
from colbert_core.maxsim import maxsim_ragged
from colbert_core.precision import fast_precision
from jobs import index
from tests.fragile_worker import FragileWorker
from tests.processes import family
from tests.s3_server import S3Server
from tests.tiny_data import data_recipe, write_source
from tests.tiny_models import WORDS, tiny_bert_dir

DOCUMENTS = 1300
QUESTIONS = [" ".join(random.Random(seed).sample(WORDS.split(), 5)) for seed in range(30)]
# Everything is a candidate and is scored by its residuals: nothing is left to chance.
THOROUGH = SearchConfig(probes=64, candidates=DOCUMENTS, rerank=DOCUMENTS)


def corpus(count: int, seed: int = 0) -> list[dict[str, Any]]:
    words, source = WORDS.split(), random.Random(seed)
    return [
        {
            "_id": f"d{i:04d}",
            "title": f"title {i}" if i % 3 else None,
            "text": " ".join(source.choices(words, k=source.randint(4, 24))),
        }
        for i in range(count)
    ]


def add_source(root: Path, name: str, documents: list[dict[str, Any]]) -> None:
    write_source(root / name, documents, [{"_id": "q", "text": "cat"}], [("q", documents[0]["_id"], 1)])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index")
    add_source(folder, "many", corpus(DOCUMENTS))
    tiny_bert_dir(folder / "bert")
    return folder


def recipe(root: Path, store: Path | StorageConfig, source: str = "many", **settings: Any) -> Recipe:
    section = {
        "name": "i",
        "model": "base",
        "sources": [source],
        "shards": 4,
        "codec": {"centroids": 256, "sample_tokens": 15_000},
        "cpus_per_worker": 0.5,
    }
    storage = {"root": str(store)} if isinstance(store, Path) else store.model_dump(mode="json")
    return data_recipe(
        root,
        storage=storage | {"cache_dir": str(root / "cache")},
        model={
            "name": "tiny",
            "base": str(root / "bert"),
            "colbert": {"dim": 16, "document_length": 20, "query_length": 12, "query_length_rule": "fixed"},
        },
        ray={"num_cpus": 2},
        index=section | settings,
    )


@pytest.fixture(scope="module", autouse=True)
def _ray(root: Path) -> Iterator[None]:
    with ray_session(recipe(root, root / "unused")):
        yield


@pytest.fixture(scope="module")
def built(root: Path) -> Recipe:
    given = recipe(root, root / "built")
    report = index.run(given)
    assert report.artifacts == [str(index_ref(given))]
    assert report.metrics["documents"] == DOCUMENTS
    assert report.metrics["truncated_documents"] > 0
    assert report.metrics["chunks_found"] == report.metrics["shards_found"] == 0
    assert report.metrics["shards_written"] == 4
    # The codec fits what it has not seen as well as the sample that it was trained on.
    assert 12_000 < report.metrics["sample_tokens"] <= 15_000 < report.metrics["tokens"]
    assert report.metrics["centroids"] == 256
    of_sample = report.metrics["residual_norm_of_sample"]
    assert report.metrics["residual_norm"] == pytest.approx(of_sample, rel=0.05)
    assert report.metrics["residual_norm"] != of_sample
    assert 0 < report.metrics["bytes_per_token"] < 40
    assert set(report.timings) == {"workers", "documents", "encoding", "codec", "shards", "publishing"}
    return given


def published(given: Recipe) -> Manifest:
    return Registry.open(given.storage).manifest(index_ref(given))


def searched(given: Recipe, k: int = 10) -> list[list[tuple[str, float]]]:
    registry = Registry.open(given.storage)
    queries = load_model_ref(registry, base_ref(given)).encode_queries(QUESTIONS)
    searcher = open_index(registry.pull(index_ref(given)))
    hits = searcher.search([vectors.numpy() for vectors in queries], k, THOROUGH)
    return [[(hit.id, float(hit.score)) for hit in found] for found in hits]


def contents(given: Recipe) -> dict[str, str]:
    return {path: entry.sha256 for path, entry in published(given).files.items()}


def assert_alike(left: Sequence[Any], right: Sequence[Any]) -> None:
    """Same documents in the same order, but for such as score alike."""
    for mine, theirs in zip(left, right, strict=True):
        assert [score for _, score in mine] == pytest.approx([score for _, score in theirs], abs=0.02)
        scores = dict(theirs)
        for key, score in mine:
            assert scores.get(key, theirs[-1][1]) == pytest.approx(score, abs=0.02)


def test_scores_are_those_of_the_model(built: Recipe) -> None:
    """Against exact MaxSim of vectors that the model makes here, over all documents."""
    model = load_model_ref(Registry.open(built.storage), base_ref(built))
    rows = corpus(DOCUMENTS)
    vectors = model.encode_documents([document_text(row["title"], row["text"]) for row in rows])
    overlap = 0
    for query, found in zip(model.encode_queries(QUESTIONS), searched(built), strict=True):
        exact = maxsim_ragged(query, vectors)
        for key, score in found:
            assert score == pytest.approx(float(exact[int(key[1:])]), abs=0.1)
        best = {rows[i]["_id"] for i in exact.topk(len(found)).indices.tolist()}
        overlap += len(best & {key for key, _ in found})
    assert overlap > 0.9 * 10 * len(QUESTIONS)


def test_the_manifest_describes_the_index(built: Recipe) -> None:
    manifest = published(built)
    assert [parent.ref for parent in manifest.parents] == [base_ref(built)]
    assert manifest.extra["dim"] == 16
    assert manifest.extra["documents"] == DOCUMENTS
    shards: Any = manifest.extra["shards"]
    assert sum(shard["documents"] for shard in shards) == DOCUMENTS
    assert sum(shard["tokens"] for shard in shards) == manifest.extra["tokens"]
    assert min(shard["documents"] for shard in shards) > DOCUMENTS / 5
    folder = Registry.open(built.storage).pull(index_ref(built))
    codec = json.loads((folder / "codec/codec.json").read_text())
    assert manifest.extra["codec"] == codec["sha256"]
    assert manifest.data_fingerprint == DataFiles(built, ["many/corpus.parquet"]).fingerprint
    asked = corpus(DOCUMENTS)[::97]
    assert open_index(folder).records([row["_id"] for row in asked]) == {
        row["_id"]: {"title": row["title"], "text": row["text"]} for row in asked
    }
    store = Registry.open(built.storage).store
    left = [info.key for info in store.list(index_ref(built).prefix) if "/." in info.key]
    assert left == []


def test_an_index_is_built_once(built: Recipe) -> None:
    report = index.run(built)
    assert report.skipped == [str(index_ref(built))]
    assert report.artifacts == []


def test_two_workers_build_what_one_builds(built: Recipe, root: Path) -> None:
    two = recipe(root, root / "two", encode_workers=2)
    index.run(two)
    assert index_ref(two) == index_ref(built)
    assert searched(two) == searched(built)
    assert contents(two) == contents(built)


def test_pooling_leaves_one_vector_in_so_many(built: Recipe, root: Path) -> None:
    """What is indexed are the pooled vectors that the encoder makes."""
    pooled = recipe(root, root / "pooled", pool_factor=3)
    report = index.run(pooled)
    everything: Any = published(built).extra["tokens"]
    assert everything / 3 < report.metrics["tokens"] < everything / 2
    rows = corpus(DOCUMENTS)
    model = load_model_ref(Registry.open(pooled.storage), base_ref(pooled))
    texts = [document_text(row["title"], row["text"]) for row in rows]
    vectors = model.encode_documents(texts, pool_factor=3, precision=fast_precision(model.device))
    assert report.metrics["tokens"] == len(vectors.vectors)
    off = []
    for query, found in zip(model.encode_queries(QUESTIONS), searched(pooled), strict=True):
        exact = maxsim_ragged(query, vectors)
        off += [abs(score - float(exact[int(key[1:])])) for key, score in found]
    # In another batch rounding may put a token into another cluster.
    assert np.quantile(off, 0.9) < 0.1, sorted(off)[-40:]


def test_four_shards_answer_as_one(built: Recipe, root: Path) -> None:
    one = recipe(root, root / "one", shards=1)
    index.run(one)
    assert_alike(searched(one), searched(built))


def test_the_driver_holds_no_corpus(built: Recipe, root: Path) -> None:
    """48 MB of text, of which the first tokens are encoded; the driver may grow by half of that."""
    source, size = random.Random(1), 48_000
    bulky = [row | {"text": f"{row['text']} {source.randbytes(size // 2).hex()}"} for row in corpus(1000)]
    add_source(root, "bulky", bulky)
    given = recipe(root, root / "bulky store", "bulky")
    del bulky
    release_freed_memory()
    with AnonymousMemory() as before:
        pass
    with AnonymousMemory() as driver:
        report = index.run(given)
    assert report.metrics["documents"] == 1000
    growth, text = driver.peak_mb - before.peak_mb, 1000 * size / 2**20
    print(f"the driver grew by {growth:.1f} MB, for {text:.0f} MB of text")
    assert growth < text / 2


def test_typed_errors_come_through(root: Path) -> None:
    add_source(root, "twice", [*corpus(20), corpus(20)[4]])
    with pytest.raises(
        DataError, match=r"twice/corpus.parquet row 21: id 'd0004' occurs twice, first in row 5"
    ):
        index.run(recipe(root, root / "errors", "twice"))
    with pytest.raises(ArtifactNotFound, match="nothing is published under models/nobody"):
        index.run(recipe(root, root / "errors", model="nobody@production"))


@pytest.mark.parametrize("other", ["changed", "same"])
def test_a_codec_that_is_staged_already(root: Path, other: str) -> None:
    """Left by a killed build of another corpus it is made anew; that of a builder who was first stands."""
    add_source(root, other, corpus(40))
    given = recipe(root, root / other, other)
    registry = Registry.open(given.storage)
    model = ensure_base(given, registry)
    files = corpus_state(given, [f"{other}/corpus.parquet"])
    staged = registry.staging(index_ref(given))
    staged.begin(fingerprint({"model": str(model), "corpus": files if other == "same" else "gone"}))
    vectors = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    codec = Codec.train(vectors, CodecConfig(centroids=32), total_tokens=500, threads=1)
    codec.save(root / f"{other} codec")
    for name in ("codec.json", "codec.safetensors"):
        staged.upload(f"codec/{name}", root / f"{other} codec" / name)
    index.run(given)
    manifest = published(given)
    assert (manifest.extra["codec"] == codec.sha256) is (other == "same")
    assert len(searched(given)[0]) == 10


def test_few_documents_and_a_moved_alias(root: Path, s3_server: S3Server) -> None:
    """An index on S3 of fewer vectors than centroids, with an empty shard; then its alias moves on."""
    add_source(root, "few", corpus(3))
    storage = s3_server.storage()
    given = recipe(root, storage, "few")
    registry = Registry.open(given.storage)
    first = ensure_base(given, registry)
    registry.promote(first, "production")
    aliased = recipe(root, storage, "few", model="tiny@production", codec={"centroids": 4096})
    report = index.run(aliased)
    assert report.metrics["centroids"] == report.metrics["tokens"] < 100
    assert any("4096 centroids" in warning for warning in report.warnings)
    assert min(shard["documents"] for shard in report.details["shards"]) == 0
    assert {key for key, _ in searched(pinned(aliased, registry))[0]} == {"d0000", "d0001", "d0002"}
    assert index.run(aliased).skipped == report.artifacts
    second = ensure_base(given.model_copy(update={"seed": 43}), registry)
    assert second != first
    registry.promote(second, "production")
    (rebuilt,) = index.run(aliased).artifacts
    assert rebuilt not in report.artifacts
    parents = [registry.manifest(parse_ref(ref)).parents for ref in (*report.artifacts, rebuilt)]
    assert parents == [(Parent(first),), (Parent(second),)]
    add_source(root, "few", corpus(4))
    with pytest.raises(DataError, match=rf"few/corpus.parquet: .*, since {rebuilt} was made of it"):
        index.run(aliased)


BUILD = (
    "import sys; from cluster.config import Recipe; from jobs import index; "
    "index.run(Recipe.model_validate_json(sys.argv[1]))"
)


def build_and_kill(given: Recipe, when: Callable[[], bool]) -> None:
    """Builds in a process of its own, and kills that as soon as something is so; waits for its workers."""
    with subprocess.Popen([sys.executable, "-c", BUILD, given.model_dump_json()]) as process:
        while not when():
            assert process.poll() is None
            time.sleep(0.002)
        started = family(process.pid)
        process.kill()
    # Its workers end with it, and write nothing more.
    workers = [child for child in started if named(child, "IndexWorker")]
    assert workers
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    assert not Registry.open(given.storage).exists(index_ref(given))


def test_a_build_killed_while_it_encodes_encodes_the_rest(root: Path) -> None:
    """At a random one of a shard's 16 chunks."""
    add_source(root, "long", corpus(16 * CHUNK_DOCUMENTS))
    whole, given = (recipe(root, root / name, "long", shards=1) for name in ("whole", "cut off"))
    index.run(whole)
    area = BuildArea(Registry.open(given.storage).store, index_ref(given))
    some = random.SystemRandom().randint(1, 10)
    print(f"killed after {some} chunks")
    build_and_kill(given, lambda: len(area.encoded()) >= some)
    finished = len(area.encoded())
    assert some <= finished < 16
    report = index.run(given)
    assert report.metrics["chunks_found"] == finished
    assert report.metrics["chunks_encoded"] == 16 - finished
    assert contents(given) == contents(whole)


def test_a_killed_build_goes_on(built: Recipe, root: Path) -> None:
    """The process is killed as soon as the first of four shards is staged."""
    given = recipe(root, root / "killed")
    area = BuildArea(Registry.open(given.storage).store, index_ref(given))
    build_and_kill(given, lambda: any(area.store.exists(area.shard_key(shard)) for shard in range(4)))
    finished = [shard for shard in range(4) if area.store.exists(area.shard_key(shard))]
    assert 0 < len(finished) < 4
    kept = ["codec", *(f"shards/{shard:05d}" for shard in finished)]
    before = stored(given, kept)
    assert len(before) > 10
    report = index.run(given)
    assert report.metrics["chunks_encoded"] == 0
    assert report.metrics["codec_found"] == 1
    assert report.metrics["shards_found"] == len(finished)
    assert report.metrics["shards_written"] == 4 - len(finished)
    assert stored(given, kept) == before
    assert contents(given) == contents(built)


def named(process: psutil.Process, name: str) -> bool:
    try:
        return name in " ".join(process.cmdline())
    except psutil.Error:
        return False


def stored(given: Recipe, folders: Sequence[str]) -> list[ObjectInfo]:
    """The objects of an index below some folders; equal when nobody has written them again."""
    store, prefix = Registry.open(given.storage).store, index_ref(given).prefix
    return [info for folder in folders for info in store.list(f"{prefix}files/{folder}/")]


def test_a_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    with WorkerPool(FragileWorker, (tmp_path / "mark",), size=2, cpus=0.5, gpus=0) as pool:
        assert pool.run("double", range(10), "doubling") == [2 * number for number in range(10)]
    assert (tmp_path / "mark").exists()
