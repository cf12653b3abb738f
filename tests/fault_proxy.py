"""An HTTP proxy between a client and an S3 server that does what networks and servers do at their worst.

It forwards every request unchanged, so that signatures stay valid, unless a :class:`Fault` that is
installed matches it.
"""

from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "refuse",  # close the connection, nothing reaches the server
    "lose_answer",  # the server does it, then the connection closes without an answer
    "error",  # answer with an S3 error, nothing reaches the server
    "error_after",  # the server does it, then answers with an S3 error
    "stall",  # say nothing for some seconds, then close
    "slow",  # pass it on, so many bytes a second over all connections
    "break_body",  # right headers, half of the body, then the connection closes
    "shorten_body",  # half of the body, and headers that agree with it
    "flip_body",  # one bit of the body is wrong
    "wrong_etag",  # another etag in the headers
    "ignore_condition",  # a refused conditional write is reported as done
]


@dataclass
class Fault:
    """What goes wrong, where, and how often.

    Attributes:
        kind: what happens.
        method: only requests of these HTTP methods.
        path: only requests whose path and query contain this text.
        times: how often in all; None for ever.
        status, code: of the errors that ``error`` and ``error_after`` answer with.
        seconds: how long ``stall`` lasts.
        rate: bytes of body a second that ``slow`` lets through.
        hits: how often it has happened.
    """

    kind: Kind
    method: tuple[str, ...] = ("GET", "PUT", "POST", "HEAD", "DELETE")
    path: str = ""
    times: int | None = 1
    status: int = 500
    code: str = "InternalError"
    seconds: float = 5.0
    rate: float = 1e6
    hits: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    _free_at: float = field(default=0.0, repr=False)

    def wait_for(self, size: int) -> None:
        """Waits as long as ``size`` bytes take behind all that came before them."""
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic()) + size / self.rate
            left = self._free_at - time.monotonic()
        time.sleep(max(0.0, left))

    def strikes(self, method: str, path: str) -> bool:
        """Whether this request is hit; counts it."""
        with self._lock:
            over = self.times is not None and self.hits >= self.times
            if over or method not in self.method or self.path not in path:
                return False
            self.hits += 1
            return True


class FaultProxy:
    """The proxy; use it as a context manager.

    Args:
        target: the server's URL.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @contextmanager
    def fault(self, fault: Fault) -> Iterator[Fault]:
        """Installs a fault for the length of the block."""
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def on_request(self, method: str, path: str) -> Fault | None:
        """Notes a request and returns the fault that hits it."""
        self.requests.append((method, path))
        return next((fault for fault in self.faults if fault.strikes(method, path)), None)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    owner: FaultProxy

    def log_message(self, format: str, *args: object) -> None:
        return

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.owner.on_request(self.command, self.path)
        kind = fault.kind if fault else None
        if fault is None:
            self._answer(*self._forward(body))
        elif kind == "refuse":
            self._cut()
        elif kind == "error":
            self._answer(*_error(fault))
        elif kind == "slow":
            fault.wait_for(len(body))
            self._answer(*self._forward(body))
        elif kind == "stall":
            time.sleep(fault.seconds)
            self._cut()
        else:
            self._answer_badly(fault, *self._forward(body))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle

    def _answer_badly(self, fault: Fault, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        half = body[: len(body) // 2]
        if fault.kind == "lose_answer":
            self._cut()
        elif fault.kind == "error_after":
            self._answer(*_error(fault))
        elif fault.kind == "break_body":
            self._answer(status, headers, half, length=len(body))
            self._cut()
        elif fault.kind == "shorten_body":
            self._answer(status, headers, half)
        elif fault.kind == "flip_body":
            middle = len(half)
            changed = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :] if body else body
            self._answer(status, headers, changed)
        elif fault.kind == "wrong_etag":
            kept = [(name, value) for name, value in headers if name.lower() != "etag"]
            self._answer(status, [*kept, ("ETag", '"00000000000000000000000000000000"')], body)
        elif fault.kind == "ignore_condition":
            done = (200, [("ETag", '"00000000000000000000000000000000"')], b"")
            self._answer(*(done if status == 412 else (status, headers, body)))

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(urlsplit(self.owner.target).netloc, timeout=30)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            headers = [(n, v) for n, v in answer.getheaders() if n.lower() not in _HOP_HEADERS]
            if self.command == "HEAD":
                return (
                    answer.status,
                    [*headers, ("Content-Length", answer.getheader("Content-Length") or "0")],
                    b"",
                )
            return answer.status, headers, answer.read()
        except (OSError, http.client.HTTPException):
            # The server is down: so is the proxy, for this client.
            self._cut()
            return 0, [], b""
        finally:
            connection.close()

    def _answer(
        self, status: int, headers: list[tuple[str, str]], body: bytes, length: int | None = None
    ) -> None:
        if self.close_connection and status == 0:
            return
        try:
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
                self.wfile.flush()
        except OSError:
            self.close_connection = True

    def _cut(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


_HOP_HEADERS = ("connection", "content-length", "transfer-encoding", "keep-alive")


def _error(fault: Fault) -> tuple[int, list[tuple[str, str]], bytes]:
    body = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>"
    return fault.status, [("Content-Type", "application/xml")], body.encode()
