"""Tiny models, made and saved once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from colbert_core.encoder import ColBERT
from colbert_core.formats import save_model
from tests.saved_models import BASES, config


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Callable[[str], ColBERT]:
    made: dict[str, ColBERT] = {}

    def model(base: str) -> ColBERT:
        if base not in made:
            directory = BASES[base](tmp_path_factory.mktemp(base))
            made[base] = ColBERT.create(directory, config(base), seed=1)
        return made[base]

    return model


@pytest.fixture(scope="module")
def saved(models, tmp_path_factory) -> Path:
    """The tiny BERT, saved in both layouts; tests copy it before they change it."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_model(models("bert"), directory)
    return directory


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))
