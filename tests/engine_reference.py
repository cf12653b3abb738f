"""A small model and its steps in plain PyTorch, which the DeepSpeed engine must equal."""

from __future__ import annotations

import copy
from typing import Any

import schedulefree
import torch
from torch import nn

from cluster.config import OptimizerConfig

STEPS = 6
UNITS = 3  # of a step: with two workers one of them has two units, the other one
SCHEDULE_FREE = OptimizerConfig(lr=1e-2, warmup_steps=4, weight_decay=0.1)
PLAIN = OptimizerConfig(name="adamw", lr=1e-2, warmup_steps=2, weight_decay=0.1)
# Autocast first: ZeRO-3 puts its own linear layer in the place of torch's, for the rest of the process.
CASES = [(1, "autocast"), *((stage, precision) for stage in range(4) for precision in ("fp32", "bf16"))]


class Small(nn.Module):
    """Sizes that no number of workers divides, a frozen table, a tied matrix, and normalisation."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(31, 7)
        self.table.weight.requires_grad_(False)
        self.inner = nn.Linear(7, 13)
        self.norm = nn.LayerNorm(13)
        self.tied = nn.Linear(13, 13, bias=False)
        self.again = nn.Linear(13, 13, bias=False)
        self.again.weight = self.tied.weight
        self.out = nn.Linear(13, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(torch.tanh(self.inner(self.table(ids))))
        return self.out(torch.tanh(self.again(torch.tanh(self.tied(hidden)))))


def objective(model: nn.Module, unit: Any) -> tuple[torch.Tensor, int]:
    ids, target = unit
    return ((model(ids).float() - target) ** 2).mean(), len(ids)


def units_of(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [
        (torch.randint(0, 31, (9,), generator=generator), torch.randn(9, 5, generator=generator))
        for _ in range(UNITS)
    ]


def grouped(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    named = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def reference(
    workers: int, config: OptimizerConfig, clipping: float = 0.0, precision: str = "fp32"
) -> dict[str, Any]:
    """Plain PyTorch; gradients are summed in the order that ``workers`` ranks sum them.

    With precision 'bf16' a copy of the model in bf16 computes and holds the gradients, and the optimiser
    steps the model itself; with 'autocast' the model's matrix products are in bf16.
    """
    model = Small(0)
    computing = copy.deepcopy(model).bfloat16() if precision == "bf16" else model
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if config.name == "adamw":
        optimizer: Any = torch.optim.AdamW(grouped(model, config.weight_decay), **settings)
    else:
        optimizer = schedulefree.AdamWScheduleFree(
            grouped(model, config.weight_decay), warmup_steps=config.warmup_steps, **settings
        )
        optimizer.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    sources = [p for p in computing.parameters() if p.requires_grad]
    norms = []
    for step in range(STEPS):
        total = [torch.zeros_like(p) for p in sources]
        for rank in range(workers):
            for unit in units_of(step)[rank::workers]:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
                    loss = objective(computing, unit)[0]
                (loss * (workers / UNITS)).backward()
            for place, source in enumerate(sources):
                total[place] += source.grad
                source.grad = None
        for place, parameter in enumerate(parameters):
            parameter.grad = (total[place] / workers).float()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in parameters])))
        if clipping:
            torch.nn.utils.clip_grad_norm_(parameters, clipping)
        if config.name == "adamw":
            warm = min(1.0, (step + 1) / config.warmup_steps)
            fall = (STEPS - step) / (STEPS - config.warmup_steps) if step >= config.warmup_steps else 1.0
            for group in optimizer.param_groups:
                group["lr"] = config.lr * warm * fall
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, source in zip(parameters, sources, strict=True):
                source.copy_(parameter)
    y = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    if config.name != "adamw":
        optimizer.eval()
    x = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y, "x": x, "norms": norms}


def furthest(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name].float() - right[name].float()).abs().max()) for name in left)
