"""Credentials appear in nothing that a job writes, prints or logs, whether it succeeds or fails."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.config import load_recipe
from cluster.registry import Registry
from tests.fault_proxy import Fault, FaultProxy
from tests.ray_head import BIN, RayHead, ray_head
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.tiny_data import word_source
from tests.tiny_models import tiny_bert_dir

TOKEN = "TOKEN-never-in-any-log-0987654321"
WRONG_KEY, WRONG_SECRET = "AKWRONGNEVERINANYLOG", "WRONG-never-in-any-log-1357924680"
SECRETS = (ACCESS_KEY, SECRET_KEY, TOKEN, WRONG_KEY, WRONG_SECRET)


def files_with_secrets(folder: Path) -> list[str]:
    """Names of the files below a folder that hold a credential."""
    found = []
    for path in folder.rglob("*"):
        try:
            content = path.read_bytes() if path.is_file() else b""
        except OSError:
            continue
        if any(secret.encode() in content for secret in SECRETS):
            found.append(str(path))
    return found


def recipe_tree(root: Path, storage: dict[str, Any]) -> dict[str, Any]:
    """Every job that writes something, on tiny data."""
    return {
        "name": "secretive",
        "storage": storage,
        "model": {
            "name": "tiny",
            "base": str(tiny_bert_dir(root / "base")),
            "colbert": {"dim": 16, "query_length": 8, "document_length": 32},
        },
        "data": {
            "root": str(root),
            "sources": {"words": word_source(root / "words")},
            "tuples": {
                "t": {
                    "mine": {"source": "words", "pools": [{"scorer": "bm25", "ranks": [1, 20], "take": 3}]},
                    "score": {"scorers": {"bm25": 1.0}},
                }
            },
        },
        "scorers": {"bm25": {"kind": "bm25", "tokenizer": "whitespace"}},
        "train": [
            {
                "name": "p",
                "data": ["t"],
                "nway": 4,
                "steps": 2,
                "queries_per_step": 8,
                "micro_batch": 4,
                "precision": "fp32",
                "num_workers": 1,
                "checkpoint": {"every_steps": 1, "publish_every_steps": 1},
            }
        ],
        "average": {"inputs": [{"phase": "p", "last": 2}]},
        "index": {"name": "i", "model": "averaged", "sources": ["words"], "shards": 2},
        "evaluate": {"sources": ["words"], "systems": {"averaged": {"model": "averaged", "index": True}}},
    }


@dataclass
class Jobs:
    """The pipeline on a cluster, which failed in its index workers, and then went through.

    Attributes:
        failed, finished: what was printed.
        cluster: where it ran.
        server, bucket: where it stored.
        report: folder of ``report.json`` and ``report.html``.
        cache: local copies.
    """

    failed: str
    finished: str
    cluster: RayHead
    server: S3Server
    bucket: str
    report: Path
    cache: Path


@pytest.fixture(scope="module")
def jobs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    root = tmp_path_factory.mktemp("jobs")
    bucket = s3_server.new_bucket("secretive")
    storage = s3_server.storage(f"s3://{bucket}/root", cache_dir=str(root / "cache"), request_timeout_s=10)
    with FaultProxy(s3_server.endpoint_url) as proxy, ray_head(cpus=4) as cluster:
        tree = recipe_tree(root, storage.model_dump(mode="json") | {"endpoint_url": proxy.url})
        (root / "recipe.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")

        def pipeline() -> tuple[int, str]:
            done = cluster.run(
                *(str(BIN / "raycolbert"), "pipeline", "recipe.yaml", "--report", str(root / "report")),
                *("--address", cluster.address),
                cwd=root,
                timeout=400,
            )
            return done.returncode, done.stdout + done.stderr

        expired = Fault("error", ("PUT",), "/indexes/i/", times=None, status=403, code="ExpiredToken")
        with proxy.fault(expired):
            status, failed = pipeline()
        assert status == 2, failed
        assert "the credentials have expired" in failed
        status, finished = pipeline()
        assert status == 0, finished
        yield Jobs(failed, finished, cluster, s3_server, bucket, root / "report", root / "cache")


def test_the_search_finds_what_is_there(jobs: Jobs) -> None:
    """The server's own config holds both, and the jobs had them: their environment is the cluster's."""
    assert str(jobs.server.directory / "s3.json") in files_with_secrets(jobs.server.directory)
    held = jobs.cluster.environment
    assert (held["AWS_ACCESS_KEY_ID"], held["AWS_SECRET_ACCESS_KEY"]) == (ACCESS_KEY, SECRET_KEY)


def test_what_a_job_prints_has_none(jobs: Jobs) -> None:
    for text in (jobs.failed, jobs.finished):
        assert "pipeline" in text
        assert not any(secret in text for secret in SECRETS)


def test_logs_of_ray_have_none(jobs: Jobs) -> None:
    logs = [path.name for path in (jobs.cluster.folder / "session_latest" / "logs").iterdir()]
    assert any(name.startswith("job-driver-") for name in logs)
    assert any(name.startswith("worker-") for name in logs)
    assert files_with_secrets(jobs.cluster.folder) == []
    told = httpx.get(f"{jobs.cluster.address}/api/jobs/", headers=jobs.cluster.headers).text
    assert "jobs.pipeline" in told
    assert not any(secret in told for secret in SECRETS)


def test_reports_have_none(jobs: Jobs) -> None:
    assert {path.name for path in jobs.report.iterdir()} == {"report.json", "report.html"}
    report = json.loads((jobs.report / "report.json").read_text(encoding="utf-8"))
    # The models were made before the failure, and are kept.
    assert {name.partition("/")[0] for name in report["artifacts"]} == {"evaluations", "indexes"}
    assert files_with_secrets(jobs.report) == []
    assert files_with_secrets(jobs.cache) == []


def test_nothing_in_storage_has_any(jobs: Jobs) -> None:
    client, kinds = jobs.server.client(), set()
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=jobs.bucket):
        for item in page["Contents"]:
            content = client.get_object(Bucket=jobs.bucket, Key=item["Key"])["Body"].read()
            assert not any(secret.encode() in content for secret in SECRETS), item["Key"]
            kinds.add(item["Key"].split("/")[1])
    assert {"models", "data", "indexes", "runs", "reports", "evaluations"} <= kinds


# -- commands that fail -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose first job reads storage at once."""
    root = tmp_path_factory.mktemp("failing")
    storage = s3_server.storage(cache_dir=str(root / "cache"), request_timeout_s=5)
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_tree(root, storage.model_dump(mode="json"))), encoding="utf-8")
    return path


