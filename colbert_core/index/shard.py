"""A shard on disk: memory-mapped arrays and a manifest.

A shard is a pure function of the codec and of the set of its documents: documents are stored in the
order of their ids, so that whatever order they arrive in, the same bytes result. Nothing in it is ever
rewritten; deletions are bitmaps beside it (:mod:`colbert_core.index.directory`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from colbert_core.config import FrozenModel
from colbert_core.errors import DataError, IndexFormatError
from colbert_core.index.codec import Codec, EncodedTokens
from colbert_core.index.sealed_json import read_sealed, seal
from colbert_core.tensor_files import file_sha256

MANIFEST_FILE = "manifest.json"
METADATA_FILE = "metadata.arrow"
Verify = Literal["fast", "full"]


class FileInfo(FrozenModel):
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


class ShardManifest(FrozenModel):
    """What a shard consists of.

    Attributes:
        codec_sha256: digest of the codec that its tokens are encoded with.
        documents, tokens, postings: counts.
        residual_factor_counts: how many tokens use each of the codec's 256 residual factors.
        files: by name.
    """

    schema_version: Literal[1] = 1
    codec_sha256: str
    documents: int
    tokens: int
    postings: int
    residual_factor_counts: tuple[int, ...]
    files: dict[str, FileInfo]


def write_manifest(directory: Path, manifest: ShardManifest) -> None:
    """Writes the manifest with a digest of itself."""
    (directory / MANIFEST_FILE).write_text(seal(manifest), encoding="utf-8")


def read_manifest(directory: Path) -> ShardManifest:
    """Reads and checks a manifest; errors as of :func:`~colbert_core.index.sealed_json.read_sealed`."""
    return read_sealed(directory / MANIFEST_FILE, ShardManifest, "a shard manifest")


def array_layout(
    codec: Codec, documents: int, tokens: int, postings: int
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every array file, by name; ``ids`` is as long as the ids are."""
    return {
        "offsets": ("<i8", (documents + 1,)),
        "codes": (codec.code_dtype.str, (tokens,)),
        "residuals": ("|u1", (tokens, codec.residual_bytes)),
        "scales": ("|u1", (tokens, 2)),
        "posting_offsets": ("<i8", (len(codec.centroids) + 1,)),
        "postings": ("<i4", (postings,)),
        "id_offsets": ("<i8", (documents + 1,)),
        "tie_breaks": ("<u4", (documents,)),
    }


def checked_ids(ids: Iterable[str]) -> list[str]:
    """External ids as a list.

    Raises:
        DataError: they are one string, no collection, or one of them is no string.
    """
    if isinstance(ids, (str, bytes)):  # its letters would be taken for ids
        raise DataError(f"ids are a collection of strings, not the string {ids!r}")
    try:
        items = iter(ids)
    except TypeError:
        raise DataError(f"ids are a collection of strings, not {ids!r}") from None
    names = list(items)
    for position, name in enumerate(names):
        if not isinstance(name, str):
            raise DataError(f"id {position} is {name!r}, not a string")
    return names


