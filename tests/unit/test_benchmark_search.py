"""The arithmetic of the benchmarks of search, growth, encoding and exact scores, and when a goal is met."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from benchmarks import search_stages
from benchmarks.growth import exponent, half_way, write_part
from benchmarks.index_builds import leads_of
from benchmarks.search import OURS, Benchmark
from benchmarks.support import encode_programs
from benchmarks.support.encode_programs import default_leads
from benchmarks.support.exported_model import some_of
from benchmarks.support.growth_ours import Program as Growth
from benchmarks.support.maxsim_programs import METHODS
from benchmarks.support.probed_tokens import ProbedTokens
from benchmarks.support.search_files import VectorFiles
from benchmarks.support.search_ours import build_index
from benchmarks.support.search_vectors import (
    Texts,
    encoded,
    exact_ranking,
    exact_scores,
    pooled,
    recombined,
    write_set,
)
from colbert_core.config import CodecConfig, ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from colbert_core.index import Codec, open_index
from colbert_core.index.codec import EncodedTokens
from colbert_core.index.engine import CpuEngine, run_here
from colbert_core.index.query import prepare_query
from colbert_core.index.shard import Shard
from tests.tiny_models import tiny_bert_dir


@pytest.fixture
def files(tmp_path: Path) -> VectorFiles:
    """300 documents of 1 to 9 vectors, and 4 questions of 2 to 5."""
    rng = np.random.default_rng(0)
    lengths, asked = rng.integers(1, 10, 300), np.array([2, 3, 4, 5])
    vectors = rng.standard_normal((lengths.sum() + asked.sum(), 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    documents, queries = np.split(vectors, [lengths.sum()])
    tokens = np.arange(len(documents))
    return write_set(
        tmp_path / "set", documents.astype(np.float16), lengths, tokens, queries, asked, {"texts": "random"}
    )


def test_exact_scores_are_maxsim(files: VectorFiles) -> None:
    assert files.about == {"texts": "random", "documents": 300, "vectors": len(files.vectors), "questions": 4}
    scores = exact_scores(files)
    for query, row in zip(files.queries, scores, strict=True):
        for number in (0, 1, 255, 256, 299):
            document = files.document(number).astype(np.float32)
            assert row[number] == pytest.approx((query @ document.T).max(axis=1).sum(), abs=1e-5)
    best = exact_ranking(files)
    assert best.shape == (4, 100)
    assert (np.take_along_axis(scores, best, 1) == -np.sort(-scores, axis=1)[:, :100]).all()
    assert (exact_ranking(files) == best).all()


def test_recombined_vectors_begin_with_the_real_ones(files: VectorFiles, tmp_path: Path) -> None:
    more = recombined(files, 10_000, tmp_path)
    real = len(files.vectors)
    assert 10_000 <= len(more.vectors) == more.lengths.sum() < 10_020
    assert (more.lengths[:300] == files.lengths).all()
    assert more.vectors[:real].astype(np.float32) == pytest.approx(files.vectors.astype(np.float32), abs=1e-3)
    assert np.linalg.norm(more.vectors.astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)
    # Each made-up vector is near the one it came from, and is not that one.
    origin = np.load(more.folder / "token_ids.npy")
    cosines = (more.vectors.astype(np.float32) * files.vectors[origin].astype(np.float32)).sum(axis=1)
    assert cosines[real:].mean() == pytest.approx(0.912, abs=0.01)
    assert cosines[real:].max() < 0.999
    assert more.about["recombined_from"] == real
    assert (recombined(files, 10_000, tmp_path).vectors == more.vectors).all()


def test_texts_are_encoded_once_and_pooled_from_that(tmp_path: Path) -> None:
    config = ColBERTConfig(dim=16, document_length=20, query_length=8)
    model = ColBERT.create(tiny_bert_dir(tmp_path / "bert"), config, seed=0)
    save_model(model, tmp_path / "model")
    texts = Texts("words", ["red cat, blue dog", "cat", "green bird and a red dog"], ["blue cat"], [{0: 1}])
    files = encoded(texts, str(tmp_path / "model"), None, tmp_path / "cache")
    vectors = model.eval().encode_documents(texts.documents)
    assert files.lengths.tolist() == vectors.lengths.tolist()
    assert files.vectors == pytest.approx(vectors.vectors.numpy(), abs=0.02)  # bf16, where that is fast
    assert len(np.load(files.folder / "token_ids.npy")) == len(files.vectors)
    shutil.rmtree(tmp_path / "model")
    assert encoded(texts, str(tmp_path / "model"), None, tmp_path / "cache").folder == files.folder
    half = pooled(files, 2, tmp_path / "cache")
    assert half.lengths.tolist() == [1 + max(1, (length - 1) // 2) for length in files.lengths]
    assert np.linalg.norm(half.vectors.astype(np.float32), axis=1) == pytest.approx(1, abs=2e-3)
    assert half.queries[0].tolist() == files.queries[0].tolist()


def test_some_texts_keep_their_labels() -> None:
    documents = [f"document {number}" for number in range(100)]
    questions = [f"question {number}" for number in range(40)]
    texts = Texts("words", documents, questions, [{number: 1, 99: 2} for number in range(40)])
    kept = some_of(texts, 20)
    assert len(set(kept.documents)) == len(kept.documents) == 20
    assert set(kept.documents) <= set(documents)
    # 99 and one more for each question, until half of the documents answer one; others may be met by chance.
    assert 9 <= len(kept.questions) == len(kept.relevant) < 20
    for question, labels in zip(kept.questions, kept.relevant, strict=True):
        number = int(question.split()[1])
        assert {kept.documents[place]: label for place, label in labels.items()} == {
            documents[number]: 1,
            documents[99]: 2,
        }
    assert some_of(texts, 20) == kept != some_of(texts, 20, seed=1)
    everything = some_of(texts, 1000)
    assert sorted(everything.documents) == sorted(documents)
    assert sorted(everything.questions) == sorted(questions)


def test_libraries_are_compared_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        (OURS, "bf16"): [1.0, 2.0, 1.0],
        ("peer", "bf16"): [1.5, 4.0, 2.0],
        (OURS, "fp32"): [2.0, 2.0, 2.0],
        ("peer", "fp32"): [5.0, 4.0, 3.0],
    }
    monkeypatch.setattr(encode_programs, "fast_precision", lambda device: "bf16")
    assert default_leads(seconds, ["peer"]) == {"peer": 3.0}  # ratios of the same round: 5, 2 and 3
    del seconds["peer", "fp32"]
    assert default_leads(seconds, ["peer"]) == {}
    monkeypatch.setattr(encode_programs, "fast_precision", lambda device: "fp32")
    seconds["peer", "fp32"] = [5.0, 4.0, 3.0]
    assert default_leads(seconds, ["peer"]) == {"peer": 2.0}


def test_builds_are_compared_within_a_round() -> None:
    seconds = {
        f"{OURS} 2-bit": [10.0, 20.0, 10.0],
        f"{OURS} 4-bit": [12.0, 18.0, 11.0],
        "peer": [48.0, 100.0, 33.0],
    }
    assert leads_of(seconds) == {"peer": 4.0}  # 4, 5 and 3


def test_growth_is_a_power_of_the_size() -> None:
    rows = [
        {"vectors": n, "build_s": 3e-6 * n**1.2, "scan_ms": 0.01 * n**0.5, "rest_ms": 10 * n**0.1}
        for n in (1e5, 3e5, 1e6)
    ]
    assert exponent(rows, "build_s")["exponent"] == pytest.approx(1.2)
    assert exponent(rows, "build_s")["factor"] == pytest.approx(3e-6)
    half = half_way(rows)
    assert half is not None
    assert 0.01 * half**0.5 == pytest.approx(10 * half**0.1)
    assert half_way([{"vectors": n, "scan_ms": 1 + 1 / n, "rest_ms": n} for n in (1, 2, 3)]) is None


def test_a_size_is_the_first_documents_of_one_order(files: VectorFiles, tmp_path: Path) -> None:
    documents = np.random.default_rng(1).permutation(300)[:120]
    assert write_part(files, documents, tmp_path / "part") == files.lengths[documents].sum()
    part = VectorFiles(tmp_path / "part")
    assert part.lengths.tolist() == files.lengths[documents].tolist()
    for place, number in enumerate(documents):
        assert (part.document(place) == files.document(number)).all()
    program = Growth()
    built = program.build(str(part.folder), str(tmp_path / "index"), threads=1)
    assert built["seconds"] > 0 and built["centroids"] > 0
    program.open(str(part.folder), str(tmp_path / "index"), threads=2)
    times = program.single(10, {"probes": 100}, str(tmp_path / "found.npy"))
    assert {len(values) for values in times.values()} == {4}
    # A stage is part of the whole; one that was never called took nothing.
    for total, tables, score in zip(times["total"], times["tables"], times["score"], strict=True):
        assert 0 < tables < total and score > 0
    best = np.argsort(-exact_scores(part), axis=1, kind="stable")[:, 0]
    assert (np.load(tmp_path / "found.npy")[:, 0] == best).mean() >= 0.75


@pytest.mark.parametrize("method", [name for name in METHODS if name != "maxsim-cpu"])
def test_methods_that_are_timed_give_maxsim(files: VectorFiles, method: str) -> None:
    documents = files.vectors.astype(np.float32)
    score = METHODS[method](files.queries[1], documents, files.lengths)
    assert np.asarray(score()) == pytest.approx(exact_scores(files)[1], abs=1e-5)


def reading(engine: str, recall: float, p50: float, qps: float) -> dict[str, object]:
    figures = {"recall": recall, "p50_ms": p50, "qps": qps}
    return {"engine": engine} | {f"{name}@{k}": value for name, value in figures.items() for k in (10, 100)}


def test_goals_compare_at_the_recall_that_peers_reach(files: VectorFiles, tmp_path: Path) -> None:
    bench = Benchmark(files, exact_ranking(files), [{0: 1}] * 4, tmp_path, tmp_path / "cache", 2)
    bench.rows = [
        reading(f"{OURS} 4-bit", 0.86, 2.0, 500),
        reading(f"{OURS} 8-bit", 0.82, 1.0, 900),  # fast, but larger than the peer's
        reading(f"{OURS} 8-bit", 0.97, 6.0, 100),
        reading("peer", 0.84, 5.0, 200),
        reading("peer", 0.91, 9.0, 150),
    ]
    bench.engines = {
        f"{OURS} 4-bit": {"build_s": 10, "bytes_per_token": 70},
        f"{OURS} 8-bit": {"build_s": 12, "bytes_per_token": 140},
        "peer": {"build_s": 60, "bytes_per_token": 80},
    }
    goals = {goal.name: goal for goal in bench.goals()}
    assert goals["recall@10 ≥ 0.80: peers' p50 / ours"].value == 2.5
    assert goals["recall@10 ≥ 0.80: our QPS / peers'"].value == 2.5
    assert goals["recall@10 ≥ 0.90: peers' p50 / ours"].value == 1.5
    assert not goals["recall@10 ≥ 0.90: peers' p50 / ours"].met
    assert goals["recall@10 ≥ 0.85: bytes per token"].met
    assert not goals["recall@10 ≥ 0.90: bytes per token"].met
    assert goals["fastest peer's build time / our slowest"].value == 5
    assert not any("0.95" in name for name in goals)
    bench.rows = [*bench.rows[:1], reading("peer", 0.99, 5.0, 200)]
    unmet = {goal.name: goal for goal in bench.goals()}
    assert unmet["recall@10 ≥ 0.98: peers' p50 / ours"].value == 0
    assert not unmet["recall@10 ≥ 0.98: bytes per token"].met


@pytest.mark.parametrize("bits", [2, 4])
def test_probed_tokens_are_scored_without_decoding(files: VectorFiles, tmp_path: Path, bits: int) -> None:
    build_index(files, tmp_path / "index", CodecConfig(residual_bits=bits, centroids=64), threads=1)
    searcher = open_index(tmp_path / "index")
    codec, (shard,) = searcher.codec, searcher.shards
    engine, tokens = CpuEngine(codec, [shard]), ProbedTokens(codec, shard)
    every = np.arange(300, dtype=np.int32)
    for number in (0, 3, 1):  # sums of an earlier query are not those of the next
        query = files.queries[number]
        tables = engine.tables(prepare_query(codec, query), 64, run_here)
        # With all centroids probed nothing is estimated, and WARP's scores are those of the residuals.
        documents, scores = tokens.search(tables, 64)
        assert sorted(documents) == every.tolist()
        assert scores[np.argsort(documents)] == pytest.approx(engine.score(0, tables, every), abs=1e-5)

        documents, scores = tokens.search(tables, 2)
        probed = [set(row) for row in tables.probes[:, :2].tolist()]
        missing = tokens.missing(tables)
        assert len(documents) == len(set(documents)) < 300
        for document, score in zip(documents.tolist(), scores.tolist(), strict=True):
            rows = range(shard.offsets[document], shard.offsets[document + 1])
            expected = 0.0
            for i, centroids in enumerate(probed):
                kept = [row for row in rows if int(shard.codes[row]) in centroids]
                exact = similarities(codec, shard, kept, query[i]) if kept else []
                expected += max(exact, default=missing[i] * tables.query.scales[i])
            assert score == pytest.approx(expected, abs=0.02)  # the query is rounded to int8
        engine.release(tables)


def similarities(codec: Codec, shard: Shard, rows: list[int], vector: np.ndarray) -> list[float]:
    """Of a query vector and tokens of a shard, decoded."""
    tokens = EncodedTokens(shard.codes[rows].astype(np.uint32), shard.residuals[rows], shard.scales[rows])
    return (codec.decode(tokens) @ vector).tolist()


def test_the_stages_of_a_search_all_answer(files: VectorFiles, tmp_path: Path) -> None:
    build_index(files, tmp_path / "index", CodecConfig(residual_bits=4, centroids=64), threads=1)
    rows = [
        {"bits": 4, **row}
        for row in search_stages.readings(
            search_stages.settings(tmp_path / "index"), files, exact_ranking(files)[:, :10], 1
        )
    ]
    best = {way: max(row["recall"] for row in rows if row["way"] == way) for way in {r["way"] for r in rows}}
    assert len(best) == 5
    assert min(best.values()) > 0.7
    assert all(row["p50_ms"] > 0 for row in rows)
    by_way = search_stages.by_way(rows, 4, 0.7)
    assert by_way.keys() == best.keys()
    assert by_way[search_stages.OURS] == min(
        row["p50_ms"] for row in rows if row["way"] == search_stages.OURS and row["recall"] >= 0.7
    )
    assert search_stages.by_way(rows, 2, 0.0) == {}
