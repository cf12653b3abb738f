"""Hierarchical token pooling: fewer vectors per document.

Vectors of one document that point the same way are merged into their mean, by Ward's clustering
(Clavié, Chaffin and Adams 2024, "Reducing the footprint of multi-vector retrieval with minimal
performance impact via token pooling").
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, ward

from colbert_core.vectors import RaggedVectors


def pool_vectors(vectors: RaggedVectors, factor: int, protected: int = 1) -> RaggedVectors:
    """Keeps about one vector in ``factor`` of each document.

    Ward's method runs on the vectors themselves: between vectors of length 1 the Euclidean distance is a
    monotone function of the cosine. Means are scaled back to length 1.

    Args:
        vectors: L2-normalised token vectors.
        factor: of n vectors that may be merged, at most ``max(1, n // factor)`` remain; fewer where vectors
            are identical.
        protected: the first vectors of a document, [CLS], which are never merged.

    Returns:
        The protected vectors, then the means in the order of each cluster's first member.
    """
    if factor <= 1:
        return vectors
    pooled = [_pool(one.cpu().numpy(), factor, protected) for one in vectors]
    flat = np.concatenate(pooled) if pooled else np.zeros((0, vectors.dim), dtype=np.float32)
    lengths = torch.tensor([len(one) for one in pooled], dtype=torch.int64)
    return RaggedVectors(torch.from_numpy(flat).to(vectors.vectors.device), lengths, vectors.padding_fraction)


def _pool(vectors: NDArray[np.float32], factor: int, protected: int) -> NDArray[np.float32]:
    head, body = vectors[:protected], vectors[protected:]
    keep = max(1, len(body) // factor)
    if len(body) <= keep:
        return vectors
    labels = fcluster(ward(body.astype(np.float64)), t=keep, criterion="maxclust")
    _, first, group = np.unique(labels, return_index=True, return_inverse=True)
    # Clusters are numbered by scipy; the text's order is what a reader expects.
    rank = np.argsort(np.argsort(first))[group]
    means = np.zeros((len(first), body.shape[1]), dtype=np.float64)
    np.add.at(means, rank, body)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)
    return np.concatenate([head, means.astype(np.float32)])
