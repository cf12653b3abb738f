"""What the registry must do on every storage backend; the local and the S3 tests run this same class.

A subclass has a fixture ``config`` that names an empty storage with a cache directory of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config import StorageConfig
from cluster.registry import Registry
from tests.registry_contract.aliases import AliasContract
from tests.registry_contract.artifacts import write
from tests.registry_contract.publishing import PublishingContract
from tests.registry_contract.reading import ReadingContract


class RegistryContract(PublishingContract, ReadingContract, AliasContract):
    """Publishing, reading, aliases and collection."""

    @pytest.fixture
    def registry(self, config: StorageConfig) -> Registry:
        return Registry.open(config)

    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write(tmp_path / "source")
