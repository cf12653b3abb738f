"""The local backend: the common contract, and what only a file system can go wrong with."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.storage import LocalStore, ObjectStore, open_store
from cluster.storage.api import RESERVED
from colbert_core.errors import ConfigError, PreconditionFailed, StorageError
from tests.storage_contract import StorageContract


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(StorageConfig(root=str(tmp_path / "root")))


class TestLocal(StorageContract):
    pass


def test_roots(tmp_path: Path) -> None:
    assert open_store(StorageConfig(root=f"file://{tmp_path}")).uri == str(tmp_path)
    assert open_store(StorageConfig(root="~/x")).uri == str(Path.home() / "x")
    for root in ("", "gs://bucket/x", "http://host/x"):
        with pytest.raises(ConfigError, match=r"storage\.root"):
            open_store(StorageConfig(root=root))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/file: a file, not a directory"):
        open_store(StorageConfig(root=str(tmp_path / "file")))


def test_reading_makes_no_directory(store: LocalStore) -> None:
    assert list(store.list()) == []
    assert not store.exists("a")
    assert not store.root.exists()


def test_folders_that_others_empty_hinder_no_writer(store: LocalStore) -> None:
    """Each deletes what it wrote, and with it the folders that are empty then, which others write into."""

    def write_and_delete(number: int) -> None:
        for turn in range(100):
            key = f"a/b/c/{number}"
            store.put(key, b"x", if_absent=turn % 2 == 0)
            assert store.get(key) == b"x"
            store.delete(key)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_and_delete, range(8)))


def test_a_key_below_an_object_is_refused(store: LocalStore) -> None:
    store.put("a/b", b"x")
    for write in (store.put, lambda key, data, **_: store.put(key, data, if_absent=True)):
        with pytest.raises(StorageError, match="above this key") as caught:
            write("a/b/c", b"y")
        assert type(caught.value) is StorageError
        with pytest.raises(StorageError, match="below this key") as caught:
            write("a", b"y")
        assert type(caught.value) is StorageError
    assert store.get("a/b") == b"x"


def test_a_reader_keeps_the_object_it_opened(store: LocalStore) -> None:
    store.put("a", b"old" * 1000)
    with store.open("a") as stream:
        assert stream.read(3) == b"old"
        store.put("a", b"new" * 1000)
        assert stream.read() == b"old" * 999


def _add(root: str, count: int) -> None:
    store = open_store(StorageConfig(root=root))
    for _ in range(count):
        while True:
            data, etag = store.get_with_etag("count")
            try:
                store.put("count", str(int(data) + 1).encode(), if_match=etag)
                break
            except PreconditionFailed:
                continue


def test_processes_lose_no_increment(store: LocalStore) -> None:
    store.put("count", b"0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add, args=(store.uri, 25)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert store.get("count") == b"200"


def _write_forever(root: str, source: str, begun: str) -> None:
    store = open_store(StorageConfig(root=root))
    Path(begun).touch()
    while True:
        store.upload("big", Path(source))


def test_a_killed_writer_leaves_the_old_object(store: LocalStore, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(b"n" * 30_000_000)
    store.put("big", b"n" * 30_000_000)
    context = multiprocessing.get_context("fork")
    leftovers = 0
    for round_ in range(5):
        begun = tmp_path / f"begun-{round_}"
        process = context.Process(target=_write_forever, args=(store.uri, str(source), str(begun)))
        process.start()
        while not begun.exists():
            time.sleep(0.001)
        time.sleep(0.01 + 0.007 * round_)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        content = store.get("big")
        assert content == b"n" * 30_000_000
        assert [info.key for info in store.list()] == ["big"]
        leftovers = len(list((store.root / RESERVED / "writing").iterdir()))
    assert leftovers > 0, "no kill hit a write: the test shows nothing"
    assert store.abort_uploads(datetime.now(timezone.utc) - timedelta(hours=1)) == []
    later = datetime.now(timezone.utc) + timedelta(seconds=5)
    assert len(store.abort_uploads(later, dry_run=True)) == leftovers
    assert len(store.abort_uploads(later)) == leftovers
    assert store.abort_uploads(later) == []
    assert store.get("big") == b"n" * 30_000_000


def _fill(root: str, source: str, outcome: str) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    store = open_store(StorageConfig(root=root))
    found = []
    for write in (
        lambda: store.put("a", b"x" * 200_000),
        lambda: store.upload("a", Path(source), if_absent=True),
    ):
        try:
            write()
            found.append("written")
        except StorageError as error:
            found.append(f"{type(error).__name__}: {error}")
    Path(outcome).write_text("\n".join(found))


def test_a_full_disk_is_typed_and_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for the full disk: the write fails half-way, as with ENOSPC."""
    source, outcome = tmp_path / "source", tmp_path / "outcome"
    source.write_bytes(b"y" * 200_000)
    process = multiprocessing.get_context("fork").Process(
        target=_fill, args=(store.uri, str(source), str(outcome))
    )
    process.start()
    process.join()
    lines = outcome.read_text().splitlines()
    assert len(lines) == 2
    assert all(
        line.startswith("StorageError") and "no space left" in line and "'a'" in line for line in lines
    )
    assert list(store.list()) == []
    assert list((store.root / RESERVED / "writing").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_is_typed(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    with pytest.raises(StorageError, match="permission denied"):
        open_store(StorageConfig(root=str(folder / "root"))).put("a", b"x")
