"""Storage in an S3 bucket, or in any server that speaks its protocol with conditional writes."""

from __future__ import annotations

import hashlib
import io
import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from pyarrow.fs import FileSystem, S3FileSystem

from cluster.config import StorageConfig
from cluster.storage.api import (
    ObjectInfo,
    ObjectStore,
    check_key,
    check_prefix,
    check_range,
    file_sha256,
)
from cluster.storage.s3_errors import REQUEST_ERRORS
from cluster.storage.s3_reader import S3Reader
from cluster.storage.s3_requests import OutOfRange, S3Requests, Tries, UploadLost
from colbert_core.errors import ConfigError, ObjectNotFound, PreconditionFailed, StorageError

_LOG = logging.getLogger(__name__)
_PART_BYTES = 8 << 20
_MAX_PARTS = 9_000
_MAX_WHOLE_BYTES = 5 << 30
_PARTS_AT_ONCE = 8


class _Unhashed:
    """Stands for a digest where none is asked for."""

    def update(self, data: memoryview | bytes) -> None:
        """Does nothing."""

    def hexdigest(self) -> str:
        return ""


class S3Store(ObjectStore):
    """Objects under ``s3://bucket/prefix``."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(config)
        parts = urlsplit(config.root)
        self.bucket = parts.netloc
        self.prefix = parts.path.strip("/")
        if not self.bucket or "@" in self.bucket:
            raise ConfigError("storage.root: expected s3://bucket/prefix, without credentials")
        if self.prefix:
            check_key(self.prefix)
        self._lock = threading.Lock()
        # Bounds the memory of all uploads together: each part in flight is held whole.
        self._part_slots = threading.BoundedSemaphore(_PARTS_AT_ONCE)
        self._conditions_checked = False
        self.requests = S3Requests(config, self.bucket, self.uri)
        self._client = self.requests.client
        self._call = self.requests.call

    @property
    def uri(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")

    # -- reading ------------------------------------------------------------------------------------

    def get_with_etag(self, key: str) -> tuple[bytes, str]:
        def request() -> tuple[bytes, str]:
            answer = self._client.get_object(**self._at(key))
            return answer["Body"].read(), answer["ETag"]

        return self._call("get", key, request)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        check_range(start, length)
        if length == 0:
            self.head(key)
            return b""

        try:
            return self._call("get_range", key, lambda: self._read_range(key, start, length))
        except OutOfRange:
            return b""

    def read_into(self, key: str, start: int, buffer: memoryview) -> int:
        return self._read("read_into", key, start, buffer, _Unhashed)[0]

    def read_hashed(self, key: str, start: int, buffer: memoryview) -> tuple[int, str]:
        return self._read("read_hashed", key, start, buffer, hashlib.sha256)

    def _read(
        self, operation: str, key: str, start: int, buffer: memoryview, new_digest: Callable[[], Any]
    ) -> tuple[int, str]:
        check_range(start, len(buffer))
        if not buffer:
            self.head(key)
            return 0, new_digest().hexdigest()
        straight = True

        def request() -> tuple[int, str]:
            nonlocal straight
            digest = new_digest()
            if straight:
                straight = False
                count = self.requests.ranges.read_into(self._at(key)["Key"], start, buffer, digest)
                if count is not None:
                    return count, digest.hexdigest()
            data = self._read_range(key, start, len(buffer))
            buffer[: len(data)] = data
            digest.update(data)
            return len(data), digest.hexdigest()

        try:
            return self._call(operation, key, request)
        except OutOfRange:
            return 0, new_digest().hexdigest()

    def _read_range(self, key: str, start: int, length: int) -> bytes:
        """One try to read a range that is not empty."""
        span = f"bytes={start}-{start + length - 1}"
        answer = self._client.get_object(**self._at(key), Range=span)
        data: bytes = answer["Body"].read()
        total = int(answer["ContentRange"].rpartition("/")[2])
        if len(data) != min(length, total - start):
            raise ConnectionError("the answer is shorter than the range")
        return data

    def open(self, key: str) -> BinaryIO:
        info = self.head(key)
        return cast(BinaryIO, io.BufferedReader(S3Reader(self, info), 1 << 18))

    def stream(self, key: str, start: int, etag: str) -> Any:
        """The body of the object with this etag from ``start`` on, unread.

        Raises:
            PreconditionFailed: the object has another etag now.
        """
        span = {"Range": f"bytes={start}-"} if start else {}
        get = partial(self._client.get_object, **self._at(key), IfMatch=etag, **span)
        return self._call("get", key, lambda: get()["Body"])

    def head(self, key: str) -> ObjectInfo:
        answer = self._call("head", key, lambda: self._client.head_object(**self._at(key)))
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"], answer["LastModified"])

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = []
        for page in self._pages(prefix, {}):
            for item in page.get("Contents", ()):
                key = self._relative(item["Key"])
                if key and not key.endswith("/"):
                    found.append(ObjectInfo(key, item["Size"], item["ETag"], item["LastModified"]))
        # Not every server lists in byte order (SeaweedFS goes folder by folder).
        found.sort(key=lambda info: info.key.encode())
        yield from found

    def list_folders(self, prefix: str = "") -> Sequence[str]:
        found = []
        for page in self._pages(prefix, {"Delimiter": "/"}):
            for item in page.get("CommonPrefixes", ()):
                found.append(self._relative(item["Prefix"])[len(prefix) :].rstrip("/"))
        return sorted(set(found), key=str.encode)

    def _pages(self, prefix: str, options: dict[str, str]) -> Iterator[dict[str, Any]]:
        check_prefix(prefix)
        whole = f"{self.prefix}/{prefix}" if self.prefix else prefix
        request = {"Bucket": self.bucket, "Prefix": whole, **options}
        while True:
            page = self._call("list", prefix, lambda: self._client.list_objects_v2(**request))
            yield page
            if not page.get("IsTruncated"):
                return
            request["ContinuationToken"] = page["NextContinuationToken"]

    # -- writing ------------------------------------------------------------------------------------

    def put(self, key: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None) -> str:
        if if_absent and if_match is not None:
            raise ValueError("if_absent and if_match exclude each other")
        condition = self._condition(key, if_absent, if_match)
        tries = Tries()

        def request() -> str:
            return self._client.put_object(**self._at(key), Body=data, **condition)["ETag"]

        try:
            return self._call("put", key, request, tries)
        except ObjectNotFound:
            raise PreconditionFailed(f"put of {key!r} in {self.uri}: the object to replace is gone") from None
        except PreconditionFailed:
            # The lost answer of an earlier try may have been a success: then our content stands there.
            if tries.uncertain:
                content, etag = self.get_with_etag(key)
                if content == data:
                    return etag
            raise

    def upload(self, key: str, path: Path, *, if_absent: bool = False) -> str:
        path = Path(path)
        try:
            size = path.stat().st_size
            if if_absent or size <= _PART_BYTES:
                return self._upload_whole(key, path, size, if_absent)
            try:
                return self._upload_parts(key, path, size)
            except UploadLost:
                # A restarted server may have forgotten the parts: once more from the beginning.
                return self._upload_parts(key, path, size)
        except OSError as error:
            raise StorageError(f"upload to {key!r}: cannot read {path}: {error.strerror}") from None

    def _upload_whole(self, key: str, path: Path, size: int, if_absent: bool) -> str:
        """One request: the only form whose condition every server checks atomically.

        SeaweedFS 4.48 lets two conditional completions of multipart uploads both succeed.
        """
        if size > _MAX_WHOLE_BYTES:
            raise StorageError(
                f"upload of {key!r}: S3 takes at most 5 GiB if-absent, {path} has {size:,} bytes"
            )
        condition = self._condition(key, if_absent, None)
        tries = Tries()

        def request() -> str:
            with path.open("rb") as body:
                return self._client.put_object(**self._at(key), Body=body, **condition)["ETag"]

        try:
            return self._call("upload", key, request, tries)
        except PreconditionFailed:
            if tries.uncertain and self._holds(key, path, size):
                return self.head(key).etag
            raise

    def _upload_parts(self, key: str, path: Path, size: int) -> str:
        part_bytes = max(_PART_BYTES, -(-size // _MAX_PARTS))
        place = self._at(key)
        upload = self._call("upload", key, lambda: self._client.create_multipart_upload(**place)["UploadId"])

        def send(number: int) -> dict[str, Any]:
            with self._part_slots:
                with path.open("rb") as stream:
                    stream.seek((number - 1) * part_bytes)
                    body = stream.read(part_bytes)
                part = {**place, "UploadId": upload, "PartNumber": number}
                request = partial(self._client.upload_part, **part, Body=body)
                return {"PartNumber": number, "ETag": self._call("upload", key, request)["ETag"]}

        tries = Tries()
        try:
            with ThreadPoolExecutor(_PARTS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, -(-size // part_bytes) + 1)))

            def finish() -> str:
                return self._client.complete_multipart_upload(
                    **place, UploadId=upload, MultipartUpload={"Parts": parts}
                )["ETag"]

            return self._call("upload", key, finish, tries)
        except StorageError:
            if tries.uncertain and self._holds(key, path, size):
                return self.head(key).etag
            self._abort(place, upload)
            raise

    def _holds(self, key: str, path: Path, size: int) -> bool:
        """Whether the object is there with just this file's content."""
        try:
            return self.head(key).size == size and self.sha256(key) == file_sha256(path)
        except StorageError:
            return False

    def _abort(self, place: dict[str, str], upload: str) -> None:
        try:
            self._client.abort_multipart_upload(**place, UploadId=upload)
        except REQUEST_ERRORS as error:
            _LOG.warning(
                "unfinished upload of %s stays until garbage collection: %s", place["Key"], type(error)
            )

    def delete(self, key: str) -> None:
        self._call("delete", key, lambda: self._client.delete_object(**self._at(key)))

    def abort_uploads(self, older_than: datetime, *, dry_run: bool = False) -> Sequence[str]:
        prefix = f"{self.prefix}/" if self.prefix else ""
        request = {"Bucket": self.bucket, "Prefix": prefix}
        stale: list[tuple[str, str]] = []
        while True:
            page = self._call("list_uploads", "", partial(self._client.list_multipart_uploads, **request))
            begun = (item for item in page.get("Uploads", ()) if item["Key"].startswith(prefix))
            stale += [(item["Key"], item["UploadId"]) for item in begun if item["Initiated"] < older_than]
            if not page.get("IsTruncated"):
                break
            request |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        for key, upload in () if dry_run else stale:
            abort = partial(self._client.abort_multipart_upload, Bucket=self.bucket, Key=key, UploadId=upload)
            # Gone already: its uploader has finished it, or another collection was here.
            with suppress(UploadLost):
                self._call("abort_upload", self._relative(key), abort)
        return [self._relative(key) for key, _ in stale]

    def arrow(self) -> tuple[FileSystem, str]:
        options: dict[str, Any] = {}
        if self.config.endpoint_url:
            parts = urlsplit(self.config.endpoint_url)
            options = {"endpoint_override": parts.netloc.rpartition("@")[2], "scheme": parts.scheme}
        filesystem = S3FileSystem(
            region=self.requests.region,
            connect_timeout=5.0,
            request_timeout=min(20.0, self.config.request_timeout_s),
            **options,
        )
        return filesystem, f"{self.bucket}/{self.prefix}".rstrip("/")

    # -- conditions ---------------------------------------------------------------------------------

    def _condition(self, key: str, if_absent: bool, if_match: str | None) -> dict[str, str]:
        """The request headers of a condition, once the server has shown that it honours them."""
        if not if_absent and if_match is None:
            return {}
        if self.config.single_writer:
            self._check_alone(key, if_match)
            return {}
        with self._lock:
            if not self._conditions_checked:
                self._probe_conditions()
                self._conditions_checked = True
        return {"IfNoneMatch": "*"} if if_match is None else {"IfMatch": if_match}

    def _check_alone(self, key: str, if_match: str | None) -> None:
        """The condition, checked before the write: enough for one writer, on any server."""
        try:
            current: str | None = self.head(key).etag
        except ObjectNotFound:
            current = None
        if current != if_match:
            state = "is gone" if current is None else "exists already" if if_match is None else "has changed"
            raise PreconditionFailed(f"put of {key!r} to {self.uri}: the object {state}")

    def _probe_conditions(self) -> None:
        """Writes a probe object twice; the second write must be refused, and one over a wrong etag too."""
        key = f".probe/{uuid.uuid4().hex}"
        place = self._at(key)

        def honours(condition: dict[str, str]) -> bool:
            try:
                self._call("probe", key, lambda: self._client.put_object(**place, Body=b"2", **condition))
            except (PreconditionFailed, ObjectNotFound):
                return True
            return False

        self._call("probe", key, lambda: self._client.put_object(**place, Body=b"1"))
        try:
            wrong = '"' + hashlib.md5(b"no such content", usedforsecurity=False).hexdigest() + '"'
            ignored = [
                name
                for name, value in (("IfNoneMatch", "*"), ("IfMatch", wrong))
                if not honours({name: value})
            ]
        finally:
            self.delete(key)
        if ignored:
            raise StorageError(
                f"{self.uri}: the server at {self.requests.endpoint} does not honour conditional writes "
                f"({', '.join(ignored)}), so two jobs could overwrite each other's artifacts. Use a server "
                "that does, or set storage.single_writer: true and run one job at a time."
            )

    # -- requests -----------------------------------------------------------------------------------

    def _at(self, key: str) -> dict[str, str]:
        check_key(key)
        return {"Bucket": self.bucket, "Key": f"{self.prefix}/{key}" if self.prefix else key}

    def _relative(self, key: str) -> str:
        return key[len(self.prefix) + 1 :] if self.prefix else key
