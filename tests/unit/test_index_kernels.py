"""Each step of a search against its definition, written plainly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from colbert_core.index import Codec, Shard, integer_product, write_shard
from colbert_core.index.engine import CpuEngine, Engine, run_here
from colbert_core.index.integer_tiles import STEP_WIDTH, has_tiles
from colbert_core.index.kernels import quantize_rows, rotate_rows
from colbert_core.index.merge import could_be_shown, could_survive, threshold
from colbert_core.index.merge_kernels import best_of_prefixes, not_outranked
from colbert_core.index.quantizer import unpack_levels
from colbert_core.index.query import Query, gather_gains, prepare_query
from colbert_core.index.shard_writer import id_hash
from colbert_core.index.torch_engine import TorchEngine
from tests.clustered_vectors import make_corpus, make_queries, train_codec

CORPUS = make_corpus(250, dim=40)
QUERIES = make_queries(CORPUS, 12)
LONG = CORPUS.vectors[:75]


@pytest.fixture(scope="module", params=[2, 4, 8])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    codec = train_codec(CORPUS, bits=request.param, centroids=90)
    directory = tmp_path_factory.mktemp("kernels") / "s"
    write_shard(directory, codec, CORPUS.ids, CORPUS.vectors, CORPUS.lengths)
    return Shard.open(directory, codec)


def cpu(codec: Codec, shards: Sequence[Shard]) -> Engine:
    return CpuEngine(codec, shards)


def on_torch(codec: Codec, shards: Sequence[Shard]) -> Engine:
    return TorchEngine(codec, shards, "cpu")


engines = pytest.mark.parametrize("make", [cpu, on_torch])


WAYS = {
    "units": integer_product.int8_units_are_exact(),
    "tiles": has_tiles(),
    "floats": True,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Makes integer products go one way, if this processor has it."""
    if not WAYS[request.param]:
        pytest.skip(f"no exact {request.param} on this processor")
    monkeypatch.setattr(integer_product, "int8_units_are_exact", lambda: request.param == "units")
    tiles = request.param == "tiles"
    monkeypatch.setattr(integer_product, "tiles_are_faster", lambda width: tiles and width % STEP_WIDTH == 0)
    return str(request.param)


@pytest.mark.parametrize("width", [2, 7, 16, 48, 128, 1024])
def test_integer_products_are_exact_by_every_way(width: int, way: str) -> None:
    rng = np.random.default_rng(0)
    left = rng.integers(-127, 128, (300, width)).astype(np.int8)
    left[0], left[1] = 127, -127
    right = rng.integers(-127, 128, (33, width)).astype(np.int8)
    right[0], right[1] = 127, -127
    expected = left.astype(np.int64) @ right.astype(np.int64).T
    product = integer_product.integer_product
    np.testing.assert_array_equal(product(left, right), expected)
    np.testing.assert_array_equal(product(left, integer_product.right_operand(right[:32])), expected[:, :32])
    wide = np.full((2, 2000), 127, dtype=np.int8)
    assert product(wide, wide).tolist() == [[127 * 127 * 2000] * 2] * 2
    assert product(left[:0], right).shape == (0, 33)


def test_rows_are_rounded_with_a_scale_of_their_own() -> None:
    rows = np.array([[1.0, -0.5, 0.0], [0, 0, 0], [-254, 3, 1]], dtype=np.float32)
    quantized, scales = np.empty((3, 3), np.int8), np.empty(3, np.float32)
    quantize_rows(rows, quantized, scales)
    assert quantized.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 2, 0]]
    np.testing.assert_allclose(scales, [1 / 127, 0, 2], rtol=1e-6)


def test_rotation_does_not_depend_on_the_number_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows, rotation = rng.standard_normal((500, 40)).astype("f4"), rng.standard_normal((40, 48)).astype("f4")
    together, alone = np.empty((500, 48), np.float32), np.empty((1, 48), np.float32)
    rotate_rows(rows, rotation, together)
    np.testing.assert_allclose(together, rows.astype(np.float64) @ rotation, atol=1e-4)
    for i in (0, 250, 499):
        rotate_rows(rows[i : i + 1], rotation, alone)
        np.testing.assert_array_equal(alone[0], together[i])


