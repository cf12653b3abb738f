"""The HTTP face: every error is JSON with a type, a message and the right status; limits; keys; metrics."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config import ServeConfig
from colbert_core.errors import ArtifactNotFound, IndexFormatError, NonFiniteError, SearchError, StorageError
from serving.errors import DeadlineExceeded, NotReady, ShardsUnavailable, UnknownDocument
from serving.gateway import build_gateway
from serving.metrics import Metrics, merge_expositions
from serving.protocol import (
    GroupHealth,
    Health,
    RankedText,
    RerankRequest,
    RerankResponse,
    Result,
    SearchRequest,
    SearchResponse,
    ShardReport,
)
from serving.service import SearchService

SHARDS = ShardReport(ok=2, total=2)


class Service:
    """Answers each query with itself; raises what the test says."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.status = "ok"
        self.gate: asyncio.Event | None = None

    async def search(self, request: SearchRequest) -> SearchResponse:
        if self.gate:
            await self.gate.wait()
        if self.error:
            raise self.error
        results = [[Result(id=text, score=1.0)] for text in request.texts]
        return SearchResponse(results=results, index="i", version="v", shards=SHARDS, timings_ms={})

    async def rerank(self, request: RerankRequest) -> RerankResponse:
        ranked = [RankedText(index=0, score=1.0)]
        return RerankResponse(results=ranked, index="i", version="v", shards=SHARDS, timings_ms={})

    async def health(self) -> Health:
        groups = [GroupHealth(name="shards-0", replicas=1, ready=int(self.status == "ok"))]
        return Health.model_validate({"status": self.status, "index": "i", "version": "v", "groups": groups})


class Gateway:
    """A gateway and a way to call it."""

    def __init__(self, *keys: str, **limits: Any) -> None:
        self.service = Service()
        self.metrics = Metrics()

        async def scrape() -> str:
            return merge_expositions({"replica-1": self.metrics.exposition()})

        self.app = build_gateway(
            cast(SearchService, self.service), ServeConfig(**limits), self.metrics, scrape, keys
        )

    def client(self) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://front")

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        return asyncio.run(call())

    def post(self, path: str = "/v1/search", **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


def check_error(response: httpx.Response, status: int, kind: str, part: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(response.json()) == {"error"} and set(error) == {"type", "message"}
    assert error["type"] == kind
    assert part in error["message"], error["message"]
    assert "Traceback" not in response.text and ".py" not in response.text


def test_search_answers_one_and_several_queries() -> None:
    gateway = Gateway()
    body = gateway.post(json={"query": "日本"}).json()
    assert body["results"] == [[{"id": "日本", "score": 1.0}]]
    assert body["shards"] == {"ok": 2, "total": 2, "failed": []}
    body = gateway.post(json={"queries": ["a", "b"], "k": 3}).json()
    assert [hits[0]["id"] for hits in body["results"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({}, "exactly one of 'query' and 'queries'"),
        ({"query": "a", "queries": ["b"]}, "exactly one of 'query' and 'queries'"),
        ({"query": ""}, "query"),
        ({"queries": []}, "queries"),
        ({"query": "a", "k": 0}, "k: "),
        ({"query": "a", "k": "many"}, "k: "),
        ({"query": "a", "top_k": 3}, "top_k: Extra inputs"),
        ({"query": "a", "search": {"probes": 0}}, "search.probes"),
        ({"query": "a", "filter": ["x"]}, "filter"),
        ({"query": "a", "include": ["vectors"]}, "include.0"),
    ],
)
def test_a_bad_body_is_told_by_its_key(body: dict[str, Any], part: str) -> None:
    check_error(Gateway().post(json=body), 400, "InvalidRequest", part)


def test_a_body_that_is_not_json_is_told() -> None:
    headers = {"content-type": "application/json"}
    check_error(Gateway().post(content=b"{", headers=headers), 400, "InvalidRequest", "JSON")


def test_a_long_message_is_cut() -> None:
    response = Gateway().post(json={f"unknown-{i}": 1 for i in range(200)})
    assert len(response.json()["error"]["message"]) <= 500


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (SearchError("k is too large"), 400),
        (UnknownDocument("no document 'x'"), 404),
        (ArtifactNotFound("no such version"), 404),
        (NotReady("not yet"), 503),
        (ShardsUnavailable("1 of 2 shards"), 503),
        (StorageError("unreachable"), 503),
        (IndexFormatError("damaged"), 503),
        (NonFiniteError("queries: text 0 has vectors that are not finite; check the weights"), 503),
        (DeadlineExceeded("late"), 504),
    ],
)
def test_typed_errors_have_their_status(error: Exception, status: int) -> None:
    gateway = Gateway()
    gateway.service.error = error
    check_error(gateway.post(json={"query": "a"}), status, type(error).__name__, str(error))


def test_an_unexpected_error_shows_nothing_of_the_inside() -> None:
    gateway = Gateway()
    gateway.service.error = RuntimeError("secret of the inside")
    response = gateway.post(json={"query": "a"})
    check_error(response, 500, "InternalError")
    assert "secret" not in response.text


