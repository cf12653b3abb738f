"""The S3 backend against a real server: the common contract, and what only a server can go wrong with."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from datetime import datetime, timedelta, timezone

import pytest

from cluster.config import StorageConfig
from cluster.storage import ObjectStore, open_store
from cluster.storage.s3 import S3Store
from colbert_core.errors import ConfigError, ObjectNotFound, PreconditionFailed, StorageError
from tests.fault_proxy import Fault, FaultProxy
from tests.s3_server import SECRET_KEY, S3Server
from tests.storage_contract import StorageContract


@pytest.fixture(scope="module")
def bucket(s3_server: S3Server) -> str:
    return s3_server.new_bucket("contract")


@pytest.fixture
def store(s3_server: S3Server, bucket: str, request: pytest.FixtureRequest) -> ObjectStore:
    # One bucket, a prefix for each test: a bucket is a collection of volumes in the server.
    prefix = f"{time.time_ns()}/root"
    return open_store(s3_server.storage(f"s3://{bucket}/{prefix}", request_timeout_s=20))


class TestS3(StorageContract):
    pass


def test_roots() -> None:
    for root in ("s3://", "s3:///prefix", "s3://key:secret@bucket/prefix", "s3://bucket/a//b"):
        with pytest.raises((ConfigError, StorageError)) as caught:
            open_store(StorageConfig(root=root))
        assert "secret" not in str(caught.value)
    assert open_store(StorageConfig(root="s3://bucket/a/b/")).uri == "s3://bucket/a/b"
    assert open_store(StorageConfig(root="s3://bucket")).uri == "s3://bucket"


def test_a_bucket_root_without_prefix(s3_server: S3Server) -> None:
    store = open_store(s3_server.storage(f"s3://{s3_server.new_bucket()}"))
    store.put("a/b", b"x", if_absent=True)
    assert [info.key for info in store.list("a/")] == ["a/b"]
    assert store.list_folders("a/") == []
    filesystem, base = store.arrow()
    assert filesystem.get_file_info(f"{base}/a/b").size == 1


def test_a_missing_bucket_is_no_missing_object(s3_server: S3Server) -> None:
    store = open_store(s3_server.storage("s3://no-such-bucket/root"))
    for read in (store.get, store.head, store.exists, store.open, lambda key: list(store.list(key))):
        with pytest.raises(StorageError, match=r"no-such-bucket.*does not exist") as caught:
            read("a")
        assert not isinstance(caught.value, ObjectNotFound)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong-secret-wrong-secret", "the secret key is wrong"),
        ("AWS_ACCESS_KEY_ID", "AKNOBODY", "the access key is not known"),
    ],
)
def test_wrong_credentials_say_so(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch, name: str, value: str, reason: str
) -> None:
    store.put("a", b"x")
    monkeypatch.setenv(name, value)
    refused = open_store(store.config)
    begin = time.monotonic()
    for use in (
        refused.get,
        refused.exists,
        refused.open,
        refused.delete,
        lambda key: refused.put(key, b"y"),
        lambda key: refused.put(key, b"y", if_absent=True),
        lambda key: list(refused.list(key)),
    ):
        with pytest.raises(StorageError, match=reason) as caught:
            use("a")
        assert store.uri in str(caught.value)
        assert value not in str(caught.value)
        assert SECRET_KEY not in str(caught.value)
    assert time.monotonic() - begin < 5, "a refusal must not be retried"


def test_no_credentials_say_so(store: S3Store, monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", f"{tmp_path}/none")
    monkeypatch.setenv("AWS_CONFIG_FILE", f"{tmp_path}/none")
    with pytest.raises(StorageError, match="no usable credentials"):
        open_store(store.config).get("a")


def test_an_unreachable_endpoint_fails_within_its_bound() -> None:
    store = open_store(
        StorageConfig(root="s3://bucket/root", endpoint_url="http://user:pw@127.0.0.1:9", request_timeout_s=2)
    )
    begin = time.monotonic()
    with pytest.raises(StorageError, match=r"cannot be reached; endpoint http://127\.0\.0\.1:9 ") as caught:
        store.get("a")
    assert time.monotonic() - begin < 4
    assert "pw" not in str(caught.value)


def test_large_upload_leaves_no_parts_behind_when_it_loses(store: S3Store, tmp_path_factory: object) -> None:
    client, place = store._client, {"Bucket": store.bucket, "Key": f"{store.prefix}/abandoned"}
    client.create_multipart_upload(**place)
    soon = datetime.now(timezone.utc) + timedelta(minutes=1)
    assert store.abort_uploads(datetime.now(timezone.utc) - timedelta(hours=1)) == []
    assert store.abort_uploads(soon, dry_run=True) == ["abandoned"]
    assert store.abort_uploads(soon) == ["abandoned"]
    assert store.abort_uploads(soon) == []


def test_listing_pages(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"p/{number:03}" for number in range(25)]
    for key in keys:
        store.put(key, b"")
    whole = store._client.list_objects_v2
    monkeypatch.setattr(store._client, "list_objects_v2", lambda **request: whole(**request, MaxKeys=10))
    assert [info.key for info in store.list("p/")] == keys


def test_a_reader_never_mixes_two_objects(store: S3Store) -> None:
    store.put("a", b"1" * 3_000_000)
    with store.open("a") as stream:
        assert stream.read(10) == b"1" * 10
        store.put("a", b"2" * 3_000_000)
        stream.seek(2_900_000)
        with pytest.raises(StorageError, match="changed"):
            stream.read()


def test_single_writer_checks_before_it_writes(store: S3Store) -> None:
    alone = open_store(store.config.model_copy(update={"single_writer": True}))
    etag = alone.put("a", b"1", if_absent=True)
    with pytest.raises(PreconditionFailed, match="exists already"):
        alone.put("a", b"2", if_absent=True)
    second = alone.put("a", b"2", if_match=etag)
    with pytest.raises(PreconditionFailed, match="has changed"):
        alone.put("a", b"3", if_match=etag)
    alone.delete("a")
    with pytest.raises(PreconditionFailed, match="is gone"):
        alone.put("a", b"3", if_match=second)


def test_ranges_are_read_past_boto3(store: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3_000_000)
    keys = ["plain", "日本/a b+c%20d~(1).bin", "x" * 200]
    for key in keys:
        store.put(key, data)

    def refuse(*_: object) -> bytes:
        raise AssertionError("boto3 was asked")

    monkeypatch.setattr(store, "_read_range", refuse)
    buffer = bytearray(1_000_000)
    for key in keys * 2:
        for start in (0, 5, 2_500_000):
            count, digest = store.read_hashed(key, start, memoryview(buffer))
            assert buffer[:count] == data[start : start + len(buffer)]
            assert digest == hashlib.sha256(buffer[:count]).hexdigest()
    reader = store.requests.ranges
    assert len(reader._idle) == 1, "one connection serves one thread"
    # The server closes connections that are idle for long: this one is of no use any more.
    reader._idle[0].sock.shutdown(socket.SHUT_RDWR)
    assert store.read_into("plain", 0, memoryview(buffer)) == len(buffer)
    assert len(reader._idle) == 1


def test_what_is_no_plain_answer_is_left_to_boto3(
    s3_server: S3Server, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(2_000_000)
    store.put("a", data)
    buffer = bytearray(len(data))
    with FaultProxy(s3_server.endpoint_url) as proxy:
        faulty = open_store(store.config.model_copy(update={"endpoint_url": proxy.url}))
        assert isinstance(faulty, S3Store)
        for kind in ("refuse", "error", "break_body", "lose_answer"):
            # On the first connection, on one that was kept, and on one after that.
            for _ in range(3):
                with proxy.fault(Fault(kind, ("GET",), times=1)) as fault:  # type: ignore[arg-type]
                    assert faulty.read_hashed("a", 0, memoryview(buffer)) == (
                        len(data),
                        hashlib.sha256(data).hexdigest(),
                    )
                assert buffer == data and fault.hits == 1
        with (
            proxy.fault(Fault("error", ("GET",), times=None, status=403, code="ExpiredToken")),
            pytest.raises(StorageError, match=r"read_hashed of 'a' .*the credentials have expired"),
        ):
            faulty.read_hashed("a", 0, memoryview(buffer))
    for name, value in (("http_proxy", "http://127.0.0.1:9"), ("AWS_ACCESS_KEY_ID", "")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            changed.delenv("no_proxy", raising=False)
            changed.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
            other = open_store(store.config)
            assert isinstance(other, S3Store)
            digest = hashlib.sha256()
            assert other.requests.ranges.read_into("a", 0, memoryview(buffer), digest) is None
