"""The torch engine answers as the compiled kernels do, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pyarrow.compute as pc
import pytest
import torch

from colbert_core.config import SearchConfig
from colbert_core.index import add_documents, delete_documents, merge_hits, open_index, torch_engine
from tests.clustered_vectors import build, make_corpus, make_queries, train_codec

CORPUS = make_corpus(400)
QUERIES = make_queries(CORPUS, 40)
SETTINGS = [SearchConfig(probes=3, candidates=60, rerank=25), SearchConfig(probes=1, candidates=5, rerank=5)]
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_both_engines_answer_alike(
    tmp_path: Path, device: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, added = CORPUS.part(range(300)), CORPUS.part(range(300, 400))
    directory = build(tmp_path / "i", train_codec(built, bits=bits), built, 2)
    delete_documents(directory, built.ids[:20])
    add_documents(directory, added.ids, added.vectors, added.lengths, added.metadata)
    ours, theirs = open_index(directory), open_index(directory, device=device)
    red = pc.field("colour") == "red"
    for cells in (1 << 26, 1 << 12):  # small enough for documents and query tokens to be split up
        monkeypatch.setattr(torch_engine, "_CELLS", cells)
        for settings in SETTINGS:
            for k, condition in ((10, None), (60, None), (10, red), (10, [])):
                expected = ours.search(QUERIES, k, settings, condition)
                assert theirs.search(QUERIES, k, settings, condition) == expected
        assert theirs.search_exact(QUERIES[:5], 400) == ours.search_exact(QUERIES[:5], 400)
        mixed = zip(
            ours.search_partial(QUERIES, 10, SETTINGS[0]),
            theirs.search_partial(QUERIES, 10, SETTINGS[0]),
            strict=True,
        )
        for own, other in mixed:
            assert merge_hits([own]) == merge_hits([other])
    ours.close()
    theirs.close()
