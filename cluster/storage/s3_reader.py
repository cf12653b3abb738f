"""A seekable reader of one S3 object that survives broken connections."""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING, Any

from cluster.storage.api import ObjectInfo
from cluster.storage.positioned import PositionedReader
from cluster.storage.s3_errors import REQUEST_ERRORS, explain
from cluster.storage.s3_requests import backoff
from colbert_core.errors import PreconditionFailed, StorageError

if TYPE_CHECKING:
    from cluster.storage.s3 import S3Store


class S3Reader(PositionedReader):
    """Reads an object front to back over one connection, and goes on where it broke off.

    Every request names the etag that the object had when it was opened, so that an object replaced
    meanwhile is an error and never a mixture.
    """

    def __init__(self, store: S3Store, info: ObjectInfo) -> None:
        super().__init__(info.key, info.size)
        self._store = store
        self._info = info
        self._delivered = False
        self._body: Any = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        before = self._position
        target = super().seek(offset, whence)
        if target != before:
            self._drop()
        return target

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        if wanted <= 0:
            return 0
        begin = time.monotonic()
        attempt = 0
        while True:
            try:
                if self._body is None:
                    self._body = self._stream()
                chunk = self._body.read(wanted)
                if not chunk:
                    raise ConnectionError("the body ended early")
            except REQUEST_ERRORS as error:
                fault = explain(error)
                self._drop()
                pause = backoff(attempt)
                waited = time.monotonic() - begin
                if not fault.transient or waited + pause > self._store.config.request_timeout_s:
                    raise StorageError(
                        f"read of {self._key!r} in {self._store.uri} at byte {self._position}: "
                        f"{fault.reason} ({attempt + 1} tries in {waited:.1f} s)"
                    ) from None
                attempt += 1
                time.sleep(pause)
            else:
                buffer[: len(chunk)] = chunk
                self._position += len(chunk)
                self._delivered = True
                return len(chunk)

    def _stream(self) -> Any:
        key = self._key
        try:
            return self._store.stream(key, self._position, self._info.etag)
        except PreconditionFailed:
            if self._delivered:
                raise StorageError(
                    f"read of {key!r} in {self._store.uri}: it has changed meanwhile"
                ) from None
            # Nothing was read yet: what is there now is as good.
            self._info = self._store.head(key)
            self._size = self._info.size
            return self._store.stream(key, self._position, self._info.etag)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        if self._body is not None:
            self._body.close()
            self._body = None