def test_unknown_paths_and_methods_are_json_too() -> None:
    check_error(Gateway().request("GET", "/nowhere"), 404, "NotFound")
    check_error(Gateway().request("GET", "/v1/search"), 405, "MethodNotAllowed")


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic key-1"},
        {"X-API-Key": "key-"},
        {"X-API-Key": "鍵".encode()},
    ],
)
@pytest.mark.parametrize("path", ["/v1/search", "/v1/rerank"])
def test_without_an_accepted_key_nothing_is_answered(headers: dict[str, Any], path: str) -> None:
    response = Gateway("key-1", "key-2").post(path, json={"query": "a"}, headers=headers)
    check_error(response, 401, "Unauthorized")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [{"Authorization": "Bearer key-2"}, {"authorization": "bearer key-1"}, {"X-API-Key": "鍵".encode()}],
)
def test_each_accepted_key_opens(headers: dict[str, Any]) -> None:
    assert Gateway("key-1", "key-2", "鍵").post(json={"query": "a"}, headers=headers).status_code == 200


def test_health_metrics_page_and_documentation_need_no_key() -> None:
    gateway = Gateway("key-1")
    for path in ("/", "/healthz", "/metrics", "/docs", "/openapi.json"):
        assert gateway.request("GET", path).status_code == 200, path


def test_a_large_body_is_refused_whether_it_is_declared_or_streamed() -> None:
    gateway = Gateway(max_body_kb=1)
    check_error(gateway.post(json={"query": "x" * 2000}), 413, "BodyTooLarge", "1024 bytes")

    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    async def streamed() -> httpx.Response:
        async with gateway.client() as client:
            return await client.post("/v1/search", content=pieces())

    check_error(asyncio.run(streamed()), 413, "BodyTooLarge")
    assert gateway.post(json={"query": "x" * 900}).status_code == 200


def test_one_request_too_many_gets_429_and_the_others_go_on() -> None:
    gateway = Gateway(max_inflight=2)

    async def scenario() -> None:
        gateway.service.gate = asyncio.Event()
        async with gateway.client() as client:
            working = [asyncio.create_task(client.post("/v1/search", json={"query": "a"})) for _ in range(2)]
            await asyncio.sleep(0.05)
            refused = await client.post("/v1/search", json={"query": "a"})
            check_error(refused, 429, "Overloaded")
            assert refused.headers["retry-after"] == "1"
            assert (await client.get("/healthz")).status_code == 200
            gateway.service.gate.set()
            assert [(await task).status_code for task in working] == [200, 200]
            assert (await client.post("/v1/search", json={"query": "a"})).status_code == 200

    asyncio.run(scenario())


@pytest.mark.parametrize(("status", "code"), [("ok", 200), ("starting", 503), ("degraded", 503)])
def test_healthz_is_200_only_when_all_shards_can_be_searched(status: str, code: int) -> None:
    gateway = Gateway()
    gateway.service.status = status
    response = gateway.request("GET", "/healthz")
    assert response.status_code == code
    assert response.json()["status"] == status


def samples(text: str, name: str) -> dict[tuple[str, ...], float]:
    return {
        tuple(sample.labels[key] for key in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_metrics_count_requests_by_route_and_status() -> None:
    gateway = Gateway()
    for _ in range(3):
        gateway.post(json={"query": "a"})
    gateway.post(json={})
    gateway.request("GET", "/made/up/path")
    text = gateway.request("GET", "/metrics").text
    counts = samples(text, "raycolbert_requests_total")
    assert counts[("replica-1", "/v1/search", "200")] == 3
    assert counts[("replica-1", "/v1/search", "400")] == 1
    assert counts[("replica-1", "other", "404")] == 1
    assert samples(text, "raycolbert_request_seconds_count")[("replica-1", "/v1/search")] == 4


def test_metrics_of_several_fronts_stay_apart() -> None:
    first, second = Metrics(), Metrics()
    first.observe_batch(3, 0.01)
    second.observe_batch(5, 0.01)
    text = merge_expositions({"a": first.exposition(), "b": second.exposition()})
    assert samples(text, "raycolbert_batch_texts_sum") == {("a",): 3.0, ("b",): 5.0}
    assert text.count("# TYPE raycolbert_batch_texts histogram") == 1


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere() -> None:
    response = Gateway().request("GET", "/")
    assert response.headers["content-type"].startswith("text/html")
    page = response.text
    assert "検索" in page and "Search" in page
    for outside in ("http://", "https://", "//cdn", 'src="', "@import", "innerHTML"):
        assert outside not in page, outside


def test_half_a_surrogate_pair_in_a_message_is_escaped() -> None:
    gateway = Gateway()
    gateway.service.error = SearchError("filter: no operator '$x\ud800'")
    check_error(gateway.post(json={"query": "a"}), 400, "SearchError", r"no operator '$x\ud800'")


def test_openapi_names_the_routes_and_their_errors() -> None:
    schema = Gateway().request("GET", "/openapi.json").json()
    search = schema["paths"]["/v1/search"]["post"]
    assert {"200", "400", "401", "404", "413", "429", "503", "504"} <= set(search["responses"])
    reference = search["responses"]["429"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.endswith("ErrorResponse")
    assert "422" not in search["responses"], "what does not fit the schema is a 400 here"


def test_each_gateway_is_its_own() -> None:
    """Two applications in one process, as in these tests, must not share counters or limits."""
    gateways = Gateway(), Gateway()
    labels = {"route": "/v1/search", "status": "200"}
    for gateway in gateways:
        gateway.post(json={"query": "a"})
    for gateway in gateways:
        assert gateway.metrics.registry.get_sample_value("raycolbert_requests_total", labels) == 1.0
