"""The training objectives: pure functions of student and teacher scores.

Rows are queries, columns the n documents of a query; scores of different rows are never compared, save by
the in-batch contrastive term. Sources: JaColBERTv2.5, sections 3.1 to 3.3; MarginMSE after Hofstätter et
al. 2020, without a hinge.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from colbert_core.config import LossConfig
from colbert_core.errors import DimensionError, NonFiniteError


def minmax(scores: Tensor) -> Tensor:
    """Scales each row to 0 … 1, differentiable: ``(s - min) / (max - min + 1e-8)``.

    Args:
        scores: float ``[B, n]``. A row of equal scores becomes zeros.
    """
    low = scores.amin(dim=-1, keepdim=True)
    high = scores.amax(dim=-1, keepdim=True)
    return (scores - low) / (high - low + 1e-8)


def kl_distillation(student: Tensor, teacher: Tensor, config: LossConfig) -> Tensor:
    """KL divergence from the teacher's to the student's distribution over a query's documents.

    Per query, ``sum_i t_i (log t_i - log s_i)`` over softmax distributions of the scores, normalised as
    ``config.normalize`` says and divided by each side's temperature; the mean over queries.

    Args:
        student, teacher: float ``[B, n]``.
        config: normalisation and temperatures.

    Returns:
        A scalar. It is not scaled by the squared temperature.
    """
    if config.normalize == "both":
        student = minmax(student)
    if config.normalize != "none":
        teacher = minmax(teacher)
    return F.kl_div(
        F.log_softmax(student / config.student_temperature, dim=-1),
        F.log_softmax(teacher / config.teacher_temperature, dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def margin_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the margins between the first document and each other one.

    Args:
        student, teacher: float ``[B, n]``, as they are: margins are compared in the units of the scores.
    """
    return F.mse_loss(student[:, :1] - student[:, 1:], teacher[:, :1] - teacher[:, 1:])


def contrastive(student: Tensor, temperature: float = 1.0, in_batch: Tensor | None = None) -> Tensor:
    """Cross-entropy of the first document against the query's others.

    Args:
        student: float ``[B, n]``, the positive first.
        temperature: divides the scores.
        in_batch: float ``[B, m]``, the scores of each query against other queries' documents, as further
            negatives; minus infinity takes a document out (a query's own, or a duplicate of its positive).
    """
    scores = student if in_batch is None else torch.cat([student, in_batch], dim=1)
    target = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
    return F.cross_entropy(scores / temperature, target)


def distillation_loss(
    student: Tensor, teacher: Tensor, config: LossConfig, *, in_batch: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the terms that ``config`` asks for, computed in fp32.

    Args:
        student: float ``[B, n]``, n at least 2, the scores to train.
        teacher: float ``[B, n]``, the scores to learn from.
        config: weights, normalisation and temperatures.
        in_batch: float ``[B, m]``, see :func:`contrastive`; used if ``config.in_batch_negatives``.

    Returns:
        The scalar loss, and each term that has a weight, detached and without its weight.

    Raises:
        DimensionError: the shapes differ or hold fewer than 2 documents, or ``config.in_batch_negatives``
            is set and ``in_batch`` is missing or has another number of rows.
        NonFiniteError: a NaN or an infinity in the scores; the message names side, row and column.
    """
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[1] < 2 or not len(student):
        raise DimensionError(
            f"student scores are {list(student.shape)}, teacher scores {list(teacher.shape)}: both must be "
            "[B, n] with at least 1 query and 2 documents"
        )
    student, teacher = student.float(), teacher.to(student.device).float()
    _require_finite("student", student)
    _require_finite("teacher", teacher)
    terms: dict[str, tuple[float, Tensor]] = {}
    if config.kl:
        terms["kl"] = config.kl, kl_distillation(student, teacher, config)
    if config.margin_mse:
        terms["margin_mse"] = config.margin_mse, margin_mse(student, teacher)
    if config.contrastive:
        others = _in_batch(student, in_batch) if config.in_batch_negatives else None
        terms["contrastive"] = (
            config.contrastive,
            contrastive(student, config.contrastive_temperature, others),
        )
    loss = torch.stack([weight * value for weight, value in terms.values()]).sum()
    return loss, {name: value.detach() for name, (_, value) in terms.items()}


def _in_batch(student: Tensor, in_batch: Tensor | None) -> Tensor:
    if in_batch is None or in_batch.ndim != 2 or len(in_batch) != len(student):
        given = None if in_batch is None else list(in_batch.shape)
        raise DimensionError(f"in_batch_negatives needs in_batch scores [{len(student)}, m], not {given}")
    in_batch = in_batch.float()
    # Minus infinity is how a caller takes a document out; its softmax weight and gradient are 0.
    _require_finite("in-batch", in_batch.masked_fill(in_batch == -torch.inf, 0.0))
    return in_batch


def _require_finite(side: str, scores: Tensor) -> None:
    bad = ~torch.isfinite(scores)
    if bad.any():
        row, column = bad.nonzero()[0].tolist()
        raise NonFiniteError(
            f"{side} score of query row {row}, document {column} is {float(scores[row, column])}"
        )
