"""The faults, the operations they strike, and what must come of each; :mod:`tests.fault_matrix` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from tests.fault_proxy import Fault

Operation = Literal["publish", "pull", "promote"]

WEIGHTS, ALIAS, MANIFEST = "weights.bin", "production.json", "manifest.json"
OPERATIONS: tuple[Operation, ...] = ("publish", "pull", "promote")

# Where a fault strikes an operation if the case does not say: HTTP methods, and a part of the path.
_TARGETS: dict[Operation, tuple[tuple[str, ...], str]] = {
    "publish": (("PUT", "POST"), ""),
    "pull": (("GET",), WEIGHTS),
    "promote": (("PUT",), ALIAS),
}
_AFTERWARDS = {
    ("publish", True): "the version is visible, every byte verified",
    ("publish", False): "no version is visible; a later publish succeeds",
    ("pull", True): "the files are complete, every byte verified",
    ("pull", False): "nothing is installed; a later pull succeeds",
    ("promote", True): "the alias has moved; its history has the movement once",
    ("promote", False): "the alias and its history are as before",
}
_GOOD = "succeeds"
_CHECKSUM = "IntegrityError: does not match its checksum"


@dataclass(frozen=True)
class Case:
    """One fault in one operation.

    Attributes:
        text: the fault, for the table.
        operation: what is going on.
        outcome: ``succeeds``, or the error's type and a part of its message.
        fault: installed in the proxy while the operation runs.
        special: set-up of faults that are not the network's.
        timeout_s: ``storage.request_timeout_s``; the operation must end within three times this.
    """

    text: str
    operation: Operation
    outcome: str = _GOOD
    fault: Fault | None = None
    special: Literal["", "kill_server", "kill_client", "full_disk", "limited_files"] = ""
    timeout_s: float = 6.0

    @property
    def row(self) -> str:
        """The case's line of the table."""
        then = _AFTERWARDS[self.operation, self.outcome == _GOOD]
        return f"| {self.text} | {self.operation} | {self.outcome} | {then} |"


def _everywhere(text: str, fault: Fault, outcome: str = _GOOD, timeout_s: float = 6.0) -> Iterator[Case]:
    for operation in OPERATIONS:
        method, path = _TARGETS[operation]
        aimed = replace(fault, method=method, path=path)
        yield Case(text, operation, outcome, aimed, timeout_s=timeout_s)


def _passing() -> Iterator[Case]:
    """Faults that go by."""
    yield from _everywhere(
        "connection closed before the server reads the request, twice", Fault("refuse", times=2)
    )
    yield from _everywhere("500 InternalError, three times", Fault("error", times=3))
    slow_down = Fault("error", times=3, status=503, code="SlowDown")
    yield from _everywhere("503 SlowDown, three times", slow_down)
    yield from _everywhere("no answer for 5 s", Fault("stall"))

    lost = Fault("lose_answer", ("PUT",), MANIFEST)
    text = "answer lost after the server has written"
    yield Case(f"{text} the manifest", "publish", fault=lost)
    yield Case(f"{text} a part, three times", "publish", fault=replace(lost, path=WEIGHTS, times=3))
    joined = Fault("lose_answer", ("POST",), "uploadId=")
    yield Case("answer lost after the server has joined the parts", "publish", fault=joined)
    yield Case(f"{text} the alias", "promote", fault=replace(lost, path=ALIAS))
    failed = Fault("error_after", ("PUT",), MANIFEST)
    yield Case("500 after the server has written the manifest", "publish", fault=failed)
    yield Case("500 after the server has written the alias", "promote", fault=replace(failed, path=ALIAS))

    text = "connection breaks inside a body, three times"
    yield Case(text, "pull", fault=Fault("break_body", ("GET",), WEIGHTS, times=3))
    yield Case(text, "promote", fault=Fault("break_body", ("GET",), ALIAS, times=3))
    text = "body cut short under headers that agree with it, once"
    yield Case(text, "pull", fault=Fault("shorten_body", ("GET",), WEIGHTS))
    yield Case("one bit of a body flipped, once", "pull", fault=Fault("flip_body", ("GET",), WEIGHTS))
    yield Case("wrong ETag of an object, once", "pull", fault=Fault("wrong_etag", ("HEAD",), WEIGHTS))
    yield Case("wrong ETag of a part, once", "publish", fault=Fault("wrong_etag", ("PUT",), "partNumber=2"))
    yield Case("wrong ETag of an alias, once", "promote", fault=Fault("wrong_etag", ("GET",), ALIAS))
    yield Case("publisher killed before the manifest", "publish", special="kill_client")


def _lasting() -> Iterator[Case]:
    """Faults that do not."""
    text = "body cut short under headers that agree with it, every time"
    yield Case(text, "pull", _CHECKSUM, Fault("shorten_body", ("GET",), MANIFEST, None))
    yield Case(text, "promote", _CHECKSUM, Fault("shorten_body", ("GET",), ALIAS, None))
    text = "one bit of a body flipped, every time"
    sha256 = "IntegrityError: does not match its SHA-256"
    yield Case(text, "pull", sha256, Fault("flip_body", ("GET",), WEIGHTS, None))
    yield Case(text, "promote", _CHECKSUM, Fault("flip_body", ("GET",), ALIAS, None))
    lost = "PreconditionFailed: production.json"
    wrong = Fault("wrong_etag", ("GET",), ALIAS, None)
    yield Case("wrong ETag of an alias, every time", "promote", lost, wrong, timeout_s=3)

    for_ever = Fault("error", times=None)
    failed = "StorageError: the server answered 500"
    yield from _everywhere("500 InternalError for ever", for_ever, failed, timeout_s=3)
    expired = replace(for_ever, status=403, code="ExpiredToken")
    reason = "StorageError: the credentials have expired"
    yield from _everywhere("credentials expired", expired, reason, timeout_s=3)
    denied = replace(for_ever, status=403, code="AccessDenied")
    yield from _everywhere("access denied", denied, "StorageError: access denied", timeout_s=3)
    late = "StorageError: did not answer in time"
    yield Case("no answer, every time", "publish", late, Fault("stall", ("PUT",), "", None), timeout_s=3)
    broke = "StorageError: the connection broke"
    refuse = Fault("refuse", ("GET",), WEIGHTS, None)
    yield Case("connection closed, every time", "pull", broke, refuse, timeout_s=3)
    ignoring = Fault("ignore_condition", ("PUT",), "", None)
    refused = "StorageError: does not honour conditional writes"
    yield Case("a server that ignores conditional writes", "publish", refused, ignoring)
    full = "StorageError: no space left"
    yield Case("disk full (a file system of 4 MB)", "pull", full, special="full_disk")
    yield Case("a file larger than the process may write", "pull", full, special="limited_files")


CASES = (*_passing(), *_lasting())

_KILLED = "server killed while the files move, and started again"
OUTAGES = (
    Case(_KILLED, "publish", special="kill_server", timeout_s=40),
    Case(
        "server killed when it is to write the manifest, and started again",
        "publish",
        fault=Fault("stall", ("PUT",), MANIFEST, seconds=1.0),
        special="kill_server",
        timeout_s=40,
    ),
    Case(_KILLED, "pull", special="kill_server", timeout_s=40),
)
