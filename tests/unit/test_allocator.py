"""What a process keeps: when cycles are collected, when freed memory is given back."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator

import pytest

from colbert_core.allocator import LEAST_STEPS, NEW_OBJECTS, GrowthLimit, collect_cycles_rarely


@pytest.fixture(autouse=True)
def _thresholds_as_before() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


@pytest.mark.parametrize("youngest", [NEW_OBJECTS, 10 * NEW_OBJECTS, 0])
def test_who_collects_more_rarely_or_never_goes_on_so(youngest: int) -> None:
    gc.set_threshold(youngest, 5, 7)
    collect_cycles_rarely()
    assert gc.get_threshold()[0] == youngest


def test_pythons_own_is_raised() -> None:
    gc.set_threshold(700, 5, 7)
    collect_cycles_rarely()
    assert gc.get_threshold()[:2] == (NEW_OBJECTS, 5)


class Process:
    """A process whose size is set by hand and falls to 100 when it releases what it does not use."""

    def __init__(self) -> None:
        self.size, self.releases = 100, 0

    def release(self) -> None:
        self.size, self.releases = 100, self.releases + 1

    def steps(self, limit: GrowthLimit, *sizes: int) -> list[bool]:
        found = []
        for self.size in sizes:
            found.append(limit.after_step())
        return found


def test_what_does_not_grow_is_kept() -> None:
    process = Process()
    limit = GrowthLimit(lambda: process.size, process.release)
    assert not any(process.steps(limit, *[1000, 1050, 1090, 1100] * 5))
    assert process.releases == 0


def test_growth_beyond_a_tenth_is_given_back_but_not_at_every_step() -> None:
    process = Process()
    limit = GrowthLimit(lambda: process.size, process.release)
    assert not any(process.steps(limit, *[1000] * LEAST_STEPS))
    assert process.steps(limit, 1101) == [True]
    assert process.steps(limit, 1000, 2000, 2000, 2000) == [False] * (LEAST_STEPS - 1) + [True]
    assert process.releases == 2


def test_the_largest_step_is_what_growth_is_measured_by() -> None:
    process = Process()
    limit = GrowthLimit(lambda: process.size, process.release)
    assert process.steps(limit, *[1000] * LEAST_STEPS, 1500)[-1]
    # A larger step, alone: so much is needed, and stays.
    assert not any(process.steps(limit, *[1500] * 10))


def test_what_the_first_steps_need_is_not_known_after_one() -> None:
    process = Process()
    limit = GrowthLimit(lambda: process.size, process.release)
    assert not any(process.steps(limit, 500, 900, 1000, 1000, 1050, 1100))


def test_freed_gaps_go_back_to_the_system() -> None:
    """Small blocks, every other one of them freed: glibc itself would keep them all."""
    program = """
import psutil
from colbert_core.allocator import release_freed_memory
kept = [bytearray(60_000) for _ in range(4_000)]
del kept[::2]
before = psutil.Process().memory_info().rss
release_freed_memory()
after = psutil.Process().memory_info().rss
assert before - after > 80e6, (before, after)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
