"""Settings of every test process; they must stand before Ray, torch or transformers is imported."""

from __future__ import annotations

import os

os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_V2_ENABLED="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

import torch

torch.set_num_threads(1)
