"""The shards of an index that one group serves."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from cluster.artifacts import ArtifactRef
from cluster.registry import Registry
from colbert_core.errors import IndexFormatError
from colbert_core.index import Searcher, open_index
from colbert_core.index.directory import Generation, generation_order
from colbert_core.index.shard import MANIFEST_FILE
from serving.filters import parse_filter
from serving.protocol import GroupHits, GroupQuery
from serving.router import shards_of_group


class GroupShards:
    """One index version's shards, open and ready.

    Args:
        searcher: over these shards; None for a group that has none of this version.
    """

    def __init__(self, searcher: Searcher | None) -> None:
        self._searcher = searcher

    def search(self, query: GroupQuery) -> GroupHits:
        """What these shards contribute to the answers, with the documents' metadata.

        Raises:
            SearchError: the filter or a setting is refused.
        """
        if self._searcher is None:
            return GroupHits([], {})
        condition = None if query.filter is None else parse_filter(query.filter)
        hits = self._searcher.search_partial(query.split(), query.k, query.params, condition)
        found = dict.fromkeys(key for part in hits for key in part.ids)
        return GroupHits(hits, self._searcher.records(list(found), query.columns))

    def score(self, query: GroupQuery, ids: Sequence[str]) -> dict[str, float]:
        """Scores for the first query, of those of the documents that are in these shards."""
        return {} if self._searcher is None else self._searcher.score_known(query.split()[0], ids)


def open_group(registry: Registry, ref: ArtifactRef, group: int, groups: int, threads: int) -> GroupShards:
    """Pulls and opens a group's share of an index: its shards and the codec, and no other shard's files.

    Args:
        registry: where the index is.
        ref: the index version.
        group: number of the group.
        groups: how many groups there are.
        threads: threads of one search.

    Raises:
        ArtifactNotFound: the version is not published.
        IntegrityError: a file in storage is damaged.
        IndexFormatError: the shards cannot be opened.
    """
    paths = shard_paths(registry, ref)
    mine = [paths[number] for number in shards_of_group(group, groups, len(paths))]
    if not mine:
        return GroupShards(None)
    wanted = ("codec/", "generations/", "tombstones/", *(f"{path}/" for path in mine))
    files = [path for path in registry.manifest(ref).files if path.startswith(wanted)]
    # The registry checks every byte against its SHA-256; opening need not do that again.
    directory = registry.pull(ref, paths=files)
    with registry.cache.released_on_error(directory):
        searcher = open_index(directory, shards=mine, threads=threads)
        _warm(searcher)
    shards = GroupShards(searcher)
    # When no search holds it any longer, its files may make room for newer versions'.
    weakref.finalize(shards, registry.cache.release, directory)
    return shards


def shard_paths(registry: Registry, ref: ArtifactRef) -> list[str]:
    """Directories of an index's shards, in the order of their numbers; deltas come last.

    Raises:
        ArtifactNotFound: the version is not published.
        IndexFormatError: it has no shards, or its newest generation is not readable.
    """
    files = registry.manifest(ref).files
    written = (PurePosixPath(path) for path in files if path.startswith("generations/"))
    # Only whole ones: a change that was killed leaves a file with another ending.
    generations = sorted((path for path in written if path.suffix == ".json"), key=generation_order)
    if not generations:
        folders = [PurePosixPath(path).parent for path in files if path.endswith(f"/{MANIFEST_FILE}")]
        # A writer that was killed leaves a directory whose name begins with a dot.
        whole = [folder for folder in folders if not folder.name.startswith(".")]
        paths = sorted(str(folder) for folder in whole if folder.parent.name == "shards")
    else:
        try:
            with registry.open_file(ref, str(generations[-1])) as newest:
                tree = json.load(newest)
            tree.pop("sha256", None)
            paths = [entry.path for entry in Generation.model_validate(tree).shards]
        except (ValueError, AttributeError) as error:
            raise IndexFormatError(f"{ref}: {generations[-1]} is not a generation: {error}") from None
    if not paths:
        raise IndexFormatError(f"{ref}: no index: it has no shards")
    return paths


def _warm(searcher: Searcher) -> None:
    """Compiles or loads all that a search needs, so that no request waits for that."""
    query = np.full((1, searcher.codec.dim), searcher.codec.dim**-0.5, dtype=np.float32)
    searcher.search_partial([query], 1)
    for shard in searcher.shards:
        _ = shard.metadata  # maps it, and reads all of it once, to validate it
