"""Hierarchical token pooling."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from colbert_core.maxsim import maxsim_ragged
from colbert_core.pooling import pool_vectors
from colbert_core.vectors import RaggedVectors


def documents(lengths: list[int], dim: int = 8, seed: int = 0) -> RaggedVectors:
    generator = torch.Generator().manual_seed(seed)
    vectors = F.normalize(torch.randn(sum(lengths), dim, generator=generator), dim=-1)
    return RaggedVectors(vectors, torch.tensor(lengths))


@pytest.mark.parametrize("names", list(itertools.permutations(range(4))))
def test_vectors_that_point_the_same_way_are_merged(names: tuple[int, ...]) -> None:
    """Four directions, three jittered copies of each, interleaved."""
    generator = torch.Generator().manual_seed(1)
    order = torch.tensor(names)[torch.tensor([0, 1, 2, 0, 3, 1, 2, 3, 0, 1, 3, 2])]
    body = torch.eye(4, 8)[order] + 0.01 * torch.randn(12, 8, generator=generator)
    vectors = F.normalize(torch.cat([-torch.ones(1, 8), body]), dim=-1)
    pooled = pool_vectors(RaggedVectors(vectors, torch.tensor([13])), 3)
    assert pooled.lengths.tolist() == [5]
    assert torch.equal(pooled.vectors[0], vectors[0])
    # One mean per direction, in the order in which the text first names them.
    for position, direction in enumerate(names, start=1):
        expected = F.normalize(vectors[1:][order == direction].mean(dim=0), dim=-1)
        torch.testing.assert_close(pooled.vectors[position], expected)


@pytest.mark.parametrize("factor", [2, 3, 5, 100])
def test_counts_follow_the_factor_and_vectors_stay_on_the_unit_sphere(factor: int) -> None:
    lengths = [1, 2, 3, 10, 41]
    pooled = pool_vectors(documents(lengths), factor)
    # The first vector is kept; of the others one in `factor`, at least one.
    assert pooled.lengths.tolist() == [1 + min(n - 1, max(1, (n - 1) // factor)) for n in lengths]
    torch.testing.assert_close(pooled.vectors.norm(dim=1), torch.ones(len(pooled.vectors)))
    assert pooled.vectors.dtype == torch.float32


def test_factor_one_changes_nothing_and_all_tokens_may_be_pooled() -> None:
    original = documents([4, 7])
    assert pool_vectors(original, 1) is original
    assert pool_vectors(original, 2, protected=0).lengths.tolist() == [2, 3]


def test_pooling_one_document_does_not_depend_on_the_others() -> None:
    original = documents([9, 20, 5])
    pooled = pool_vectors(original, 2)
    for i in range(3):
        alone = pool_vectors(RaggedVectors(original[i], original.lengths[i : i + 1]), 2)
        assert torch.equal(alone.vectors, pooled[i])


def test_scores_of_redundant_documents_survive() -> None:
    """Each vector twice, nearly: half the vectors carry the score, half a truncation does not."""
    generator = torch.Generator().manual_seed(2)
    once = F.normalize(torch.randn(30, 16, generator=generator), dim=-1)
    twice = F.normalize(once.repeat(2, 1) + 0.02 * torch.randn(60, 16, generator=generator), dim=-1)
    full = RaggedVectors(torch.cat([twice[:1], twice]), torch.tensor([61]))
    query = F.normalize(torch.randn(8, 16, generator=generator), dim=-1)
    exact = maxsim_ragged(query, full)
    pooled = pool_vectors(full, 2)
    assert pooled.lengths.tolist() == [31]
    torch.testing.assert_close(maxsim_ragged(query, pooled), exact, rtol=0.02, atol=0)


def test_more_copies_of_one_vector_than_clusters_asked_for() -> None:
    same = F.normalize(torch.ones(9, 4), dim=-1)
    pooled = pool_vectors(RaggedVectors(same, torch.tensor([9])), 2)
    assert 2 <= pooled.lengths[0] <= 5
    torch.testing.assert_close(pooled.vectors, same[: len(pooled.vectors)])
