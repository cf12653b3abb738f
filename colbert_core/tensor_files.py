"""Safetensors files in parts: where each tensor lies, writing them piece by piece, telling files apart.

The ``safetensors`` package reads local files and writes a whole dictionary at once. A mean of checkpoints
or a dequantised base must not hold all of its tensors, and its inputs may lie in object storage, so the
format is read and written here: a little-endian u64 header length, a JSON header padded with spaces, then
the raw little-endian data in header order (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np

from colbert_core.errors import ModelError

_ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U64": 8,
    "U32": 4,
    "U16": 2,
    "U8": 1,
    "BOOL": 1,
}
_MAX_HEADER = 100_000_000  # as in the safetensors package

ReadRange = Callable[[int, int], "bytes | memoryview"]
"""Reads so many bytes from an offset on."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's safetensors dtype name ("F32", "I64", …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the raw data."""
        return math.prod(self.shape) * _ITEM_SIZES[self.dtype]


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in a file: what it is, and the offset of its first byte, counted from the file's start."""

    spec: TensorSpec
    start: int


def tensor_places(read: ReadRange, size: int, where: str) -> dict[str, TensorPlace]:
    """Reads a safetensors header: the tensors of a file in the order of their data.

    Args:
        read: reads ranges of the file.
        size: the file's bytes.
        where: names the file in messages.

    Raises:
        ModelError: it is no safetensors file, is cut short, or has a dtype that is not supported.
    """

    def refuse(reason: str) -> NoReturn:
        raise ModelError(f"{where}: not readable as safetensors: {reason}")

    if size < 8:
        refuse(f"{size} bytes")
    (length,) = struct.unpack("<Q", read(0, 8))
    if length > min(_MAX_HEADER, size - 8):
        refuse(f"a header of {length} bytes in a file of {size}")
    try:
        header = json.loads(bytes(read(8, length)))
    except ValueError as error:
        refuse(f"the header is not JSON: {error}")
    if not isinstance(header, dict):
        refuse("the header is not a JSON object")
    places = {}
    for name, entry in header.items():
        if name != "__metadata__":
            spec, begin, end = _entry(entry) or refuse(f"the entry of {name} is malformed")
            if spec.dtype not in _ITEM_SIZES:
                refuse(f"{name} has dtype {spec.dtype}; supported: {', '.join(_ITEM_SIZES)}")
            if end - begin != spec.nbytes:
                refuse(f"{name} has {end - begin} bytes, but is {spec.dtype}{list(spec.shape)}")
            places[name] = TensorPlace(spec, 8 + length + begin)
    ordered = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].spec.nbytes)))
    due = 8 + length
    for name, place in ordered.items():
        if place.start != due:
            refuse(f"the data of {name} begin at byte {place.start}, not at {due}")
        due += place.spec.nbytes
    if due != size:
        refuse(f"the tensors end at byte {due}, the file at {size}")
    return ordered


def _entry(entry: Any) -> tuple[TensorSpec, int, int] | None:
    """A header's entry, None if it is malformed."""
    if not isinstance(entry, dict):
        return None
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not (isinstance(dtype, str) and isinstance(shape, list) and isinstance(offsets, list)):
        return None
    if len(offsets) != 2 or not all(type(number) is int and number >= 0 for number in [*shape, *offsets]):
        return None
    return TensorSpec(dtype, tuple(shape)), offsets[0], offsets[1]


class TensorFileWriter:
    """A safetensors file whose tensors are given in pieces, in any order.

    Used as a context manager. The file appears under its name only when the block ends without an
    error and every tensor was written; until then it is a sibling with a ``.partial`` ending.

    Args:
        path: the file to write.
        specs: dtype and shape of every tensor; the file has them in this order.
        metadata: strings stored in the header.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._specs = dict(specs)
        self._missing = {name: spec.nbytes for name, spec in self._specs.items()}
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, spec in self._specs.items():
            end = offset + spec.nbytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            self._offsets[name] = offset
            offset = end
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        # Tensors of whole cache lines then start on one when the file is mapped.
        self._header = encoded + b" " * (-(8 + len(encoded)) % 64)

    def __enter__(self) -> TensorFileWriter:
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Writes a whole tensor.

        Args:
            name: one of ``specs``.
            chunks: its data, row-major, in pieces whose bytes are the file's (little-endian).

        Raises:
            ValueError: the pieces do not add up to the tensor's size.
        """
        offset = 0
        for chunk in chunks:
            offset += self.write_at(name, offset, chunk)
        if offset != self._specs[name].nbytes:
            raise ValueError(f"{self._path}: {name} has {offset} bytes, not {self._specs[name].nbytes}")

    def write_at(self, name: str, offset: int, piece: np.ndarray) -> int:
        """Writes a piece of a tensor, each of its bytes once; returns its number of bytes.

        Args:
            name: one of ``specs``.
            offset: bytes of the tensor before the piece.
            piece: row-major, its bytes those of the file (little-endian).

        Raises:
            ValueError: more is written than the tensor has room for.
        """
        data = np.ascontiguousarray(piece)
        self._missing[name] -= data.nbytes
        if self._missing[name] < 0 or offset + data.nbytes > self._specs[name].nbytes:
            raise ValueError(f"{self._path}: {name} has {self._specs[name].nbytes} bytes and was given more")
        self._file.seek(8 + len(self._header) + self._offsets[name] + offset)
        self._file.write(data.data)
        return data.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lacking = [name for name, missing in self._missing.items() if missing]
        try:
            self._file.close()  # writes what is still buffered, for which there may be no room
            if kind is None and not lacking:
                self._partial.replace(self._path)
        finally:
            self._partial.unlink(missing_ok=True)
        if kind is None and lacking:
            raise ValueError(f"{self._path}: not written in full: {', '.join(lacking)}")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
