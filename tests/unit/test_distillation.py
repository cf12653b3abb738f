"""The losses against values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from cluster.config import TrainPhase
from colbert_core.config import LossConfig
from colbert_core.distillation import (
    contrastive,
    distillation_loss,
    kl_distillation,
    margin_mse,
    minmax,
)
from colbert_core.errors import DimensionError, NonFiniteError

LN2 = math.log(2)


def tensor(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def loss_of(student: Tensor, teacher: Tensor, in_batch: Tensor | None = None, **options: Any) -> float:
    return float(distillation_loss(student, teacher, LossConfig(**options), in_batch=in_batch)[0])


def test_minmax_scales_each_row() -> None:
    scaled = minmax(tensor([2.0, 6.0, 3.0], [-1.0, -3.0, -2.0], [5.0, 5.0, 5.0]))
    torch.testing.assert_close(scaled, tensor([0.0, 1.0, 0.25], [1.0, 0.0, 0.5], [0.0, 0.0, 0.0]))


def test_minmax_carries_the_gradient_of_minimum_and_maximum() -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0]], dtype=torch.float64, requires_grad=True)
    minmax(scores)[0, 2].backward()
    # f = (c - a) / (b - a): df/da = (c - b) / (b - a)^2, df/db = -(c - a) / (b - a)^2, df/dc = 1 / (b - a).
    torch.testing.assert_close(scores.grad, torch.tensor([[-2 / 9, -1 / 9, 1 / 3]], dtype=torch.float64))
    assert torch.autograd.gradcheck(minmax, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


def test_kl_of_raw_scores_is_the_divergence_from_the_teacher() -> None:
    student = tensor([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    teacher = tensor([0.0, LN2, 2 * LN2], [7.0, 7.0, 7.0])
    # Teacher 1/7, 2/7, 4/7 against 1/3 each; the second row agrees. The mean over queries halves it.
    one = sum(t * math.log(t * 3) for t in (1 / 7, 2 / 7, 4 / 7))
    assert loss_of(student, teacher, normalize="none") == pytest.approx(one / 2, rel=1e-5)
    # The direction counts: KL(student || teacher) would be another number.
    assert one != pytest.approx(sum(math.log(1 / 3 / t) / 3 for t in (1 / 7, 2 / 7, 4 / 7)), rel=1e-2)


def test_temperatures_divide_each_side() -> None:
    student, teacher = tensor([0.0, 4 * LN2]), tensor([0.0, 0.5 * LN2])
    # Student at 4: 1/3, 2/3. Teacher at 0.5: the same. No squared temperature anywhere.
    options = {"normalize": "none", "student_temperature": 4.0, "teacher_temperature": 0.5}
    assert loss_of(student, teacher, **options) == pytest.approx(0.0, abs=1e-7)
    options["student_temperature"] = 2.0  # 1/5, 4/5
    expected = math.log(1 / 3 / (1 / 5)) / 3 + 2 * math.log(2 / 3 / (4 / 5)) / 3
    assert loss_of(student, teacher, **options) == pytest.approx(expected, rel=1e-5)


def test_kl_of_min_max_on_both_sides_with_temperatures() -> None:
    """The paper's loss: the student's row is 0, 1, 1/2 and the teacher's 0, 1, 1/4, then each is divided."""
    student, teacher = tensor([1.0, 3.0, 2.0]), tensor([-2.0, 6.0, 0.0])

    def softmax(*logits: float) -> list[float]:
        return [math.exp(x) / sum(map(math.exp, logits)) for x in logits]

    plain = zip(softmax(0, 1, 0.25), softmax(0, 1, 0.5), strict=True)
    assert loss_of(student, teacher) == pytest.approx(sum(t * math.log(t / s) for t, s in plain), rel=1e-4)
    sharp = zip(softmax(0, 4, 1), softmax(0, 2, 1), strict=True)
    assert loss_of(student, teacher, student_temperature=0.5, teacher_temperature=0.25) == pytest.approx(
        sum(t * math.log(t / s) for t, s in sharp), rel=1e-4
    )


def test_normalisation_modes_touch_the_side_they_name() -> None:
    student, teacher = tensor([10.0, 20.0]), tensor([0.0, 4.0])
    p = 1 / (1 + math.e)  # softmax of (0, 1), the min-max of both rows

    def kl(t: float, s: float) -> float:
        return t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s))

    raw_student, raw_teacher = 1 / (1 + math.exp(10)), 1 / (1 + math.exp(4))
    assert loss_of(student, teacher, normalize="both") == pytest.approx(0.0, abs=1e-6)
    assert loss_of(student, teacher, normalize="teacher") == pytest.approx(kl(p, raw_student), rel=1e-4)
    assert loss_of(student, teacher, normalize="none") == pytest.approx(
        kl(raw_teacher, raw_student), rel=1e-3
    )


@given(
    st.lists(st.integers(-1000, 1000), min_size=3, max_size=6, unique=True),
    st.floats(0.1, 50),
    st.floats(-100, 100),
)
def test_min_max_on_both_sides_ignores_scale_and_offset(row: list[int], scale: float, offset: float) -> None:
    student = torch.tensor([row], dtype=torch.float64)
    config = LossConfig()
    value = kl_distillation(student, student * scale + offset, config)
    assert float(value) == pytest.approx(0.0, abs=1e-6)


