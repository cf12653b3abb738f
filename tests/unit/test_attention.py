"""Attention on a CPU: against torch in float64, forward and backward, with masks, dropout and odd shapes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.config import TrainPhase
from cluster.training_model import prepare_model
from colbert_core.attention import CPU_ATTENTION, attention
from colbert_core.config import ColBERTConfig
from colbert_core.encoder import ColBERT
from colbert_core.float_tiles import ROWS
from colbert_core.vector_code import COLUMNS
from tests.tiny_models import tiny_bert_dir

LAYER = nn.Identity().train()
LOWEST = torch.finfo(torch.float32).min


def heads(count: int, length: int, heads: int, dim: int, seed: int = 0) -> list[Tensor]:
    """Query, key and value ``[n, heads, length, dim]``, laid out as a backbone lays them out."""
    source = torch.Generator().manual_seed(seed)
    made = [torch.randn(count, length, heads, dim, generator=source) for _ in range(3)]
    return [part.transpose(1, 2).requires_grad_() for part in made]


def mask_of(kind: str, count: int, length: int) -> Tensor | None:
    if kind == "none":
        return None
    rows = 1 if kind == "padding" else length
    allowed = torch.rand(count, 1, rows, length, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed[..., 0] = True
    return torch.where(allowed, 0.0, LOWEST)


def expected(parts: Sequence[Tensor], mask: Tensor | None, kept: Tensor | float = 1.0) -> Tensor:
    query, key, value = parts
    products = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    weights = F.softmax(products if mask is None else products + mask.to(products.dtype), dim=-1)
    return (weights * kept @ value).transpose(1, 2)


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("mask", ["none", "padding", "window"])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, COLUMNS),
        (2, 5, 3, COLUMNS),
        (3, 61, 2, 2 * COLUMNS),
        (2, 4 * ROWS, 2, COLUMNS),
        (1, 300, 2, 64),
    ],
)
def test_values_and_gradients_are_those_of_float64(shape: tuple[int, int, int, int], mask: str) -> None:
    parts, added = heads(*shape), mask_of(mask, shape[0], shape[1])
    precise = [part.detach().double().requires_grad_() for part in parts]
    found, wanted = attention(LAYER, *parts, added)[0], expected(precise, added)
    assert type(found.grad_fn).__name__ == "_AttentionBackward"
    assert relative(found, wanted) < 1e-6
    gradient = torch.randn(found.shape)
    for ours, theirs in zip(
        torch.autograd.grad(found, parts, gradient),
        torch.autograd.grad(wanted, precise, gradient.double()),
        strict=True,
    ):
        # Of a single position, the gradient of query and key is zero but for rounding.
        assert relative(ours, theirs) < 2e-6 or float((ours - theirs).abs().max()) < 1e-6


@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_bf16_is_computed_in_fp32_and_rounded_once(dropout: float) -> None:
    parts = [part.detach().bfloat16().requires_grad_() for part in heads(2, 61, 3, 2 * COLUMNS)]
    wide = [part.detach().float().requires_grad_() for part in parts]
    added, found = mask_of("padding", 2, 61), []
    for given in (parts, wide):
        torch.manual_seed(4)
        found.append(attention(LAYER, *given, added, dropout=dropout)[0])
    assert type(found[0].grad_fn).__name__ == "_AttentionBackward"
    assert torch.equal(found[0], found[1].bfloat16())
    gradient = torch.randn(found[0].shape).bfloat16()
    for ours, wanted in zip(
        torch.autograd.grad(found[0], parts, gradient),
        torch.autograd.grad(found[1], wide, gradient.float()),
        strict=True,
    ):
        assert torch.equal(ours, wanted.bfloat16())


@pytest.mark.parametrize("threads", [1, 2])
def test_dropout_drops_as_much_as_asked_for_and_the_gradient_meets_the_same_mask(threads: int) -> None:
    length, dropped = 2 * COLUMNS, round(0.3 * 65536) / 65536
    parts = heads(2, length, 3, length)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        # With the identity as values, what comes out are the weights.
        identity = torch.eye(length).expand(2, 3, length, length)
        torch.manual_seed(5)
        weights = attention(LAYER, *parts[:2], identity, None, dropout=0.3)[0].transpose(1, 2)
        kept = (weights != 0).float()
        assert float(kept.mean()) == pytest.approx(0.7, abs=4 * (0.21 / kept.numel()) ** 0.5)
        # No two heads, and no two rows, share a mask.
        assert len(torch.unique(kept.reshape(-1, length), dim=0)) == kept.numel() // length
        torch.manual_seed(5)
        found = attention(LAYER, *parts, None, dropout=0.3)[0]
        wanted = expected(parts, None, kept / (1 - dropped))
        assert relative(found, wanted) < 1e-6
        gradient = torch.randn(found.shape)
        pairs = zip(
            torch.autograd.grad(found, parts, gradient),
            torch.autograd.grad(wanted, parts, gradient),
            strict=True,
        )
        assert max(relative(ours, theirs) for ours, theirs in pairs) < 2e-6
        other = attention(LAYER, *parts, None, dropout=0.3)[0]
        assert not torch.equal(other, found)
    finally:
        torch.set_num_threads(before)


def test_threads_share_the_work_and_not_the_result() -> None:
    parts, found = heads(5, 40, 3, COLUMNS), []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(2)
        found.append(attention(LAYER, *parts, None, dropout=0.1)[0])
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_all_is_dropped_with_probability_one_and_nothing_outside_of_training() -> None:
    parts = heads(2, 12, 2, COLUMNS)
    assert not attention(LAYER, *parts, None, dropout=1.0)[0].any()
    plain = attention(LAYER, *parts, None)[0]
    assert torch.equal(attention(nn.Identity().eval(), *parts, None, dropout=0.5)[0], plain)


def test_a_nan_stays_in_its_text() -> None:
    query, key, value = (part.detach() for part in heads(3, 20, 2, COLUMNS))
    key[1, 0, 7, 3] = float("nan")
    found = attention(LAYER, query, key, value, None)[0]
    assert found.isnan().any(dim=-1).any(dim=1).tolist() == [[False, False], [True, False], [False, False]]


def test_a_row_that_may_attend_to_nothing_attends_to_all_alike() -> None:
    """As transformers' own masks have it, which are large negative numbers."""
    parts = heads(1, 9, 1, COLUMNS)
    found = attention(LAYER, *parts, torch.full((1, 1, 1, 9), LOWEST))[0]
    torch.testing.assert_close(found, parts[2].mean(dim=2, keepdim=True).expand_as(parts[2]).transpose(1, 2))


