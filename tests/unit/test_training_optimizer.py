"""The state that an optimiser has before its first step."""

from __future__ import annotations

import pytest
import torch

from cluster.config.training import OptimizerConfig
from cluster.training_optimizer import reset_state


@pytest.mark.parametrize("name", ["adamw", "schedule_free_adamw"])
def test_state_is_where_its_parameter_is(name: str) -> None:
    """A fused step refuses a counter on the CPU beside a parameter on a GPU; 'meta' stands for it here."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    reset_state(optimizer, OptimizerConfig.model_validate({"name": name}), [parameter])
    state = optimizer.state[parameter]
    assert len(state) == (3 if name == "adamw" else 2)
    assert {value.device.type for value in state.values()} == {"meta"}
