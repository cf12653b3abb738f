"""The content of the data files that outputs are made of: recorded beside them, and compared before re-use.

A version's name says which files went in, not what they held at the time (:mod:`cluster.artifacts`). So
what is made of files records size, SHA-256 and time of the last write of each, and a job that finds its
output made compares: a file that was edited in place is refused by name, and never taken for the old one.
The files of models that are local directories are recorded and compared in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import fs
from pydantic import Field

from cluster.artifacts import ArtifactRef, is_own_model
from cluster.config import Recipe, TupleFiles, fingerprint
from cluster.manifest import Sha256
from cluster.registry import Registry
from cluster.sources import locate, matching_files, open_data
from colbert_core.config import FrozenModel
from colbert_core.errors import DataError

# Where a manifest's ``extra`` holds the records of data files, and of models that are local directories.
KEY, MODELS_KEY = "data_files", "model_files"
_THREADS = 4
_BLOCK_BYTES = 1 << 20
# Digests that this process has made, by place, size and time of the last write.
_known: dict[tuple[str | None, str, str, int, int], str] = {}


class DataFile(FrozenModel):
    """What a data file held.

    Attributes:
        size: bytes.
        sha256: hex digest of the content.
        modified: time of the last write in nanoseconds, where the storage tells; a file of the same size
            that has another time is read to be compared.
    """

    size: int = Field(ge=0)
    sha256: Sha256
    modified: int | None


class DataFiles:
    """The data files of an output, read once.

    Args:
        recipe: says where relative paths start.
        paths: data paths of the recipe; one that is named twice counts once.

    Raises:
        DataError: a file is missing.

    Attributes:
        files: what they held, by path.
    """

    def __init__(self, recipe: Recipe, paths: Iterable[str]) -> None:
        self._recipe = recipe
        names = list(dict.fromkeys(paths))
        with ThreadPoolExecutor(_THREADS) as pool:
            self.files = dict(zip(names, pool.map(lambda path: _read(recipe, path), names), strict=True))

    @property
    def fingerprint(self) -> str:
        """Digest of the content, for :attr:`cluster.manifest.Manifest.data_fingerprint`."""
        return fingerprint({path: file.sha256 for path, file in self.files.items()})

    def record(self, key: str = KEY) -> dict[str, Any]:
        """For the ``extra`` of a manifest, once all is made of these files.

        Raises:
            DataError: a file was written to since it was read here: what was made holds some of both.
        """
        for path, file in self.files.items():
            info = _info(self._recipe, path)
            if (info.size, info.mtime_ns) != (file.size, file.modified):
                raise DataError(f"{path}: the file was changed while the job read it; run the job again")
        return {key: {path: file.model_dump(mode="json") for path, file in self.files.items()}}


def source_files(recipe: Recipe, *names: str) -> list[str]:
    """The data paths of labelled sources."""
    sources = [recipe.data.sources[name] for name in names]
    return [path for source in sources for path in (source.corpus, source.queries, source.qrels)]


def tuple_files(recipe: Recipe, files: TupleFiles) -> list[str]:
    """The data paths of an existing training set.

    Raises:
        DataError: a pattern matches no file.
    """
    patterns = [pattern for pattern in (files.tuples, files.queries, files.documents) if pattern]
    return [path for pattern in patterns for path in matching_files(recipe, pattern)]


def model_files(*models: str) -> list[str]:
    """The files of those models that are local directories, hidden ones left out; absolute paths."""
    folders = [Path(model).expanduser().absolute() for model in models]
    return [
        str(path)
        for folder in dict.fromkeys(folders)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def scorer_files(recipe: Recipe, names: Iterable[str]) -> list[str]:
    """The files of scorers' models, as :func:`model_files`; models that the recipe makes have versions."""
    models = [getattr(recipe.scorers[name], "model", None) for name in names]
    return model_files(*(model for model in models if model and not is_own_model(recipe, model)))


def check_same_files(recipe: Recipe, registry: Registry, ref: ArtifactRef, patterns: Sequence[str]) -> None:
    """Do the files still hold what a published version was made of?

    Where none of them is there, as on a machine without the data, there is nothing to compare, nor for
    versions that record no files. The same holds for models' directories, apart from the data; a file that
    is new in one is of no matter.

    Args:
        recipe: the recipe that names the version.
        registry: where it is published.
        ref: the version.
        patterns: data paths, or patterns of them, that it is made of by the recipe.

    Raises:
        DataError: a file is new, gone or changed; the message names it.
    """
    extra = registry.manifest(ref).extra
    _check_record(recipe, ref, extra.get(KEY), patterns)
    _check_record(recipe, ref, extra.get(MODELS_KEY), ())


def _check_record(recipe: Recipe, ref: ArtifactRef, recorded: object, patterns: Sequence[str]) -> None:
    if not isinstance(recorded, dict):
        return
    before = {path: DataFile.model_validate(entry) for path, entry in recorded.items()}
    now = _present(recipe, patterns, before)
    if not now:
        return
    for path in dict.fromkeys([*before, *now]):
        if what := _difference(recipe, path, before.get(path), now.get(path)):
            raise DataError(
                f"{path}: {what}, since {ref} was made of it; to make all anew from the files as they "
                f"are now, give data.edition another value (it is {recipe.data.edition!r})"
            )


def _present(
    recipe: Recipe, patterns: Sequence[str], before: Mapping[str, DataFile]
) -> dict[str, fs.FileInfo]:
    paths = set(before)
    for pattern in patterns:
        try:
            paths.update(matching_files(recipe, pattern))
        except DataError:
            continue
    found = {path: _info(recipe, path) for path in sorted(paths)}
    return {path: info for path, info in found.items() if info.type == fs.FileType.File}


def _difference(recipe: Recipe, path: str, before: DataFile | None, now: fs.FileInfo | None) -> str | None:
    if before is None:
        return "the file is new"
    if now is None:
        return "the file is gone"
    if now.size != before.size:
        return f"the file has {now.size:,} bytes instead of {before.size:,}"
    untouched = now.mtime_ns is not None and now.mtime_ns == before.modified
    if not untouched and _read(recipe, path).sha256 != before.sha256:
        return "the file holds other bytes"
    return None


def _info(recipe: Recipe, path: str) -> fs.FileInfo:
    filesystem, location = locate(recipe, path)
    return filesystem.get_file_info(location)


def _read(recipe: Recipe, path: str) -> DataFile:
    filesystem, location = locate(recipe, path)
    info = filesystem.get_file_info(location)
    server, kind = recipe.storage.endpoint_url, filesystem.type_name
    place = (server, kind, location, info.size or 0, info.mtime_ns or 0)
    if place not in _known or info.mtime_ns is None:
        digest = hashlib.sha256()
        with open_data(recipe, path) as handle:
            while block := handle.read(_BLOCK_BYTES):
                digest.update(block)
        _known[place] = digest.hexdigest()
    return DataFile(size=info.size, sha256=_known[place], modified=info.mtime_ns)
