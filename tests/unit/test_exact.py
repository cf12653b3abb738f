"""Exact search: equal to the definition, whatever the blocks, with ties by document id."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colbert_core import exact
from colbert_core.errors import DimensionError, NonFiniteError
from colbert_core.exact import TopDocuments, exact_scores, exact_search, slice_texts
from colbert_core.vectors import RaggedVectors


def ragged(lengths: list[int], dim: int = 8, seed: int = 0) -> RaggedVectors:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(sum(lengths), dim, generator=generator)
    return RaggedVectors(torch.nn.functional.normalize(vectors, dim=-1), torch.tensor(lengths))


def by_definition(queries: RaggedVectors, documents: RaggedVectors) -> torch.Tensor:
    rows = []
    for query in queries:
        row = [
            (query @ document.T).max(dim=1).values.sum() if len(document) else torch.tensor(-torch.inf)
            for document in documents
        ]
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("query_lengths", [[3, 1, 7, 2], [1, 1, 1], [5]])
def test_scores_are_the_sum_of_maxima(query_lengths: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    queries = ragged(query_lengths)
    documents = ragged([4, 9, 0, 1, 30, 4, 12], seed=1)
    expected = by_definition(queries, documents)
    torch.testing.assert_close(exact_scores(queries, documents), expected)
    # Many small products instead of one.
    monkeypatch.setattr(exact, "_DOCUMENT_ROWS", 5)
    monkeypatch.setattr(exact, "_QUERY_TOKENS", 4)
    torch.testing.assert_close(exact_scores(queries, documents), expected)


def test_a_document_whose_best_similarity_is_negative_keeps_it() -> None:
    query = RaggedVectors(torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    documents = RaggedVectors(torch.tensor([[-1.0, 0.0], [-0.6, 0.8], [1.0, 0.0]]), torch.tensor([1, 2]))
    assert exact_scores(query, documents).tolist() == [[-1.0, 1.0]]


@pytest.mark.parametrize("depth", [1, 4, 100])
def test_search_over_blocks_is_the_sorted_matrix(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "_QUERY_BLOCK", 2)
    queries, documents = ragged([3, 2, 6]), ragged([4, 9, 0, 1, 5, 5, 7], seed=1)
    ids = ["d6", "d5", "d4", "d3", "d2", "d1", "d0"]
    blocks = [slice_texts(documents, 0, 2), slice_texts(documents, 2, 3), slice_texts(documents, 3, 7)]
    ranking = exact_search(queries, ids, blocks, depth)
    matrix = by_definition(queries, documents)
    for row, found in zip(matrix.tolist(), ranking, strict=True):
        expected = sorted(
            ((i, s) for i, s in zip(ids, row, strict=True) if s > -np.inf), key=lambda hit: (-hit[1], hit[0])
        )[:depth]
        assert [document for document, _ in found] == [document for document, _ in expected]
        np.testing.assert_allclose([s for _, s in found], [s for _, s in expected], rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), depth=st.integers(1, 12))
def test_top_documents_equal_a_full_sort_with_ties_by_id(data: st.DataObject, depth: int) -> None:
    count = data.draw(st.integers(1, 25))
    # Few distinct scores, so that most orders are decided by ties.
    scores = np.asarray(
        data.draw(
            st.lists(st.lists(st.integers(-2, 2), min_size=count, max_size=count), min_size=1, max_size=3)
        ),
        dtype=np.float32,
    )
    ids = data.draw(st.permutations([f"d{i:02d}" for i in range(count)]))
    cuts = [*sorted(data.draw(st.sets(st.integers(0, count)))), count]
    top = TopDocuments(len(scores), ids, depth)
    begin = 0
    for end in cuts:
        top.merge(0, begin, scores[:, begin:end])
        begin = end
    for row, found in zip(scores.tolist(), top.ranking(), strict=True):
        assert found == sorted(zip(ids, row, strict=True), key=lambda hit: (-hit[1], hit[0]))[:depth]


def test_bad_vectors_are_refused() -> None:
    documents = ragged([2, 3])
    with pytest.raises(DimensionError, match="queries have 4 dimensions, documents 8"):
        exact_scores(ragged([2], dim=4), documents)
    broken = ragged([2])
    broken.vectors[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="query vector"):
        exact_scores(broken, documents)
    with pytest.raises(DimensionError, match="3 ids, but 2 documents"):
        exact_search(ragged([2]), ["a", "b", "c"], [documents], 1)
    with pytest.raises(DimensionError, match="more documents than the 1 ids"):
        exact_search(ragged([2]), ["a"], [documents], 1)
