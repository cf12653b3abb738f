"""Metrics against values worked out by hand, TREC files, and the paired bootstrap."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from colbert_core.errors import ConfigError, DataError, NonFiniteError
from colbert_core.metrics import (
    evaluate_run,
    paired_bootstrap,
    per_query,
    read_qrels,
    read_trec_run,
    write_trec_run,
)

QRELS = {"q1": {"a": 1, "b": 2, "x": 0}, "q2": {"c": 1}, "q3": {"d": 1}}
RUN = {
    "q1": {"x": 9.0, "a": 8.0, "y": 7.0, "b": 6.0},  # relevant at ranks 2 and 4
    "q2": {"c": 0.1, "a": -5.0},  # relevant at rank 1
    "unjudged": {"a": 1.0},
}  # q3 has no result


def test_values_by_hand_and_queries_without_results_count_as_zero() -> None:
    values = per_query(
        RUN, QRELS, ["nDCG@10", "nDCG@2", "R@1", "R@3", "P@4", "AP@10", "RR@10", "RR@1", "Success@3"]
    )
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    q1 = {
        "nDCG@10": (1 / math.log2(3) + 2 / math.log2(5)) / ideal,
        "nDCG@2": (1 / math.log2(3)) / ideal,
        "R@1": 0.0,
        "R@3": 0.5,
        "P@4": 0.5,
        "AP@10": (1 / 2 + 2 / 4) / 2,
        "RR@10": 0.5,
        "RR@1": 0.0,
        "Success@3": 1.0,
    }
    for name, value in q1.items():
        assert values[name]["q1"] == pytest.approx(value), name
        assert values[name]["q2"] == pytest.approx(0.25 if name == "P@4" else 1.0), name
        assert values[name]["q3"] == 0.0
        assert list(values[name]) == ["q1", "q2", "q3"]
    means = evaluate_run(RUN, QRELS, ["RR@10", "R@3"])
    assert means == pytest.approx({"RR@10": 0.5, "R@3": 0.5})


def test_aliases_are_answered_under_the_name_asked_for() -> None:
    means = evaluate_run(RUN, QRELS, ["MAP@10", "AP@10", "MRR@10", "RR@10"])
    assert list(means) == ["MAP@10", "AP@10", "MRR@10", "RR@10"]
    assert means["MAP@10"] == means["AP@10"] == pytest.approx(0.5)
    assert means["MRR@10"] == means["RR@10"] == pytest.approx(0.5)


@pytest.mark.parametrize("metric", ["nDCG@1", "RR@1", "R@1", "AP@1", "P@1", "Success@1"])
def test_ties_are_broken_by_document_id_as_search_does(metric: str) -> None:
    qrels = {"q": {"b": 1}}
    assert evaluate_run({"q": {"b": 1.0, "c": 1.0, "a": 0.5}}, qrels, [metric]) == {metric: 1.0}
    assert evaluate_run({"q": {"b": 1.0, "a": 1.0}}, qrels, [metric]) == {metric: 0.0}


def test_the_order_of_a_mapping_and_the_scale_of_scores_do_not_matter() -> None:
    qrels = {"q": {"a": 1, "b": 3, "c": 1}}
    scores = {"a": 1e-30, "z": 2e-30, "b": 3e-30, "c": -1e30}
    reverse = dict(reversed(scores.items()))
    metrics = ["nDCG@10", "AP@10", "RR@10"]
    assert evaluate_run({"q": scores}, qrels, metrics) == evaluate_run({"q": reverse}, qrels, metrics)
    assert evaluate_run({"q": scores}, qrels, ["RR@10"]) == {"RR@10": 1.0}


def test_an_empty_run_scores_zero_and_empty_qrels_are_an_error() -> None:
    assert evaluate_run({}, QRELS, ["nDCG@10"]) == {"nDCG@10": 0.0}
    assert evaluate_run({"q1": {}}, QRELS, ["nDCG@10"]) == {"nDCG@10": 0.0}
    with pytest.raises(DataError, match="no query"):
        evaluate_run(RUN, {}, ["nDCG@10"])


@pytest.mark.parametrize("name", ["nDCG", "nDCG@0", "nDCG@x", "ERR@10", "recall@3", "", "R@-1", "nDCG@10 or"])
def test_unknown_metrics_are_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown metric .*nDCG@k.*MRR@k"):
        evaluate_run(RUN, QRELS, ["R@1", name])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_scores_are_named(bad: float, tmp_path: Path) -> None:
    run = {"q1": {"a": 1.0, "b": bad}}
    with pytest.raises(NonFiniteError, match="query 'q1': document 'b'"):
        evaluate_run(run, QRELS, ["R@1"])
    with pytest.raises(NonFiniteError, match="query 'q1': document 'b'"):
        write_trec_run(tmp_path / "run", run)


def test_bootstrap_finds_the_difference_and_its_spread() -> None:
    generator = np.random.default_rng(0)
    noise = generator.normal(size=400)
    b = {f"q{i}": float(value) for i, value in enumerate(noise)}
    a = {
        f"q{i}": float(value + 0.1 + 0.5 * e)
        for i, (value, e) in enumerate(zip(noise, generator.normal(size=400), strict=True))
    }
    mean, low, high = paired_bootstrap(a, b, samples=4000, seed=1)
    difference = np.asarray([a[q] - b[q] for q in a])
    assert mean == pytest.approx(difference.mean())
    # For 400 values the percentile interval is close to the normal one. An unpaired one would be
    # about 2.9 times as wide, since the noise that both share would count.
    width = 2 * 1.96 * difference.std() / 20
    assert high - low == pytest.approx(width, rel=0.08)
    assert low < mean < high
    assert paired_bootstrap(a, b, samples=4000, seed=1) == (mean, low, high)
    assert paired_bootstrap(dict(reversed(a.items())), b, samples=4000, seed=1) == (mean, low, high)
    assert paired_bootstrap(a, b, samples=4000, seed=2) != (mean, low, high)
    flipped = paired_bootstrap(b, a, samples=4000, seed=1)
    assert flipped == pytest.approx((-mean, -high, -low))


def test_bootstrap_blocks_do_not_change_the_spread() -> None:
    a = {str(i): float(i % 2) for i in range(3000)}
    b = dict.fromkeys(a, 0.5)
    mean, low, high = paired_bootstrap(a, b, samples=3000)
    assert mean == 0.0 and high - low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(3000), rel=0.1)
    assert paired_bootstrap(a, a) == (0.0, 0.0, 0.0)


def test_bootstrap_needs_the_same_queries() -> None:
    with pytest.raises(DataError, match=r"only one side has \['q2'\]"):
        paired_bootstrap({"q1": 1.0, "q2": 0.0}, {"q1": 1.0})
    with pytest.raises(DataError, match="none at all"):
        paired_bootstrap({}, {})


def test_a_run_survives_the_trip_through_a_file(tmp_path: Path) -> None:
    run = {"質問1": {"d2": 0.1 + 0.2, "d1": 1e-17, "d3": 0.1 + 0.2}, "q2": {"d9": -3.0}}
    path = tmp_path / "run.trec"
    write_trec_run(path, run, tag="ours")
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "質問1 Q0 d2 1 0.30000000000000004 ours"
    assert [line.split()[2:4] for line in lines] == [["d2", "1"], ["d3", "2"], ["d1", "3"], ["d9", "1"]]
    assert read_trec_run(path) == run


@pytest.mark.parametrize("bad", ["a b", "", "tab\t", "\u3000"])
def test_ids_that_the_format_cannot_carry_are_refused(bad: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot carry the id"):
        write_trec_run(tmp_path / "run", {"q": {bad: 1.0}})
    with pytest.raises(DataError, match="cannot carry the id"):
        write_trec_run(tmp_path / "run", {bad: {"d": 1.0}})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1 Q0 d 1 0.5", "expected 6 fields"),
        ("q1 Q0 d 1 much tag", "'much' is not a finite number"),
        ("q1 Q0 d 1 nan tag", "'nan' is not a finite number"),
        ("q1 Q0 a 2 0.5 tag", "document 'a' stands twice for query 'q1'"),
    ],
)
def test_broken_run_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run"
    path.write_text(f"q1 Q0 a 1 0.9 tag\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"run:3: {message}"):
        read_trec_run(path)


@pytest.mark.parametrize(
    "text",
    [
        "query-id\tcorpus-id\tscore\nq1\tdoc 1\t1\nq1\tb\t0\nq2\tc\t2\n",
        "q1\tdoc 1\t1\r\nq1\tb\t0\r\nq2\tc\t2\r\n",
        "\ufeffq1\t0\tdoc 1\t1\n\nq1\t0\tb\t0\nq2\t0\tc\t2.0",
    ],
)
def test_qrels_are_read_in_each_layout(tmp_path: Path, text: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_bytes(text.encode())
    assert read_qrels(path) == {"q1": {"doc 1": 1, "b": 0}, "q2": {"c": 2}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q1\td", "expected 3 fields"),
        ("q1\td\t0.5", "relevance '0.5' is not a whole number"),
        ("q1\td\tyes", "'yes' is not a finite number"),
        ("q1\ta\t0", "query 'q1' and document 'a' are judged twice"),
    ],
)
def test_broken_qrels_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text(f"q1\ta\t1\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"qrels.tsv:2: {message}"):
        read_qrels(path)
    with pytest.raises(DataError, match="not readable"):
        read_qrels(tmp_path / "nowhere.tsv")