class Shard:
    """An open shard.

    All arrays are read-only views of mapped files.

    Attributes:
        directory: where it lies.
        manifest: its manifest.
        offsets: int64 ``[documents + 1]``: document i owns tokens ``offsets[i]`` to ``offsets[i + 1]``.
        codes: uint16 or uint32 ``[tokens]``, centroid of each token.
        residuals: uint8 ``[tokens, residual bytes]``.
        scales: uint8 ``[tokens, 2]``.
        posting_offsets: int64 ``[centroids + 1]``.
        postings: int32: for each centroid the documents that hold it, ascending.
        tie_breaks: uint32 ``[documents]``, a hash of the id.
        live: bool ``[documents]``, false where deleted.
    """

    def __init__(
        self, directory: Path, manifest: ShardManifest, codec: Codec, arrays: dict[str, NDArray[Any]]
    ) -> None:
        self.directory = directory
        self.manifest = manifest
        self.codec = codec
        self.offsets: NDArray[np.int64] = arrays["offsets"]
        self.codes: NDArray[Any] = arrays["codes"]
        self.residuals: NDArray[np.uint8] = arrays["residuals"]
        self.scales: NDArray[np.uint8] = arrays["scales"]
        self.posting_offsets: NDArray[np.int64] = arrays["posting_offsets"]
        self.postings: NDArray[np.int32] = arrays["postings"]
        self.tie_breaks: NDArray[np.uint32] = arrays["tie_breaks"]
        self._ids: NDArray[np.uint8] = arrays["ids"]
        self._id_offsets: NDArray[np.int64] = arrays["id_offsets"]
        self.live: NDArray[np.bool_] = np.ones(manifest.documents, dtype=np.bool_)

    @classmethod
    def open(cls, directory: str | Path, codec: Codec, verify: Verify = "fast") -> Shard:
        """Maps a shard.

        Args:
            directory: the shard.
            codec: the index's codec.
            verify: 'fast' checks the manifest's digest, every file's size, and the offsets that other
                arrays are indexed by; damage inside a file that keeps its size can then change an
                answer but not crash the process. 'full' checks every file's SHA-256 as well.

        Raises:
            IndexFormatError: a file is missing, cut off or damaged, or another codec wrote the shard.
            SchemaVersionError: a newer version of raycolbert wrote it.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        if manifest.codec_sha256 != codec.sha256:
            raise IndexFormatError(
                f"{directory}: encoded with codec {manifest.codec_sha256[:12]}, "
                f"the index has {codec.sha256[:12]}"
            )
        for name, info in manifest.files.items():
            path = directory / name
            try:
                size = path.stat().st_size
                digest = file_sha256(path) if verify == "full" and size == info.size else info.sha256
            except OSError as error:
                raise IndexFormatError(f"{path}: {error.strerror}") from None
            if size != info.size:
                raise IndexFormatError(f"{path}: has {size} bytes, the manifest says {info.size}")
            if digest != info.sha256:
                raise IndexFormatError(
                    f"{path}: damaged: SHA-256 is {digest}, the manifest says {info.sha256}"
                )
        layout = array_layout(codec, manifest.documents, manifest.tokens, manifest.postings)
        layout["ids"] = ("|u1", (manifest.files["ids"].size if "ids" in manifest.files else 0,))
        arrays = {name: _map(directory / name, manifest, *spec) for name, spec in layout.items()}
        for name, end in (
            ("offsets", manifest.tokens),
            ("posting_offsets", manifest.postings),
            ("id_offsets", len(arrays["ids"])),
        ):
            if (
                arrays[name][0] != 0
                or arrays[name][-1] != end
                or np.any(arrays[name][1:] < arrays[name][:-1])
            ):
                raise IndexFormatError(f"{directory / name}: damaged: offsets do not ascend from 0 to {end}")
        return cls(directory, manifest, codec, arrays)

    def __len__(self) -> int:
        """Documents, deleted ones included."""
        return self.manifest.documents

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(info.size for info in self.manifest.files.values())

    def ids(self, documents: NDArray[np.integer[Any]] | Sequence[int]) -> list[str]:
        """External ids of documents.

        Raises:
            IndexFormatError: an id is not UTF-8 any more.
        """
        offsets = self._id_offsets
        try:
            return [self._ids[offsets[i] : offsets[i + 1]].tobytes().decode("utf-8") for i in documents]
        except UnicodeDecodeError:
            raise IndexFormatError(f"{self.directory / 'ids'}: damaged: an id is not UTF-8") from None

    @property
    def id_array(self) -> pa.LargeStringArray:
        """All ids, ascending, as an Arrow view of the mapped file."""
        offsets, text = pa.py_buffer(self._id_offsets), pa.py_buffer(self._ids)
        return pa.LargeStringArray.from_buffers(len(self), offsets, text)

    def find(self, ids: Sequence[str]) -> NDArray[np.int64]:
        """Document numbers ``[n]`` of external ids; −1 where the shard holds none, deleted or not.

        Raises:
            DataError: see :func:`checked_ids`.
        """
        names = [name.encode("utf-8", "surrogatepass") for name in checked_ids(ids)]
        if len(names) > 64 and len(names) * 32 > len(self):
            # One hash table of all ids costs less than so many binary searches.
            there = self.id_array.cast(pa.large_binary())
            at = pc.index_in(pa.array(names, pa.large_binary()), value_set=there).fill_null(-1)
            return at.to_numpy(zero_copy_only=False).astype(np.int64)
        return np.array([self._find(name) for name in names], dtype=np.int64)

    def _find(self, name: bytes) -> int:
        low, high = 0, len(self)
        offsets = self._id_offsets
        while low < high:
            middle = (low + high) // 2
            if self._ids[offsets[middle] : offsets[middle + 1]].tobytes() < name:
                low = middle + 1
            else:
                high = middle
        if low < len(self) and self._ids[offsets[low] : offsets[low + 1]].tobytes() == name:
            return low
        return -1

    @cached_property
    def metadata(self) -> pa.Table | None:
        """The metadata columns, one row a document, mapped from disk; None if the shard has none.

        Its content is validated when it is first asked for.

        Raises:
            IndexFormatError: it is damaged.
        """
        if METADATA_FILE not in self.manifest.files:
            return None
        path = self.directory / METADATA_FILE
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            table.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise IndexFormatError(f"{path}: damaged: {error}") from None
        if table.num_rows != len(self):
            raise IndexFormatError(f"{path}: has {table.num_rows} rows for {len(self)} documents")
        return table

    def tokens(self, document: int) -> EncodedTokens:
        """The compressed tokens of one document."""
        rows = slice(int(self.offsets[document]), int(self.offsets[document + 1]))
        codes = np.minimum(self.codes[rows].astype(np.uint32), len(self.codec.centroids) - 1)
        return EncodedTokens(codes, self.residuals[rows], self.scales[rows])


def _map(path: Path, manifest: ShardManifest, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """A read-only mapping of an array file."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    if path.name not in manifest.files:
        raise IndexFormatError(f"{path.parent / MANIFEST_FILE}: lists no file {path.name!r}")
    if manifest.files[path.name].size != size:
        raise IndexFormatError(
            f"{path}: {manifest.files[path.name].size} bytes do not hold {dtype} {list(shape)}"
        )
    if size == 0:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape).view(np.ndarray)