@engines
@pytest.mark.parametrize("probes", [1, 5, 90])
def test_probes_are_the_best_centroids(make: Callable[..., Engine], shard: Shard, probes: int) -> None:
    codec = shard.codec
    for vectors in (*QUERIES[:4], LONG):
        query = prepare_query(codec, vectors)
        tables = make(codec, [shard]).tables(query, probes, run_here)
        expected = codec.centroids.astype(np.int64) @ query.quantized.astype(np.int64).T
        np.testing.assert_array_equal(np.asarray(tables.scores), expected)
        for token in range(query.length):
            order = np.lexsort((np.arange(90), -expected[:, token]))[:probes]
            assert np.asarray(tables.probes)[token].tolist() == order.tolist()


def test_probes_with_equal_scores_go_by_number(shard: Shard) -> None:
    """Many centroids alike, on both sides of a block, and both ways of finding the best."""
    codec = shard.codec
    centroids = np.repeat(codec.centroids[:3], 200, axis=0)[np.random.default_rng(0).permutation(600)]
    tied = Codec(
        codec.bits,
        codec.rotation,
        centroids,
        codec.centroid_scale,
        codec.length_factors,
        codec.residual_factors,
        {},
    )
    query = prepare_query(tied, QUERIES[0])
    scores = centroids.astype(np.int64) @ query.quantized.astype(np.int64).T
    for engine in (cpu(tied, []), on_torch(tied, [])):
        for probes in (1, 37, 250, 600):
            found = np.asarray(engine.tables(query, probes, run_here).probes)
            for token in range(query.length):
                order = np.lexsort((np.arange(600), -scores[:, token]))[:probes]
                assert found[token].tolist() == order.tolist()


@engines
def test_gather_sums_the_best_gain_of_each_token(make: Callable[..., Engine], shard: Shard) -> None:
    engine = make(shard.codec, [shard])
    eligible = np.random.default_rng(0).random(len(shard)) < 0.7
    owners = np.repeat(np.arange(len(shard)), np.diff(shard.offsets))
    for vectors in (*QUERIES, LONG, QUERIES[0]):
        query = prepare_query(shard.codec, vectors)
        tables = engine.tables(query, 4, run_here)
        expected: dict[int, int] = {}
        for probes, gains in zip(np.asarray(tables.probes), np.asarray(tables.gains), strict=True):
            for document in np.unique(owners[np.isin(shard.codes, probes)]):
                held = np.isin(probes, shard.codes[owners == document])
                expected[int(document)] = expected.get(int(document), 0) + int(gains[held].max())
        documents, keys = engine.gather(0, tables, eligible)
        assert dict(zip(documents.tolist(), (keys >> 32).tolist(), strict=True)) == {
            document: total for document, total in expected.items() if eligible[document]
        }
        ties = [id_hash(name) & 0xFFFFFFFF for name in shard.ids(documents)]
        assert (keys & 0xFFFFFFFF).tolist() == ties
        engine.release(tables)


@engines
def test_gains_measure_what_a_probe_adds_over_none(make: Callable[..., Engine], shard: Shard) -> None:
    query = prepare_query(shard.codec, QUERIES[1])
    tables = make(shard.codec, [shard]).tables(query, 6, run_here)
    probes, gains = np.asarray(tables.probes), np.asarray(tables.gains)
    scores = np.take_along_axis(np.asarray(tables.scores).T[: query.length], probes, axis=1)
    true = (scores - scores[:, -1:]) * query.scales[: query.length, None]
    unit = gains.max() / true.max()
    np.testing.assert_allclose(gains, true * unit, atol=1)
    assert 1 << 15 < gains.max() <= 1 << 20


@engines
def test_a_single_probe_gains_its_score(make: Callable[..., Engine], shard: Shard) -> None:
    query = prepare_query(shard.codec, LONG)
    tables = make(shard.codec, [shard]).tables(query, 1, run_here)
    scores = np.asarray(tables.scores).T[: query.length]
    true = np.maximum(np.take_along_axis(scores, np.asarray(tables.probes), axis=1), 0)
    true *= query.scales[: query.length, None]
    gains = np.asarray(tables.gains)
    np.testing.assert_allclose(gains, true * (gains.max() / true.max()), atol=1)
    assert 1 << 10 < gains.max() <= 1 << 20
    # A centroid at more than a right angle to the token is no gain.
    least, half, most = gather_gains(np.array([[-9], [2], [4]], np.float32), np.ones(3, np.float32))[:, 0]
    assert least == 0 and most == pytest.approx(2 * half, abs=1)


