"""Published files in ranges: every byte checked, every block fetched once."""

from __future__ import annotations

import pickle
import threading
from collections import Counter
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster import manifest, published_model, verified_reader
from cluster.artifacts import ArtifactRef
from cluster.config import StorageConfig
from cluster.published_model import KeptBlocks, PublishedFile, published_models
from cluster.registry import Registry
from cluster.storage import LocalStore
from colbert_core import mean_plan
from colbert_core.errors import ArtifactNotFound, IntegrityError
from colbert_core.mean_plan import MeanPlan
from colbert_core.model_files import LocalFile, local_model, read_range

BLOCK = 4096
REF = ArtifactRef("models", "ja", "v1")
CONTENT = bytes(range(256)) * 100  # six blocks and a quarter


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifest, published_model, verified_reader, mean_plan):
        monkeypatch.setattr(module, "BLOCK_BYTES", BLOCK)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[tuple[str, int]]]:
    """How often each block was read from storage, by the file's name and the offset."""
    counted: Counter[tuple[str, int]] = Counter()
    lock, read = threading.Lock(), LocalStore.read_into

    def counting(self: LocalStore, key: str, start: int, buffer: memoryview) -> int:
        with lock:
            counted[key.removeprefix("models/ja/"), start] += 1
        return read(self, key, start, buffer)

    monkeypatch.setattr(LocalStore, "read_into", counting)
    yield counted


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.open(StorageConfig(root=str(tmp_path / "root"), cache_dir=str(tmp_path / "cache")))


def publish(registry: Registry, folder: Path, ref: ArtifactRef = REF) -> dict[str, LocalFile]:
    registry.publish(ref, folder)
    return {path: file for path, file in published_models(registry, [ref])[0].items()}  # type: ignore[misc]


def test_ranges_are_the_file_s_bytes(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m" / "deep").mkdir(parents=True)
    (tmp_path / "m" / "large").write_bytes(CONTENT)
    (tmp_path / "m" / "deep" / "small").write_bytes(b"0123456789")
    (tmp_path / "m" / "empty").write_bytes(b"")
    files = publish(registry, tmp_path / "m")
    local = local_model(tmp_path / "m")
    assert files.keys() == local.keys()
    for path, file in files.items():
        assert (file.size, file.sha256) == (local[path].size, local[path].sha256)
        assert str(file) == f"{REF}/{path}"
    for start, length in (
        (0, 10),
        (BLOCK - 1, 2),
        (0, BLOCK),
        (5, 4 * BLOCK),
        (0, 99_999),
        (25_599, 5),
        (25_600, 1),
    ):
        assert read_range(files["large"], start, length) == CONTENT[start : start + length]
    assert read_range(files["deep/small"], 3, 4) == b"3456"
    assert read_range(files["empty"], 0, 4) == b""
    with pytest.raises(IntegrityError, match=r"large: has 25600 bytes"):
        files["large"].read_into(25_599, memoryview(bytearray(2)))
    travelled = pickle.loads(pickle.dumps(files["large"]))  # noqa: S301
    assert read_range(travelled, 100, 5000) == CONTENT[100:5100]
    with pytest.raises(ArtifactNotFound):
        published_models(registry, [ArtifactRef("models", "ja", "v9")])


def test_damage_is_found_in_the_block_that_is_read(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "large").write_bytes(CONTENT)
    file = publish(registry, tmp_path / "m")["large"]
    key = "models/ja/v1/files/large"
    damaged = bytearray(CONTENT)
    damaged[BLOCK + 7] ^= 1
    registry.store.put(key, bytes(damaged))
    assert read_range(file, 0, BLOCK) == CONTENT[:BLOCK]
    for start, length in ((BLOCK, BLOCK), (BLOCK + 100, 5), (10, 2 * BLOCK)):
        with pytest.raises(IntegrityError, match=r"files/large.*bytes 4096 to 8192 do not match"):
            read_range(file, start, length)
    registry.store.put(key, CONTENT[:BLOCK])
    with pytest.raises(IntegrityError, match="bytes 8192 to 12288 do not match"):
        read_range(file, 2 * BLOCK, 5)
    registry.store.delete(key)
    with pytest.raises(IntegrityError, match="missing"):
        read_range(file, 3 * BLOCK, 5)


@pytest.mark.parametrize("inputs", [2, 4, 10])
def test_a_mean_fetches_every_block_once(
    registry: Registry, tmp_path: Path, reads: Counter[tuple[str, int]], inputs: int
) -> None:
    """Also where the headers have different lengths, so that no border of blocks falls together."""
    files = []
    for number in range(inputs):
        folder = tmp_path / str(number)
        folder.mkdir()
        generator = torch.Generator().manual_seed(number)
        tensors = {name: torch.randn(3000, generator=generator) for name in "abc"}
        save_file(tensors, folder / "w.safetensors", metadata={"note": "x" * (24 * number)})
        ref = ArtifactRef("models", "ja", f"v{number}")
        files.append(publish(registry, folder, ref)["w.safetensors"])
    reads.clear()
    plan = MeanPlan.of(files, [1.0] * inputs)
    assert sum(piece.read for piece in plan.pieces(ahead=3)) == inputs * 3 * 3000 * 4
    assert len(reads) == inputs * 9
    assert set(reads.values()) == {1}


def test_only_a_few_blocks_are_kept() -> None:
    fetched: list[int] = []

    def ask(number: int, wanted: int) -> None:
        def fetch() -> bytearray:
            fetched.append(number)
            return bytearray(10)

        kept.get("f", number, 10, wanted, fetch)

    kept = KeptBlocks()
    for number in range(20):
        ask(number, 4)
    for number in range(19, -1, -1):
        ask(number, 6)
    assert fetched == [*range(20), *range(9, -1, -1)]
    assert kept._blocks == {} and kept._left == {}, "what was read to its end is let go"


def test_the_parts_of_a_block_may_be_asked_for_in_any_order() -> None:
    """Which of two threads comes first is chance."""
    fetched: list[int] = []

    def fetch() -> bytearray:
        fetched.append(0)
        return bytearray(10)

    for parts in permutations((1, 3, 6)):
        kept = KeptBlocks()
        for wanted in parts:
            kept.get("f", 0, 10, wanted, fetch)
        assert len(fetched) == 1 and kept._blocks == {}
        fetched.clear()


def test_a_failed_fetch_is_no_block() -> None:
    kept = KeptBlocks()

    def fail() -> bytearray:
        raise IntegrityError("damaged")

    with pytest.raises(IntegrityError):
        kept.get("f", 0, 10, 4, fail)
    assert kept.get("f", 0, 10, 4, lambda: bytearray(b"x")) == b"x"


def test_large_files_without_block_digests_are_pulled(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "large").write_bytes(CONTENT)
    published = registry.publish(REF, tmp_path / "m")
    entry = published.files["large"].model_copy(update={"blocks": ()})
    older = published.model_copy(update={"files": {"large": entry}})
    registry.store.put("models/ja/v1/manifest.json", older.to_bytes())
    file = published_models(registry, [REF])[0]["large"]
    assert isinstance(file, LocalFile) and not isinstance(file, PublishedFile)
    assert read_range(file, 4000, 5000) == CONTENT[4000:9000]
