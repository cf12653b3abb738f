"""A start for the projection that keeps what the backbone already knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from colbert_core.encoder import ColBERT
from colbert_core.errors import DataError, DimensionError


def pca_projection(
    model: ColBERT, texts: Sequence[str], dim: int | None = None, *, token_budget: int | None = None
) -> Tensor:
    """The projection that best keeps what tells the backbone's token states apart.

    Its rows are the leading eigenvectors of the covariance of the L2-normalised last hidden states of
    the texts' tokens, among the directions orthogonal to their mean. Token states of pretrained
    encoders crowd around a common direction, which adds nearly the same amount to every dot product;
    a bias-free projection cannot subtract the mean, but it can leave its direction out. Measured
    against plain PCA of the second moment in ``docs/experiments.md``.

    Use it as ``model.projection.weight.data.copy_(pca_projection(model, texts))``, or pass it to
    :meth:`ColBERT.create`. Memory does not grow with the number of texts beyond their token ids.

    Args:
        model: gives backbone and tokenisation; its own projection is not used.
        texts: documents to take the token states from.
        dim: dimensions to keep; default: the model's.
        token_budget: most tokens of one batch, padding included; default: by device.

    Returns:
        fp32 ``[dim, hidden]`` on the CPU, orthonormal rows, the largest entry of each positive.

    Raises:
        DataError: there are no texts.
        DimensionError: ``dim`` exceeds the backbone's width.
    """
    dim = model.config.dim if dim is None else dim
    hidden = model.projection.in_features
    if dim > hidden:
        raise DimensionError(
            f"a projection to {dim} dimensions by PCA needs that many, the backbone has {hidden}"
        )
    if not texts:
        raise DataError("a projection by PCA needs documents, and there are none")
    count, total = 0, torch.zeros(hidden, dtype=torch.float64)
    moment = torch.zeros(hidden, hidden, dtype=torch.float64)
    with model.inference():
        for part in model.batches(model.text.documents(texts), token_budget):
            states = model.hidden_states(part.input_ids, part.attention_mask)[part.score].float()
            states = F.normalize(states, dim=-1)
            count += len(states)
            total += states.sum(dim=0).double().cpu()
            moment += (states.T @ states).double().cpu()
    mean = total / count
    direction = F.normalize(mean, dim=0)
    apart = torch.eye(hidden, dtype=torch.float64) - torch.outer(direction, direction)
    _, vectors = torch.linalg.eigh(apart @ (moment / count - torch.outer(mean, mean)) @ apart)
    rows = vectors.T.flip(0)[:dim].float()
    # Eigenvectors have no sign of their own.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()
