"""Reading a version: names, parts, and what damage does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.manifest import BLOCK_BYTES, seal, unseal
from cluster.registry import Registry
from colbert_core.errors import ArtifactNotFound, IntegrityError, SchemaVersionError
from tests.registry_contract.artifacts import FILES, contents, flip, ref, write


class ReadingContract:
    """What is read is what was published, or an error."""

    def test_resolve_names_what_there_is(self, registry: Registry, source: Path) -> None:
        registry.publish(ref("v1"), source)
        registry.promote(ref("v1"), "production")
        assert registry.resolve("models", "ja@v1") == ref("v1")
        assert registry.resolve("models", "ja@production") == ref("v1")
        assert registry.resolve("models", "models/ja@production") == ref("v1")
        with pytest.raises(ArtifactNotFound, match="v1, production"):
            registry.resolve("models", "ja@v9")
        with pytest.raises(ArtifactNotFound, match="nothing is published"):
            registry.resolve("models", "other@v1")
        with pytest.raises(ArtifactNotFound, match="KIND/NAME@VERSION"):
            registry.resolve("models", "ja")

    def test_some_files_only(self, registry: Registry, source: Path) -> None:
        registry.publish(ref(), source)
        some = registry.pull(ref(), paths=["config.json"])
        assert contents(some) == {"config.json": FILES["config.json"]}
        assert contents(registry.pull(ref())) == FILES
        assert contents(some) == {"config.json": FILES["config.json"]}
        with pytest.raises(ArtifactNotFound, match=r"no file 'none'.*config\.json"):
            registry.pull(ref(), paths=["none"])

    def test_open_file_reads_ranges(self, registry: Registry, tmp_path: Path) -> None:
        large = os.urandom(20_000_000)
        files = {"large": large, "small": b"0123456789", "empty": b"", "exact": bytes(BLOCK_BYTES)}
        registry.publish(ref(), write(tmp_path / "ranges", files))
        manifest = registry.manifest(ref())
        assert [len(manifest.files[path].blocks) for path in sorted(files)] == [0, 0, 3, 0]
        with registry.open_file(ref(), "large") as stream:
            for start, length in ((16_777_210, 20), (8_388_600, 9_000_000), (0, 5), (19_999_990, 100)):
                stream.seek(start)
                assert stream.read(length) == large[start : start + length]
            assert stream.seek(-3, os.SEEK_END) == len(large) - 3
            assert stream.read() == large[-3:]
            stream.seek(0)
            assert stream.read() == large
        for path in ("small", "empty", "exact"):
            with registry.open_file(ref(), path) as stream:
                assert stream.read() == files[path]
        with pytest.raises(ArtifactNotFound, match="none"):
            registry.open_file(ref(), "none")

    @pytest.mark.parametrize("damage", ["flip", "cut", "extend", "delete", "swap"])
    def test_damage_is_found_and_nothing_is_installed(
        self, registry: Registry, config: StorageConfig, source: Path, damage: str
    ) -> None:
        registry.publish(ref(), source)
        key = "models/ja/v1/files/model.bin"
        data = registry.store.get(key)
        if damage == "flip":
            flip(registry, key)
        elif damage == "cut":
            registry.store.put(key, data[:-1])
        elif damage == "extend":
            registry.store.put(key, data + b"x")
        elif damage == "delete":
            registry.store.delete(key)
        else:
            registry.store.put(key, bytes(len(data)))
        with pytest.raises(IntegrityError, match=r"models/ja/v1/files/model\.bin"):
            registry.pull(ref())
        cache = Path(config.cache_dir)
        assert not list(cache.glob("artifacts/*/*/*"))
        assert not list(cache.glob("building/*"))
        assert all(path.stat().st_size < 1000 for path in cache.glob("blobs/*"))
        (problem,) = registry.verify(ref())
        assert "models/ja/v1/files/model.bin" in problem
        assert contents(registry.pull(ref(), paths=["config.json"])) == {"config.json": b"{}"}
        registry.store.put(key, data)
        assert contents(registry.pull(ref())) == FILES

    def test_open_file_finds_damage_where_it_reads(self, registry: Registry, tmp_path: Path) -> None:
        large = os.urandom(20_000_000)
        registry.publish(ref(), write(tmp_path / "large", {"large": large, "small": b"0123456789"}))
        flip(registry, "models/ja/v1/files/large")
        with registry.open_file(ref(), "large") as stream:
            assert stream.read(BLOCK_BYTES) == large[:BLOCK_BYTES]
            with pytest.raises(IntegrityError, match=r"files/large.*bytes 8388608 to 16777216"):
                stream.read(1)
            stream.seek(2 * BLOCK_BYTES)
            assert stream.read() == large[2 * BLOCK_BYTES :]
        for damaged in (b"012345678", b"012345678x"):
            registry.store.put("models/ja/v1/files/small", damaged)
            with registry.open_file(ref(), "small") as stream, pytest.raises(IntegrityError, match="small"):
                stream.read()
        registry.store.delete("models/ja/v1/files/small")
        with (
            registry.open_file(ref(), "small") as stream,
            pytest.raises(IntegrityError, match=r"small.*missing"),
        ):
            stream.read()

    def test_a_manifest_without_block_digests_is_read_through_the_cache(
        self, registry: Registry, tmp_path: Path
    ) -> None:
        large = os.urandom(BLOCK_BYTES + 1)
        manifest = registry.publish(ref(), write(tmp_path / "large", {"large": large}))
        entry = manifest.files["large"].model_copy(update={"blocks": ()})
        older = manifest.model_copy(update={"files": {"large": entry}})
        registry.store.put("models/ja/v1/manifest.json", older.to_bytes())
        with registry.open_file(ref(), "large") as stream:
            stream.seek(BLOCK_BYTES)
            assert stream.read() == large[BLOCK_BYTES:]
        short = older.model_copy(
            update={"files": {"large": entry.model_copy(update={"blocks": ("0" * 64,)})}}
        )
        registry.store.put("models/ja/v1/manifest.json", short.to_bytes())
        with pytest.raises(IntegrityError, match="do not cover"):
            registry.open_file(ref(), "large")

    def test_damaged_records_are_found(self, registry: Registry, source: Path) -> None:
        registry.publish(ref(), source, metrics={"nDCG@10": 0.5})
        registry.promote(ref(), "production")
        manifest, alias = "models/ja/v1/manifest.json", "models/ja/aliases/production.json"
        for key, read in (
            (manifest, lambda: registry.pull(ref())),
            (alias, lambda: registry.resolve("models", "ja@production")),
        ):
            data = registry.store.get(key)
            tampered = data.replace(b"0.5", b"0.9").replace(b'"promote"', b'"rollback"')
            foreign = seal({"schema_version": 1, "hello": "world"})
            for damaged in (
                tampered,
                data[: len(data) // 2],
                b"",
                b"[1]",
                b"\xff\xfe",
                b'{"a": NaN}',
                foreign,
            ):
                registry.store.put(key, damaged)
                with pytest.raises(IntegrityError, match=key):
                    read()
            newer = unseal(data, key) | {"schema_version": 2, "field": "unknown"}
            registry.store.put(key, seal(newer))
            with pytest.raises(SchemaVersionError, match=key):
                read()
            registry.store.put(key, data)
        assert contents(registry.pull(ref())) == FILES

    def test_listing_tells_of_records_that_cannot_be_read(self, registry: Registry, source: Path) -> None:
        for version in ("v1", "v2", "v3"):
            registry.publish(ref(version), source)
        registry.publish(ref("v1", name="other"), source)
        registry.staging(ref("unfinished")).upload("a", source / "config.json")
        newer = unseal(registry.store.get("models/ja/v3/manifest.json"), "") | {"schema_version": 2}
        registry.store.put("models/ja/v3/manifest.json", seal(newer))
        flip(registry, "models/ja/v2/manifest.json")
        registry.store.put("models/ja/.hidden/manifest.json", b"{}")
        found = registry.manifests("models", "ja")
        assert [str(each) for each in found] == ["models/ja@v1", "models/ja@v2", "models/ja@v3"]
        assert found[ref("v1")] == registry.manifest(ref("v1"))
        assert isinstance(found[ref("v2")], IntegrityError)
        assert isinstance(found[ref("v3")], SchemaVersionError)
        assert registry.manifests("models").keys() == found.keys() | {ref("v1", name="other")}
        assert registry.manifests("indexes") == registry.manifests("models", "nobody") == {}

    def test_a_manifest_of_another_version_is_refused(self, registry: Registry, source: Path) -> None:
        registry.publish(ref("v1"), source)
        registry.store.put("models/ja/v2/manifest.json", registry.store.get("models/ja/v1/manifest.json"))
        with pytest.raises(IntegrityError, match="manifest of models/ja@v1"):
            registry.pull(ref("v2"))

    @pytest.mark.parametrize("path", ["../../escaped", "/tmp/escaped", "a/../../escaped"])
    def test_a_forged_manifest_cannot_write_elsewhere(
        self, registry: Registry, source: Path, path: str
    ) -> None:
        manifest = registry.publish(ref(), source).model_dump(mode="json")
        entry = manifest["files"]["config.json"]
        for forged in (
            manifest | {"files": {path: entry}},
            manifest | {"files": {"config.json": entry | {"key": path}}},
        ):
            registry.store.put("models/ja/v1/manifest.json", seal(forged))
            with pytest.raises(IntegrityError, match=r"models/ja/v1/manifest\.json"):
                registry.pull(ref())
