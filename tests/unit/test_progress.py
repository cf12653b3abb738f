"""Progress where the output is no terminal: lines, not too many of them."""

from __future__ import annotations

import re

import pytest

from cluster import progress as progress_module
from cluster.progress import progress


def test_a_log_gets_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with progress() as bar:
        bar.get_time = lambda: now[0]
        task = bar.add_task("documents encoded [x]", total=2000)
        for _ in range(20):
            now[0] += 10
            bar.advance(task, 100)
    lines = capsys.readouterr().err.splitlines()
    # Every 30 of 200 seconds.
    done = [re.match(r"documents encoded \[x\]: ([\d,]+) of 2,000", line) for line in lines]
    assert [match and match[1] for match in done] == ["300", "600", "900", "1,200", "1,500", "1,800"]
    assert lines[0].endswith(", 0:02:50 left")
    assert lines[-1].endswith(", 0:00:20 left")


def test_short_work_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress() as bar:
        for _ in bar.track(range(1000), description="documents encoded"):
            pass
    assert capsys.readouterr().err == ""