def run(recipe: Path, *command: str, **environment: str) -> str:
    """Runs a command that must fail as a user error does; returns all that it printed."""
    done = subprocess.run(
        [str(BIN / "raycolbert"), *command],
        cwd=recipe.parent,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == 2, printed
    assert not any(secret in printed for secret in SECRETS), printed
    return printed


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"AWS_SECRET_ACCESS_KEY": WRONG_SECRET}, "the secret key is wrong"),
        ({"AWS_ACCESS_KEY_ID": WRONG_KEY}, "the access key is not known"),
    ],
    ids=["secret", "key"],
)
def test_a_command_with_wrong_credentials(recipe: Path, environment: Mapping[str, str], reason: str) -> None:
    for command in (("registry", "list", "-r", "recipe.yaml"), ("average", "recipe.yaml", "--debug")):
        assert reason in run(recipe, *command, **environment)


def test_a_command_whose_session_has_expired(recipe: Path, s3_server: S3Server) -> None:
    expired = Fault("error", times=None, status=403, code="ExpiredToken")
    with FaultProxy(s3_server.endpoint_url) as proxy, proxy.fault(expired):
        command = ("mine_negatives", "recipe.yaml", "--debug", "--set", f"storage.endpoint_url={proxy.url}")
        printed = run(recipe, *command, AWS_SESSION_TOKEN=TOKEN)
    assert "the credentials have expired" in printed
    assert "Traceback" in printed


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("storage.root", f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/prefix"),
        ("storage.endpoint_url", f"http://{ACCESS_KEY}:{SECRET_KEY}@127.0.0.1:9"),
        ("data.root", f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/data"),
        ("track.mlflow.uri", f"https://{ACCESS_KEY}:{SECRET_KEY}@mlflow"),
    ],
)
def test_credentials_in_an_address_are_refused(recipe: Path, key: str, place: str) -> None:
    """A recipe goes into the manifest of all that it makes, so that they must not be in it."""
    printed = run(recipe, "average", "recipe.yaml", "--debug", "--set", f"{key}={place}")
    assert f"{key}: an address holds credentials" in printed


@pytest.mark.parametrize("option", ["--root", "--endpoint-url"])
def test_credentials_in_an_option_are_refused(recipe: Path, option: str) -> None:
    places = {"--root": "s3://bucket/prefix", option: f"s3://{ACCESS_KEY}:{SECRET_KEY}@bucket/prefix"}
    command = [word for pair in places.items() for word in pair]
    assert f"{option}: an address holds credentials" in run(recipe, "registry", "list", *command)


def test_an_address_may_hold_the_sign_elsewhere(recipe: Path) -> None:
    found = load_recipe(recipe, ["data.root=s3://bucket/user@host/data"])
    assert found.data.root == "s3://bucket/user@host/data"
    assert Registry.open(found.storage).names("models") == []
