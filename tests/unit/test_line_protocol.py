"""Peers of benchmarks: commands answered in order, errors and deaths told apart, prints kept away."""

from __future__ import annotations

import sys

import pytest

from benchmarks.support.line_protocol import Peer, PeerError, serve


def add(left: int, right: int) -> int:
    print("a library that talks")
    return left + right


def fail(text: str) -> None:
    raise ValueError(text)


def leave(status: int) -> None:
    sys.exit(status)


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
    with peer, pytest.raises(PeerError, match="calculator died in 'leave' with status 3"):
        peer.call("leave", status=3)


if __name__ == "__main__":
    serve({"add": add, "fail": fail, "leave": leave})
