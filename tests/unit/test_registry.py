"""The registry over a local directory, and the cache that several processes share."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.manifest_diff import diff
from cluster.registry import Parent, Registry
from colbert_core.errors import VersionExists
from tests.registry_contract import RegistryContract
from tests.registry_contract.artifacts import FILES, contents, ref, write


@pytest.fixture
def config(tmp_path: Path) -> StorageConfig:
    return StorageConfig(root=str(tmp_path / "root"), cache_dir=str(tmp_path / "cache"))


class TestLocalRegistry(RegistryContract):
    pass


def test_many_files(config: StorageConfig, tmp_path: Path) -> None:
    files = {f"shards/{number:05}/codes": b"%d" % number * 50 for number in range(400)}
    registry = Registry.open(config)
    registry.publish(ref(), write(tmp_path / "many", files))
    assert contents(registry.pull(ref())) == files


def _publish(config: StorageConfig, source: Path, outcomes: Path) -> None:
    try:
        Registry.open(config).publish(ref(), source)
    except VersionExists:
        return
    (outcomes / source.name).touch()


def test_one_of_16_processes_wins(config: StorageConfig, tmp_path: Path) -> None:
    sources = [write(tmp_path / f"source{n}", {"own": b"%d" % n * 5000}) for n in range(16)]
    (tmp_path / "outcomes").mkdir()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_publish, args=(config, source, tmp_path / "outcomes")) for source in sources
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    (winner,) = (tmp_path / "outcomes").iterdir()
    number = int(winner.name.removeprefix("source"))
    assert contents(Registry.open(config).pull(ref())) == {"own": b"%d" % number * 5000}


def _pull(config: StorageConfig, outcome: Path) -> None:
    directory = Registry.open(config).pull(ref())
    outcome.write_text(str(contents(directory) == FILES and directory))


def test_processes_share_one_download(config: StorageConfig, tmp_path: Path) -> None:
    Registry.open(config).publish(ref(), write(tmp_path / "source"))
    context = multiprocessing.get_context("fork")
    outcomes = [tmp_path / f"outcome{number}" for number in range(8)]
    processes = [context.Process(target=_pull, args=(config, outcome)) for outcome in outcomes]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len({outcome.read_text() for outcome in outcomes}) == 1
    assert outcomes[0].read_text() not in ("False", "")
    cache = Path(config.cache_dir)
    assert len(list(cache.glob("blobs/*"))) == len(FILES)
    assert list(cache.glob("building/*")) == []
    # All files are links to the blobs: the artifact takes its space once.
    assert all(path.stat().st_nlink == 2 for path in cache.glob("blobs/*"))


def test_same_content_is_downloaded_once(config: StorageConfig, tmp_path: Path) -> None:
    registry = Registry.open(config)
    registry.publish(ref("v1"), write(tmp_path / "one"))
    registry.publish(ref("v2"), write(tmp_path / "two", FILES | {"config.json": b"other"}))
    registry.pull(ref("v1"))
    registry.store.delete("models/ja/v2/files/model.bin")
    assert contents(registry.pull(ref("v2"))) == FILES | {"config.json": b"other"}


def test_a_cached_file_that_was_changed_is_fetched_again(config: StorageConfig, tmp_path: Path) -> None:
    registry = Registry.open(config)
    registry.publish(ref(), write(tmp_path / "source"))
    victim = registry.pull(ref()) / "model.bin"
    victim.chmod(0o644)
    with victim.open("r+b") as stream:
        stream.write(b"overwritten")
    assert contents(registry.pull(ref())) == FILES
    (victim.parent / "config.json").parent.chmod(0o755)
    (victim.parent / "config.json").unlink()
    assert contents(registry.pull(ref())) == FILES


def test_two_storages_share_a_cache(config: StorageConfig, tmp_path: Path) -> None:
    other = config.model_copy(update={"root": str(tmp_path / "other")})
    Registry.open(config).publish(ref(), write(tmp_path / "one"))
    Registry.open(other).publish(ref(), write(tmp_path / "two", {"x": b"y"}))
    first, second = Registry.open(config).pull(ref()), Registry.open(other).pull(ref())
    assert contents(first) == FILES
    assert contents(second) == {"x": b"y"}


def test_eviction_takes_the_oldest_and_spares_those_in_use(config: StorageConfig, tmp_path: Path) -> None:
    small = config.model_copy(update={"cache_gb": 35_000 / 1e9})
    registry = Registry.open(small)
    for number in range(5):
        source = write(tmp_path / str(number), {"f": bytes([number]) * 10_000})
        registry.publish(ref(f"v{number}"), source)
    pulled = []
    for number in range(3):
        pulled.append(registry.pull(ref(f"v{number}")))
        time.sleep(0.01)
    for directory in pulled[1:]:
        registry.cache.release(directory)
    assert registry.pull(ref("v1")) == pulled[1]  # used again: now younger than v2
    registry.cache.release(pulled[1])
    third = registry.pull(ref("v3"))
    assert [path.exists() for path in (*pulled, third)] == [True, True, False, True]
    fourth = registry.pull(ref("v4"))
    assert [path.exists() for path in (*pulled, third, fourth)] == [True, False, False, True, True]
    assert registry.cache.size() == 30_000
    # All are in use now: the limit gives way, not an artifact that somebody reads.
    registry.pull(ref("v2"))
    assert [path.exists() for path in (pulled[0], third, fourth)] == [True, True, True]
    assert registry.cache.size() == 40_000


def test_an_artifact_pulled_twice_is_released_twice(config: StorageConfig, tmp_path: Path) -> None:
    registry = Registry.open(config)
    registry.publish(ref(), write(tmp_path / "source"))
    directory = registry.pull(ref())
    assert registry.pull(ref()) == directory
    registry.cache.release(directory)
    assert registry.cache.evict(room=10**12) == []
    registry.cache.release(directory)
    assert registry.cache.evict(room=10**12) == [directory]


def _hold(config: StorageConfig, ready: Path) -> None:
    Registry.open(config).pull(ref("v0"))
    ready.touch()
    time.sleep(60)


def test_eviction_spares_what_another_process_uses(config: StorageConfig, tmp_path: Path) -> None:
    small = config.model_copy(update={"cache_gb": 15_000 / 1e9})
    registry = Registry.open(small)
    for number in range(3):
        registry.publish(ref(f"v{number}"), write(tmp_path / str(number), {"f": bytes([number]) * 10_000}))
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(small, tmp_path / "ready"))
    process.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    held = next(Path(small.cache_dir).glob("artifacts/models/ja/v0.*"))
    registry.pull(ref("v1"))
    assert held.exists()
    process.kill()
    process.join()
    registry.pull(ref("v2"))
    assert not held.exists()


def test_what_a_killed_download_left_is_removed_after_a_day(config: StorageConfig, tmp_path: Path) -> None:
    registry = Registry.open(config)
    registry.publish(ref(), write(tmp_path / "source"))
    building = Path(config.cache_dir) / "building"
    for name, age in (("old", 90_000), ("young", 10)):
        write(building / name, {"f": b"x"})
        os.utime(building / name, (time.time() - age,) * 2)
    registry.pull(ref())
    assert [path.name for path in building.iterdir()] == ["young"]


def test_diff(config: StorageConfig, tmp_path: Path) -> None:
    registry = Registry.open(config)
    recipe = {"train": [{"lr": 1.0, "steps": 3}], "name": "r"}
    one = registry.publish(
        ref("v1"), write(tmp_path / "one"), recipe=recipe, fingerprint="d1", metrics={"nDCG@10": 0.4}
    )
    other = {"train": [{"lr": 2.0, "steps": 3}, {"lr": 1.0}], "name": "r"}
    two = registry.publish(
        ref("v2"),
        write(tmp_path / "two", {"model.bin": FILES["model.bin"], "new": b"x", "config.json": b"[]"}),
        recipe=other,
        fingerprint="d2",
        metrics={"nDCG@10": 0.5},
        parents=[Parent(ref("v1"), 0.5)],
    )
    found = {(change.section, change.key): (change.before, change.after) for change in diff(one, two)}
    assert set(found) == {
        ("files", "config.json"),
        ("files", "new"),
        ("files", "deep/er/日本語.txt"),
        ("parents", "models/ja@v1"),
        ("metrics", "nDCG@10"),
        ("recipe", "train.0.lr"),
        ("recipe", "train.1.lr"),
        ("data", "fingerprint"),
    }
    assert found["recipe", "train.0.lr"] == (1.0, 2.0)
    assert found["parents", "models/ja@v1"] == (None, 0.5)
    assert found["files", "new"][0] is None
    assert found["files", "deep/er/日本語.txt"][1] is None
    assert diff(one, one) == []
