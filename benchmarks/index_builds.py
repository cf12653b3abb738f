"""How long engines take to build an index of the same token vectors, in turn.

``python -m benchmarks.index_builds --data DIR --model DIR-OR-NAME@ALIAS [--root STORAGE] --cache DIR
--peer-python NAME=PATH``; arguments as for ``benchmarks.search``, which keeps the peers' indexes from one run
to the next, so that its build times are of different hours. Here every engine builds once in each round, in a
process of its own, and the index is thrown away. Compiling kernels is not counted: a machine does it once.
Medians over the rounds; a ratio is the median of those of the same round.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.support.results import Goal, finish
from benchmarks.support.search_contenders import OURS, build, our_contenders, parsed, peer_contenders, started
from benchmarks.support.search_vectors import add_set_options, chosen_set, texts_of

console = Console(width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Builds of indexes of the same token vectors, in turn.")
    parser.add_argument("--quick", action="store_true", help="the sample corpus, no peers, one round")
    add_set_options(parser)
    options, peers = parsed(parser)
    rounds = 1 if options.quick else options.rounds
    contenders = [*our_contenders((2, 4, 8), ()), *(peer_contenders()[name] for name in peers)]
    seconds: dict[str, list[float]] = {contender.label: [] for contender in contenders}
    versions: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="raycolbert-bench-") as name:
        cache = options.cache or Path(name) / "cache"
        files = chosen_set(texts_of(options.data, options.questions), options, cache)
        about = files.about
        turns = [contender for _ in range(rounds) for contender in contenders]
        for contender in track(turns, "building", console=console, transient=True):
            index = Path(name) / "index"
            with started(contender, peers, options.threads) as process:
                versions[contender.engine] = process.call("versions")
                built = build(process, contender, files, index, options.threads)
            shutil.rmtree(index)
            seconds[contender.label].append(built["seconds"])
            console.print(f"{contender.label}: {built['seconds']:,.0f} s")
    leads = leads_of(seconds)
    table = Table(
        *("engine", "built in s", "each", "over our slowest"),
        title=f"{about['texts']}: {about['vectors']:,} vectors, {about['documents']:,} documents",
        title_justify="left",
    )
    for label, each in seconds.items():
        cells = f"{statistics.median(each):,.1f}", " ".join(f"{one:,.1f}" for one in each)
        table.add_row(label, *cells, f"{leads[label]:.2f} ×" if label in leads else "")
    console.print(table)
    return finish(
        f"index_builds-{options.vectors}" if options.vectors else "index_builds",
        settings={"set": about, "threads": options.threads, "rounds": rounds, "peers": versions},
        results={"seconds": seconds, "leads": leads},
        goals=[Goal("fastest peer's build time / our slowest", min(leads.values()), 4.0)] if leads else [],
        console=console,
        quick=options.quick,
    )


def leads_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """For each peer the median, over the rounds, of its time over the slowest of ours in that round."""
    ours = [each for label, each in seconds.items() if label.startswith(OURS)]
    slowest = [max(each) for each in zip(*ours, strict=True)]
    return {
        label: statistics.median(theirs / mine for theirs, mine in zip(each, slowest, strict=True))
        for label, each in seconds.items()
        if not label.startswith(OURS)
    }


if __name__ == "__main__":
    raise SystemExit(main())
