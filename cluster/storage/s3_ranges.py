"""Ranges of S3 objects read straight into the caller's memory.

boto3 hands a body over as bytes that urllib3 has put together: another copy of everything, and about two
milliseconds of processor time for each request besides. Where data are read by the gigabyte, block by
block, that is half of the work. So such reads have connections of their own, and their requests are signed
by botocore; whatever is not a plain answer is left to boto3, whose errors are typed and whose tries are
bounded (:mod:`cluster.storage.s3_requests`).
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
from typing import Any
from urllib.parse import quote, urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.httpsession import get_cert_path
from botocore.utils import get_environ_proxies

from cluster.storage.s3_errors import BROKEN_TLS

_IDLE_CONNECTIONS = 16
# What was received is still in the processor's cache when it is hashed.
_STEP_BYTES = 1 << 18


class RangeReader:
    """Reads ranges of one bucket's objects.

    Args:
        session: botocore's, which the client is of; without credentials every read is left to boto3.
        client: boto3's; it says where the bucket is.
        bucket: its name.
    """

    def __init__(self, session: Any, client: Any, bucket: str) -> None:
        self._credentials = session.get_credentials()
        self._region = client.meta.region_name
        self._timeouts = client.meta.config.connect_timeout, client.meta.config.read_timeout
        self._lock = threading.Lock()
        self._idle: list[http.client.HTTPConnection] = []
        self._base = ""
        if self._credentials is not None and client.meta.config.signature_version == "s3v4":
            whole = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "k"})
            place = urlsplit(whole)._replace(query="")
            # Proxies, and certificates of somebody's own, are for botocore to deal with.
            own = session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
            if not get_environ_proxies(place.geturl()) and (place.scheme == "http" or not own):
                self._base = place.geturl().removesuffix("k")

    def read_into(self, key: str, start: int, buffer: memoryview, digest: Any) -> int | None:
        """Fills a buffer with the bytes of an object from ``start`` on.

        Args:
            key: with the prefix, if there is one.
            start: offset of the first byte.
            buffer: not empty.
            digest: is updated with what is read.

        Returns:
            How many bytes there were, or None where boto3 has to ask: nothing was read then.

        Raises:
            ConnectionError, TimeoutError: the answer broke off; the digest is spoilt.
        """
        if not self._base:
            return None
        url = self._base + quote(key, safe="/~")
        request = AWSRequest("GET", url, headers={"Range": f"bytes={start}-{start + len(buffer) - 1}"})
        S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", self._region).add_auth(request)
        try:
            connection, answer = self._ask(urlsplit(url).path, dict(request.headers.items()))
        except TimeoutError:
            raise
        except BROKEN_TLS:
            return None
        except ssl.SSLError:
            self._base = ""
            return None
        except (OSError, http.client.HTTPException):
            return None
        length = _promised(answer, start, len(buffer))
        if length is None:
            connection.close()
            return None
        try:
            for begin in range(0, length, _STEP_BYTES):
                part = buffer[begin : min(length, begin + _STEP_BYTES)]
                if answer.readinto(part) != len(part):
                    raise ConnectionError
                digest.update(part)
        except TimeoutError:
            connection.close()
            raise
        except (OSError, http.client.HTTPException):
            connection.close()
            raise ConnectionError(f"the answer broke off at byte {start + begin} of {key!r}") from None
        self._keep(connection, answer)
        return length

    def _ask(
        self, path: str, headers: dict[str, str]
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Sends a request; a connection that was kept may have been closed by the server meanwhile."""
        while True:
            with self._lock:
                kept = self._idle.pop() if self._idle else None
            connection = kept or self._connection()
            try:
                if connection.sock is not None:
                    connection.sock.settimeout(self._timeouts[1])
                connection.request("GET", path, headers=headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if kept is None or isinstance(error, TimeoutError):
                    raise

    def _connection(self) -> http.client.HTTPConnection:
        place = urlsplit(self._base)
        connect_timeout, read_timeout = self._timeouts
        connection: http.client.HTTPConnection
        if place.scheme == "https":
            context = ssl.create_default_context(cafile=get_cert_path(True))
            connection = http.client.HTTPSConnection(place.netloc, timeout=connect_timeout, context=context)
        else:
            connection = http.client.HTTPConnection(place.netloc, timeout=connect_timeout)
        connection.connect()
        connection.sock.settimeout(read_timeout)
        return connection

    def _keep(self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse) -> None:
        answer.read()  # nothing is left; this tells http.client so
        with self._lock:
            if not answer.will_close and len(self._idle) < _IDLE_CONNECTIONS:
                self._idle.append(connection)
                return
        connection.close()


def _promised(answer: http.client.HTTPResponse, start: int, wanted: int) -> int | None:
    """The bytes that an answer says will follow, None if they are not just those of the range."""
    span, _, total = (answer.getheader("Content-Range") or "").removeprefix("bytes ").partition("/")
    if answer.status != http.client.PARTIAL_CONTENT or not total.isdigit():
        return None
    length = min(wanted, int(total) - start)
    plain = answer.getheader("Content-Encoding") is None
    agrees = span == f"{start}-{start + length - 1}" and answer.getheader("Content-Length") == str(length)
    return length if plain and agrees else None
