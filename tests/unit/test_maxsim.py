"""Late interaction against a plain double loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colbert_core import maxsim
from colbert_core.errors import DimensionError
from colbert_core.maxsim import maxsim_matrix, maxsim_padded, maxsim_pairs, maxsim_ragged
from colbert_core.vectors import RaggedVectors


def by_loop(query: Tensor, document: Tensor) -> Tensor:
    """Sum over query vectors of the largest dot product; minus infinity without document vectors."""
    if not len(document):
        return torch.tensor(-torch.inf)
    total = torch.zeros(())
    for q in query:
        total = total + torch.stack([q @ d for d in document]).max()
    return total


def ragged(lengths: list[int], dim: int, generator: torch.Generator, shift: float = 0.0) -> RaggedVectors:
    vectors = torch.randn(sum(lengths), dim, generator=generator) + shift
    return RaggedVectors(vectors, torch.tensor(lengths, dtype=torch.int64))


lengths_of = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@given(
    queries=lengths_of, documents=lengths_of, seed=st.integers(0, 2**31), shift=st.sampled_from([0.0, 3.0])
)
@settings(max_examples=60, deadline=None)
def test_matrix_ragged_and_pairs_equal_the_loop(
    queries: list[int], documents: list[int], seed: int, shift: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # A shift apart makes all similarities negative: where 0 stood for padding, it would win.
    q, d = ragged(queries, 3, generator, shift), ragged(documents, 3, generator, -shift)
    expected = torch.stack([torch.stack([by_loop(a, b) for b in d]) for a in q])
    pairs = torch.cartesian_prod(torch.arange(len(q)), torch.arange(len(d)))
    torch.testing.assert_close(maxsim_matrix(q, d), expected)
    torch.testing.assert_close(maxsim_pairs(q, d, pairs).view(len(q), len(d)), expected)
    for i in range(len(q)):
        torch.testing.assert_close(maxsim_ragged(q[i], d), expected[i])


def test_pairs_have_the_gradients_of_the_loop_and_sum_them_over_shared_documents() -> None:
    generator = torch.Generator().manual_seed(7)
    q, d = ragged([3, 5], 4, generator), ragged([2, 6, 1], 4, generator)
    pairs = torch.tensor([[0, 1], [1, 1], [0, 2], [1, 0], [0, 1]])
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.25])
    gradients = []
    for loop in (False, True):
        left = q.vectors.clone().requires_grad_()
        right = d.vectors.clone().requires_grad_()
        a, b = RaggedVectors(left, q.lengths), RaggedVectors(right, d.lengths)
        scores = (
            torch.stack([by_loop(a[i], b[j]) for i, j in pairs.tolist()])
            if loop
            else maxsim_pairs(a, b, pairs)
        )
        (scores * weights).sum().backward()
        gradients.append((scores.detach(), left.grad, right.grad))
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def test_padded_ignores_padding_in_scores_and_gradients() -> None:
    generator = torch.Generator().manual_seed(3)
    queries = torch.randn(2, 4, 5, generator=generator) + 2
    documents = torch.randn(2, 3, 6, 5, generator=generator) - 2
    query_mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    document_mask = torch.rand(2, 3, 6, generator=generator) < 0.5
    document_mask[:, :, 2] = True
    # What stands in padded cells must not matter, however large.
    documents[~document_mask] = 1e4
    queries.requires_grad_()
    documents.requires_grad_()
    scores = maxsim_padded(queries, documents, document_mask, query_mask)
    for b in range(2):
        for n in range(3):
            expected = by_loop(queries[b][query_mask[b]], documents[b, n][document_mask[b, n]])
            torch.testing.assert_close(scores[b, n], expected)
    scores.sum().backward()
    assert documents.grad is not None and queries.grad is not None
    assert (documents.grad[~document_mask] == 0).all()
    assert (queries.grad[~query_mask] == 0).all()
    assert (queries.grad[query_mask] != 0).any(dim=1).all()


def test_a_document_without_vectors_scores_minus_infinity_not_zero() -> None:
    queries = -torch.ones(1, 2, 3)
    documents = torch.ones(1, 2, 4, 3)
    mask = torch.zeros(1, 2, 4, dtype=torch.bool)
    mask[0, 1, 0] = True
    assert maxsim_padded(queries, documents, mask).tolist() == [[-torch.inf, -6.0]]
    assert maxsim_padded(queries, documents, mask & False).tolist() == [[-torch.inf, -torch.inf]]


def test_small_blocks_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(5)
    q, d = ragged([4, 2, 7], 8, generator), ragged([9, 1, 3, 0, 12, 5], 8, generator)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(6))
    matrix, chosen = maxsim_matrix(q, d), maxsim_pairs(q, d, pairs)
    monkeypatch.setattr(maxsim, "_BLOCK_CPU", 40)
    torch.testing.assert_close(maxsim_matrix(q, d), matrix)
    torch.testing.assert_close(maxsim_pairs(q, d, pairs), chosen)
    torch.testing.assert_close(chosen.view(3, 6), matrix)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("tokens", "dim"), [(1, 3), (32, 16), (33, 128), (150, 7)])
def test_tiles_of_the_cpu_kernel_leave_nothing_out(threads: int, tokens: int, dim: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Shorter than a tile, whole tiles, and every remainder; enough vectors for several threads.
    lengths = [*range(30), 1100, 0, 2500, 12]
    d = ragged(lengths, dim, generator, -1.0)
    q = ragged([tokens // 2, tokens - tokens // 2], dim, generator, 1.0)
    expected = torch.stack(
        [torch.stack([(a @ b.T).amax(1).sum() if len(b) else torch.tensor(-torch.inf) for b in d]) for a in q]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.testing.assert_close(maxsim_matrix(q, d), expected)
        half = RaggedVectors(d.vectors.half(), d.lengths)
        torch.testing.assert_close(maxsim_matrix(q, half), expected, rtol=1e-2, atol=1e-1)
        strided = RaggedVectors(d.vectors.T.contiguous().T, d.lengths)
        torch.testing.assert_close(maxsim_matrix(q, strided), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("most", [40, 1 << 20])
def test_what_serves_gpus_gives_the_same(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(maxsim, "_BLOCK_CPU", most)
    generator = torch.Generator().manual_seed(11)
    q, d = ragged([4, 0, 7], 8, generator, 1.0), ragged([9, 1, 3, 0, 12, 5, 40], 8, generator, -1.0)
    scores = torch.full((3, 7), torch.nan)
    for begin, end, block in maxsim._torch_blocks(q, d):
        scores[:, begin:end] = block
    scores[:, d.lengths == 0] = -torch.inf
    torch.testing.assert_close(scores, maxsim_matrix(q, d))


@pytest.mark.parametrize("row", [0, 5, 13, 25, 29])
def test_a_nan_shows_in_its_document_s_score_and_in_no_other(row: int) -> None:
    d = ragged([30, 30], 8, torch.Generator().manual_seed(1))
    d.vectors[row, 3] = torch.nan
    q = ragged([5], 8, torch.Generator().manual_seed(2))
    assert maxsim_matrix(q, d).isnan().tolist() == [[True, False]]


def test_scores_are_fp32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(5)
    q, d = ragged([4, 4], 64, generator), ragged([9, 5], 64, generator)
    pairs = torch.tensor([[0, 0], [1, 1]])
    plain = maxsim_pairs(q, d, pairs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = maxsim_pairs(q, d, pairs)
        assert maxsim_matrix(q, d).dtype == torch.float32
    assert cast.dtype == torch.float32 and torch.equal(cast, plain)


@pytest.mark.parametrize("pair", [[0, 2], [2, 0], [-1, 0]])
def test_pairs_out_of_range_are_named(pair: list[int]) -> None:
    q = ragged([1, 1], 2, torch.Generator().manual_seed(0))
    with pytest.raises(DimensionError, match=r"pair 1 names (query|document) -?\d of 2"):
        maxsim_pairs(q, q, torch.tensor([[0, 0], pair]))


def test_shapes_that_do_not_fit_are_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(DimensionError, match="query vectors have 3 dimensions, document vectors 4"):
        maxsim_matrix(ragged([1], 3, generator), ragged([1], 4, generator))
    with pytest.raises(DimensionError, match="expected"):
        maxsim_padded(torch.zeros(1, 2, 3), torch.zeros(1, 2, 2, 4), torch.ones(1, 2, 2).bool())
    with pytest.raises(DimensionError, match="lengths add up to 3"):
        RaggedVectors(torch.zeros(2, 4), torch.tensor([1, 2]))
    with pytest.raises(DimensionError, match="text 1 has -1 vectors"):
        RaggedVectors(torch.zeros(2, 4), torch.tensor([3, -1]))


def test_ragged_vectors_give_back_each_text() -> None:
    vectors = torch.arange(12.0).view(6, 2)
    items = RaggedVectors(vectors, torch.tensor([2, 0, 3, 1]))
    assert items.offsets.tolist() == [0, 2, 2, 5, 6]
    assert [len(item) for item in items] == [2, 0, 3, 1]
    assert torch.equal(items[2], vectors[2:5]) and torch.equal(items[-1], vectors[5:])
    padded, mask = items.padded()
    assert padded.shape == (4, 3, 2) and mask.sum(dim=1).tolist() == [2, 0, 3, 1]
    assert torch.equal(padded[mask], vectors) and (padded[~mask] == 0).all()
    with pytest.raises(IndexError):
        items[4]
