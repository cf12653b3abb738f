"""`raycolbert serve` on a real local Ray: one service for the whole file, two shards in a local store."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pyarrow.compute as pc
import pytest
import ray
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from cluster.artifacts import ArtifactRef
from cluster.config import Recipe, StorageConfig, parse_recipe
from cluster.ray_session import ray_session
from cluster.registry import Registry
from colbert_core.config import SearchConfig
from colbert_core.encoder import ColBERT
from colbert_core.errors import ArtifactNotFound, ConfigError
from colbert_core.index import Searcher, open_index
from colbert_core.maxsim import maxsim_ragged
from serving.app import deploy
from tests.ports import free_ports
from tests.processes import family, kill
from tests.tiny_index import Document, publish_tiny_index, publish_tiny_model
from tests.tiny_models import WORDS

KEY = "key-of-the-serving-tests"
DEADLINE_MS = 1500
GRACE_S = 3.0
START_SECONDS = 240
STOP_SECONDS = 60
VOCABULARY = WORDS.split()
QUERIES = ["the cat and the dog", "a fast train to tokyo", "blue music", "search the index"]


def corpus(version: str) -> list[Document]:
    """60 documents; no id is in two versions, so an answer's ids tell where they come from."""
    return [
        Document(
            id=f"{version}-{number:02d}",
            text=" ".join(
                VOCABULARY[(number * 7 + step * (1 + number % 5)) % len(VOCABULARY)] for step in range(6)
            ),
            title=f"title {number}" if number % 2 else None,
            topic=("animals", "travel", "music")[number % 3],
        )
        for number in range(60)
    ]


