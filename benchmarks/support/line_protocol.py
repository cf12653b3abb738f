"""One JSON object a line, over standard input and output: how a benchmark drives a peer.

A peer runs in an environment of its own, so this module needs nothing but Python. The driver decides
when each peer works: of several peers that take turns, only one computes at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
_LAST_BYTES = 2000
WATCH_S = 1.0  # how often a peer looks whether its driver lives


class PeerError(RuntimeError):
    """A peer answered with an error, or died; the message holds its traceback."""


class Peer:
    """A program in another process, and maybe another environment. Use as a context manager.

    Args:
        name: what to call it.
        python: the interpreter of its environment.
        module: what it runs; it calls :func:`serve`.
        environment: variables to set.
    """

    def __init__(self, name: str, python: str, module: str, environment: Mapping[str, str]) -> None:
        self.name = name
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the peer
        self._process = subprocess.Popen(
            [python, "-m", module],
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
        )

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, command: str, **arguments: Any) -> Any:
        """Runs a command there and waits for its result.

        Raises:
            PeerError: the command failed, or the process died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise PeerError(f"{self.name} died in {command!r} with status {status}{self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {command!r} failed:\n{answer['error']}")
        return answer["result"]

    def _last_words(self) -> str:
        """The end of what it and its libraries printed, from a new line on."""
        size = self._said.seek(0, os.SEEK_END)
        self._said.seek(max(0, size - _LAST_BYTES))
        text = self._said.read().decode("utf-8", "replace").strip()
        return f":\n{text}" if text else ""

    def close(self) -> None:
        """Ends the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what a peer that has died was not told
                    pipe.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def serve(handlers: Mapping[str, Callable[..., Any]]) -> None:
    """Answers commands until standard input ends; what libraries print goes to standard error.

    The process ends with the one that started it, in the middle of a command too: what went on computing
    would disturb the next measurement.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"result": handlers[request.pop("command")](**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(WATCH_S)
    os._exit(1)
