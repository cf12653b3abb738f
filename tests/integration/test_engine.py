"""The DeepSpeed engine against plain PyTorch, at every ZeRO stage, precision and number of workers."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp

from tests.engine_programs import lead
from tests.engine_reference import CASES, SCHEDULE_FREE, STEPS, furthest, reference
from tests.tiny_models import tiny_bert_dir


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both group sizes found, as JSON files."""
    folder = tmp_path_factory.mktemp(uuid.uuid4().hex)
    tiny_bert_dir(folder / "base")
    mp.spawn(lead, args=(folder,))
    return folder


def load(folder: Path, program: str, workers: int) -> dict[str, Any]:
    return dict(json.loads((folder / f"{program}-{workers}.json").read_text()))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("stage", "precision"), CASES)
def test_views_equal_plain_pytorch(measured: Path, stage: int, precision: str, workers: int) -> None:
    found = load(measured, "views", workers)[f"{stage}-{precision}"]
    bound = 1e-6 if stage == 3 else 0.0
    assert found["y"] <= bound
    assert found["x"] <= bound
    assert found["norm"] <= max(bound, 1e-5)
    assert found["counters"] == [STEPS, STEPS]
    assert found["resumed y"] == found["resumed x"] == 0.0


@pytest.mark.parametrize("workers", [1, 2])
def test_exports_are_fp32_without_frozen_parameters(measured: Path, workers: int) -> None:
    for case, found in load(measured, "views", workers).items():
        assert found["dtypes"] == ["torch.float32"], case
        assert "table.weight" not in found["names"], case
        assert found["frozen state"] is False, case
        # The tied matrix has one name.
        assert [name for name in found["names"] if "tied" in name or "again" in name] == ["tied.weight"]
        assert found["files"] == ["counters.json", "state-00000-00000.safetensors"], case


def test_x_and_y_differ_enough_to_be_told_apart() -> None:
    expected = reference(1, SCHEDULE_FREE)
    assert furthest(expected["x"], expected["y"]) > 1e-3


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_three_resumes_bit_for_bit(measured: Path, precision: str, workers: int) -> None:
    assert load(measured, "stage_three_resume", workers)[precision] == [0.0, 0.0]


@pytest.mark.parametrize("workers", [1, 2])
def test_adamw_with_decay_and_clipping(measured: Path, workers: int) -> None:
    for stage, found in load(measured, "plain_adamw", workers).items():
        assert found["x"] <= 1e-6, stage
        assert found["resumed"] == 0.0, stage


def test_state_loads_at_another_world_size_and_stage(measured: Path) -> None:
    found = load(measured, "other_sizes", 1)
    assert len(found) == 4
    assert max(found.values()) <= 1e-5


def test_zero_three_with_unequal_encoder_batches(measured: Path) -> None:
    found = load(measured, "encoder", 2)
    first, _, last = found["passes"][0]
    assert first < last
    assert found["moved"] > 1e-4
    assert found["frozen"] == []
    assert found["3"] <= 1e-5
    assert found["3 recomputed"] <= 1e-5


def test_refusals_say_what_is_wrong(measured: Path) -> None:
    messages = load(measured, "refusals", 1)
    assert "nowhere" in messages["missing"]
    assert "does not fit" in messages["optimizer"]
    assert "step 1 is not finite" in messages["gradient"]
    assert "freeze" in messages["frozen"]
