"""Which centroid a vector gets, where there are too many to compare it with all of them."""

from __future__ import annotations

import numpy as np
import pytest

from colbert_core.index import assignment, integer_product
from colbert_core.index.assignment import COMPARED_WITH_ALL, Assigner, comparisons, quantize_grid
from colbert_core.index.integer_tiles import has_tiles

WIDTH = 32


@pytest.fixture(scope="module")
def centroids() -> np.ndarray:
    """Float32 ``[17,000, 32]`` in 120 groups, some of them twice."""
    rng = np.random.default_rng(0)
    groups = rng.standard_normal((120, WIDTH))
    made = groups[np.sort(rng.integers(0, 120, 17_000))] + 0.6 * rng.standard_normal((17_000, WIDTH))
    made[5000:5100] = made[3000:3100]
    assert len(made) > COMPARED_WITH_ALL
    return made.astype(np.float32)


@pytest.fixture(scope="module")
def vectors(centroids: np.ndarray) -> np.ndarray:
    """Near centroids; the first hundred are those that are there twice."""
    rng = np.random.default_rng(1)
    chosen = np.concatenate([np.arange(5000, 5100), rng.integers(0, len(centroids), 20_000)])
    noise = 0.3 * rng.standard_normal((len(chosen), WIDTH))
    noise[:100] = 0
    return (centroids[chosen] + noise).astype(np.float32)


@pytest.fixture(scope="module")
def flat(centroids: np.ndarray) -> Assigner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assignment, "COMPARED_WITH_ALL", 1 << 20)
        return Assigner(*quantize_grid(centroids))


def test_the_nearest_of_a_few_cells_is_nearly_always_the_nearest(
    centroids: np.ndarray, vectors: np.ndarray, flat: Assigner
) -> None:
    found, best = Assigner(*quantize_grid(centroids)).nearest(vectors), flat.nearest(vectors)
    assert (found == best).mean() > 0.99
    distances = [np.linalg.norm(vectors - centroids[each], axis=1) for each in (found, best)]
    assert distances[0].mean() < 1.001 * distances[1].mean()
    # Of equal ones, which are in the same cell, the lowest.
    assert found[:100].tolist() == list(range(3000, 3100))


def test_it_does_not_depend_on_what_it_is_batched_with(centroids: np.ndarray, vectors: np.ndarray) -> None:
    assigner = Assigner(*quantize_grid(centroids))
    together = assigner.nearest(vectors)
    for part in (slice(0, 1), slice(16_000, 16_900), slice(7, None, 500)):
        assert assigner.nearest(vectors[part]).tolist() == together[part].tolist()
    assert assigner.nearest(vectors[:0]).shape == (0,)
    again = Assigner(*quantize_grid(centroids))
    assert again.nearest(vectors[::10]).tolist() == together[::10].tolist()


def test_with_all_cells_it_is_the_nearest_of_all(
    centroids: np.ndarray, vectors: np.ndarray, flat: Assigner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assignment, "nearest_cells", lambda cells: cells)
    assigner = Assigner(*quantize_grid(centroids))
    assert assigner.nearest(vectors[:2000]).tolist() == flat.nearest(vectors[:2000]).tolist()


def test_other_products_give_the_same_cells(
    centroids: np.ndarray, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Assigner(*quantize_grid(centroids)).nearest(vectors)
    tiles = assignment.tiles_are_faster(WIDTH)
    if not has_tiles():
        pytest.skip("this processor has no tiles")
    for module in (assignment, integer_product):
        monkeypatch.setattr(module, "tiles_are_faster", lambda width: not tiles)
    assert Assigner(*quantize_grid(centroids)).nearest(vectors).tolist() == found.tolist()


def test_how_much_is_compared() -> None:
    assert comparisons(8192) == 8192
    assert comparisons(16_384) == 128 + 16 * 128
    assert comparisons(32_768) == 256 + 32 * 128
    assert comparisons(1 << 20) == 1024 + 32 * 1024
