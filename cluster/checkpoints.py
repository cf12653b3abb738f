"""Resume states of a run in object storage.

Layout below ``runs/<run>/``::

    step-00002000/manifest.json            written last, if-absent: without it the step does not exist
    step-00002000/<attempt>/…              files of all ranks; an attempt never touches another's files
    log/00000001-00002000.jsonl            one record a step, see cluster.training_log
    lease.json                             who runs it now, see cluster.run_lease

Uploads run in the background; :class:`BackgroundSave` is one save in flight.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, Field, JsonValue, ValidationError

from cluster.manifest import FileEntry, seal, unseal
from cluster.storage import ObjectStore
from cluster.storage.api import file_sha256
from colbert_core.config import FrozenModel
from colbert_core.errors import IntegrityError, ObjectNotFound, PreconditionFailed

_THREADS = 4


class SavedStep(FrozenModel):
    """The manifest of one resume state.

    Attributes:
        step: optimiser steps made.
        attempt: folder of the files.
        fingerprint: of the phase: a state is resumed only by the phase that wrote it.
        workers: how many wrote it.
        files: size and SHA-256 by name.
        counters: where the run was, as plain data.
    """

    schema_version: Literal[1] = 1
    step: int = Field(ge=0)
    attempt: str
    fingerprint: str
    workers: int = Field(ge=1)
    files: dict[str, FileEntry]
    counters: dict[str, JsonValue] = Field(default_factory=dict)
    created_at: AwareDatetime = Field(default_factory=lambda: datetime.now(timezone.utc))


class RunCheckpoints:
    """The resume states of one run.

    Args:
        store: the storage.
        run: name of the run.
        keep_last: how many states :meth:`trim` leaves.
        keep_every: it also leaves those of steps that are multiples of this.
    """

    def __init__(
        self, store: ObjectStore, run: str, keep_last: int = 1, keep_every: int | None = None
    ) -> None:
        self.store = store
        self.prefix = f"runs/{run}/"
        self._keep_last, self._keep_every = keep_last, keep_every

    def steps(self) -> list[int]:
        """Complete states, oldest first."""
        return [step for step in self._folders() if self.store.exists(self._manifest_key(step))]

    def latest(self) -> SavedStep | None:
        """The last complete state, or None.

        Raises:
            IntegrityError: its manifest is damaged.
            SchemaVersionError: a newer version wrote it.
        """
        for step in reversed(self._folders()):
            key = self._manifest_key(step)
            try:
                return SavedStep.model_validate(unseal(self.store.get(key), key))
            except ObjectNotFound:
                continue
            except ValidationError as error:
                raise IntegrityError(f"{key}: not a manifest of a resume state: {error}") from None
        return None

    def download(self, saved: SavedStep, directory: Path) -> None:
        """Copies a state's files into a local directory, each checked against its SHA-256.

        Raises:
            IntegrityError: a file is missing or is not what the manifest records.
        """

        def fetch(item: tuple[str, FileEntry]) -> None:
            name, entry = item
            key = f"{self._folder(saved.step)}{saved.attempt}/{name}"
            try:
                with self.store.open(key) as source, (directory / name).open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except ObjectNotFound:
                raise IntegrityError(f"{key}: the manifest names this file, but it is missing") from None
            if file_sha256(directory / name) != entry.sha256:
                raise IntegrityError(f"{key}: the content does not match its SHA-256")

        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(fetch, saved.files.items()))

    def upload(self, step: int, attempt: str, rank: int, files: Sequence[Path]) -> None:
        """Uploads one rank's files, then a record of them that :meth:`commit` collects."""
        entries = {}
        for path in files:
            self.store.upload(f"{self._folder(step)}{attempt}/{path.name}", path)
            entries[path.name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        self.store.put(self._part_key(step, attempt, rank), seal({"schema_version": 1, "files": entries}))

    def commit(
        self, step: int, attempt: str, workers: int, fingerprint: str, counters: dict[str, Any]
    ) -> None:
        """Makes a state visible once all ranks have uploaded theirs.

        If another attempt committed the same step before, that one stays.
        """
        files: dict[str, FileEntry] = {}
        for rank in range(workers):
            key = self._part_key(step, attempt, rank)
            for name, entry in unseal(self.store.get(key), key)["files"].items():
                files[name] = FileEntry(**entry)
        saved = SavedStep(
            step=step,
            attempt=attempt,
            fingerprint=fingerprint,
            workers=workers,
            files=files,
            counters=counters,
        )
        try:
            self.store.put(self._manifest_key(step), seal(saved.model_dump(mode="json")), if_absent=True)
        except PreconditionFailed:
            return

    def trim(self) -> None:
        """Deletes what is not to be kept, and what unfinished saves before the last state left."""
        complete = self.steps()
        if not complete:
            return
        kept = set(complete[-self._keep_last :])
        if self._keep_every is not None:
            kept |= {step for step in complete if step % self._keep_every == 0}
        for step in self._folders():
            if step in kept or step > complete[-1]:
                continue
            # The manifest first: a state half deleted must not look complete.
            self.store.delete(self._manifest_key(step))
            for item in list(self.store.list(self._folder(step))):
                self.store.delete(item.key)

    def _folders(self) -> list[int]:
        names = self.store.list_folders(self.prefix)
        return sorted(
            int(name[5:].rstrip("/"))
            for name in names
            if name.startswith("step-") and name[5:].rstrip("/").isdigit()
        )

    def _folder(self, step: int) -> str:
        return f"{self.prefix}step-{step:08d}/"

    def _manifest_key(self, step: int) -> str:
        return f"{self._folder(step)}manifest.json"

    def _part_key(self, step: int, attempt: str, rank: int) -> str:
        return f"{self._folder(step)}{attempt}/part-{rank:05d}.json"


class BackgroundSave:
    """Saves that leave the training loop as soon as the state is on local disk.

    One save at a time: ``begin`` waits for the one before. Every rank uploads its own files; when all
    ranks report :attr:`uploaded`, rank 0 calls :meth:`commit`, which also runs in the background.

    Args:
        checkpoints: where to.
        rank: of this worker.
        attempt: folder name, the same on all ranks.

    Attributes:
        step: of the last save.
        upload_s: seconds that uploads have taken beside training.
        saves: saves begun.
    """

    def __init__(self, checkpoints: RunCheckpoints, rank: int, attempt: str) -> None:
        self._checkpoints = checkpoints
        self._rank, self._attempt = rank, attempt
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None
        self._commit: Future[None] | None = None
        self.step: int | None = None
        self.upload_s = 0.0
        self.saves = 0

    def begin(self, step: int, write: Callable[[Path], list[Path]]) -> None:
        """Writes the state to local disk with ``write``, then uploads it in the background."""
        self.wait()
        directory = Path(tempfile.mkdtemp(prefix="raycolbert-state-"))
        try:
            files = write(directory)
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self.step = step
        self.saves += 1
        self._upload = self._pool.submit(self._send, step, directory, files)
        self._commit = None

    @property
    def running(self) -> bool:
        """Is anything on its way to storage?"""
        return any(future is not None and not future.done() for future in (self._upload, self._commit))

    @property
    def uploaded(self) -> bool:
        """Is there a save of this rank whose upload is through and that is not committed yet?

        Raises:
            StorageError: the upload failed.
        """
        if self._upload is None or not self._upload.done():
            return False
        self._upload.result()
        return True

    def commit(self, publish: Callable[[], None] | None) -> None:
        """All ranks have uploaded: ends the save; rank 0 passes what makes it visible."""
        self._upload = None
        if publish is not None:
            self._commit = self._pool.submit(publish)

    def wait(self) -> None:
        """Waits until nothing is running in the background.

        Raises:
            StorageError: the upload or the commit failed.
        """
        for future in (self._upload, self._commit):
            if future is not None:
                future.result()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _send(self, step: int, directory: Path, files: Sequence[Path]) -> None:
        begin = time.perf_counter()
        try:
            self._checkpoints.upload(step, self._attempt, self._rank, files)
        finally:
            shutil.rmtree(directory, ignore_errors=True)
            self.upload_s += time.perf_counter() - begin
