"""The engines of the search benchmark: the index of each, and the settings that it is searched with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.support.line_protocol import Peer
from benchmarks.support.search_engine import Settings
from benchmarks.support.search_files import VectorFiles

OURS = "raycolbert"
_OURS_MODULE = "benchmarks.support.search_ours"
_PEERS_MODULE = "benchmarks.support.search_peers"
_BOUNDS = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Contender:
    """An engine with one index, and the settings that it is searched with.

    Attributes:
        label: what the table calls it.
        engine: name of the program or peer.
        build: settings of the index.
        searches: quality settings.
    """

    label: str
    engine: str
    build: Settings
    searches: tuple[Settings, ...]


def our_contenders(bits: Sequence[int], cuts: Sequence[tuple[int, int, int]]) -> list[Contender]:
    """This project's index with residuals of so many bits, over probes, candidates and rerank."""
    searches = tuple(dict(zip(("probes", "candidates", "rerank"), cut, strict=True)) for cut in cuts)
    return [Contender(f"{OURS} {b}-bit", OURS, {"residual_bits": b}, searches) for b in bits]


CUTS = (
    (2, 200, 50),
    (4, 400, 100),
    (8, 500, 100),
    (8, 1000, 200),
    (16, 1000, 200),
    (16, 2000, 400),
    (32, 2000, 400),
    (32, 4000, 1000),
    (64, 8000, 2000),
)


def peer_contenders() -> dict[str, Contender]:
    """The peers at their defaults, and to both sides of them; tachiom chooses its number of centroids."""
    refined: tuple[Settings, ...] = (
        {"k_centroids": 10, "ef_search": 15, "k_docs_to_score": 200},
        {},
        {"k_centroids": 30, "ef_search": 45},
        {"k_centroids": 40, "ef_search": 60, "k_docs_to_score": 1000, "alpha": None},
        {"k_centroids": 80, "ef_search": 120, "k_docs_to_score": 2000, "alpha": None},
        {"k_centroids": 160, "ef_search": 240, "k_docs_to_score": 4000, "alpha": None},
    )
    probed = ((4, 512), (8, 1024), (8, 4096), (16, 8192), (32, 16384))
    cuts = tuple({"n_ivf_probe": probes, "n_full_scores": scores} for probes, scores in probed)
    warped: tuple[Settings, ...] = ({}, {"nprobe": 16}, {"nprobe": 32}, {"nprobe": 64, "bound": 256})
    found = (
        Contender("tachiom", "tachiom", {}, refined),
        Contender("fast-plaid 4-bit", "fast-plaid", {"nbits": 4}, cuts),
        Contender("PyLate PLAID 4-bit", "pylate", {"nbits": 4}, cuts),
        Contender("xtr-warp-rs 4-bit", "xtr-warp-rs", {"nbits": 4}, warped),
    )
    return {contender.engine: contender for contender in found}


def parsed(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command line of a benchmark of engines, and the interpreter of each peer that it names."""
    parser.add_argument("--vectors", type=int, help="recombine the vectors to so many")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    pythons = dict(item.split("=", 1) for item in options.peer_python)
    known = peer_contenders()
    if unknown := set(pythons) - set(known):
        parser.error(f"--peer-python: no peer {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return options, pythons


def started(contender: Contender, pythons: Mapping[str, str], threads: int) -> Peer:
    """A process of a contender, which builds and searches at its commands.

    Args:
        contender: the engine.
        pythons: a peer's name to the interpreter of an environment that has it.
        threads: what its libraries may use.
    """
    ours = contender.engine == OURS
    return Peer(
        contender.label,
        sys.executable if ours else pythons[contender.engine],
        _OURS_MODULE if ours else _PEERS_MODULE,
        {**dict.fromkeys(_BOUNDS, str(threads)), "RAYCOLBERT_PEER": contender.engine},
    )


def build(
    process: Peer, contender: Contender, files: VectorFiles, index: Path, threads: int
) -> dict[str, float]:
    """Has a contender's process build its index, and returns the figures of that."""
    built: dict[str, float] = process.call(
        "build", folder=str(files.folder), index=str(index), settings=contender.build, threads=threads
    )
    return built
