"""A process group of one, for engines that run without Ray Train."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch._C._distributed_c10d import HashStore


def join_alone() -> None:
    """Makes this process the only one of the default group; once."""
    if not dist.is_initialized():
        # DeepSpeed reads these even where a group exists.
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
