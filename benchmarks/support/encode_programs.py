"""Starting the programs that encode, and comparing them in each precision."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence

from benchmarks.support.line_protocol import Peer

OURS = "raycolbert"
MODES = {"fp32": ("fp32",), "bf16": ("bf16", "bf16-weights")}  # of a peer, by precision


def start(library: str, pythons: Mapping[str, str], threads: int) -> Peer:
    """The program of a library, in its environment.

    Args:
        library: ours, or a peer.
        pythons: the interpreter of each peer's environment.
        threads: that it computes on.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
    environment = dict.fromkeys(names, str(threads)) | {
        "RAYCOLBERT_PEER": library,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "true",
    }
    if library == OURS:
        return Peer(library, sys.executable, "benchmarks.support.encode_ours", environment)
    return Peer(library, pythons[library], "benchmarks.support.encode_peers", environment)


def precision_of(mode: str) -> str:
    """Which mode of ours a peer's is compared with."""
    return next(precision for precision, modes in MODES.items() if mode in modes)


def ratios(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """How many times as long they take, round by round."""
    return [peer / own for peer, own in zip(theirs, ours, strict=True)]


def lead(seconds: Mapping[tuple[str, str], Sequence[float]], peer: str, precision: str) -> float:
    """How many times as long a peer's fastest mode of a precision takes; the median of the rounds.

    Args:
        seconds: of each library and mode, by round.
        peer: its name.
        precision: 'fp32' or 'bf16'.
    """
    fastest = min((seconds[peer, mode] for mode in MODES[precision]), key=statistics.median)
    return statistics.median(ratios(fastest, seconds[OURS, precision]))
