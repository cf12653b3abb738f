"""Scores of 50 pairs are the same in PyLate, sentence-transformers and colbert-ai, loading either's models.

Each library runs in an environment of its own, named by a variable (see CONTRIBUTING.md); without it these
tests are skipped. ``python -m benchmarks.interop`` does the same with models of real size.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from benchmarks.support.interop import TOLERANCE, compare, sample_pairs
from tests.tiny_models import tiny_bert_dir, tiny_japanese_dir, tiny_xlmr_dir

VARIABLES = {
    "pylate": "RAYCOLBERT_PYLATE_PYTHON",
    "sentence-transformers": "RAYCOLBERT_SENTENCE_TRANSFORMERS_PYTHON",
    "colbert-ai": "RAYCOLBERT_COLBERT_AI_PYTHON",
}
BACKBONES = {
    "bert": tiny_bert_dir,
    "lowercase-bert": partial(tiny_bert_dir, lower_case=True),
    "japanese-bert": tiny_japanese_dir,
    "xlm-r": tiny_xlmr_dir,
}
CASES = [(peer, name) for peer in VARIABLES for name in BACKBONES]


def test_the_pairs_are_fifty_and_have_what_is_treated_differently() -> None:
    pairs = sample_pairs()
    assert len(set(pairs)) == 50
    texts = " ".join(text for pair in pairs for text in pair)
    assert all(mark in texts for mark in ".,!?$%[]-/&();:、。")


@pytest.mark.parametrize(("peer", "backbone"), CASES)
def test_scores_are_the_same(peer: str, backbone: str, tmp_path: Path) -> None:
    python = os.environ.get(VARIABLES[peer])
    if not python:
        pytest.skip(f"{VARIABLES[peer]} does not name a Python with {peer}")
    found = compare(peer, python, BACKBONES[backbone](tmp_path / "backbone"), sample_pairs(), 16, tmp_path)
    assert found.reasons == {}
    assert found.ours is not None and found.ours <= TOLERANCE
    assert found.saved is not None and found.saved <= TOLERANCE
    assert found.theirs is not None and found.theirs <= TOLERANCE
