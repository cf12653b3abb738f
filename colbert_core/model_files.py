"""The files of a model, wherever they lie, and whether several models agree in them.

A model is a mapping from relative paths to files that are read in ranges: local ones here, published ones
in object storage (``cluster/published_model.py``). Whatever is computed from weights piece by piece takes
such a mapping and does not know which it is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from colbert_core.errors import ModelError
from colbert_core.tensor_files import file_sha256

_SHOWN_DIFFERENCES = 6
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# Files that say nothing about what a model computes.
_IGNORED_FILES = ("README.md", ".gitattributes")
# Keys that only say which release wrote a file.
_IGNORED_KEYS = frozenset({"transformers_version", "__version__", "_name_or_path"})
# The keys of Stanford's metadata that determine the vectors; the rest describes the training run.
_STANFORD_METADATA = "artifact.metadata"
_STANFORD_KEYS = frozenset(
    [
        *("query_token_id", "doc_token_id", "query_maxlen", "doc_maxlen", "dim"),
        *("mask_punctuation", "attend_to_mask_tokens", "interaction", "similarity"),
    ]
)


class RangedFile(Protocol):
    """A file that is read in ranges, by several threads at once; ``str()`` names it in messages."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def sha256(self) -> str:
        """Hex digest of the content."""

    def read_into(self, start: int, buffer: memoryview) -> None:
        """Fills the buffer with the bytes from ``start`` on.

        Raises:
            RaycolbertError: they cannot be read, or the file ends before.
        """


ModelFiles = Mapping[str, RangedFile]


class LocalFile:
    """A file of this machine; it can be pickled, and is opened where it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    @cached_property
    def sha256(self) -> str:
        return file_sha256(self.path)

    def read_into(self, start: int, buffer: memoryview) -> None:
        done = 0
        with self.path.open("rb", buffering=0) as stream:
            while done < len(buffer):
                count = os.preadv(stream.fileno(), [buffer[done:]], start + done)
                if count == 0:
                    raise ModelError(f"{self.path}: ends at byte {start + done}")
                done += count


def local_model(directory: Path) -> dict[str, RangedFile]:
    """The files of a model directory.

    Raises:
        ModelError: there is no such directory.
    """
    if not directory.is_dir():
        raise ModelError(f"{directory}: no such model directory")
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): LocalFile(path) for path in paths}


def read_range(file: RangedFile, start: int, length: int) -> bytes:
    """So many bytes from ``start`` on, or up to the end of the file."""
    buffer = bytearray(max(0, min(length, file.size - start)))
    file.read_into(start, memoryview(buffer))
    return bytes(buffer)


def common_files(models: Sequence[ModelFiles]) -> list[str]:
    """Paths of the files that make up each of the models, after checking that the models agree.

    Weights (safetensors) may have other values. Everything else must be the same, but for version stamps
    and Stanford's record of the training run; files that only describe a model are left out.

    Raises:
        ModelError: a model holds pickled weights or no safetensors, or they differ in files; all of
            these are listed.
    """
    listings = [_listed(model) for model in models]
    (first, listing), differences = (models[0], listings[0]), []
    for model, others in zip(models[1:], listings[1:], strict=True):
        differences += [f"{name} is only in {first[name]}" for name in listing if name not in others]
        differences += [f"{name} is only in {model[name]}" for name in others if name not in listing]
        differences += [
            f"{name} differs between {first[name]} and {model[name]}{detail}"
            for name in listing
            if name in others and (detail := _difference(name, first[name], model[name])) is not None
        ]
    refuse_differences(differences)
    if not any(name.endswith(".safetensors") for name in listing):
        raise ModelError(f"{next(iter(first.values()), 'a model without files')}: no .safetensors beside it")
    return listing


def refuse_differences(differences: Sequence[str]) -> None:
    """Raises ModelError with what differs, if anything does."""
    if not differences:
        return
    more = len(differences) - _SHOWN_DIFFERENCES
    shown = "; ".join(differences[:_SHOWN_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")
    raise ModelError(f"these models cannot be averaged: {shown}")


def _listed(model: ModelFiles) -> list[str]:
    for name in model:
        if name.endswith(_PICKLES):
            raise ModelError(f"{model[name]}: pickled weights are never loaded; convert to safetensors")
    return sorted(name for name in model if name not in _IGNORED_FILES)


def _difference(name: str, left: RangedFile, right: RangedFile) -> str | None:
    """None if two files mean the same, else a remark for the error message (may be empty)."""
    path = PurePosixPath(name)
    if path.suffix == ".safetensors" or left.sha256 == right.sha256:
        return None
    if path.suffix != ".json" and path.name != _STANFORD_METADATA:
        return ""
    try:
        a, b = _meaning(path.name, left), _meaning(path.name, right)
    except ValueError:
        return ""
    if a == b:
        return None
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
        return f" in {', '.join(keys[:_SHOWN_DIFFERENCES])}"
    return ""


def _meaning(name: str, file: RangedFile) -> Any:
    """A JSON file's content without what does not bear on the model."""
    tree = json.loads(read_range(file, 0, file.size).decode("utf-8"))
    if not isinstance(tree, dict):
        return tree
    if name == _STANFORD_METADATA:
        flat = tree.get("config", tree)
        return {key: flat.get(key) for key in _STANFORD_KEYS}
    return {key: value for key, value in tree.items() if key not in _IGNORED_KEYS}
