"""Runs every fault against every operation, and writes the table of what comes of it.

``python -m tests.fault_matrix`` runs all cases and writes ``docs/reliability.md``; the integration tests
run the same cases and compare each with its row of that file.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

from cluster.artifacts import ArtifactRef
from cluster.config import StorageConfig
from cluster.registry import Registry
from cluster.registry_gc import collect
from colbert_core.errors import RaycolbertError
from tests.fault_cases import CASES, OUTAGES, WEIGHTS, Case, Operation
from tests.fault_proxy import FaultProxy
from tests.registry_contract.artifacts import KILLED_PUBLISH, contents, write
from tests.s3_server import S3Server

DOCUMENT = Path(__file__).parents[1] / "docs" / "reliability.md"

V1, V2 = ArtifactRef("models", "ja", "v1"), ArtifactRef("models", "ja", "v2")
# One file of two parts, and one of a single request.
FILES = {WEIGHTS: bytes(range(256)) * 35_000, "config.json": b'{"dim": 128}' * 100}

# Pulls, says what came of it, and what it left behind.
_PULL = """
import sys
from pathlib import Path
from cluster.config import StorageConfig
from cluster.registry import ArtifactRef, Registry
from colbert_core.errors import RaycolbertError
from colbert_core.tensor_files import file_sha256

config = StorageConfig.model_validate_json(sys.argv[1])
try:
    Registry.open(config).pull(ArtifactRef("models", "ja", "v1"))
    print("succeeds")
except RaycolbertError as error:
    print(f"{type(error).__name__}: {error}")
cache = Path(config.cache_dir)
left = [path for path in cache.rglob("*") if path.is_file() and path.parent != cache / "locks"]
# Whole files, by their content's digest, serve the next try.
assert all(path.parent == cache / "blobs" and file_sha256(path) == path.name for path in left), left
"""
# Files end at 1 MB, so that a write fails half-way.
_LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
"""
# In a mount namespace of its own, which any user may make where the system lets them.
_NAMESPACE = ("unshare", "--map-root-user", "--mount")
_SMALL_DISK = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'


class Result:
    """What came of a case.

    Attributes:
        outcome: ``succeeds`` or ``<type>: <message>``.
        seconds: how long the operation took.
    """

    def __init__(self, outcome: str, seconds: float) -> None:
        self.outcome = outcome
        self.seconds = seconds

    def agrees(self, case: Case) -> bool:
        """Whether this is the outcome that the case states."""
        kind, _, message = case.outcome.partition(": ")
        return self.outcome.startswith(kind) and message in self.outcome


def run(case: Case, server: S3Server, bucket: str, directory: Path) -> Result:
    """Runs a case against a real server, and checks what it left behind.

    Args:
        case: the case.
        server: reached through the proxy by the operation, and directly by the checks.
        bucket: a bucket of the server.
        directory: empty, for sources and caches.

    Raises:
        AssertionError: something half-done is visible, or the fault did not happen.
    """
    root = f"s3://{bucket}/{time.time_ns()}"
    source = write(directory / "source", FILES)
    direct = Registry.open(server.storage(root, cache_dir=str(directory / "direct")))
    if case.operation != "publish":
        direct.publish(V1, source)
    if case.operation == "promote":
        direct.publish(V2, write(directory / "second", {"a": b"2"}))
        direct.promote(V1, "production")
    with FaultProxy(server.endpoint_url) as proxy, ExitStack() as stack:
        config = server.storage(
            root, cache_dir=str(directory / "cache"), request_timeout_s=case.timeout_s
        ).model_copy(update={"endpoint_url": proxy.url})
        faulty = Registry.open(config)
        if case.fault is None or case.fault.kind != "ignore_condition":
            faulty.store.put("warm", b"", if_absent=True)
        # A fault counts its strikes, so that every run needs its own.
        fault = stack.enter_context(proxy.fault(replace(case.fault, hits=0))) if case.fault else None
        if case.special == "kill_server":
            stack.enter_context(_killing(server, proxy, case))
        operation = _operation(case.operation, faulty, source)
        if case.special == "kill_client":
            command = [sys.executable, "-c", KILLED_PUBLISH, config.model_dump_json(), str(source)]
            assert subprocess.run(command, check=False).returncode == 9
            assert not direct.exists(V1)
        begin = time.monotonic()
        if case.special in ("full_disk", "limited_files"):
            outcome = _pull_elsewhere(case, config)
        else:
            outcome = _outcome(operation)
        seconds = time.monotonic() - begin
        assert fault is None or fault.hits, "the fault did not happen"
    _check(case, outcome, direct, directory)
    if case.operation == "publish":
        _collect(direct)
    return Result(outcome, seconds)


def can_mount() -> bool:
    """Whether this user may mount a small file system."""
    return (
        shutil.which("unshare") is not None
        and not subprocess.run(
            [*_NAMESPACE, "sh", "-c", 'mount -t tmpfs none "$0"', tempfile.gettempdir()],
            check=False,
            capture_output=True,
        ).returncode
    )


