"""The mean of one weights file of several models, in units that can be computed anywhere, in any order.

A unit goes through the same block of all inputs, one after the other, and sums them in float64. Memory
depends neither on how many inputs there are nor on how large a tensor is, and the result of an element
depends on nothing but the inputs, their weights and the order they are summed in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from colbert_core.errors import NonFiniteError
from colbert_core.mean_kernels import add_to_sums, begin_sums, finish_means
from colbert_core.model_files import RangedFile, read_range, refuse_differences
from colbert_core.tensor_files import TensorPlace, TensorSpec, tensor_places

BLOCK_BYTES = 8 << 20
"""What is read at once. Published files have a digest for each block of this size (cluster/manifest.py)."""

_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ELEMENTS_AT_ONCE = 1 << 15  # of half precision, so that what they become stays in the processor's cache


@dataclass(frozen=True)
class Piece:
    """A part of a mean.

    Attributes:
        name: the tensor.
        offset: bytes of the tensor before the piece.
        values: the tensor's elements from there on, fp32; the raw bytes of an integer or boolean tensor.
        read: bytes of the inputs that went in.
    """

    name: str
    offset: int
    values: np.ndarray
    read: int


@dataclass(frozen=True)
class Span:
    """Elements ``[begin, end)`` of a tensor."""

    name: str
    begin: int
    end: int


Unit = tuple[Span, ...]


@dataclass(frozen=True)
class MeanPlan:
    """The mean of one weights file, cut into units that anybody can compute; it can be pickled.

    Attributes:
        files: the inputs, in the order they are summed in.
        weights: of the inputs.
        places: where the tensors lie in each input.
        units: what is read and summed at once: the tensors' parts in one block of the first input.
    """

    files: tuple[RangedFile, ...]
    weights: tuple[float, ...]
    places: tuple[Mapping[str, TensorPlace], ...]
    units: tuple[Unit, ...]

    @classmethod
    def of(cls, files: Sequence[RangedFile], weights: Sequence[float]) -> MeanPlan:
        """Reads the headers.

        Raises:
            ModelError: a file is not readable, or keys, shapes or dtypes differ; all of these are listed.
        """
        places = [tensor_places(partial(read_range, file), file.size, str(file)) for file in files]
        differences = []
        for file, others in zip(files[1:], places[1:], strict=True):
            differences += [f"{name} is only in {files[0]}" for name in places[0] if name not in others]
            differences += [f"{name} is only in {file}" for name in others if name not in places[0]]
            differences += [
                f"{name} is {_shape(places[0][name].spec)} in {files[0]} and {_shape(place.spec)} in {file}"
                for name, place in others.items()
                if name in places[0] and places[0][name].spec != place.spec
            ]
        refuse_differences(differences)
        return cls(tuple(files), tuple(weights), tuple(places), tuple(_units(places[0])))

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """The mean's tensors, sorted by name."""
        specs = {name: place.spec for name, place in sorted(self.places[0].items())}
        return {n: TensorSpec("F32", s.shape) if s.dtype in _FLOATS else s for n, s in specs.items()}

    def nbytes(self, unit: Sequence[Span]) -> int:
        """Bytes of a unit in one input."""
        return sum(_nbytes(self.places[0][span.name], span) for span in unit)

    def pieces(self, first: int = 0, last: int | None = None, *, ahead: int = 1) -> Iterator[Piece]:
        """Computes the units ``[first, last)``, by default all.

        Args:
            first, last: numbers of units.
            ahead: how many reads are made before their turn, each by a thread of its own. Memory is
                bounded by ``ahead + 5`` blocks, the double of that for half precision.

        Raises:
            NonFiniteError: an input holds a NaN or an infinity, or the mean is too large for fp32; file
                and tensor are named.
            ModelError: inputs differ in an integer tensor.
            RaycolbertError: what reading a file raises.
        """
        units = self.units[first:last]
        order = [(unit, number) for unit in units for number in range(len(self.files))]
        # What is added to -0.0 stays as it is: the sums that the mean of one file begins with.
        total = np.full(max((self._floats(unit) for unit in units), default=0), -0.0)
        kept: dict[Span, bytes] = {}
        for (unit, number), data in self._fetched(order, ahead):
            place = begin = 0
            for span in unit:
                where = self.places[number][span.name]
                raw = data[place : place + _nbytes(where, span)]
                place += len(raw)
                if where.spec.dtype in _FLOATS:
                    end = begin + span.end - span.begin
                    values = np.frombuffer(raw, _FLOATS[where.spec.dtype])
                    if number < len(self.files) - 1:
                        _add(values, self.weights[number], total[begin:end], number == 0)
                    else:
                        yield self._piece(span, _mean(values, self.weights, total[begin:end]), len(raw))
                    begin = end
                    continue
                if number == 0:
                    kept[span] = bytes(raw)
                elif raw != kept[span]:
                    what = f"{span.name} ({where.spec.dtype})"
                    refuse_differences(
                        [f"{what} has other values in {self.files[0]} than in {self.files[number]}"]
                    )
                if number == len(self.files) - 1:
                    yield self._piece(span, np.frombuffer(kept.pop(span), np.uint8), len(raw))

    def _piece(self, span: Span, values: np.ndarray | None, nbytes: int) -> Piece:
        """A finished piece; without values the mean is not finite."""
        if values is None:
            guilty = [
                str(file) for number, file in enumerate(self.files) if not self._is_finite(number, span)
            ]
            raise NonFiniteError(f"{span.name} is not finite in {', '.join(guilty) or 'the mean (overflow)'}")
        spec = self.places[0][span.name].spec
        width = 4 if spec.dtype in _FLOATS else spec.nbytes // math.prod(spec.shape)
        return Piece(span.name, span.begin * width, values, nbytes * len(self.files))

    def _fetched(
        self, order: Sequence[tuple[Unit, int]], ahead: int
    ) -> Iterator[tuple[tuple[Unit, int], memoryview]]:
        """The bytes of units in inputs, in this order; each is good until the next is asked for."""
        # The same few buffers all the time: threads that allocate would each keep a heap of their own.
        room = max((self.nbytes(unit) for unit, _ in order), default=0)
        free = [bytearray(room) for _ in range(min(ahead + 1, len(order)))]
        waiting: deque[tuple[tuple[Unit, int], bytearray, Future[memoryview]]] = deque()
        coming = iter(order)
        pool = ThreadPoolExecutor(ahead)
        try:
            while True:
                while free and (item := next(coming, None)) is not None:
                    buffer = free.pop()
                    waiting.append((item, buffer, pool.submit(self._read, *item, buffer)))
                if not waiting:
                    return
                item, buffer, future = waiting.popleft()
                yield item, future.result()
                free.append(buffer)
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self, unit: Sequence[Span], number: int, buffer: bytearray) -> memoryview:
        """Reads a unit of one input; tensors that lie one behind the other there are one read."""
        view, done = memoryview(buffer), 0
        for start, length in _runs(self.places[number], unit):
            self.files[number].read_into(start, view[done : done + length])
            done += length
        return view[:done]

    def _floats(self, unit: Sequence[Span]) -> int:
        return sum(s.end - s.begin for s in unit if self.places[0][s.name].spec.dtype in _FLOATS)

    def _is_finite(self, number: int, span: Span) -> bool:
        raw = self._read([span], number, bytearray(self.nbytes([span])))
        dtype = self.places[number][span.name].spec.dtype
        parts = _numbers(np.frombuffer(raw, _FLOATS[dtype]))
        return all(bool(np.isfinite(values).all()) for _, values in parts)


