"""Search and rerank end to end without Ray: real model, real index, real groups called in this process."""

from __future__ import annotations

import asyncio
import gc
import shutil
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pytest

from cluster.artifacts import ArtifactRef
from cluster.config import ServeConfig, StorageConfig
from cluster.manifest import Parent
from cluster.registry import Registry
from colbert_core.config import SearchConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import ArtifactNotFound, IndexFormatError, IntegrityError, SearchError
from colbert_core.index import Searcher, add_documents, delete_documents, open_index
from colbert_core.maxsim import maxsim_ragged
from serving import service
from serving.errors import ShardsUnavailable, UnknownDocument
from serving.metrics import Metrics
from serving.protocol import GroupQuery, ReplicaState, RerankRequest, SearchRequest
from serving.router import GroupFailed, Router
from serving.service import SearchService
from serving.shard_group import ShardGroup
from serving.shards import open_group, shard_paths
from serving.versions import VersionKeeper, load_served
from tests.tiny_index import Document, publish_tiny_index, publish_tiny_model
from tests.tiny_models import WORDS

Answer = TypeVar("Answer")
MODEL = ArtifactRef("models", "tiny", "one")
INDEX = ArtifactRef("indexes", "news", "v1")
SHARDS = 5
VOCABULARY = WORDS.split()
QUERIES = ["the cat and the dog", "a fast train to tokyo", "blue music", "search the index"]
TIGHT = SearchConfig(probes=1, candidates=9, rerank=4)

DOCUMENTS = [
    Document(
        id=f"d{number:03d}",
        text=" ".join(
            VOCABULARY[(number * 7 + step * (1 + number % 5)) % len(VOCABULARY)] for step in range(6)
        ),
        title=f"title {number}" if number % 2 else None,
        topic=("animals", "travel", "music")[number % 3],
    )
    for number in range(80)
]


class LocalGroup(ShardGroup):
    """A shard group in this process, as a front sees one."""

    def __init__(self, registry: Registry, number: int, groups: int) -> None:
        self.name = f"shards-{number}"
        self.broken = False

        def open_version(version: str) -> Any:
            return open_group(registry, ArtifactRef("indexes", "news", version), number, groups, 2)

        super().__init__("only", open_version, threads=2, idle_s=60.0)

    async def search(self, query: GroupQuery) -> Any:
        if self.broken:
            raise GroupFailed("RuntimeError: broken for the test")
        return await super().search(query)

    async def sync(self, wanted: Sequence[str]) -> Any:
        state: ReplicaState = await super().sync(wanted)
        return [state]


