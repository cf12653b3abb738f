"""A worker for tests of the pool of actors; imports nothing heavy, for its process starts anew."""

from __future__ import annotations

import os
import signal
from pathlib import Path


class FragileWorker:
    """Does not survive its first task, as long as ``mark`` does not exist."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def double(self, number: int) -> int:
        if not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return 2 * number
