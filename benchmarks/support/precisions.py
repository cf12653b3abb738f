"""Which precisions a benchmark of the model measures."""

from __future__ import annotations

import argparse

import torch

from colbert_core.precision import bf16_is_fast

PRECISIONS = ("fp32", "bf16")


def add_precision_option(parser: argparse.ArgumentParser) -> None:
    """``--precision``, repeatable; see :func:`chosen_precisions`."""
    parser.add_argument(
        "--precision",
        action="append",
        choices=PRECISIONS,
        help="repeatable; default: both, where bf16 has hardware of its own; fp32 elsewhere",
    )


def chosen_precisions(options: argparse.Namespace) -> tuple[str, ...]:
    """What was asked for. A processor that emulates bf16 takes up to 40 times as long for it."""
    if options.precision:
        return tuple(dict.fromkeys(options.precision))
    return PRECISIONS if bf16_is_fast(torch.device("cpu")) else ("fp32",)
