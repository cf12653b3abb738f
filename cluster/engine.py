"""The DeepSpeed engine with schedule-free optimisation: train view, averaged view, exact save and load.

DeepSpeed and schedule-free do not know each other. Left alone they export y instead of x under ZeRO 1
and 2, advance counters several times a step under ZeRO 3, begin with a step too many and with rounded
weights in bf16, and clip gradients that nobody asked to clip. This module is where all of that is put
right; its test holds every stage, precision and number of workers to plain PyTorch.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from cluster.config import OptimizerConfig
from colbert_core.errors import ConfigError, TrainingError

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.ops import __compatible_ops__ as deepspeed_ops

from cluster.training_optimizer import (
    GROUP_COUNTERS,
    SLOTS,
    averaged_view,
    build_optimizer,
    learning_rate,
    parameter_groups,
    reset_state,
)
from cluster.training_state import FullState, load_state, save_state

Precision = Literal["fp32", "bf16", "autocast"]
# (model, unit) -> (scalar loss, whatever the caller wants to know about the unit)
Objective = Callable[[nn.Module, Any], tuple[torch.Tensor, Any]]

# Elements that one collective moves; DeepSpeed's default reserves 2 GB for it.
BUCKET_ELEMENTS = 50_000_000


@dataclass(frozen=True)
class StepOutcome:
    """One optimiser step.

    Attributes:
        step: steps made so far, this one included.
        lr: the learning rate of this step.
        gradient_norm: L2 norm of the global gradient, before clipping.
    """

    step: int
    lr: float
    gradient_norm: float


class TrainingEngine:
    """Trains a module over the default process group of ``torch.distributed``.

    One optimiser step is::

        with engine.accumulation():
            for unit, weight in my_units_of_this_step:
                detail = engine.backward(unit, weight)
        outcome = engine.update()

    Gradients accumulate locally and are reduced once, when the block ends; ranks may have different
    numbers of units, or none. The global gradient is the sum over all ranks' units of weight times
    the gradient of the unit's loss. With ``zero_stage`` 3 the forward pass itself is collective, so
    there all ranks must run the same number of forward passes (see :attr:`collective_forward`).

    Attributes:
        model: the module given, holding y in training.
        step: optimiser steps made.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        zero_stage: int = 0,
        precision: Precision = "fp32",
        gradient_clipping: float = 0.0,
    ) -> None:
        """Wraps ``model``; parameters without ``requires_grad`` cost neither gradient nor state.

        Args:
            model: in fp32, with the same weights on every rank; moved to the accelerator. All trainable
                parameters must take part in the objective.
            objective: loss of one unit.
            optimizer: which optimiser, and its settings.
            total_steps: length of the run, for learning-rate decay.
            zero_stage: 0 to 3.
            precision: 'autocast' keeps fp32 weights and computes matrix products in bf16.
            gradient_clipping: largest global gradient norm; 0 does not clip.

        Raises:
            ConfigError: nothing is trainable.
        """
        self.model = model
        self.step = 0
        self._config = optimizer
        self._total_steps = total_steps
        self._stage = zero_stage
        for parameter in model.parameters():
            if not parameter.requires_grad:
                # DeepSpeed overwrites parameters with rank 0's unless they are marked so. Frozen ones
                # are equal already, and are left as what they are: pages of the weights' file, which
                # the workers of a machine share.
                setattr(parameter, "ds_optim_param", True)  # noqa: B010 - torch declares no such attribute
        groups = parameter_groups(model, optimizer.weight_decay)
        if not groups:
            raise ConfigError("no parameter is trainable: the phase's 'freeze' covers the whole model")
        self._names = [list(group["names"]) for group in groups]
        self._optimizer = build_optimizer(groups, optimizer)
        self._objective = _Objective(model, objective, precision)
        sizes = [p.numel() for group in groups for p in group["params"]]
        # All parameters at once up to a bound, any one whole; DeepSpeed wants an even number.
        bucket = -(-min(sum(sizes), max(BUCKET_ELEMENTS, *sizes)) // 2) * 2
        named = dict(model.named_parameters())
        trained = {name: named[name] for names in self._names for name in names}
        start = {name: p.detach().clone() for name, p in trained.items()} if precision == "bf16" else {}
        self._engine = self._initialize(
            {
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "steps_per_print": 2**31,
                # Absent, this means 1.0.
                "gradient_clipping": gradient_clipping,
                "zero_allow_untested_optimizer": True,
                "bf16": {"enabled": precision == "bf16"},
                "zero_optimization": {
                    "stage": zero_stage,
                    "overlap_comm": False,
                    "reduce_bucket_size": bucket,
                    "allgather_bucket_size": bucket,
                    # One sub-group for each parameter group: the optimiser steps once a sub-group.
                    "sub_group_size": sum(sizes) + 1,
                },
            }
        )
        self._state = FullState(self._engine, self._optimizer, trained)
        if len(self._state.flats) != len(groups) and zero_stage > 0:
            raise TrainingError(
                f"ZeRO-{zero_stage} cut {len(groups)} parameter groups into {len(self._state.flats)}"
            )
        # DeepSpeed's fp32 weights start from the module's, which it has rounded to bf16 by then.
        for name, value in start.items():
            self._state.set(name, value.to(self.device))
        reset_state(self._optimizer, optimizer, self._state.flats)
        self._state.link()

    @property
    def collective_forward(self) -> bool:
        """Must every rank run the same number of forward passes in a step?"""
        return self._stage == 3

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self._engine.device)

    @contextmanager
    def accumulation(self) -> Iterator[None]:
        """Gradients of all :meth:`backward` calls inside are reduced once, at the end; collective."""
        self._engine.set_gradient_accumulation_boundary(False)
        if self._stage == 0:
            yield
            self._engine.set_gradient_accumulation_boundary(True)
            self._engine.allreduce_gradients()
            return
        with self._engine.coalesce_grad_reduction():
            yield
            if self._stage < 3:
                # A rank without a unit takes part in the reduction all the same.
                for parameter in self._state.parameters.values():
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
        self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, unit: Any, weight: float) -> Any:
        """Forward and backward pass of one unit.

        Args:
            unit: what the objective takes.
            weight: the unit's share of the step, such as its tuples over the step's tuples.

        Returns:
            What the objective returned beside the loss.
        """
        loss = self._engine(unit)
        # The reduction averages over the ranks; a step's gradient is the sum of its units' shares.
        self._engine.backward(loss * (weight * dist.get_world_size()), scale_wrt_gas=False)
        return self._objective.detail

    def update(self) -> StepOutcome:
        """Makes one optimiser step with the gradients of the last :meth:`accumulation`; collective.

        Raises:
            TrainingError: the gradient is not finite; the model is then not to be used any more.
        """
        rate = learning_rate(self._config, self.step, self._total_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if self._stage == 0 and not self._engine.bfloat16_enabled():
            gradients = [p.grad for p in self._state.parameters.values() if p.grad is not None]
            norm = float(torch.nn.utils.get_total_norm(gradients))
            self._engine.step()
        else:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm) or not self._engine.was_step_applied():
            raise TrainingError(f"the gradient of step {self.step + 1} is not finite (norm {norm})")
        self.step += 1
        if self._config.name == "schedule_free_adamw":
            rate = float(self._optimizer.param_groups[0]["scheduled_lr"])
        return StepOutcome(self.step, rate, norm)

    def averaged_weights(self) -> dict[str, torch.Tensor]:
        """The model's weights: x, fp32, on the CPU, by name, trainable ones only; collective.

        With plain AdamW these are the fp32 weights as they are. Frozen parameters are not included:
        they are what the run started from.
        """
        return {name: self._averaged(name).to("cpu", copy=True) for name in self._state.parameters}

    def save(self, directory: str | Path) -> list[Path]:
        """Writes the resume state: fp32 y, the optimiser's slots and counters; collective.

        Args:
            directory: an existing local directory. Ranks may share it or not.

        Returns:
            The files that this rank wrote, named so that those of all ranks fit in one directory.
        """
        kept = GROUP_COUNTERS[self._config.name]
        groups = [
            {"names": names, **{key: group[key] for key in kept}}
            for names, group in zip(self._names, self._optimizer.param_groups, strict=True)
        ]
        counters = {"optimizer": self._config.name, "step": self.step, "groups": groups}
        return save_state(self._state, SLOTS[self._config.name], counters, Path(directory))

    def load(self, directory: str | Path) -> None:
        """Restores a state written by :meth:`save` at any number of workers and ZeRO stage; collective.

        At the same number of workers training goes on bit for bit (fp32).

        Args:
            directory: local directory with the files of all ranks.

        Raises:
            TrainingError: the state is another optimiser's or another model's.
        """
        counters = load_state(self._state, SLOTS[self._config.name], Path(directory))
        if counters["optimizer"] != self._config.name:
            raise TrainingError(
                f"{directory}: a state of {counters['optimizer']!r}, this run uses {self._config.name!r}"
            )
        if [group["names"] for group in counters["groups"]] != self._names:
            raise TrainingError(f"{directory}: the parameter groups are not those of this run")
        self.step = int(counters["step"])
        for group, saved in zip(self._optimizer.param_groups, counters["groups"], strict=True):
            group.update({key: saved[key] for key in GROUP_COUNTERS[self._config.name]})
        for state in self._optimizer.state.values():
            if "step" in state:
                state["step"].fill_(float(self.step))

    def _averaged(self, name: str) -> torch.Tensor:
        y = self._state.get(name)
        if self._config.name != "schedule_free_adamw":
            return y
        return averaged_view(self._config, y, self._state.get(name, "z"))

    def _initialize(self, settings: dict[str, Any]) -> deepspeed.DeepSpeedEngine:
        """DeepSpeed's engine over the process group that exists already."""
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # DeepSpeed calls collectives by names that torch is about to change, in every step.
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        # Without this the first start on a CPU compiles a C++ extension for minutes, which only
        # tensor-parallel inference uses.
        deepspeed_ops["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=dist.get_backend())
        # With bf16 and no ZeRO, wrapping makes a step with zero gradients: let it change nothing.
        # The optimiser's own train() would leave state for tensors that ZeRO then replaces.
        saved = [(group["lr"], group["weight_decay"]) for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group.update(lr=0.0, weight_decay=0.0)
            if self._config.name == "schedule_free_adamw":
                group["train_mode"] = True
        engine = deepspeed.initialize(
            model=self._objective, optimizer=self._optimizer, config=settings, dist_init_required=False
        )[0]
        for group, (rate, decay) in zip(self._optimizer.param_groups, saved, strict=True):
            group.update(lr=rate, weight_decay=decay)
        return engine


class _Objective(nn.Module):
    """The module that DeepSpeed sees: a unit in, a loss out."""

    def __init__(self, model: nn.Module, objective: Objective, precision: Precision) -> None:
        super().__init__()
        self.model = model
        self.detail: Any = None
        self._objective = objective
        self._precision = precision

    def forward(self, unit: Any) -> torch.Tensor:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._precision == "autocast"):
            loss, self.detail = self._objective(self.model, unit)
        return loss.float()
