"""Resume states in storage: visible when complete, checked when read, trimmed by policy."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest

from cluster.checkpoints import BackgroundSave, RunCheckpoints
from cluster.config import StorageConfig
from cluster.storage import ObjectStore, open_store
from colbert_core.errors import IntegrityError, StorageError


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return open_store(StorageConfig(root=str(tmp_path / "store")))


def part(folder: Path, rank: int, content: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"state-{rank:05d}-00000.safetensors"
    path.write_text(content)
    return [path]


def save(
    checkpoints: RunCheckpoints, step: int, folder: Path, *, attempt: str = "a", workers: int = 2
) -> None:
    for rank in range(workers):
        files = part(folder / f"{step}-{attempt}-{rank}", rank, f"{attempt} {step} {rank}")
        checkpoints.upload(step, attempt, rank, files)
    checkpoints.commit(step, attempt, workers, "fp", {"tuples_seen": step * 8})


def test_a_committed_state_comes_back_whole(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r")
    assert checkpoints.latest() is None
    save(checkpoints, 40, tmp_path)
    saved = checkpoints.latest()
    assert saved is not None
    assert (saved.step, saved.workers, saved.fingerprint, saved.counters) == (
        40,
        2,
        "fp",
        {"tuples_seen": 320},
    )
    target = tmp_path / "target"
    target.mkdir()
    checkpoints.download(saved, target)
    assert sorted(path.read_text() for path in target.iterdir()) == ["a 40 0", "a 40 1"]


def test_an_unfinished_save_leaves_the_one_before(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r")
    save(checkpoints, 40, tmp_path)
    checkpoints.upload(80, "a", 0, part(tmp_path / "80", 0, "half"))
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.step == 40
    # One rank of two has uploaded: committing is refused, nothing becomes visible.
    with pytest.raises(StorageError, match="part-00001"):
        checkpoints.commit(80, "a", 2, "fp", {})
    assert checkpoints.steps() == [40]


def test_attempts_do_not_touch_each_other(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r")
    checkpoints.upload(40, "dead", 0, part(tmp_path / "dead", 0, "of a killed run"))
    save(checkpoints, 40, tmp_path, attempt="first")
    save(checkpoints, 40, tmp_path, attempt="second")
    checkpoints.upload(40, "dead", 1, part(tmp_path / "dead", 1, "late"))
    saved = checkpoints.latest()
    assert saved is not None
    assert saved.attempt == "first"
    target = tmp_path / "target"
    target.mkdir()
    checkpoints.download(saved, target)
    assert {path.read_text() for path in target.iterdir()} == {"first 40 0", "first 40 1"}


def test_damage_is_found(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r")
    save(checkpoints, 40, tmp_path)
    saved = checkpoints.latest()
    assert saved is not None
    key = f"runs/r/step-00000040/a/{next(iter(saved.files))}"
    store.put(key, b"other bytes")
    with pytest.raises(IntegrityError, match="does not match"):
        checkpoints.download(saved, tmp_path)
    store.delete(key)
    with pytest.raises(IntegrityError, match="is missing"):
        checkpoints.download(saved, tmp_path)
    manifest = "runs/r/step-00000040/manifest.json"
    store.put(manifest, store.get(manifest).replace(b"320", b"321"))
    with pytest.raises(IntegrityError, match="manifest"):
        checkpoints.latest()


def test_trimming_keeps_the_last_and_what_is_being_written(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r", keep_last=2)
    for step in (40, 80, 120, 160):
        if step == 120:
            checkpoints.upload(100, "dead", 0, part(tmp_path / "100", 0, "never finished"))
        save(checkpoints, step, tmp_path)
    checkpoints.upload(200, "a", 0, part(tmp_path / "200", 0, "on its way"))
    store.put("runs/r/log/00000001-00000040.jsonl", b"")
    store.put("runs/r2/step-00000040/manifest.json", b"of another run")
    checkpoints.trim()
    assert checkpoints.steps() == [120, 160]
    folders = {item.key.split("/")[2] for item in store.list("runs/r/")}
    assert folders == {"step-00000120", "step-00000160", "step-00000200", "log"}
    assert store.exists("runs/r2/step-00000040/manifest.json")


def test_trimming_also_keeps_every_so_many_steps(store: ObjectStore, tmp_path: Path) -> None:
    checkpoints = RunCheckpoints(store, "r", keep_last=1, keep_every=120)
    for step in range(40, 320, 40):
        save(checkpoints, step, tmp_path)
        checkpoints.trim()
    assert checkpoints.steps() == [120, 240, 280]


class Slow(RunCheckpoints):
    """Uploads wait until they are let go, or fail."""

    go = threading.Event()
    fail = False

    def upload(self, step: int, attempt: str, rank: int, files: list[Path]) -> None:  # type: ignore[override]
        assert self.go.wait(10)
        if self.fail:
            raise StorageError("storage is away")
        super().upload(step, attempt, rank, files)


def test_training_does_not_wait_for_an_upload(store: ObjectStore) -> None:
    slow = Slow(store, "r")
    slow.go.clear()
    background = BackgroundSave(slow, 0, "a")
    assert not background.running
    background.begin(40, lambda folder: part(folder, 0, "state"))
    assert (background.running, background.uploaded) == (True, False)
    slow.go.set()
    background.wait()
    assert (background.running, background.uploaded) == (False, True)
    assert slow.steps() == []
    background.commit(lambda: slow.commit(40, "a", 1, "fp", {}))
    background.wait()
    assert slow.steps() == [40]
    assert not background.uploaded
    assert background.saves == 1
    assert background.upload_s > 0
    background.close()


def test_a_failed_upload_is_raised(store: ObjectStore) -> None:
    slow = Slow(store, "r")
    slow.fail = True
    slow.go.set()
    background = BackgroundSave(slow, 0, "a")
    background.begin(40, lambda folder: part(folder, 0, "state"))
    with pytest.raises(StorageError, match="storage is away"):
        background.wait()
    with pytest.raises(StorageError, match="storage is away"):
        _ = background.uploaded
    background.close()


def test_a_state_that_cannot_be_written_leaves_nothing_behind(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def write(folder: Path) -> list[Path]:
        part(folder, 0, "half")
        raise OSError("no space left")

    background = BackgroundSave(RunCheckpoints(store, "r"), 0, "a")
    with pytest.raises(OSError, match="no space left"):
        background.begin(40, write)
    assert list(tmp_path.glob("raycolbert-state-*")) == []
    background.close()
