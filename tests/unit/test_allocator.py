"""What a process keeps: when cycles are collected."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from colbert_core.allocator import NEW_OBJECTS, collect_cycles_rarely


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
