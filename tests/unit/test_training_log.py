"""Records of a run: stored once a step, whatever was repeated, and shown while it runs."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from cluster import training_log
from cluster.config import StorageConfig
from cluster.storage import ObjectStore, open_store
from cluster.training_log import ProgressDisplay, RunLog, StepRecord, read_log


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(StorageConfig(root=str(tmp_path)))


def record(step: int, **more: Any) -> StepRecord:
    figures: dict[str, Any] = {
        "step": step,
        "epoch": step / 10,
        "loss": 1 / step,
        "parts": {"kl": 1 / step},
        "lr": 1e-3,
        "gradient_norm": 2.0,
        "seconds": 0.5,
        "data_wait_s": 0.1,
        "tokens": 100,
        "tokens_per_s": 200.0,
        "padding_fraction": 0.2,
        "documents_listed": 16,
        "documents_encoded": 8,
        "truncated_documents": 0,
        "truncated_queries": 0,
        "dropped_tokens": 0,
        "workers": 1,
    }
    return StepRecord(**{**figures, **more})


def events(store: ObjectStore, prefix: str) -> list[Event]:
    """TensorBoard's file format: length, its checksum, the event, its checksum."""
    found = []
    for item in store.list(f"{prefix}tensorboard/"):
        data, place = store.get(item.key), 0
        while place < len(data):
            length = int.from_bytes(data[place : place + 8], "little")
            body = data[place + 12 : place + 12 + length]
            assert int.from_bytes(data[place + 12 + length :][:4], "little") == masked_crc32c(body)
            event = Event()
            event.ParseFromString(body)
            found.append(event)
            place += 16 + length
    return found


def test_repeated_steps_are_read_once(store: ObjectStore) -> None:
    first = RunLog(store, "runs/r/", start=0, steps=6, attempt="one")
    for step in range(1, 5):
        first.add(record(step))
        if step == 2:
            first.store(first.take())
    # Steps 3 and 4 were stored, but the state they belong to was never complete.
    first.store(first.take())
    first.close()
    second = RunLog(store, "runs/r/", start=2, steps=6, attempt="two")
    for step in range(3, 7):
        second.add(record(step, workers=2))
    second.store(second.take())
    second.close()
    found = read_log(store, "runs/r/")
    assert [(each.step, each.workers) for each in found] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)]
    assert found[0] == record(1)
    assert read_log(store, "runs/other/") == []


def test_curves_hold_every_figure(store: ObjectStore) -> None:
    log = RunLog(store, "runs/r/", start=0, steps=3, attempt="one")
    for step in range(1, 4):
        log.add(record(step))
    log.store(log.take())
    log.close()
    curves: dict[str, list[tuple[int, float]]] = {}
    for event in events(store, "runs/r/"):
        for value in event.summary.value:
            curves.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert {"train/loss", "train/loss/kl", "train/lr", "train/gradient_norm"} <= curves.keys()
    assert [step for step, _ in curves["train/loss"]] == [1, 2, 3]
    assert curves["train/loss"][1][1] == pytest.approx(0.5)


def test_what_was_measured_is_in_the_curves_and_on_the_progress_line(store: ObjectStore) -> None:
    # So long a run that curves get every second step.
    log = RunLog(store, "runs/r/", start=0, steps=2 * training_log.CURVE_POINTS, attempt="one")
    log.add(record(1, validation={"dev/nDCG@10": 0.25}, validation_s=3.0))
    log.add(record(2))
    assert "dev/nDCG@10 0.2500 (step 1)  lr" in training_log.figures_of(log.latest)
    log.store(log.take())
    log.close()
    assert [each.validation for each in read_log(store, "runs/r/")] == [{"dev/nDCG@10": 0.25}, {}]
    curves = {
        (value.tag, event.step): value.simple_value
        for event in events(store, "runs/r/")
        for value in event.summary.value
    }
    assert curves["train/validation/dev/nDCG_at_10", 1] == 0.25
    assert curves["train/validation_s", 1] == 3.0
    assert ("train/validation_s", 2) not in curves


def test_progress_is_shown_line_by_line_without_a_terminal(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "PROGRESS_S", 0.02)
    monkeypatch.setattr(training_log, "POLL_S", 0.02)
    monkeypatch.setattr(training_log, "PRINT_S", 0.0)
    store.put("runs/r/progress.json", b'{"step": 77, "steps": 99}')
    output = io.StringIO()
    with ProgressDisplay(store, "runs/r/", "train p", Console(file=output, width=200)):
        log = RunLog(store, "runs/r/", start=0, steps=4, attempt="one")
        log.add(record(2))
        deadline = time.monotonic() + 10
        while "step 2 of 4" not in output.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        log.close()
    assert "train p: step 2 of 4  loss 0.5000  lr 1.00e-03  200 tokens/s  padding 20%" in output.getvalue()
    # What an earlier run left is not taken for this one's.
    assert "77" not in output.getvalue()
    assert json.loads(store.get("runs/r/progress.json"))["step"] == 2


def test_a_terminal_gets_a_bar_with_the_time_left(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_log, "PROGRESS_S", 0.02)
    monkeypatch.setattr(training_log, "POLL_S", 0.02)
    output = io.StringIO()
    with ProgressDisplay(store, "runs/r/", "train p", Console(file=output, width=160, force_terminal=True)):
        log = RunLog(store, "runs/r/", start=0, steps=400, attempt="one")
        deadline = time.monotonic() + 10
        for step in range(1, 400):
            log.add(record(step))
            time.sleep(0.05)
            shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
            # The time left, once some steps have shown how fast it goes.
            if re.search(r"train p \S+ \d+/400 \d:\d\d:\d\d loss 0\.\d+", shown):
                break
            assert time.monotonic() < deadline, shown[-500:]
        log.close()
