"""A Ray cluster of one node, started as an operator would, to submit jobs to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from tests.ports import free_ports
from tests.processes import STOP_SECONDS, family, kill

BIN = Path(sys.executable).parent

_START_SECONDS = 60
_PORTS = (
    "port",
    "dashboard-port",
    "ray-client-server-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "object-manager-port",
    "node-manager-port",
)


@dataclass
class RayHead:
    """A running `ray start --head`.

    Attributes:
        address: of its dashboard.
        headers: for requests to the dashboard: its token.
        environment: for commands that use it.
        folder: its logs and all else that it writes lie below.
    """

    address: str
    headers: dict[str, str]
    environment: dict[str, str]
    folder: Path

    def run(self, *command: str, cwd: Path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end, whatever its status."""
        return subprocess.run(
            command,
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


@contextmanager
def ray_head(cpus: int = 2) -> Iterator[RayHead]:
    """Starts a head node on free ports, and stops it and removes its files at the end of the block."""
    ports = dict(zip(_PORTS, free_ports(len(_PORTS)), strict=True))
    # Short, since Ray's sockets live below it and their paths are bounded to about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="rjs", dir="/tmp"))
    # `python` of a submitted job is looked up on the PATH of `ray start`.
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / ".ray" / "auth_token"),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }
    environment.pop("RAY_ADDRESS", None)
    token = _new_token(folder)
    with (folder / "ray-start.log").open("wb") as log:
        process = subprocess.Popen(
            [
                str(BIN / "ray"),
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
                "--node-ip-address=127.0.0.1",
                f"--num-cpus={cpus}",
                "--object-store-memory=100000000",
                f"--temp-dir={folder}",
                *(f"--{name}={port}" for name, port in ports.items()),
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    headers = {"Authorization": f"Bearer {token}"}
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                httpx.get(f"{address}/api/jobs/", timeout=5, headers=headers).raise_for_status()
                break
            except httpx.HTTPError:
                output = (folder / "ray-start.log").read_text()
                assert process.poll() is None and time.monotonic() < until, output
                time.sleep(0.2)
        yield RayHead(address, headers, environment, folder)
    finally:
        started = family(process.pid)
        process.terminate()
        _, alive = psutil.wait_procs(started, STOP_SECONDS)
        kill(alive)
        process.wait(STOP_SECONDS)
        shutil.rmtree(folder, ignore_errors=True)


def _new_token(home: Path) -> str:
    """Makes the cluster's shared secret, as an operator does, in a home folder of its own."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [str(BIN / "ray"), "get-auth-token", "--generate"]
    subprocess.run(command, env={**plain, "HOME": str(home)}, check=True, capture_output=True)
    return (home / ".ray" / "auth_token").read_text(encoding="utf-8").strip()
