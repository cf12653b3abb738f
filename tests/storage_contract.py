"""What every storage backend must do; the local and the S3 tests run this same class.

A subclass has a fixture ``store`` that opens an empty store.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.storage import ObjectStore
from colbert_core.errors import ObjectNotFound, PreconditionFailed, StorageError
from tests.races import winners

# Above the size that S3 uploads in one piece, and no multiple of a part.
LARGE = (33 << 20) + 12_345


class StorageContract:
    """The semantics that registry and jobs rely on."""

    def test_bytes_come_back(self, store: ObjectStore) -> None:
        for key, data in (("a", b""), ("b/c.bin", bytes(range(256)) * 33), ("日本語/ファイル 1.txt", b"x")):
            etag = store.put(key, data)
            assert store.get(key) == data
            assert store.get_with_etag(key) == (data, etag)
            info = store.head(key)
            assert (info.key, info.size, info.etag) == (key, len(data), etag)
            assert abs(datetime.now(timezone.utc) - info.modified) < timedelta(minutes=5)

    def test_missing_objects_are_typed_and_named(self, store: ObjectStore) -> None:
        store.put("folder/file", b"x")
        for key in ("none", "folder", "folder/none", "folder/file/below"):
            assert not store.exists(key)
            reads = (
                *(store.get, store.head, store.open, lambda key: store.get_range(key, 0, 1)),
                lambda key: store.read_into(key, 0, memoryview(bytearray(1))),
            )
            for read in reads:
                with pytest.raises(ObjectNotFound, match=key):
                    read(key)
        assert store.exists("folder/file")

    @pytest.mark.parametrize(
        "key",
        ["", "/a", "a/", "a//b", "../a", "a/../b", "a/..", "./a", "a\\b", "a\nb", ".store/x", "x" * 300],
    )
    def test_bad_keys_are_refused(self, store: ObjectStore, key: str, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"x")
        for use in (
            store.get,
            store.head,
            store.delete,
            store.open,
            lambda key: store.get_range(key, 0, 1),
            lambda key: store.put(key, b"x"),
            lambda key: store.upload(key, tmp_path / "file"),
        ):
            with pytest.raises(StorageError) as caught:
                use(key)
            assert not isinstance(caught.value, ObjectNotFound)
            assert repr(key[:80])[:-1] in str(caught.value) or not key

    def test_prefixes_that_climb_are_refused(self, store: ObjectStore) -> None:
        for prefix in ("../", "a/../", "/", "a//"):
            with pytest.raises(StorageError, match="bad key"):
                list(store.list(prefix))

    def test_ranges(self, store: ObjectStore) -> None:
        data = bytes(range(100))
        store.put("r", data)
        for start, length in ((0, 1), (10, 20), (99, 1), (90, 50), (0, 1000), (100, 5), (1000, 5), (5, 0)):
            assert store.get_range("r", start, length) == data[start : start + length]
            buffer = bytearray(length)
            count = store.read_into("r", start, memoryview(buffer))
            assert buffer[:count] == data[start : start + length]
            assert not any(buffer[count:])
            digest = hashlib.sha256(buffer[:count]).hexdigest()
            assert store.read_hashed("r", start, memoryview(bytearray(length))) == (count, digest)
        for start, length in ((-1, 2), (0, -1)):
            with pytest.raises(ValueError, match="range"):
                store.get_range("r", start, length)
        store.put("empty", b"")
        assert store.get_range("empty", 0, 10) == b""
        assert store.read_into("empty", 0, memoryview(bytearray(10))) == 0
        nothing = hashlib.sha256().hexdigest()
        assert store.read_hashed("empty", 0, memoryview(bytearray(10))) == (0, nothing)
        with pytest.raises(ValueError, match="range"):
            store.read_into("r", -1, memoryview(bytearray(2)))

    def test_many_buffers_are_filled_at_once(self, store: ObjectStore) -> None:
        data = os.urandom(9_000_000)
        store.put("large", data)

        def read(start: int) -> bool:
            buffer = bytearray(3_000_000)
            count, digest = store.read_hashed("large", start, memoryview(buffer))
            return (count, buffer, digest) == (
                3_000_000,
                data[start : start + 3_000_000],
                hashlib.sha256(buffer).hexdigest(),
            )

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(read, range(0, 6_000_000, 700_000)))

    def test_reader_seeks(self, store: ObjectStore) -> None:
        data = os.urandom(700_000)
        store.put("s", data)
        with store.open("s") as stream:
            assert stream.read(10) == data[:10]
            assert stream.seek(600_000) == 600_000
            assert stream.read(10) == data[600_000:600_010]
            assert stream.seek(-5, io.SEEK_END) == len(data) - 5
            assert stream.read() == data[-5:]
            assert stream.read() == b""
            stream.seek(0)
            assert stream.read() == data

    def test_listing_is_sorted_and_filtered(self, store: ObjectStore) -> None:
        keys = ["a-b", "a/b", "a/b-c/d", "a/b/c", "a.txt", "ab", "b/1", "b/10", "b/2", "あ/x", "a/é"]
        keys.remove("a/b")  # a local file cannot be a folder as well
        for key in keys:
            store.put(key, key.encode())
        for prefix in ("", "a", "a/", "a/b", "b/1", "あ", "none/", "c"):
            expected = sorted((key for key in keys if key.startswith(prefix)), key=str.encode)
            assert [info.key for info in store.list(prefix)] == expected
        assert {info.key: info.size for info in store.list()} == {key: len(key.encode()) for key in keys}
        assert store.list_folders() == ["a", "b", "あ"]
        assert store.list_folders("a/") == ["b", "b-c"]
        assert store.list_folders("none/") == []

    def test_delete(self, store: ObjectStore) -> None:
        store.put("d/e/f", b"x")
        store.delete("d/e/f")
        store.delete("d/e/f")
        store.delete("never/there")
        assert not store.exists("d/e/f")
        assert list(store.list()) == []
        store.put("d", b"a folder that has been emptied leaves its name free")

    def test_overwriting_changes_the_etag(self, store: ObjectStore) -> None:
        first = store.put("o", b"1")
        second = store.put("o", b"2")
        assert first != second == store.head("o").etag

    def test_put_if_absent(self, store: ObjectStore) -> None:
        store.put("k", b"first", if_absent=True)
        with pytest.raises(PreconditionFailed, match="k"):
            store.put("k", b"second", if_absent=True)
        assert store.get("k") == b"first"
        store.delete("k")
        store.put("k", b"third", if_absent=True)
        assert store.get("k") == b"third"

    def test_compare_and_swap(self, store: ObjectStore) -> None:
        first = store.put("k", b"1")
        second = store.put("k", b"2", if_match=first)
        with pytest.raises(PreconditionFailed, match="k"):
            store.put("k", b"3", if_match=first)
        assert store.get("k") == b"2"
        store.put("k", b"4", if_match=second)
        store.delete("k")
        with pytest.raises(PreconditionFailed, match="k"):
            store.put("k", b"5", if_match=second)
        assert not store.exists("k")
        with pytest.raises(ValueError, match="exclude"):
            store.put("k", b"6", if_absent=True, if_match=second)

    def test_one_of_many_creators_wins(self, store: ObjectStore) -> None:
        def create(number: int) -> None:
            store.put("race", str(number).encode(), if_absent=True)

        won = winners(create, 16, PreconditionFailed)
        assert len(won) == 1
        assert store.get("race") == str(won[0]).encode()

    def test_no_increment_is_lost(self, store: ObjectStore) -> None:
        store.put("count", b"0")

        def increment(_: int) -> None:
            while True:
                data, etag = store.get_with_etag("count")
                try:
                    store.put("count", str(int(data) + 1).encode(), if_match=etag)
                    return
                except PreconditionFailed:
                    continue

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(increment, range(24)))
        assert store.get("count") == b"24"

    def test_large_upload(self, store: ObjectStore, tmp_path: Path) -> None:
        local = tmp_path / "large"
        local.write_bytes(os.urandom(LARGE))
        expected = hashlib.sha256(local.read_bytes()).hexdigest()
        store.upload("large", local, if_absent=True)
        assert store.head("large").size == LARGE
        assert store.sha256("large") == expected
        assert store.get_range("large", LARGE - 7, 100) == local.read_bytes()[-7:]
        local.write_bytes(b"other" + local.read_bytes())
        with pytest.raises(PreconditionFailed, match="large"):
            store.upload("large", local, if_absent=True)
        assert store.sha256("large") == expected
        store.upload("large", local)
        assert store.sha256("large") == hashlib.sha256(local.read_bytes()).hexdigest()
        assert store.abort_uploads(datetime.now(timezone.utc) + timedelta(hours=1)) == []

    def test_download(self, store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        content = os.urandom(LARGE)
        (tmp_path / "source").write_bytes(content)
        store.upload("large", tmp_path / "source")
        for large in (1 << 40, 1 << 20):  # in one stream, and in parallel parts
            monkeypatch.setattr("cluster.storage.api._LARGE_BYTES", large)
            store.download("large", tmp_path / "target")
            assert (tmp_path / "target").read_bytes() == content
        with pytest.raises(ObjectNotFound, match="none"):
            store.download("none", tmp_path / "none")

    def test_one_of_many_uploaders_wins(self, store: ObjectStore, tmp_path: Path) -> None:
        files = [tmp_path / str(number) for number in range(4)]
        for number, file in enumerate(files):
            file.write_bytes(bytes([number]) * 9_000_000)

        def upload(number: int) -> None:
            store.upload("race", files[number], if_absent=True)

        won = winners(upload, 4, PreconditionFailed)
        assert len(won) == 1
        assert store.get("race") == files[won[0]].read_bytes()
        later = datetime.now(timezone.utc) + timedelta(hours=1)
        assert store.abort_uploads(later) == [], "the losers must clean up"

    def test_upload_of_a_missing_file(self, store: ObjectStore, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="nowhere"):
            store.upload("k", tmp_path / "nowhere")
        assert not store.exists("k")

    def test_stores_travel_to_other_processes(self, store: ObjectStore) -> None:
        store.put("k", b"x")
        assert pickle.loads(pickle.dumps(store)).get("k") == b"x"  # noqa: S301

    def test_arrow_sees_the_same_objects(self, store: ObjectStore) -> None:
        store.put("t/part 1.bin", b"content")
        filesystem, base = store.arrow()
        with filesystem.open_input_file(f"{base}/t/part 1.bin") as stream:
            assert stream.read() == b"content"
        filesystem.create_dir(f"{base}/t2")
        with filesystem.open_output_stream(f"{base}/t2/written") as stream:
            stream.write(b"by arrow")
        assert store.get("t2/written") == b"by arrow"
