"""A file whose reader dies: Ray's workers import it, so it has a module of its own."""

from __future__ import annotations

import os
from pathlib import Path

from colbert_core.model_files import LocalFile


class DyingFile(LocalFile):
    """A local file; the first process but its maker's that reads beyond the header is gone at once."""

    def __init__(self, path: Path, mark: Path) -> None:
        super().__init__(path)
        self._mark = mark
        self._maker = os.getpid()

    def read_into(self, start: int, buffer: memoryview) -> None:
        if os.getpid() != self._maker and not self._mark.exists():
            self._mark.touch()
            os._exit(1)
        super().read_into(start, buffer)
