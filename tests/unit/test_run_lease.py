"""One run under a name at a time, on a local store and real threads."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.run_lease import RunLease
from cluster.storage import ObjectStore, open_store
from colbert_core.errors import TrainingError

KEY = "runs/r/lease.json"


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(StorageConfig(root=str(tmp_path)))


def abandoned(store: ObjectStore) -> None:
    """A lease whose holder is gone without a word."""
    holder = {"holder": "x", "host": "elsewhere", "pid": 4711, "since": "long ago", "beats": 3}
    store.put(KEY, json.dumps(holder).encode())


def test_a_finished_run_leaves_no_lease(store: ObjectStore) -> None:
    with RunLease(store, KEY, heartbeat_s=0.05):
        assert store.exists(KEY)
    assert not store.exists(KEY)
    with pytest.raises(ZeroDivisionError), RunLease(store, KEY):
        raise ZeroDivisionError
    assert not store.exists(KEY)


def test_a_living_run_keeps_others_out_however_long(store: ObjectStore) -> None:
    with RunLease(store, KEY, heartbeat_s=0.05, stale_s=0.5) as lease:
        for _ in range(3):
            with (
                pytest.raises(TrainingError, match=r"in use by process \d+ on .* since"),
                RunLease(store, KEY, heartbeat_s=0.05, stale_s=0.5),
            ):
                pass
        lease.claim.check(store)
    assert not store.exists(KEY)


def test_an_abandoned_lease_is_taken_over_after_a_bounded_time(store: ObjectStore) -> None:
    abandoned(store)
    begin = time.monotonic()
    with RunLease(store, KEY, heartbeat_s=0.05, stale_s=0.4):
        waited = time.monotonic() - begin
        assert 0.4 <= waited < 5
        assert json.loads(store.get(KEY))["host"] != "elsewhere"


def test_only_one_of_many_gets_an_abandoned_lease(store: ObjectStore) -> None:
    abandoned(store)
    leave, entered, refused = threading.Event(), [], []

    def take(number: int) -> None:
        try:
            with RunLease(store, KEY, heartbeat_s=0.05, stale_s=0.4):
                entered.append(number)
                leave.wait(10)
        except TrainingError:
            refused.append(number)

    threads = [threading.Thread(target=take, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 10
    while len(refused) < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    leave.set()
    for thread in threads:
        thread.join()
    assert (len(entered), len(refused)) == (1, 5)


def test_a_holder_that_was_thought_dead_finds_out(store: ObjectStore) -> None:
    with RunLease(store, KEY, heartbeat_s=0.05) as lease:
        other = b'{"host": "other"}'
        store.put(KEY, other)
        with pytest.raises(TrainingError, match=rf"{KEY}: another process took this run over"):
            lease.claim.check(store)
        time.sleep(0.3)
        assert store.get(KEY) == other  # no sign of life over it
    assert store.get(KEY) == other
    with RunLease(store, "runs/s/lease.json") as lease:
        store.delete("runs/s/lease.json")
        with pytest.raises(TrainingError, match="took this run over"):
            lease.claim.check(store)


def test_a_heartbeat_whose_answer_was_lost_is_no_loss(store: ObjectStore) -> None:
    with RunLease(store, KEY, heartbeat_s=0.1) as lease:
        # As if a beat had arrived that its holder took for failed.
        content, _ = store.get_with_etag(KEY)
        store.put(KEY, content)
        beats = json.loads(content)["beats"]
        deadline = time.monotonic() + 5
        while json.loads(store.get(KEY))["beats"] < beats + 3:
            assert time.monotonic() < deadline
            lease.claim.check(store)
            time.sleep(0.02)
    assert not store.exists(KEY)


def test_who_leaves_takes_no_lease_of_another_with_it(store: ObjectStore) -> None:
    other = b'{"host": "other", "holder": "another"}'
    with RunLease(store, KEY, heartbeat_s=60.0):
        store.put(KEY, other)
    assert store.get(KEY) == other
