"""The codec: deterministic, independent of batches, as precise as its bits allow, never silently damaged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest

from colbert_core.config import CodecConfig
from colbert_core.errors import (
    DataError,
    DimensionError,
    IndexFormatError,
    NonFiniteError,
    SchemaVersionError,
)
from colbert_core.index import Codec, default_centroids
from colbert_core.index.assignment import Assigner, quantize_grid
from colbert_core.index.clustering import train_centroids
from colbert_core.index.quantizer import pack_levels, unpack_levels
from tests.clustered_vectors import make_corpus, train_codec, unit

CORPUS = make_corpus(300)


def test_training_is_a_function_of_sample_and_seed() -> None:
    first, again, other = train_codec(CORPUS), train_codec(CORPUS), train_codec(CORPUS, seed=1)
    assert first.sha256 == again.sha256
    assert first.sha256 != other.sha256


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_vector_is_encoded_alike_in_any_company(bits: int) -> None:
    codec = train_codec(CORPUS, bits=bits)
    whole = codec.encode(CORPUS.vectors)
    order = np.random.default_rng(0).permutation(len(CORPUS.vectors))
    shuffled = codec.encode(CORPUS.vectors[order])
    for name in ("centroids", "residuals", "scales", "residual_norms"):
        np.testing.assert_array_equal(getattr(whole, name)[order], getattr(shuffled, name))
    for row in (0, 7, 999):
        alone = codec.encode(CORPUS.vectors[row : row + 1])
        np.testing.assert_array_equal(alone.residuals[0], whole.residuals[row])
        assert alone.centroids[0] == whole.centroids[row]


# A uniform quantiser of a normal variable leaves .1188, .01154 and about .0001 of its variance (Max 1960);
# the two scale bytes add a little, most visibly at 8 bits.
@pytest.mark.parametrize(("bits", "share"), [(2, 0.13), (4, 0.014), (8, 0.0002)])
def test_the_error_is_what_the_bits_allow(bits: int, share: float) -> None:
    codec = train_codec(CORPUS, bits=bits)
    tokens = codec.encode(CORPUS.vectors)
    assert tokens.residuals.shape == (len(CORPUS.vectors), 32 * bits // 8)
    assert tokens.residual_norms is not None
    decoded = codec.decode(tokens)
    error = np.square(decoded - CORPUS.vectors).sum(axis=1).mean()
    assert error < share * np.square(tokens.residual_norms).mean()
    assert np.abs(np.linalg.norm(decoded, axis=1) - 1).max() < 0.01
    # No vector is much worse off than the others.
    worst = np.linalg.norm(decoded - CORPUS.vectors, axis=1).max()
    assert worst < 4 * np.sqrt(share * np.square(tokens.residual_norms).mean())


def test_tokens_get_their_nearest_centroid() -> None:
    codec = train_codec(CORPUS)
    rotated = codec.rotate(CORPUS.vectors)
    centroids = codec.centroids * codec.centroid_scale
    distances = np.square(rotated[:, None] - centroids).sum(axis=2)
    tokens = codec.encode(CORPUS.vectors)
    chosen = distances[np.arange(len(rotated)), tokens.centroids]
    assert (chosen == distances.min(axis=1)).mean() > 0.97
    assert chosen.mean() < 1.001 * distances.min(axis=1).mean()
    assert tokens.residual_norms is not None
    np.testing.assert_allclose(tokens.residual_norms, np.sqrt(chosen), rtol=1e-4)


def test_two_level_clustering_is_as_good_as_flat() -> None:
    rng = np.random.default_rng(0)
    vectors = unit(
        rng.standard_normal((40, 16))[rng.integers(0, 40, 12_000)] + 0.7 * rng.standard_normal((12_000, 16))
    )
    flat = faiss.Kmeans(16, 300, niter=8, seed=1, max_points_per_centroid=128)
    flat.train(vectors)

    def energy(centroids: np.ndarray) -> float:
        index = faiss.IndexFlatL2(16)
        index.add(centroids)
        return float(index.search(vectors, 1)[0].mean())

    ours = train_centroids(vectors, 300, iterations=8, seed=1, threads=1)
    assert ours.shape == (300, 16)
    assert energy(ours) < 1.03 * energy(flat.centroids)


def test_assignment_breaks_ties_by_number_and_copes_with_zeros() -> None:
    centroids = np.array([[1, 0], [0, 1], [0, 1], [-1, 0]], dtype=np.float32)
    assigner = Assigner(*quantize_grid(centroids))
    vectors = np.array([[0, 2], [3, 0], [-0.1, 0], [0, 0]], dtype=np.float32)
    assert assigner.nearest(vectors).tolist() == [1, 0, 3, 0]


def test_a_small_sample_gets_fewer_centroids_and_says_so() -> None:
    codec = Codec.train(CORPUS.vectors[:10], CodecConfig(centroids=64), threads=1)
    assert len(codec.centroids) == 10
    assert codec.training["notes"] == ["64 centroids were asked for, the sample has 10 vectors: trained 10"]
    assert train_codec(CORPUS).training["notes"] == []
    part = CORPUS.vectors[:1000]
    few = CodecConfig(centroids=64, kmeans_iterations=1)
    assert Codec.train(part, few, threads=1, total_tokens=10_000).training["notes"] == [
        "64 centroids are trained from a sample of 1000 vectors, fewer than 16 for each: a larger "
        "sample_tokens, or fewer centroids, would fit better"
    ]
    # A corpus that is no larger has no more to give.
    assert Codec.train(part, few, threads=1, total_tokens=1000).training["notes"] == []
    one = Codec.train(CORPUS.vectors[:1], CodecConfig(), threads=1)
    np.testing.assert_allclose(one.decode(one.encode(CORPUS.vectors[:1])), CORPUS.vectors[:1], atol=0.02)


def test_the_default_number_of_centroids_follows_the_plaid_rule() -> None:
    assert [default_centroids(n) for n in (1, 100, 1_000_000, 10_000_000_000)] == [16, 128, 8192, 1 << 20]
    codec = Codec.train(CORPUS.vectors, CodecConfig(kmeans_iterations=1), total_tokens=100, threads=1)
    assert len(codec.centroids) == 128


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_levels_survive_packing(bits: int) -> None:
    top = 127 if bits == 8 else (1 << bits) - 1
    step = 1 if bits == 8 else 2
    levels = np.random.default_rng(0).choice(np.arange(-top, top + 1, step), (50, 48)).astype(np.int8)
    packed = pack_levels(levels, bits)
    assert packed.shape == (50, 48 * bits // 8)
    np.testing.assert_array_equal(unpack_levels(packed, bits, 48), levels)


def test_any_dimension_is_padded() -> None:
    corpus = make_corpus(100, dim=20)
    codec = train_codec(corpus, bits=8)
    assert (codec.dim, codec.width) == (20, 32)
    decoded = codec.decode(codec.encode(corpus.vectors))
    assert decoded.shape == corpus.vectors.shape
    assert np.abs(decoded - corpus.vectors).max() < 0.02


def test_unfit_vectors_are_refused() -> None:
    codec = train_codec(CORPUS)
    with pytest.raises(DataError, match="empty"):
        Codec.train(CORPUS.vectors[:0], CodecConfig())
    with pytest.raises(DimensionError, match=r"\[n, 32\], not \[5, 31\]"):
        codec.encode(CORPUS.vectors[:5, :31])
    with pytest.raises(DimensionError, match="1025 dimensions"):
        Codec.train(np.ones((3, 1025), np.float32), CodecConfig())
    for value in (np.nan, np.inf):
        broken = CORPUS.vectors[:5].copy()
        broken[3, 2] = value
        with pytest.raises(NonFiniteError, match="token vector 3"):
            codec.encode(broken)
        with pytest.raises(NonFiniteError, match="token vector 3"):
            Codec.train(broken, CodecConfig())


def test_a_saved_codec_comes_back(tmp_path: Path) -> None:
    codec = train_codec(CORPUS)
    codec.save(tmp_path / "codec")
    loaded = Codec.load(tmp_path / "codec")
    assert loaded.sha256 == codec.sha256
    assert loaded.training == codec.training
    np.testing.assert_array_equal(
        loaded.encode(CORPUS.vectors).residuals, codec.encode(CORPUS.vectors).residuals
    )


def test_a_damaged_codec_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good"
    train_codec(CORPUS).save(good)
    rng = np.random.default_rng(0)
    for name in ("codec.safetensors", "codec.json"):
        data = (good / name).read_bytes()
        # Flip a bit anywhere, or cut the file off anywhere. Spaces between JSON tokens carry nothing.
        places = [place for place in rng.integers(0, len(data), 40) if data[place : place + 1].strip()]
        damages = [data[:place] for place in places[:10]]
        for place in places:
            flipped = bytearray(data)
            flipped[place] ^= 1 << int(rng.integers(8))
            damages.append(bytes(flipped))
        for damaged in damages:
            copy = tmp_path / "damaged"
            shutil.copytree(good, copy, dirs_exist_ok=True)
            (copy / name).write_bytes(damaged)
            with pytest.raises((IndexFormatError, SchemaVersionError)):
                Codec.load(copy)
    with pytest.raises(IndexFormatError, match=r"codec\.json"):
        Codec.load(tmp_path / "nowhere")


def test_a_newer_codec_is_not_guessed_at(tmp_path: Path) -> None:
    train_codec(CORPUS).save(tmp_path)
    path = tmp_path / "codec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(SchemaVersionError, match="schema version 2"):
        Codec.load(tmp_path)