@dataclass
class Service:
    """A running service and what it was made from."""

    url: str
    recipe: Recipe
    registry: Registry
    model: ColBERT
    client: httpx.Client
    process: subprocess.Popen[bytes]

    def post(self, route: str = "/v1/search", **body: Any) -> httpx.Response:
        return self.client.post(f"{self.url}{route}", json=body)

    def health(self) -> httpx.Response:
        return self.client.get(f"{self.url}/healthz")

    def metric(self, name: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        text = self.client.get(f"{self.url}/metrics").text
        return sum(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def searcher(self, version: str = "v1") -> Searcher:
        """All shards of a version, opened in this process."""
        return open_index(self.registry.pull(index(version)))

    def until(self, condition: Any, seconds: float = 60.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.health().text
            time.sleep(0.05)


def index(version: str) -> ArtifactRef:
    return ArtifactRef("indexes", "news", version)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder: Path = tmp_path_factory.mktemp("serving")
    storage = StorageConfig(root=str(folder / "store"), cache_dir=str(folder / "cache"))
    registry = Registry.open(storage)
    model_ref = ArtifactRef("models", "tiny", "one")
    model = publish_tiny_model(registry, model_ref)
    for version in ("v1", "v2"):
        publish_tiny_index(registry, index(version), model, model_ref, corpus(version))
    registry.promote(index("v1"), "production")
    recipe = parse_recipe(
        {
            "name": "served",
            "storage": storage.model_dump(),
            "ray": {"num_cpus": 4, "object_store_mb": 100},
            "model": {"name": "tiny", "base": "unused"},
            "serve": {
                "index": "news@production",
                "port": 0,
                "groups": 2,
                "cpus_per_front": 0.5,
                "cpus_per_group": 0.5,
                "deadline_ms": DEADLINE_MS,
                "poll_alias_s": 0.5,
                "grace_s": GRACE_S,
                "max_k": 50,
                "max_queries": 4,
                "max_documents": 8,
                "max_text_length": 200,
                "max_body_kb": 16,
                "api_keys_env": "RAYCOLBERT_TEST_KEYS",
            },
        }
    )
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    environment = {**os.environ, "RAYCOLBERT_TEST_KEYS": f"another-key,{KEY}", "COLUMNS": "200"}
    output = folder / "serve.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [Path(sys.executable).parent / "raycolbert", "serve", "recipe.yaml"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    started: list[psutil.Process] = []
    try:
        end = time.monotonic() + START_SECONDS
        while (found := re.search(r"served at (http://[\d.:]+)", output.read_text())) is None:
            assert process.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.1)
        started = family(process.pid)
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(headers=headers, timeout=60.0) as client:
            yield Service(found[1], recipe, registry, model, client, process)
        process.terminate()
        assert process.wait(STOP_SECONDS) == 0, output.read_text()
        assert "time: total" in output.read_text(), "the job ends with its report"
        assert not psutil.wait_procs(started, STOP_SECONDS)[1], "no process of the service is left"
    finally:
        kill([*started, *family(process.pid)])
        process.wait(STOP_SECONDS)


def vectors_of(service: Service, texts: list[str]) -> list[Any]:
    return [vectors.numpy() for vectors in service.model.encode_queries(texts)]


def check_error(response: httpx.Response, status: int, kind: str, part: str = "") -> None:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["type"] == kind and part in error["message"], error
    assert "Traceback" not in response.text


def test_search_over_groups_equals_one_searcher_over_all_shards(service: Service) -> None:
    for settings in (SearchConfig(), SearchConfig(probes=2, candidates=12, rerank=5)):
        expected = service.searcher().search(vectors_of(service, QUERIES), 10, settings)
        body = service.post(queries=QUERIES, k=10, search=settings.model_dump()).json()
        for found, hits in zip(body["results"], expected, strict=True):
            assert [result["id"] for result in found] == [hit.id for hit in hits]
            assert [result["score"] for result in found] == [
                pytest.approx(hit.score, abs=1e-6) for hit in hits
            ]
    assert (body["index"], body["version"]) == ("news", "v1")
    assert body["shards"] == {"ok": 2, "total": 2, "failed": []}
    assert {"encode", "search", "merge", "total"} <= set(body["timings_ms"])


def test_results_carry_texts_and_metadata_as_asked_for(service: Service) -> None:
    documents = {document.id: document for document in corpus("v1")}
    for include in ([], ["text"], ["metadata"], ["text", "metadata"]):
        (found,) = service.post(query="cat", k=20, include=include).json()["results"]
        for result in found:
            document = documents[result["id"]]
            assert result.get("text") == (document.text if "text" in include else None)
            assert result.get("title") == (document.title if "text" in include else None)
            assert result.get("metadata") == ({"topic": document.topic} if "metadata" in include else None)


def test_filters_select_and_an_empty_selection_finds_nothing(service: Service) -> None:
    topic_of = {document.id: document.topic for document in corpus("v1")}
    (found,) = service.post(query="cat", k=50, filter={"topic": "music"}).json()["results"]
    assert found and {topic_of[result["id"]] for result in found} == {"music"}
    expected = service.searcher().search(
        vectors_of(service, ["cat"]), 50, SearchConfig(), filter=pc.field("topic") == "music"
    )
    assert [result["id"] for result in found] == [hit.id for hit in expected[0]]
    assert service.post(query="cat", filter={"topic": "cooking"}).json()["results"] == [[]]
    check_error(service.post(query="cat", filter={"colour": "red"}), 400, "SearchError", "colour")


def test_every_kind_of_bad_request_is_told(service: Service) -> None:
    check_error(service.post(query="a", k=51), 400, "SearchError", "at most 50")
    check_error(service.post(queries=["a"] * 5), 400, "SearchError", "at most 4")
    check_error(service.post(query="x" * 201), 400, "SearchError", "201 characters")
    check_error(service.post(query="a", top=3), 400, "InvalidRequest", "top")
    check_error(service.post(query="x" * 20_000), 413, "BodyTooLarge")
    check_error(service.post(query="a", index_version="v9"), 404, "VersionNotServed", "v1")
    check_error(service.client.get(f"{service.url}/nothing"), 404, "NotFound")
    check_error(service.client.get(f"{service.url}/v1/search"), 405, "MethodNotAllowed")
    broken = service.client.post(
        f"{service.url}/v1/search", content=b"{", headers={"content-type": "application/json"}
    )
    check_error(broken, 400, "InvalidRequest")


def test_only_the_keys_of_the_environment_open(service: Service) -> None:
    body = {"query": "a"}
    for headers in ({}, {"X-API-Key": "wrong"}, {"Authorization": f"Bearer {KEY}x"}):
        check_error(httpx.post(f"{service.url}/v1/search", json=body, headers=headers), 401, "Unauthorized")
    for headers in ({"X-API-Key": "another-key"}, {"Authorization": f"Bearer {KEY}"}):
        assert httpx.post(f"{service.url}/v1/search", json=body, headers=headers).status_code == 200
    assert "検索" in httpx.get(f"{service.url}/").text


def test_rerank_scores_texts_exactly_and_documents_from_the_index(service: Service) -> None:
    query, texts = "the cat and the dog", ["slow river", "the dog", "cat dog", "red paper music"]
    body = service.post("/v1/rerank", query=query, documents=texts, k=3).json()
    scores = maxsim_ragged(
        torch.from_numpy(vectors_of(service, [query])[0]), service.model.encode_documents(texts)
    ).tolist()
    expected = sorted(range(len(texts)), key=lambda i: -scores[i])[:3]
    assert [result["index"] for result in body["results"]] == expected
    assert [result["score"] for result in body["results"]] == [
        pytest.approx(scores[i], abs=1e-4) for i in expected
    ]
    ids = ["v1-03", "v1-04", "v1-11", "v1-59"]
    body = service.post("/v1/rerank", query=query, document_ids=ids).json()
    direct = service.searcher().score_documents(vectors_of(service, [query])[0], ids)
    by_id = {result["id"]: result["score"] for result in body["results"]}
    assert by_id == {
        key: pytest.approx(float(score), abs=1e-6) for key, score in zip(ids, direct, strict=True)
    }
    assert [result["score"] for result in body["results"]] == sorted(by_id.values(), reverse=True)
    check_error(
        service.post("/v1/rerank", query=query, document_ids=["v1-01", "v2-01"]),
        404,
        "UnknownDocument",
        "v2-01",
    )
    check_error(service.post("/v1/rerank", query=query, documents=["a"] * 9), 400, "SearchError", "at most 8")
    check_error(service.post("/v1/rerank", query=query), 400, "InvalidRequest", "exactly one")


def test_a_version_swap_under_load_fails_no_request_and_mixes_no_answer(service: Service) -> None:
    stop = threading.Event()

    def hammer(worker: int) -> list[tuple[int, str, set[str]]]:
        seen = []
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(headers=headers, timeout=60.0) as client:
            while not stop.is_set():
                response = client.post(
                    f"{service.url}/v1/search", json={"queries": QUERIES[worker % 4 :], "k": 10}
                )
                body = response.json()
                ids = [result["id"] for found in body.get("results", []) for result in found]
                seen.append((response.status_code, body.get("version", ""), {key[:2] for key in ids}))
        return seen

    with ThreadPoolExecutor(4) as pool:
        workers = [pool.submit(hammer, number) for number in range(4)]
        time.sleep(1.0)
        begin = time.monotonic()
        service.registry.promote(index("v2"), "production")
        service.until(lambda: service.health().json()["version"] == "v2")
        swapped = time.monotonic() - begin
        assert service.post(query="cat", index_version="v1").json()["version"] == "v1"
        time.sleep(1.0)
        stop.set()
        answers = [answer for worker in workers for answer in worker.result()]
    assert Counter(status for status, _, _ in answers) == {200: len(answers)}
    assert all(ids == {version} for _, version, ids in answers), "an answer mixes versions"
    assert {version for _, version, _ in answers} == {"v1", "v2"}
    assert swapped < 30.0
    assert service.metric("raycolbert_version_swaps_total") == 1
    service.until(lambda: service.post(query="cat", index_version="v1").status_code == 404, GRACE_S + 20)


def test_a_version_that_cannot_be_loaded_leaves_the_one_that_answers(service: Service) -> None:
    model_ref = ArtifactRef("models", "tiny", "one")
    publish_tiny_index(service.registry, index("v3"), service.model, model_ref, corpus("v3"))
    # The ids differ from those of other versions, so that no copy of this file is in the cache.
    stored = Path(service.recipe.storage.root) / "indexes" / "news" / "v3"
    (damaged,) = stored.rglob("shards/00001/ids")
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    service.registry.promote(index("v3"), "production")
    service.until(lambda: service.health().json()["problem"])
    health = service.health()
    assert health.status_code == 200 and health.json()["version"] == "v2"
    assert "shards-1" in health.json()["problem"] and "IntegrityError" in health.json()["problem"]
    assert service.post(query="cat").json()["version"] == "v2"
    service.registry.rollback("indexes", "news", "production")
    service.until(lambda: service.health().json()["problem"] is None)


def test_a_killed_group_is_named_or_fails_the_request_and_comes_back(service: Service) -> None:
    (replica,) = [
        child
        for child in family(service.process.pid)
        if "ServeReplica:raycolbert:shards-1" in " ".join(child.cmdline())
    ]
    replica.kill()
    begin = time.monotonic()
    partial = service.post(query="cat", k=60 - 10, allow_partial=True)
    assert partial.status_code == 200, partial.text
    assert time.monotonic() - begin < DEADLINE_MS / 1000 + 5
    body = partial.json()
    assert (body["shards"]["ok"], body["shards"]["total"]) == (1, 2)
    (failed,) = body["shards"]["failed"]
    assert (failed["group"], failed["shards"]) == ("shards-1", [1])
    even = {document.id for document in corpus("v2")[::2]}
    assert {result["id"] for result in body["results"][0]} <= even, "only shard 0 was there to answer"
    refused = service.post(query="cat")
    assert refused.status_code in (503, 504)
    check_error(refused, refused.status_code, refused.json()["error"]["type"], "shards-1")
    assert service.health().status_code == 503
    service.until(lambda: service.health().status_code == 200, 90)
    assert service.post(query="cat").json()["shards"] == {"ok": 2, "total": 2, "failed": []}
    assert service.metric("raycolbert_shard_failures_total", group="shards-1") >= 2


def test_metrics_tell_what_the_tests_above_did(service: Service) -> None:
    assert service.metric("raycolbert_requests_total", route="/v1/search", status="200") > 20
    assert service.metric("raycolbert_requests_total", route="/v1/search", status="401") >= 3
    assert service.metric("raycolbert_requests_total", route="/v1/search", status="413") >= 1
    assert service.metric("raycolbert_request_seconds_count", route="/v1/rerank") >= 5
    sizes = service.metric("raycolbert_batch_texts_sum") / service.metric("raycolbert_batch_texts_count")
    assert sizes > 1.0, "requests that wait at the same time must be encoded together"
    assert service.metric("raycolbert_index_version", version="v2") == 1
    assert service.metric("raycolbert_group_seconds_count", group="shards-0") > 20


def test_what_cannot_be_served_is_refused_before_anything_starts(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAYCOLBERT_TEST_KEYS", raising=False)

    def changed(**section: Any) -> Recipe:
        assert service.recipe.serve is not None
        return service.recipe.model_copy(update={"serve": service.recipe.serve.model_copy(update=section)})

    with pytest.raises(ArtifactNotFound, match="news@staging"):
        deploy(changed(index="news@staging"))
    with pytest.raises(ConfigError, match="only 2 shards"):
        deploy(changed(groups=3))
    with pytest.raises(ConfigError, match="RAYCOLBERT_TEST_KEYS"):
        deploy(service.recipe)
    assert not ray.is_initialized()
    assert service.health().status_code == 200


def test_a_serve_that_listens_elsewhere_is_named(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCOLBERT_TEST_KEYS", KEY)
    recipe = service.recipe
    assert recipe.serve is not None
    port, asked = free_ports(2)
    elsewhere = recipe.model_copy(update={"serve": recipe.serve.model_copy(update={"port": asked})})
    with ray_session(recipe):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            with pytest.raises(ConfigError, match=f"listens on 127.0.0.1:{port}"):
                deploy(elsewhere)
            assert not serve.status().applications
        finally:
            serve.shutdown()