def _shape(spec: TensorSpec) -> str:
    return f"{spec.dtype}{list(spec.shape)}"


def _nbytes(place: TensorPlace, span: Span) -> int:
    return (span.end - span.begin) * (place.spec.nbytes // math.prod(place.spec.shape))


def _units(places: Mapping[str, TensorPlace]) -> Iterator[Unit]:
    """Parts of tensors that begin in the same block of the file."""
    unit: list[Span] = []
    block = 0
    for name, place in places.items():
        elements = math.prod(place.spec.shape)
        begin = 0
        while begin < elements:
            width = place.spec.nbytes // elements
            number = (place.start + begin * width) // BLOCK_BYTES
            if number != block and unit:
                yield tuple(unit)
                unit = []
            block = number
            # An element that the border cuts in two belongs to the block it begins in.
            end = min(elements, -(-((number + 1) * BLOCK_BYTES - place.start) // width))
            unit.append(Span(name, begin, end))
            begin = end
    if unit:
        yield tuple(unit)


def _runs(places: Mapping[str, TensorPlace], unit: Sequence[Span]) -> Iterator[tuple[int, int]]:
    """Start and length of the ranges of a file that hold a unit, adjacent ones joined."""
    run: tuple[int, int] | None = None
    for span in unit:
        place = places[span.name]
        length = _nbytes(place, span)
        start = place.start + span.begin * (place.spec.nbytes // math.prod(place.spec.shape))
        if run is not None and sum(run) == start:
            run = (run[0], run[1] + length)
            continue
        if run is not None:
            yield run
        run = (start, length)
    if run is not None:
        yield run


def _numbers(stored: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Stored elements as fp32 or fp64; of half precision, some at a time."""
    if stored.dtype.itemsize > 2:
        yield slice(len(stored)), stored
        return
    for begin in range(0, len(stored), _ELEMENTS_AT_ONCE):
        part = stored[begin : begin + _ELEMENTS_AT_ONCE]
        # bf16, which numpy lacks, are the upper halves of fp32.
        wide = (
            (part.astype(np.uint32) << 16).view(np.float32) if part.dtype == np.uint16 else part.astype("f4")
        )
        yield slice(begin, begin + len(part)), wide


def _add(stored: np.ndarray, weight: float, total: np.ndarray, first: bool) -> None:
    """Adds weighted values to the sums in float64, or begins the sums with them."""
    for place, values in _numbers(stored):
        if first:
            begin_sums(values, weight, total[place])
        else:
            add_to_sums(values, weight, total[place])


def _mean(stored: np.ndarray, weights: Sequence[float], total: np.ndarray) -> np.ndarray | None:
    """Adds the last input to the sums of the others and divides.

    Returns:
        The mean in fp32, None if it is not finite.
    """
    # A division takes longer, and what the reciprocal is off is far below an ulp of fp32.
    mean, share = np.empty(len(stored), "<f4"), 1.0 / math.fsum(weights)
    parts = _numbers(stored)
    finite = [finish_means(values, weights[-1], total[place], share, mean[place]) for place, values in parts]
    return mean if all(finite) else None
