"""The optimisers of a training run: schedule-free AdamW, and AdamW with warm-up and decay.

Schedule-free (Defazio et al. 2024) keeps three points: *y*, where gradients are taken and which the
module holds in training; *z*, the fast iterate; and *x*, the average, which is the model. The library
stores y and z; ``x = y + (1 - 1/beta1) (z - y)``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import schedulefree
import torch
from torch import nn

from cluster.config import OptimizerConfig

# What an optimiser keeps for each parameter, in the shape of the parameter.
SLOTS: dict[str, tuple[str, ...]] = {
    "schedule_free_adamw": ("z", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
}
# What it keeps for each group, and the value before the first step.
GROUP_COUNTERS: dict[str, dict[str, float]] = {
    "schedule_free_adamw": {"k": 0, "weight_sum": 0.0, "lr_max": -1.0, "scheduled_lr": 0.0},
    "adamw": {},
}


class GroupwiseScheduleFree(schedulefree.AdamWScheduleFree):
    """Schedule-free AdamW that advances only the groups whose parameters it steps.

    ZeRO-3 calls ``step`` once for each group, with the parameters of the other groups taken out. The
    library advances the counters of *every* group in every call, so with two groups all of them
    advance twice a step: the warm-up ends early and the average x is wrong, silently.
    """

    param_groups: list[dict[str, Any]]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        every_group = self.param_groups
        self.param_groups = [
            group for group in every_group if any(p.grad is not None for p in group["params"])
        ]
        try:
            return super().step(closure) if self.param_groups else None
        finally:
            self.param_groups = every_group


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters as optimiser groups: without weight decay one, with it two.

    Matrices decay; biases and normalisation weights (one dimension) do not. Tied parameters appear
    once, under their first name.

    Returns:
        Groups with ``params``, ``weight_decay`` and ``names``, in the order of ``named_parameters``.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if weight_decay == 0.0:
        chosen = [(trainable, 0.0)]
    else:
        decayed = [(name, p) for name, p in trainable if p.ndim > 1]
        fixed = [(name, p) for name, p in trainable if p.ndim <= 1]
        chosen = [(decayed, weight_decay), (fixed, 0.0)]
    return [
        {"params": [p for _, p in named], "names": [name for name, _ in named], "weight_decay": decay}
        for named, decay in chosen
        if named
    ]


def build_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser that ``config`` describes, over groups from :func:`parameter_groups`."""
    plain = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    if config.name == "schedule_free_adamw":
        return GroupwiseScheduleFree(
            plain, lr=config.lr, betas=config.betas, eps=config.eps, warmup_steps=config.warmup_steps
        )
    # Fused, a step reads and writes each of a parameter's four tensors once.
    return torch.optim.AdamW(plain, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def reset_state(
    optimizer: torch.optim.Optimizer, config: OptimizerConfig, parameters: Sequence[torch.Tensor]
) -> None:
    """Sets counters and per-parameter state to what they are before the first step.

    The libraries create the state lazily in the first step. Creating it here lets a run be saved and
    restored at any step, step 0 included, and wipes the traces of DeepSpeed's step with zero gradients
    when it wraps the optimiser.

    Args:
        optimizer: as :func:`build_optimizer` made it.
        config: the same configuration.
        parameters: the fp32 tensors that the optimiser steps (with ZeRO the flat partitions).
    """
    optimizer.state.clear()
    for parameter in parameters:
        value = parameter.detach()
        if config.name == "schedule_free_adamw":
            state = {"z": value.clone(), "exp_avg_sq": torch.zeros_like(value)}
        else:
            state = {
                # The fused step counts where the parameter is.
                "step": torch.zeros((), device=value.device),
                "exp_avg": torch.zeros_like(value),
                "exp_avg_sq": torch.zeros_like(value),
            }
        optimizer.state[parameter] = state
    for group in optimizer.param_groups:
        group.update(GROUP_COUNTERS[config.name])


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate that ``optimizer.step`` number ``step`` (from 0) is to be given.

    Schedule-free warms up by itself and never decays; AdamW warms up linearly over ``warmup_steps``,
    then falls linearly to 0 at ``total_steps`` (decay 'linear') or stays (decay 'constant').
    """
    if config.name == "schedule_free_adamw":
        return config.lr
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "constant":
        return config.lr
    return config.lr * max(0, total_steps - step) / max(1, total_steps - config.warmup_steps)


def averaged_view(config: OptimizerConfig, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """x of schedule-free, out of place: the library's own ``eval()`` rounds when it is undone."""
    return torch.lerp(y, z, 1 - 1 / config.betas[0])
