"""Token vectors of many texts in one flat tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from colbert_core.errors import DimensionError


@dataclass
class RaggedVectors:
    """The token vectors of n texts, one after another.

    Attributes:
        vectors: float ``[total, dim]``.
        lengths: int64 ``[n]``, vectors of each text, on the CPU; their sum is ``total``.
        padding_fraction: share of the encoder's tokens that were padding when these vectors were made,
            0 to 1; None if they were not just encoded.

    Raises:
        DimensionError: ``vectors`` and ``lengths`` do not fit together, or a length is negative.
    """

    vectors: Tensor
    lengths: Tensor
    padding_fraction: float | None = None

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or self.lengths.ndim != 1:
            raise DimensionError(
                f"vectors must be [total, dim] and lengths [n], not {list(self.vectors.shape)} and "
                f"{list(self.lengths.shape)}"
            )
        self.lengths = self.lengths.to(device="cpu", dtype=torch.int64)
        if len(self.lengths) and int(self.lengths.min()) < 0:
            text = int(self.lengths.argmin())
            raise DimensionError(f"text {text} has {int(self.lengths[text])} vectors")
        if int(self.lengths.sum()) != self.vectors.shape[0]:
            raise DimensionError(
                f"lengths add up to {int(self.lengths.sum())}, but there are {self.vectors.shape[0]} vectors"
            )
        self._offsets = torch.zeros(len(self.lengths) + 1, dtype=torch.int64)
        torch.cumsum(self.lengths, dim=0, out=self._offsets[1:])

    @property
    def offsets(self) -> Tensor:
        """int64 ``[n + 1]`` on the CPU: text i owns rows ``offsets[i]`` to ``offsets[i + 1]``."""
        return self._offsets

    @property
    def dim(self) -> int:
        return self.vectors.shape[1]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:
        """The vectors ``[length, dim]`` of one text, as a view."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        index %= len(self)
        return self.vectors[int(self._offsets[index]) : int(self._offsets[index + 1])]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def rows(self) -> tuple[Tensor, Tensor]:
        """Which row each cell of the padded form holds.

        Returns:
            int64 ``[n, longest]`` row numbers (0 where there is none) and bool ``[n, longest]``, true
            where there is one; both on the device of the vectors.
        """
        longest = int(self.lengths.max()) if len(self) else 0
        position = torch.arange(longest)
        mask = position < self.lengths[:, None]
        rows = torch.where(mask, self._offsets[:-1, None] + position, 0)
        return rows.to(self.vectors.device), mask.to(self.vectors.device)

    def padded(self, some: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``[n, longest, dim]`` with zeros as padding, and the bool mask ``[n, longest]`` of real vectors.

        Args:
            some: numbers of the texts to return; all by default.
        """
        rows, mask = self.rows()
        if some is not None:
            rows, mask = rows[some], mask[some]
        if not mask.any():
            return self.vectors.new_zeros(*mask.shape, self.dim), mask
        return self.vectors[rows].masked_fill(~mask[..., None], 0.0), mask
