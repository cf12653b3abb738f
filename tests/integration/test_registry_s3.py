"""The registry over a real S3 server: the same contract as on a local directory."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from cluster.config import StorageConfig
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
