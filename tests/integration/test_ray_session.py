"""What the workers of an embedded Ray are told."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.config import parse_recipe
from cluster.ray_session import OWN_RAY, go_before_helpers, ray_session

RAISE = "import os; os.nice(5); os.setpriority(os.PRIO_PROCESS, 0, 0)"


@pytest.fixture(scope="module", autouse=True)
def _ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    storage: Path = tmp_path_factory.mktemp("store")
    settings = {"name": "own", "storage": {"root": str(storage)}, "model": {"name": "own", "base": "none"}}
    with ray_session(parse_recipe({**settings, "ray": {"object_store_mb": 80}})):
        yield


@ray.remote(max_calls=1)  # a worker that has gone before helpers is not used again
def niceness(own: bool) -> tuple[int, int, int]:
    """Of a worker's thread as Ray starts it, then when it goes before helpers, and of a thread it starts."""
    if not own:
        del os.environ[OWN_RAY]
    before = os.getpriority(os.PRIO_PROCESS, 0)
    go_before_helpers()
    started: list[int] = []
    thread = threading.Thread(target=lambda: started.append(os.getpriority(os.PRIO_PROCESS, 0)))
    thread.start()
    thread.join()
    return before, os.getpriority(os.PRIO_PROCESS, 0), *started


def test_what_computes_goes_before_helpers_on_a_ray_of_its_own() -> None:
    attempt = subprocess.run([sys.executable, "-c", RAISE], check=False, capture_output=True)
    before, after, inherited = ray.get(niceness.remote(own=True))
    assert before > 0
    assert after == inherited == (before if attempt.returncode else 0)


def test_nothing_goes_before_anything_on_a_shared_ray() -> None:
    before, after, inherited = ray.get(niceness.remote(own=False))
    assert before == after == inherited > 0
