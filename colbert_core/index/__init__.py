"""The index: one codec, any number of shards, the same answer however documents are spread over them."""

from colbert_core.index.codec import Codec, EncodedTokens, default_centroids
from colbert_core.index.directory import open_index
from colbert_core.index.filters import Filter
from colbert_core.index.maintenance import (
    Drift,
    add_documents,
    check_metadata,
    commit_change,
    compact_index,
    delete_documents,
    known_documents,
    measure_drift,
)
from colbert_core.index.merge import Hit, PartialHits, merge_hits
from colbert_core.index.search import Searcher
from colbert_core.index.shard import Shard, ShardManifest
from colbert_core.index.shard_writer import ShardWriter, shard_of, write_shard

__all__ = [
    "Codec",
    "Drift",
    "EncodedTokens",
    "Filter",
    "Hit",
    "PartialHits",
    "Searcher",
    "Shard",
    "ShardManifest",
    "ShardWriter",
    "add_documents",
    "check_metadata",
    "commit_change",
    "compact_index",
    "default_centroids",
    "delete_documents",
    "known_documents",
    "measure_drift",
    "merge_hits",
    "open_index",
    "shard_of",
    "write_shard",
]
