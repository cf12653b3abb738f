"""Dropout for training on a CPU, with its mask from a fast generator.

torch draws each element's number on a CPU one after the other, 12 ns each, on one thread: a fifth of a
training step in fp32, and more in bf16. Here four elements share a 64-bit number of numpy's SFC64, and what
is kept for the backward pass is a byte of an element instead of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

STEPS = 1 << 16  # an element is dropped where its 16 random bits are below the probability


class CpuDropout(TorchFunctionMode):
    """While it is entered, :func:`torch.nn.functional.dropout` of fp32 and bf16 tensors on a CPU is this one.

    Each call takes a seed from torch's generator, so that ``torch.manual_seed`` decides the masks as it
    does without, and recomputed activations meet the same ones. Probabilities are rounded to 1/65,536; what
    is kept is scaled by the inverse of the rounded one. Other tensors, and calls in place, are left to torch.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return (_dropout if func is F.dropout else func)(*args, **(kwargs or {}))


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    below = round(p * STEPS)
    if not training or inplace or not 0 < below < STEPS:
        return F.dropout(input, p, training, inplace)
    if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16):
        return F.dropout(input, p, training, inplace)
    result: Tensor = _Dropout.apply(input, below)
    return result


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, below: int) -> Tensor:
        seed = int(torch.randint(2**62, ()))
        words = np.random.SFC64(seed).random_raw(-(-values.numel() // 4))
        kept = torch.from_numpy(words.view(np.uint16)[: values.numel()] >= below).view(values.shape)
        ctx.save_for_backward(kept)
        ctx.scale = STEPS / (STEPS - below)
        return torch.where(kept, values, 0.0).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return torch.where(kept, gradient, 0.0).mul_(ctx.scale), None
