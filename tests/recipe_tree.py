"""A small valid recipe, as a tree of plain values, for tests that change parts of it."""

from __future__ import annotations

from typing import Any

FILES = {"corpus": "corpus.jsonl", "queries": "queries.jsonl", "qrels": "qrels.tsv"}
PHASE = {"data": ["mined"], "nway": 4, "steps": 20, "queries_per_step": 8, "micro_batch": 4}
TREE: dict[str, Any] = {
    "name": "r",
    "storage": {"root": "store"},
    "model": {"name": "m", "base": "some/backbone"},
    "data": {
        "sources": {"train": FILES, "test": FILES},
        "tuples": {
            "mined": {
                "mine": {"source": "train", "pools": [{"scorer": "bm25", "take": 3}]},
                "score": {"scorers": {"teacher": 1.0}},
            },
            "given": {"read": {"format": "tuples", "tuples": "given.parquet"}},
        },
    },
    "scorers": {
        "bm25": {"kind": "bm25"},
        "teacher": {"kind": "cross_encoder", "model": "some/reranker"},
    },
    "train": [
        {"name": "pre", **PHASE, "checkpoint": {"publish_every_steps": 5}},
        {"name": "post", "init": "pre", **PHASE},
    ],
    "average": {"inputs": [{"phase": "pre", "step": 10}, {"phase": "post"}]},
    "index": {"name": "i", "sources": ["test"]},
    "evaluate": {"sources": ["test"], "systems": {"start": {"model": "base"}}},
    "serve": {},
}