def test_margin_mse_compares_margins_to_the_first_document() -> None:
    student, teacher = tensor([5.0, 3.0, 6.0], [0.0, 0.0, 0.0]), tensor([9.0, 8.0, 9.0], [1.0, 0.0, 3.0])
    # Margins: student 2, -1 and 0, 0; teacher 1, 0 and 1, -2.
    expected = (1 + 1 + 1 + 4) / 4
    assert float(margin_mse(student, teacher)) == pytest.approx(expected)
    assert loss_of(student, teacher, kl=0, margin_mse=2.0, normalize="both") == pytest.approx(2 * expected)


def test_contrastive_is_cross_entropy_of_the_first_document() -> None:
    student = tensor([0.0, LN2, 0.0], [LN2, 0.0, -math.inf])
    assert float(contrastive(student)) == pytest.approx((math.log(4) + math.log(3 / 2)) / 2)
    assert float(contrastive(student[:1], temperature=0.5)) == pytest.approx(math.log(6))
    others = tensor([2 * LN2, -math.inf])
    assert float(contrastive(student[:1], in_batch=others)) == pytest.approx(math.log(8))


def test_in_batch_scores_count_only_when_asked_for() -> None:
    student, teacher = tensor([0.0, LN2]), tensor([1.0, 0.0])
    others = tensor([LN2, -math.inf])
    options = {"kl": 0, "contrastive": 1.0}
    assert loss_of(student, teacher, others, **options) == pytest.approx(math.log(3))
    options["in_batch_negatives"] = True
    assert loss_of(student, teacher, others, **options) == pytest.approx(math.log(5))
    for wrong in (None, torch.zeros(2, 3), torch.zeros(3)):
        with pytest.raises(DimensionError, match="in_batch_negatives needs"):
            loss_of(student, teacher, wrong, **options)
    with pytest.raises(NonFiniteError, match="in-batch score of query row 0, document 1 is nan"):
        loss_of(student, teacher, tensor([0.0, math.nan]), **options)


def test_terms_are_weighted_and_reported_without_their_weight() -> None:
    student = tensor([1.0, 3.0, 2.0]).requires_grad_()
    teacher = tensor([2.0, 0.0, 1.0])
    config = LossConfig(kl=0.5, margin_mse=0.05, contrastive=2.0)
    loss, parts = distillation_loss(student, teacher, config)
    assert list(parts) == ["kl", "margin_mse", "contrastive"]
    assert not any(part.requires_grad for part in parts.values())
    expected = 0.5 * parts["kl"] + 0.05 * parts["margin_mse"] + 2.0 * parts["contrastive"]
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert list(distillation_loss(student, teacher, LossConfig())[1]) == ["kl"]


@pytest.mark.parametrize("normalize", ["teacher", "none"])
def test_descending_the_gradient_brings_the_teacher_s_distribution(normalize: str) -> None:
    student = tensor([1.0, 3.0, 2.0]).requires_grad_()
    teacher = tensor([2.0, 0.0, 1.0])
    config = LossConfig(normalize=normalize)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD([student], lr=2.0)
    for _ in range(200):
        optimizer.zero_grad()
        distillation_loss(student, teacher, config)[0].backward()
        optimizer.step()
    target = minmax(teacher) if normalize == "teacher" else teacher
    torch.testing.assert_close(student.detach().softmax(dim=1), target.softmax(dim=1), atol=1e-3, rtol=0)


def test_min_max_on_both_sides_moves_middle_documents_past_wrong_extremes() -> None:
    """Of n documents, the best by the teacher starts in the middle, the student's best is the worst."""
    student = tensor([2.5, 4.0, 2.0, 1.0, 3.0]).requires_grad_()
    teacher = tensor([9.0, 0.0, 4.0, 1.0, 2.0])
    optimizer = torch.optim.SGD([student], lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        distillation_loss(student, teacher, LossConfig())[0].backward()
        optimizer.step()
    assert student.detach().argmax() == 0


def test_two_documents_have_no_gradient_under_min_max_on_both_sides() -> None:
    """Two scores always scale to 0 and 1; the config refuses the combination."""
    student = tensor([1.0, 3.0]).requires_grad_()
    distillation_loss(student, tensor([5.0, 2.0]), LossConfig())[0].backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-6
    phase = {"name": "p", "data": ("d",), "steps": 1, "nway": 2}
    with pytest.raises(ValidationError, match="the KL term has no gradient"):
        TrainPhase.model_validate(phase)
    assert TrainPhase.model_validate({**phase, "loss": {"normalize": "teacher"}}).nway == 2


def test_half_precision_scores_are_computed_in_fp32() -> None:
    student, teacher = tensor([20.1, 20.7, 20.3]), tensor([0.1, 0.9, 0.4])
    loss, _ = distillation_loss(student.bfloat16(), teacher.double(), LossConfig())
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(loss_of(student.bfloat16().float(), teacher), rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_scores_are_named(bad: float) -> None:
    good, broken = torch.zeros(3, 4), torch.zeros(3, 4)
    broken[2, 1] = bad
    with pytest.raises(NonFiniteError, match="student score of query row 2, document 1 is"):
        distillation_loss(broken, good, LossConfig())
    with pytest.raises(NonFiniteError, match="teacher score of query row 2, document 1 is"):
        distillation_loss(good, broken, LossConfig())


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 1), (2, 1)), ((3,), (3,)), ((0, 3), (0, 3))])
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(DimensionError, match="student scores are"):
        distillation_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), LossConfig())


def test_equal_scores_do_not_break_the_loss() -> None:
    student = torch.full((2, 3), 5.0, requires_grad=True)
    loss, _ = distillation_loss(student, tensor([1.0, 2.0, 3.0], [4.0, 4.0, 4.0]), LossConfig())
    loss.backward()
    assert student.grad is not None and torch.isfinite(loss) and torch.isfinite(student.grad).all()
