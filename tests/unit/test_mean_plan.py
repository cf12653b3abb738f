"""Units of a mean: they cover the files whatever the layouts, and give the same bits however shared out."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from colbert_core import mean_plan
from colbert_core.mean_plan import MeanPlan, Piece
from colbert_core.model_files import LocalFile
from colbert_core.tensor_files import TensorFileWriter, TensorSpec

SHAPES = {"a": (37, 5), "b": (), "c": (0, 4), "d": (301,), "e": (2, 3, 5), "f": (1,)}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mean_plan, "BLOCK_BYTES", 256)
    monkeypatch.setattr(mean_plan, "_ELEMENTS_AT_ONCE", 10)


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return made | {"ids": torch.arange(90), "flags": torch.arange(7) % 2 == 0}


def joined(pieces: Sequence[Piece], plan: MeanPlan) -> dict[str, bytes]:
    """The tensors' bytes, after checking that every byte comes once."""
    whole = {name: bytearray(spec.nbytes) for name, spec in plan.specs.items()}
    seen = {name: np.zeros(spec.nbytes, int) for name, spec in plan.specs.items()}
    for piece in pieces:
        data = piece.values.tobytes()
        whole[piece.name][piece.offset : piece.offset + len(data)] = data
        seen[piece.name][piece.offset : piece.offset + len(data)] += 1
    assert all((count == 1).all() for count in seen.values())
    return {name: bytes(data) for name, data in whole.items()}


def in_order(path: Path, content: Mapping[str, torch.Tensor], names: Sequence[str], note: str) -> LocalFile:
    """A file with its tensors in this order, and a header whose length depends on the note."""
    kinds = {torch.float32: "F32", torch.int64: "I64", torch.bool: "BOOL"}
    specs = {name: TensorSpec(kinds[content[name].dtype], tuple(content[name].shape)) for name in names}
    with TensorFileWriter(path, specs, {"note": note}) as writer:
        for name in names:
            writer.write(name, [content[name].numpy()])
    return LocalFile(path)


def expected(plan: MeanPlan, models: Sequence[dict[str, torch.Tensor]], weights: Sequence[float]) -> None:
    got = joined(list(plan.pieces()), plan)
    for name in SHAPES:
        stack = np.stack([model[name].double().numpy() for model in models])
        mean = np.tensordot(np.array(weights) / sum(weights), stack, 1)
        np.testing.assert_allclose(
            np.frombuffer(got[name], "<f4"), mean.reshape(-1), rtol=1e-6, atol=1e-8, err_msg=name
        )
    assert np.frombuffer(got["ids"], "<i8").tolist() == list(range(90))
    assert got["flags"] == models[0]["flags"].numpy().tobytes()


@settings(max_examples=25, deadline=None)
@given(st.permutations(sorted(tensors(0))), st.text("x", max_size=300), st.integers(0, 8))
def test_inputs_of_other_orders_and_header_lengths(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], note: str, ahead: int
) -> None:
    """Offsets then are neither equal nor aligned, not even to the size of an element."""
    folder = tmp_path_factory.mktemp("layouts")
    models = [tensors(seed) for seed in range(3)]
    files = [
        in_order(folder / "0", models[0], sorted(names), ""),
        in_order(folder / "1", models[1], names, note),
        in_order(folder / "2", models[2], names[::-1], note[::2]),
    ]
    weights = [1.0, 2.0, 0.5]
    plan = MeanPlan.of(files, weights)
    assert len(plan.units) > 8
    expected(plan, models, weights)
    expected(MeanPlan.of(files[::-1], weights[::-1]), models[::-1], weights[::-1])
    assert joined(list(plan.pieces(ahead=ahead + 1)), plan) == joined(list(plan.pieces()), plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floats_are_summed_in_float64(tmp_path: Path, dtype: torch.dtype) -> None:
    models = [tensors(seed, dtype) for seed in range(4)]
    for number, model in enumerate(models):
        save_file(model, tmp_path / str(number))
    weights = [1.0, 3.0, 0.25, 7.0]
    expected(MeanPlan.of([LocalFile(tmp_path / str(n)) for n in range(4)], weights), models, weights)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 40), max_size=6), st.randoms(use_true_random=False))
def test_any_partition_in_any_order_gives_the_same_bits(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], random: np.random.Generator
) -> None:
    folder = tmp_path_factory.mktemp("partition")
    for seed in range(3):
        save_file(tensors(seed), folder / str(seed))
    plan = MeanPlan.of([LocalFile(folder / str(seed)) for seed in range(3)], [0.1, 0.7, 0.3])
    whole = joined(list(plan.pieces()), plan)
    borders = sorted({0, len(plan.units), *(cut for cut in cuts if cut < len(plan.units))})
    groups = list(pairwise(borders))
    random.shuffle(groups)
    travelled = pickle.loads(pickle.dumps(plan))  # noqa: S301
    pieces = [piece for first, last in groups for piece in travelled.pieces(first, last, ahead=3)]
    assert joined(pieces, plan) == whole


def test_a_unit_is_a_block_of_the_first_file(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1000)}, tmp_path / "0")
    plan = MeanPlan.of([LocalFile(tmp_path / "0")], [1.0])
    ends = [plan.places[0]["w"].start + 4 * unit[-1].end for unit in plan.units]
    assert ends[:-1] == [256 * number for number in range(1, len(ends))]
    assert plan.nbytes(plan.units[3]) == 256
