"""In which precision a processor multiplies matrices fast."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["fp32", "bf16"]


def bf16_is_fast(device: torch.device) -> bool:
    """Whether bfloat16 products run on hardware made for them; elsewhere they are slower than fp32.

    On a CPU without such units they are emulated, at a tenth of the speed of fp32 and less.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(bool(found.get(name)) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def fast_precision(device: torch.device) -> Precision:
    """What texts are encoded in unless someone says otherwise: bfloat16 where that is fast."""
    return "bf16" if bf16_is_fast(device) else "fp32"