@pytest.mark.parametrize("case", ["fp64", "narrow", "fewer keys' heads", "cross"])
def test_what_the_kernels_do_not_know_is_computed_plainly(case: str) -> None:
    query, key, value = (part.detach() for part in heads(2, 12, 4, 8 if case == "narrow" else COLUMNS))
    if case == "fp64":
        query, key, value = (part.double() for part in (query, key, value))
    if case == "fewer keys' heads":
        key, value = key[:, ::2], value[:, ::2]
    if case == "cross":
        key, value = key[:, :, :5], value[:, :, :5]
    found = attention(LAYER, query, key, value, None)[0]
    if case == "fewer keys' heads":
        key, value = key.repeat_interleave(2, dim=1), value.repeat_interleave(2, dim=1)
    wanted = expected([query.double(), key.double(), value.double()], None)
    assert relative(found, wanted) < 1e-6


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_backbone_in_training_gives_the_gradient_of_its_own_attention(
    tmp_path: Path, checkpointing: bool, autocast: bool
) -> None:
    base = tiny_bert_dir(tmp_path / "base", hidden=2 * COLUMNS)
    phase = TrainPhase(name="p", data=("t",), nway=4, steps=1, dropout=0.0)
    model = prepare_model(ColBERT.create(base, ColBERTConfig(dim=16, query_length=8), seed=1), phase)
    assert model.backbone.config._attn_implementation == CPU_ATTENTION
    ids = torch.randint(5, 20, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    if checkpointing:
        model.backbone.gradient_checkpointing_enable()
    found = []
    for implementation in (CPU_ATTENTION, "eager"):
        model.backbone.set_attn_implementation(implementation)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            vectors = model(ids, mask)
        vectors[mask.bool()].square().cumsum(0).sin().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())
    assert relative(*found) < (3e-2 if autocast else 1e-5)
