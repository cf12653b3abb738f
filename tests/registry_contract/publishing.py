"""Publishing a version, whole or file by file."""

from __future__ import annotations

import pickle
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.registry import Parent, Registry
from colbert_core.errors import ArtifactNotFound, StorageError, VersionExists
from tests.races import winners
from tests.registry_contract.artifacts import FILES, KILLED_PUBLISH, contents, ref, write


class PublishingContract:
    """A version appears complete, once, with one publisher's content."""

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

        def publish(number: int) -> None:
            registry.publish(ref(), sources[number], extra={"number": number})

        won = winners(publish, 16, VersionExists)
        assert len(won) == 1
        assert registry.manifest(ref()).extra == {"number": won[0]}
        assert contents(registry.pull(ref())) == shared | {"own": b"%d" % won[0] * 5000}
        assert registry.verify(ref()) == []

    def test_large_files_of_racing_publishers_do_not_mix(self, registry: Registry, tmp_path: Path) -> None:
        sources = [write(tmp_path / str(n), {"own": bytes([n]) * 9_000_000}) for n in range(4)]
        won = winners(lambda number: registry.publish(ref(), sources[number]), 4, VersionExists)
        assert len(won) == 1
        assert contents(registry.pull(ref())) == {"own": bytes([won[0]]) * 9_000_000}

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