@engines
def test_interaction_takes_the_best_centroid_of_each_token(make: Callable[..., Engine], shard: Shard) -> None:
    engine = make(shard.codec, [shard])
    documents = np.random.default_rng(0).permutation(len(shard))[:100].astype(np.int32)
    for vectors in (*QUERIES, LONG):
        query = prepare_query(shard.codec, vectors)
        tables = engine.tables(query, 1, run_here)
        table = np.asarray(tables.table).astype(np.int64)
        assert table[:, query.length :].max(initial=0) == 0
        assert table.max() == 255
        expected = [
            table[shard.codes[shard.offsets[i] : shard.offsets[i + 1]]].max(axis=0).sum() for i in documents
        ]
        keys = engine.interact(0, tables, documents)
        assert (keys >> 32).tolist() == expected
        assert (keys & 0xFFFFFFFF).tolist() == shard.tie_breaks[documents].tolist()
        engine.release(tables)
        # A byte is the score over the token's mean, in one unit for all tokens.
        scores = (codec_scores(shard, query.quantized) * query.scales)[:, : query.length]
        above = scores - scores.mean(axis=0)
        np.testing.assert_allclose(
            table[:, : query.length], np.clip(above * 255 / above.max(), 0, None), atol=1.01
        )


def codec_scores(shard: Shard, quantized: np.ndarray) -> np.ndarray:
    return shard.codec.centroids.astype(np.int64) @ quantized.astype(np.int64).T


def decoded_score(shard: Shard, document: int, query: Query) -> float:
    """MaxSim of the rounded query with the decoded tokens, in the rotated space."""
    codec, tokens = shard.codec, shard.tokens(document)
    levels = unpack_levels(tokens.residuals, codec.bits, codec.width)
    factors = codec.residual_factors[tokens.scales[:, 1:]].astype(np.float64)
    vectors = codec.centroids[tokens.centroids] * codec.centroid_scale + factors * levels
    np.testing.assert_allclose(
        codec.length_factors[tokens.scales[:, :1]] * vectors @ codec.rotation.T,
        codec.decode(tokens),
        atol=1e-5,
    )
    vectors *= codec.length_factors[tokens.scales[:, :1]]
    rounded = query.quantized[: query.length] * query.scales[: query.length, None]
    return float((vectors @ rounded.T).max(axis=0).sum())