def _pull_elsewhere(case: Case, config: StorageConfig) -> str:
    """Pulls in a process that may not write much, and leaves nothing of it behind."""
    limit = _LIMITED if case.special == "limited_files" else ""
    command = [sys.executable, "-c", limit + _PULL, config.model_dump_json()]
    if case.special == "full_disk":
        Path(config.cache_dir).mkdir(parents=True, exist_ok=True)
        command = [*_NAMESPACE, "sh", "-c", _SMALL_DISK, config.cache_dir, *command]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _collect(registry: Registry) -> None:
    """Collects garbage a month later, after which no upload is unfinished."""
    registry.promote(V1, "production")  # or it would be garbage, too
    later = datetime.now(timezone.utc) + timedelta(days=31)
    collect(registry, now=later, dry_run=False)
    assert not registry.store.abort_uploads(later, dry_run=True)
    assert registry.verify(V1) == []


def _operation(name: Operation, registry: Registry, source: Path) -> Callable[[], object]:
    return {
        "publish": lambda: registry.publish(V1, source),
        "pull": lambda: registry.pull(V1),
        "promote": lambda: registry.promote(V2, "production"),
    }[name]


def _outcome(operation: Callable[[], object]) -> str:
    try:
        operation()
    except RaycolbertError as error:
        return f"{type(error).__name__}: {error}"
    return "succeeds"


def _check(case: Case, outcome: str, direct: Registry, directory: Path) -> None:
    """Nothing half-done is visible, and a failed operation succeeds when the fault is over."""
    good = outcome == "succeeds"
    if case.operation == "publish":
        assert direct.exists(V1) == good, outcome
        assert direct.versions("models", "ja") == (["v1"] if good else []), outcome
        if not good:
            direct.publish(V1, directory / "source")
        assert direct.verify(V1) == []
        assert contents(direct.pull(V1)) == FILES
    elif case.operation == "pull":
        installed = list((directory / "cache").glob("artifacts/models/ja/*"))
        assert len(installed) == good, outcome
        assert not list((directory / "cache").glob("building/*"))
        if good:
            assert contents(installed[0]) == FILES
        assert contents(direct.pull(V1)) == FILES
    else:
        alias = direct.alias("models", "ja", "production")
        assert [move.version for move in alias.history] == (["v1", "v2"] if good else ["v1"]), outcome
        assert alias.version == ("v2" if good else "v1")


@contextmanager
def _killing(server: S3Server, proxy: FaultProxy, case: Case) -> Iterator[None]:
    """Kills the server when the large file, or what the fault strikes, begins to move; starts it again."""
    restarted: list[bool] = []

    def watch() -> None:
        wanted = "PUT" if case.operation == "publish" else "GET"
        place = case.fault.path if case.fault else WEIGHTS
        deadline = time.monotonic() + 20
        while not any(m == wanted and place in path for m, path in list(proxy.requests)):
            if time.monotonic() > deadline:
                return
            time.sleep(0.0005)
        server.restart()
        restarted.append(True)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()
        assert restarted, "the server was never killed"


def document(cases: Sequence[Case]) -> str:
    """The text of ``docs/reliability.md``."""
    lines = [
        "# What happens when storage fails",
        "",
        "Each row is run against a real S3 server (SeaweedFS) behind a proxy that makes the fault; the last",
        "column is checked afterwards, past the proxy. A request is tried again, with exponential backoff",
        "and jitter, for `storage.request_timeout_s` seconds; then, or at once where trying again is",
        "useless, the operation ends in a typed error that names operation, key and storage. What a failed",
        "publish leaves in storage, parts of unfinished uploads too, `raycolbert registry gc --delete`",
        "removes once it is older than `--staging-days`, two unless told otherwise.",
        "",
        "Written by `python -m tests.fault_matrix`; `tests/integration/test_storage_faults.py` and",
        "`test_storage_outage.py` run the same cases and fail if a row is missing or no longer true.",
        "",
        "| fault | operation | outcome | afterwards |",
        "|---|---|---|---|",
        *(case.row for case in cases),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Runs all cases and writes the document; exits 1 if a case has another outcome than stated."""
    os.environ |= S3Server.environment()
    wrong = []
    server = S3Server().start()
    try:
        bucket = server.new_bucket("faults")
        for case in (*CASES, *OUTAGES):
            with tempfile.TemporaryDirectory() as directory:
                result = run(case, server, bucket, Path(directory))
            print(f"{result.seconds:5.1f} s  {case.row}\n         {result.outcome}")
            if not result.agrees(case):
                wrong.append(case)
    finally:
        server.stop()
    for case in wrong:
        print(f"NOT as stated: {case.row}")
    if not wrong:
        DOCUMENT.write_text(document((*CASES, *OUTAGES)))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
