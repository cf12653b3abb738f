"""The codec of an index: one set of centroids and one residual quantiser for all its shards.

A token vector t is stored as the number of its centroid c, a residual direction rounded to a uniform
grid of 2^bits levels per dimension, and two bytes of scale::

    t  ≈  a · c  +  b · levels

Everything happens in a randomly rotated space, where all dimensions carry about the same share of a
residual, so that one grid suits them all and int8 centroids and queries lose little. b is the residual's
own least-squares scale; a restores the length that rounding changed. Dot products need no decoded
vector: ``q·t ≈ a (q·c) + b (q·levels)``, where q·c is known for every centroid and q·levels is a product
of small integers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from colbert_core.config import CodecConfig
from colbert_core.errors import (
    DataError,
    DimensionError,
    IndexFormatError,
    NonFiniteError,
    SchemaVersionError,
)
from colbert_core.index.assignment import Assigner, quantize_grid
from colbert_core.index.clustering import Progress, train_centroids
from colbert_core.index.kernels import rotate_rows
from colbert_core.index.quantizer import (
    STEP,
    factor_tables,
    fit_lengths,
    fit_levels,
    nearest_entry,
    pack_levels,
    unpack_levels,
)

SCHEMA_VERSION = 1
TENSORS_FILE = "codec.safetensors"
DESCRIPTION_FILE = "codec.json"
CHUNK = 16_384  # vectors encoded at a time
FEW_POINTS = 16  # vectors of a sample for each centroid; the PLAID rule gives a corpus of 100,000 24
FITTED = 200_000  # vectors of the sample that the scales are fitted to, about
MAX_DIM = 1024  # integer products of int8 rows this long are exact as float32, too
WIDTH_MULTIPLE = 16  # rotated vectors are padded to whole SIMD lanes
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_LAYOUT: dict[str, tuple[type[np.generic], tuple[str | int, ...]]] = {
    "rotation": (np.float32, ("dim", "width")),
    "centroids": (np.int8, ("centroids", "width")),
    "centroid_scale": (np.float32, (1,)),
    "length_factors": (np.float32, (256,)),
    "residual_factors": (np.float32, (256,)),
}


@dataclass(frozen=True)
class EncodedTokens:
    """Compressed token vectors.

    Attributes:
        centroids: uint32 ``[n]``.
        residuals: uint8 ``[n, width * bits / 8]``.
        scales: uint8 ``[n, 2]``: which of the codec's length and residual factors apply.
        residual_norms: float32 ``[n]``, lengths of the residuals before rounding; None if not encoded
            just now.
    """

    centroids: NDArray[np.uint32]
    residuals: NDArray[np.uint8]
    scales: NDArray[np.uint8]
    residual_norms: NDArray[np.float32] | None = None


class Codec:
    """Centroids, rotation and quantiser; see the module's text.

    Attributes:
        bits: 2, 4 or 8 per dimension of a residual.
        rotation: float32 ``[dim, width]`` with orthonormal rows.
        centroids: int8 ``[K, width]``, in units of ``centroid_scale``.
        length_factors: float32 ``[256]``, ascending: the values of a.
        residual_factors: float32 ``[256]``, ascending: the values of b / a.
        training: statistics of the training sample: ``tokens``, ``centroids_requested``,
            ``residual_norm`` (mean) and ``residual_norm_quantiles``, and ``notes`` for the reader.
        sha256: digest of the content; every shard names it.
    """

    def __init__(
        self,
        bits: int,
        rotation: NDArray[np.float32],
        centroids: NDArray[np.int8],
        centroid_scale: NDArray[np.float32],
        length_factors: NDArray[np.float32],
        residual_factors: NDArray[np.float32],
        training: dict[str, Any],
    ) -> None:
        self.bits = bits
        self.rotation = rotation
        self.centroids = centroids
        self.centroid_scale = centroid_scale
        self.length_factors = length_factors
        self.residual_factors = residual_factors
        self.training = training
        self._tensors = save(self._named_tensors())
        digest = hashlib.sha256(json.dumps([SCHEMA_VERSION, bits, training], sort_keys=True).encode())
        digest.update(self._tensors)
        self.sha256 = digest.hexdigest()
        self._assigner: Assigner | None = None

    @property
    def dim(self) -> int:
        """Dimensions of the vectors that go in."""
        return self.rotation.shape[0]

    @property
    def width(self) -> int:
        """Dimensions of the rotated vectors: ``dim`` rounded up to a multiple of 16."""
        return self.rotation.shape[1]

    @property
    def residual_bytes(self) -> int:
        """Bytes of one packed residual."""
        return self.width * self.bits // 8

    @property
    def code_dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every centroid's number."""
        return np.dtype("<u2") if len(self.centroids) <= 1 << 16 else np.dtype("<u4")

    @classmethod
    def train(
        cls,
        sample: NDArray[np.floating[Any]],
        config: CodecConfig,
        *,
        total_tokens: int | None = None,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Codec:
        """Trains a codec; a pure function of the sample, the configuration and ``total_tokens``.

        Args:
            sample: floating ``[n, dim]``, token vectors of the corpus.
            config: centroids, bits, iterations, seed.
            total_tokens: tokens of the whole corpus, for the default number of centroids; n if not given.
            threads: bound on the threads of FAISS and torch; all cores if not given.
            progress: called with a stage and the share of it that is done.

        Raises:
            DataError: the sample is empty.
            DimensionError: it is not a matrix.
            NonFiniteError: it holds a NaN or an infinity.
        """
        _check_shape(sample, None)
        if len(sample) == 0:
            raise DataError("the sample to train the codec from is empty")
        rotation = _random_rotation(sample.shape[1], np.random.default_rng(config.seed))
        rotated = np.empty((len(sample), rotation.shape[1]), dtype=np.float32)
        for start in range(0, len(sample), CHUNK):
            part = slice(start, min(start + CHUNK, len(sample)))
            rotate_rows(_finite(sample[part], start), rotation, rotated[part])
        wanted = config.centroids or default_centroids(total_tokens or len(sample))
        count = min(wanted, len(sample))
        notes = []
        if count < wanted:
            notes.append(
                f"{wanted} centroids were asked for, the sample has {count} vectors: trained {count}"
            )
        elif len(sample) < (total_tokens or 0) and len(sample) < FEW_POINTS * count:
            notes.append(
                f"{count} centroids are trained from a sample of {len(sample)} vectors, fewer than "
                f"{FEW_POINTS} for each: a larger sample_tokens, or fewer centroids, would fit better"
            )
        means = train_centroids(
            rotated,
            count,
            iterations=config.kmeans_iterations,
            seed=config.seed,
            threads=threads or os.cpu_count() or 1,
            progress=progress,
        )
        centroids, scale = quantize_grid(means)
        codec = cls(
            config.residual_bits,
            rotation,
            centroids,
            np.array([scale], dtype=np.float32),
            np.ones(256, dtype=np.float32),
            np.ones(256, dtype=np.float32),
            {},
        )
        fitted = np.ascontiguousarray(rotated[:: -(-len(rotated) // FITTED)])
        nearest = codec.assigner.nearest(fitted)
        levels, norms, factors = codec._fit(fitted, nearest)
        lengths = codec._lengths(fitted, nearest, levels, factors)
        tables = factor_tables(lengths, factors)
        training = {
            "tokens": len(sample),
            "centroids_requested": wanted,
            "residual_factor": float(tables[1][nearest_entry(tables[1], factors)].mean(dtype=np.float64)),
            "residual_norm": float(norms.mean(dtype=np.float64)),
            "residual_norm_quantiles": {str(q): float(np.quantile(norms, q)) for q in QUANTILES},
            "notes": notes,
        }
        return cls(codec.bits, rotation, centroids, codec.centroid_scale, *tables, training)

    def encode(self, vectors: NDArray[np.floating[Any]]) -> EncodedTokens:
        """Compresses token vectors; what a vector becomes does not depend on those beside it.

        Args:
            vectors: floating ``[n, dim]``.

        Raises:
            DimensionError: the vectors have another dimension.
            NonFiniteError: a vector holds a NaN or an infinity; the message names the row.
        """
        _check_shape(vectors, self.dim)
        n = len(vectors)
        nearest = np.empty(n, dtype=np.uint32)
        residuals = np.empty((n, self.residual_bytes), dtype=np.uint8)
        scales = np.empty((n, 2), dtype=np.uint8)
        norms = np.empty(n, dtype=np.float32)
        for start in range(0, n, CHUNK):
            part = slice(start, min(start + CHUNK, n))
            rotated = self.rotate(_finite(vectors[part], start))
            nearest[part] = self.assigner.nearest(rotated)
            levels, norms[part], factors = self._fit(rotated, nearest[part])
            residuals[part] = pack_levels(levels, self.bits)
            scales[part, 1] = nearest_entry(self.residual_factors, factors)
            stored = self.residual_factors[scales[part, 1]]
            scales[part, 0] = nearest_entry(
                self.length_factors, self._lengths(rotated, nearest[part], levels, stored)
            )
        return EncodedTokens(nearest, residuals, scales, norms)

    def decode(self, tokens: EncodedTokens) -> NDArray[np.float32]:
        """The vectors float32 ``[n, dim]`` that scores are computed from."""
        levels = unpack_levels(tokens.residuals, self.bits, self.width).astype(np.float32)
        a = self.length_factors[tokens.scales[:, 0]]
        b = a * self.residual_factors[tokens.scales[:, 1]]
        centroids = self.centroids[tokens.centroids].astype(np.float32) * self.centroid_scale
        return (a[:, None] * centroids + b[:, None] * levels) @ self.rotation.T

    def rotate(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 ``[n, dim]`` to ``[n, width]``."""
        rotated = np.empty((len(vectors), self.width), dtype=np.float32)
        rotate_rows(np.ascontiguousarray(vectors, dtype=np.float32), self.rotation, rotated)
        return rotated

    @property
    def assigner(self) -> Assigner:
        """Finds nearest centroids; made on first use."""
        if self._assigner is None:
            self._assigner = Assigner(self.centroids, self.centroid_scale[0])
        return self._assigner

    def save(self, directory: str | Path) -> None:
        """Writes ``codec.safetensors`` and ``codec.json`` into ``directory``, which is made if needed."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / TENSORS_FILE).write_bytes(self._tensors)
        description = {
            "schema_version": SCHEMA_VERSION,
            "sha256": self.sha256,
            "bits": self.bits,
            "dim": self.dim,
            "centroids": len(self.centroids),
            "training": self.training,
        }
        text = json.dumps(description, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        (directory / DESCRIPTION_FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Codec:
        """Reads a codec and checks its digest.

        Raises:
            IndexFormatError: a file is missing or damaged.
            SchemaVersionError: a newer version of raycolbert wrote it.
        """
        directory = Path(directory)
        path = directory / DESCRIPTION_FILE
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            version = description["schema_version"]
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise SchemaVersionError(
                    f"{path}: schema version {version}, this reads up to {SCHEMA_VERSION}"
                )
            bits, training = int(description["bits"]), dict(description["training"])
            expected = str(description["sha256"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IndexFormatError(f"{path}: not a codec description: {error!r}") from None
        path = directory / TENSORS_FILE
        try:
            tensors = load_file(path)
            sizes: dict[str, int] = {}
            for name, (dtype, shape) in _LAYOUT.items():
                found = tensors[name].shape
                wanted = tuple(
                    sizes.setdefault(s, f) if isinstance(s, str) else s
                    for s, f in zip(shape, found, strict=True)
                )
                if found != wanted or tensors[name].dtype != dtype:
                    raise ValueError(
                        f"{name} is {tensors[name].dtype} {found}, not {dtype.__name__} {wanted}"
                    )
            if bits not in STEP:
                raise ValueError(f"{bits} bits; there are: {', '.join(map(str, STEP))}")
            codec = cls(bits, training=training, **{name: tensors[name] for name in _LAYOUT})
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise IndexFormatError(f"{path}: not a codec: {error}") from None
        if codec.sha256 != expected:
            raise IndexFormatError(f"{path}: damaged: its digest is {codec.sha256}, recorded is {expected}")
        return codec

    def _named_tensors(self) -> dict[str, NDArray[Any]]:
        return {name: np.ascontiguousarray(getattr(self, name)) for name in _LAYOUT}

    def _fit(
        self, rotated: NDArray[np.float32], nearest: NDArray[np.uint32]
    ) -> tuple[NDArray[np.int8], NDArray[np.float32], NDArray[np.float32]]:
        """Levels, residual norms and residual factors of rotated vectors."""
        levels = np.empty(rotated.shape, dtype=np.int8)
        norms = np.empty(len(rotated), dtype=np.float32)
        factors = np.empty(len(rotated), dtype=np.float32)
        step = np.float32(STEP[self.bits])
        grid = self.centroids, self.centroid_scale[0]
        fit_levels(rotated, nearest, *grid, step, self.bits, levels, norms, factors)
        return levels, norms, factors

    def _lengths(
        self,
        rotated: NDArray[np.float32],
        nearest: NDArray[np.uint32],
        levels: NDArray[np.int8],
        factors: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        lengths = np.empty(len(rotated), dtype=np.float32)
        fit_lengths(rotated, nearest, self.centroids, self.centroid_scale[0], levels, factors, lengths)
        return lengths


def default_centroids(tokens: int) -> int:
    """The PLAID rule: ``2^floor(log2(16 sqrt(tokens)))``."""
    return 1 << max(0, math.floor(math.log2(16 * math.sqrt(tokens))))


def _random_rotation(dim: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Orthonormal rows ``[dim, width]``, width = dim rounded up to a multiple of 16."""
    width = -(-dim // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    return np.linalg.qr(rng.standard_normal((width, width)))[0][:dim].astype(np.float32)


def _check_shape(vectors: NDArray[np.floating[Any]], dim: int | None) -> None:
    """Raises DimensionError for what is not a matrix, or one of another dimension than ``dim``."""
    if vectors.ndim != 2 or (dim is not None and vectors.shape[1] != dim):
        raise DimensionError(f"token vectors must be [n, {dim or 'dim'}], not {list(vectors.shape)}")
    if vectors.shape[1] > MAX_DIM:
        raise DimensionError(f"token vectors have {vectors.shape[1]} dimensions, more than {MAX_DIM}")


def _finite(vectors: NDArray[np.floating[Any]], first: int) -> NDArray[np.float32]:
    """Vectors as contiguous float32.

    Args:
        vectors: floating ``[n, dim]``.
        first: number of the first one, for the message.

    Raises:
        NonFiniteError: one holds a NaN or an infinity.
    """
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    finite = np.isfinite(vectors).all(axis=1)
    if not finite.all():
        raise NonFiniteError(f"token vector {first + int(np.argmin(finite))} holds a NaN or an infinity")
    return vectors