@dataclass
class World:
    """A store with one index, its model, and a searcher over all its shards."""

    registry: Registry
    model: ColBERT
    searcher: Searcher

    def vectors(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [vectors.numpy() for vectors in self.model.encode_queries(list(texts))]

    def run(
        self,
        call: Callable[[SearchService], Awaitable[Answer]],
        *,
        groups: int = 2,
        version: str = "v1",
        broken: Sequence[int] = (),
        **settings: Any,
    ) -> Answer:
        """Starts a service with so many groups and makes one call."""
        ref = ArtifactRef("indexes", "news", version)

        async def scenario() -> Answer:
            metrics = Metrics()
            members = [LocalGroup(self.registry, number, groups) for number in range(groups)]
            versions = VersionKeeper(
                lambda: ref,
                lambda target: load_served(self.registry, target),
                members,
                metrics,
                poll_s=60.0,
                grace_s=0.0,
            )
            service = SearchService(
                ServeConfig(**settings), versions, Router(members, 30.0, metrics), metrics
            )
            await versions.start(patience_s=30.0)
            for number in broken:
                members[number].broken = True
            try:
                return await call(service)
            finally:
                versions.close()
                service.close()
                for member in members:
                    member.close()

        return asyncio.run(scenario())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder: Path = tmp_path_factory.mktemp("service")
    registry = Registry.open(StorageConfig(root=str(folder / "store"), cache_dir=str(folder / "cache")))
    model = publish_tiny_model(registry, MODEL)
    publish_tiny_index(registry, INDEX, model, MODEL, DOCUMENTS, shards=SHARDS)
    return World(registry, model, open_index(registry.pull(INDEX)))


@pytest.mark.parametrize("groups", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("settings", [SearchConfig(), TIGHT])
def test_any_number_of_groups_answers_as_one_searcher_does(
    world: World, groups: int, settings: SearchConfig
) -> None:
    request = SearchRequest(queries=QUERIES, k=7, search=settings)
    response = world.run(lambda service: service.search(request), groups=groups)
    expected = world.searcher.search(world.vectors(QUERIES), 7, settings)
    found = [[(result.id, result.score) for result in results] for results in response.results]
    assert found == [[(hit.id, hit.score) for hit in hits] for hits in expected]
    assert (response.shards.ok, response.shards.total) == (SHARDS, SHARDS)


def test_the_service_has_its_own_default_settings(world: World) -> None:
    request = SearchRequest(query=QUERIES[0], k=4)
    response = world.run(lambda service: service.search(request), search=TIGHT)
    (expected,) = world.searcher.search(world.vectors(QUERIES[:1]), 4, TIGHT)
    assert [result.id for result in response.results[0]] == [hit.id for hit in expected]


def test_k_beyond_the_index_returns_every_document_once(world: World) -> None:
    request = SearchRequest(query="cat", k=500)
    (results,) = world.run(lambda service: service.search(request)).results
    assert sorted(result.id for result in results) == [document.id for document in DOCUMENTS]


def test_a_filter_that_empties_some_groups_is_answered_by_the_others(world: World) -> None:
    for tree, expected in (
        ({"$ids": ["d000", "d005"]}, {"d000", "d005"}),
        ({"topic": "cooking"}, set()),
        ({"$ids": []}, set()),
    ):
        request = SearchRequest(query="cat", filter=tree)
        (results,) = world.run(lambda service, r=request: service.search(r), groups=5).results
        assert {result.id for result in results} == expected


def test_a_broken_group_fails_the_request_or_is_named_in_it(world: World) -> None:
    with pytest.raises(ShardsUnavailable, match=r"shards-1 \(shards \[1, 3\]\): RuntimeError: broken"):
        world.run(lambda service: service.search(SearchRequest(query="cat")), broken=[1])
    request = SearchRequest(query="cat", k=80, allow_partial=True)
    response = world.run(lambda service: service.search(request), broken=[1])
    assert (response.shards.ok, response.shards.total) == (3, 5)
    assert response.shards.failed[0].shards == [1, 3]
    there = {document.id for number, document in enumerate(DOCUMENTS) if number % SHARDS in (0, 2, 4)}
    assert {result.id for result in response.results[0]} == there


@pytest.mark.parametrize(
    ("request_", "part"),
    [
        (SearchRequest(query="a", k=11), "k: 11 is given, at most 10"),
        (SearchRequest(queries=["a", "b", "c"]), "queries: 3 are given, at most 2"),
        (SearchRequest(queries=["a", "x" * 31]), r"queries\.1: 31 characters, at most 30"),
        (SearchRequest(query="a", filter={"colour": "red"}), "colour"),
        (SearchRequest(query="a", search=SearchConfig(probes=9)), r"search\.probes: 9 is given, at most 8"),
        (SearchRequest(query="a", search=SearchConfig(probes=1, rerank=99)), r"search\.rerank: 99 is given"),
    ],
)
def test_limits_are_told_by_key(world: World, request_: SearchRequest, part: str) -> None:
    limits = {"max_k": 10, "max_queries": 2, "max_text_length": 30, "max_probes": 8, "max_rerank": 9}
    limits["max_candidates"] = 3000
    with pytest.raises(SearchError, match=part):
        world.run(lambda service: service.search(request_), **limits)


def test_documents_are_reranked_in_batches_in_the_order_of_their_scores(world: World) -> None:
    texts = [document.text for document in DOCUMENTS[:11]]
    request = RerankRequest(query=QUERIES[0], documents=texts)
    response = world.run(lambda service: service.rerank(request), max_batch=4)
    query = world.vectors(QUERIES[:1])[0]
    exact = [
        float((query @ vectors.numpy().T).max(axis=1).sum())
        for vectors in world.model.encode_documents(texts)
    ]
    expected = sorted(range(11), key=lambda number: (-exact[number], number))
    assert [result.index for result in response.results] == expected
    assert [result.score for result in response.results] == [
        pytest.approx(exact[number], abs=1e-4) for number in expected
    ]


def test_equal_documents_keep_the_order_of_the_request(world: World) -> None:
    request = RerankRequest(query="cat", documents=["dog", "cat", "dog", "cat"])
    response = world.run(lambda service: service.rerank(request))
    order = [result.index for result in response.results]
    assert order in ([1, 3, 0, 2], [0, 2, 1, 3])


def test_documents_of_the_index_are_scored_wherever_they_are(world: World) -> None:
    ids = ["d007", "d003", "d007", "d041"]
    response = world.run(
        lambda service: service.rerank(RerankRequest(query=QUERIES[1], document_ids=ids)), groups=3
    )
    scores = world.searcher.score_documents(world.vectors([QUERIES[1]])[0], ids).tolist()
    assert sorted((r.index, r.id, r.score) for r in response.results) == [
        (number, ids[number], scores[number]) for number in range(4)
    ]
    assert [r.score for r in response.results] == sorted(scores, reverse=True)
    with pytest.raises(UnknownDocument, match=r"'nobody' \(1 of 2\)"):
        world.run(lambda service: service.rerank(RerankRequest(query="a", document_ids=["d001", "nobody"])))


def test_an_index_with_deltas_and_deletions_is_served_as_it_is_opened(world: World, tmp_path: Path) -> None:
    local = tmp_path / "index"
    shutil.copytree(world.registry.pull(INDEX), local)
    for path in (local, *local.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    added = world.model.encode_documents(["cat dog cat dog", "blue music paper"])
    columns = {"title": [None, "new"], "text": ["cat", "music"], "topic": ["animals", "music"]}
    metadata = pa.table(columns, schema=pa.schema([(name, pa.string()) for name in columns]))
    add_documents(local, ["new-1", "new-2"], added.vectors.numpy(), added.lengths.numpy(), metadata)
    delete_documents(local, ["d000", "d001"])
    world.registry.publish(ArtifactRef("indexes", "news", "v2"), local, parents=[Parent(MODEL)])
    assert len(shard_paths(world.registry, ArtifactRef("indexes", "news", "v2"))) == SHARDS + 1
    request = SearchRequest(queries=QUERIES, k=100)
    response = world.run(lambda service: service.search(request), version="v2", groups=4)
    expected = open_index(local).search(world.vectors(QUERIES), 100)
    found = [[(result.id, result.score) for result in results] for results in response.results]
    assert found == [[(hit.id, hit.score) for hit in hits] for hits in expected]
    ids = {key for key, _ in found[0]}
    assert {"new-1", "new-2"} <= ids and not {"d000", "d001"} & ids


def test_a_group_pulls_its_own_shards_and_no_others(world: World, tmp_path: Path) -> None:
    registry = Registry.open(StorageConfig(root=world.registry.store.uri, cache_dir=str(tmp_path / "cache")))
    open_group(registry, INDEX, 1, 2, 1)
    pulled = {path.parent.name for path in (tmp_path / "cache").rglob("artifacts/**/shards/*/ids")}
    assert pulled == {"00001", "00003"}


def test_what_is_no_index_is_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    world.registry.publish(ArtifactRef("indexes", "news", "empty"), tmp_path, parents=[Parent(MODEL)])
    world.registry.publish(ArtifactRef("indexes", "news", "orphan"), tmp_path)
    with pytest.raises(IndexFormatError, match="no shards"):
        load_served(world.registry, ArtifactRef("indexes", "news", "empty"))
    with pytest.raises(IndexFormatError, match="names 0 models"):
        load_served(world.registry, ArtifactRef("indexes", "news", "orphan"))
    with pytest.raises(ArtifactNotFound):
        open_group(world.registry, ArtifactRef("indexes", "news", "nowhere"), 0, 1, 1)


def test_a_damaged_file_keeps_a_group_from_opening(world: World, tmp_path: Path) -> None:
    registry = Registry.open(StorageConfig(root=str(tmp_path / "store"), cache_dir=str(tmp_path / "cache")))
    registry.publish(INDEX, world.registry.pull(INDEX), parents=[Parent(MODEL)])
    (damaged,) = (tmp_path / "store").rglob("shards/00001/ids")
    damaged.chmod(0o644)
    damaged.write_bytes(b"x" + damaged.read_bytes()[1:])
    open_group(registry, INDEX, 0, 2, 1)
    with pytest.raises(IntegrityError, match="shards/00001/ids"):
        open_group(registry, INDEX, 1, 2, 1)


def test_versions_that_were_let_go_make_room_in_the_cache(tmp_path: Path) -> None:
    storage = StorageConfig(root=str(tmp_path / "store"), cache_dir=str(tmp_path / "cache"))
    registry = Registry.open(storage)
    publish_tiny_index(registry, INDEX, publish_tiny_model(registry, MODEL), MODEL, DOCUMENTS[:20])
    shards, served = open_group(registry, INDEX, 0, 1, 1), load_served(registry, INDEX)
    assert registry.cache.evict(room=10**12) == []
    del shards
    (directory,) = registry.cache.evict(room=10**12)
    assert directory.parent.name == INDEX.name
    del served
    gc.collect()
    (directory,) = registry.cache.evict(room=10**12)
    assert directory.parent.name == MODEL.name


def test_a_rerank_is_computed_beside_other_requests(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread())
        return maxsim_ragged(*arguments)

    monkeypatch.setattr(service, "maxsim_ragged", noted)
    request = RerankRequest(query="cat", documents=["the cat", "tokyo"])
    world.run(lambda service: service.rerank(request))
    assert threads and threading.main_thread() not in threads
