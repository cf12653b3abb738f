"""Full fp32 tensors behind a DeepSpeed engine, whatever the ZeRO stage; and their files.

The resume state of a run is, for each trainable parameter, the fp32 weight and the optimiser's slots,
whole and by name. It can therefore be loaded at any number of workers and at any ZeRO stage, and holds
no pickle. Each rank writes its share of the parameters as safetensors files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from colbert_core.errors import SchemaVersionError, TrainingError

SCHEMA_VERSION = 1
COUNTERS = "counters.json"
WEIGHT = "y"
# A state file is written when it reaches this size, so that a save never holds the whole state.
FILE_BYTES = 256 * 2**20


class FullState:
    """Reads and writes the full fp32 weight and optimiser slots of each trainable parameter.

    All methods are collective: every rank calls them for the same parameters in the same order.

    Attributes:
        parameters: the trainable parameters of the module by name (what the forward pass uses).
        flats: the fp32 tensors that the optimiser steps, in group order.
    """

    def __init__(
        self,
        engine: deepspeed.DeepSpeedEngine,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._stage = int(engine.zero_optimization_stage())
        self.parameters = parameters
        wrapper = engine.optimizer
        if self._stage == 3:
            self.flats = list(wrapper.fp32_partitioned_groups_flat)
        else:
            self.flats = [p for group in optimizer.param_groups for p in group["params"]]
        # bf16 without ZeRO: a wrapper holds an fp32 master copy of each parameter.
        self._masters: dict[int, torch.Tensor] = {}
        if self._stage == 0 and hasattr(wrapper, "fp32_groups"):
            self._masters = {
                id(low): high
                for low_group, high_group in zip(wrapper.fp16_groups, wrapper.fp32_groups, strict=True)
                for low, high in zip(low_group, high_group, strict=True)
            }

    def link(self) -> None:
        """Lets DeepSpeed find optimiser state that was created outside its own step (ZeRO 1 and 2).

        By itself it links the state after the step of the *first* group only, and the other groups'
        state is then reported as missing.
        """
        if self._stage in (1, 2):
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def get(self, name: str, slot: str | None = None) -> torch.Tensor:
        """The full fp32 weight (``slot`` None) or slot of a parameter.

        Without ZeRO the live tensor itself, else a copy; on the engine's device.
        """
        parameter = self.parameters[name]
        if self._stage == 0:
            master = self._masters.get(id(parameter), parameter)
            tensor = master.detach() if slot is None else self._optimizer.state[master][slot]
        elif slot is None:
            tensor = safe_get_full_fp32_param(parameter)
        else:
            tensor = safe_get_full_optimizer_state(parameter, slot)
        return tensor.float()

    def set(self, name: str, value: torch.Tensor, slot: str | None = None) -> None:
        """Replaces a full fp32 weight or slot; weights reach the module with :meth:`refresh`."""
        parameter: Any = self.parameters[name]
        with torch.no_grad():
            if self._stage == 0:
                master = self._masters.get(id(parameter), parameter)
                (master if slot is None else self._optimizer.state[master][slot]).copy_(value)
            elif self._stage == 3:
                # DeepSpeed's setter of full values reads past the end of parameters that do not
                # divide by the number of workers, so each rank cuts out its own padded share.
                count = parameter.ds_tensor.numel()
                flat = torch.zeros(count * dist.get_world_size(), dtype=torch.float32, device=value.device)
                flat[: value.numel()] = value.flatten()
                share = flat.narrow(0, count * dist.get_rank(), count)
                if slot is None:
                    safe_set_local_fp32_param(parameter, share)
                else:
                    safe_set_local_optimizer_state(parameter, share, slot)
            elif slot is None:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, slot)

    def refresh(self) -> None:
        """Copies the fp32 weights into the parameters that the module computes with, as a step does."""
        for name, parameter in self.parameters.items():
            value = self.get(name)
            with torch.no_grad():
                if self._stage == 3:
                    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                        parameter.copy_(value)
                else:
                    parameter.copy_(value)


def save_state(
    state: FullState, slots: Sequence[str], counters: dict[str, Any], directory: Path
) -> list[Path]:
    """Writes this rank's share of the resume state; collective.

    Args:
        state: of the engine to save.
        slots: the optimiser's slots.
        counters: plain data that rank 0 writes as JSON.
        directory: an existing local directory; ranks may share it.

    Returns:
        The files that this rank wrote.
    """
    rank, owners = dist.get_rank(), _owners(state)
    written: list[Path] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        if pending:
            path = directory / f"state-{rank:05d}-{len(written):05d}.safetensors"
            save_file(pending, path)
            written.append(path)
            pending.clear()

    for name in state.parameters:
        for slot in (None, *slots):
            tensor = state.get(name, slot)
            if owners[name] == rank:
                pending[f"{slot or WEIGHT}/{name}"] = tensor.to("cpu").contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= FILE_BYTES:
            flush()
    flush()
    if rank == 0:
        path = directory / COUNTERS
        path.write_text(json.dumps({"schema_version": SCHEMA_VERSION, **counters}, indent=1), "utf-8")
        written.append(path)
    return written


def load_state(state: FullState, slots: Sequence[str], directory: Path) -> dict[str, Any]:
    """Restores what all ranks wrote with :func:`save_state`, at any number of workers; collective.

    Returns:
        The counters.

    Raises:
        SchemaVersionError: the state was written by a newer version.
        TrainingError: the state does not fit this model and optimiser; names the first misfit.
    """
    counters = read_counters(directory)
    origin: dict[str, Path] = {}
    for path in sorted(directory.glob("state-*.safetensors")):
        origin.update(dict.fromkeys(_keys(path), path))
    expected = {f"{slot or WEIGHT}/{name}" for name in state.parameters for slot in (None, *slots)}
    if expected != set(origin):
        missing, unknown = sorted(expected - set(origin)), sorted(set(origin) - expected)
        raise TrainingError(
            f"{directory}: the resume state does not fit the model: "
            + (f"missing {missing[0]!r} and {len(missing) - 1} more" if missing else "")
            + ("; " if missing and unknown else "")
            + (f"unknown {unknown[0]!r} and {len(unknown) - 1} more" if unknown else "")
        )
    for name, parameter in state.parameters.items():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        for slot in (None, *slots):
            key = f"{slot or WEIGHT}/{name}"
            with safe_open(origin[key], framework="pt") as file:
                value = file.get_tensor(key)
            if tuple(value.shape) != shape or value.dtype != torch.float32:
                raise TrainingError(
                    f"{origin[key]}: {key!r} is {value.dtype} {tuple(value.shape)}, "
                    f"the model has fp32 {shape}"
                )
            state.set(name, value, slot)
    state.refresh()
    return counters


def read_counters(directory: Path) -> dict[str, Any]:
    """The counters of a saved state.

    Raises:
        TrainingError: the file is missing or not JSON.
        SchemaVersionError: it was written by a newer version.
    """
    try:
        counters = json.loads((directory / COUNTERS).read_text("utf-8"))
        version = counters["schema_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TrainingError(f"{directory / COUNTERS}: not a resume state: {error}") from None
    if version != SCHEMA_VERSION:
        raise SchemaVersionError(
            f"{directory / COUNTERS}: schema version {version}, this program reads {SCHEMA_VERSION}"
        )
    return dict(counters)


def _owners(state: FullState) -> dict[str, int]:
    """Which rank writes which parameter: each goes to the rank with the fewest elements so far."""
    load = [0] * dist.get_world_size()
    owners = {}
    for name, parameter in state.parameters.items():
        owners[name] = load.index(min(load))
        load[owners[name]] += int(getattr(parameter, "ds_numel", parameter.numel()))
    return owners


def _keys(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()
    except SafetensorError as error:
        raise TrainingError(f"{path}: not a safetensors file: {error}") from None
