"""The registry over a real S3 server: the same contract as on a local directory."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.registry import Registry
from cluster.registry_gc import collect
from cluster.storage.s3 import S3Store
from tests.registry_contract import RegistryContract
from tests.s3_server import S3Server


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket("registry")


@pytest.fixture
def config(s3_server: S3Server, bucket: str, tmp_path: Path) -> StorageConfig:
    root = f"s3://{bucket}/{time.time_ns()}"
    return s3_server.storage(root, cache_dir=str(tmp_path / "cache"), request_timeout_s=20)


class TestS3Registry(RegistryContract):
    pass


def test_collection_aborts_leaked_uploads(config: StorageConfig) -> None:
    registry = Registry.open(config)
    store = registry.store
    assert isinstance(store, S3Store)
    place = {"Bucket": store.bucket, "Key": f"{store.prefix}/models/ja/v1/files/weights"}
    store.requests.client.create_multipart_upload(**place)
    later = datetime.now(timezone.utc) + timedelta(days=3)
    assert collect(registry).garbage == [], "it may be going on"
    for dry_run in (True, False):
        (found,) = collect(registry, now=later, dry_run=dry_run).garbage
        assert (found.what, found.name) == ("upload", "models/ja/v1/files/weights")
    assert collect(registry, now=later).garbage == []
