"""What every seekable reader of stored bytes shares: its position."""

from __future__ import annotations

import io


class PositionedReader(io.RawIOBase):
    """A readable, seekable stream of known size; who reads moves ``_position`` on.

    Args:
        key: where the bytes lie, for errors.
        size: in bytes.
    """

    def __init__(self, key: str, size: int) -> None:
        super().__init__()
        self._key = key
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}, before the start of {self._key!r}")
        self._position = start + offset
        return self._position
