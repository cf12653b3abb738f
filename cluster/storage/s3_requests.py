"""One S3 request at a time: the client, bounded retries, and errors that say what to do."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
import botocore.loaders
import botocore.session
from botocore.config import Config

from cluster.config import StorageConfig
from cluster.storage.s3_errors import REQUEST_ERRORS, Fault, explain
from cluster.storage.s3_ranges import RangeReader
from colbert_core.errors import IntegrityError, ObjectNotFound, PreconditionFailed, StorageError

Answer = TypeVar("Answer")

_LOG = logging.getLogger(__name__)
_FIRST_CONTACT_S = 10.0
_TRIES_OF_DAMAGED = 3
# The service description is a large JSON file: read once in a process, not once in a store.
_LOADER = botocore.loaders.create_loader()


class Tries:
    """What happened to earlier tries of one request."""

    uncertain = False
    """A try ended without an answer, or with a server error: the server may have done it all the same."""


class OutOfRange(StorageError):
    """A range that begins at or beyond the end of the object."""


class UploadLost(StorageError):
    """The server does not know a multipart upload, or a part of it, that it has accepted before."""


def backoff(attempt: int) -> float:
    """Seconds to wait after the try of this number, counted from 0: exponential, with jitter."""
    return random.uniform(0.5, 1.0) * min(5.0, 0.1 * 2**attempt)


class S3Requests:
    """The client of one bucket.

    ``request_timeout_s`` bounds one request with all its tries: none is begun after that, and a try that
    hangs is given up after a third of it (20 s at most). A server that was never reached is given up
    after 10 s.

    Args:
        config: endpoint, region and time bound; credentials come from the environment.
        bucket: name of the bucket.
        uri: the store's root, for messages.
    """

    def __init__(self, config: StorageConfig, bucket: str, uri: str) -> None:
        self.bucket = bucket
        self.uri = uri
        self.timeout_s = config.request_timeout_s
        self._reached = False
        self._bucket_seen = False
        core = botocore.session.Session()
        core.register_component("data_loader", _LOADER)
        session = boto3.session.Session(botocore_session=core, region_name=config.region)
        self.region = session.region_name or "us-east-1"
        self.client: Any = session.client(
            "s3",
            endpoint_url=config.endpoint_url,
            region_name=self.region,
            config=Config(
                connect_timeout=min(5.0, max(0.5, self.timeout_s / 4)),
                read_timeout=min(20.0, max(0.5, self.timeout_s / 3)),
                # The retries are our own: bounded by time, not by number.
                retries={"total_max_attempts": 1, "mode": "standard"},
                max_pool_connections=32,
                s3={"addressing_style": "path" if config.endpoint_url else "auto"},
                user_agent_extra="raycolbert",
            ),
        )
        self.ranges = RangeReader(core, self.client, bucket)
        credentials = session.get_credentials()
        self._secrets: tuple[str, ...] = ()
        if credentials is not None:
            frozen = credentials.get_frozen_credentials()
            self._secrets = tuple(s for s in (frozen.secret_key, frozen.token, frozen.access_key) if s)

    @property
    def endpoint(self) -> str:
        """The server's address without credentials, for messages."""
        parts = urlsplit(self.client.meta.endpoint_url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"

    def call(
        self, operation: str, key: str, request: Callable[[], Answer], tries: Tries | None = None
    ) -> Answer:
        """Runs a request until it succeeds, fails for good, or the time bound is over.

        Args:
            operation: for messages.
            key: for messages, relative to the root.
            request: makes one try; it may raise what boto3 raises.
            tries: records whether an earlier try may have taken effect.

        Raises:
            ObjectNotFound, PreconditionFailed, OutOfRange, StorageError: naming operation, key and root.
        """
        begin = time.monotonic()
        attempt = 0
        while True:
            try:
                answer = request()
            except REQUEST_ERRORS as error:
                fault = explain(error)
                waited = time.monotonic() - begin
                self._reached = self._reached or bool(fault.code)
                never = fault.no_contact and not self._reached
                bound = min(self.timeout_s, _FIRST_CONTACT_S) if never else self.timeout_s
                pause = backoff(attempt)
                useless = not fault.transient or (fault.damaged and attempt + 1 >= _TRIES_OF_DAMAGED)
                if useless or waited + pause > bound:
                    raise self._typed(operation, key, fault, attempt + 1, waited) from None
                if tries is not None and not fault.no_contact:
                    tries.uncertain = True
                attempt += 1
                reason = self.redact(fault.reason)
                _LOG.info("%s of %s: %s; try %d follows", operation, key, reason, attempt + 1)
                time.sleep(pause)
            else:
                self._reached = self._bucket_seen = True
                return answer

    def redact(self, text: str) -> str:
        """The text with every credential of this client blotted out."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _typed(self, operation: str, key: str, fault: Fault, attempts: int, seconds: float) -> StorageError:
        if operation == "head" and fault.code in ("AccessDenied", "400"):
            fault = self._reason_of_refusal(fault)
        where = f"{operation} of {key!r} in {self.uri}"
        if fault.precondition:
            return PreconditionFailed(f"{where}: the object exists already, or has changed since it was read")
        if fault.missing:
            if self._bucket_is_missing():
                return StorageError(f"{where}: the bucket {self.bucket!r} does not exist at {self.endpoint}")
            return ObjectNotFound(f"{where}: no such object")
        if fault.code in ("InvalidRange", "416"):
            return OutOfRange(where)
        lost = fault.code in ("NoSuchUpload", "InvalidPart")
        kind = IntegrityError if fault.damaged else UploadLost if lost else StorageError
        tail = f" ({attempts} tries in {seconds:.1f} s)" if attempts > 1 else ""
        return kind(self.redact(f"{where}: {fault.reason}; endpoint {self.endpoint}{tail}"))

    def _reason_of_refusal(self, fault: Fault) -> Fault:
        """A HEAD answer has no body to say why it was refused; that of a listing has."""
        try:
            self.client.list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        except REQUEST_ERRORS as error:
            return explain(error)
        return fault

    def _bucket_is_missing(self) -> bool:
        """A HEAD of an object answers 404 for a missing bucket too; asked once."""
        if not self._bucket_seen:
            try:
                self.client.head_bucket(Bucket=self.bucket)
            except REQUEST_ERRORS as error:
                return explain(error).code in ("404", "NoSuchBucket")
            self._bucket_seen = True
        return False
