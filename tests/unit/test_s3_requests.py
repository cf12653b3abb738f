"""When a request is tried again, and when no longer; faults of a real server are in tests/integration."""

from __future__ import annotations

import socket
import socketserver
import threading
from types import SimpleNamespace

import pytest

from cluster.config import StorageConfig
from cluster.storage import open_store, s3_requests
from cluster.storage.s3_requests import S3Requests, backoff
from colbert_core.errors import StorageError


def test_waits_double_and_differ() -> None:
    for attempt in range(12):
        longest = min(5.0, 0.1 * 2**attempt)
        waits = [backoff(attempt) for _ in range(200)]
        assert longest / 2 <= min(waits) < longest * 0.6
        assert longest * 0.9 < max(waits) <= longest
        assert len(set(waits)) > 100, "clients that failed together would come back together"


def test_tries_end_with_the_time_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only waiting moves."""
    now, waits = 0.0, []

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        waits.append(seconds)

    monkeypatch.setattr(s3_requests, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    config = StorageConfig(root="s3://bucket/x", endpoint_url="http://localhost:1", request_timeout_s=30)
    requests = S3Requests(config, "bucket", "s3://bucket/x")
    assert requests.call("get", "here", lambda: "answer") == "answer"
    tries = 0

    def request() -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("the connection broke")

    with pytest.raises(StorageError, match=r"get of 'key' in s3://bucket/x.*\d tries in \d+\.\d s"):
        requests.call("get", "key", request)
    assert tries == len(waits) + 1
    assert 20 < now <= 30, "as long as the bound, and no longer"
    assert waits[0] < 0.11 and max(waits) > 2


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"], ids=["closes", "no TLS"])
def test_only_a_connection_that_breaks_inside_tls_is_tried_again(
    answer: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "SOMEBODY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SECRET")
    tries = 0

    class Once(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            nonlocal tries
            tries += 1
            self.request.recv(1 << 16)
            self.request.sendall(answer)
            self.request.shutdown(socket.SHUT_WR)

    with socketserver.TCPServer(("127.0.0.1", 0), Once) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        url = f"https://127.0.0.1:{server.server_address[1]}"
        store = open_store(StorageConfig(root="s3://b/r", endpoint_url=url, request_timeout_s=1))
        with pytest.raises(StorageError, match="TLS failed"):
            store.head("key")
        server.shutdown()
    assert (tries > 1) is (answer == b"")
