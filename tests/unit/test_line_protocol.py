"""Peers of benchmarks: commands answered in order, errors and deaths told apart, prints kept away."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.support.line_protocol import ROOT, Peer, PeerError, serve


def add(left: int, right: int) -> int:
    print("a library that talks")
    return left + right


def fail(text: str) -> None:
    raise ValueError(text)


def leave(status: int) -> None:
    sys.exit(status)


def wait(seconds: float) -> None:
    time.sleep(seconds)


DRIVER = f"""
import sys
from benchmarks.support.line_protocol import Peer
peer = Peer("calculator", sys.executable, {__name__!r}, {{}})
print(peer.call("pid"), flush=True)
peer.call("wait", seconds=600)
"""


@pytest.fixture
def peer() -> Peer:
    return Peer("calculator", sys.executable, "tests.unit.test_line_protocol", {})


def test_commands_are_answered_in_order(peer: Peer) -> None:
    with peer:
        assert [peer.call("add", left=number, right=1) for number in range(20)] == list(range(1, 21))


def test_an_error_there_is_an_error_here_and_the_peer_goes_on(peer: Peer) -> None:
    with peer:
        with pytest.raises(PeerError, match=r"(?s)calculator: 'fail' failed:.*ValueError: too small"):
            peer.call("fail", text="too small")
        with pytest.raises(PeerError, match="KeyError: 'subtract'"):
            peer.call("subtract")
        assert peer.call("add", left=2, right=2) == 4


def test_a_death_is_told(peer: Peer) -> None:
    with peer:
        assert peer.call("add", left=2, right=2) == 4
        for command in ("leave", "add"):
            with pytest.raises(
                PeerError, match=f"(?s)calculator died in '{command}' with status 3:.*that talks"
            ):
                peer.call(command, status=3)


def test_a_peer_ends_with_its_driver_in_the_middle_of_a_command() -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert driver.stdout is not None
    peer = psutil.Process(int(driver.stdout.readline()))
    assert peer.is_running()
    driver.kill()
    driver.wait()
    driver.stdout.close()
    peer.wait(timeout=20)


def test_what_cannot_begin_says_why() -> None:
    reason = r"(?s)nobody died in 'add' .*No module named tests\.no_such_module"
    nobody = Peer("nobody", sys.executable, "tests.no_such_module", {})
    with nobody as peer, pytest.raises(PeerError, match=reason):
        peer.call("add", left="x" * 100_000)


if __name__ == "__main__":
    serve({"add": add, "fail": fail, "leave": leave, "pid": os.getpid, "wait": wait})
