"""Aliases, lineage and collection."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.manifest import Manifest, seal, unseal
from cluster.registry import Parent, Registry
from cluster.registry_gc import collect
from cluster.run_lease import RunLease
from cluster.storage import ObjectInfo
from colbert_core.errors import (
    ArtifactNotFound,
    IntegrityError,
    PreconditionFailed,
    RaycolbertError,
    SchemaVersionError,
    VersionExists,
)
from tests.registry_contract.artifacts import flip, ref


class AliasContract:
    """What refers to versions, and what becomes of those that nothing refers to."""

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

    def test_what_a_living_run_is_made_from_is_kept(self, registry: Registry, source: Path) -> None:
        data = ref("t1", kind="data", name="tuples")
        for version in (data, ref("start"), ref("unused")):
            registry.publish(version, source / "deep")
        now = datetime.now(timezone.utc) + timedelta(minutes=1)
        with RunLease(registry.store, "runs/r/lease.json", inputs=[ref("start"), data]):
            removed = collect(registry, older_than=timedelta(0), now=now, dry_run=False)
        assert [item.name for item in removed.garbage] == ["models/ja@unused"]
        removed = collect(registry, older_than=timedelta(0), now=now, dry_run=False)
        assert {item.name for item in removed.garbage} == {str(data), "models/ja@start"}

    def test_a_publish_taken_up_again_meanwhile_is_left_alone(
        self, registry: Registry, source: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Between the listing of everything and the deletion of what an older, killed publish left."""
        registry.staging(ref()).upload("config.json", source / "config.json")
        month = datetime.now(timezone.utc) + timedelta(days=31)
        whole = registry.store.list

        def list_again(prefix: str = "") -> Iterator[ObjectInfo]:
            if prefix == ref().prefix and not registry.exists(ref()):
                registry.publish(ref(), source)
            return whole(prefix)

        monkeypatch.setattr(registry.store, "list", list_again)
        collect(registry, now=month, dry_run=False)
        monkeypatch.undo()
        assert registry.exists(ref())
        assert registry.verify(ref()) == []
