"""Retrieval quality through ir-measures, TREC files, and paired confidence intervals.

A ranking is ordered by score, highest first, ties by document id; that is the order in which search
answers. Every query that has judgements counts: one without results scores 0.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ir_measures
import numpy as np

from colbert_core.errors import DataError, NonFiniteError
from colbert_core.metric_names import parse_metric

Run = Mapping[str, Mapping[str, float]]
Qrels = Mapping[str, Mapping[str, int]]


def evaluate_run(run: Run, qrels: Qrels, metrics: Sequence[str]) -> dict[str, float]:
    """Means over all queries of ``qrels``; see :func:`per_query`."""
    return {
        name: math.fsum(values.values()) / len(values)
        for name, values in per_query(run, qrels, metrics).items()
    }


def per_query(run: Run, qrels: Qrels, metrics: Sequence[str]) -> dict[str, dict[str, float]]:
    """Each metric for each query.

    Args:
        run: query id to document id to score; queries without judgements are ignored.
        qrels: query id to document id to relevance; above 0 is relevant, and nDCG uses the grade.
        metrics: ``nDCG@k``, ``R@k`` (recall), ``P@k``, ``AP@k`` or ``MAP@k``, ``RR@k`` or ``MRR@k``,
            ``Success@k``.

    Returns:
        Metric, as it was asked for, to query id to value, for every query of ``qrels`` in its order.

    Raises:
        ConfigError: an unknown metric; the message lists those there are.
        DataError: no query has judgements.
        NonFiniteError: a score is a NaN or an infinity.
    """
    measures = {name: ir_measures.parse_measure("{}@{}".format(*parse_metric(name))) for name in metrics}
    if not qrels:
        raise DataError("qrels hold no query: there is nothing to average over")
    # Ranks instead of scores: the libraries behind ir-measures break ties each in its own way.
    ranked = {
        query: {document: -float(rank) for rank, document in enumerate(_ranking(query, run[query]))}
        for query in qrels
        if run.get(query)
    }
    judged = {query: dict(documents) for query, documents in qrels.items() if documents}
    found = {name: dict.fromkeys(qrels, 0.0) for name in metrics}
    if not ranked or not judged:
        return found
    names: dict[str, list[str]] = {}
    for name, measure in measures.items():
        names.setdefault(str(measure), []).append(name)
    for result in ir_measures.iter_calc(list(set(measures.values())), judged, ranked):
        for name in names[str(result.measure)]:
            found[name][result.query_id] = float(result.value)
    return found


def paired_bootstrap(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    samples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float, float]:
    """The mean difference ``a - b`` over the same queries, with a percentile bootstrap interval.

    Args:
        a, b: query id to value, for the same queries.
        samples: resamples of the queries.
        seed: of the resampling.
        confidence: coverage of the interval.

    Returns:
        Mean difference, lower and upper bound.

    Raises:
        DataError: the queries differ, or there are none.
    """
    if a.keys() != b.keys() or not a:
        missing = sorted(a.keys() ^ b.keys())
        raise DataError(
            f"paired values need the same queries; only one side has {missing[:5] or 'none at all'}"
        )
    # Sorted, so that the interval does not depend on the order in which queries were read.
    difference = np.asarray([a[query] - b[query] for query in sorted(a)], dtype=np.float64)
    generator = np.random.default_rng(seed)
    means = np.empty(samples)
    block = max(1, 4_000_000 // len(difference))
    for begin in range(0, samples, block):
        size = min(block, samples - begin)
        drawn = generator.integers(0, len(difference), size=(size, len(difference)))
        means[begin : begin + size] = difference[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(difference.mean()), float(low), float(high)


def write_trec_run(path: str | Path, run: Run, tag: str = "raycolbert") -> None:
    """Writes ``query Q0 document rank score tag`` lines, best first, ranks from 1.

    Raises:
        DataError: an id is empty or holds white space, which the format cannot carry.
        NonFiniteError: a score is a NaN or an infinity.
    """
    with Path(path).open("w", encoding="utf-8", newline="\n") as file:
        for query, scores in run.items():
            for rank, document in enumerate(_ranking(query, scores), start=1):
                for name in (query, document):
                    if len(name.split()) != 1 or name != name.strip():
                        raise DataError(f"{path}: the TREC format cannot carry the id {name!r}")
                file.write(f"{query} Q0 {document} {rank} {float(scores[document])!r} {tag}\n")


def read_trec_run(path: str | Path) -> dict[str, dict[str, float]]:
    """Reads a TREC run file.

    Raises:
        DataError: a line has not six fields, a score that is no finite number, or a document that its
            query already has; the message names the line.
    """
    run: dict[str, dict[str, float]] = {}
    for number, fields in _lines(path):
        if len(fields) != 6:
            raise DataError(f"{path}:{number}: expected 6 fields (query Q0 document rank score tag)")
        query, _, document, _, text, _ = fields
        score = _number(path, number, text)
        if document in run.setdefault(query, {}):
            raise DataError(f"{path}:{number}: document {document!r} stands twice for query {query!r}")
        run[query][document] = score
    return run


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    """Reads judgements: BEIR's tab-separated ``query-id corpus-id score`` (with or without a header), or
    TREC's ``query iteration document relevance``.

    Raises:
        DataError: a line has another number of fields, a relevance that is no whole number, or a pair
            that stands twice with different relevance; the message names the line.
    """
    qrels: dict[str, dict[str, int]] = {}
    for number, fields in _lines(path):
        if len(fields) not in (3, 4):
            raise DataError(f"{path}:{number}: expected 3 fields (query-id corpus-id score) or 4 (TREC)")
        query, document, text = fields[0], fields[-2], fields[-1]
        if number == 1 and not re.fullmatch(r"[+-]?\d+(\.0*)?", text):
            continue
        relevance = _number(path, number, text)
        if relevance != int(relevance):
            raise DataError(f"{path}:{number}: relevance {text!r} is not a whole number")
        if qrels.setdefault(query, {}).setdefault(document, int(relevance)) != int(relevance):
            raise DataError(f"{path}:{number}: query {query!r} and document {document!r} are judged twice")
    return qrels


def _ranking(query: str, scores: Mapping[str, float]) -> list[str]:
    for document, score in scores.items():
        if not math.isfinite(score):
            raise NonFiniteError(f"query {query!r}: document {document!r} has the score {score}")
    return sorted(scores, key=lambda document: (-scores[document], document))


def _lines(path: str | Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 1 and fields; tabs separate where there are any, else white space."""
    try:
        with Path(path).open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                text = line.rstrip("\r\n")
                if text.strip():
                    yield number, text.split("\t") if "\t" in text else text.split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from error


def _number(path: str | Path, line: int, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{path}:{line}: {text!r} is not a finite number")
    return value
