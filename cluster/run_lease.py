"""One process at a time may run under a name: a lease object in storage, kept alive by a heartbeat.

No clock is compared between machines. A lease is stale when it has not changed for a while *as seen by
the one who wants it*; it is then taken over by compare-and-swap, so that of several waiting only one
gets it. The former holder, should it still live, stops its signs of life, and its workers make nothing more
visible: they look whose the run is.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from types import TracebackType

from cluster.artifacts import ArtifactRef
from cluster.manifest import parse_ref
from cluster.storage import ObjectStore
from colbert_core.errors import ObjectNotFound, PreconditionFailed, StorageError, TrainingError

HEARTBEAT_S = 5.0
STALE_S = 30.0


@dataclass(frozen=True)
class LeaseClaim:
    """Who says to hold a lease; goes to the workers of a run, whose driver keeps the lease alive.

    Attributes:
        key: the lease object.
        holder: what it must name.
    """

    key: str
    holder: str

    def etag(self, store: ObjectStore) -> str | None:
        """The lease's etag as it is stored now, if it is this holder's."""
        try:
            data, etag = store.get_with_etag(self.key)
        except ObjectNotFound:
            return None
        return etag if json.loads(data).get("holder") == self.holder else None

    def check(self, store: ObjectStore) -> None:
        """Is the run still this holder's?

        Raises:
            TrainingError: another process has taken it over.
        """
        if self.etag(store) is None:
            raise TrainingError(
                f"{store.uri}/{self.key}: another process took this run over while this one did not answer"
            )


class RunLease:
    """Holds the right to run under a name for the time of a ``with`` block.

    Args:
        store: the storage.
        key: the lease object.
        inputs: what the run is made from, for the collection of garbage to keep.
        heartbeat_s: seconds between signs of life.
        stale_s: seconds without one after which a lease may be taken over; several heartbeats.

    Attributes:
        claim: what tells whether the run is still this one's.

    Raises:
        TrainingError: on entering, another living process holds the lease; says which.
    """

    def __init__(
        self,
        store: ObjectStore,
        key: str,
        *,
        inputs: Sequence[ArtifactRef] = (),
        heartbeat_s: float = HEARTBEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.claim = LeaseClaim(key, uuid.uuid4().hex)
        self._store, self._key = store, key
        self._heartbeat_s, self._stale_s = heartbeat_s, stale_s
        self._holder = {
            "schema_version": 1,
            "holder": self.claim.holder,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(timezone.utc).isoformat(),
            "inputs": [str(ref) for ref in inputs],
        }
        self._beats = 0
        self._etag = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lease", daemon=True)

    def __enter__(self) -> RunLease:
        self._etag = self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        # One that cannot be looked at or deleted now goes stale, and must not hide how the run ended.
        with suppress(StorageError):
            if self.claim.etag(self._store) is not None:
                self._store.delete(self._key)

    def _acquire(self) -> str:
        try:
            return self._store.put(self._key, self._content(), if_absent=True)
        except PreconditionFailed:
            pass
        deadline = time.monotonic() + self._stale_s
        first: str | None = None
        while True:
            try:
                data, etag = self._store.get_with_etag(self._key)
            except ObjectNotFound:
                return self._take(None)
            if first is None:
                first = etag
            elif etag != first:
                raise TrainingError(self._in_use(data))
            if time.monotonic() >= deadline:
                return self._take(etag)
            time.sleep(min(self._heartbeat_s / 2, 1.0))

    def _take(self, etag: str | None) -> str:
        try:
            return self._store.put(self._key, self._content(), if_absent=etag is None, if_match=etag)
        except PreconditionFailed:
            raise TrainingError(self._in_use(None)) from None

    def _beat(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._beats += 1
            try:
                self._etag = self._store.put(self._key, self._content(), if_match=self._etag)
            except PreconditionFailed:
                # An earlier beat may have arrived although its answer did not.
                with suppress(StorageError):
                    etag = self.claim.etag(self._store)
                    if etag is None:
                        return
                    self._etag = etag
            except StorageError:
                # Storage that is away for a moment also keeps others from taking the lease.
                continue

    def _content(self) -> bytes:
        return json.dumps({**self._holder, "beats": self._beats}).encode()

    def _in_use(self, data: bytes | None) -> str:
        place = f"{self._store.uri}/{self._key}"
        if data is None:
            return f"{place}: the run is in use by another process that started at the same time"
        holder = json.loads(data)
        return (
            f"{place}: the run is in use by process {holder['pid']} on {holder['host']} "
            f"since {holder['since']}"
        )


def inputs_of_runs(store: ObjectStore, since: datetime) -> set[ArtifactRef]:
    """What the runs are made from whose lease has shown a sign of life since then."""
    found: set[ArtifactRef] = set()
    for run in store.list_folders("runs/"):
        key = f"runs/{run}/lease.json"
        with suppress(ObjectNotFound):  # no lease, or a run that ends just now
            if store.head(key).modified >= since:
                found |= {parse_ref(ref) for ref in json.loads(store.get(key)).get("inputs", ())}
    return found