def test_scores_are_the_same_by_every_way(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_tiles():
        pytest.skip("no tiles on this processor")
    documents = np.random.default_rng(0).permutation(len(shard)).astype(np.int32)
    for vectors in (*QUERIES, LONG):
        query = prepare_query(shard.codec, vectors)
        found = []
        for tiles in (True, False):
            monkeypatch.setattr("colbert_core.index.query.tiles_are_faster", lambda _, tiles=tiles: tiles)
            monkeypatch.setattr(integer_product, "tiles_are_faster", lambda _, tiles=tiles: tiles)
            engine = cpu(shard.codec, [shard])
            tables = engine.tables(query, 0, run_here)
            found.append(engine.score(0, tables, documents))
        np.testing.assert_array_equal(found[0], found[1])


@engines
def test_scores_are_maxsim_of_decoded_vectors(make: Callable[..., Engine], shard: Shard) -> None:
    engine, codec = make(shard.codec, [shard]), shard.codec
    documents = np.arange(len(shard), dtype=np.int32)[::-1].copy()
    for vectors in (*QUERIES, LONG):
        query = prepare_query(codec, vectors)
        tables = engine.tables(query, 0, run_here)
        scores = engine.score(0, tables, documents)
        expected = [decoded_score(shard, int(i), query) for i in documents]
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
        assert engine.score(0, tables, documents[:0]).shape == (0,)
        engine.release(tables)


def test_both_engines_agree_to_the_bit(shard: Shard) -> None:
    """Long documents included, whose tokens fill several rounds of the CPU's kernels."""
    first, second = cpu(shard.codec, [shard]), on_torch(shard.codec, [shard])
    eligible = np.ones(len(shard), dtype=np.bool_)
    for vectors in (*QUERIES, LONG):
        query = prepare_query(shard.codec, vectors)
        ours, theirs = (engine.tables(query, 7, run_here) for engine in (first, second))
        np.testing.assert_array_equal(ours.gains, theirs.gains)
        np.testing.assert_array_equal(ours.table, theirs.table)
        gathered = [
            dict(zip(*engine.gather(0, t, eligible), strict=True))
            for engine, t in ((first, ours), (second, theirs))
        ]
        assert gathered[0] == gathered[1]
        documents = np.arange(len(shard), dtype=np.int32)
        np.testing.assert_array_equal(
            first.interact(0, ours, documents), second.interact(0, theirs, documents)
        )
        np.testing.assert_array_equal(first.score(0, ours, documents), second.score(0, theirs, documents))
        first.release(ours)


def test_a_document_longer_than_a_round_is_scored_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = [3, 5000, 1, 2047, 2048, 2]
    vectors = rng.standard_normal((sum(lengths), 40)).astype(np.float32)
    codec = train_codec(CORPUS, bits=4)
    write_shard(tmp_path / "s", codec, list("abcdef"), vectors, lengths)
    shard = Shard.open(tmp_path / "s", codec)
    query = prepare_query(codec, QUERIES[0])
    engine = cpu(codec, [shard])
    tables = engine.tables(query, 0, run_here)
    together = engine.score(0, tables, np.arange(6, dtype=np.int32))
    alone = [engine.score(0, tables, np.array([i], dtype=np.int32))[0] for i in range(6)]
    assert together.tolist() == alone
    for i in range(6):
        assert together[i] == pytest.approx(decoded_score(shard, i, query), rel=1e-4)


def test_boards_start_over_when_stamps_run_out(shard: Shard) -> None:
    engine = CpuEngine(shard.codec, [shard])
    eligible = np.ones(len(shard), dtype=np.bool_)
    tables = engine.tables(prepare_query(shard.codec, QUERIES[0]), 3, run_here)
    documents, keys = engine.gather(0, tables, eligible)
    engine._idle_boards[0][0].stamp = (1 << 31) - 3
    again, keys_again = engine.gather(0, tables, eligible)
    np.testing.assert_array_equal(documents, again)
    np.testing.assert_array_equal(keys, keys_again)


def test_cut_offs_keep_whatever_some_prefix_keeps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        n, keep = int(rng.integers(1, 30)), int(rng.integers(1, 6))
        gather, values = rng.integers(0, 12, n), rng.integers(0, 12, n)
        expected = np.zeros(n, dtype=bool)
        for floor in np.unique(gather):
            there = gather >= floor
            best = np.sort(values[there])[::-1][min(keep, there.sum()) - 1]
            expected |= there & (values >= best)
        np.testing.assert_array_equal(could_survive(gather, values, keep), expected)


def test_whatever_two_cut_offs_show_is_sent() -> None:
    rng = np.random.default_rng(1)
    for _ in range(100):
        n, keep = int(rng.integers(1, 25)), int(rng.integers(1, 4))
        gather, interaction = rng.integers(0, 9, n), rng.integers(0, 9, n)
        scores = rng.integers(0, 9, n).astype(np.float32)
        sent = could_be_shown(gather, interaction, scores, keep)
        for first in np.unique(gather):
            for second in np.unique(interaction):
                there = (gather >= first) & (interaction >= second)
                if there.any():
                    best = np.sort(scores[there])[::-1][min(keep, there.sum()) - 1]
                    assert np.all(sent[there & (scores >= best)])


def test_the_kernels_of_cut_offs_by_hand() -> None:
    kept = np.empty(4, dtype=np.bool_)
    best_of_prefixes(np.array([9, 8, 7, 6]), np.array([3, 1, 5, 2]), 1, kept)
    assert kept.tolist() == [True, False, True, False]
    not_outranked(
        np.array([9, 8, 7, 6]), np.array([3, 4, 2, 1]), np.array([1, 2, 3, 0], dtype=np.float32), 1, kept
    )
    assert kept.tolist() == [True, True, True, False]


def test_a_threshold_is_the_last_key_kept() -> None:
    parts = [np.array([5, 1, 3]), np.array([4, 3]), np.array([], dtype=np.int64)]
    assert [threshold(parts, keep) for keep in (1, 2, 3, 4)] == [5, 4, 3, 3]
    assert threshold(parts, 5) == np.iinfo(np.int64).min
