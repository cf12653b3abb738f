"""Writes a safetensors file one tensor at a time, and tells files apart by content.

The ``safetensors`` package can read a file tensor by tensor but writes a whole dictionary at once. A
mean of checkpoints or a dequantised base must not hold all of its tensors, so the format is written
here: a little-endian u64 header length, a JSON header padded with spaces, then the raw little-endian
data in header order (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

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


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's safetensors dtype name ("F32", "I64", …) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the raw data."""
        return int(np.prod(self.shape, dtype=np.int64)) * _ITEM_SIZES[self.dtype]


class TensorFileWriter:
    """A safetensors file whose tensors are given one after the other.

    Used as a context manager. The file appears under its name only when the block ends without an
    error and every tensor was written; until then it is a sibling with a ``.partial`` ending.

    Args:
        path: the file to write.
        specs: dtype and shape of every tensor; they must be written in this order.
        metadata: strings stored in the header.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self._path = path
        self._partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._specs = dict(specs)
        self._pending = list(self._specs)
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, spec in self._specs.items():
            end = offset + spec.nbytes
            header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [offset, end]}
            offset = end
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        # Tensors of whole cache lines then start on one when the file is mapped.
        self._header = encoded + b" " * (-(8 + len(encoded)) % 64)

    def __enter__(self) -> TensorFileWriter:
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(self._header)) + self._header)
        return self

    def write(self, name: str, chunks: Iterable[np.ndarray]) -> None:
        """Writes the next tensor.

        Args:
            name: must be the next name of ``specs``.
            chunks: its data, row-major, in pieces whose bytes are the file's (little-endian).

        Raises:
            ValueError: another tensor is due, or the pieces do not add up to the tensor's size.
        """
        if not self._pending or self._pending[0] != name:
            due = self._pending[0] if self._pending else "nothing more"
            raise ValueError(f"{self._path}: {name} was given where {due} is due")
        written = 0
        for chunk in chunks:
            written += self._file.write(np.ascontiguousarray(chunk).data)
        if written != self._specs[name].nbytes:
            raise ValueError(f"{self._path}: {name} has {written} bytes, not {self._specs[name].nbytes}")
        self._pending.pop(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None and not self._pending:
            self._partial.replace(self._path)
            return
        self._partial.unlink(missing_ok=True)
        if kind is None:
            raise ValueError(f"{self._path}: tensors never written: {', '.join(self._pending)}")


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
