"""Networks and servers at their worst: every operation ends well or in a typed error, nothing half-done."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cluster.artifacts import ArtifactRef
from cluster.averaging import mean_pieces
from cluster.published_model import published_models
from cluster.registry import Registry
from cluster.storage import open_store
from colbert_core.averaging import average_models
from colbert_core.errors import IntegrityError, StorageError
from tests.fault_cases import CASES, OUTAGES, Case
from tests.fault_matrix import DOCUMENT, Result, can_mount, document, run
from tests.fault_proxy import Fault, FaultProxy, Kind
from tests.s3_server import ACCESS_KEY, SECRET_KEY, S3Server


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket("faults")


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    """All that the project logs while the cases run."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("cluster")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield text
    logger.removeHandler(handler)
    logger.setLevel(before)


@pytest.fixture(scope="module")
def results(
    request: pytest.FixtureRequest,
    s3_server: S3Server,
    bucket: str,
    log: io.StringIO,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Future[Result]]:
    """The chosen cases, several at once: most of their time is waiting.

    They end before the first test begins: pytest names the test in the environment, and an S3 client reads
    all of the environment for its proxies, which fails when a variable goes meanwhile.
    """
    items = [item for item in request.session.items if item.name.startswith("test_fault[")]
    chosen = [item.callspec.params["case"] for item in items] or CASES
    chosen = [case for case in chosen if case.special != "full_disk" or can_mount()]
    with ThreadPoolExecutor(6) as pool:
        return {
            case.row: pool.submit(run, case, s3_server, bucket, tmp_path_factory.mktemp("case"))
            for case in chosen
        }


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.operation}-{case.text}")
def test_fault(case: Case, results: dict[str, Future[Result]], log: io.StringIO) -> None:
    if case.row not in results:
        pytest.skip("this user may not mount a small file system")
    result = results[case.row].result()
    assert result.agrees(case), result.outcome
    assert result.seconds < 3 * case.timeout_s
    for secret in (ACCESS_KEY, SECRET_KEY):
        assert secret not in result.outcome
        assert secret not in log.getvalue()


def test_retries_are_logged(results: dict[str, Future[Result]], log: io.StringIO) -> None:
    for future in results.values():
        future.result()
    assert "503 SlowDown; try 2 follows" in log.getvalue()


@pytest.mark.parametrize("status", [400, 403])
def test_a_refused_head_says_why(s3_server: S3Server, bucket: str, status: int) -> None:
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = s3_server.storage(f"s3://{bucket}/refused", request_timeout_s=5)
        store = open_store(config.model_copy(update={"endpoint_url": proxy.url}))
        with (
            proxy.fault(Fault("error", times=None, status=status, code="ExpiredToken")),
            pytest.raises(StorageError, match="the credentials have expired"),
        ):
            store.exists("a")


def test_parallel_download_survives_broken_parts(
    s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.storage.api._LARGE_BYTES", 1 << 20)
    source, target = tmp_path / "f", tmp_path / "target"
    source.write_bytes(bytes(range(256)) * 100_000)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = s3_server.storage(f"s3://{bucket}/parallel", request_timeout_s=5)
        store = open_store(config.model_copy(update={"endpoint_url": proxy.url}))
        store.upload("f", source)
        kinds: tuple[Kind, ...] = ("break_body", "shorten_body", "refuse", "error")
        for kind in kinds:
            with proxy.fault(Fault(kind, method=("GET",), times=2)) as fault:
                store.download("f", target)
            assert fault.hits == 2
            assert target.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", ["break_body", "shorten_body", "flip_body", "refuse", "error"])
def test_a_mean_survives_broken_blocks(s3_server: S3Server, bucket: str, tmp_path: Path, kind: Kind) -> None:
    refs = [ArtifactRef("models", "ja", version) for version in ("v1", "v2")]
    root, source = f"s3://{bucket}/mean-{kind}", tmp_path / "model"
    source.mkdir()
    save_file({"w": torch.randn(2_500_000)}, source / "model.safetensors")
    direct = Registry.open(s3_server.storage(root, cache_dir=str(tmp_path / "cache")))
    for ref in refs:
        direct.publish(ref, source)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = direct.store.config.model_copy(update={"endpoint_url": proxy.url, "request_timeout_s": 5})
        faulty = Registry.open(config)
        models = published_models(faulty, refs)
        # A block that is damaged twice counts as damaged in storage.
        times = 1 if kind in ("flip_body", "shorten_body") else 2
        with proxy.fault(Fault(kind, ("GET",), "model.safetensors", times=times)) as fault:
            average_models(models, [1.0, 1.0], tmp_path / "mean", mean_pieces)
        assert fault.hits == times
        mean = (tmp_path / "mean" / "model.safetensors").read_bytes()
        assert mean[-10_000_000:] == (source / "model.safetensors").read_bytes()[-10_000_000:]
        with (
            proxy.fault(Fault("flip_body", ("GET",), "v2/files/model.safetensors", times=None)),
            pytest.raises(IntegrityError, match=r"v2/files/model\.safetensors .* do not match their SHA-256"),
        ):
            average_models(models, [1.0, 1.0], tmp_path / "damaged", mean_pieces)
        assert not (tmp_path / "damaged").exists()


def test_the_document_has_these_rows() -> None:
    assert DOCUMENT.read_text() == document((*CASES, *OUTAGES)), "run python -m tests.fault_matrix"


def test_the_proxy_is_transparent_without_faults(s3_server: S3Server, bucket: str, tmp_path: Path) -> None:
    source = tmp_path / "f"
    source.write_bytes(b"0123456789" * 1_000_000)
    with FaultProxy(s3_server.endpoint_url) as proxy:
        config = s3_server.storage(f"s3://{bucket}/transparent", request_timeout_s=5)
        store = open_store(config.model_copy(update={"endpoint_url": proxy.url}))
        store.upload("f", source, if_absent=True)
        assert store.get_range("f", 5, 10) == b"5678901234"
        assert [info.size for info in store.list()] == [10_000_000]
        with proxy.fault(Fault("refuse", times=1)) as fault:
            assert store.exists("f")
        assert fault.hits == 1
