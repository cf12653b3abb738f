"""The registry over a real S3 server: the same contract as on a local directory."""

from __future__ import annotations

import json
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.config import StorageConfig
from cluster.registry import Registry
from cluster.registry_gc import collect
from cluster.storage.s3 import S3Store
from jobs.registry_cli import app
from tests.registry_contract import RegistryContract
from tests.registry_contract.artifacts import FILES, contents, write
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


def test_commands_by_their_options_alone(config: StorageConfig, tmp_path: Path) -> None:
    """As somebody without a recipe types them; what they print is in tests/unit/test_registry_cli.py."""
    options = ["--root", config.root, "--endpoint-url", str(config.endpoint_url), "--json"]

    def run(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, *options], env={"HOME": str(tmp_path)})
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    assert run("list") == []
    source = str(write(tmp_path / "source"))
    for version in ("v1", "v2"):
        run(
            "push", source, f"models/ja@{version}", *(["--parent", "models/ja@v1"] if version == "v2" else [])
        )
        run("promote", f"models/ja@{version}", "production")
    assert [row["aliases"] for row in run("list", "models/ja")] == [["production"], []]
    assert run("verify", "models/ja@v1", "models/ja@production") == {"models/ja@v1": [], "models/ja@v2": []}
    assert run("diff", "models/ja@v1", "models/ja@v2")[0]["section"] == "parents"
    assert run("lineage", "models/ja@production")["parents"][0]["ref"] == "models/ja@v1"
    assert run("rollback", "models/ja@production")["version"] == "v1"
    assert run("show", "models/ja@production")["version"] == "v1"
    run("pull", "models/ja@production", "--to", str(tmp_path / "copy"))
    assert contents(tmp_path / "copy") == FILES
    assert [item["name"] for item in run("gc", "--days", "0", "--delete")["garbage"]] == ["models/ja@v2"]
    assert [row["ref"] for row in run("list")] == ["models/ja@v1"]
