"""Object storage with one set of semantics: a local directory or an S3 bucket.

Reads are strongly consistent, a write is visible whole or not at all, and both backends offer
put-if-absent and compare-and-swap. Everything else in the project that outlives a job stands on this.
"""

from __future__ import annotations

from cluster.config import StorageConfig
from cluster.storage.api import ObjectInfo, ObjectStore, check_key
from cluster.storage.local import LocalStore
from colbert_core.errors import ConfigError

__all__ = ["LocalStore", "ObjectInfo", "ObjectStore", "check_key", "open_store"]


def open_store(config: StorageConfig) -> ObjectStore:
    """Opens the storage that a recipe names; no request is made yet.

    Args:
        config: ``root`` is ``s3://bucket/prefix``, ``file:///directory`` or a directory.

    Raises:
        ConfigError: ``root`` is empty, has another scheme, or names no bucket or a file.
    """
    root = config.root.strip()
    scheme, separator, rest = root.partition("://")
    if not root:
        raise ConfigError("storage.root is empty; it is s3://bucket/prefix or a directory")
    if not separator:
        return LocalStore(config, root)
    if scheme == "file":
        return LocalStore(config, rest)
    if scheme == "s3":
        from cluster.storage.s3 import S3Store

        return S3Store(config)
    raise ConfigError(
        f"storage.root {root!r}: no scheme {scheme!r}; allowed: s3://bucket/prefix or a directory"
    )
