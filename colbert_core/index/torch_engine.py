"""The steps of a search in torch, for GPUs: the same integers, hence the same answers bit for bit.

What each step computes is told in :mod:`colbert_core.index.engine`; here are only the differences. Shards
are copied to the device when the engine is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from colbert_core.index.codec import Codec
from colbert_core.index.query import Query, Run, gather_gains, interaction_units
from colbert_core.index.shard import Shard

_CELLS = 1 << 26  # elements of the largest intermediate result
_SMALLEST_INT8_ROWS = 17  # torch._int_mm takes no fewer on CUDA


@dataclass(frozen=True)
class _DeviceShard:
    """A shard's arrays on the device; codes and postings as int32, tie-breaks as int64."""

    offsets: Tensor
    codes: Tensor
    residuals: Tensor
    scales: Tensor
    posting_offsets: Tensor
    postings: Tensor
    tie_breaks: Tensor


@dataclass(frozen=True)
class _Tables:
    """As :class:`colbert_core.index.query.QueryTables`, on the device."""

    query: Query
    quantized: Tensor
    scores: Tensor
    table: Tensor | None = None
    probes: Tensor | None = None
    gains: Tensor | None = None


class TorchEngine:
    """Searches on a torch device; see :class:`colbert_core.index.engine.Engine`."""

    def __init__(self, codec: Codec, shards: Sequence[Shard], device: str | torch.device) -> None:
        self._codec = codec
        self._device = torch.device(device)
        self._centroids = self._put(codec.centroids)
        self._length_factors = self._put(codec.length_factors)
        self._centroid_factors = self._put(codec.length_factors * codec.centroid_scale[0])
        self._residual_factors = self._put(codec.residual_factors)
        last = len(codec.centroids) - 1
        self._shards = [
            _DeviceShard(
                self._put(shard.offsets),
                self._put(shard.codes.astype(np.int32)).clamp(0, last),
                self._put(shard.residuals),
                self._put(shard.scales),
                self._put(shard.posting_offsets),
                self._put(shard.postings),
                self._put(shard.tie_breaks.astype(np.int64)),
            )
            for shard in shards
        ]

    def tables(self, query: Query, probes: int, run: Run) -> _Tables:
        """As the CPU's; ``run`` is not used."""
        quantized = self._put(query.quantized)
        product = _integer_product(self._centroids, quantized)
        scores = product.to(torch.float32)
        if not probes:
            return _Tables(query, quantized, scores)
        centroids = len(self._centroids)
        # Unique keys: by score, ties by the centroid's number.
        number = torch.arange(centroids - 1, -1, -1, device=self._device)[:, None]
        keys = product[:, : query.length].to(torch.int64) * centroids + number
        best_keys = keys.topk(min(probes, centroids), dim=0).values.T
        found = centroids - 1 - best_keys.remainder(centroids)
        best = scores[:, : query.length].T.gather(1, found).cpu().numpy()
        gains = gather_gains(best, query.scales[: query.length])
        sums = product.sum(dim=0, dtype=torch.int64).cpu().numpy()
        bases, factors = interaction_units(best[:, 0], sums, centroids, query)
        table = ((scores - self._put(bases)) * self._put(factors)).round().clamp(0, 255).to(torch.uint8)
        return _Tables(query, quantized, scores, table, found, self._put(gains))

    def release(self, tables: _Tables) -> None:
        """Nothing to give back."""

    def gather(
        self, shard: int, tables: _Tables, eligible: NDArray[np.bool_]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """As the CPU's, in another order of documents."""
        assert tables.probes is not None and tables.gains is not None
        opened, documents = self._shards[shard], len(eligible)
        sums = torch.zeros(documents, dtype=torch.int64, device=self._device)
        met = torch.zeros(documents, dtype=torch.bool, device=self._device)
        step = max(1, _CELLS // max(1, documents))
        for start in range(0, len(tables.probes), step):
            probes = tables.probes[start : start + step]
            begins = opened.posting_offsets[probes].flatten()
            counts = opened.posting_offsets[probes + 1].flatten() - begins
            cell = torch.repeat_interleave(counts)
            position = torch.arange(len(cell), device=self._device)
            position += (begins - (counts.cumsum(0) - counts))[cell]
            document = opened.postings[position].to(torch.int64)
            valid = (document >= 0) & (document < documents)
            cell, document = cell[valid], document[valid]
            best = torch.full((len(probes) * documents,), -1, dtype=torch.int32, device=self._device)
            slot = cell.div(probes.shape[1], rounding_mode="floor") * documents + document
            gains = tables.gains[start : start + step].flatten()[cell]
            best = best.scatter_reduce(0, slot, gains, "amax").view(len(probes), documents)
            met |= (best >= 0).any(dim=0)
            sums += best.clamp(min=0).sum(dim=0)
        found = (met & self._put(eligible)).nonzero()[:, 0]
        keys = (sums[found] << 32) | opened.tie_breaks[found]
        return found.to(torch.int32).cpu().numpy(), keys.cpu().numpy()

    def interact(self, shard: int, tables: _Tables, documents: NDArray[np.int32]) -> NDArray[np.int64]:
        """As the CPU's."""
        assert tables.table is not None
        opened = self._shards[shard]
        best = torch.zeros((len(documents), tables.table.shape[1]), dtype=torch.int32, device=self._device)
        for owner, token in self._tokens(opened, documents, tables.table.shape[1]):
            values = tables.table[opened.codes[token]].to(torch.int32)
            best.scatter_reduce_(0, owner[:, None].expand_as(values), values, "amax")
        ties = opened.tie_breaks[self._put(documents.astype(np.int64))]
        return ((best.sum(dim=1, dtype=torch.int64) << 32) | ties).cpu().numpy()

    def score(self, shard: int, tables: _Tables, documents: NDArray[np.int32]) -> NDArray[np.float32]:
        """As the CPU's: each similarity is rounded after every operation, sums follow the query tokens."""
        opened, lanes = self._shards[shard], len(tables.quantized)
        lowest = float(np.finfo(np.float32).min)
        best = torch.full((len(documents), lanes), lowest, dtype=torch.float32, device=self._device)
        for owner, token in self._tokens(opened, documents, max(lanes, self._codec.width)):
            levels = _unpack(opened.residuals[token], self._codec.bits)
            scales = opened.scales[token].to(torch.int64)
            length = self._length_factors[scales[:, 0]]
            a = self._centroid_factors[scales[:, 0]][:, None]
            b = (length * self._residual_factors[scales[:, 1]])[:, None]
            product = _integer_product(levels, tables.quantized).to(torch.float32)
            values = a * tables.scores[opened.codes[token]] + b * product
            best.scatter_reduce_(0, owner[:, None].expand_as(values), values, "amax")
        total = torch.zeros(len(documents), dtype=torch.float32, device=self._device)
        for i in range(tables.query.length):
            total += best[:, i] * float(tables.query.scales[i])
        return total.cpu().numpy()

    def _tokens(
        self, opened: _DeviceShard, documents: NDArray[np.int32], cells: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The documents' tokens in runs: number in ``documents`` and row in the shard of each."""
        chosen = self._put(documents.astype(np.int64))
        begins = opened.offsets[chosen]
        lengths = opened.offsets[chosen + 1] - begins
        ends = lengths.cumsum(0)
        total, step = int(ends[-1]) if len(ends) else 0, max(1, _CELLS // cells)
        for start in range(0, total, step):
            flat = torch.arange(start, min(start + step, total), device=self._device)
            owner = torch.searchsorted(ends, flat, right=True)
            yield owner, begins[owner] + flat - (ends - lengths)[owner]

    def _put(self, array: NDArray[Any]) -> Tensor:
        """A copy on the device, whose memory is torch's own."""
        return torch.tensor(array, device=self._device)


def _integer_product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of int8 matrices as int32 (or, where a GPU has no rows for it, exact float32)."""
    if left.is_cuda and left.shape[0] >= _SMALLEST_INT8_ROWS:
        return torch._int_mm(left, right.T)
    # Sums of products stay below 2^24, which float32 adds exactly in any order.
    return (left.to(torch.float32) @ right.to(torch.float32).T).to(torch.int32)


def _unpack(residuals: Tensor, bits: int) -> Tensor:
    """Levels int8 ``[n, width]``; see :func:`colbert_core.index.quantizer.unpack_levels`."""
    if bits == 8:
        return (residuals.to(torch.int16) - 128).to(torch.int8)
    codes = [(residuals >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
    return (2 * torch.cat(codes, dim=1).to(torch.int16) - ((1 << bits) - 1)).to(torch.int8)
