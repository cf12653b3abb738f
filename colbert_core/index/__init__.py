"""The compressed multi-vector index: codec, shards, search."""
