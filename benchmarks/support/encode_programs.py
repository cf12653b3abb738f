"""Starting the programs that encode, and comparing them in each precision."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks.support.line_protocol import Peer
from colbert_core.precision import fast_precision

OURS = "raycolbert"
DEFAULT = "fp32"  # of the peers, where nothing else is asked for
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


def default_leads(
    seconds: Mapping[tuple[str, str], Sequence[float]], peers: Iterable[str]
) -> dict[str, float]:
    """How many times as long peers take, all as they come; medians of the rounds.

    Ours encodes for an index in bf16 where the processor has it; the peers do in fp32 unless told otherwise.

    Args:
        seconds: of each library and mode, by round.
        peers: their names; one is left out if it, or ours, was not measured so.
    """
    ours = OURS, fast_precision(torch.device("cpu"))
    return {
        peer: statistics.median(ratios(seconds[peer, DEFAULT], seconds[ours]))
        for peer in peers
        if ours in seconds and (peer, DEFAULT) in seconds
    }
