"""Dropout on a CPU: what it keeps, how it scales, and that torch's seed decides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from colbert_core.dropout import CpuDropout


def dropped(values: torch.Tensor, p: float, seed: int = 0, **more: bool) -> torch.Tensor:
    torch.manual_seed(seed)
    with CpuDropout():
        return F.dropout(values, p, **more)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_what_is_kept_is_scaled_and_as_much_as_asked_for(p: float) -> None:
    values = torch.rand(500, 1001) + 1.0
    found = dropped(values, p)
    kept = found != 0
    # Four standard deviations of a share of 500,500.
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=4 * (p * (1 - p) / values.numel()) ** 0.5)
    torch.testing.assert_close(found[kept], values[kept] / (1 - p), rtol=2e-4, atol=0.0)
    # No place and no neighbour is preferred.
    assert float(kept.float().mean(dim=0).std()) == pytest.approx((p * (1 - p) / 500) ** 0.5, rel=0.15)
    both = (kept[:, 1:] & kept[:, :-1]).float().mean()
    assert float(both) == pytest.approx((1 - p) ** 2, abs=0.005)


def test_bf16_meets_the_mask_of_fp32_and_is_rounded_once() -> None:
    values = torch.randn(40, 70).bfloat16().requires_grad_()
    wide = values.detach().float().requires_grad_()
    found, wanted = dropped(values, 0.3), dropped(wide, 0.3)
    assert torch.equal(found, wanted.bfloat16())
    gradient = torch.randn(found.shape).bfloat16()
    found.backward(gradient)
    wanted.backward(gradient.float())
    assert values.grad is not None and wide.grad is not None
    assert torch.equal(values.grad, wide.grad.bfloat16())


def test_torchs_seed_decides_and_the_generator_goes_on() -> None:
    values = torch.ones(1000)
    assert torch.equal(dropped(values, 0.5, seed=1), dropped(values, 0.5, seed=1))
    assert not torch.equal(dropped(values, 0.5, seed=1), dropped(values, 0.5, seed=2))
    torch.manual_seed(1)
    with CpuDropout():
        first, second = F.dropout(values, 0.5), F.dropout(values, 0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, dropped(values, 0.5, seed=1))


def test_the_gradient_goes_where_the_values_went() -> None:
    values = torch.randn(7, 11, 13).transpose(0, 2).requires_grad_()
    found = dropped(values, 0.3)
    gradient = torch.randn(found.shape)
    found.backward(gradient)
    assert values.grad is not None
    scale = found.detach() / values.detach()
    torch.testing.assert_close(values.grad, gradient * scale)
    assert 0 < int((values.grad == 0).sum()) < values.numel()


def test_recomputed_activations_meet_the_same_mask() -> None:
    layer = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    values = torch.randn(32, 8, requires_grad=True)

    def run(values: torch.Tensor) -> torch.Tensor:
        with CpuDropout():
            return layer(values)

    gradients = []
    for again in (False, True):
        torch.manual_seed(3)
        found = checkpoint(run, values, use_reentrant=False) if again else run(values)
        gradients.append(torch.autograd.grad(found.sum(), values)[0])
    assert torch.equal(*gradients)


def test_the_rest_is_torchs_own() -> None:
    values = torch.randn(64, 64)
    assert dropped(values, 0.5, training=False) is values
    assert torch.equal(dropped(values, 0.0), values)
    assert torch.equal(dropped(values, 1.0), torch.zeros_like(values))
    double = values.double()
    found = dropped(double, 0.5)
    torch.manual_seed(0)
    assert torch.equal(found, F.dropout(double, 0.5))
    copy = values.clone()
    assert dropped(copy, 0.5, inplace=True) is copy
    with pytest.raises(ValueError, match="dropout probability"):
        dropped(values, 1.5)
