"""What the registry must do on every storage backend; the local and the S3 tests run this same class.

A subclass has a fixture ``config`` that names an empty storage with a cache directory of its own.
"""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.artifacts import ArtifactRef
from cluster.config import StorageConfig
from cluster.manifest import BLOCK_BYTES, Manifest, seal, unseal
from cluster.registry import Parent, Registry
from cluster.registry_gc import collect
from colbert_core.errors import (
    ArtifactNotFound,
    IntegrityError,
    PreconditionFailed,
    RaycolbertError,
    SchemaVersionError,
    StorageError,
    VersionExists,
)

FILES = {"model.bin": bytes(range(256)) * 5000, "config.json": b"{}", "deep/er/日本語.txt": "本文".encode()}


def ref(version: str = "v1", kind: str = "models", name: str = "ja") -> ArtifactRef:
    """A version of the tests' model."""
    return ArtifactRef(kind, name, version)  # type: ignore[arg-type]


def write(directory: Path, files: Mapping[str, bytes] = FILES) -> Path:
    """A directory with these files and no others."""
    for path, content in files.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(content)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """All files of a directory."""
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def flip(registry: Registry, key: str) -> None:
    """Flips one bit in the middle of a stored object."""
    data = bytearray(registry.store.get(key))
    data[len(data) // 2] ^= 1
    registry.store.put(key, bytes(data))


KILLED_PUBLISH = """
import sys, os
from pathlib import Path
from cluster.config import StorageConfig
from cluster.registry import ArtifactRef, Registry
import cluster.staging

registry = Registry.open(StorageConfig.model_validate_json(sys.argv[1]))
# Dies as by SIGKILL after the files and before the manifest.
cluster.staging.StagedArtifact.finish = lambda *a, **k: os._exit(9)
registry.publish(ArtifactRef("models", "ja", "v1"), Path(sys.argv[2]))
"""


class RegistryContract:
    """Publishing, reading, aliases and collection."""

    @pytest.fixture
    def registry(self, config: StorageConfig) -> Registry:
        return Registry.open(config)

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write(tmp_path / "source")

    # -- publishing and reading ---------------------------------------------------------------------

    def test_what_is_published_comes_back(self, registry: Registry, source: Path) -> None:
        parent = Parent(ref("base"), 0.5)
        published = registry.publish(
            ref(),
            source,
            parents=[parent],
            recipe={"seed": 1, "nested": {"日本": [1, 2.5, None]}},
            fingerprint="abc",
            metrics={"nDCG@10": 0.123456789},
            extra={"steps": 3},
        )
        manifest = registry.manifest(ref())
        assert manifest == published
        assert manifest.ref == ref()
        assert manifest.parents == (parent,)
        assert manifest.recipe == {"seed": 1, "nested": {"日本": [1, 2.5, None]}}
        assert (manifest.data_fingerprint, manifest.metrics) == ("abc", {"nDCG@10": 0.123456789})
        assert manifest.created_at.utcoffset() is not None
        assert manifest.libraries["torch"]
        assert manifest.total_bytes == sum(map(len, FILES.values()))
        directory = registry.pull(ref())
        assert contents(directory) == FILES
        assert all(not path.stat().st_mode & stat.S_IWUSR for path in directory.rglob("*") if path.is_file())
        assert registry.versions("models", "ja") == ["v1"]
        assert registry.names("models") == ["ja"]
        assert registry.verify(ref()) == []
        keys = {info.key for info in registry.store.list("models/")}
        assert keys == {f"models/ja/v1/files/{path}" for path in FILES} | {"models/ja/v1/manifest.json"}

    def test_a_version_is_never_rewritten(self, registry: Registry, source: Path) -> None:
        registry.publish(ref(), source)
        before = {info.key: info.etag for info in registry.store.list()}
        (source / "config.json").write_bytes(b"changed")
        with pytest.raises(VersionExists, match="models/ja@v1"):
            registry.publish(ref(), source)
        with pytest.raises(VersionExists, match="models/ja@v1"):
            registry.staging(ref())
        assert {info.key: info.etag for info in registry.store.list()} == before

    def test_one_of_16_publishers_wins_with_its_own_content(self, registry: Registry, tmp_path: Path) -> None:
        shared = {"same": b"x" * 1000}
        sources = [write(tmp_path / str(n), shared | {"own": b"%d" % n * 5000}) for n in range(16)]

        def publish(number: int) -> int | None:
            try:
                registry.publish(ref(), sources[number], extra={"number": number})
            except VersionExists:
                return None
            return number

        with ThreadPoolExecutor(16) as pool:
            winners = [number for number in pool.map(publish, range(16)) if number is not None]
        assert len(winners) == 1
        assert registry.manifest(ref()).extra == {"number": winners[0]}
        assert contents(registry.pull(ref())) == shared | {"own": b"%d" % winners[0] * 5000}
        assert registry.verify(ref()) == []

    def test_large_files_of_racing_publishers_do_not_mix(self, registry: Registry, tmp_path: Path) -> None:
        sources = [write(tmp_path / str(n), {"own": bytes([n]) * 9_000_000}) for n in range(4)]

        def publish(number: int) -> bool:
            try:
                registry.publish(ref(), sources[number])
            except VersionExists:
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(publish, range(4)))
        assert sum(won) == 1
        assert contents(registry.pull(ref())) == {"own": bytes([won.index(True)]) * 9_000_000}

    def test_a_late_publisher_cannot_overwrite(self, registry: Registry, tmp_path: Path) -> None:
        late = registry.staging(ref())
        registry.publish(ref(), write(tmp_path / "first", {"own": b"first"}))
        with pytest.raises(VersionExists):
            late.upload("own", write(tmp_path / "late", {"own": b"late"}) / "own")
        with pytest.raises(VersionExists):
            late.commit()
        assert contents(registry.pull(ref())) == {"own": b"first"}

    def test_a_killed_publish_is_invisible_and_resumes(
        self, registry: Registry, config: StorageConfig, source: Path
    ) -> None:
        command = [sys.executable, "-c", KILLED_PUBLISH, config.model_dump_json(), str(source)]
        assert subprocess.run(command, check=False).returncode == 9
        uploaded = {info.key: info for info in registry.store.list("models/ja/v1/files/")}
        assert len(uploaded) == len(FILES)
        assert not registry.exists(ref())
        assert registry.versions("models", "ja") == [] == registry.names("models")
        with pytest.raises(ArtifactNotFound):
            registry.pull(ref())
        with pytest.raises(ArtifactNotFound):
            registry.resolve("models", "ja@v1")
        registry.publish(ref(), source)
        again = {info.key: info for info in registry.store.list("models/ja/v1/files/")}
        assert again == uploaded, "finished files must not be uploaded again"
        assert contents(registry.pull(ref())) == FILES

    def test_a_killed_publish_resumes_with_other_content(
        self, registry: Registry, config: StorageConfig, source: Path
    ) -> None:
        command = [sys.executable, "-c", KILLED_PUBLISH, config.model_dump_json(), str(source)]
        assert subprocess.run(command, check=False).returncode == 9
        changed = FILES | {"config.json": b'{"trained": "again"}'}
        registry.publish(ref(), write(source, changed))
        assert contents(registry.pull(ref())) == changed
        assert registry.manifest(ref()).files["config.json"].key is not None

    def test_empty_and_missing_directories_are_refused(self, registry: Registry, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for directory, message in ((tmp_path / "empty", "no files"), (tmp_path / "no", "not a directory")):
            with pytest.raises(StorageError, match=message):
                registry.publish(ref(), directory)

    def test_what_json_cannot_hold_is_refused(self, registry: Registry, source: Path) -> None:
        for bad in (float("nan"), float("inf"), object()):
            with pytest.raises(StorageError, match="models/ja@v1"):
                registry.publish(ref(), source, metrics={"loss": bad})
        assert not registry.exists(ref())

    @pytest.mark.parametrize("version", ["", "a/b", "..", "aliases", ".hidden", "a b", "x" * 201])
    def test_bad_names_are_refused(self, registry: Registry, source: Path, version: str) -> None:
        with pytest.raises(ArtifactNotFound, match="cannot be the version or alias"):
            registry.publish(ref(version), source)
        with pytest.raises(ArtifactNotFound, match="cannot be the name"):
            registry.publish(ref(name=version if version != "aliases" else "a\\b"), source)
        with pytest.raises(ArtifactNotFound, match="kind"):
            registry.exists(ref(kind="weights"))

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

    # -- damage -------------------------------------------------------------------------------------

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

    # -- staging ------------------------------------------------------------------------------------

    def test_staging_from_several_processes(self, registry: Registry, source: Path) -> None:
        staged = registry.staging(ref())
        travelled = pickle.loads(pickle.dumps(staged))  # noqa: S301
        staged.upload("model.bin", source / "model.bin")
        assert set(travelled.parts()) == {"model.bin"}
        travelled.upload("deep/er/日本語.txt", source / "deep/er/日本語.txt")
        long_path = "/".join(["very-long-part"] * 30)
        travelled.upload(long_path, source / "config.json")
        expected = ["model.bin", "deep/er/日本語.txt", long_path, "config.json"]
        with pytest.raises(StorageError, match=r"1 files are not uploaded: config\.json"):
            staged.commit(expected=expected)
        assert not registry.exists(ref())
        staged.upload("config.json", source / "config.json")
        manifest = staged.commit(expected=expected, metrics={"documents": 3})
        assert set(manifest.files) == set(expected)
        assert contents(registry.pull(ref())) == FILES | {long_path: FILES["config.json"]}
        assert not list(registry.store.list("models/ja/v1/.parts/"))
        with pytest.raises(VersionExists):
            travelled.commit()

    def test_staging_skips_what_is_done(self, registry: Registry, source: Path) -> None:
        first = registry.staging(ref()).upload("a", source / "model.bin")
        etag = registry.store.head("models/ja/v1/files/a").etag
        restarted = registry.staging(ref())
        assert restarted.parts() == {"a": first}
        assert restarted.upload("a", source / "model.bin") == first
        assert registry.store.head("models/ja/v1/files/a").etag == etag
        changed = restarted.upload("a", source / "config.json")
        assert changed.entry.sha256 != first.entry.sha256
        standing = restarted.upload("a", source / "model.bin", keep_existing=True)
        assert standing == changed
        restarted.commit()
        assert contents(registry.pull(ref())) == {"a": FILES["config.json"]}

    def test_staging_keeps_the_first_of_many(self, registry: Registry, tmp_path: Path) -> None:
        sources = [write(tmp_path / str(n), {"codec": b"%d" % n}) for n in range(8)]
        staged = registry.staging(ref())
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(lambda s: staged.upload("codec", s / "codec", keep_existing=True), sources))
        assert len({part.entry.sha256 for part in parts}) == 1
        assert staged.commit().files["codec"].sha256 == parts[0].entry.sha256
        assert registry.verify(ref()) == []

    def test_commit_sees_a_vanished_file(self, registry: Registry, source: Path) -> None:
        staged = registry.staging(ref())
        with pytest.raises(StorageError, match="no files at all"):
            staged.commit()
        staged.upload("a", source / "model.bin")
        staged.upload("b", source / "config.json")
        registry.store.delete("models/ja/v1/files/a")
        with pytest.raises(StorageError, match="1 files are not uploaded: a"):
            staged.commit()
        assert not registry.exists(ref())

    # -- aliases ------------------------------------------------------------------------------------

    def test_16_promotions_at_once_are_all_remembered(self, registry: Registry, source: Path) -> None:
        versions = [f"v{number:02}" for number in range(16)]
        for version in versions:
            registry.publish(ref(version), source / "deep")
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda v: registry.promote(ref(v), "production", by=f"by {v}"), versions))
        alias = registry.alias("models", "ja", "production")
        assert sorted(move.version for move in alias.history) == versions
        assert alias.version == alias.history[-1].version
        assert alias.history[0].previous is None
        for before, move in zip(alias.history, alias.history[1:], strict=False):
            assert move.previous == before.version
            assert move.at >= before.at
        assert all(move.by == f"by {move.version}" for move in alias.history)

    def test_rollback_walks_back(self, registry: Registry, source: Path) -> None:
        for version in ("v1", "v2", "v3"):
            registry.publish(ref(version), source / "deep")
            registry.promote(ref(version), "production")
        assert registry.rollback("models", "ja", "production").version == "v2"
        assert registry.rollback("models", "ja", "production", by="me").version == "v1"
        assert registry.resolve("models", "ja@production") == ref("v1")
        with pytest.raises(ArtifactNotFound, match="no version before v1"):
            registry.rollback("models", "ja", "production")
        registry.promote(ref("v3"), "production")
        assert registry.rollback("models", "ja", "production").version == "v1"
        history = registry.alias("models", "ja", "production").history
        assert [(m.action, m.version) for m in history[3:]] == [
            ("rollback", "v2"),
            ("rollback", "v1"),
            ("promote", "v3"),
            ("rollback", "v1"),
        ]
        with pytest.raises(ArtifactNotFound, match="does not exist"):
            registry.rollback("models", "ja", "staging")

    def test_promoting_again_is_no_step_of_a_rollback(self, registry: Registry, source: Path) -> None:
        for version in ("v1", "v2"):
            registry.publish(ref(version), source)
        for version in ("v1", "v2", "v2"):
            registry.promote(ref(version), "production")
        month = datetime.now(timezone.utc) + timedelta(days=31)
        assert collect(registry, now=month).garbage == [], "a rollback needs v1"
        assert registry.rollback("models", "ja", "production").version == "v1"
        with pytest.raises(ArtifactNotFound, match="no version before v1"):
            registry.rollback("models", "ja", "production")
        registry.promote(ref("v2"), "production")
        assert registry.rollback("models", "ja", "production").version == "v1"

    def test_promotion_conditions(self, registry: Registry, source: Path) -> None:
        registry.publish(ref("v1"), source / "deep")
        registry.publish(ref("v2"), source / "deep")
        with pytest.raises(ArtifactNotFound, match="v9"):
            registry.promote(ref("v9"), "production")
        with pytest.raises(PreconditionFailed, match="points to nothing, not to v1"):
            registry.promote(ref("v2"), "production", expected="v1")
        registry.promote(ref("v1"), "production")
        registry.promote(ref("v2"), "production", expected="v1")
        with pytest.raises(PreconditionFailed, match="points to v2, not to v1"):
            registry.promote(ref("v1"), "production", expected="v1")
        with pytest.raises(VersionExists, match="'v1'"):
            registry.promote(ref("v2"), "v1")
        with pytest.raises(VersionExists, match="production"):
            registry.publish(ref("production"), source)
        assert set(registry.aliases("models", "ja")) == {"production"}

    # -- lineage and collection ---------------------------------------------------------------------

    def test_lineage(self, registry: Registry, source: Path) -> None:
        registry.publish(ref("base"), source / "deep")
        for version in ("a", "b"):
            registry.publish(ref(version), source / "deep", parents=[Parent(ref("base"))])
        gone = ref("gone", kind="data", name="tuples")
        parents = [Parent(ref("a"), 0.25), Parent(ref("b"), 0.75), Parent(gone)]
        registry.publish(ref("mean"), source / "deep", parents=parents)
        node = registry.lineage(ref("mean"))
        assert [(p.ref, p.weight) for p in node.parents] == [(p.ref, p.weight) for p in parents]
        assert [p.ref for parent in node.parents for p in parent.parents] == [ref("base"), ref("base")]
        assert node.parents[2].manifest is None
        with pytest.raises(ArtifactNotFound, match="none"):
            registry.lineage(ref("none"))
        forged = registry.manifest(ref("base")).model_copy(update={"parents": (Parent(ref("mean")),)})
        registry.store.put("models/ja/base/manifest.json", forged.to_bytes())
        with pytest.raises(IntegrityError, match="circle"):
            registry.lineage(ref("mean"))

    def test_collection(self, registry: Registry, source: Path) -> None:
        for version, parents in (
            ("base", []),
            ("old", ["base"]),
            ("before", ["base"]),
            ("current", ["base"]),
            ("unused", ["lonely"]),
            ("lonely", []),
        ):
            made_from = [Parent(ref(parent)) for parent in parents]
            registry.publish(ref(version), source / "deep", parents=made_from)
        for version in ("old", "before", "current"):
            registry.promote(ref(version), "production")
        index = ref("i1", kind="indexes", name="corpus")
        registry.publish(index, source / "deep", parents=[Parent(ref("current"))])
        registry.staging(ref("abandoned")).upload("a", source / "config.json")
        stray = "models/ja/current/variants/x/er/a"
        registry.store.put(stray, b"x")
        month = datetime.now(timezone.utc) + timedelta(days=31)
        before = [info.key for info in registry.store.list()]

        assert collect(registry).garbage == [], "everything is young"
        found = collect(registry, now=month)
        expected = {
            ("version", str(index)),
            ("version", "models/ja@old"),
            ("version", "models/ja@unused"),
            ("version", "models/ja@lonely"),
            ("staging", "models/ja/abandoned/"),
            ("leftover", "models/ja/current/"),
        }
        assert found.dry_run
        assert {(item.what, item.name) for item in found.garbage} == expected
        assert [info.key for info in registry.store.list()] == before

        removed = collect(registry, now=month, dry_run=False)
        assert removed.garbage == found.garbage
        order = [item.name for item in removed.garbage]
        assert order.index("models/ja@unused") < order.index("models/ja@lonely"), "children first"
        assert registry.versions("models", "ja") == ["base", "before", "current"]
        assert registry.versions("indexes", "corpus") == []
        assert {info.key.split("/")[2] for info in registry.store.list("models/ja/")} == {
            "aliases",
            "base",
            "before",
            "current",
        }
        assert not registry.store.exists(stray)
        assert registry.verify(ref("current")) == []
        assert registry.rollback("models", "ja", "production").version == "before"
        (after_rollback,) = collect(registry, now=month, dry_run=False).garbage
        assert after_rollback.name == "models/ja@current"

    def test_collection_refuses_what_it_cannot_read(self, registry: Registry, source: Path) -> None:
        registry.publish(ref("v1"), source / "deep")
        registry.publish(ref("v2"), source / "deep")
        newer = unseal(registry.store.get("models/ja/v2/manifest.json"), "") | {"schema_version": 2}
        registry.store.put("models/ja/v2/manifest.json", seal(newer))
        month = datetime.now(timezone.utc) + timedelta(days=31)
        with pytest.raises(SchemaVersionError):
            collect(registry, now=month, dry_run=False)
        flip(registry, "models/ja/v2/manifest.json")
        with pytest.raises(RaycolbertError):
            collect(registry, now=month, dry_run=False)
        assert registry.versions("models", "ja") == ["v1", "v2"]

    def test_records_hold_no_credentials(self, registry: Registry, source: Path) -> None:
        registry.publish(ref(), source)
        registry.promote(ref(), "production")
        secrets = [os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")]
        for info in registry.store.list():
            data = registry.store.get(info.key)
            assert not any(secret.encode() in data for secret in secrets), info.key
        manifest = json.loads(registry.store.get("models/ja/v1/manifest.json"))
        assert (
            Manifest.from_bytes(seal({k: v for k, v in manifest.items() if k != "digest"}), "m").ref == ref()
        )
