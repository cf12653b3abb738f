"""Attention for training on a CPU, as an implementation that transformers can be told to use.

torch's fused attention has no dropout on a CPU and a slow backward pass; the plain one writes all weights
to memory several times and multiplies narrow matrices at half speed. bf16 is widened for the kernels, which
compute in fp32: the weights' arithmetic outweighs the products. What the kernels do not know (other devices,
widths that fill no tile) is computed the plain way, so that any backbone may use it.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask

from colbert_core.dropout import STEPS
from colbert_core.threads import on_threads

CPU_ATTENTION = "raycolbert_cpu"  # for ``set_attn_implementation``
_PARTS = 4  # of the heads, for each thread: texts of a batch are equally long


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' modules call it.

    Args:
        module: the attention layer; it drops nothing unless it is in training.
        query: float ``[n, heads, length, dim]``.
        key, value: float ``[n, heads, length, dim]``; fewer heads are repeated.
        attention_mask: float, broadcast to ``[n, 1, length, length]``, added to the products.
        scaling: of the products; default: ``dim ** -0.5``.
        dropout: probability of dropping a weight. Kernels round it to 1/65,536, and draw the seed of their
            random bits from torch's generator.

    Returns:
        float ``[n, length, heads, dim]``, and None: no weights are kept.
    """
    repeated = query.shape[1] // key.shape[1]
    if repeated > 1:
        key, value = repeat_kv(key, repeated), repeat_kv(value, repeated)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    below = round(dropout * STEPS) if module.training else 0
    if below < STEPS and _has_kernel(query, key, value, attention_mask):
        rows = [part.transpose(1, 2).contiguous() for part in (query, key, value)]
        return _Attention.apply(*rows, attention_mask, scale, below), None
    weights = torch.matmul(query, key.transpose(2, 3)) * scale
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(F.softmax(weights, dim=-1), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


def attention_mask(*arguments: Any, dtype: torch.dtype = torch.float32, **options: Any) -> Tensor | None:
    """The mask of :func:`attention`: as transformers' eager one, with one row where all rows are equal."""
    allowed = sdpa_mask(*arguments, **{**options, "allow_is_causal_skip": False})
    if allowed is None:
        return None
    if allowed.stride(2) == 0:
        allowed = allowed[:, :, :1]
    return torch.where(allowed, 0.0, torch.finfo(dtype).min).to(dtype)


AttentionInterface.register(CPU_ATTENTION, attention)
AttentionMaskInterface.register(CPU_ATTENTION, attention_mask)


def _has_kernel(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    same = query.shape == key.shape == value.shape and query.numel() > 0
    like = all(part.device.type == "cpu" and part.dtype == query.dtype for part in (query, key, value))
    if not (same and like) or query.dtype not in (torch.float32, torch.bfloat16):
        return False
    if mask is not None and (mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != key.shape[2]):
        return False
    # What does not train on a CPU does without numba.
    from colbert_core.vector_code import COLUMNS

    return query.shape[3] % COLUMNS == 0


class _Attention(torch.autograd.Function):
    """:func:`attention` of ``[n, length, heads, dim]``, C-contiguous, all fp32 or all bf16."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, below: int
    ) -> Tensor:
        from colbert_core.attention_kernels import attend

        count, length, heads, _ = query.shape
        added = torch.zeros(1, 1, length) if mask is None else mask[:, 0].float().contiguous()
        seed = int(torch.randint(2**62, ())) if below else 0
        out = torch.empty(query.shape)
        rows_of = torch.empty(count, heads, length, 2)
        given = [part.detach().float().numpy() for part in (query, key, value, added)]
        settings = (np.float32(scale), below, seed)
        _heads(attend, (*given, *settings), (out.numpy(), rows_of.numpy()), count * heads)
        ctx.save_for_backward(query, key, value, added, rows_of)
        ctx.settings = settings
        return out.to(query.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from colbert_core.attention_kernels import attend_back

        saved = ctx.saved_tensors  # may be unpacked once, where activations are recomputed
        *given, rows_of = (part.float().numpy() for part in saved)
        gradients = [torch.empty(part.shape) for part in saved[:3]]
        rest = (rows_of, gradient.float().contiguous().numpy(), *(part.numpy() for part in gradients))
        _heads(attend_back, (*given, *ctx.settings), rest, gradient.shape[0] * gradient.shape[2])
        return (*(part.to(gradient.dtype) for part in gradients), None, None, None)


def _heads(kernel: Any, before: tuple[Any, ...], after: tuple[Any, ...], count: int) -> None:
    """Calls a kernel for all heads, some at a time on each of torch's threads."""
    threads = torch.get_num_threads()
    parts = min(count, _PARTS * threads if threads > 1 else 1)
    cuts = [count * part // parts for part in range(parts + 1)]
    on_threads(kernel, [(*before, first, last, *after) for first, last in pairwise(cuts)], threads)
