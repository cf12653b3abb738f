"""The server is killed while files move, and comes back: the operation waits for it and succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fault_cases import OUTAGES, Case
from tests.fault_matrix import run
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    # Its own server: the one of the session must not die under other tests.
    server = S3Server().start()
    try:
        yield server
    finally:
        server.stop()


@pytest.mark.parametrize("case", OUTAGES, ids=lambda case: case.operation)
def test_outage(case: Case, server: S3Server, tmp_path: Path) -> None:
    result = run(case, server, server.new_bucket(), tmp_path)
    assert result.agrees(case), result.outcome
    assert result.seconds < 60
