"""Small labelled sets and recipes around them, for tests of the data jobs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import Recipe, parse_recipe
from tests.tiny_models import WORDS

Record = dict[str, Any]


def write_source(
    folder: Path, corpus: list[Record], queries: list[Record], qrels: list[tuple[str, str, int]]
) -> dict[str, str]:
    """Writes a BEIR-style set; returns the ``Source`` section, with paths relative to the parent."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(corpus), folder / "corpus.parquet")
    pq.write_table(pa.Table.from_pylist(queries), folder / "queries.parquet")
    lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{label}" for q, d, label in qrels)]
    (folder / "qrels.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    name = folder.name
    return {
        "corpus": f"{name}/corpus.parquet",
        "queries": f"{name}/queries.parquet",
        "qrels": f"{name}/qrels.tsv",
    }


def word_source(folder: Path, *, documents: int = 40, queries: int = 30, seed: int = 0) -> dict[str, str]:
    """A set over the words of the tiny models: a question is four words of its document."""
    random_ = random.Random(seed)
    corpus = [
        {"_id": f"d{i:03d}", "title": f"title {i}", "text": " ".join(random_.sample(WORDS, 12))}
        for i in range(documents)
    ]
    asked, qrels = [], []
    for i in range(queries):
        document = corpus[i % documents]
        asked.append({"_id": f"q{i:03d}", "text": " ".join(random_.sample(document["text"].split(), 4))})
        qrels.append((f"q{i:03d}", document["_id"], 1))
    return write_source(folder, corpus, asked, qrels)


def data_recipe(root: Path, **sections: Any) -> Recipe:
    """A recipe over the sources of ``root``, with a local store beside them; sections are merged in."""
    sources = {
        path.parent.name: {
            "corpus": f"{path.parent.name}/corpus.parquet",
            "queries": f"{path.parent.name}/queries.parquet",
            "qrels": f"{path.parent.name}/qrels.tsv",
        }
        for path in sorted(root.glob("*/qrels.tsv"))
    }
    tree: dict[str, Any] = {
        "name": "test",
        "storage": {"root": str(root / "store"), "cache_dir": str(root / "cache")},
        "model": {"name": "tiny", "base": "unused", "colbert": {"dim": 16, "document_length": 64}},
        "data": {"root": str(root), "sources": sources},
    }
    for key, value in sections.items():
        tree[key] = {**tree[key], **value} if isinstance(tree.get(key), dict) else value
    return parse_recipe(tree)
