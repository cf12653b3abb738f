"""Headers of safetensors files: those that the package writes are read, all others are refused by name."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from colbert_core.errors import ModelError
from colbert_core.tensor_files import TensorFileWriter, TensorPlace, TensorSpec, tensor_places

HEADER = {
    "__metadata__": {"format": "pt"},
    "w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "i": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
}


def places_of(data: bytes) -> dict[str, TensorPlace]:
    return tensor_places(lambda start, length: data[start : start + length], len(data), "it")


def file_of(header: Any, size: int = 32) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


def test_what_the_package_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "z": torch.ones(3, 4),
        "a": torch.arange(5),
        "none": torch.ones(0, 7),
        "one": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "f", metadata={"format": "pt"})
    data = (tmp_path / "f").read_bytes()
    found = places_of(data)
    assert {name: place.spec.shape for name, place in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    for name, place in found.items():
        assert data[place.start : place.start + place.spec.nbytes] == tensors[name].numpy().tobytes()
    assert [place.start for place in found.values()] == sorted(place.start for place in found.values())


def changed(name: str, **entry: Any) -> dict[str, Any]:
    return HEADER | {name: HEADER[name] | entry}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "0 bytes"),
        (b"\x00" * 7, "7 bytes"),
        (struct.pack("<Q", 1 << 60) + bytes(40), "a header of"),
        (file_of(b"{nothing"), "not JSON"),
        (file_of(b"\xff\xfe\xfd"), "not JSON"),
        (file_of([1]), "not a JSON object"),
        (file_of(HEADER | {"w": 1}), "entry of w is malformed"),
        (file_of(changed("w", shape=[2, -3])), "entry of w is malformed"),
        (file_of(changed("w", shape=[2.0, 3])), "entry of w is malformed"),
        (file_of(changed("w", shape=[True, 6])), "entry of w is malformed"),
        (file_of(changed("w", data_offsets=[0])), "entry of w is malformed"),
        (file_of(changed("w", dtype="F8_E4M3")), "w has dtype F8_E4M3; supported: F64"),
        (file_of(changed("w", shape=[3, 3])), r"w has 24 bytes, but is F32\[3, 3\]"),
        (file_of(changed("w", shape=[2**62, 2**62])), "w has 24 bytes"),
        (file_of(changed("i", data_offsets=[16, 24])), "the data of i begin at byte"),
        (file_of(HEADER, 40), "the tensors end at byte"),
        (file_of(HEADER, 31), "the tensors end at byte"),
        (file_of({}, 8), "the tensors end at byte"),
    ],
)
def test_everything_else_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ModelError, match=rf"^it: not readable as safetensors: .*{reason}"):
        places_of(data)


@given(st.integers(0, len(file_of(HEADER)) - 1), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_leaves_ranges_inside_the_file(place: int, value: int) -> None:
    data = bytearray(file_of(HEADER))
    data[place] = value
    try:
        found = places_of(bytes(data))
    except ModelError:
        return
    assert all(8 <= p.start <= p.start + p.spec.nbytes <= len(data) for p in found.values())


def test_pieces_are_written_in_any_order_and_each_once(tmp_path: Path) -> None:
    specs = {"a": TensorSpec("F32", (4,)), "b": TensorSpec("F32", (2,))}
    a, b = np.arange(4, dtype="<f4"), np.arange(2, dtype="<f4")
    with TensorFileWriter(tmp_path / "f", specs) as writer:
        writer.write_at("a", 8, a[2:])
        writer.write("b", [b])
        assert not (tmp_path / "f").exists()
        writer.write_at("a", 0, a[:2])
    assert {name: value.tolist() for name, value in load_file(tmp_path / "f").items()} == {
        "a": [0, 1, 2, 3],
        "b": [0, 1],
    }
    with (
        pytest.raises(ValueError, match="not written in full: b"),
        TensorFileWriter(tmp_path / "g", specs) as writer,
    ):
        writer.write("a", [a])
    with (
        pytest.raises(ValueError, match="was given more"),
        TensorFileWriter(tmp_path / "g", specs) as writer,
    ):
        writer.write_at("a", 4, a)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
